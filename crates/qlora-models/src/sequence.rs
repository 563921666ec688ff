//! The shape of one forward pass, and what its blocks share.

use burn::tensor::Tensor;
use qlora_layers::ops::AttentionOptions;
use qlora_layers::ops::fused::Rotation;
use std::sync::Arc;

/// What all blocks of one forward pass share: the batch's shape, and for each kind of attention its rotary tables
/// and options.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// Rows of the batch; 1 where rows are packed.
    pub rows: usize,
    /// Tokens per row in this pass; of all rows where they are packed.
    pub len: usize,
    /// First tokens of the rows that lie one after the other, from 0 on, and the number of tokens.
    pub(crate) packed: Option<Arc<[u32]>>,
    /// One for each of [`ModelConfig::attention_kinds`](crate::ModelConfig::attention_kinds).
    pub(crate) views: Vec<View>,
}

/// How blocks of one kind see a pass.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub cos: Tensor<2>,
    pub sin: Tensor<2>,
    pub rotation: Rotation,
    /// `[len, 1]`, f32: what queries are multiplied by, where that is not 1 at every position.
    pub query_growth: Option<Tensor<2>>,
    pub attention: AttentionOptions,
}
