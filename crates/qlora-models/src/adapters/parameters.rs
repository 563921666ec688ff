//! What is trained: every tensor of an adapter by name, in a fixed order.
//!
//! The order is embedding, what makes the blocks' own inputs, blocks (linear layers, joined experts, norms), last norm, output head. Names are the module's path
//! and the part's name, such as `model.layers.0.self_attn.q_proj.lora_a`.
//!
//! A mixture of experts has thousands of small factors. [`Decoder::join_experts`] makes one tensor of those of all experts of a
//! block, such as `model.layers.0.mlp.experts.gate_proj.lora_a`, and [`Decoder::parted`] gives each expert its own again.

use crate::block::Block;
use crate::decoder::Decoder;
use crate::layer_inputs::{LayerInput, LayerInputs};
use crate::mlp::Mlp;
use crate::moe::Moe;
use crate::named::Named;
use burn::module::Param;
use burn::tensor::Tensor;
use qlora_layers::{TokenRows, track};
use std::borrow::Cow;

/// The part's name of trained rows of single tokens.
pub(super) const TOKEN_ROWS: &str = "trainable_tokens_delta";

/// Names and tensors.
type Parameters<'a> = Vec<(String, &'a Tensor<2>)>;
type ParametersMut<'a> = Vec<(String, &'a mut Param<Tensor<2>>)>;

fn named<'a>(path: &str, parts: Vec<(&'static str, &'a Tensor<2>)>) -> Parameters<'a> {
    parts.into_iter().map(|(part, tensor)| (format!("{path}.{part}"), tensor)).collect()
}

fn named_mut<'a>(path: &str, parts: Vec<(&'static str, &'a mut Param<Tensor<2>>)>) -> ParametersMut<'a> {
    parts.into_iter().map(|(part, tensor)| (format!("{path}.{part}"), tensor)).collect()
}

impl Block {
    /// What is trained in this block.
    pub fn parameters(&self) -> Parameters<'_> {
        let linears = self.named_linears();
        let linears = linears.flat_map(|Named { path, module }| named(path, module.parameters()));
        let norms = self.norms().filter_map(|(path, norm)| Some((format!("{path}.weight"), &**norm.trained.as_ref()?)));
        let experts = self.experts().into_iter().flat_map(Moe::joined_parameters);
        linears.chain(experts).chain(norms).collect()
    }

    fn parameters_mut(&mut self) -> ParametersMut<'_> {
        let Self { qkv, output, feed_forward, beside, layer_input, norms, .. } = self;
        let attention = qkv.iter_mut().chain([output]);
        let (mlp, experts) = feed_forward.parts_mut(beside);
        let (mlp, experts) = (mlp.map(Mlp::linears_mut), experts.map(Moe::parts_mut));
        let (experts, joined) = experts.unzip();
        let own = layer_input.iter_mut().flat_map(LayerInput::linears_mut);
        let linears = attention.chain(mlp.into_iter().flatten()).chain(experts.into_iter().flatten()).chain(own);
        // Paths of the many that have nothing to train are not copied.
        let linears = linears.flat_map(|Named { path, module }| named_mut(path, module.parameters_mut()));
        let norms = norms.as_mut().into_iter().map(Named::pair_mut);
        let norms = norms.filter_map(|(path, norm)| Some((format!("{path}.weight"), norm.trained.as_mut()?)));
        linears.chain(joined.into_iter().flatten()).chain(norms).collect()
    }
}

impl Decoder {
    /// What is trained before the first block. Rows of single tokens of a table that is the output head as well get
    /// gradients from there too.
    pub fn embedding_parameters(&self) -> Parameters<'_> {
        let lora = self.embedding.lora.as_ref().map_or(Vec::new(), |lora| lora.parameters());
        let whole = self.embedding.whole.iter().map(|whole| ("weight", &**whole));
        let tokens = self.embedding.tokens.iter().map(|tokens| (TOKEN_ROWS, &*tokens.rows));
        let mut found = named(&self.config.embed_path(), lora.into_iter().chain(whole).chain(tokens).collect());
        if let Some(inputs) = &self.layer_inputs {
            found.extend(named(&inputs.projection.path, inputs.projection.module.parameters()));
            let (path, norm) = inputs.norm.pair();
            found.extend(norm.trained.iter().map(|trained| (format!("{path}.weight"), &**trained)));
        }
        found
    }

    /// What is trained after the last block.
    pub fn head_parameters(&self) -> Parameters<'_> {
        let (path, norm) = self.norm.pair();
        let norm = norm.trained.iter().map(move |trained| (format!("{path}.weight"), &**trained));
        let head = self.lm_head.iter().flat_map(|head| named(self.head_path(), head.parameters()));
        let tokens = self.head_tokens.iter().map(|tokens| (TOKEN_ROWS, &*tokens.rows)).collect();
        norm.chain(head).chain(named(self.head_path(), tokens)).collect()
    }

    /// Everything that is trained.
    pub fn parameters(&self) -> Parameters<'_> {
        let blocks = self.blocks.iter().flat_map(Block::parameters);
        self.embedding_parameters().into_iter().chain(blocks).chain(self.head_parameters()).collect()
    }

    /// Everything that is trained. Whoever changes a tensor calls [`track`](Self::track) or
    /// [`keep_scales`](Self::keep_scales) after.
    pub fn parameters_mut(&mut self) -> ParametersMut<'_> {
        let (embed, head) = (self.config.embed_path(), self.head_path());
        let lora = self.embedding.lora.as_mut().map_or(Vec::new(), |lora| lora.parameters_mut());
        let whole = self.embedding.whole.iter_mut().map(|whole| ("weight", whole));
        let tokens = self.embedding.tokens.iter_mut().map(|tokens| (TOKEN_ROWS, &mut tokens.rows));
        let mut found = named_mut(&embed, lora.into_iter().chain(whole).chain(tokens).collect());
        if let Some(LayerInputs { projection, norm, .. }) = &mut self.layer_inputs {
            found.extend(named_mut(&projection.path, projection.module.parameters_mut()));
            let (path, norm) = norm.pair_mut();
            found.extend(norm.trained.iter_mut().map(|trained| (format!("{path}.weight"), trained)));
        }
        found.extend(self.blocks.iter_mut().flat_map(Block::parameters_mut));
        let (path, norm) = self.norm.pair_mut();
        found.extend(norm.trained.iter_mut().map(|trained| (format!("{path}.weight"), trained)));
        found.extend(self.lm_head.iter_mut().flat_map(|linear| named_mut(head, linear.parameters_mut())));
        let tokens = self.head_tokens.iter_mut().map(|tokens| (TOKEN_ROWS, &mut tokens.rows)).collect();
        found.extend(named_mut(head, tokens));
        found
    }

    /// Number of trainable values.
    pub fn num_trainable(&self) -> usize {
        self.parameters().iter().map(|(_, parameter)| parameter.shape().num_elements()).sum()
    }

    /// Starts recording: everything that is trained becomes a leaf of the autodiff graph.
    pub fn track(&mut self) {
        self.linears_mut().for_each(|(_, linear)| linear.track());
        self.blocks.iter_mut().filter_map(Block::experts_mut).for_each(Moe::track_joined);
        self.norms_mut().filter_map(|(_, norm)| norm.trained.as_mut()).for_each(track);
        if let Some(lora) = &mut self.embedding.lora {
            lora.track();
        }
        self.embedding.whole.iter_mut().for_each(track);
        self.embedding.tokens.iter_mut().chain(&mut self.head_tokens).for_each(TokenRows::track);
    }

    /// Makes the adapters of each block's experts one tensor for each projection and factor, so that all experts train and run as one:
    /// in a few operations whatever their number. Where they can't, a warning says why, and they run one by one.
    ///
    /// The experts' own layers have no adapters then: [`adapters`](Self::adapters) and [`linears`](Self::linears) don't show
    /// them. [`parted`](Self::parted) does, and so does what is exported.
    pub fn join_experts(&mut self) {
        let joined = self.blocks.iter_mut().filter_map(|block| Some((block.index, block.experts_mut()?.join())));
        let mut apart = joined.filter_map(|(block, joined)| Some((block, joined.err()?)));
        if let Some((block, reason)) = apart.next() {
            let more = apart.count();
            tracing::warn!(block, more, "{reason}; they run one by one, which takes far longer");
        }
    }

    /// The model with adapters on each expert's own layers: itself, or a copy that shares what is frozen.
    pub fn parted(&self) -> Cow<'_, Self> {
        if !self.blocks.iter().filter_map(Block::experts).any(Moe::is_joined) {
            return Cow::Borrowed(self);
        }
        let mut model = self.clone();
        model.part_experts();
        Cow::Owned(model)
    }

    /// Gives each expert its own adapters again.
    pub fn part_experts(&mut self) {
        self.blocks.iter_mut().filter_map(Block::experts_mut).for_each(Moe::part);
    }

    /// Computes what stays the same while nothing is trained, DoRA's norms, and keeps it for faster inference.
    pub fn keep_scales(&mut self) {
        self.linears_mut().for_each(|(_, linear)| linear.keep_scale());
        if let Some(lora) = &mut self.embedding.lora {
            lora.keep_scale(&self.embed_tokens);
        }
    }
}
