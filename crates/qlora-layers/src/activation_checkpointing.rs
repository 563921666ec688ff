//! Activation checkpointing (Chen et al., 2016, arXiv 1604.06174) over blocks of two residual branches:
//!
//! `m = x + attention(x)`, `y = m + feed_forward(m)`
//!
//! The forward pass runs every block without recording and keeps little of it ([`ActivationCheckpointing`] says what).
//! The backward pass walks the blocks from last to first. It runs a branch again from its input, this time recorded,
//! and differentiates it from the gradient `g` of its sum, which passes through the residual unchanged:
//! `g` becomes `g + J_branchᵀ g`.
//!
//! - The last product of a branch is recorded, not computed: its gradients don't need its result, and where the sum is
//!   needed it was kept or is computed once. For a Llama block that is a fifth of the products' second forward.
//! - Attention that was kept is not computed again either.
//!
//! - The second branch works on each token alone, so long batches go through it in parts: what it holds at a time, more
//!   than attention does, stops growing with the length.
//!
//! The gradients are those of the plain backward bit for bit wherever the block itself is deterministic, since the same
//! operations run on the same values; dropout masks come from [`Pass`]. (Of more than two parts, the plain backward may
//! add the gradients in another order.)

use crate::Pass;
use crate::offload::{Offloaded, Pace};
use crate::ops::{AttentionResult, backward_from};
use burn::tensor::{Gradients, Tensor};
use serde::{Deserialize, Serialize};
use tracing::trace_span;

/// What the forward pass keeps for the backward pass. Bytes are those of a Llama block with bf16 activations, per
/// token and `hidden` features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActivationCheckpointing {
    /// Every activation that a backward formula needs: fastest, most memory; about `32 hidden` bytes.
    None,
    /// The inputs of both branches and attention's result, which is dear to compute again, above all over long rows:
    /// `6 hidden` bytes and 4 for each head. Norms, projections into heads and the MLP's first half run again.
    Selective,
    /// The input of each block, `2 hidden` bytes; the rest is computed again.
    #[default]
    Full,
    /// As `full`, in the host's memory: inputs travel there while the next block computes, and come back ahead of
    /// their use. The device holds two.
    Offload,
}

impl ActivationCheckpointing {
    /// Every policy.
    pub const ALL: [Self; 4] = [Self::None, Self::Selective, Self::Full, Self::Offload];
}

/// Tokens that go through the second branch at a time: enough for products at full speed.
const PART: usize = 8192;

/// Parts of so many tokens: number, first token, tokens.
fn parts(tokens: usize) -> impl DoubleEndedIterator<Item = (usize, usize, usize)> {
    (0..tokens.div_ceil(PART)).map(move |part| (part, part * PART, PART.min(tokens - part * PART)))
}

/// What a branch runs for.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one at a time, on its way into a branch")]
pub enum Purpose<'a> {
    /// For its result.
    Result,
    /// For its result; attention leaves its own here.
    Keep(&'a mut Option<AttentionResult>),
    /// For its gradients; nobody reads the result, and attention need not run if its own is given.
    Gradients(Option<AttentionResult>),
}

impl Purpose<'_> {
    /// Whether the branch's result is never read.
    pub fn unread(&self) -> bool {
        matches!(self, Self::Gradients(_))
    }
}

/// A block of two branches, without the residuals around them.
pub trait ResidualBlock {
    /// The first branch.
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    fn attention(&self, x: Tensor<2>, pass: Pass, purpose: Purpose<'_>) -> Tensor<2>;

    /// The second branch.
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    fn feed_forward(&self, x: Tensor<2>, pass: Pass, purpose: Purpose<'_>) -> Tensor<2>;

    /// Both, with their residuals.
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    fn forward(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        let m = x.clone() + self.attention(x, pass, Purpose::Result);
        m.clone() + self.feed_forward_in_parts(m, pass)
    }

    /// The second branch, for its result, in parts of the tokens.
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    fn feed_forward_in_parts(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        let tokens = x.dims()[0];
        if tokens <= PART {
            return self.feed_forward(x, pass, Purpose::Result);
        }
        let part =
            |(part, start, len)| self.feed_forward(x.clone().narrow(0, start, len), pass.part(part), Purpose::Result);
        Tensor::cat(parts(tokens).map(part).collect(), 0)
    }
}

/// What [`forward`] kept of a block.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one for each block, and they stay where they are")]
enum Kept {
    /// The input.
    Input(Tensor<2>),
    /// The input, in the host's memory.
    Offloaded(Offloaded),
    /// The inputs of both branches and attention's result.
    Branches { input: Tensor<2>, middle: Tensor<2>, attention: Option<AttentionResult> },
}

/// What [`forward`] kept, for [`backward`].
#[derive(Debug)]
pub struct Checkpoints(Vec<Kept>);

/// Runs `blocks` on `x` without recording, and keeps what `policy` says. [`ActivationCheckpointing::None`] is no
/// business of this function: whoever keeps everything records the blocks.
///
/// # Shapes
/// `x` and the output are `[tokens, hidden]`; neither carries autodiff.
///
/// # Errors
/// The device's message, where a copy to the host failed.
pub fn forward<B: ResidualBlock>(
    blocks: &[B],
    x: Tensor<2>,
    pass: Pass,
    policy: ActivationCheckpointing,
) -> Result<(Tensor<2>, Checkpoints), String> {
    let pass = pass.untracked();
    let mut kept = Vec::with_capacity(blocks.len());
    // With autodiff enabled but nothing tracked: a backend may have fused versions of what autodiff composes
    // of several operations, and their last bits differ.
    let mut x = x.without_autodiff().autodiff();
    for (index, block) in blocks.iter().enumerate() {
        let _span = trace_span!("block", index).entered();
        let input = x.clone().without_autodiff();
        match policy {
            ActivationCheckpointing::Selective => {
                let mut attention = None;
                let m = x.clone() + block.attention(x, pass, Purpose::Keep(&mut attention));
                let middle = m.clone().without_autodiff();
                x = m.clone() + block.feed_forward_in_parts(m, pass);
                kept.push(Kept::Branches { input, middle, attention });
            }
            ActivationCheckpointing::Offload => {
                if let [.., Kept::Offloaded(earlier), _] = &mut kept[..] {
                    earlier.settle()?;
                }
                kept.push(Offloaded::send(&input)?.map_or(Kept::Input(input), Kept::Offloaded));
                x = block.forward(x, pass);
            }
            ActivationCheckpointing::None | ActivationCheckpointing::Full => {
                kept.push(Kept::Input(input));
                x = block.forward(x, pass);
            }
        }
    }
    for kept in &mut kept {
        if let Kept::Offloaded(leaving) = kept {
            leaving.settle()?;
        }
    }
    Ok((x.without_autodiff(), Checkpoints(kept)))
}

/// Runs the blocks again and differentiates them, from last to first.
///
/// `grad` is the loss's gradient in the output of the last block. `collect` takes gradients of a block's parameters out
/// of the container, several times per block. With `into_embeddings` the result is the gradient in the first block's input.
///
/// # Shapes
/// `grad` is `[tokens, hidden]`, without autodiff.
///
/// # Errors
/// The device's message, where a copy from the host failed.
pub fn backward<B: ResidualBlock>(
    blocks: &[B],
    checkpoints: Checkpoints,
    grad: Tensor<2>,
    pass: Pass,
    into_embeddings: bool,
    mut collect: impl FnMut(usize, &B, &mut Gradients),
) -> Result<Option<Tensor<2>>, String> {
    let Checkpoints(mut kept) = checkpoints;
    let mut grad = grad;
    let mut pace = Pace::default();
    while let Some(checkpoint) = kept.pop() {
        let index = kept.len();
        let _span = trace_span!("block_backward", index).entered();
        let block = &blocks[index];
        let (input, known) = match checkpoint {
            Kept::Input(input) => (input, None),
            Kept::Offloaded(input) => (input.fetch()?, None),
            Kept::Branches { input, middle, attention } => (input, Some((middle, attention))),
        };
        // The next input comes while this block is differentiated.
        if let Some(Kept::Offloaded(next)) = kept.pop_if(|next| matches!(next, Kept::Offloaded(_))) {
            pace.mark(&input)?;
            kept.push(Kept::Input(next.fetch()?));
        }
        // Below the first block only trained embeddings need a gradient.
        let wanted = index > 0 || into_embeddings;
        let input = if wanted { input.autodiff().require_grad() } else { input.autodiff() };
        let (middle, first) = match known {
            Some((middle, attention)) => (middle, Err(attention)),
            None => {
                let _span = trace_span!("recompute").entered();
                let branch = block.attention(input.clone(), pass, Purpose::Result);
                let middle = input.clone().without_autodiff() + branch.clone().without_autodiff();
                (middle, Ok(branch))
            }
        };
        // As the plain backward does, from the last tokens on.
        let tokens = middle.dims()[0];
        let mut through = Vec::new();
        for (part, start, len) in parts(tokens).rev() {
            let of_part = |x: &Tensor<2>| if len == tokens { x.clone() } else { x.clone().narrow(0, start, len) };
            let middle = of_part(&middle).autodiff().require_grad();
            let again = || block.feed_forward(middle.clone(), pass.part(part), Purpose::Gradients(None));
            let second = trace_span!("recompute").in_scope(again);
            let mut grads = trace_span!("gradient").in_scope(|| backward_from(second, of_part(&grad)));
            through.extend(middle.grad_remove(&mut grads));
            collect(index, block, &mut grads);
        }
        drop(middle);
        if !through.is_empty() {
            through.reverse();
            let through = if through.len() == 1 { through.remove(0) } else { Tensor::cat(through, 0) };
            grad = grad + through;
        }

        let first = match first {
            Ok(branch) => branch,
            Err(attention) => trace_span!("recompute")
                .in_scope(|| block.attention(input.clone(), pass, Purpose::Gradients(attention))),
        };
        if first.is_tracked() {
            let mut grads = trace_span!("gradient").in_scope(|| backward_from(first, grad.clone()));
            if let Some(through) = input.grad_remove(&mut grads) {
                grad = grad + through;
            }
            collect(index, block, &mut grads);
        }
    }
    Ok(into_embeddings.then_some(grad))
}
