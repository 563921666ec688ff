//! Which blocks are in which slots, and which come next.

/// Places on the device: one for the block that is computed with, one for the next.
pub const SLOTS: usize = 2;

/// In which order blocks are entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// First to last, and then from the first on again: evaluation, generation.
    #[default]
    Forward,
    /// First to last, and then back: the forward pass of a training step.
    ThenBackward,
    /// Last to first, and then from the first on again: its backward pass.
    Backward,
}

impl Order {
    /// The blocks of `count` that are entered after `block`, the soonest first.
    fn after(self, block: usize, count: usize) -> Box<dyn Iterator<Item = usize>> {
        match self {
            Self::Forward => Box::new((block + 1..count).chain(0..block)),
            Self::ThenBackward => Box::new((block + 1..count).chain((0..count).rev())),
            Self::Backward => Box::new((0..block).rev().chain(0..count)),
        }
    }
}

/// What is in the slots.
#[derive(Debug)]
pub(super) struct Schedule {
    count: usize,
    tenants: Vec<Option<usize>>,
    order: Order,
}

impl Schedule {
    /// Empty slots for so many blocks.
    pub fn new(count: usize) -> Self {
        Self { count, tenants: vec![None; SLOTS.min(count)], order: Order::default() }
    }

    /// The order in which blocks were entered last.
    pub fn order(&self) -> Order {
        self.order
    }

    fn slot(&self, block: usize) -> usize {
        block % self.tenants.len()
    }

    pub fn holds(&self, block: usize) -> bool {
        self.tenants[self.slot(block)] == Some(block)
    }

    pub fn filled(&mut self, block: usize) {
        let slot = self.slot(block);
        self.tenants[slot] = Some(block);
    }

    /// The block's words have changed.
    pub fn forget(&mut self, block: usize) {
        let slot = self.slot(block);
        self.tenants[slot].take_if(|tenant| *tenant == block);
    }

    /// The blocks to fetch while `block` is computed with: those that come next and are not there, as far as their slots hold
    /// nothing that is needed sooner.
    pub fn enter(&mut self, block: usize, order: Order) -> Vec<usize> {
        self.order = order;
        let mut taken = vec![false; self.tenants.len()];
        taken[self.slot(block)] = true;
        let mut fetch = Vec::new();
        for next in order.after(block, self.count) {
            if taken.iter().all(|taken| *taken) {
                break;
            }
            let slot = self.slot(next);
            if !std::mem::replace(&mut taken[slot], true) && !self.holds(next) {
                fetch.push(next);
            }
        }
        fetch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Enters blocks in turn, and counts what was fetched ahead and what only when it was needed.
    struct Run {
        schedule: Schedule,
        ahead: usize,
        late: Vec<usize>,
    }

    impl Run {
        fn new(count: usize) -> Self {
            Self { schedule: Schedule::new(count), ahead: 0, late: Vec::new() }
        }

        fn enter(&mut self, block: usize, order: Order) {
            if !self.schedule.holds(block) {
                self.late.push(block);
                self.schedule.filled(block);
            }
            for next in self.schedule.enter(block, order) {
                assert_ne!(next % SLOTS, block % SLOTS, "block {block} is still needed");
                self.schedule.filled(next);
                self.ahead += 1;
            }
            assert!(self.schedule.holds(block));
        }

        fn train(&mut self, count: usize) {
            (0..count).for_each(|block| self.enter(block, Order::ThenBackward));
            (0..count).rev().for_each(|block| self.enter(block, Order::Backward));
        }
    }

    #[test]
    fn training_fetches_each_block_twice_a_step_but_those_at_the_turns() {
        for count in 2..9 {
            let mut run = Run::new(count);
            run.train(count);
            assert_eq!(run.late, [0], "{count}: only the very first was not there");
            assert_eq!(run.ahead, 1 + 2 * (count - SLOTS));
            (run.ahead, run.late) = (0, Vec::new());
            run.train(count);
            assert_eq!((run.ahead, run.late), (2 * (count - SLOTS), Vec::new()), "{count}");
        }
    }

    #[test]
    fn generation_goes_round() {
        let mut run = Run::new(6);
        for _ in 0..3 {
            (0..6).for_each(|block| run.enter(block, Order::Forward));
        }
        // The last pass has fetched the first block of a fourth.
        assert_eq!((run.ahead, run.late), (18, vec![0]));
        // Of an odd number the last block and the first have one slot.
        let mut run = Run::new(5);
        for _ in 0..3 {
            (0..5).for_each(|block| run.enter(block, Order::Forward));
        }
        assert_eq!(run.late, [0, 0, 0]);
    }

    #[test]
    fn one_block_stays() {
        let mut run = Run::new(1);
        run.train(1);
        run.train(1);
        assert_eq!((run.ahead, run.late), (0, vec![0]));
    }

    #[test]
    fn changed_words_are_fetched_again() {
        let mut run = Run::new(2);
        run.train(2);
        run.schedule.forget(1);
        run.schedule.forget(1);
        run.enter(0, Order::Forward);
        assert!(run.schedule.holds(1));
        assert_eq!(run.ahead, 2);
    }
}
