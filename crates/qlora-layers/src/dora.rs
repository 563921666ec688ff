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
//! in f32, but for `A Wᵀ` over a 4-bit weight where activations have 16 bits: A is the sum of two matrices of that format
//! then, which together hold it to 2⁻¹⁶ of itself (2⁻²² in f16), and the weight is in the format that the layer multiplies with,
//! and PEFT takes norms of; sums are f32.
//!
//! Where a GPU has the weight in 4 bits, no block crosses a row of it and tokens are many, the quotient `m / ‖·‖` is multiplied into the
//! blocks' absmax and into the rows of B. The product is then LoRA's of this weight, forward and backward, and what remains of the
//! magnitudes is their gradient, `Σ dy · y / m`: one pass over `dy` and `y`. Elsewhere the product's result is scaled.
//!
//! The norms are worked out once for factors that do not change: for all passes of an optimizer step, its micro-batches and
//! what activation checkpointing runs again. [`Dora::keep_scale`] saves the quotient for passes without a graph.

use crate::Pass;
use crate::ops::fused::{LEAST_GAIN, adapted_norms, gained};
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
    /// `‖W + s·BA‖`, `[1, out_features]`, f32, of factors that do not change.
    norms: Derived<Tensor<2>>,
    /// `m / ‖W + s·BA‖` of factors and magnitudes that do not change.
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
            norms: Derived::default(),
            scale: Derived::default(),
        }
    }

    /// `m / ‖W + s·BA‖`, `[1, out_features]`; `a_w` computes `A Wᵀ`, `[rank, out_features]`, where that is needed.
    pub(crate) fn scale(
        &self,
        factors: Factors<'_>,
        pass: Pass,
        a_w: impl FnOnce(Tensor<2>) -> Tensor<2>,
    ) -> Tensor<2> {
        match self.scale.get() {
            Some(scale) if !pass.tracked => scale,
            _ => {
                let norms = self.norms.get_or(|| {
                    let a_w = a_w(constant(factors.lora_a));
                    norms(&constant(&self.weight_squares), factors, a_w)
                });
                in_pass(&self.magnitude, pass) / norms
            }
        }
    }

    /// The quotient without a graph, `[1, out_features]`, of magnitudes plus [`LEAST_GAIN`]: for a weight that has it in itself,
    /// whose result [`gained`] gives the magnitudes their gradient.
    pub(crate) fn gain(&self, factors: Factors<'_>, a_w: impl FnOnce(Tensor<2>) -> Tensor<2>) -> Tensor<2> {
        self.scale.get_or(|| {
            let norms = self.norms.get_or(|| {
                let a_w = a_w(constant(factors.lora_a));
                norms(&constant(&self.weight_squares), factors, a_w)
            });
            constant(&self.magnitude).add_scalar(LEAST_GAIN) / norms
        })
    }

    /// Records that `y` was made by a weight that had [`gain`](Self::gain) in it.
    pub(crate) fn gained(&self, y: Tensor<2>, pass: Pass) -> Tensor<2> {
        gained(y, in_pass(&self.magnitude, pass))
    }

    /// Keeps the quotient for passes without a graph, until [`forget_scale`](Self::forget_scale) or until Burn maps the
    /// module's parameters; so are norms kept, for all passes.
    pub(crate) fn keep_scale(&mut self, factors: Factors<'_>, a_w: impl FnOnce(Tensor<2>) -> Tensor<2>) {
        self.forget_scale();
        self.scale = Derived::of(self.scale(factors, Pass::INFERENCE, a_w));
    }

    /// Forgets norms and quotient: factors or magnitudes changed, or are about to.
    pub(crate) fn forget_scale(&mut self) {
        (self.norms, self.scale) = (Derived::default(), Derived::default());
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
    if let Some(norms) = adapted_norms(weight_squares, &a_w, &lora_a, &lora_b, scaling) {
        return norms;
    }
    let [out_features, _] = lora_b.dims();
    let row = |sums: Tensor<2>| sums.reshape([1, out_features]);
    let cross = row((a_w.transpose() * lora_b.clone()).sum_dim(1));
    let gram = matmul(lora_a.clone(), lora_a.transpose());
    let squares = row((matmul(lora_b.clone(), gram) * lora_b).sum_dim(1));
    let sum = weight_squares.clone() + cross.mul_scalar(2.0 * scaling) + squares.mul_scalar(scaling * scaling);
    // Only a weight that the update cancels to rounding could be below.
    sum.clamp_min(f32::MIN_POSITIVE).sqrt()
}
