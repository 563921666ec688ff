//! The CPU implementation: composed, on Flex's parallel products.

use super::{AttentionOps, AttentionOptions, AttentionPasses, Operands};
use burn::backend::Flex;
use burn::backend::tensor::FloatTensor;

impl AttentionPasses for Flex {}

impl AttentionOps for Flex {
    fn attention_keeping(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        options: AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        Self::attention_forward(Operands { q, k, v }, &options)
    }
}
