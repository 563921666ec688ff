//! The decoder: embeddings, blocks, and the output head. What families differ in comes from their table entry
//! through [`ModelConfig`].

use crate::block::{Block, BlockInPass};
use crate::config::{AttentionKind, ModelConfig};
use crate::embedding::Embedding;
use crate::family::EmbeddingScale;
use crate::kv_cache::KvCache;
use crate::named::Named;
use crate::norm::RmsNorm;
use crate::rope::RotaryTables;
use crate::sequence::{Sequence, View};
use adapter_io::AdapterConfig;
use burn::module::{Param, ParamId};
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use qlora_layers::activation_checkpointing::ResidualBlock;
use qlora_layers::ops::AttentionOptions;
use qlora_layers::ops::fused::Rotation;
use qlora_layers::ops::{frozen_linear, in_bf16, matmul};
use qlora_layers::{FrozenLinear, LoraLinear, Pass, TokenRows};
use std::ops::Range;
use std::sync::Arc;

/// A decoder-only language model on one device, its linear layers frozen (4-bit or dense) with
/// optional adapters.
///
/// Hidden states are `[tokens, hidden]` with `tokens = rows * len`, row-major. Rows are padded on the
/// right: with causal attention, no real token sees the padding.
#[derive(Clone, Debug)]
pub struct Decoder {
    pub(crate) config: ModelConfig,
    pub(crate) device: Device,
    pub(crate) dtype: FloatDType,
    /// One for each of [`ModelConfig::attention_kinds`].
    pub(crate) rotary: Arc<[RotaryTables]>,
    pub(crate) embed_tokens: Param<Tensor<2>>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: Named<RmsNorm>,
    /// `None` when the head is the embedding table.
    pub(crate) lm_head: Option<LoraLinear>,
    /// The weight of the head in bf16, of the same values, and the name of the weight that it is of.
    pub(crate) narrow_head: Option<(ParamId, Tensor<2>)>,
    /// What an adapter put on the embedding table.
    pub(crate) embedding: Embedding,
    /// Rows of single tokens that are trained in an output head of its own.
    pub(crate) head_tokens: Option<TokenRows>,
    /// The rows of the tables before an adapter brought more.
    pub(crate) rows_before: Option<usize>,
    /// The configuration of the adapter that is on, as PEFT writes it.
    pub(crate) adapter_config: Option<AdapterConfig>,
}

impl Decoder {
    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Rows of the embedding table: ids below this can be read.
    pub fn vocab_size(&self) -> usize {
        self.embed_tokens.dims()[0]
    }

    /// Where the model lives.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Dtype of activations.
    pub fn dtype(&self) -> FloatDType {
        self.dtype
    }

    /// The blocks, first to last.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The output head, unless it is the embedding table.
    pub fn lm_head(&self) -> Option<&LoraLinear> {
        self.lm_head.as_ref()
    }

    /// Prepares a pass over `rows` rows of `len` tokens that follow `past` cached ones.
    pub fn sequence(&self, rows: usize, len: usize, past: usize) -> Sequence {
        Sequence { rows, len, packed: None, views: self.views(std::slice::from_ref(&(past..past + len)), None) }
    }

    /// Prepares a pass over rows of these lengths that lie one after the other, without padding. Each has positions from 0 on and
    /// sees itself alone, in attention, in linear attention and in its convolution.
    pub fn packed_sequence(&self, lens: &[usize]) -> Sequence {
        let (mut bounds, mut end) = (vec![0], 0);
        for len in lens {
            end += len;
            bounds.push(end as u32);
        }
        let packed: Option<Arc<[u32]>> = Some(bounds.into());
        let rows: Vec<Range<usize>> = lens.iter().map(|len| 0..*len).collect();
        Sequence { rows: 1, len: end, packed: packed.clone(), views: self.views(&rows, packed) }
    }

    /// How blocks of each kind see the last positions of sequences.
    fn views(&self, positions: &[Range<usize>], packed: Option<Arc<[u32]>>) -> Vec<View> {
        let len = positions.iter().map(ExactSizeIterator::len).sum();
        let view = |(kind, tables): (&AttentionKind, &RotaryTables)| {
            let spans = positions.iter().map(|positions| (positions.end, positions.clone()));
            let (cos, sin) = tables.get(&kind.rope, spans, &self.device);
            let head_dim = self.config.rotated_dim();
            let rotation = Rotation { len, head_dim, rotary: kind.rope.turned, inverse: false };
            let softcap = self.config.score_softcap.map(|cap| cap as f32);
            let scores = AttentionOptions::new(self.config.score_scale as f32, kind.window, softcap);
            let attention = AttentionOptions { packed: packed.clone(), ..scores };
            let growth = kind.rope.query_growth.filter(|growth| positions.iter().any(|each| growth.reaches(each)));
            let query_growth = growth.map(|growth| {
                let factors: Vec<f32> = positions.iter().cloned().flatten().map(|at| growth.factor(at)).collect();
                Tensor::from_data(TensorData::new(factors, [len, 1]), (&self.device, DType::F32))
            });
            View { cos, sin, rotation, query_growth, attention }
        };
        self.config.attention_kinds.iter().zip(&*self.rotary).map(view).collect()
    }

    /// Looks tokens up.
    ///
    /// # Shapes
    /// Any number of ids to `[tokens, hidden]`.
    pub fn embed(&self, ids: &[u32], pass: Pass) -> Tensor<2> {
        let _span = tracing::trace_span!("embed").entered();
        let values: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        let index = Tensor::from_data(TensorData::new(values, [ids.len()]), (&self.device, DType::I32));
        self.embed_on_device(ids, index, pass)
    }

    /// [`embed`](Self::embed) of ids that are on the device too, i32.
    pub(crate) fn embed_on_device(&self, ids: &[u32], index: Tensor<1, Int>, pass: Pass) -> Tensor<2> {
        let x = self.embedding.forward(&self.embed_tokens, ids, index, pass);
        match (self.config.embedding_scale, self.config.family.embedding_scale) {
            // transformers holds this factor in the weight's dtype: 55.5 and not 55.4256 in bf16.
            (Some(scale), EmbeddingScale::SqrtWidth) => x.mul_scalar(rounded(scale, self.dtype)),
            (Some(scale), _) => x.mul_scalar(scale),
            (None, _) => x,
        }
    }

    /// The blocks as a pass over `sequence` runs them, first to last.
    pub fn blocks_in<'a>(&'a self, sequence: &'a Sequence) -> Vec<BlockInPass<'a>> {
        self.blocks.iter().map(|block| BlockInPass { block, config: &self.config, sequence }).collect()
    }

    /// Runs one block.
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    pub fn run_block(&self, block: &Block, x: Tensor<2>, sequence: &Sequence, pass: Pass) -> Tensor<2> {
        let _span = tracing::trace_span!("block", index = block.index).entered();
        let x = block.enter(x, pass);
        BlockInPass { block, config: &self.config, sequence }.forward(x, pass)
    }

    /// Final norm and output head.
    ///
    /// # Shapes
    /// `[tokens, hidden]` to `[tokens, vocab]`, in the compute dtype.
    pub fn logits(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        self.capped(self.head(self.before_head(self.norm.module.forward(x, pass)), pass))
    }

    /// The input of the head, divided by what logits are to be divided by: far fewer values, and the head is linear.
    pub(crate) fn before_head(&self, x: Tensor<2>) -> Tensor<2> {
        match self.config.logit_divisor {
            Some(divisor) => x.div_scalar(divisor),
            None => x,
        }
    }

    /// The output head alone.
    pub(crate) fn head(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        if let Some(narrow) = self.narrow_head().filter(|_| !pass.tracked) {
            return frozen_linear(x, narrow.clone(), self.dtype);
        }
        let (logits, tokens) = match &self.lm_head {
            Some(head) => (head.forward_in(x.clone(), pass), &self.head_tokens),
            None => (matmul(x.clone(), self.embed_tokens.val().transpose()), &self.embedding.tokens),
        };
        match tokens {
            Some(tokens) => tokens.in_logits(logits, x, pass),
            None => logits,
        }
    }

    /// Holds the output head's weight in bf16 too, where the model is on the host, in f32, and the weight has the same
    /// values in bf16, as one of a checkpoint in bf16 has. Passes without a graph read half the bytes then, which is most
    /// of what a head costs one token, and give the same bits.
    pub fn hold_narrow_head(&mut self) {
        let narrow = self.head_weight().and_then(|(id, weight)| Some((id, in_bf16(&weight)?)));
        self.narrow_head = narrow;
    }

    /// The head in bf16, if it is held and the head is what it was then.
    pub(crate) fn narrow_head(&self) -> Option<&Tensor<2>> {
        let (id, narrow) = self.narrow_head.as_ref()?;
        let (own, _) = self.head_weight()?;
        (own == *id && !self.has_trained_tokens()).then_some(narrow)
    }

    /// The weight of a head that is a dense weight and nothing else, and the weight's name.
    fn head_weight(&self) -> Option<(ParamId, Tensor<2>)> {
        match &self.lm_head {
            None => Some((self.embed_tokens.id, self.embed_tokens.val())),
            Some(head) => match &head.base {
                FrozenLinear::Dense(weight) if head.is_bare() && head.bias.is_none() => Some((weight.id, weight.val())),
                _ => None,
            },
        }
    }

    /// Whether rows of single tokens were trained.
    pub(crate) fn has_trained_tokens(&self) -> bool {
        self.head_tokens.is_some() || self.embedding.tokens.is_some()
    }

    /// Logits of the output head as the family caps them.
    pub(crate) fn capped(&self, logits: Tensor<2>) -> Tensor<2> {
        match self.config.logit_softcap {
            Some(cap) => soft_capped(logits.cast(FloatDType::F32), cap).cast(self.dtype),
            None => logits,
        }
    }

    /// The logits of every token of a batch.
    ///
    /// # Shapes
    /// `ids` holds `rows * len` ids, row-major; output `[rows * len, vocab]`.
    pub fn forward(&self, ids: &[u32], rows: usize, pass: Pass) -> Tensor<2> {
        let sequence = self.sequence(rows, ids.len() / rows, 0);
        let x = self.blocks.iter().fold(self.embed(ids, pass), |x, block| self.run_block(block, x, &sequence, pass));
        self.logits(x, pass)
    }

    /// The logits after the last of `ids`, which follow the tokens in `cache` and join them there. Where the longer
    /// sequence rotates all positions otherwise, everything is computed anew.
    ///
    /// # Shapes
    /// One row of ids; output `[1, vocab]`. `None` without ids.
    pub fn forward_cached(&self, ids: &[u32], cache: &mut KvCache) -> Option<Tensor<2>> {
        cache.extend(self, ids)
    }

    /// Every linear layer with its path, first block first; the output head comes last.
    pub fn linears(&self) -> impl Iterator<Item = (String, &LoraLinear)> {
        let head = self.lm_head.iter().map(|head| (self.config.root().head.to_string(), head));
        self.blocks.iter().flat_map(Block::linears).chain(head)
    }

    /// Every linear layer with its path, first block first; the output head comes last.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = (String, &mut LoraLinear)> {
        let path = self.config.root().head;
        let head = self.lm_head.iter_mut().map(|head| (path.to_string(), head));
        self.blocks.iter_mut().flat_map(Block::linears_mut).chain(head)
    }

    /// Every norm with its path, first block first; the one before the output head comes last.
    pub fn norms(&self) -> impl Iterator<Item = (String, &RmsNorm)> {
        self.blocks.iter().flat_map(Block::norms).chain([self.norm.pair()])
    }

    /// Every norm with its path, first block first; the one before the output head comes last.
    pub fn norms_mut(&mut self) -> impl Iterator<Item = (String, &mut RmsNorm)> {
        self.blocks.iter_mut().flat_map(Block::norms_mut).chain([self.norm.pair_mut()])
    }

    /// The linear layers without a head that is the embedding table.
    fn own_linears(&self) -> impl Iterator<Item = &LoraLinear> {
        let head = self.lm_head.as_ref().filter(|_| !self.config.tie_word_embeddings);
        self.blocks.iter().flat_map(Block::linears).map(|(_, linear)| linear).chain(head)
    }

    /// Bytes of frozen weights on the device, and of the slots for those that are streamed.
    pub fn device_bytes(&self) -> usize {
        let bytes = |linear: &LoraLinear| {
            let bias = linear.bias.as_ref().map_or(0, |bias| bias.dims()[0] * bias.dtype().size());
            linear.base.device_bytes() + bias
        };
        let embeddings = self.embed_tokens.shape().num_elements() * self.embed_tokens.dtype().size();
        let norms = self.norms().map(|(_, norm)| 4 * norm.weight.dims()[0]).sum::<usize>();
        let narrow = self.narrow_head.as_ref().map_or(0, |(_, narrow)| 2 * narrow.shape().num_elements());
        let slots = self.streaming().slot_bytes as usize;
        let linear = 4 * self.config.further_values();
        embeddings + narrow + norms + slots + linear + self.own_linears().map(bytes).sum::<usize>()
    }

    /// Frozen weights, counted before quantization.
    pub fn num_params(&self) -> usize {
        let count = |linear: &LoraLinear| {
            let bias = linear.bias.as_ref().map_or(0, |bias| bias.dims()[0]);
            linear.base.shape().iter().product::<usize>() + bias
        };
        let linears: usize = self.own_linears().map(count).sum();
        let norms: usize = self.norms().map(|(_, norm)| norm.weight.dims()[0]).sum();
        self.embed_tokens.shape().num_elements() + norms + linears + self.config.further_values()
    }
}

/// A number as a dtype holds it.
fn rounded(number: f64, dtype: FloatDType) -> f64 {
    match dtype {
        FloatDType::BF16 => half::bf16::from_f64(number).to_f64(),
        FloatDType::F16 => half::f16::from_f64(number).to_f64(),
        _ => f64::from(number as f32),
    }
}

/// `cap · tanh(x / cap)` (Gemma Team, 2024, arXiv 2408.00118, section 2).
fn soft_capped(x: Tensor<2>, cap: f64) -> Tensor<2> {
    x.div_scalar(cap).tanh().mul_scalar(cap)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

    use super::*;
    use crate::LoadOptions;
    use qlora_layers::frozen;

    #[test]
    fn a_narrow_head_gives_the_bits_of_the_wide_one_until_that_is_another() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference/tiny-llama");
        let options = LoadOptions { quantization: Some(Default::default()), dtype: FloatDType::F32 };
        let mut model = Decoder::load(&dir, options, &Device::flex(), &mut |_| {}).unwrap();
        let ids: Vec<u32> = (0..23).map(|i| 7 * i + 1).collect();
        let bits = |model: &Decoder| -> Vec<u32> {
            let logits = model.forward(&ids, 1, Pass::INFERENCE);
            logits.into_data().iter::<f32>().map(f32::to_bits).collect()
        };
        let wide = bits(&model);
        for tied in [true, false] {
            if !tied {
                model.lm_head = Some(LoraLinear::frozen(FrozenLinear::dense(model.embed_tokens.val()), None));
                assert!(model.narrow_head().is_none(), "the head is another weight now");
            }
            model.narrow_head = None;
            let bytes = model.device_bytes();
            model.hold_narrow_head();
            assert_eq!(model.narrow_head().unwrap().dtype(), DType::BF16);
            assert_eq!(model.device_bytes(), bytes + 2 * model.embed_tokens.shape().num_elements());
            assert!(bits(&model) == wide, "tied: {tied}");
        }
        // Values that bf16 does not have.
        model.lm_head = None;
        model.embed_tokens = frozen(model.embed_tokens.val() * 1.001);
        assert!(model.narrow_head().is_none());
        model.hold_narrow_head();
        assert!(model.narrow_head().is_none());
    }
}
