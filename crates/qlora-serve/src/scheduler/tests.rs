//! The scheduler over a cache that remembers whose token lies where.

#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

const BLOCK: usize = 4;

/// A pass's slot remembers everything that its keys and values depend on: adapter, rotation, and the tokens up to its own.
type Slot = (u64, Vec<u64>, Vec<u32>);

struct Model {
    scheduler: Scheduler,
    slots: HashMap<usize, Slot>,
    adapters: HashMap<SequenceId, u64>,
    rotation: fn(usize) -> Vec<u64>,
    most_tokens: usize,
    preempted: usize,
}

impl Model {
    fn new(blocks: usize, bounds: Bounds, rotation: fn(usize) -> Vec<u64>) -> Self {
        let scheduler = Scheduler::new(bounds, BlockPool::new(blocks, BLOCK));
        let most_tokens = bounds.tokens.max(bounds.sequences);
        Self { scheduler, slots: HashMap::new(), adapters: HashMap::new(), rotation, most_tokens, preempted: 0 }
    }

    fn add(&mut self, id: SequenceId, tokens: Vec<u32>, adapter: u64) {
        self.adapters.insert(id, adapter);
        self.scheduler.add(id, tokens, adapter, true);
    }

    /// Runs a pass; the sequences whose next token can be chosen.
    fn step(&mut self) -> Vec<SequenceId> {
        let plan = self.scheduler.plan(&self.rotation);
        self.preempted += plan.preempted;
        assert!(plan.slices.iter().map(|slice| slice.new).sum::<usize>() <= self.most_tokens);
        for slice in &plan.slices {
            let tokens = self.scheduler.tokens(slice.id).to_vec();
            let blocks = self.scheduler.blocks(slice.id).to_vec();
            let kind = (self.adapters[&slice.id], (self.rotation)(slice.rotated_for));
            let slot = |position: usize| blocks[position / BLOCK] as usize * BLOCK + position % BLOCK;
            let value = |position: usize| (kind.0, kind.1.clone(), tokens[..=position].to_vec());
            for position in slice.past..slice.past + slice.new {
                self.slots.insert(slot(position), value(position));
            }
        }
        // All writes of a pass are done before anything is read, as in a forward pass.
        for slice in &plan.slices {
            let tokens = self.scheduler.tokens(slice.id).to_vec();
            let blocks = self.scheduler.blocks(slice.id);
            let kind = (self.adapters[&slice.id], (self.rotation)(slice.rotated_for));
            assert_eq!(kind.1, (self.rotation)(tokens.len()), "rotated for another length");
            for position in 0..slice.past + slice.new {
                let slot = blocks[position / BLOCK] as usize * BLOCK + position % BLOCK;
                let expected = (kind.0, kind.1.clone(), tokens[..=position].to_vec());
                assert_eq!(self.slots.get(&slot), Some(&expected), "sequence {} position {position}", slice.id);
            }
        }
        for slice in &plan.slices {
            self.scheduler.computed(slice);
        }
        plan.slices.iter().filter(|slice| slice.is_last).map(|slice| slice.id).collect()
    }
}

fn same(_: usize) -> Vec<u64> {
    Vec::new()
}

/// As LongRoPE: one rotation up to 10 tokens, another beyond.
fn long(len: usize) -> Vec<u64> {
    vec![u64::from(len > 10)]
}

/// As dynamic scaling: every length beyond 12 has its own.
fn dynamic(len: usize) -> Vec<u64> {
    vec![len.max(12) as u64]
}

#[test]
fn answers_go_on_while_a_long_prompt_is_read() {
    let mut model = Model::new(32, Bounds { sequences: 4, tokens: 8 }, same);
    model.add(1, vec![1, 2, 3], 0);
    assert_eq!(model.step(), [1]);
    model.scheduler.push(1, 4);
    model.add(2, (0..20).collect(), 0);
    for expected in [vec![1], vec![1], vec![2, 1]] {
        let mut ready = model.step();
        ready.sort();
        let mut expected = expected;
        expected.sort();
        assert_eq!(ready, expected);
        model.scheduler.push(1, 5);
    }
}

#[test]
fn a_common_beginning_is_computed_once_and_only_for_one_adapter() {
    let mut model = Model::new(32, Bounds { sequences: 4, tokens: 64 }, same);
    model.add(1, (0..10).collect(), 0);
    model.step();
    model.scheduler.remove(1);
    model.add(2, (0..9).collect(), 0);
    model.add(3, (0..9).collect(), 1);
    model.step();
    assert_eq!((model.scheduler.cached(2), model.scheduler.cached(3)), (8, 0));
    // A prompt that is all there has its last token computed.
    model.scheduler.remove(2);
    model.add(4, (0..8).collect(), 0);
    model.step();
    assert_eq!(model.scheduler.cached(4), 4);
}

#[test]
fn who_came_last_gives_way_and_goes_on_later() {
    let mut model = Model::new(4, Bounds { sequences: 4, tokens: 64 }, same);
    model.add(1, (0..7).collect(), 0);
    model.add(2, (100..103).collect(), 0);
    let (mut ready, mut first) = (model.step(), 0);
    while model.preempted == 0 {
        for id in ready {
            model.scheduler.push(id, 50 + id as u32);
        }
        ready = model.step();
        first += 1;
        assert!(first < 20);
    }
    assert_eq!((model.scheduler.num_running(), model.scheduler.num_waiting()), (1, 1));
    assert!(!ready.contains(&2));
    let tokens = model.scheduler.tokens(2).to_vec();
    model.scheduler.remove(1);
    assert_eq!(model.step(), [2]);
    assert_eq!(model.scheduler.tokens(2), tokens);
}

#[test]
fn a_sequence_that_fills_the_cache_runs_alone() {
    let mut model = Model::new(2, Bounds { sequences: 4, tokens: 4 }, same);
    model.add(1, (0..8).collect(), 0);
    model.add(2, vec![1], 0);
    assert_eq!([model.step(), model.step()], [vec![], vec![1]]);
    model.scheduler.remove(1);
    assert_eq!(model.step(), [2]);
}

proptest! {
    /// Whatever comes and goes: no sequence reads what another one wrote unless both have the same beginning, none
    /// starves, and all blocks come back.
    #[test]
    fn every_sequence_reads_its_own_tokens_and_ends(
        blocks in 6usize..20,
        sequences in 1usize..6,
        tokens in 1usize..24,
        kind in 0usize..3,
        requests in prop::collection::vec((1usize..16, 0u64..2, 0u32..2, 1usize..8, 0usize..6, any::<bool>()), 1..24),
    ) {
        let rotation = [same as fn(usize) -> Vec<u64>, long, dynamic][kind];
        let mut model = Model::new(blocks, Bounds { sequences, tokens }, rotation);
        let mut left = HashMap::new();
        let mut queue = requests.into_iter().enumerate();
        let mut steps = 0;
        loop {
            // Some come together, some later.
            for (id, (len, adapter, variant, answer, _, cancelled)) in queue.by_ref().take(1 + steps % 3) {
                // Few different beginnings, so that many are shared.
                let prompt = (0..len as u32).map(|i| if i < 6 { i } else { 10 * i + variant }).collect();
                model.add(id as u64, prompt, adapter);
                left.insert(id as u64, if cancelled { answer / 2 + 1 } else { answer });
            }
            let ready = model.step();
            for id in ready {
                let left = left.get_mut(&id).unwrap();
                *left -= 1;
                match *left {
                    0 => model.scheduler.remove(id),
                    _ => model.scheduler.push(id, 1000 + *left as u32),
                }
            }
            steps += 1;
            prop_assert!(steps < 4000, "somebody starves");
            if model.scheduler.is_idle() && queue.len() == 0 {
                break;
            }
        }
        prop_assert_eq!(model.scheduler.blocks_used(), 0);
    }
}
