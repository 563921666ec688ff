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
//! in f32. While the factors stand still, [`Dora::settle`] keeps the quotient.

use crate::Pass;
use crate::ops::matmul;
use crate::trained::seen_by;
use burn::tensor::Tensor;

/// The magnitudes of one module.
#[derive(Clone, Debug)]
pub struct Dora {
    /// One magnitude for each output feature, `[1, out_features]`, f32.
    pub magnitude: Tensor<2>,
    /// `‖w_i‖²`, `[1, out_features]`, f32.
    weight_squares: Tensor<2>,
    /// `m / ‖W + s·BA‖` of factors that do not change.
    settled: Option<Tensor<2>>,
}

impl Dora {
    /// Given magnitudes over a weight with these squared norms, both `[1, out_features]`.
    pub fn new(magnitude: Tensor<2>, weight_squares: Tensor<2>) -> Self {
        Self { magnitude, weight_squares, settled: None }
    }

    /// `m / ‖W + s·BA‖`, `[1, out_features]`; `a_w` is `A Wᵀ`, `[rank, out_features]`, computed if it is needed.
    pub(crate) fn scale(
        &self,
        lora_a: &Tensor<2>,
        lora_b: &Tensor<2>,
        scaling: f32,
        pass: Pass,
        a_w: impl FnOnce(Tensor<2>) -> Tensor<2>,
    ) -> Tensor<2> {
        match &self.settled {
            Some(scale) if !pass.tracked => scale.clone(),
            _ => {
                let lora_a = lora_a.clone().without_autodiff();
                let a_w = a_w(lora_a.clone());
                seen_by(&self.magnitude, pass) / norms(&self.weight_squares, lora_a, lora_b, scaling, a_w)
            }
        }
    }

    /// Keeps the quotient for passes without a graph, until [`unsettle`](Self::unsettle).
    pub(crate) fn settle(&mut self, scale: Tensor<2>) {
        self.settled = Some(scale);
    }

    /// Forgets the quotient: the factors are about to change.
    pub(crate) fn unsettle(&mut self) {
        self.settled = None;
    }
}

/// `‖W + s·BA‖` for each output feature, `[1, out_features]`, without autodiff.
pub(crate) fn norms(
    weight_squares: &Tensor<2>,
    lora_a: Tensor<2>,
    lora_b: &Tensor<2>,
    scaling: f32,
    a_w: Tensor<2>,
) -> Tensor<2> {
    let lora_a = lora_a.without_autodiff();
    let lora_b = lora_b.clone().without_autodiff();
    let [out_features, _] = lora_b.dims();
    let row = |sums: Tensor<2>| sums.reshape([1, out_features]);
    let cross = row((a_w.transpose() * lora_b.clone()).sum_dim(1));
    let gram = matmul(lora_a.clone(), lora_a.transpose());
    let squares = row((matmul(lora_b.clone(), gram) * lora_b).sum_dim(1));
    let sum = weight_squares.clone() + cross.mul_scalar(2.0 * scaling) + squares.mul_scalar(scaling * scaling);
    // Only a weight that the update cancels to rounding could be below.
    sum.clamp_min(f32::MIN_POSITIVE).sqrt()
}
