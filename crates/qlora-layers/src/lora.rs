//! Low-rank adapters (Hu et al., 2021, arXiv 2106.09685, section 4.1) over frozen linear layers.

use crate::ops::{LoraDropout, matmul, matmul_into, seeded_dropout};
use crate::{FrozenLinear, LayerError, Pass, TargetModules};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Which layers get an adapter, and of what kind. The defaults are PEFT's, with the QLoRA paper's
/// "every linear layer" (Dettmers et al., 2023, arXiv 2305.14314, section 4).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank of the update; PEFT's `r`.
    pub rank: usize,
    /// Numerator of the scaling.
    pub alpha: f32,
    /// Probability of zeroing an input of `lora_a` in training.
    pub dropout: f32,
    /// Names, a regular expression, or `"all-linear"`.
    pub target_modules: TargetModules,
    /// Modules left out of what `target_modules` matches: names, or a regular expression.
    pub exclude_modules: Option<TargetModules>,
    /// Scale by `alpha / sqrt(rank)` instead of `alpha / rank` (Kalajdzievski, 2023, arXiv 2312.03732).
    pub use_rslora: bool,
    /// Ranks of single modules: `(pattern, rank)`, the first pattern that matches counts.
    #[serde(with = "pattern_table")]
    pub rank_pattern: Vec<(String, usize)>,
    /// Alphas of single modules: `(pattern, alpha)`, the first pattern that matches counts.
    #[serde(with = "pattern_table")]
    pub alpha_pattern: Vec<(String, f32)>,
    /// Adapt only these layers (indices from 0).
    pub layers_to_transform: Option<Vec<usize>>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 64,
            alpha: 16.0,
            dropout: 0.0,
            target_modules: TargetModules::AllLinear,
            exclude_modules: None,
            use_rslora: false,
            rank_pattern: Vec::new(),
            alpha_pattern: Vec::new(),
            layers_to_transform: None,
        }
    }
}

impl LoraConfig {
    /// Checks ranges.
    ///
    /// # Errors
    /// [`LayerError::Config`] naming the setting.
    pub fn validate(&self) -> Result<(), LayerError> {
        let bad = |field, value: String, reason| Err(LayerError::Config { field, value, reason });
        if self.rank == 0 {
            return bad("rank", self.rank.to_string(), "must be at least 1; common ranks are 8 to 128");
        }
        if let Some((pattern, rank)) = self.rank_pattern.iter().find(|(_, rank)| *rank == 0) {
            return bad("rank_pattern", format!("{pattern} = {rank}"), "every rank must be at least 1");
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return bad("alpha", self.alpha.to_string(), "must be a positive number");
        }
        if let Some((pattern, alpha)) =
            self.alpha_pattern.iter().find(|(_, alpha)| !(alpha.is_finite() && *alpha > 0.0))
        {
            return bad("alpha_pattern", format!("{pattern} = {alpha}"), "every alpha must be a positive number");
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return bad("dropout", self.dropout.to_string(), "must be at least 0 and below 1");
        }
        Ok(())
    }

    /// `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub fn scaling(&self, rank: usize, alpha: f32) -> f32 {
        match self.use_rslora {
            true => (f64::from(alpha) / (rank as f64).sqrt()) as f32,
            false => (f64::from(alpha) / rank as f64) as f32,
        }
    }
}

/// The trainable part: `x ↦ scaling · dropout(x) lora_aᵀ lora_bᵀ`.
#[derive(Clone, Debug)]
pub struct LoraAdapter {
    /// `[rank, in_features]`, f32.
    pub lora_a: Tensor<2>,
    /// `[out_features, rank]`, f32.
    pub lora_b: Tensor<2>,
    /// Factor of the update.
    pub scaling: f32,
    /// Dropout probability in training.
    pub dropout: f32,
    /// Number of this adapter within its model; picks its dropout masks.
    pub index: u32,
}

impl LoraAdapter {
    /// A fresh adapter that changes nothing yet: `lora_a` uniform in ±1/sqrt(in_features) (Kaiming with
    /// a = sqrt(5), PEFT's default), `lora_b` zero. The values depend on `seed` and `index` alone.
    ///
    /// # Shapes
    /// `shape` is the frozen weight's `[out_features, in_features]`.
    pub fn new(
        shape: [usize; 2],
        rank: usize,
        scaling: f32,
        dropout: f32,
        index: u32,
        seed: u64,
        device: &Device,
    ) -> Self {
        let [out_features, in_features] = shape;
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(u64::from(index));
        let bound = 1.0 / (in_features as f32).sqrt();
        let lora_a: Vec<f32> = (0..rank * in_features).map(|_| bound * (2.0 * uniform(&mut rng) - 1.0)).collect();
        Self {
            lora_a: Tensor::from_data(TensorData::new(lora_a, [rank, in_features]), (device, DType::F32)),
            lora_b: Tensor::zeros([out_features, rank], (device, DType::F32)),
            scaling,
            dropout,
            index,
        }
    }

    /// The adapter's rank.
    pub fn rank(&self) -> usize {
        self.lora_a.dims()[0]
    }

    /// Number of trainable values.
    pub fn num_params(&self) -> usize {
        self.lora_a.shape().num_elements() + self.lora_b.shape().num_elements()
    }

    /// The update for `x`, in f32. Factors are cast to the dtype of `x`, where both products run; gradients
    /// come back in f32 through the cast.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in_features]`
    /// - output: `[tokens, out_features]`, f32
    pub fn forward(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        let (lora_a, lora_b) = self.factors(pass);
        let (lora_a, lora_b) = (lora_a.cast(x.dtype()).transpose(), lora_b.cast(x.dtype()).transpose());
        let x = match self.dropout(pass) {
            Some(LoraDropout { seed, p }) => seeded_dropout(x, seed, p),
            None => x,
        };
        matmul_into(matmul(x, lora_a), lora_b, FloatDType::F32).mul_scalar(self.scaling)
    }

    /// The factors, recorded or not as the pass asks.
    fn factors(&self, pass: Pass) -> (Tensor<2>, Tensor<2>) {
        let factor = |factor: &Tensor<2>| match pass.tracked {
            true => factor.clone(),
            false => factor.clone().without_autodiff(),
        };
        (factor(&self.lora_a), factor(&self.lora_b))
    }

    fn dropout(&self, pass: Pass) -> Option<LoraDropout> {
        let seed = pass.seed_for(self.index).filter(|_| self.dropout > 0.0)?;
        Some(LoraDropout { seed, p: self.dropout })
    }

    /// Starts recording: the factors become leaves of the autodiff graph.
    pub fn track(&mut self) {
        self.lora_a = self.lora_a.clone().without_autodiff().autodiff().require_grad();
        self.lora_b = self.lora_b.clone().without_autodiff().autodiff().require_grad();
    }
}

/// Uniform in [0, 1) with 24 random bits.
fn uniform(rng: &mut impl Rng) -> f32 {
    (rng.next_u32() >> 8) as f32 / 16_777_216.0
}

/// A frozen linear layer with an optional bias and an optional adapter:
/// `y = x Wᵀ + b + scaling · dropout(x) lora_aᵀ lora_bᵀ`.
#[derive(Clone, Debug)]
pub struct LoraLinear {
    /// The frozen weight.
    pub base: FrozenLinear,
    /// The frozen bias `[out_features]` in the compute dtype.
    pub bias: Option<Tensor<1>>,
    /// The trainable update.
    pub adapter: Option<LoraAdapter>,
}

impl LoraLinear {
    /// A layer without an adapter.
    pub fn frozen(base: FrozenLinear, bias: Option<Tensor<1>>) -> Self {
        Self { base, bias, adapter: None }
    }

    /// With an adapter the sum is taken in f32 and rounded once. Rounding the base's part to bf16 first would
    /// swallow every update below half an ulp of it, which is what updates are in the first steps: measured
    /// on the reference run, the loss after two steps was then off by 1 %.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in_features]`
    /// - output: `[tokens, out_features]`, dtype of `x`
    pub fn forward(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        let dtype = x.dtype();
        let y = match (&self.adapter, &self.base) {
            (Some(adapter), FrozenLinear::Quantized(base)) => {
                let (lora_a, lora_b) = adapter.factors(pass);
                base.lora_forward(x, lora_a, lora_b, adapter.scaling, adapter.dropout(pass))
            }
            (Some(adapter), FrozenLinear::Dense(_)) => {
                (self.base.forward_into(x.clone(), FloatDType::F32) + adapter.forward(x, pass)).cast(dtype)
            }
            (None, base) => base.forward(x),
        };
        match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }

    /// Puts given factors in place, as a loaded adapter does.
    ///
    /// # Shapes
    /// `lora_a` `[rank, in_features]`, `lora_b` `[out_features, rank]`, f32.
    ///
    /// # Errors
    /// [`LayerError::Shape`] when a factor does not fit this layer; `name` names it in the message.
    pub fn set_adapter(&mut self, name: &str, adapter: LoraAdapter) -> Result<(), LayerError> {
        let [out_features, in_features] = self.base.shape();
        let rank = adapter.rank();
        for (factor, found, expected) in [
            ("lora_A", adapter.lora_a.dims(), [rank, in_features]),
            ("lora_B", adapter.lora_b.dims(), [out_features, rank]),
        ] {
            if found != expected {
                return Err(LayerError::Shape {
                    what: format!("{name}.{factor}.weight (the adapter was made for another model?)"),
                    expected: expected.into(),
                    found: found.into(),
                });
            }
        }
        self.adapter = Some(adapter);
        Ok(())
    }
}

/// `rank_pattern` and `alpha_pattern` are tables in a file and keep their order here.
mod pattern_table {
    use serde::de::{Deserializer, MapAccess, Visitor};
    use serde::ser::{SerializeMap, Serializer};
    use serde::{Deserialize, Serialize};
    use std::marker::PhantomData;

    pub fn serialize<S: Serializer, T: Serialize>(entries: &[(String, T)], serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(entries.len()))?;
        for (pattern, value) in entries {
            map.serialize_entry(pattern, value)?;
        }
        map.end()
    }

    pub fn deserialize<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
        deserializer: D,
    ) -> Result<Vec<(String, T)>, D::Error> {
        struct Entries<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
            type Value = Vec<(String, T)>;

            fn expecting(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
                f.write_str("a table from module patterns to numbers")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_map(Entries(PhantomData))
    }
}
