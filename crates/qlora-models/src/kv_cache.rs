//! Keys and values of past tokens.

use burn::tensor::Tensor;

/// Keys and values of the tokens so far, one pair per block, for token-by-token generation. Blocks with a
/// window keep all of them too, and look at the last ones.
#[derive(Clone, Debug, Default)]
pub struct KvCache {
    /// The tokens.
    pub(crate) ids: Vec<u32>,
    blocks: Vec<Option<(Tensor<4>, Tensor<4>)>>,
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

    /// Appends a block's new keys and values, and returns all of them.
    ///
    /// # Shapes
    /// `[rows, new, kv_heads, head_dim]` in, `[rows, all, kv_heads, head_dim]` out.
    pub(crate) fn extend(&mut self, block: usize, keys: Tensor<4>, values: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        if self.blocks.len() <= block {
            self.blocks.resize(block + 1, None);
        }
        let all = match self.blocks[block].take() {
            Some((old_keys, old_values)) => {
                (Tensor::cat(vec![old_keys, keys], 1), Tensor::cat(vec![old_values, values], 1))
            }
            None => (keys, values),
        };
        self.blocks[block] = Some(all.clone());
        all
    }
}
