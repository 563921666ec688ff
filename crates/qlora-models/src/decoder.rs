//! The decoder: embeddings, blocks of attention and MLP with pre-normalisation, and the output head.

use crate::adapters::Embedding;
use crate::attention::{KvCache, attention};
use crate::config::ModelConfig;
use crate::rope;
use burn::tensor::activation::silu;
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use adapter_io::AdapterConfig;
use qlora_layers::ops::matmul;
use qlora_layers::{LoraLinear, Pass};

/// Root mean square normalisation (Zhang and Sennrich, 2019, arXiv 1910.07467), computed in f32 and rounded once.
#[derive(Clone, Debug)]
pub(crate) struct RmsNorm {
    /// `[hidden]`, f32.
    pub(crate) weight: Tensor<1>,
    /// `[1, hidden]`, f32: takes the weight's place while an adapter that trained the norm in full is on.
    pub(crate) trained: Option<Tensor<2>>,
    pub(crate) eps: f64,
}

impl RmsNorm {
    /// # Shapes
    /// `[tokens, hidden]` in and out, dtype kept.
    fn forward(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        let dtype = x.dtype();
        let weight = match &self.trained {
            Some(trained) if pass.tracked => trained.clone(),
            Some(trained) => trained.clone().without_autodiff(),
            None => self.weight.clone().unsqueeze(),
        };
        let x = x.cast(FloatDType::F32);
        let mean_square = x.clone().square().mean_dim(1);
        let normalised = x / mean_square.add_scalar(self.eps).sqrt();
        (normalised * weight).cast(dtype)
    }
}

/// One decoder block; its linear layers carry the adapters.
#[derive(Clone, Debug)]
pub struct Block {
    pub(crate) index: usize,
    pub(crate) input_norm: RmsNorm,
    pub(crate) post_attention_norm: RmsNorm,
    /// In the order of [`LINEARS`].
    pub(crate) linears: [LoraLinear; 7],
}

/// The linear layers of a block, as checkpoints name them, in the order that adapters are numbered.
pub(crate) const LINEARS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// The norms of a block, as checkpoints name them.
const NORMS: [&str; 2] = ["input_layernorm", "post_attention_layernorm"];

impl Block {
    /// Index of the block, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The linear layers with their paths in the model.
    pub fn linears(&self) -> impl Iterator<Item = (String, &LoraLinear)> {
        LINEARS.iter().zip(&self.linears).map(|(name, linear)| (linear_path(self.index, name), linear))
    }

    /// The linear layers with their paths in the model.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = (String, &mut LoraLinear)> {
        let index = self.index;
        LINEARS.iter().zip(&mut self.linears).map(move |(name, linear)| (linear_path(index, name), linear))
    }

    /// The norms with their paths in the model.
    pub(crate) fn norms(&self) -> impl Iterator<Item = (String, &RmsNorm)> {
        let norms = [&self.input_norm, &self.post_attention_norm];
        NORMS.iter().zip(norms).map(|(name, norm)| (linear_path(self.index, name), norm))
    }

    /// The norms with their paths in the model.
    pub(crate) fn norms_mut(&mut self) -> impl Iterator<Item = (String, &mut RmsNorm)> {
        self.parts_mut().1
    }

    /// Linear layers and norms at once, with their paths in the model.
    pub(crate) fn parts_mut(
        &mut self,
    ) -> (impl Iterator<Item = (String, &mut LoraLinear)>, impl Iterator<Item = (String, &mut RmsNorm)>) {
        let Self { index, input_norm, post_attention_norm, linears } = self;
        let index = *index;
        let linears = LINEARS.iter().zip(linears).map(move |(name, linear)| (linear_path(index, name), linear));
        let norms = NORMS.iter().zip([input_norm, post_attention_norm]);
        (linears, norms.map(move |(name, norm)| (linear_path(index, name), norm)))
    }

    /// # Shapes
    /// `[rows * len, hidden]` in and out.
    fn forward(
        &self,
        x: Tensor<2>,
        config: &ModelConfig,
        sequence: &Sequence,
        cache: Option<&mut KvCache>,
        pass: Pass,
    ) -> Tensor<2> {
        let [q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj] = &self.linears;
        let &Sequence { rows, len, .. } = sequence;
        let heads = |x: Tensor<2>, heads: usize| x.reshape([rows, len, heads, config.head_dim]).swap_dims(1, 2);

        let h = self.input_norm.forward(x.clone(), pass);
        let q = heads(q_proj.forward(h.clone(), pass), config.num_attention_heads);
        let k = heads(k_proj.forward(h.clone(), pass), config.num_key_value_heads);
        let v = heads(v_proj.forward(h, pass), config.num_key_value_heads);
        let q = rope::rotate(q, &sequence.cos, &sequence.sin);
        let k = rope::rotate(k, &sequence.cos, &sequence.sin);
        let (k, v) = match cache {
            Some(cache) => cache.extend(self.index, k, v),
            None => (k, v),
        };
        let mixed = attention(q, k, v, sequence.bias.as_ref());
        let mixed = mixed.swap_dims(1, 2).reshape([rows * len, config.num_attention_heads * config.head_dim]);
        let x = x + o_proj.forward(mixed, pass);

        let h = self.post_attention_norm.forward(x.clone(), pass);
        let gated = swiglu(gate_proj.forward(h.clone(), pass), up_proj.forward(h, pass));
        x + down_proj.forward(gated, pass)
    }
}

/// `silu(gate) * up` (Shazeer, 2020, arXiv 2002.05202), computed in f32 and rounded once.
fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    let dtype = gate.dtype();
    (silu(gate.cast(FloatDType::F32)) * up.cast(FloatDType::F32)).cast(dtype)
}

pub(crate) fn linear_path(block: usize, name: &str) -> String {
    format!("model.layers.{block}.{name}")
}

/// What all blocks of one forward pass share: the batch's shape, rotary tables and causal bias.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// Rows of the batch.
    pub rows: usize,
    /// Tokens per row in this pass.
    pub len: usize,
    cos: Tensor<4>,
    sin: Tensor<4>,
    bias: Option<Tensor<4>>,
}

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
    pub(crate) embed_tokens: Tensor<2>,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: RmsNorm,
    /// `None` when the head is the embedding table.
    pub(crate) lm_head: Option<LoraLinear>,
    /// What an adapter put on the embedding table.
    pub(crate) embedding: Embedding,
    /// The configuration of the adapter that is on, as PEFT writes it.
    pub(crate) adapter_config: Option<AdapterConfig>,
}

impl Decoder {
    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
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
        let (cos, sin) = rope::tables(&self.config, past, len, &self.device);
        // A single query sees every key.
        let bias = (len > 1).then(|| {
            let query = Tensor::<1, Int>::arange(past as i64..(past + len) as i64, &self.device).reshape([len, 1]);
            let key = Tensor::<1, Int>::arange(0..(past + len) as i64, &self.device).reshape([1, past + len]);
            let hidden = key.repeat_dim(0, len).greater(query.repeat_dim(1, past + len));
            // Far below any score, yet finite: WGSL has no literal for infinity.
            let bias: Tensor<2> = Tensor::zeros([len, past + len], (&self.device, DType::F32)).mask_fill(hidden, -1e30);
            bias.reshape([1, 1, len, past + len])
        });
        Sequence { rows, len, cos, sin, bias }
    }

    /// Looks tokens up.
    ///
    /// # Shapes
    /// Any number of ids to `[tokens, hidden]`.
    pub fn embed(&self, ids: &[u32], pass: Pass) -> Tensor<2> {
        let ids: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        let len = ids.len();
        let ids = Tensor::<1, Int>::from_data(TensorData::new(ids, [len]), (&self.device, DType::I32));
        self.embedding.forward(&self.embed_tokens, ids, pass)
    }

    /// Runs one block.
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    pub fn run_block(&self, block: &Block, x: Tensor<2>, sequence: &Sequence, pass: Pass) -> Tensor<2> {
        block.forward(x, &self.config, sequence, None, pass)
    }

    /// Final norm and output head.
    ///
    /// # Shapes
    /// `[tokens, hidden]` to `[tokens, vocab]`, in the compute dtype.
    pub fn logits(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        let x = self.norm.forward(x, pass);
        match &self.lm_head {
            Some(head) => head.forward(x, pass),
            None => matmul(x, self.embed_tokens.clone().transpose()),
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

    /// The logits after the last of `ids`, which follow the tokens in `cache` and join them there.
    ///
    /// # Shapes
    /// One row of ids; output `[1, vocab]`.
    pub fn forward_cached(&self, ids: &[u32], cache: &mut KvCache) -> Tensor<2> {
        let sequence = self.sequence(1, ids.len(), cache.len());
        let mut x = self.embed(ids, Pass::INFERENCE);
        for block in &self.blocks {
            x = block.forward(x, &self.config, &sequence, Some(cache), Pass::INFERENCE);
        }
        self.logits(x.narrow(0, ids.len() - 1, 1), Pass::INFERENCE)
    }

    /// Every linear layer with its path, first block first; the output head comes last.
    pub fn linears(&self) -> impl Iterator<Item = (String, &LoraLinear)> {
        let head = self.lm_head.iter().map(|head| ("lm_head".to_string(), head));
        self.blocks.iter().flat_map(Block::linears).chain(head)
    }

    /// Every linear layer with its path, first block first; the output head comes last.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = (String, &mut LoraLinear)> {
        let head = self.lm_head.iter_mut().map(|head| ("lm_head".to_string(), head));
        self.blocks.iter_mut().flat_map(Block::linears_mut).chain(head)
    }

    /// The linear layers without a head that is the embedding table.
    fn own_linears(&self) -> impl Iterator<Item = &LoraLinear> {
        let tied = self.config.tie_word_embeddings;
        self.linears().filter(move |(path, _)| !(tied && path == "lm_head")).map(|(_, linear)| linear)
    }

    /// Bytes of frozen weights on the device.
    pub fn device_bytes(&self) -> usize {
        let width = self.embed_tokens.dtype().size();
        let norms = (2 * self.blocks.len() + 1) * self.config.hidden_size * 4;
        let embeddings = self.embed_tokens.shape().num_elements() * width;
        embeddings + norms + self.own_linears().map(|linear| linear.base.device_bytes()).sum::<usize>()
    }

    /// Frozen weights, counted before quantization.
    pub fn num_params(&self) -> usize {
        let linears: usize = self.own_linears().map(|linear| linear.base.shape().iter().product::<usize>()).sum();
        self.embed_tokens.shape().num_elements() + (2 * self.blocks.len() + 1) * self.config.hidden_size + linears
    }
}
