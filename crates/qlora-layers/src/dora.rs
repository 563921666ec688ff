//! DoRA: an update's direction and its magnitude, trained apart (Liu et al., 2024, arXiv 2402.09353, equation 5).
//!
//! The adapted weight is `m · (W + s·BA) / ‖W + s·BA‖`, with a norm for each output feature. As in the paper
//! (section 4.3) and in PEFT the norm is a constant in the backward pass, so that the factors' gradients are
//! LoRA's times `m / ‖·‖`.
//!
//! No dense `W + s·BA` is formed. With `w_i` the weights of output feature `i` and `b_i` its row of B,
//!
//! ```text
//! ‖w_i + s·b_i A‖² = ‖w_i‖² + 2s · b_i·(A w_i) + s² · b_i (A Aᵀ) b_iᵀ
//! ```
//!
//! where `‖w_i‖²` never changes and is kept, `A Wᵀ` is a frozen product of `rank` rows, and `A Aᵀ` is tiny. All
//! in f32. While the factors do not change, [`Dora::keep_scale`] saves the quotient for passes without a graph.

use crate::Pass;
use crate::ops::matmul;
use crate::params::{Derived, constant, frozen, in_pass, trainable_beside};
use burn::module::{Module, Param};
use burn::tensor::Tensor;

/// The magnitudes of one module.
#[derive(Module, Debug)]
pub struct Dora {
    /// One magnitude for each output feature, `[1, out_features]`, f32.
    pub magnitude: Param<Tensor<2>>,
    /// `‖w_i‖²`, `[1, out_features]`, f32; not trained.
    weight_squares: Param<Tensor<2>>,
    /// `m / ‖W + s·BA‖` of factors that do not change.
    scale: Derived<Tensor<2>>,
}

impl Dora {
    /// Given magnitudes over a weight with these squared norms, both `[1, out_features]`.
    ///
    /// The magnitudes are trained where the adapter's factor `beside` them is.
    pub(crate) fn new(magnitude: Tensor<2>, weight_squares: Tensor<2>, beside: &Param<Tensor<2>>) -> Self {
        Self {
            magnitude: trainable_beside(magnitude, beside),
            weight_squares: frozen(weight_squares.without_autodiff()),
            scale: Derived(None),
        }
    }

    /// `m / ‖W + s·BA‖`, `[1, out_features]`; `a_w` computes `A Wᵀ`, `[rank, out_features]`, where that is needed.
    pub(crate) fn scale(
        &self,
        factors: Factors<'_>,
        pass: Pass,
        a_w: impl FnOnce(Tensor<2>) -> Tensor<2>,
    ) -> Tensor<2> {
        match &self.scale.0 {
            Some(scale) if !pass.tracked => scale.clone(),
            _ => {
                let a_w = a_w(constant(factors.lora_a));
                in_pass(&self.magnitude, pass) / norms(&constant(&self.weight_squares), factors, a_w)
            }
        }
    }

    /// Keeps the quotient for passes without a graph, until [`forget_scale`](Self::forget_scale) or until Burn maps the
    /// module's parameters.
    pub(crate) fn keep_scale(&mut self, factors: Factors<'_>, a_w: impl FnOnce(Tensor<2>) -> Tensor<2>) {
        self.forget_scale();
        self.scale = Derived(Some(self.scale(factors, Pass::INFERENCE, a_w)));
    }

    /// Forgets the quotient: the factors are about to change.
    pub(crate) fn forget_scale(&mut self) {
        self.scale = Derived(None);
    }
}

/// The factors that a norm is taken with.
#[derive(Clone, Copy)]
pub(crate) struct Factors<'a> {
    /// `[rank, in_features]`.
    pub lora_a: &'a Param<Tensor<2>>,
    /// `[out_features, rank]`.
    pub lora_b: &'a Param<Tensor<2>>,
    /// Factor of their product.
    pub scaling: f32,
}

/// `‖W + s·BA‖` for each output feature, `[1, out_features]`, without autodiff; from the weight's squared norms
/// `[1, out_features]` and `A Wᵀ` `[rank, out_features]`.
pub(crate) fn norms(weight_squares: &Tensor<2>, factors: Factors<'_>, a_w: Tensor<2>) -> Tensor<2> {
    let (lora_a, lora_b, scaling) = (constant(factors.lora_a), constant(factors.lora_b), factors.scaling);
    let a_w = a_w.without_autodiff();
    let [out_features, _] = lora_b.dims();
    let row = |sums: Tensor<2>| sums.reshape([1, out_features]);
    let cross = row((a_w.transpose() * lora_b.clone()).sum_dim(1));
    let gram = matmul(lora_a.clone(), lora_a.transpose());
    let squares = row((matmul(lora_b.clone(), gram) * lora_b).sum_dim(1));
    let sum = weight_squares.clone() + cross.mul_scalar(2.0 * scaling) + squares.mul_scalar(scaling * scaling);
    // Only a weight that the update cancels to rounding could be below.
    sum.clamp_min(f32::MIN_POSITIVE).sqrt()
}
