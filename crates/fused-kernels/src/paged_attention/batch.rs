//! Which blocks of a cache the rows of a batch own, and which of their tokens are new.

use super::check_limit;
use crate::KernelError;

/// A sequence of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row<'a> {
    /// Blocks of the cache, in the order of its tokens.
    pub blocks: &'a [u32],
    /// Its tokens, the new ones included.
    pub len: usize,
    /// How many of the last tokens are new: those of this batch.
    pub new: usize,
}

/// What the rows of a batch look at. Built on the host once a pass, for all layers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    block_tokens: usize,
    max_blocks: usize,
    /// `[rows, max_blocks]`; unused entries are 0.
    tables: Vec<u32>,
    /// `[rows + 1]`.
    starts: Vec<u32>,
    /// `[rows]`.
    lens: Vec<u32>,
    /// `[tokens]`.
    slots: Vec<u32>,
    /// Slots that a cache must have.
    reach: usize,
    /// What launches are planned for, at least the largest length.
    max_len: usize,
}

impl Batch {
    /// The rows of a batch over a cache of blocks of `block_tokens` tokens. The new tokens of all rows lie one after the
    /// other in the batch. Rows may share blocks that they only read.
    ///
    /// # Errors
    /// [`KernelError::Attention`] when a row has fewer tokens than new ones, fewer blocks than its tokens fill, or
    /// blocks hold no token; [`KernelError::TooLarge`] when slots exceed 32 bits.
    pub fn new(rows: &[Row<'_>], block_tokens: usize) -> Result<Self, KernelError> {
        Self::with_room(rows, block_tokens, 0)
    }

    /// [`new`](Self::new) with room for sequences of `max_len` tokens: batches of as many rows and new tokens of each have
    /// [words](Self::words) of one layout, and the same launches, up to that length. A recorded pass is replayed so.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_room(rows: &[Row<'_>], block_tokens: usize, max_len: usize) -> Result<Self, KernelError> {
        let wrong = |name, value: String, reason| Err(KernelError::Attention { name, value, reason });
        if block_tokens == 0 {
            return wrong("block_tokens", "0".to_owned(), "a block holds at least one token");
        }
        let max_len = rows.iter().map(|row| row.len).max().unwrap_or(0).max(max_len);
        let max_blocks = max_len.div_ceil(block_tokens);
        let mut batch = Self {
            block_tokens,
            max_blocks,
            tables: vec![0; rows.len() * max_blocks],
            starts: vec![0],
            lens: Vec::with_capacity(rows.len()),
            slots: Vec::new(),
            reach: 0,
            max_len,
        };
        for (number, &Row { blocks, len, new }) in rows.iter().enumerate() {
            let used = len.div_ceil(block_tokens);
            if new > len {
                return wrong("row", format!("{new} new tokens of {len}"), "the new tokens are among all of them");
            }
            if used > blocks.len() {
                let value = format!("{len} tokens in {} blocks of {block_tokens}", blocks.len());
                return wrong("row", value, "its blocks hold all of its tokens");
            }
            let blocks = &blocks[..used];
            let reach = blocks.iter().max().map_or(0, |block| (*block as usize + 1).saturating_mul(block_tokens));
            batch.reach = batch.reach.max(reach);
            check_limit("slots", batch.reach, i32::MAX as usize)?;
            check_limit("tokens of a row", len, i32::MAX as usize)?;
            batch.tables[number * max_blocks..][..used].copy_from_slice(blocks);
            batch.lens.push(len as u32);
            batch.slots.extend((len - new..len).map(|position| slot(blocks, position, block_tokens) as u32));
            batch.starts.push(batch.slots.len() as u32);
        }
        check_limit("tables", batch.tables.len(), i32::MAX as usize)?;
        Ok(batch)
    }

    /// Rows.
    pub fn rows(&self) -> usize {
        self.lens.len()
    }

    /// New tokens of all rows.
    pub fn tokens(&self) -> usize {
        self.slots.len()
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// `[rows, max_blocks]`: the blocks of each row; unused entries are 0.
    pub fn tables(&self) -> &[u32] {
        &self.tables
    }

    /// The blocks of one row.
    pub fn table(&self, row: usize) -> &[u32] {
        &self.tables[row * self.max_blocks..][..self.max_blocks]
    }

    /// `[rows + 1]`: where the new tokens of each row begin in the batch, and their number.
    pub fn starts(&self) -> &[u32] {
        &self.starts
    }

    /// `[rows]`: tokens of each row's sequence, the new ones included.
    pub fn lens(&self) -> &[u32] {
        &self.lens
    }

    /// `[tokens]`: where the key and value of each new token go.
    pub fn slots(&self) -> &[u32] {
        &self.slots
    }

    /// The largest number of new tokens of a row.
    pub fn max_new(&self) -> usize {
        self.starts.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(0)
    }

    /// The largest length of a row, or the one that there is room for.
    pub fn max_len(&self) -> usize {
        self.max_len
    }

    /// Slots that a cache must have to hold every block that is named.
    pub fn reach(&self) -> usize {
        self.reach
    }

    /// What kernels read: slots, starts, lengths and tables in one buffer, so that a pass uploads once.
    pub fn words(&self) -> Vec<u32> {
        [&self.slots[..], &self.starts, &self.lens, &self.tables].concat()
    }

    /// The number of words.
    pub fn num_words(&self) -> usize {
        self.slots.len() + self.starts.len() + self.lens.len() + self.tables.len()
    }
}

/// Where the token at `position` of a sequence with these blocks lies in the cache.
#[inline]
pub fn slot(blocks: &[u32], position: usize, block_tokens: usize) -> usize {
    blocks[position / block_tokens] as usize * block_tokens + position % block_tokens
}
