//! What is trained: every tensor of an adapter by name, in a fixed order.
//!
//! The order is embedding, blocks (linear layers, then norms), last norm, output head. Names are the module's path and
//! the part's name, such as `model.layers.0.self_attn.q_proj.lora_a`.

use crate::block::Block;
use crate::decoder::Decoder;
use burn::module::Param;
use burn::tensor::Tensor;
use qlora_layers::{TokenRows, track};

/// The part's name of trained rows of single tokens.
const TOKEN_ROWS: &str = "trainable_tokens_delta";

/// Names and tensors.
type Named<'a> = Vec<(String, &'a Tensor<2>)>;
type NamedMut<'a> = Vec<(String, &'a mut Param<Tensor<2>>)>;

fn named<'a>(path: &str, parts: Vec<(&'static str, &'a Tensor<2>)>) -> Named<'a> {
    parts.into_iter().map(|(part, tensor)| (format!("{path}.{part}"), tensor)).collect()
}

fn named_mut<'a>(path: &str, parts: Vec<(&'static str, &'a mut Param<Tensor<2>>)>) -> NamedMut<'a> {
    parts.into_iter().map(|(part, tensor)| (format!("{path}.{part}"), tensor)).collect()
}

impl Block {
    /// What is trained in this block.
    pub fn parameters(&self) -> Named<'_> {
        let linears = self.linears().flat_map(|(path, linear)| named(&path, linear.parameters()));
        let norms = self.norms().filter_map(|(path, norm)| Some((format!("{path}.weight"), &**norm.trained.as_ref()?)));
        linears.chain(norms).collect()
    }

    fn parameters_mut(&mut self) -> NamedMut<'_> {
        let (linears, norms) = self.parts_mut();
        let linears = linears.flat_map(|(path, linear)| named_mut(&path, linear.parameters_mut()));
        let norms = norms.filter_map(|(path, norm)| Some((format!("{path}.weight"), norm.trained.as_mut()?)));
        linears.chain(norms).collect()
    }
}

impl Decoder {
    /// What is trained before the first block. Rows of single tokens of a table that is the output head as well get
    /// gradients from there too.
    pub fn embedding_parameters(&self) -> Named<'_> {
        let lora = self.embedding.lora.as_ref().map_or(Vec::new(), |lora| lora.parameters());
        let whole = self.embedding.whole.iter().map(|whole| ("weight", &**whole));
        let tokens = self.embedding.tokens.iter().map(|tokens| (TOKEN_ROWS, &*tokens.rows));
        named(&self.config.embed_path(), lora.into_iter().chain(whole).chain(tokens).collect())
    }

    /// What is trained after the last block.
    pub fn head_parameters(&self) -> Named<'_> {
        let (path, norm) = self.norm.pair();
        let norm = norm.trained.iter().map(move |trained| (format!("{path}.weight"), &**trained));
        let head = self.lm_head.iter().flat_map(|head| named(self.head_path(), head.parameters()));
        let tokens = self.head_tokens.iter().map(|tokens| (TOKEN_ROWS, &*tokens.rows)).collect();
        norm.chain(head).chain(named(self.head_path(), tokens)).collect()
    }

    /// Everything that is trained.
    pub fn parameters(&self) -> Named<'_> {
        let blocks = self.blocks.iter().flat_map(Block::parameters);
        self.embedding_parameters().into_iter().chain(blocks).chain(self.head_parameters()).collect()
    }

    /// Everything that is trained. Whoever changes a tensor calls [`track`](Self::track) or
    /// [`keep_scales`](Self::keep_scales) after.
    pub fn parameters_mut(&mut self) -> NamedMut<'_> {
        let (embed, head) = (self.config.embed_path(), self.head_path());
        let lora = self.embedding.lora.as_mut().map_or(Vec::new(), |lora| lora.parameters_mut());
        let whole = self.embedding.whole.iter_mut().map(|whole| ("weight", whole));
        let tokens = self.embedding.tokens.iter_mut().map(|tokens| (TOKEN_ROWS, &mut tokens.rows));
        let mut found = named_mut(&embed, lora.into_iter().chain(whole).chain(tokens).collect());
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
        self.norms_mut().filter_map(|(_, norm)| norm.trained.as_mut()).for_each(track);
        if let Some(lora) = &mut self.embedding.lora {
            lora.track();
        }
        self.embedding.whole.iter_mut().for_each(track);
        self.embedding.tokens.iter_mut().chain(&mut self.head_tokens).for_each(TokenRows::track);
    }

    /// Computes what stays the same while nothing is trained, DoRA's norms, and keeps it for faster inference.
    pub fn keep_scales(&mut self) {
        self.linears_mut().for_each(|(_, linear)| linear.keep_scale());
        if let Some(lora) = &mut self.embedding.lora {
            lora.keep_scale(&self.embed_tokens);
        }
    }
}
