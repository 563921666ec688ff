//! A small decoder of burn-nn layers, as any user of Burn would write it. Only the calls of `lora_forward` know that a linear layer
//! may have an adapter; with `forward` in their place the same adapters work too, through a dense weight in each pass.

use burn::module::Module;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::activation::{gelu, softmax};
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use qlora_layers::LoraForward;

/// Token ids are below this.
pub const VOCABULARY: usize = 48;

/// Sizes of the model.
pub const WIDTH: usize = 64;
const HEADS: usize = 4;
const BLOCKS: usize = 2;

/// Causal self-attention.
#[derive(Module, Debug)]
pub struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    output: Linear,
}

impl Attention {
    fn init(device: &Device) -> Self {
        let linear = || LinearConfig::new(WIDTH, WIDTH).with_bias(false).init(device);
        Self { query: linear(), key: linear(), value: linear(), output: linear() }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [rows, len, _] = x.dims();
        let heads = |x: Tensor<3>| x.reshape([rows, len, HEADS, WIDTH / HEADS]).swap_dims(1, 2);
        let query = heads(self.query.lora_forward(x.clone()));
        let key = heads(self.key.lora_forward(x.clone()));
        let value = heads(self.value.lora_forward(x));
        let scores = query.matmul(key.transpose()).div_scalar(((WIDTH / HEADS) as f32).sqrt());
        let hidden = Tensor::<2, Bool>::tril_mask([len, len], 0, &scores.device()).unsqueeze::<4>();
        let scores = scores.mask_fill(hidden.expand([rows, HEADS, len, len]), -1e9);
        let mixed = softmax(scores, 3).matmul(value).swap_dims(1, 2).reshape([rows, len, WIDTH]);
        self.output.lora_forward(mixed)
    }
}

/// Attention and a feed-forward layer, each behind a norm and beside a residual.
#[derive(Module, Debug)]
pub struct Block {
    attention_norm: LayerNorm,
    attention: Attention,
    feed_forward_norm: LayerNorm,
    up: Linear,
    down: Linear,
}

impl Block {
    fn init(device: &Device) -> Self {
        let norm = || LayerNormConfig::new(WIDTH).init(device);
        Self {
            attention_norm: norm(),
            attention: Attention::init(device),
            feed_forward_norm: norm(),
            up: LinearConfig::new(WIDTH, 4 * WIDTH).init(device),
            down: LinearConfig::new(4 * WIDTH, WIDTH).init(device),
        }
    }

    fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let x = x.clone() + self.attention.forward(self.attention_norm.forward(x));
        let hidden = gelu(self.up.lora_forward(self.feed_forward_norm.forward(x.clone())));
        x + self.down.lora_forward(hidden)
    }
}

/// The decoder.
#[derive(Module, Debug)]
pub struct Transformer {
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: LayerNorm,
    lm_head: Linear,
}

impl Transformer {
    /// A decoder of random weights.
    pub fn init(device: &Device) -> Self {
        Self {
            embedding: EmbeddingConfig::new(VOCABULARY, WIDTH).init(device),
            blocks: (0..BLOCKS).map(|_| Block::init(device)).collect(),
            norm: LayerNormConfig::new(WIDTH).init(device),
            lm_head: LinearConfig::new(WIDTH, VOCABULARY).with_bias(false).init(device),
        }
    }

    /// Logits of the next token.
    ///
    /// # Shapes
    /// `[rows, len]` to `[rows, len, VOCABULARY]`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let x = self.blocks.iter().fold(self.embedding.forward(ids), |x, block| block.forward(x));
        self.lm_head.lora_forward(self.norm.forward(x))
    }

    /// The mean cross entropy of predicting each token from those before it.
    pub fn loss(&self, ids: Tensor<2, Int>) -> Tensor<1> {
        let [rows, len] = ids.dims();
        let logits = self.forward(ids.clone().narrow(1, 0, len - 1)).reshape([rows * (len - 1), VOCABULARY]);
        let targets = ids.narrow(1, 1, len - 1).reshape([rows * (len - 1)]);
        CrossEntropyLossConfig::new().init(&logits.device()).forward(logits, targets)
    }
}

/// Rows that a model can learn: each token follows from the one before it, by another rule for each `task`. `[rows, len]`.
pub fn batch(task: usize, step: usize, rows: usize, len: usize, device: &Device) -> Tensor<2, Int> {
    let (factor, shift) = [(5, 11), (7, 3)][task % 2];
    let row = |row: usize| {
        let first = (step * 7 + row * 5) % VOCABULARY;
        std::iter::successors(Some(first), move |token| Some((token * factor + shift) % VOCABULARY)).take(len)
    };
    let ids: Vec<i32> = (0..rows).flat_map(row).map(|id| id as i32).collect();
    Tensor::from_data(TensorData::new(ids, [rows, len]), device)
}
