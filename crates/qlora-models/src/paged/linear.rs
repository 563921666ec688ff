//! Linear attention of a pass: each row goes on from the state that its sequence left in the cache.

use super::{CachedRow, MixedPass, PagedCache, joined, norm};
use crate::config::ModelConfig;
use crate::decoder::Decoder;
use crate::delta_net::{DeltaNet, DeltaState};
use crate::norm::RmsNorm;
use burn::tensor::{FloatDType, Tensor};
use qlora_layers::ops::fused::{Activation, gated};

/// A row as linear attention sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowSequence {
    tokens: usize,
    /// Whether it goes on from a state.
    goes_on: bool,
    /// The first of its blocks, which no other sequence has.
    first_block: u32,
}

impl RowSequence {
    pub fn new(row: &CachedRow<'_>) -> Self {
        Self {
            tokens: row.ids.len(),
            goes_on: row.past > 0,
            first_block: row.blocks.first().copied().unwrap_or_default(),
        }
    }
}

impl PagedCache {
    /// Bytes on the device that a sequence takes beside its tokens: the states of linear attention.
    pub fn sequence_bytes(config: &ModelConfig, dtype: FloatDType) -> usize {
        let blocks = config.num_hidden_layers - config.attention_blocks();
        config.linear.map_or(0, |linear| blocks * DeltaState::bytes(&linear, dtype))
    }

    /// Drops the states of sequences whose first block `is_live` does not know. Others are dropped when their first block begins
    /// another sequence.
    pub fn keep_sequences(&mut self, is_live: impl Fn(u32) -> bool) {
        self.states.retain(|(first, _), _| is_live(*first));
    }
}

impl<'a> MixedPass<'a> {
    /// The linear attention of a block, for its normalised input.
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    pub(super) fn linear_attention(
        &self,
        delta: &DeltaNet,
        index: usize,
        h: Tensor<2>,
        cache: &mut PagedCache,
    ) -> Tensor<2> {
        let block = |model: &'a Decoder| &model.blocks[index];
        // Products that share an input are joined up to three.
        let pairs = (0..block(self.models[0].1).qkv.len()).step_by(2);
        let pair = |first: usize| self.linears(h.clone(), |model| block(model).qkv()[first..first + 2].to_vec());
        let [qkv, z, b, a] = delta.split(pairs.flat_map(pair).collect());
        let mut start = 0;
        let of_row = |row: &RowSequence| {
            let first = start;
            start += row.tokens;
            let part = |x: &Tensor<2>| x.clone().narrow(0, first, row.tokens);
            let place = (row.first_block, index);
            let before = cache.states.remove(&place).filter(|_| row.goes_on);
            assert!(before.is_some() || !row.goes_on, "a sequence that goes on has no state of block {index}");
            let (out, behind) = delta.forward_after(part(&qkv), [part(&b), part(&a)], before);
            cache.states.insert(place, behind);
            out
        };
        let out = joined(self.inputs.sequences.iter().map(of_row).collect());
        let norms = self.each_some(|model| Some(&block(model).norms.linear.as_ref()?.module));
        let out = norms.map_or_else(|| out.clone(), |norms| norm(&norms, out.clone(), RmsNorm::forward_heads));
        self.linears(gated(z, out, Activation::Silu), |model| vec![&block(model).output.module]).remove(0)
    }
}
