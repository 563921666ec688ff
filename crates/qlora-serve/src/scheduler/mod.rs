//! Which tokens of which sequences the next forward pass computes. Knows numbers of tokens and blocks, nothing of models.
//!
//! A pass has a budget of tokens. Sequences that have one token to compute come first, so that answers go on while
//! prompts are read; the rest of the budget goes to prompts, a long one in several passes. A sequence joins when its whole
//! prompt has room in the cache. When an answer grows and no block is left, the sequence that joined last gives its blocks
//! back and waits at the head of the queue; its tokens stay, and are computed again later.

mod blocks;

use std::collections::{HashMap, VecDeque};

pub use blocks::{BlockPool, Prefix};

/// Names a sequence.
pub type SequenceId = u64;

/// Bounds of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Sequences in a batch at most.
    pub sequences: usize,
    /// Tokens of a pass at most; at least as many as sequences.
    pub tokens: usize,
}

/// Which sequences can share blocks: those of one adapter whose positions are rotated alike.
type Kind = (u64, Vec<u64>);

#[derive(Debug)]
struct Sequence {
    /// Prompt and answer.
    tokens: Vec<u32>,
    /// Tokens whose keys and values are in the cache, from the first on.
    computed: usize,
    /// The length that positions are rotated for.
    rotated_for: usize,
    blocks: Vec<u32>,
    /// The first `sealed` blocks are known to the pool, the last of them as `prefix`.
    sealed: usize,
    prefix: Prefix,
    adapter: u64,
    /// Whether blocks of other sequences may be taken.
    shares: bool,
    /// Tokens that were taken from other sequences when this one joined first.
    cached: Option<usize>,
}

impl Sequence {
    fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }
}

/// A sequence's part of a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The sequence.
    pub id: SequenceId,
    /// Its tokens in the cache before the pass.
    pub past: usize,
    /// Tokens to compute, those behind `past`.
    pub new: usize,
    /// The length that positions are rotated for.
    pub rotated_for: usize,
    /// Whether the sequence's last token is among them, so that the next one can be chosen.
    pub is_last: bool,
}

/// What a pass computes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In no particular order.
    pub slices: Vec<Slice>,
    /// Sequences that lost their blocks to others.
    pub preempted: usize,
}

/// All sequences, and who holds what.
#[derive(Debug)]
pub struct Scheduler {
    bounds: Bounds,
    pool: BlockPool,
    sequences: HashMap<SequenceId, Sequence>,
    waiting: VecDeque<SequenceId>,
    /// In the order in which they joined.
    running: Vec<SequenceId>,
    roots: HashMap<Kind, Prefix>,
}

impl Scheduler {
    /// Over a pool of blocks.
    pub fn new(bounds: Bounds, pool: BlockPool) -> Self {
        Self {
            bounds: Bounds { tokens: bounds.tokens.max(bounds.sequences), ..bounds },
            pool,
            sequences: HashMap::new(),
            waiting: VecDeque::new(),
            running: Vec::new(),
            roots: HashMap::new(),
        }
    }

    /// Adds a sequence at the end of the queue. Sequences of one `adapter` share beginnings where they `share`.
    ///
    /// Its tokens, the ones to come among them, must fit into the pool.
    pub fn add(&mut self, id: SequenceId, tokens: Vec<u32>, adapter: u64, shares: bool) {
        let rotated_for = tokens.len();
        let prefix = self.pool.new_root();
        let sequence = Sequence {
            tokens,
            computed: 0,
            rotated_for,
            blocks: Vec::new(),
            sealed: 0,
            prefix,
            adapter,
            shares,
            cached: None,
        };
        self.sequences.insert(id, sequence);
        self.waiting.push_back(id);
    }

    /// Takes a sequence out, wherever it is.
    pub fn remove(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.remove(&id) {
            self.pool.release(&sequence.blocks);
            self.waiting.retain(|waiting| *waiting != id);
            self.running.retain(|running| *running != id);
        }
    }

    /// The next pass. `rotation` tells lengths apart that rotate positions differently: where a sequence grows from one to
    /// the other, everything that the cache holds of it is computed again.
    pub fn plan(&mut self, rotation: &dyn Fn(usize) -> Vec<u64>) -> Plan {
        self.restart_rotated(rotation);
        let mut plan = Plan::default();
        let mut budget = self.bounds.tokens;
        // Answers first, then prompts, each in the order in which they joined.
        for is_answer in [true, false] {
            for id in self.running.clone() {
                let remaining = self.sequences.get(&id).map_or(0, Sequence::remaining);
                if (remaining == 1) == is_answer && budget > 0 && self.running.contains(&id) {
                    let new = remaining.min(budget);
                    if self.make_room(id, &mut plan) {
                        budget -= new;
                        plan.slices.extend(self.slice(id, new));
                    }
                }
            }
        }
        if plan.preempted == 0 {
            self.admit(rotation, budget, &mut plan);
        }
        plan
    }

    /// Puts sequences that positions must be rotated otherwise for at the head of the queue, without what they hold.
    fn restart_rotated(&mut self, rotation: &dyn Fn(usize) -> Vec<u64>) {
        for id in self.running.clone().into_iter().rev() {
            let Some(sequence) = self.sequences.get(&id) else { continue };
            let (before, now) = (sequence.rotated_for, sequence.tokens.len());
            if before != now && rotation(before) != rotation(now) {
                self.give_back(id);
            }
        }
    }

    /// Lets new sequences join while tokens and blocks are left.
    fn admit(&mut self, rotation: &dyn Fn(usize) -> Vec<u64>, mut budget: usize, plan: &mut Plan) {
        while budget > 0 && self.running.len() < self.bounds.sequences {
            let Some(&id) = self.waiting.front() else { break };
            let Some(sequence) = self.sequences.get_mut(&id) else { break };
            let len = sequence.tokens.len();
            let kind = (sequence.adapter, rotation(len));
            let root = *self.roots.entry(kind).or_insert_with(|| self.pool.new_root());
            // The last token is always computed: the next one is chosen from what comes out.
            let (mut blocks, prefix) = match sequence.shares {
                true => self.pool.take_prefix(root, &sequence.tokens[..len - 1]),
                false => (Vec::new(), root),
            };
            let block_tokens = self.pool.block_tokens();
            let taken = blocks.len();
            let missing = len.div_ceil(block_tokens) - taken;
            // One block more than needed, so that whoever runs already does not lose its own with the next token.
            let spare = usize::from(!self.running.is_empty());
            if self.pool.available() < missing + spare {
                self.pool.release(&blocks);
                break;
            }
            blocks.extend((0..missing).map_while(|_| self.pool.allocate()));
            sequence.computed = taken * block_tokens;
            sequence.cached.get_or_insert(sequence.computed);
            (sequence.blocks, sequence.sealed, sequence.prefix) = (blocks, taken, prefix);
            sequence.rotated_for = len;
            let new = sequence.remaining().min(budget);
            budget -= new;
            self.waiting.pop_front();
            self.running.push(id);
            plan.slices.extend(self.slice(id, new));
        }
    }

    fn slice(&self, id: SequenceId, new: usize) -> Option<Slice> {
        let sequence = self.sequences.get(&id)?;
        let past = sequence.computed;
        let is_last = past + new == sequence.tokens.len();
        Some(Slice { id, past, new, rotated_for: sequence.rotated_for, is_last })
    }

    /// Gives a running sequence the blocks that its tokens need, others' if there is no other way. `false` when the
    /// sequence itself had to give way.
    fn make_room(&mut self, id: SequenceId, plan: &mut Plan) -> bool {
        let block_tokens = self.pool.block_tokens();
        loop {
            let Some(sequence) = self.sequences.get_mut(&id) else { return false };
            if sequence.blocks.len() * block_tokens >= sequence.tokens.len() {
                return true;
            }
            if let Some(block) = self.pool.allocate() {
                sequence.blocks.push(block);
                continue;
            }
            let Some(&victim) = self.running.last() else { return false };
            plan.preempted += 1;
            plan.slices.retain(|slice| slice.id != victim);
            self.give_back(victim);
            if victim == id {
                return false;
            }
        }
    }

    /// Takes a running sequence's blocks and puts it at the head of the queue.
    fn give_back(&mut self, id: SequenceId) {
        self.running.retain(|running| *running != id);
        self.waiting.push_front(id);
        if let Some(sequence) = self.sequences.get_mut(&id) {
            self.pool.release(&std::mem::take(&mut sequence.blocks));
            (sequence.computed, sequence.sealed) = (0, 0);
        }
    }

    /// Notes that a slice was computed. Blocks that became full are known from now on.
    pub fn computed(&mut self, slice: &Slice) {
        let block_tokens = self.pool.block_tokens();
        let Some(sequence) = self.sequences.get_mut(&slice.id) else { return };
        sequence.computed = slice.past + slice.new;
        while (sequence.sealed + 1) * block_tokens <= sequence.computed {
            let start = sequence.sealed * block_tokens;
            let tokens = &sequence.tokens[start..start + block_tokens];
            sequence.prefix = self.pool.seal(sequence.blocks[sequence.sealed], sequence.prefix, tokens);
            sequence.sealed += 1;
        }
    }

    /// Appends a token to a sequence.
    pub fn push(&mut self, id: SequenceId, token: u32) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.tokens.push(token);
        }
    }

    /// A sequence's tokens, prompt and answer.
    pub fn tokens(&self, id: SequenceId) -> &[u32] {
        self.sequences.get(&id).map_or(&[], |sequence| &sequence.tokens)
    }

    /// A sequence's blocks, first to last.
    pub fn blocks(&self, id: SequenceId) -> &[u32] {
        self.sequences.get(&id).map_or(&[], |sequence| &sequence.blocks)
    }

    /// The first block of each sequence that runs. Sequences that do not share have one of their own.
    pub fn first_blocks(&self) -> impl Iterator<Item = u32> + '_ {
        self.running.iter().filter_map(|id| self.sequences.get(id)?.blocks.first().copied())
    }

    /// Tokens that a sequence took from others when it joined first.
    pub fn cached(&self, id: SequenceId) -> usize {
        self.sequences.get(&id).and_then(|sequence| sequence.cached).unwrap_or(0)
    }

    /// Forgets what sequences of an adapter could share: it is gone, and its number is not used again.
    pub fn forget_adapter(&mut self, adapter: u64) {
        self.roots.retain(|(known, _), _| *known != adapter);
    }

    /// Sequences that wait.
    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Sequences that run.
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Blocks that sequences hold.
    pub fn blocks_used(&self) -> usize {
        self.pool.num_blocks() - self.pool.available()
    }
}

#[cfg(test)]
mod tests;
