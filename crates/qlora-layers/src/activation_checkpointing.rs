//! Activation checkpointing by block (Chen et al., 2016, arXiv 1604.06174).
//!
//! The forward pass runs every block without recording and keeps only its input `x_i`. The backward
//! pass walks the blocks from last to first: it runs block `i` again from `x_i`, this time recorded,
//! and differentiates `sum(block(x_i) · g)`, whose gradient in `x_i` is the vector-Jacobian product
//! that becomes `g` for the block before.
//!
//! Peak memory is one block's activations and one tensor per block; the price is a second forward.
//! The gradients are those of the plain backward bit for bit wherever the block itself is
//! deterministic, since the same operations run on the same values; dropout masks come from [`Pass`].

use crate::Pass;
use burn::tensor::{Gradients, Tensor};
use serde::{Deserialize, Serialize};

/// What the forward pass keeps for the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActivationCheckpointing {
    /// Every activation that a backward formula needs: fastest, most memory.
    None,
    /// The input of each block; the rest is recomputed.
    #[default]
    Full,
}

/// The inputs of a model's blocks, kept for [`backward`].
#[derive(Debug)]
pub struct BlockInputs(Vec<Tensor<2>>);

/// Runs `blocks` on `x` without recording.
///
/// # Shapes
/// `x` and the output are `[tokens, hidden]`; neither carries autodiff.
pub fn forward<B>(
    blocks: &[B],
    x: Tensor<2>,
    pass: Pass,
    run: impl Fn(&B, Tensor<2>, Pass) -> Tensor<2>,
) -> (Tensor<2>, BlockInputs) {
    let mut inputs = Vec::with_capacity(blocks.len());
    // With autodiff enabled but nothing tracked: a backend may have fused versions of what autodiff composes
    // of several operations, and their last bits differ.
    let mut x = x.without_autodiff().autodiff();
    for block in blocks {
        inputs.push(x.clone().without_autodiff());
        x = run(block, x, pass.untracked());
    }
    (x.without_autodiff(), BlockInputs(inputs))
}

/// Recomputes and differentiates the blocks from last to first.
///
/// `grad` is the loss's gradient in the output of the last block. `collect` takes each block's
/// gradients out of the container before the next block runs. With `into_embeddings` the result is the gradient in
/// the first block's input, if any reaches it.
///
/// # Shapes
/// `grad` is `[tokens, hidden]`, without autodiff.
pub fn backward<B>(
    blocks: &[B],
    inputs: BlockInputs,
    grad: Tensor<2>,
    pass: Pass,
    run: impl Fn(&B, Tensor<2>, Pass) -> Tensor<2>,
    into_embeddings: bool,
    mut collect: impl FnMut(usize, &B, &mut Gradients),
) -> Option<Tensor<2>> {
    let mut grad = grad;
    for (i, (block, input)) in blocks.iter().zip(inputs.0).enumerate().rev() {
        let _span = tracing::trace_span!("block_backward", index = i).entered();
        // Below the first block only trained embeddings need a gradient.
        let wanted = i > 0 || into_embeddings;
        let input = if wanted { input.autodiff().require_grad() } else { input };
        let output = run(block, input.clone(), pass);
        if !output.is_tracked() {
            return None;
        }
        let mut grads = tracing::trace_span!("gradient").in_scope(|| (output * grad.clone()).sum().backward());
        let next = if wanted { input.grad_remove(&mut grads) } else { None };
        collect(i, block, &mut grads);
        match next {
            Some(next) => grad = next,
            None => return None,
        }
    }
    into_embeddings.then_some(grad)
}
