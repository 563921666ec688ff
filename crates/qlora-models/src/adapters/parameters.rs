//! What is trained: every tensor of an adapter by name, in a fixed order.
//!
//! The order is embedding, blocks (linear layers, then norms), last norm, output head. Names are the module's path and
//! the part's name, such as `model.layers.0.self_attn.q_proj.lora_a`.

use super::{EMBED, NORM};
use crate::decoder::{Block, Decoder, RmsNorm};
use burn::tensor::Tensor;
use qlora_layers::track;

/// Names and tensors.
type Named<'a> = Vec<(String, &'a Tensor<2>)>;
type NamedMut<'a> = Vec<(String, &'a mut Tensor<2>)>;

fn named<'a>(path: &str, parts: Vec<(&'static str, &'a Tensor<2>)>) -> Named<'a> {
    parts.into_iter().map(|(part, tensor)| (format!("{path}.{part}"), tensor)).collect()
}

fn named_mut<'a>(path: &str, parts: Vec<(&'static str, &'a mut Tensor<2>)>) -> NamedMut<'a> {
    parts.into_iter().map(|(part, tensor)| (format!("{path}.{part}"), tensor)).collect()
}

impl Block {
    /// What is trained in this block.
    pub fn parameters(&self) -> Named<'_> {
        let linears = self.linears().flat_map(|(path, linear)| named(&path, linear.parameters()));
        let norms = self.norms().filter_map(|(path, norm)| Some((format!("{path}.weight"), norm.trained.as_ref()?)));
        linears.chain(norms).collect()
    }

    fn parameters_mut(&mut self) -> NamedMut<'_> {
        // Linear layers and norms are fields of their own; two passes over one borrow would not show it.
        let (linears, norms) = self.parts_mut();
        let linears = linears.flat_map(|(path, linear)| named_mut(&path, linear.parameters_mut()));
        let norms = norms.filter_map(|(path, norm)| Some((format!("{path}.weight"), norm.trained.as_mut()?)));
        linears.chain(norms).collect()
    }
}

impl Decoder {
    /// What is trained before the first block.
    pub fn embedding_parameters(&self) -> Named<'_> {
        let lora = self.embedding.lora.as_ref().map_or(Vec::new(), |lora| lora.parameters());
        let whole = self.embedding.whole.iter().map(|whole| ("weight", whole));
        named(EMBED, lora.into_iter().chain(whole).collect())
    }

    /// What is trained after the last block.
    pub fn head_parameters(&self) -> Named<'_> {
        let norm = self.norm.trained.iter().map(|trained| (format!("{NORM}.weight"), trained));
        let head = self.lm_head.iter().flat_map(|head| named(super::HEAD, head.parameters()));
        norm.chain(head).collect()
    }

    /// Everything that is trained.
    pub fn parameters(&self) -> Named<'_> {
        let blocks = self.blocks.iter().flat_map(Block::parameters);
        self.embedding_parameters().into_iter().chain(blocks).chain(self.head_parameters()).collect()
    }

    /// Everything that is trained. Whoever changes a tensor calls [`track`](Self::track) or
    /// [`settle`](Self::settle) after.
    pub fn parameters_mut(&mut self) -> NamedMut<'_> {
        let lora = self.embedding.lora.as_mut().map_or(Vec::new(), |lora| lora.parameters_mut());
        let whole = self.embedding.whole.iter_mut().map(|whole| ("weight", whole));
        let mut found = named_mut(EMBED, lora.into_iter().chain(whole).collect());
        found.extend(self.blocks.iter_mut().flat_map(Block::parameters_mut));
        found.extend(self.norm.trained.iter_mut().map(|trained| (format!("{NORM}.weight"), trained)));
        found.extend(self.lm_head.iter_mut().flat_map(|head| named_mut(super::HEAD, head.parameters_mut())));
        found
    }

    /// Number of trainable values.
    pub fn num_trainable(&self) -> usize {
        self.parameters().iter().map(|(_, parameter)| parameter.shape().num_elements()).sum()
    }

    /// Starts recording: everything that is trained becomes a leaf of the autodiff graph.
    pub fn track(&mut self) {
        self.linears_mut().for_each(|(_, linear)| linear.track());
        self.norms_mut().filter_map(|(_, norm)| norm.trained.as_mut()).for_each(track);
        if let Some(lora) = &mut self.embedding.lora {
            lora.track();
        }
        self.embedding.whole.iter_mut().for_each(track);
    }

    /// Computes what stays the same while nothing is trained, for faster inference.
    pub fn settle(&mut self) {
        self.linears_mut().for_each(|(_, linear)| linear.settle());
        if let Some(lora) = &mut self.embedding.lora {
            lora.settle(&self.embed_tokens);
        }
    }

    /// Every norm with its path, first block first.
    pub(crate) fn norms(&self) -> impl Iterator<Item = (String, &RmsNorm)> {
        self.blocks.iter().flat_map(Block::norms).chain([(NORM.to_string(), &self.norm)])
    }

    /// Every norm with its path, first block first.
    pub(crate) fn norms_mut(&mut self) -> impl Iterator<Item = (String, &mut RmsNorm)> {
        self.blocks.iter_mut().flat_map(Block::norms_mut).chain([(NORM.to_string(), &mut self.norm)])
    }
}
