//! Makes adapted layers out of burn-nn's, of given weights, or of random ones.

use crate::lora::{matrix, normal, uniform_matrix};
use crate::lora_config::{check_alpha, check_dropout, check_rank};
use crate::{FrozenLinear, Initialization, LayerError, LoraAdapter, LoraLinear};
use burn::config::Config;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{DType, Device, Tensor};
use nf4_quant::QuantConfig;
use std::sync::atomic::{AtomicU32, Ordering};

/// Settings of one adapted linear layer.
///
/// [`LoraConfig`](crate::LoraConfig) has those of a whole model.
///
/// ```
/// use burn::nn::LinearConfig;
/// use burn::tensor::{Device, Tensor};
/// use nf4_quant::QuantConfig;
/// use qlora_layers::LoraLinearConfig;
///
/// let device = Device::flex().autodiff();
/// let linear = LinearConfig::new(64, 32).init(&device);
/// let layer = LoraLinearConfig::new(8).with_alpha(16.0).from_linear(&linear, QuantConfig::default())?;
/// let y = layer.forward(Tensor::<3>::ones([2, 5, 64], &device));
/// assert_eq!(y.dims(), [2, 5, 32]);
/// # Ok::<(), qlora_layers::LayerError>(())
/// ```
#[derive(Config, Debug)]
pub struct LoraLinearConfig {
    /// Rank of the update; PEFT's `r`.
    pub rank: usize,
    /// Numerator of the scaling.
    #[config(default = 16.0)]
    pub alpha: f32,
    /// Probability of zeroing an input of `lora_a` in training.
    #[config(default = 0.0)]
    pub dropout: f32,
    /// Scale by `alpha / sqrt(rank)` instead of `alpha / rank` (Kalajdzievski, 2023, arXiv 2312.03732).
    #[config(default = false)]
    pub use_rslora: bool,
    /// Train each output feature's magnitude beside the update (DoRA: Liu et al., 2024, arXiv 2402.09353).
    #[config(default = false)]
    pub use_dora: bool,
    /// Train a bias on `lora_b`, added with the update's scaling.
    #[config(default = false)]
    pub lora_bias: bool,
    /// How `lora_a` starts: [`Initialization::Default`] or [`Initialization::Gaussian`], the two that need neither the
    /// weight nor activations. `lora_b` starts at zero.
    #[config(default = "Initialization::Default")]
    pub init: Initialization,
    /// Picks the initial values, together with `index`.
    #[config(default = 0)]
    pub seed: u64,
    /// Number of the adapter within its model, which picks initial values and dropout masks. Without one an adapter takes
    /// the next number of the process, so that no two layers draw equal values.
    pub index: Option<u32>,
}

impl LoraLinearConfig {
    /// `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
    pub fn scaling(&self) -> f32 {
        scaling(self.alpha, self.rank, self.use_rslora)
    }

    /// An adapter that changes nothing yet, for a frozen weight `[out_features, in_features]` of this `shape`. `lora_a` is
    /// uniform in ±1/sqrt(in_features) (Kaiming with a = sqrt(5), PEFT's default) or normal with a standard deviation of
    /// 1/rank; `lora_b` is zero.
    ///
    /// DoRA's magnitudes and `lora_bias` are added by the functions that know the weight.
    ///
    /// # Errors
    /// [`LayerError::Config`] naming the setting that is out of range.
    pub fn adapter(&self, shape: [usize; 2], device: &Device) -> Result<LoraAdapter, LayerError> {
        self.validate()?;
        let ([out_features, in_features], rank) = (shape, self.rank);
        let index = self.index.unwrap_or_else(next_index);
        let lora_a = match self.init {
            Initialization::Gaussian => {
                let deviation = 1.0 / rank as f32;
                let values = normal(self.seed, index, rank * in_features).map(|z| deviation * z).collect();
                matrix(values, [rank, in_features], device)
            }
            _ => uniform_matrix(1.0 / (in_features as f32).sqrt(), [rank, in_features], self.seed, index, device),
        };
        let lora_b = Tensor::zeros([out_features, rank], (device, DType::F32));
        Ok(LoraAdapter::from_factors(lora_a, lora_b, self.scaling(), self.dropout, index))
    }

    /// An adapted layer over a frozen weight.
    ///
    /// # Errors
    /// [`LayerError::Config`] naming the setting that is out of range.
    pub fn over(&self, base: FrozenLinear, bias: Option<Tensor<1>>, device: &Device) -> Result<LoraLinear, LayerError> {
        let adapter = self.adapter(base.shape(), device)?;
        let adapter = if self.lora_bias { adapter.with_bias() } else { adapter };
        let adapter = if self.use_dora { adapter.with_dora(&base, None) } else { adapter };
        let mut layer = LoraLinear::frozen(base, bias);
        layer.adapter = Some(adapter);
        Ok(layer)
    }

    /// An adapted layer in place of a burn-nn one: its weight frozen, and quantized unless `quant` is `None`; its bias
    /// frozen. The layer is on the device of `linear`.
    ///
    /// # Errors
    /// [`LayerError::Config`] naming the setting that is out of range, or [`LayerError::Weight`] when the weight can't be
    /// quantized.
    pub fn from_linear(
        &self,
        linear: &Linear,
        quant: impl Into<Option<QuantConfig>>,
    ) -> Result<LoraLinear, LayerError> {
        let base = FrozenLinear::from_linear(linear, quant.into().as_ref())?;
        let bias = linear.bias.as_ref().map(|bias| bias.val());
        self.over(base, bias, &linear.weight.device())
    }

    /// An adapted layer over random weights, as `linear` initialises them.
    ///
    /// # Errors
    /// As [`from_linear`](Self::from_linear).
    pub fn init(
        &self,
        linear: &LinearConfig,
        quant: impl Into<Option<QuantConfig>>,
        device: &Device,
    ) -> Result<LoraLinear, LayerError> {
        self.from_linear(&linear.init(device), quant)
    }

    fn validate(&self) -> Result<(), LayerError> {
        let bad = |field, value: String, reason| Err(LayerError::Config { field, value, reason });
        check_rank(self.rank)?;
        check_alpha(self.alpha)?;
        check_dropout(self.dropout)?;
        if self.lora_bias && self.use_dora {
            return bad("lora_bias", "true".into(), "cannot be combined with use_dora");
        }
        if !matches!(self.init, Initialization::Default | Initialization::Gaussian) {
            return bad("init", self.init.to_string(), "must be default or gaussian for a single layer");
        }
        Ok(())
    }
}

/// `alpha / rank`, or `alpha / sqrt(rank)` for rsLoRA.
pub(crate) fn scaling(alpha: f32, rank: usize, use_rslora: bool) -> f32 {
    match use_rslora {
        true => (f64::from(alpha) / (rank as f64).sqrt()) as f32,
        false => (f64::from(alpha) / rank as f64) as f32,
    }
}

/// Numbers adapters in the order in which the process makes them.
pub(crate) fn next_index() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
