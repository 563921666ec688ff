//! Low-rank adapters (Hu et al., 2021, arXiv 2106.09685, section 4.1) of linear layers.

use crate::dora::{Dora, Factors, norms};
use crate::ops::fused::scale_columns;
use crate::ops::{LoraDropout, LoraTerms, lora_linear_4bit, matmul, matmul_into, seeded_dropout};
use crate::params::{constant, frozen, in_pass, track, trainable};
use crate::{FrozenLinear, Pass, Scaling, mix};
use burn::module::{Flag, Module, Param};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Tokens from which on DoRA's factors are multiplied into the weight. New absmax and rows of B cost as much as to scale some
/// 200 tokens' results.
const SCALED_WEIGHT: usize = 128;

/// The trainable part: `x ↦ scaling · (dropout(x) lora_aᵀ lora_bᵀ + bias)`.
///
/// [`LoraLinearConfig`](crate::LoraLinearConfig) makes fresh ones. DoRA's norms are kept between passes: whoever changes
/// a field calls [`forget_norms`](Self::forget_norms), as [`parameters_mut`](Self::parameters_mut) does.
#[derive(Module, Debug)]
pub struct LoraAdapter {
    /// `[rank, in_features]`, f32.
    pub lora_a: Param<Tensor<2>>,
    /// `[out_features, rank]`, f32.
    pub lora_b: Param<Tensor<2>>,
    /// The bias of `lora_b`, `[1, out_features]`, f32.
    pub bias: Option<Param<Tensor<2>>>,
    /// Magnitudes of the output features.
    pub dora: Option<Dora>,
    /// `lora_a` and `lora_b` as they started, where the frozen weight had `scaling · lora_b lora_a` taken out of it; not
    /// trained.
    pub initial: Option<[Param<Tensor<2>>; 2]>,
    /// Factor of the update.
    pub scaling: Scaling,
    /// Dropout probability in training.
    pub dropout: f32,
    /// Number of this adapter within its model; picks its dropout masks.
    pub index: u32,
    /// Whether a forward pass of a Burn module drops inputs; see [`next_pass`](Self::next_pass).
    pub training: Param<Flag>,
    /// Forward passes with dropout so far, which pick the next one's mask; clones of a layer share the count.
    #[module(skip)]
    passes: Arc<AtomicU64>,
}

impl LoraAdapter {
    /// An adapter of given factors, f32: `lora_a` `[rank, in_features]`, `lora_b` `[out_features, rank]`.
    pub fn from_factors(lora_a: Tensor<2>, lora_b: Tensor<2>, scaling: f32, dropout: f32, index: u32) -> Self {
        Self {
            lora_a: trainable(lora_a),
            lora_b: trainable(lora_b),
            bias: None,
            dora: None,
            initial: None,
            scaling: scaling.into(),
            dropout,
            index,
            training: Param::from_bool(true),
            passes: Arc::default(),
        }
    }

    /// The adapter with other factors.
    pub(crate) fn with_factors(self, lora_a: Param<Tensor<2>>, lora_b: Param<Tensor<2>>) -> Self {
        Self { lora_a, lora_b, ..self }
    }

    /// Keeps the present factors as those that the frozen weight had taken out of it.
    pub fn with_initial(mut self) -> Self {
        self.initial = Some([&self.lora_a, &self.lora_b].map(|factor| frozen(constant(factor))));
        self
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
        let mut found: Vec<(_, &Tensor<2>)> = vec![("lora_a", &self.lora_a), ("lora_b", &self.lora_b)];
        found.extend(self.bias.iter().map(|bias| ("lora_bias", &**bias)));
        found.extend(self.dora.iter().map(|dora| ("lora_magnitude", &*dora.magnitude)));
        found
    }

    /// As [`parameters`](Self::parameters). After changing one, call [`track`](Self::track) or
    /// [`LoraLinear::keep_scale`](crate::LoraLinear::keep_scale).
    pub fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Param<Tensor<2>>)> {
        self.forget_norms();
        let mut found = vec![("lora_a", &mut self.lora_a), ("lora_b", &mut self.lora_b)];
        found.extend(self.bias.iter_mut().map(|bias| ("lora_bias", bias)));
        found.extend(self.dora.iter_mut().map(|dora| ("lora_magnitude", &mut dora.magnitude)));
        found
    }

    /// A zero bias on `lora_b`.
    pub fn with_bias(mut self) -> Self {
        let [out_features, _] = self.lora_b.dims();
        self.bias = Some(trainable(Tensor::zeros([1, out_features], (&self.lora_b.device(), DType::F32))));
        self
    }

    /// Magnitudes over the weight: the given ones `[1, out_features]`, or those that change nothing yet.
    pub fn with_dora(mut self, base: &FrozenLinear, magnitude: Option<Tensor<2>>) -> Self {
        let squares = base.row_squares();
        let magnitude = magnitude.unwrap_or_else(|| {
            let a_w = base.project(constant(&self.lora_a));
            norms(&squares, self.factors(), a_w)
        });
        self.dora = Some(Dora::new(magnitude, squares, &self.lora_a));
        self
    }

    /// The update for `x` without magnitudes and bias, in f32. Factors are cast to the dtype of `x`, where both
    /// products run; gradients come back in f32 through the cast.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in_features]`
    /// - output: `[tokens, out_features]`, f32
    pub fn forward(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        let x = match self.dropout_in(pass) {
            Some(dropout) => dropped(x, dropout),
            None => x,
        };
        self.update(x, pass)
    }

    /// [`forward`](Self::forward) without dropout.
    fn update(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        let (lora_a, lora_b) = self.factors_in(pass);
        let (lora_a, lora_b) = (lora_a.cast(x.dtype()).transpose(), lora_b.cast(x.dtype()).transpose());
        matmul_into(matmul(x, lora_a), lora_b, FloatDType::F32).mul_scalar(self.scaling.get())
    }

    /// `x Wᵀ` and the update, in f32 where there is more to add to it, else in the dtype of `x`. `out` is the dtype of what
    /// magnitudes scale, where nothing is added to that here: f32 if the caller adds something, else that of `x`.
    ///
    /// Without magnitudes and bias the sum is rounded once. With them a 4-bit base's sum is rounded to the dtype
    /// of `x` before it is scaled, or after, where the weight itself is.
    ///
    /// With `gradients_only` the result is uninitialised where that saves a product; see
    /// [`LoraTerms::gradients_only`].
    pub(crate) fn apply(
        &self,
        base: &FrozenLinear,
        x: Tensor<2>,
        pass: Pass,
        gradients_only: bool,
        out: FloatDType,
    ) -> Tensor<2> {
        let dtype = x.dtype();
        let Some(dora) = &self.dora else {
            let y = match base {
                FrozenLinear::Quantized(base) => {
                    let (lora_a, lora_b) = self.factors_in(pass);
                    let terms =
                        LoraTerms { scaling: self.scaling.get(), dropout: self.dropout_in(pass), gradients_only };
                    base.lora_forward(x, lora_a, lora_b, terms)
                }
                FrozenLinear::Dense(_) => {
                    let y = base.forward_into(x.clone(), FloatDType::F32) + self.forward(x, pass);
                    if self.bias.is_some() { y } else { y.cast(dtype) }
                }
            };
            return match &self.bias {
                Some(bias) => y.cast(FloatDType::F32) + in_pass(bias, pass).mul_scalar(self.scaling.get()),
                None => y,
            };
        };
        let scaled = |x: Tensor<2>, out: FloatDType| self.scaled(base, dora, x, pass, out);
        match self.dropout_in(pass) {
            None => scaled(x, out),
            // PEFT's: x Wᵀ + (scale - 1) · x' Wᵀ + scale · update(x') with x' = dropout(x). The two products with W
            // that are not scaled are one, of the difference.
            Some(dropout) => {
                let kept = dropped(x.clone(), dropout);
                let difference = base.forward_into(x - kept.clone(), FloatDType::F32);
                difference + scaled(kept, FloatDType::F32)
            }
        }
    }

    /// `x Wᵀ` and the update without dropout, scaled to the magnitudes, in `out`.
    fn scaled(&self, base: &FrozenLinear, dora: &Dora, x: Tensor<2>, pass: Pass, out: FloatDType) -> Tensor<2> {
        let dtype = x.dtype();
        let terms = LoraTerms { scaling: self.scaling.get(), dropout: None, gradients_only: false };
        let a_w = |a| base.project_near(a, dtype.into());
        let (lora_a, lora_b) = self.factors_in(pass);
        // A function of the tokens alone: a pass that runs again has to run the same way.
        if let FrozenLinear::Quantized(weight) = base
            && x.dims()[0] >= SCALED_WEIGHT
            && let Some((weight, gain)) = weight.scaled_rows(dtype, || dora.gain(self.factors(), a_w))
        {
            let [out_features, _] = lora_b.dims();
            let lora_b = lora_b * gain.reshape([out_features, 1]);
            return dora.gained(lora_linear_4bit(x, weight, lora_a, lora_b, terms), pass).cast(out);
        }
        let y = match base {
            FrozenLinear::Quantized(base) => base.lora_forward(x, lora_a, lora_b, terms),
            FrozenLinear::Dense(_) => base.forward_into(x.clone(), FloatDType::F32) + self.update(x, pass),
        };
        scale_columns(y, dora.scale(self.factors(), pass, a_w), out)
    }

    /// The factors, recorded or not as the pass asks.
    fn factors_in(&self, pass: Pass) -> (Tensor<2>, Tensor<2>) {
        (in_pass(&self.lora_a, pass), in_pass(&self.lora_b, pass))
    }

    fn factors(&self) -> Factors<'_> {
        Factors { lora_a: &self.lora_a, lora_b: &self.lora_b, scaling: self.scaling.get() }
    }

    fn dropout_in(&self, pass: Pass) -> Option<LoraDropout> {
        let seed = pass.seed_for(self.index).filter(|_| self.dropout > 0.0)?;
        Some(LoraDropout { seed, p: self.dropout })
    }

    /// The pass that a Burn module's `forward` runs over an input on `device`: recorded where the factors require
    /// gradients; with dropout, a new mask at each call, where `device` records and [`training`](Self::training) is set,
    /// as in burn-nn's `Dropout`.
    ///
    /// Masks depend on [`index`](Self::index) and the number of calls before, so a run repeats itself. Burn's random
    /// generator is not used.
    pub fn next_pass(&self, device: &Device) -> Pass {
        let drops = self.dropout > 0.0 && self.training.is_enabled() && device.is_autodiff();
        Pass {
            tracked: self.lora_a.is_require_grad() || self.lora_b.is_require_grad(),
            dropout_seed: drops.then(|| mix(self.passes.fetch_add(1, Ordering::Relaxed))),
        }
    }

    /// Starts recording: everything that is trained becomes a leaf of the autodiff graph.
    pub fn track(&mut self) {
        self.parameters_mut().into_iter().for_each(|(_, parameter)| track(parameter));
    }

    /// Forgets DoRA's norms, which are kept between passes: factors or magnitudes are about to change.
    pub fn forget_norms(&mut self) {
        self.dora.iter_mut().for_each(Dora::forget_scale);
    }

    /// Saves DoRA's norms for passes without a graph.
    pub(crate) fn keep_scale(&mut self, base: &FrozenLinear) {
        let factors = Factors { lora_a: &self.lora_a, lora_b: &self.lora_b, scaling: self.scaling.get() };
        if let Some(dora) = &mut self.dora {
            dora.keep_scale(factors, |a| base.project(a));
        }
    }

    /// The weight with this adapter in it, f32 `[out_features, in_features]`: `W + s·BA`, scaled to the magnitudes; recorded
    /// or not as the pass asks, without dropout.
    pub(crate) fn effective(&self, base: &FrozenLinear, pass: Pass) -> Tensor<2> {
        let (lora_a, lora_b) = self.factors_in(pass);
        let weight = base.to_dense(FloatDType::F32) + matmul(lora_b, lora_a).mul_scalar(self.scaling.get());
        match &self.dora {
            None => weight,
            Some(dora) => {
                let [out_features, _] = self.lora_b.dims();
                let scale = dora.scale(self.factors(), pass, |a| base.project(a));
                weight * scale.reshape([out_features, 1])
            }
        }
    }

    /// The weight with this adapter in it, f32: `W + s·BA`, scaled to the magnitudes.
    pub fn merged(&self, base: &FrozenLinear) -> Tensor<2> {
        self.effective(base, Pass::INFERENCE)
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

/// A matrix of uniform values in ±`bound` that depend on `seed` and `index` alone.
pub(crate) fn uniform_matrix(bound: f32, shape: [usize; 2], seed: u64, index: u32, device: &Device) -> Tensor<2> {
    let mut rng = generator(seed, index);
    let values = (0..shape[0] * shape[1]).map(|_| bound * (2.0 * uniform(&mut rng) - 1.0)).collect();
    matrix(values, shape, device)
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
