//! Low-rank adapters (Hu et al., 2021, arXiv 2106.09685, section 4.1) of linear layers.

use crate::dora::{Dora, norms};
use crate::ops::{LoraDropout, LoraTerms, matmul, matmul_into, seeded_dropout};
use crate::trained::{seen_by, track};
use crate::{FrozenLinear, Pass};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The trainable part: `x ↦ scaling · (dropout(x) lora_aᵀ lora_bᵀ + bias)`.
#[derive(Clone, Debug)]
pub struct LoraAdapter {
    /// `[rank, in_features]`, f32.
    pub lora_a: Tensor<2>,
    /// `[out_features, rank]`, f32.
    pub lora_b: Tensor<2>,
    /// The bias of `lora_b`, `[1, out_features]`, f32.
    pub bias: Option<Tensor<2>>,
    /// Magnitudes of the output features.
    pub dora: Option<Dora>,
    /// `lora_a` and `lora_b` as they started, where the frozen weight had `scaling · lora_b lora_a` taken out of it.
    pub initial: Option<[Tensor<2>; 2]>,
    /// Factor of the update.
    pub scaling: f32,
    /// Dropout probability in training.
    pub dropout: f32,
    /// Number of this adapter within its model; picks its dropout masks.
    pub index: u32,
}

impl LoraAdapter {
    /// An adapter of given factors, f32: `lora_a` `[rank, in_features]`, `lora_b` `[out_features, rank]`.
    pub fn from_factors(lora_a: Tensor<2>, lora_b: Tensor<2>, scaling: f32, dropout: f32, index: u32) -> Self {
        Self { lora_a, lora_b, bias: None, dora: None, initial: None, scaling, dropout, index }
    }

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
        let mut rng = generator(seed, index);
        let bound = 1.0 / (in_features as f32).sqrt();
        let lora_a = (0..rank * in_features).map(|_| bound * (2.0 * uniform(&mut rng) - 1.0)).collect();
        let lora_b = Tensor::zeros([out_features, rank], (device, DType::F32));
        Self::from_factors(matrix(lora_a, [rank, in_features], device), lora_b, scaling, dropout, index)
    }

    /// As [`new`](Self::new), with `lora_a` normal of standard deviation 1/rank.
    pub fn gaussian(
        shape: [usize; 2],
        rank: usize,
        scaling: f32,
        dropout: f32,
        index: u32,
        seed: u64,
        device: &Device,
    ) -> Self {
        let [out_features, in_features] = shape;
        let deviation = 1.0 / rank as f32;
        let lora_a = normal(seed, index, rank * in_features).map(|z| deviation * z).collect();
        let lora_b = Tensor::zeros([out_features, rank], (device, DType::F32));
        Self::from_factors(matrix(lora_a, [rank, in_features], device), lora_b, scaling, dropout, index)
    }

    /// The adapter's rank.
    pub fn rank(&self) -> usize {
        self.lora_a.dims()[0]
    }

    /// Number of trainable values.
    pub fn num_params(&self) -> usize {
        self.parameters().iter().map(|(_, parameter)| parameter.shape().num_elements()).sum()
    }

    /// Everything that is trained, by name, in a fixed order.
    pub fn parameters(&self) -> Vec<(&'static str, &Tensor<2>)> {
        let mut found = vec![("lora_a", &self.lora_a), ("lora_b", &self.lora_b)];
        found.extend(self.bias.iter().map(|bias| ("lora_bias", bias)));
        found.extend(self.dora.iter().map(|dora| ("lora_magnitude", &dora.magnitude)));
        found
    }

    /// As [`parameters`](Self::parameters). Whoever changes one calls [`track`](Self::track) or
    /// [`LoraLinear::settle`](crate::LoraLinear::settle) after.
    pub fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Tensor<2>)> {
        let mut found = vec![("lora_a", &mut self.lora_a), ("lora_b", &mut self.lora_b)];
        found.extend(self.bias.iter_mut().map(|bias| ("lora_bias", bias)));
        found.extend(self.dora.iter_mut().map(|dora| ("lora_magnitude", &mut dora.magnitude)));
        found
    }

    /// A zero bias on `lora_b`.
    pub fn with_bias(mut self) -> Self {
        let [out_features, _] = self.lora_b.dims();
        self.bias = Some(Tensor::zeros([1, out_features], (&self.lora_b.device(), DType::F32)));
        self
    }

    /// Magnitudes over the weight: the given ones `[1, out_features]`, or those that change nothing yet.
    pub fn with_dora(mut self, base: &FrozenLinear, magnitude: Option<Tensor<2>>) -> Self {
        let squares = base.row_squares();
        let magnitude = magnitude.unwrap_or_else(|| {
            let a_w = base.project(self.lora_a.clone().without_autodiff());
            norms(&squares, self.lora_a.clone(), &self.lora_b, self.scaling, a_w)
        });
        self.dora = Some(Dora::new(magnitude, squares));
        self
    }

    /// The update for `x` without magnitudes and bias, in f32. Factors are cast to the dtype of `x`, where both
    /// products run; gradients come back in f32 through the cast.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in_features]`
    /// - output: `[tokens, out_features]`, f32
    pub fn forward(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        let x = match self.dropout(pass) {
            Some(dropout) => dropped(x, dropout),
            None => x,
        };
        self.update(x, pass)
    }

    /// [`forward`](Self::forward) without dropout.
    fn update(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        let (lora_a, lora_b) = self.factors(pass);
        let (lora_a, lora_b) = (lora_a.cast(x.dtype()).transpose(), lora_b.cast(x.dtype()).transpose());
        matmul_into(matmul(x, lora_a), lora_b, FloatDType::F32).mul_scalar(self.scaling)
    }

    /// `x Wᵀ` and the update, in f32 where there is more to add to it, else in the dtype of `x`.
    ///
    /// Without magnitudes and bias the sum is rounded once. With them a 4-bit base's sum is rounded to the dtype
    /// of `x` before it is scaled.
    ///
    /// With `unread` nobody reads the result; see [`LoraTerms::unread`].
    pub(crate) fn apply(&self, base: &FrozenLinear, x: Tensor<2>, pass: Pass, unread: bool) -> Tensor<2> {
        let dtype = x.dtype();
        let Some(dora) = &self.dora else {
            let y = match base {
                FrozenLinear::Quantized(base) => {
                    let (lora_a, lora_b) = self.factors(pass);
                    let terms = LoraTerms { scaling: self.scaling, dropout: self.dropout(pass), unread };
                    base.lora_forward(x, lora_a, lora_b, terms)
                }
                FrozenLinear::Dense(_) => {
                    let y = base.forward_into(x.clone(), FloatDType::F32) + self.forward(x, pass);
                    if self.bias.is_some() { y } else { y.cast(dtype) }
                }
            };
            return match &self.bias {
                Some(bias) => y.cast(FloatDType::F32) + seen_by(bias, pass).mul_scalar(self.scaling),
                None => y,
            };
        };
        let adapted = |x: Tensor<2>| match base {
            FrozenLinear::Quantized(base) => {
                let (lora_a, lora_b) = self.factors(pass);
                let terms = LoraTerms { scaling: self.scaling, dropout: None, unread: false };
                base.lora_forward(x, lora_a, lora_b, terms).cast(FloatDType::F32)
            }
            FrozenLinear::Dense(_) => base.forward_into(x.clone(), FloatDType::F32) + self.update(x, pass),
        };
        let scale = dora.scale(&self.lora_a, &self.lora_b, self.scaling, pass, |a| base.project(a));
        match self.dropout(pass) {
            None => adapted(x) * scale,
            // PEFT's: x Wᵀ + (scale - 1) · x' Wᵀ + scale · update(x') with x' = dropout(x). The two products with W
            // that are not scaled are one, of the difference.
            Some(dropout) => {
                let kept = dropped(x.clone(), dropout);
                base.forward_into(x - kept.clone(), FloatDType::F32) + adapted(kept) * scale
            }
        }
    }

    /// The factors, recorded or not as the pass asks.
    fn factors(&self, pass: Pass) -> (Tensor<2>, Tensor<2>) {
        (seen_by(&self.lora_a, pass), seen_by(&self.lora_b, pass))
    }

    fn dropout(&self, pass: Pass) -> Option<LoraDropout> {
        let seed = pass.seed_for(self.index).filter(|_| self.dropout > 0.0)?;
        Some(LoraDropout { seed, p: self.dropout })
    }

    /// Starts recording: everything that is trained becomes a leaf of the autodiff graph.
    pub fn track(&mut self) {
        self.parameters_mut().into_iter().for_each(|(_, parameter)| track(parameter));
        self.dora.iter_mut().for_each(Dora::unsettle);
    }

    /// Computes what stays the same while nothing is trained.
    pub(crate) fn settle(&mut self, base: &FrozenLinear) {
        let Some(dora) = &mut self.dora else { return };
        dora.unsettle();
        let scale = dora.scale(&self.lora_a, &self.lora_b, self.scaling, Pass::INFERENCE, |a| base.project(a));
        dora.settle(scale);
    }

    /// The weight with this adapter in it, f32: `W + s·BA`, scaled to the magnitudes.
    pub fn merged(&self, base: &FrozenLinear) -> Tensor<2> {
        let (lora_a, lora_b) = self.factors(Pass::INFERENCE);
        let weight = base.to_dense(FloatDType::F32) + matmul(lora_b, lora_a).mul_scalar(self.scaling);
        match &self.dora {
            None => weight,
            Some(dora) => {
                let [out_features, _] = self.lora_b.dims();
                let scale = dora.scale(&self.lora_a, &self.lora_b, self.scaling, Pass::INFERENCE, |a| base.project(a));
                weight * scale.reshape([out_features, 1])
            }
        }
    }
}

fn dropped(x: Tensor<2>, LoraDropout { seed, p }: LoraDropout) -> Tensor<2> {
    seeded_dropout(x, seed, p)
}

pub(crate) fn matrix(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

fn generator(seed: u64, index: u32) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(u64::from(index));
    rng
}

/// Uniform in [0, 1) with 24 random bits.
fn uniform(rng: &mut impl Rng) -> f32 {
    (rng.next_u32() >> 8) as f32 / 16_777_216.0
}

/// `len` standard normal values that depend on `seed` and `index` alone (Box and Muller, 1958).
pub(crate) fn normal(seed: u64, index: u32, len: usize) -> impl Iterator<Item = f32> {
    let mut rng = generator(seed, index);
    let pairs = std::iter::repeat_with(move || {
        let (u, v) = (f64::from(1.0 - uniform(&mut rng)), f64::from(uniform(&mut rng)));
        let (radius, angle) = ((-2.0 * u.ln()).sqrt(), std::f64::consts::TAU * v);
        [(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]
    });
    pairs.flatten().take(len)
}
