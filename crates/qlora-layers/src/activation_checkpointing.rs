//! Activation checkpointing (Chen et al., 2016, arXiv 1604.06174) over blocks of two residual branches:
//!
//! `m = x + attention(x)`, `y = m + feed_forward(m)`
//!
//! The forward pass runs every block without recording and keeps little of it; [`ActivationCheckpointing`] says what, block by
//! block. A block whose policy is to keep everything is recorded, and differentiated from its record.
//! The backward pass walks the blocks from last to first. It runs a branch again from its input, this time recorded,
//! and differentiates it from the gradient `g` of its sum, which passes through the residual unchanged:
//! `g` becomes `g + J_branchᵀ g`.
//!
//! - The last product of a branch is recorded, not computed: its gradients don't need its result, and where the sum is
//!   needed it was kept or is computed once. For a Llama block that is a fifth of the products' second forward.
//! - Attention that was kept is not computed again either.
//!
//! - A block may change the sum before it leaves the block; then the gradient goes through the second branch, its residual and what
//!   follows as one.
//!
//! - Blocks may read more than the block before them, such as keys of an earlier block. What is read is a leaf where it is read, and the
//!   gradients that come together in it go into the graph of the block that made it, beside that of its branch.
//!
//! - The second branch works on each token alone, so long batches go through it in parts: what it holds at a time, more
//!   than attention does, stops growing with the length.
//!
//! The gradients are those of the plain backward bit for bit wherever the block itself is deterministic, since the same
//! operations run on the same values; dropout masks come from [`Pass`]. (Of more than two parts, the plain backward may
//! add the gradients in another order.)

use crate::Pass;
use crate::offload::{Pace, Parked};
use crate::ops::{AttentionResult, backward_from, backward_from_all};
use crate::streamed::{BlockHome, Order};
use burn::tensor::{Gradients, Tensor};
use host_copies::DeviceError;
use serde::{Deserialize, Serialize};
use tracing::trace_span;

/// What the forward pass keeps for the backward pass. Bytes are those of a Llama block with bf16 activations, per
/// token and `hidden` features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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
    /// As `selective`, in the host's memory: nearly as fast, on a device as empty as with `offload`. The host holds
    /// the `6 hidden` bytes, and its bus carries them twice while blocks compute.
    OffloadSelective,
}

impl ActivationCheckpointing {
    /// Every policy.
    pub const ALL: [Self; 5] = [Self::None, Self::Selective, Self::Full, Self::Offload, Self::OffloadSelective];

    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Selective => "selective",
            Self::Full => "full",
            Self::Offload => "offload",
            Self::OffloadSelective => "offload_selective",
        }
    }

    /// The policies that give the same results in less device memory than `self`, the fastest first.
    pub fn smaller(self) -> &'static [Self] {
        match self {
            Self::None | Self::Selective | Self::Full => &[Self::OffloadSelective, Self::Offload],
            Self::OffloadSelective => &[Self::Offload],
            Self::Offload => &[],
        }
    }

    /// Whether blocks are recorded as a whole, every activation with them.
    pub fn keeps_everything(self) -> bool {
        self == Self::None
    }

    /// Whether attention's result and the second branch's input are kept beside the block's input.
    pub fn keeps_branches(self) -> bool {
        matches!(self, Self::Selective | Self::OffloadSelective)
    }

    /// Whether what is kept waits in the host's memory.
    pub fn offloads(self) -> bool {
        matches!(self, Self::Offload | Self::OffloadSelective)
    }

    /// Whether the backward pass runs whole blocks a second time. The policies that keep both branches run only parts
    /// of a block again.
    pub fn reruns_blocks(self) -> bool {
        matches!(self, Self::Full | Self::Offload)
    }

    /// The tensor, at the place where this policy lets it wait.
    fn park<const D: usize>(self, tensor: Tensor<D>) -> Result<Parked<D>, DeviceError> {
        if self.offloads() { Parked::to_host(tensor) } else { Ok(Parked::OnDevice(tensor)) }
    }
}

/// Tokens that go through the second branch at a time: enough for products at full speed.
const PART: usize = 8192;

/// Parts of so many tokens: number, first token, tokens.
fn parts(tokens: usize) -> impl DoubleEndedIterator<Item = (usize, usize, usize)> {
    (0..tokens.div_ceil(PART)).map(move |part| (part, part * PART, PART.min(tokens - part * PART)))
}

/// Why a branch is evaluated.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one at a time, on its way into a branch")]
pub enum Purpose<'a> {
    /// For its result.
    Result,
    /// For its result; the attention result is stored here.
    Keep(&'a mut Option<AttentionResult>),
    /// For its gradients: the returned tensor's values are not used, and attention is not run where its result is
    /// given.
    Gradients(Option<AttentionResult>),
}

impl Purpose<'_> {
    /// Whether the values of the branch's result are not used.
    pub fn gradients_only(&self) -> bool {
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

    /// Where its frozen weights come from, unless the device has them all the time.
    fn home(&self) -> Option<&BlockHome> {
        None
    }

    /// The second branch.
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    fn feed_forward(&self, x: Tensor<2>, pass: Pass, purpose: Purpose<'_>) -> Tensor<2>;

    /// Whether something follows the sum of the second branch and its input: then [`ending`](Self::ending) is evaluated in the
    /// branch's place.
    fn has_ending(&self) -> bool {
        false
    }

    /// What the block gives for some of the tokens, number `start` of all the first of them: the second branch, its residual, and
    /// what follows token by token.
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    fn ending(&self, x: Tensor<2>, _start: usize, pass: Pass, purpose: Purpose<'_>) -> Tensor<2> {
        x.clone() + self.feed_forward(x, pass, purpose)
    }

    /// What the first branch gave beside its result when it was last recorded, for later blocks to read, and its gradients.
    fn handed_on(&self) -> Vec<(Tensor<2>, Tensor<2>)> {
        Vec::new()
    }

    /// Takes the gradients of what the block read beside its input.
    fn collect_read(&self, _grads: &mut Gradients) {}

    /// Both, with their residuals.
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    fn forward(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        let m = x.clone() + self.attention(x, pass, Purpose::Result);
        self.behind_attention(m, pass)
    }

    /// What the block gives for the second branch's input, in parts of the tokens.
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    fn behind_attention(&self, m: Tensor<2>, pass: Pass) -> Tensor<2> {
        let tokens = m.dims()[0];
        let ends = self.has_ending();
        let run = |m: Tensor<2>, start, pass| match ends {
            true => self.ending(m, start, pass, Purpose::Result),
            false => self.feed_forward(m, pass, Purpose::Result),
        };
        let result = match tokens <= PART {
            true => run(m.clone(), 0, pass),
            false => {
                let part = |(part, start, len)| run(m.clone().narrow(0, start, len), start, pass.part(part));
                Tensor::cat(parts(tokens).map(part).collect(), 0)
            }
        };
        if ends { result } else { m + result }
    }
}

/// What [`forward`] kept of a block.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "as many as a model has blocks")]
enum Block {
    /// What the policy says.
    Kept(Kept),
    /// Everything: the block's input, a leaf of the record, and its output.
    Recorded { input: Tensor<2>, output: Tensor<2> },
}

impl Block {
    /// Waits until every copy to the host is done.
    fn finish_download(&mut self) -> Result<(), DeviceError> {
        match self {
            Self::Kept(kept) => kept.finish_download(),
            Self::Recorded { .. } => Ok(()),
        }
    }

    /// Starts uploading what the backward pass needs first.
    fn start_upload(self) -> Result<Self, DeviceError> {
        match self {
            Self::Kept(kept) => Ok(Self::Kept(kept.start_upload()?)),
            recorded => Ok(recorded),
        }
    }

    /// Whether it waits in the host's memory.
    fn is_offloaded(&self) -> bool {
        matches!(self, Self::Kept(kept) if kept.offloaded)
    }
}

/// What a policy keeps of a block.
#[derive(Debug)]
struct Kept {
    input: Parked<2>,
    branches: Option<Branches>,
    offloaded: bool,
}

/// What it kept within it.
#[derive(Debug)]
struct Branches {
    /// The second branch's input.
    middle: Parked<2>,
    /// Output and log-sum-exp.
    attention: Option<[Parked<4>; 2]>,
}

impl Kept {
    /// Waits until every copy to the host is done.
    fn finish_download(&mut self) -> Result<(), DeviceError> {
        self.input.finish_download()?;
        let Some(Branches { middle, attention }) = &mut self.branches else { return Ok(()) };
        middle.finish_download()?;
        attention.iter_mut().flatten().try_for_each(Parked::finish_download)
    }

    /// Starts uploading what the backward pass needs first.
    fn start_upload(self) -> Result<Self, DeviceError> {
        Ok(match self.branches {
            None => Self { input: self.input.start_upload()?, ..self },
            Some(branches) => {
                let middle = branches.middle.start_upload()?;
                Self { branches: Some(Branches { middle, ..branches }), ..self }
            }
        })
    }
}

/// A block's first branch during the backward pass.
#[expect(clippy::large_enum_variant, reason = "one at a time, for half a block")]
enum First {
    /// It ran again, for the second branch's input.
    Recorded { input: Tensor<2>, branch: Tensor<2> },
    /// It is yet to run, from these.
    Waiting { input: Parked<2>, attention: Option<[Parked<4>; 2]> },
}

impl First {
    /// Starts uploading what the branch needs.
    fn start_upload(self) -> Result<Self, DeviceError> {
        let Self::Waiting { input, attention } = self else { return Ok(self) };
        let attention = attention.map(|parts| both(parts, Parked::start_upload)).transpose()?;
        Ok(Self::Waiting { input: input.start_upload()?, attention })
    }
}

/// `change` for each of two.
fn both<T, U>([a, b]: [T; 2], change: impl Fn(T) -> Result<U, DeviceError>) -> Result<[U; 2], DeviceError> {
    Ok([change(a)?, change(b)?])
}

/// What [`forward`] kept, for [`backward`].
#[derive(Debug)]
pub struct KeptActivations(Vec<Block>);

/// Runs `blocks` on `x`, and keeps of each what its policy says; blocks beyond the policies have the last one.
///
/// `into_embeddings` says whether the gradient in the first block's input will be asked for.
///
/// # Shapes
/// `x` and the output are `[tokens, hidden]`; neither carries autodiff.
///
/// # Errors
/// A copy to the host failed, or the work whose result it copies did.
pub fn forward<B: ResidualBlock>(
    blocks: &[B],
    x: Tensor<2>,
    pass: Pass,
    policies: &[ActivationCheckpointing],
    into_embeddings: bool,
) -> Result<(Tensor<2>, KeptActivations), DeviceError> {
    let untracked = pass.untracked();
    let mut kept = Vec::<Block>::with_capacity(blocks.len());
    // With autodiff enabled but nothing tracked: a backend may have fused versions of what autodiff composes
    // of several operations, and their last bits differ.
    let mut x = x.without_autodiff().autodiff();
    for (index, block) in blocks.iter().enumerate() {
        let _span = trace_span!("block", index).entered();
        enter(block, Order::ThenBackward)?;
        let policy = policies.get(index).or(policies.last()).copied().unwrap_or_default();
        let input = x.clone().without_autodiff();
        if let [.., earlier, _] = &mut kept[..] {
            earlier.finish_download()?;
        }
        if policy.keeps_everything() {
            let input = leaf(input, index > 0 || into_embeddings);
            let output = block.forward(input.clone(), pass);
            x = output.clone().without_autodiff().autodiff();
            kept.push(Block::Recorded { input, output });
            continue;
        }
        let input = policy.park(input)?;
        let mut branches = None;
        if policy.keeps_branches() {
            let mut attention = None;
            let m = x.clone() + block.attention(x, untracked, Purpose::Keep(&mut attention));
            let middle = policy.park(m.clone().without_autodiff())?;
            let attention = attention.map(|result| both(result.into_parts(), |part| policy.park(part))).transpose()?;
            branches = Some(Branches { middle, attention });
            x = block.behind_attention(m, untracked);
        } else {
            x = block.forward(x, untracked);
        }
        kept.push(Block::Kept(Kept { input, branches, offloaded: policy.offloads() }));
    }
    kept.iter_mut().try_for_each(Block::finish_download)?;
    Ok((x.without_autodiff(), KeptActivations(kept)))
}

/// Has the block's weights on the device for what is queued from here on.
fn enter(block: &impl ResidualBlock, order: Order) -> Result<(), DeviceError> {
    block.home().map_or(Ok(()), |home| home.enter(order))
}

/// A block's input, as the backward pass sees it. Below the first block only trained embeddings need a gradient.
fn leaf(x: Tensor<2>, wanted: bool) -> Tensor<2> {
    if wanted { x.autodiff().require_grad() } else { x.autodiff() }
}

/// Runs the blocks again, unless they were recorded, and differentiates them, from last to first.
///
/// Offloaded tensors come back half a block ahead of their use. A kernel that uses one waits for every copy that was
/// started before the kernel, so the copies for one half start behind the kernels that use the previous half's tensors.
///
/// `grad` is the loss's gradient in the output of the last block. `collect` takes gradients of a block's parameters out
/// of the container, several times per block. With `into_embeddings` the result is the gradient in the first block's input.
///
/// # Shapes
/// `grad` is `[tokens, hidden]`, without autodiff.
///
/// # Errors
/// A copy to the host failed, or work on the device did.
pub fn backward<B: ResidualBlock>(
    blocks: &[B],
    kept: KeptActivations,
    grad: Tensor<2>,
    pass: Pass,
    into_embeddings: bool,
    mut collect: impl FnMut(usize, &B, &mut Gradients),
) -> Result<Option<Tensor<2>>, DeviceError> {
    let KeptActivations(mut kept) = kept;
    let mut grad = grad;
    let mut pace = Pace::default();
    while let Some(of_block) = kept.pop() {
        let index = kept.len();
        let _span = trace_span!("block_backward", index).entered();
        let block = &blocks[index];
        enter(block, Order::Backward)?;
        let wanted = index > 0 || into_embeddings;
        let Kept { input, branches, .. } = match of_block {
            Block::Kept(kept) => kept,
            Block::Recorded { input, output } => {
                if let Some(next) = kept.pop() {
                    kept.push(started(next, &mut pace, &grad)?);
                }
                if output.is_tracked() {
                    let all = || backward_from_all((output, grad), block.handed_on());
                    let mut grads = trace_span!("gradient").in_scope(all);
                    // The residual connection passes on what a block's branches don't.
                    grad = input.grad_remove(&mut grads).unwrap_or_else(|| input.without_autodiff().zeros_like());
                    block.collect_read(&mut grads);
                    collect(index, block, &mut grads);
                }
                continue;
            }
        };
        let (middle, mut first) = match branches {
            Some(Branches { middle, attention }) => (middle.into_tensor()?, First::Waiting { input, attention }),
            None => {
                let _span = trace_span!("recompute").entered();
                let input = leaf(input.into_tensor()?, wanted);
                let branch = block.attention(input.clone(), pass, Purpose::Result);
                let middle = input.clone().without_autodiff() + branch.clone().without_autodiff();
                (middle, First::Recorded { input, branch })
            }
        };
        // As the plain backward does, from the last tokens on.
        let (tokens, ends) = (middle.dims()[0], block.has_ending());
        let mut through = Vec::new();
        for (part, start, len) in parts(tokens).rev() {
            let of_part = |x: &Tensor<2>| if len == tokens { x.clone() } else { x.clone().narrow(0, start, len) };
            let middle = of_part(&middle).autodiff().require_grad();
            let (pass, purpose) = (pass.part(part), Purpose::Gradients(None));
            let again = || match ends {
                true => block.ending(middle.clone(), start, pass, purpose),
                false => block.feed_forward(middle.clone(), pass, purpose),
            };
            let second = trace_span!("recompute").in_scope(again);
            first = first.start_upload()?;
            let mut grads = trace_span!("gradient").in_scope(|| backward_from(second, of_part(&grad)));
            through.extend(middle.grad_remove(&mut grads));
            block.collect_read(&mut grads);
            collect(index, block, &mut grads);
        }
        drop(middle);
        if !through.is_empty() {
            through.reverse();
            let through = if through.len() == 1 { through.remove(0) } else { Tensor::cat(through, 0) };
            // The residual connection is in the ending already.
            grad = if ends { through } else { grad + through };
        }

        let (input, branch) = match first {
            First::Recorded { input, branch } => (input, branch),
            First::Waiting { input, attention } => {
                let _span = trace_span!("recompute").entered();
                let input = leaf(input.into_tensor()?, wanted);
                let known = attention.map(|parts| both(parts, Parked::into_tensor)).transpose()?;
                let known = known.map(AttentionResult::from_parts);
                (input.clone(), block.attention(input, pass, Purpose::Gradients(known)))
            }
        };
        if let Some(next) = kept.pop() {
            kept.push(started(next, &mut pace, &grad)?);
        }
        if branch.is_tracked() {
            let all = || backward_from_all((branch, grad.clone()), block.handed_on());
            let mut grads = trace_span!("gradient").in_scope(all);
            block.collect_read(&mut grads);
            if let Some(through) = input.grad_remove(&mut grads) {
                grad = grad + through;
            }
            collect(index, block, &mut grads);
        }
    }
    Ok(into_embeddings.then_some(grad))
}

/// The next block, what it keeps on its way to the device. Its copies start behind the work that makes `grad`.
fn started(next: Block, pace: &mut Pace, grad: &Tensor<2>) -> Result<Block, DeviceError> {
    if next.is_offloaded() {
        pace.mark(grad)?;
    }
    next.start_upload()
}
