//! The blocks of the paged cache: who holds them, and which prefixes they hold.
//!
//! A block has room for the keys and values of a fixed number of tokens. Sequences hold blocks, several may hold the same
//! one. A block whose tokens are all computed can be *sealed*: it is then known by its tokens and by the sealed block
//! before it, so that another sequence that begins with the same tokens takes it over. A sealed block that no sequence
//! holds stays known until its room is needed; the one that was let go first goes first.
//!
//! Prefixes are compared token by token, not by a hash: no two prompts can be taken for each other.

use std::collections::{BTreeMap, HashMap};

/// What precedes a block: a sealed block, or where sequences of one kind begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prefix(u64);

/// What a sealed block is known by.
type Key = (Prefix, Box<[u32]>);

#[derive(Debug, Default)]
struct Block {
    /// Sequences that hold the block.
    holders: u32,
    /// What the block is known by, and what it is called as a predecessor.
    sealed: Option<(Key, Prefix)>,
    /// When its last holder let it go, for a sealed block that nobody holds.
    idle_since: Option<u64>,
}

/// All blocks of a cache.
#[derive(Debug)]
pub struct BlockPool {
    block_tokens: usize,
    blocks: Vec<Block>,
    /// Blocks that hold nothing.
    free: Vec<u32>,
    sealed: HashMap<Key, u32>,
    /// Sealed blocks that no sequence holds, by the time that they were let go.
    idle: BTreeMap<u64, u32>,
    clock: u64,
    prefixes: u64,
}

impl BlockPool {
    /// A pool of `blocks` blocks of `block_tokens` tokens.
    pub fn new(blocks: usize, block_tokens: usize) -> Self {
        Self {
            block_tokens,
            blocks: (0..blocks).map(|_| Block::default()).collect(),
            free: (0..blocks as u32).rev().collect(),
            sealed: HashMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
            prefixes: 0,
        }
    }

    /// Tokens of a block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Blocks of the pool.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that a sequence can get now.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// A beginning that no other sequences share.
    pub fn new_root(&mut self) -> Prefix {
        self.prefixes += 1;
        Prefix(self.prefixes)
    }

    /// A block for new tokens; `None` when every block is held.
    pub fn allocate(&mut self) -> Option<u32> {
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let (_, index) = self.idle.pop_first()?;
                let block = &mut self.blocks[index as usize];
                block.idle_since = None;
                if let Some((key, _)) = block.sealed.take() {
                    self.sealed.remove(&key);
                }
                index
            }
        };
        self.blocks[index as usize].holders = 1;
        Some(index)
    }

    /// The sealed blocks that hold the beginning of `tokens`, now held by one sequence more, and the last one's name.
    pub fn take_prefix(&mut self, root: Prefix, tokens: &[u32]) -> (Vec<u32>, Prefix) {
        let (mut found, mut prefix) = (Vec::new(), root);
        for tokens in tokens.chunks_exact(self.block_tokens) {
            let Some(&index) = self.sealed.get(&(prefix, tokens.into())) else { break };
            let block = &mut self.blocks[index as usize];
            block.holders += 1;
            if let Some(since) = block.idle_since.take() {
                self.idle.remove(&since);
            }
            if let Some((_, name)) = &block.sealed {
                prefix = *name;
            }
            found.push(index);
        }
        (found, prefix)
    }

    /// Makes a block whose tokens are computed known, behind `prefix`. Returns what it is called as a predecessor. Where
    /// another block holds the same already, that one stays known.
    pub fn seal(&mut self, index: u32, prefix: Prefix, tokens: &[u32]) -> Prefix {
        let key: Key = (prefix, tokens.into());
        let known = self.sealed.get(&key).and_then(|known| self.blocks[*known as usize].sealed.as_ref());
        if let Some((_, name)) = known {
            return *name;
        }
        let name = self.new_root();
        self.sealed.insert(key.clone(), index);
        self.blocks[index as usize].sealed = Some((key, name));
        name
    }

    /// Lets a sequence's blocks go. Of one sequence the last block is forgotten first: its predecessors are of use
    /// without it, but not the other way round.
    pub fn release(&mut self, blocks: &[u32]) {
        for &index in blocks.iter().rev() {
            let block = &mut self.blocks[index as usize];
            block.holders -= 1;
            match (block.holders, &block.sealed) {
                (0, Some(_)) => {
                    self.clock += 1;
                    block.idle_since = Some(self.clock);
                    self.idle.insert(self.clock, index);
                }
                (0, None) => self.free.push(index),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pool with one sequence's blocks, sealed.
    fn sealed(pool: &mut BlockPool, root: Prefix, tokens: &[u32]) -> Vec<u32> {
        let mut prefix = root;
        let pieces = tokens.chunks_exact(pool.block_tokens());
        let blocks = pieces.map(|tokens| {
            let block = pool.allocate().expect("the pool has room");
            prefix = pool.seal(block, prefix, tokens);
            block
        });
        blocks.collect()
    }

    #[test]
    fn a_prefix_is_found_as_far_as_it_goes_and_only_behind_its_own_root() {
        let mut pool = BlockPool::new(8, 2);
        let (root, other) = (pool.new_root(), pool.new_root());
        let blocks = sealed(&mut pool, root, &[1, 2, 3, 4]);
        pool.release(&blocks);
        assert_eq!(pool.available(), 8);
        let found = pool.take_prefix(root, &[1, 2, 3, 4, 5, 6]).0;
        assert_eq!(found, blocks);
        assert_eq!(pool.available(), 6);
        assert_eq!(pool.take_prefix(root, &[1, 2, 9, 4]).0, blocks[..1]);
        assert!(pool.take_prefix(root, &[3, 4]).0.is_empty());
        assert!(pool.take_prefix(other, &[1, 2]).0.is_empty());
    }

    #[test]
    fn the_end_of_what_was_let_go_first_makes_room() {
        let mut pool = BlockPool::new(4, 1);
        let root = pool.new_root();
        let first = sealed(&mut pool, root, &[1, 2]);
        let second = sealed(&mut pool, root, &[7, 8]);
        pool.release(&first);
        pool.release(&second);
        assert_eq!(pool.allocate(), Some(first[1]));
        assert_eq!(pool.take_prefix(root, &[1, 2]).0, first[..1]);
        assert_eq!(pool.allocate(), Some(second[1]));
        assert_eq!(pool.allocate(), Some(second[0]));
        assert_eq!(pool.allocate(), None);
    }

    #[test]
    fn the_same_tokens_computed_twice_are_known_once() {
        let mut pool = BlockPool::new(4, 2);
        let root = pool.new_root();
        let (one, two) = (pool.allocate().unwrap(), pool.allocate().unwrap());
        let name = pool.seal(one, root, &[1, 2]);
        assert_eq!(pool.seal(two, root, &[1, 2]), name);
        pool.release(&[two]);
        // Nothing remembers the second one: its room is free.
        assert_eq!(pool.free.len(), 3);
        pool.release(&[one]);
        assert_eq!((pool.free.len(), pool.idle.len()), (3, 1));
    }
}
