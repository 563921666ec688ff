//! Latent attention of a pass. The cache holds what keys and values of all heads are made of, one vector a token, with what is
//! rotated of keys behind it: 576 numbers in DeepSeek V3, where keys and values have 49,152.
//!
//! Tokens attend to the vectors themselves. Where a row has so many new tokens that its attention runs by itself on tensor cores, keys
//! and values of the whole row are made first: attention does a third of the work then.

use super::{MixedPass, PagedCache, Segment, SegmentRows, joined, taken};
use crate::config::LatentConfig;
use crate::decoder::Decoder;
use crate::latent;
use crate::norm::{RmsNorm, normalised};
use burn::tensor::{FloatDType, Tensor};
use qlora_layers::ops::fused::{Rotation, rotate};
use qlora_layers::ops::{AttentionOptions, PagedBatch, attention, matmul, paged_attention, paged_write};
use qlora_layers::{LoraLinear, Pass, by_part};

impl<'a> MixedPass<'a> {
    /// The latent attention of a block up to its output projection, for its normalised input.
    ///
    /// # Shapes
    /// `[tokens, hidden]` to `[tokens, heads * value_dim]`.
    pub(super) fn latent_attention(
        &self,
        sizes: &LatentConfig,
        index: usize,
        h: Tensor<2>,
        cache: &mut PagedCache,
    ) -> Tensor<2> {
        let (config, block) = (self.config, |model: &'a Decoder| &model.blocks[index]);
        let first = block(self.models[0].1);
        let (tokens, kind, down) = (h.dims()[0], first.kind, first.qkv.len() - 2);
        let (rope, [cos, sin]) = (&config.attention_kinds[kind].rope, &self.inputs.rotary[kind]);
        let rotation = Rotation { len: tokens, head_dim: sizes.rotary_dim, rotary: rope.turned, inverse: false };
        let rotated = |x: Tensor<2>| {
            let [cos, sin] = [cos, sin].map(|table| table.clone().reshape([tokens, rope.turned / 2]));
            rotate(rope.paired(x, sizes.rotary_dim), cos, sin, rotation)
        };
        let layers = |wanted: &[usize]| {
            let wanted = wanted.to_vec();
            move |model: &'a Decoder| {
                let all = block(model).qkv();
                wanted.iter().map(|i| all[*i]).collect()
            }
        };
        let mut inputs = self.linears(h, layers(&[0, down]));
        let [q, both] = [(); 2].map(|()| inputs.remove(0));
        let q = match sizes.query_rank {
            Some(_) => {
                let norms = self.norms(|model| block(model).norms.latent_queries.as_ref());
                self.linears(normalised(norms, q, RmsNorm::forward), layers(&[1])).remove(0)
            }
            None => q,
        };
        let [vector, rotary] = latent::split(both, sizes);
        let norms = self.norms(|model| block(model).norms.latent_keys.as_ref());
        let new = Tensor::cat(vec![normalised(norms, vector, RmsNorm::forward), rotated(rotary)], 1);
        let parts = latent::query_parts(q, sizes, config.num_attention_heads, rotated);
        let softcap = config.score_softcap.map(|cap| cap as f32);
        let options = AttentionOptions::new(config.score_scale as f32, config.attention_kinds[kind].window, softcap);
        let cached = cache.write_latent(index, new.clone(), &self.inputs.batch);
        let of_segment = |segment: &Segment| {
            let (first, tokens) = (segment.first, segment.tokens);
            let queries = parts.each_ref().map(|part| part.clone().narrow(0, first, tokens));
            let attend = Attend { sizes, heads: config.num_attention_heads, options: &options };
            let up = self.of_tokens(first, tokens, |model| block(model).qkv()[down + 1]);
            match &segment.rows {
                SegmentRows::Every => attend.absorbed(&up, queries, cached, &self.inputs.batch),
                SegmentRows::Paged(batch) => attend.absorbed(&up, queries, cached, batch),
                SegmentRows::Long(slots) => {
                    let both = match slots {
                        Some(slots) => cached.clone().select(0, slots.clone()).squeeze_dim(1),
                        None => new.clone().narrow(0, first, tokens),
                    };
                    attend.expanded(up[0].1, queries, both)
                }
            }
        };
        joined(self.inputs.segments.iter().map(of_segment).collect())
    }

    /// What the models of some tokens hold somewhere, with the number of tokens of each.
    fn of_tokens<T>(&self, first: usize, tokens: usize, pick: impl Fn(&'a Decoder) -> T) -> Vec<(usize, T)> {
        let mut start = 0;
        let parts = self.models.iter().filter_map(|&(count, model)| {
            let (from, to) = (start.max(first), (start + count).min(first + tokens));
            start += count;
            (from < to).then(|| (to - from, pick(model)))
        });
        parts.collect()
    }
}

impl PagedCache {
    /// Writes what the new tokens' keys and values of a decoder block are made of, and returns that of all tokens.
    fn write_latent(&mut self, layer: usize, new: Tensor<2>, batch: &PagedBatch) -> &Tensor<3> {
        let [latents, _] = &mut self.layers[layer];
        *latents = paged_write(taken(latents), new.unsqueeze_dim(1), batch);
        latents
    }
}

/// The attention of some tokens over what the cache holds.
struct Attend<'a> {
    sizes: &'a LatentConfig,
    heads: usize,
    options: &'a AttentionOptions,
}

impl Attend<'_> {
    /// Attention as if one head of keys, the cached vectors, were that of all queries. A score is `q · W c = Wᵀ q · c`, so that the
    /// projection of keys goes to the queries, and that of values to what comes out: nothing is made of the cached tokens.
    ///
    /// # Shapes
    /// `[tokens, heads, plain_dim]` and `[tokens, heads, rotary_dim]` to `[tokens, heads * value_dim]`
    fn absorbed(
        &self,
        up: &[(usize, &LoraLinear)],
        [plain, rotary]: [Tensor<3>; 2],
        cached: &Tensor<3>,
        batch: &PagedBatch,
    ) -> Tensor<2> {
        let &Self { sizes: &LatentConfig { rank, plain_dim, value_dim, .. }, heads, options } = self;
        let (tokens, dtype) = (plain.dims()[0], FloatDType::from(plain.dtype()));
        let layers: Vec<_> = up
            .iter()
            .map(|(tokens, layer)| {
                let (weight, bias) = layer.effective(dtype);
                let weight = weight.reshape([heads, plain_dim + value_dim, rank]);
                // A bias of keys adds the same to all scores of a query, which the softmax does not see.
                let bias =
                    bias.map(|bias| bias.reshape([1, heads, plain_dim + value_dim]).narrow(2, plain_dim, value_dim));
                (*tokens, (weight, bias))
            })
            .collect();
        let layers: Vec<_> = layers.iter().map(|(tokens, layer)| (*tokens, layer)).collect();
        let q = by_part(&layers, plain.reshape([tokens, heads * plain_dim]), |(weight, _), q| {
            let tokens = q.dims()[0];
            let q = q.reshape([tokens, heads, plain_dim]).swap_dims(0, 1);
            matmul(q, weight.clone().narrow(1, 0, plain_dim)).swap_dims(0, 1).reshape([tokens, heads * rank])
        });
        let q = Tensor::cat(vec![q.reshape([tokens, heads, rank]), rotary], 2);
        // The values are the vectors: what comes out for what is rotated is not looked at.
        let mixed = paged_attention(q, cached, cached, batch, options).narrow(2, 0, rank);
        by_part(&layers, mixed.reshape([tokens, heads * rank]), |(weight, bias), mixed| {
            let tokens = mixed.dims()[0];
            let mixed = mixed.reshape([tokens, heads, rank]).swap_dims(0, 1);
            let weight = weight.clone().narrow(1, plain_dim, value_dim).swap_dims(1, 2);
            let values = matmul(mixed, weight).swap_dims(0, 1);
            let values = match bias {
                Some(bias) => values + bias.clone(),
                None => values,
            };
            values.reshape([tokens, heads * value_dim])
        })
    }

    /// Attention of one row over keys and values that are made of all its tokens' vectors, `[tokens of the row, cached_dim]`.
    fn expanded(&self, up: &LoraLinear, [plain, rotary]: [Tensor<3>; 2], all: Tensor<2>) -> Tensor<2> {
        let &Self { sizes, heads, options } = self;
        let (tokens, head_dim) = (plain.dims()[0], sizes.head_dim());
        let [vectors, keys] = latent::split(all, sizes);
        let both = up.forward_in(vectors, Pass::INFERENCE);
        let row = |x: Tensor<2>| {
            let len = x.dims()[0];
            x.reshape([1, len, heads, head_dim])
        };
        let [k, v] = latent::keys_and_values(both, keys, sizes, heads).map(row);
        let q = row(latent::filled(vec![plain, rotary], head_dim));
        latent::values(attention(q, k, v, options).reshape([tokens, heads, head_dim]), sizes.value_dim)
    }
}
