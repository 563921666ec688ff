//! One forward pass over rows of different lengths and adapters, with the keys and values of past tokens in blocks.
//!
//! A row adds some tokens to what the cache holds of its sequence: a prompt or a piece of it, or the one token that was
//! chosen last. Products run over all rows' tokens at once; only attention tells the rows apart. What a row gets does not
//! depend on the rows beside it.

mod feed_forward;
mod head;
mod latent;
mod linear;

use crate::block::{Block, Recurrence, scaled, split_gate, split_qkv};
use crate::config::{AttentionKind, ModelConfig};
use crate::decoder::Decoder;
use crate::delta_net::SequenceState;
use crate::named::Named;
use crate::norm::{Norms, RmsNorm, add_norm, norm, normalised};
use crate::recorded::Recorded;
use crate::stacks::{Layers, Stacks};
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use host_copies::{client_of, overwrite, overwrite_int};
use linear::RowSequence;
use qlora_layers::ops::fused::{Activation, Rotation, gated, rotate};
use qlora_layers::ops::{
    AttentionOptions, NewTokens, PagedBatch, PagedRow, attention, paged_attention, paged_slot, paged_write,
    rotate_into_cache,
};
use qlora_layers::{
    AdapterSpans, JoinedLayer, LoraLinear, Pass, by_part, forward_joined, forward_mixed, forward_stacked,
};
use std::collections::HashMap;
use std::ops::Range;

/// Keys and values in blocks of some tokens each. Who holds which block is the caller's business.
#[derive(Debug)]
pub struct PagedCache {
    block_tokens: usize,
    blocks: usize,
    /// Keys and values of each decoder block, `[(blocks + 1) * block_tokens, kv_heads, head_dim]`, none where it has
    /// something in the place of attention, and of latent attention what both are made of, `[.., 1, rank + rotary_dim]`, in the place of
    /// the keys. The last block is nobody's: rows that only fill a pass up write there.
    layers: Vec<[Tensor<3>; 2]>,
    /// By the first of a sequence's blocks and the decoder block: what linear attention and short convolutions go on from.
    states: HashMap<(u32, usize), SequenceState>,
    /// Passes over this cache that can be replayed.
    pub(crate) recorded: Recorded,
    /// The adapters of its passes.
    pub(crate) stacks: Stacks,
}

impl PagedCache {
    /// Room for `blocks` blocks of `block_tokens` tokens, on the model's device.
    pub fn new(model: &Decoder, blocks: usize, block_tokens: usize) -> Self {
        let slots = (blocks + 1) * block_tokens;
        let shape = [slots, model.config.num_key_value_heads, model.config.head_dim];
        let place = || (&model.device, DType::from(model.dtype));
        let none = || Tensor::empty([0, 1, 1], place());
        let layer = |block: &Block| match (&block.recurrence, model.config.latent) {
            (Some(_), _) => [none(), none()],
            (None, Some(latent)) => [Tensor::zeros([slots, 1, latent.cached_dim()], place()), none()],
            (None, None) => [(); 2].map(|()| Tensor::zeros(shape, place())),
        };
        let layers = model.blocks.iter().map(layer).collect();
        let (recorded, stacks) = (Recorded::default(), Stacks::default());
        Self { block_tokens, blocks, layers, states: HashMap::new(), recorded, stacks }
    }

    /// Bytes on the device that a token takes.
    pub fn token_bytes(config: &ModelConfig, dtype: FloatDType) -> usize {
        let keys_and_values = 2 * config.num_key_value_heads * config.head_dim;
        let values = config.latent.map_or(keys_and_values, |latent| latent.cached_dim());
        config.attention_blocks() * values * DType::from(dtype).size()
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Appends room for as many blocks.
    pub fn grow(&mut self, blocks: usize) {
        // What was recorded looks at the old memory.
        self.recorded = Recorded::default();
        self.blocks += blocks;
        for tensor in self.layers.iter_mut().flatten().filter(|tensor| tensor.dims()[0] > 0) {
            let [_, heads, head_dim] = tensor.dims();
            let more = Tensor::zeros([blocks * self.block_tokens, heads, head_dim], (&tensor.device(), tensor.dtype()));
            *tensor = Tensor::cat(vec![tensor.clone(), more], 0);
        }
    }

    /// Writes new keys and values of a decoder block, and returns all of them.
    fn write(&mut self, layer: usize, new: [Tensor<3>; 2], batch: &PagedBatch) -> &[Tensor<3>; 2] {
        let layer = &mut self.layers[layer];
        for (tensor, new) in layer.iter_mut().zip(new) {
            *tensor = paged_write(taken(tensor), new, batch);
        }
        layer
    }

    /// Rotates queries and new keys of a decoder block, and writes keys and values: the queries, and all keys and values.
    fn rotate_and_write(
        &mut self,
        layer: usize,
        new: NewTokens,
        tables: [Tensor<2>; 2],
        batch: &PagedBatch,
        rotation: Rotation,
    ) -> (Tensor<2>, &[Tensor<3>; 2]) {
        let layer = &mut self.layers[layer];
        let (q, written) = rotate_into_cache(new, tables, layer.each_mut().map(taken), batch, rotation);
        *layer = written;
        (q, layer)
    }
}

/// A tensor of the cache that is about to be written: it has one owner then, and is written in place.
fn taken(tensor: &mut Tensor<3>) -> Tensor<3> {
    let placeholder = Tensor::empty([0, 1, 1], (&tensor.device(), tensor.dtype()));
    std::mem::replace(tensor, placeholder)
}

/// Which of a row's tokens get logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowLogits {
    /// None: the row's prompt goes on.
    None,
    /// The last one.
    Last,
    /// Every one of this pass.
    All,
}

/// A row of a pass.
#[derive(Clone, Copy, Debug)]
pub struct CachedRow<'a> {
    /// Its tokens in this pass, at least one.
    pub ids: &'a [u32],
    /// Its tokens before, whose keys and values are in the cache.
    pub past: usize,
    /// The length that positions are rotated for; see [`Decoder::rotation`].
    pub rotated_for: usize,
    /// The cache's blocks that hold the sequence: room for `past` and all of `ids`.
    pub blocks: &'a [u32],
    /// Which tokens get logits.
    pub logits: RowLogits,
}

/// Rows that see the model with one adapter.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// The model as the rows see it. The models of a pass are clones of one, with or without adapters.
    pub model: &'a Decoder,
    /// The rows.
    pub rows: Vec<CachedRow<'a>>,
}

/// What a pass reads that the host made.
#[derive(Debug)]
pub(crate) struct Inputs {
    ids: Vec<u32>,
    /// i32, `[tokens]`: the ids on the device.
    index: Tensor<1, Int>,
    /// For each kind of attention, cosines and sines, `[tokens * dim / 2]`.
    rotary: Vec<[Tensor<1>; 2]>,
    /// For each kind of attention, `[tokens]`, f32: what queries are multiplied by, where it grows with their position.
    query_growth: Vec<Option<Tensor<1>>>,
    batch: PagedBatch,
    /// How attention goes over the rows.
    segments: Vec<Segment>,
    /// How linear attention does.
    sequences: Vec<RowSequence>,
}

/// Rows that lie beside each other and are attended to in one way.
#[derive(Debug)]
struct Segment {
    first: usize,
    tokens: usize,
    rows: SegmentRows,
}

#[derive(Debug)]
enum SegmentRows {
    /// All rows of the pass.
    Every,
    /// Some of them.
    Paged(PagedBatch),
    /// One row of many tokens, on tensor cores: keys and values as they come, where there are no earlier ones, or else
    /// gathered from these slots of the cache.
    Long(Option<Tensor<1, Int>>),
}

/// New tokens from which on a row's attention is worth its own launch on tensor cores.
const LONG_ROW: usize = 64;

impl Inputs {
    /// For the rows of a pass. `max_len` leaves room to [overwrite](Self::overwrite) them by longer ones.
    pub fn new(model: &Decoder, rows: &[CachedRow<'_>], block_tokens: usize, max_len: usize) -> Self {
        let (config, device) = (&model.config, &model.device);
        let ids: Vec<u32> = rows.iter().flat_map(|row| row.ids).copied().collect();
        let index: Vec<i32> = ids.iter().map(|id| *id as i32).collect();
        let index = Tensor::from_data(TensorData::new(index, [ids.len()]), (device, DType::I32));
        let kinds = config.attention_kinds.iter().zip(&*model.rotary);
        let rotary = kinds.map(|(kind, tables)| {
            let (cos, sin) = tables.spans(&kind.rope, spans(rows));
            let len = cos.len();
            [cos, sin].map(|values| Tensor::from_data(TensorData::new(values, [len]), (device, DType::F32)))
        });
        let rotary = rotary.collect();
        let growth = |kind: &AttentionKind| {
            let factors = query_growth(kind, rows)?;
            let len = factors.len();
            Some(Tensor::from_data(TensorData::new(factors, [len]), (device, DType::F32)))
        };
        let query_growth = config.attention_kinds.iter().map(growth).collect();
        let batch = PagedBatch::with_room(&paged(rows), block_tokens, max_len, device);
        let has_kernel = model.dtype != FloatDType::F32 && client_of(device).is_some();
        let is_long = |row: &CachedRow<'_>| has_kernel && row.ids.len() >= LONG_ROW;
        let segments = segments(rows, is_long, block_tokens, device);
        let sequences = rows.iter().map(RowSequence::new).collect();
        Self { ids, index, rotary, query_growth, batch, segments, sequences }
    }

    /// Puts other rows in their place, of as many tokens each. `false` where the room does not suffice.
    pub fn overwrite(&mut self, model: &Decoder, rows: &[CachedRow<'_>]) -> bool {
        let ids: Vec<u32> = rows.iter().flat_map(|row| row.ids).copied().collect();
        let tables = model.config.attention_kinds.iter().zip(&*model.rotary).zip(&self.rotary);
        self.ids.clone_from(&ids);
        self.batch.overwrite(&paged(rows))
            && overwrite_int(&self.index, &ids)
            && tables.into_iter().all(|((kind, tables), [cos, sin])| {
                let (new_cos, new_sin) = tables.spans(&kind.rope, spans(rows));
                new_cos.is_empty() || (overwrite(cos, &new_cos) && overwrite(sin, &new_sin))
            })
            && model.config.attention_kinds.iter().zip(&self.query_growth).all(|(kind, held)| {
                match (query_growth(kind, rows), held) {
                    (Some(factors), Some(held)) => overwrite(held, &factors),
                    _ => true,
                }
            })
    }

    /// Whether attention reads everything from the cache.
    fn is_paged(&self) -> bool {
        !self.segments.iter().any(|segment| matches!(segment.rows, SegmentRows::Long(_)))
    }

    /// `[tokens, heads, head_dim]` for new queries, keys and values of the same tokens, and the cache that holds them.
    fn attend(
        &self,
        q: Tensor<3>,
        new: Option<[Tensor<3>; 2]>,
        cached: &[Tensor<3>; 2],
        options: &AttentionOptions,
    ) -> Tensor<3> {
        let [keys, values] = cached;
        let of_segment = |Segment { first, tokens, rows }: &Segment| {
            let part = |x: &Tensor<3>| x.clone().narrow(0, *first, *tokens);
            match rows {
                SegmentRows::Every => paged_attention(q.clone(), keys, values, &self.batch, options),
                SegmentRows::Paged(batch) => paged_attention(part(&q), keys, values, batch, options),
                SegmentRows::Long(slots) => {
                    let [k, v] = match (slots, &new) {
                        (None, Some([k, v])) => [part(k), part(v)],
                        (Some(slots), _) => [keys, values].map(|cache| cache.clone().select(0, slots.clone())),
                        (None, None) => panic!("the new tokens of a long row are not at hand"),
                    };
                    attention(part(&q).unsqueeze(), k.unsqueeze(), v.unsqueeze(), options).squeeze_dim(0)
                }
            }
        };
        joined(self.segments.iter().map(of_segment).collect())
    }
}

/// The length that each row is rotated for, and its positions.
fn spans<'a>(rows: &'a [CachedRow<'_>]) -> impl Iterator<Item = (usize, Range<usize>)> + 'a {
    rows.iter().map(|row| (row.rotated_for, row.past..row.past + row.ids.len()))
}

/// What the queries of all tokens are multiplied by; `None` where it is 1 at every position.
fn query_growth(kind: &AttentionKind, rows: &[CachedRow<'_>]) -> Option<Vec<f32>> {
    let growth = kind.rope.query_growth?;
    let positions = rows.iter().flat_map(|row| row.past..row.past + row.ids.len());
    Some(positions.map(|position| growth.factor(position)).collect())
}

fn paged<'a>(rows: &[CachedRow<'a>]) -> Vec<PagedRow<'a>> {
    let one = |row: &CachedRow<'a>| PagedRow { blocks: row.blocks, len: row.past + row.ids.len(), new: row.ids.len() };
    rows.iter().map(one).collect()
}

fn segments(
    rows: &[CachedRow<'_>],
    is_long: impl Fn(&CachedRow<'_>) -> bool,
    block_tokens: usize,
    device: &Device,
) -> Vec<Segment> {
    let mut first = 0;
    let groups = rows.chunk_by(|a, b| !is_long(a) && !is_long(b));
    let segments = groups.map(|group| {
        let tokens = group.iter().map(|row| row.ids.len()).sum();
        let kind = match group {
            [row] if is_long(row) => SegmentRows::Long((row.past > 0).then(|| {
                let len = row.past + row.ids.len();
                let slots: Vec<i32> =
                    (0..len).map(|position| paged_slot(row.blocks, position, block_tokens) as i32).collect();
                Tensor::from_data(TensorData::new(slots, [len]), (device, DType::I32))
            })),
            _ if group.len() == rows.len() => SegmentRows::Every,
            _ => SegmentRows::Paged(PagedBatch::new(&paged(group), block_tokens, device)),
        };
        let segment = Segment { first, tokens, rows: kind };
        first += tokens;
        segment
    });
    segments.collect()
}

/// What the decoder blocks of a pass share.
pub(crate) struct MixedPass<'a> {
    models: Vec<(usize, &'a Decoder)>,
    config: &'a ModelConfig,
    inputs: &'a Inputs,
    stacked: Option<Stacked<'a>>,
}

/// Adapters that the tokens of a pass have, where one model stands for all of its rows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stacked<'a> {
    pub layers: &'a Layers,
    /// Which token has which; `None` where none has any.
    pub spans: Option<&'a AdapterSpans>,
}

impl Decoder {
    /// What tells sequences of different lengths apart that rotate the same position differently. What a cache holds of one
    /// is of no use to the other. Most models have one rotation for all lengths.
    pub fn rotation(&self, len: usize) -> Vec<u64> {
        self.config.attention_kinds.iter().filter_map(|kind| kind.rope.variant(len)).collect()
    }

    /// Runs the rows of `parts` and leaves their keys and values in `cache`. `None` when no row asks for logits.
    ///
    /// # Shapes
    /// `[tokens with logits, vocab]` in the compute dtype, in the order of parts, rows and tokens.
    pub fn forward_paged(parts: &[Part<'_>], cache: &mut PagedCache) -> Option<Tensor<2>> {
        let parts: Vec<&Part<'_>> = parts.iter().filter(|part| !part.rows.is_empty()).collect();
        let model = parts.first()?.model;
        let rows: Vec<CachedRow<'_>> = parts.iter().flat_map(|part| &part.rows).copied().collect();
        let inputs = Inputs::new(model, &rows, cache.block_tokens(), 0);
        let models = parts.iter().map(|part| (part.rows.iter().map(|row| row.ids.len()).sum(), part.model)).collect();
        let pass = MixedPass::new(models, &inputs);
        let x = pass.hidden(cache);
        let (wanted, counts) = wanted(parts.iter().copied());
        if wanted.is_empty() {
            return None;
        }
        let len = wanted.len();
        let wanted = Tensor::<1, Int>::from_data(TensorData::new(wanted, [len]), (&x.device(), DType::I32));
        let models = pass.models.iter().zip(counts).filter(|(_, count)| *count > 0);
        let models = models.map(|((_, model), count)| (count, *model)).collect();
        Some(MixedPass::new(models, &inputs).logits(x.select(0, wanted)))
    }
}

/// Indices of the tokens that get logits, and how many each part has.
pub(crate) fn wanted<'a>(parts: impl IntoIterator<Item = &'a Part<'a>>) -> (Vec<i32>, Vec<usize>) {
    let (mut wanted, mut start) = (Vec::new(), 0);
    let counts = parts.into_iter().map(|part| {
        let before = wanted.len();
        for row in &part.rows {
            let end = start + row.ids.len();
            match row.logits {
                RowLogits::None => {}
                RowLogits::Last => wanted.push(end as i32 - 1),
                RowLogits::All => wanted.extend(start as i32..end as i32),
            }
            start = end;
        }
        wanted.len() - before
    });
    let counts = counts.collect();
    (wanted, counts)
}

fn joined<const D: usize>(mut parts: Vec<Tensor<D>>) -> Tensor<D> {
    match parts.len() {
        1 => parts.remove(0),
        _ => Tensor::cat(parts, 0),
    }
}

impl<'a> MixedPass<'a> {
    /// Of models with their numbers of tokens, one after the other.
    pub fn new(models: Vec<(usize, &'a Decoder)>, inputs: &'a Inputs) -> Self {
        let config = &models[0].1.config;
        Self { models, config, inputs, stacked: None }
    }

    /// Of one model, whose own adapter is not looked at: its tokens have those of a stack.
    pub fn stacked(model: &'a Decoder, tokens: usize, inputs: &'a Inputs, stacked: Stacked<'a>) -> Self {
        Self { stacked: Some(stacked), ..Self::new(vec![(tokens, model)], inputs) }
    }

    /// Embedding and decoder blocks: `[tokens, hidden]`.
    pub fn hidden(&self, cache: &mut PagedCache) -> Tensor<2> {
        let mut start = 0;
        let embedded = self.models.iter().map(|&(tokens, model)| {
            let (ids, index) = (&self.inputs.ids[start..start + tokens], self.inputs.index.clone());
            let index = index.narrow(0, start, tokens);
            start += tokens;
            model.embed_on_device(ids, index, Pass::INFERENCE)
        });
        let x = joined(embedded.collect());
        let last = self.models[0].1.blocks.len();
        let Some(mut h) = (last > 0).then(|| normalised(self.input_norms(0), x.clone(), RmsNorm::forward)) else {
            return x;
        };
        let mut x = x;
        for index in 0..last {
            let _span = tracing::trace_span!("block", index).entered();
            h = self.models[0].1.blocks[index].enter(h, Pass::INFERENCE);
            let mlp_input = self.norms(|model| model.blocks[index].norms.mlp_input.as_ref());
            let attended = self.attention(index, h, cache);
            let [m, input] = add_norm(mlp_input, x, attended);
            let output = self.feed_forward(index, input);
            if index + 1 == last {
                return m + output;
            }
            [x, h] = add_norm(self.input_norms(index + 1), m, output);
        }
        x
    }

    /// The norms before a block's attention.
    fn input_norms(&self, index: usize) -> Option<Norms<'a>> {
        self.norms(|model| model.blocks[index].norms.attention_input.as_ref())
    }

    /// The norms that the models of a family have somewhere.
    fn norms(&self, pick: impl Fn(&'a Decoder) -> Option<&'a Named<RmsNorm>>) -> Option<Norms<'a>> {
        self.each_some(|model| Some(&pick(model)?.module))
    }

    /// What each part's model holds somewhere, with the part's number of tokens.
    fn each<T>(&self, pick: impl Fn(&'a Decoder) -> T) -> Vec<(usize, T)> {
        self.models.iter().map(|&(tokens, model)| (tokens, pick(model))).collect()
    }

    /// [`each`](Self::each) of what only some models have; `None` when one lacks it.
    fn each_some<T>(&self, pick: impl Fn(&'a Decoder) -> Option<T>) -> Option<Vec<(usize, T)>> {
        self.models.iter().map(|&(tokens, model)| Some((tokens, pick(model)?))).collect()
    }

    /// Linear layers that share an input, over all rows.
    fn linears(&self, x: Tensor<2>, pick: impl Fn(&'a Decoder) -> Vec<&'a LoraLinear>) -> Vec<Tensor<2>> {
        let layers = pick(self.models[0].1);
        let bare =
            |model| pick(model).iter().zip(&layers).all(|(own, first)| own.is_bare() && own.base.is_same(&first.base));
        if self.stacked.is_none() && !self.models.iter().all(|(_, model)| bare(model)) {
            let mixed = |i: usize| forward_mixed(&self.each(|model| pick(model)[i]), x.clone());
            return (0..layers.len()).map(mixed).collect();
        }
        let stack = |layer: &LoraLinear| self.stacked?.layers.get(&layer.base.id());
        let layers: Vec<JoinedLayer<'_>> =
            layers.into_iter().map(|layer| JoinedLayer { layer, stack: stack(layer) }).collect();
        let spans = self.stacked.and_then(|stacked| stacked.spans);
        if let Some(outputs) = forward_joined(&x, &layers, spans) {
            return outputs;
        }
        let adapted = spans.filter(|_| layers.iter().any(|each| each.stack.is_some()));
        if let Some(outputs) = adapted.and_then(|spans| forward_stacked(&x, &layers, spans)) {
            return outputs;
        }
        assert!(adapted.is_none(), "a stacked layer of {:?} has no kernel", layers[0].layer.base.shape());
        let alone = |each: &JoinedLayer<'_>| match forward_joined(&x, &[*each], None) {
            Some(mut outputs) => outputs.remove(0),
            None => each.layer.forward_bare(x.clone()),
        };
        layers.iter().map(alone).collect()
    }

    /// The attention of a block, for its normalised input.
    fn attention(&self, index: usize, h: Tensor<2>, cache: &mut PagedCache) -> Tensor<2> {
        let config = self.config;
        let block = |model: &'a Decoder| &model.blocks[index];
        match &block(self.models[0].1).recurrence {
            Some(Recurrence::Delta(delta)) => return self.linear_attention(delta, index, h, cache),
            Some(Recurrence::Conv(conv)) => return self.short_conv(conv, index, h, cache),
            None => {}
        }
        if let Some(sizes) = &config.latent {
            let mixed = self.latent_attention(sizes, index, h, cache);
            return self.project_output(index, mixed);
        }
        let kind = block(self.models[0].1).kind;
        let (attention_kind, [cos, sin]) = (&config.attention_kinds[kind], &self.inputs.rotary[kind]);
        let mut qkv = self.linears(h, |model| block(model).qkv());
        let [q, k, v] = match qkv.len() {
            3 => std::array::from_fn(|_| qkv.remove(0)),
            _ => split_qkv(qkv.remove(0), config),
        };
        let (q, gate) = split_gate(q, config);
        let [tokens, _] = q.dims();
        let rope = &attention_kind.rope;
        let rotation = Rotation { len: tokens, head_dim: config.head_dim, rotary: rope.turned, inverse: false };
        let tables = || [cos, sin].map(|table| table.clone().reshape([tokens, rope.turned / 2]));
        let heads = |x: Tensor<2>, heads: usize| x.reshape([tokens, heads, config.head_dim]);
        let head_norm = |x: Tensor<2>, i: usize| {
            normalised(self.norms(|model| Some(&block(model).norms.qk.as_ref()?[i])), x, RmsNorm::forward_heads)
        };
        let rotated_first = config.normalises_rotated();
        let (q, k) = match rotated_first {
            true => (q, k),
            false => (head_norm(q, 0), head_norm(k, 1)),
        };
        let [q, k] = [q, k].map(|x| rope.paired(x, config.head_dim));
        let q = match &self.inputs.query_growth[kind] {
            Some(factors) => {
                let factors = factors.clone().reshape([tokens, 1]).cast(q.dtype());
                q * factors
            }
            None => q,
        };
        let softcap = config.score_softcap.map(|cap| cap as f32);
        let options = AttentionOptions::new(config.score_scale as f32, attention_kind.window, softcap)
            .with_sinks(block(self.models[0].1).sinks.clone());
        let mixed = match self.inputs.is_paged() && !rotated_first {
            true => {
                let new = NewTokens { q, k, v };
                let (q, cached) = cache.rotate_and_write(index, new, tables(), &self.inputs.batch, rotation);
                self.inputs.attend(heads(q, config.num_attention_heads), None, cached, &options)
            }
            false => {
                let rotated = |x: Tensor<2>, i: usize| {
                    let [cos, sin] = tables();
                    let x = if rope.dim == 0 { x } else { rotate(x, cos, sin, rotation) };
                    if rotated_first { head_norm(x, i) } else { x }
                };
                let q = heads(rotated(q, 0), config.num_attention_heads);
                let new = [rotated(k, 1), v].map(|x| heads(x, config.num_key_value_heads));
                let cached = cache.write(index, new.clone(), &self.inputs.batch);
                self.inputs.attend(q, Some(new), cached, &options)
            }
        };
        let mixed = mixed.reshape([tokens, config.num_attention_heads * config.head_dim]);
        let mixed = match gate {
            Some(gate) => gated(gate, mixed, Activation::Sigmoid),
            None => mixed,
        };
        self.project_output(index, mixed)
    }

    /// The end of a block's attention.
    fn project_output(&self, index: usize, mixed: Tensor<2>) -> Tensor<2> {
        let block = |model: &'a Decoder| &model.blocks[index];
        let output = self.linears(mixed, |model| vec![&block(model).output.module]).remove(0);
        let norms = self.norms(|model| block(model).norms.attention_output.as_ref());
        scaled(normalised(norms, output, RmsNorm::forward), self.config)
    }

    /// Runs each part's rows by themselves.
    fn by_part(&self, x: Tensor<2>, run: impl Fn(&'a Decoder, Tensor<2>) -> Tensor<2>) -> Tensor<2> {
        by_part(&self.models, x, run)
    }
}
