//! Linear attention and short convolutions of a pass: each row goes on from the state that its sequence left in the cache.

use super::{CachedRow, MixedPass, PagedCache, joined, norm};
use crate::config::ModelConfig;
use crate::decoder::Decoder;
use crate::delta_net::{DeltaNet, SequenceState};
use crate::norm::RmsNorm;
use crate::short_conv::ShortConv;
use burn::tensor::{DType, FloatDType, Tensor};
use qlora_layers::ops::fused::{Activation, gated};
use std::ops::Range;

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
    /// Bytes on the device that a sequence takes beside its tokens: the states of linear attention, and the last inputs of short
    /// convolutions.
    pub fn sequence_bytes(config: &ModelConfig, dtype: FloatDType) -> usize {
        let blocks = config.num_hidden_layers - config.attention_blocks();
        let tail = |taps: usize, channels: usize| (taps - 1) * channels * DType::from(dtype).size();
        let of_linear = config.linear.map_or(0, |linear| {
            linear.value_heads * linear.key_dim * linear.value_dim * 4 + tail(linear.taps, linear.channels())
        });
        blocks * (of_linear + config.short_conv.map_or(0, |taps| tail(taps, config.hidden_size)))
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
        let out = self.row_by_row(index, cache, |tokens, before| {
            let part = |x: &Tensor<2>| x.clone().narrow(0, tokens.start, tokens.len());
            delta.forward_after(part(&qkv), [part(&b), part(&a)], before)
        });
        let norms = self.each_some(|model| Some(&block(model).norms.linear.as_ref()?.module));
        let out = norms.map_or_else(|| out.clone(), |norms| norm(&norms, out.clone(), RmsNorm::forward_heads));
        self.linears(gated(z, out, Activation::Silu), |model| vec![&block(model).output.module]).remove(0)
    }

    /// The short convolution of a block, for its normalised input.
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    pub(super) fn short_conv(&self, conv: &ShortConv, index: usize, h: Tensor<2>, cache: &mut PagedCache) -> Tensor<2> {
        let block = |model: &'a Decoder| &model.blocks[index];
        let all = self.linears(h, |model| block(model).qkv()).remove(0);
        let out = self.row_by_row(index, cache, |tokens, before| {
            let (out, tail) =
                conv.forward_after(all.clone().narrow(0, tokens.start, tokens.len()), before.map(|state| state.tail));
            (out, SequenceState { tail, state: None })
        });
        self.linears(out, |model| vec![&block(model).output.module]).remove(0)
    }

    /// What `run` gives for the tokens of each row and the state that the row goes on from, one after the other. It gives the
    /// state behind them too.
    fn row_by_row(
        &self,
        index: usize,
        cache: &mut PagedCache,
        run: impl Fn(Range<usize>, Option<SequenceState>) -> (Tensor<2>, SequenceState),
    ) -> Tensor<2> {
        let mut start = 0;
        let of_row = |row: &RowSequence| {
            let tokens = start..start + row.tokens;
            start = tokens.end;
            let place = (row.first_block, index);
            let before = cache.states.remove(&place).filter(|_| row.goes_on);
            assert!(before.is_some() || !row.goes_on, "a sequence that goes on has no state of block {index}");
            let (out, behind) = run(tokens, before);
            cache.states.insert(place, behind);
            out
        };
        joined(self.inputs.sequences.iter().map(of_row).collect())
    }
}
