//! Under autodiff: the backend below, as long as nothing is tracked.

use super::{PagedBackend, PagedOperand, PagedOps};
use crate::ops::AttentionOptions;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend};

/// The batch as the inner backend has it: integer tensors are the same there.
fn inner<B: PagedBackend, C: CheckpointStrategy>(batch: PagedOperand<Autodiff<B, C>>) -> PagedOperand<B> {
    let PagedOperand { words, host } = batch;
    PagedOperand { words, host }
}

/// A tensor's value.
///
/// # Panics
/// When it is tracked: its gradient would be lost without a word.
fn value<B: PagedBackend, C: CheckpointStrategy>(x: FloatTensor<Autodiff<B, C>>) -> FloatTensor<B> {
    assert!(!x.is_tracked(), "a paged cache is for inference: its operations have no gradient");
    Autodiff::<B, C>::inner(x)
}

impl<B: PagedBackend, C: CheckpointStrategy> PagedOps for Autodiff<B, C> {
    fn paged_write(cache: FloatTensor<Self>, new: FloatTensor<Self>, batch: PagedOperand<Self>) -> FloatTensor<Self> {
        Self::from_inner(B::paged_write(value::<B, C>(cache), value::<B, C>(new), inner(batch)))
    }

    fn paged_attention(
        q: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        batch: PagedOperand<Self>,
        options: AttentionOptions,
    ) -> FloatTensor<Self> {
        let [q, keys, values] = [q, keys, values].map(value::<B, C>);
        Self::from_inner(B::paged_attention(q, keys, values, inner(batch), options))
    }

    fn likeliest(logits: FloatTensor<Self>) -> IntTensor<Self> {
        B::likeliest(value::<B, C>(logits))
    }
}
