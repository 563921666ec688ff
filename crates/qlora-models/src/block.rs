//! One decoder block: attention, full or linear, or a short convolution, and an MLP or experts, each over a normalised input and added to it.

use crate::config::{BlockNorms, LatentConfig, ModelConfig};
use crate::delta_net::DeltaNet;
use crate::latent;
use crate::mlp::Mlp;
use crate::moe::Moe;
use crate::named::Named;
use crate::norm::RmsNorm;
use crate::sequence::Sequence;
use crate::short_conv::ShortConv;
use burn::tensor::Tensor;
use qlora_layers::activation_checkpointing::{Purpose, ResidualBlock};
use qlora_layers::ops::fused::{Activation, gated, rotate};
use qlora_layers::ops::{Sinks, attention, attention_again, attention_keeping};
use qlora_layers::streamed::BlockHome;
use qlora_layers::{LoraAdapter, LoraLinear, Pass};

/// What follows attention.
#[derive(Clone, Debug)]
pub(crate) enum FeedForward {
    Dense(Box<Mlp>),
    Experts(Box<Moe>),
}

impl FeedForward {
    /// With `gradients_only` the result may be uninitialised; see [`LoraLinear::record`].
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    pub fn forward(&self, x: Tensor<2>, pass: Pass, gradients_only: bool) -> Tensor<2> {
        match self {
            Self::Dense(mlp) => mlp.forward(x, pass, gradients_only),
            Self::Experts(moe) => moe.forward(x, pass, gradients_only),
        }
    }
}

/// What a block has in the place of attention: a sequence leaves a state of one size behind, whatever its length.
#[derive(Clone, Debug)]
pub(crate) enum Recurrence {
    Delta(Box<DeltaNet>),
    Conv(Box<ShortConv>),
}

/// One decoder block; its linear layers carry the adapters.
#[derive(Clone, Debug)]
pub struct Block {
    pub(crate) index: usize,
    /// Index into [`ModelConfig::attention_kinds`].
    pub(crate) kind: usize,
    /// Queries, keys and values, or one projection whose output holds all three in this order. Of what is in the place of
    /// attention [`ModelConfig::qkv_specs`] has them.
    pub(crate) qkv: Vec<Named<LoraLinear>>,
    /// What is in the place of attention, if something is.
    pub(crate) recurrence: Option<Recurrence>,
    /// Logits of the query heads that join their softmax.
    pub(crate) sinks: Option<Sinks>,
    pub(crate) output: Named<LoraLinear>,
    pub(crate) feed_forward: FeedForward,
    pub(crate) norms: BlockNorms<Named<RmsNorm>>,
    /// Where the frozen weights are, unless the device has them all the time.
    pub(crate) home: Option<BlockHome>,
}

impl Block {
    /// Index of the block, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The linear layers with their paths in the model.
    pub fn linears(&self) -> impl Iterator<Item = (String, &LoraLinear)> {
        self.named_linears().map(Named::pair)
    }

    /// [`linears`](Self::linears), their paths not copied.
    pub(crate) fn named_linears(&self) -> impl Iterator<Item = &Named<LoraLinear>> {
        let (mlp, experts) = match &self.feed_forward {
            FeedForward::Dense(mlp) => (Some(mlp.linears()), None),
            FeedForward::Experts(moe) => (None, Some(moe.linears())),
        };
        let attention = self.qkv.iter().chain([&self.output]);
        attention.chain(mlp.into_iter().flatten()).chain(experts.into_iter().flatten())
    }

    /// The linear layers with their paths in the model.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = (String, &mut LoraLinear)> {
        self.parts_mut().0.map(|(path, linear)| {
            linear.adapter.iter_mut().for_each(LoraAdapter::forget_norms);
            (path, linear)
        })
    }

    /// The norms with their paths in the model.
    pub fn norms(&self) -> impl Iterator<Item = (String, &RmsNorm)> {
        self.norms.as_ref().into_iter().map(Named::pair)
    }

    /// The norms with their paths in the model.
    pub fn norms_mut(&mut self) -> impl Iterator<Item = (String, &mut RmsNorm)> {
        self.parts_mut().1
    }

    /// Linear layers and norms at once, with their paths in the model.
    pub(crate) fn parts_mut(
        &mut self,
    ) -> (impl Iterator<Item = (String, &mut LoraLinear)>, impl Iterator<Item = (String, &mut RmsNorm)>) {
        let Self { qkv, output, feed_forward, norms, .. } = self;
        let (mlp, experts) = match feed_forward {
            FeedForward::Dense(mlp) => (Some(mlp.linears_mut()), None),
            FeedForward::Experts(moe) => (None, Some(moe.linears_mut())),
        };
        let attention = qkv.iter_mut().chain([output]);
        let linears = attention.chain(mlp.into_iter().flatten()).chain(experts.into_iter().flatten());
        (linears.map(Named::pair_mut), norms.as_mut().into_iter().map(Named::pair_mut))
    }

    /// # Shapes
    /// `[rows * len, hidden]` in and out.
    fn feed_forward_branch(&self, x: Tensor<2>, config: &ModelConfig, pass: Pass, purpose: Purpose<'_>) -> Tensor<2> {
        let h = input(&self.norms.mlp_input, x, pass);
        let run = |gradients_only| self.feed_forward.forward(h, pass, gradients_only);
        scaled(normalised(&self.norms.mlp_output, run, pass, purpose.gradients_only()), config)
    }

    /// # Shapes
    /// `[rows * len, hidden]` in and out.
    fn attention_branch(
        &self,
        x: Tensor<2>,
        config: &ModelConfig,
        sequence: &Sequence,
        pass: Pass,
        purpose: Purpose<'_>,
    ) -> Tensor<2> {
        let &Sequence { rows, len, .. } = sequence;
        let h = input(&self.norms.attention_input, x, pass);
        if let Some(recurrence) = &self.recurrence {
            let mixed = match recurrence {
                Recurrence::Delta(delta) => self.linear_attention(delta, h, sequence, pass),
                Recurrence::Conv(conv) => conv.forward(self.qkv[0].module.forward_in(h, pass), sequence),
            };
            return self.project_output(mixed, config, pass, purpose.gradients_only());
        }
        let (view, rope) = (&sequence.views[self.kind], &config.attention_kinds[self.kind].rope);
        let rotated = |x: Tensor<2>| match rope.dim {
            0 => x,
            _ => rotate(rope.paired(x, view.rotation.head_dim), view.cos.clone(), view.sin.clone(), view.rotation),
        };
        let ([q, k, v], gate) = match &config.latent {
            Some(sizes) => (self.latent_heads(h, sizes, config.num_attention_heads, rotated, pass), None),
            None => self.project(h, config, pass),
        };
        let (q, k) = match &self.norms.qk {
            // Rotated in part already.
            None if config.latent.is_some() => (q, k),
            Some([q_norm, k_norm]) => {
                let each = |x: Tensor<2>, norm: &Named<RmsNorm>| match config.normalises_rotated() {
                    true => norm.module.forward_heads(rotated(x), pass),
                    false => rotated(norm.module.forward_heads(x, pass)),
                };
                (each(q, q_norm), each(k, k_norm))
            }
            None => (rotated(q), rotated(k)),
        };
        let q = match &view.query_growth {
            Some(factors) => {
                let [tokens, width] = q.dims();
                let factors = factors.clone().reshape([1, len, 1]).cast(q.dtype());
                (q.reshape([rows, len, width]) * factors).reshape([tokens, width])
            }
            None => q,
        };
        let heads = |x: Tensor<2>, heads: usize| x.reshape([rows, len, heads, config.head_dim]);
        let (q, k) = (heads(q, config.num_attention_heads), heads(k, config.num_key_value_heads));
        let v = heads(v, config.num_key_value_heads);
        let gradients_only = purpose.gradients_only();
        let options = &view.attention.clone().with_sinks(self.sinks.clone());
        let mixed = match purpose {
            Purpose::Result | Purpose::Gradients(None) => attention(q, k, v, options),
            Purpose::Keep(kept) => {
                let (mixed, result) = attention_keeping(q, k, v, options);
                *kept = Some(result);
                mixed
            }
            Purpose::Gradients(Some(result)) => attention_again(q, k, v, result, options),
        };
        let mixed = mixed.reshape([rows * len, config.num_attention_heads, config.head_dim]);
        let mixed = latent::values(mixed, config.value_dim());
        let mixed = match gate {
            Some(gate) => gated(gate, mixed, Activation::Sigmoid),
            None => mixed,
        };
        self.project_output(mixed, config, pass, gradients_only)
    }

    /// The end of the attention branch.
    fn project_output(&self, mixed: Tensor<2>, config: &ModelConfig, pass: Pass, gradients_only: bool) -> Tensor<2> {
        let output = &self.output.module;
        let run = |gradients_only| match gradients_only {
            true => output.record(mixed, pass),
            false => output.forward_in(mixed, pass),
        };
        scaled(normalised(&self.norms.attention_output, run, pass, gradients_only), config)
    }

    /// Queries, keys and values of latent attention, each `[tokens, heads * head_dim]`, rotated.
    fn latent_heads(
        &self,
        h: Tensor<2>,
        sizes: &LatentConfig,
        heads: usize,
        rotated: impl Fn(Tensor<2>) -> Tensor<2>,
        pass: Pass,
    ) -> [Tensor<2>; 3] {
        let project = |i: usize, x: Tensor<2>| self.qkv[i].module.forward_in(x, pass);
        let between = |norm: &Option<Named<RmsNorm>>, x: Tensor<2>| match norm {
            Some(norm) => norm.module.forward(x, pass),
            None => x,
        };
        let down = self.qkv.len() - 2;
        let q = project(0, h.clone());
        let q = match sizes.query_rank {
            Some(_) => project(1, between(&self.norms.latent_queries, q)),
            None => q,
        };
        let [vector, rotary] = latent::split(project(down, h), sizes);
        let both = project(down + 1, between(&self.norms.latent_keys, vector));
        let [k, v] = latent::keys_and_values(both, rotated(rotary), sizes, heads);
        [latent::queries(q, sizes, heads, rotated), k, v]
    }

    /// Linear attention up to the output projection, `[tokens, heads * value_dim]`.
    fn linear_attention(&self, delta: &DeltaNet, h: Tensor<2>, sequence: &Sequence, pass: Pass) -> Tensor<2> {
        let outputs = self.qkv.iter().map(|layer| layer.module.forward_in(h.clone(), pass)).collect();
        let [qkv, z, b, a] = delta.split(outputs);
        let out = delta.forward(qkv, [b, a], sequence);
        match &self.norms.linear {
            Some(norm) => delta.gated(out, z, &norm.module, pass),
            None => out,
        }
    }

    /// The projections of queries, keys and values, or the one that holds them all.
    pub(crate) fn qkv(&self) -> Vec<&LoraLinear> {
        self.qkv.iter().map(|layer| &layer.module).collect()
    }

    /// The first projections of a dense MLP.
    pub(crate) fn gate_up(&self) -> Vec<&LoraLinear> {
        match &self.feed_forward {
            FeedForward::Dense(mlp) => mlp.gate_up.iter().map(|layer| &layer.module).collect(),
            FeedForward::Experts(_) => Vec::new(),
        }
    }

    /// The last projection of a dense MLP.
    pub(crate) fn down(&self) -> Vec<&LoraLinear> {
        match &self.feed_forward {
            FeedForward::Dense(mlp) => vec![&mlp.down.module],
            FeedForward::Experts(_) => Vec::new(),
        }
    }

    /// Queries, keys and values, each `[tokens, heads * head_dim]`, and the gate of what attention gives, as queries.
    fn project(&self, h: Tensor<2>, config: &ModelConfig, pass: Pass) -> ([Tensor<2>; 3], Option<Tensor<2>>) {
        let [q, k, v] = match &self.qkv[..] {
            [q, k, v] => [
                q.module.forward_in(h.clone(), pass),
                k.module.forward_in(h.clone(), pass),
                v.module.forward_in(h, pass),
            ],
            fused => split_qkv(fused[0].module.forward_in(h, pass), config),
        };
        let (q, gate) = split_gate(q, config);
        ([q, k, v], gate)
    }
}

/// Queries and the gate of what attention gives, where the family has one: a projection gives both for each head.
pub(crate) fn split_gate(q: Tensor<2>, config: &ModelConfig) -> (Tensor<2>, Option<Tensor<2>>) {
    if !config.family.attention_gate {
        return (q, None);
    }
    let (tokens, width) = (q.dims()[0], config.head_dim);
    let both = q.reshape([tokens, config.num_attention_heads, 2 * width]);
    let half = |start| both.clone().narrow(2, start, width).reshape([tokens, config.num_attention_heads * width]);
    (half(0), Some(half(width)))
}

/// Queries, keys and values out of one projection's `[tokens, ..]`, which holds them in this order.
pub(crate) fn split_qkv(all: Tensor<2>, config: &ModelConfig) -> [Tensor<2>; 3] {
    let [q, k, v] = config.qkv_widths();
    [all.clone().narrow(1, 0, q), all.clone().narrow(1, q, k), all.narrow(1, q + k, v)]
}

/// What a branch reads. Without a norm it is the residual stream, as one node of the graph: the gradients of what reads it are summed
/// before they meet the residual's, in the same order whether a block is differentiated whole or branch by branch.
fn input(norm: &Option<Named<RmsNorm>>, x: Tensor<2>, pass: Pass) -> Tensor<2> {
    match norm {
        Some(norm) => norm.module.forward(x, pass),
        None => {
            let [tokens, width] = x.dims();
            x.reshape([1, tokens, width]).reshape([tokens, width])
        }
    }
}

/// What a branch adds to the residual stream.
pub(crate) fn scaled(x: Tensor<2>, config: &ModelConfig) -> Tensor<2> {
    match config.residual_scale {
        Some(scale) => x.mul_scalar(scale),
        None => x,
    }
}

/// What `run` gives, normalised where the family does so. `run` is told whether only its gradients are
/// needed; its output is needed whenever a norm follows.
fn normalised(
    norm: &Option<Named<RmsNorm>>,
    run: impl FnOnce(bool) -> Tensor<2>,
    pass: Pass,
    gradients_only: bool,
) -> Tensor<2> {
    match norm {
        Some(norm) => norm.module.forward(run(false), pass),
        None => run(gradients_only),
    }
}

/// A block with what its pass shares with the others.
#[derive(Clone, Copy, Debug)]
pub struct BlockInPass<'a> {
    /// The block.
    pub block: &'a Block,
    pub(crate) config: &'a ModelConfig,
    pub(crate) sequence: &'a Sequence,
}

impl ResidualBlock for BlockInPass<'_> {
    fn home(&self) -> Option<&BlockHome> {
        self.block.home.as_ref()
    }

    fn attention(&self, x: Tensor<2>, pass: Pass, purpose: Purpose<'_>) -> Tensor<2> {
        self.block.attention_branch(x, self.config, self.sequence, pass, purpose)
    }

    fn feed_forward(&self, x: Tensor<2>, pass: Pass, purpose: Purpose<'_>) -> Tensor<2> {
        self.block.feed_forward_branch(x, self.config, pass, purpose)
    }
}
