//! Keys and values of one sequence's past tokens.

use crate::decoder::Decoder;
use crate::paged::{CachedRow, PagedCache, Part, RowLogits};
use burn::tensor::Tensor;

/// Tokens of a block.
const BLOCK_TOKENS: usize = 16;

/// Keys and values of one sequence, for generation token by token. It grows with the sequence. Blocks with a window keep
/// all of them too, and look at the last ones. Many sequences at once share a [`PagedCache`].
#[derive(Debug, Default)]
pub struct KvCache {
    ids: Vec<u32>,
    /// Blocks of the sequence, in order.
    paged: Option<PagedCache>,
}

impl KvCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether the cache holds no token.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// See [`Decoder::forward_cached`].
    pub(crate) fn extend(&mut self, model: &Decoder, ids: &[u32]) -> Option<Tensor<2>> {
        let past = self.ids.len();
        self.ids.extend_from_slice(ids);
        let len = self.ids.len();
        // What is there is of no use to a sequence that rotates its positions otherwise.
        let past = if model.rotation(past) == model.rotation(len) { past } else { 0 };
        let needed = len.div_ceil(BLOCK_TOKENS);
        let paged = self.paged.get_or_insert_with(|| PagedCache::new(model, needed, BLOCK_TOKENS));
        if paged.blocks() < needed {
            paged.grow(needed.max(2 * paged.blocks()) - paged.blocks());
        }
        let blocks: Vec<u32> = (0..needed as u32).collect();
        let row =
            CachedRow { ids: &self.ids[past..], past, rotated_for: len, blocks: &blocks, logits: RowLogits::Last };
        if row.ids.is_empty() {
            return None;
        }
        Decoder::forward_paged(&[Part { model, rows: vec![row] }], paged)
    }
}
