//! Under autodiff: the backend below, as long as nothing is tracked.

use super::{GroupedBackend, GroupedOperand, GroupedOps};
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend};

/// A tensor's value.
///
/// # Panics
/// When it is tracked: its gradient would be lost without a word.
fn value<B: GroupedBackend, C: CheckpointStrategy>(x: FloatTensor<Autodiff<B, C>>) -> FloatTensor<B> {
    assert!(!x.is_tracked(), "grouped adapters are for inference: the operation has no gradient");
    Autodiff::<B, C>::inner(x)
}

impl<B: GroupedBackend, C: CheckpointStrategy> GroupedOps for Autodiff<B, C> {
    fn grouped_low_rank(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        adapters: GroupedOperand<Self>,
    ) -> FloatTensor<Self> {
        let GroupedOperand { lora_a, lora_b, words, host } = adapters;
        let [y, x, lora_a, lora_b] = [y, x, lora_a, lora_b].map(value::<B, C>);
        Self::from_inner(B::grouped_low_rank(y, x, GroupedOperand { lora_a, lora_b, words, host }))
    }
}
