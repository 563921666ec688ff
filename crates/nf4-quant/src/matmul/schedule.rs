//! What the kernels share: how tiles are given to cubes, and the parameter struct.

use cubecl::client::Client;
use cubecl::server::Handle;

use super::{Mask, Operands, Problem, Weight};
use crate::kernels::{DeviceAbsmax, MAP_START, codebook_start};

/// Parts of a split tile.
const MAX_SPLIT: usize = 8;
/// The cost of starting a part, and that of adding its sums to the others', each expressed as a number of steps: a step
/// of 256 tokens reads 36 KB, and the sums of a part are 128 KB.
const PART_STEPS: usize = 4;
/// Cubes per multiprocessor of any kernel, at most.
const MAX_CUBES: usize = 4;

/// How tiles are given to cubes: first `whole` tiles, in full rounds; then the rest, each cut into `split` parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Schedule {
    pub tiles: usize,
    pub whole: usize,
    pub split: usize,
}

impl Schedule {
    /// The schedule with the least cost, for tiles of `depth_steps` steps of 64 columns on `workers` cubes that run at
    /// once.
    pub(super) fn new(tiles: usize, depth_steps: usize, workers: usize) -> Self {
        let whole = tiles / workers * workers;
        let rest = tiles - whole;
        // Parts may take more than one round: 76 tiles on 132 workers are one round, in three parts two thirds of it.
        let cost = |split: &usize| {
            let rounds = (rest * split).div_ceil(workers);
            rounds * (depth_steps.div_ceil(*split) + PART_STEPS) + (split - 1) * PART_STEPS
        };
        // A part of fewer than four steps is mostly start-up.
        match (1..=MAX_SPLIT.min(depth_steps / 4)).min_by_key(cost) {
            None | Some(1) => Self { tiles, whole: tiles, split: 1 },
            Some(split) => Self { tiles, whole, split },
        }
    }

    /// Tiles that are split; each has a slot for its partial sums.
    pub(super) fn slots(self) -> usize {
        self.tiles - self.whole
    }

    /// Shares of the work: whole tiles and parts.
    pub(super) fn items(self) -> usize {
        self.whole + self.slots() * self.split
    }
}

/// `struct Params` of common.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
pub(super) struct Params {
    m: u32,
    tokens: u32,
    k: u32,
    rank: u32,
    whole: u32,
    split: u32,
    has_bias: u32,
    log2_blocksize: u32,
    log2_nested: u32,
    codebook: u32,
    map: u32,
    offset: u32,
    seed_low: u32,
    seed_high: u32,
    threshold: u32,
    dropout_scale: f32,
}

impl Params {
    /// `log2_nested` of a weight whose absmax are plain.
    const PLAIN: u32 = 255;

    pub(super) fn new(problem: &Problem, operands: &Operands<'_>, schedule: Schedule) -> Self {
        let Mask { seed, threshold, scale } = operands.mask().unwrap_or(Mask { seed: 0, threshold: 0, scale: 1.0 });
        let mut params = Self {
            m: problem.features() as u32,
            tokens: problem.tokens as u32,
            k: problem.depth() as u32,
            rank: problem.rank as u32,
            whole: schedule.whole as u32,
            split: schedule.split as u32,
            has_bias: operands.bias.is_some().into(),
            log2_blocksize: 0,
            log2_nested: Self::PLAIN,
            codebook: 0,
            map: MAP_START as u32,
            offset: 0,
            seed_low: seed as u32,
            seed_high: (seed >> 32) as u32,
            threshold,
            dropout_scale: scale,
        };
        if let Weight::FourBit(weight) = operands.weight {
            params.log2_blocksize = weight.blocksize.ilog2();
            params.codebook = codebook_start(weight.quant_type) as u32;
            if let DeviceAbsmax::Nested { blocksize, .. } = &weight.absmax {
                params.log2_nested = blocksize.ilog2();
                params.offset = weight.num_blocks().div_ceil(*blocksize) as u32;
            }
        }
        params
    }

    /// The same with the offsets of double quantization at another place.
    pub(super) fn with_offset(self, offset: usize) -> Self {
        Self { offset: offset as u32, ..self }
    }
}

/// Counters of the parts of split tiles, on the stream of a buffer just made.
pub(super) fn arrivals(client: &Client, recent: &Handle, multiprocessors: usize) -> Handle {
    cuda_source::counters(client, recent, MAX_CUBES * multiprocessors)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_filled() {
        // 688 tiles on 132 multiprocessors: five rounds, and 28 tiles in four parts.
        assert_eq!(Schedule::new(688, 64, 132), Schedule { tiles: 688, whole: 660, split: 4 });
        assert_eq!(Schedule::new(688, 64, 132).items(), 660 + 112);
        // Three parts of 68 tiles are two rounds of a third. Nearly a full round is left alone.
        assert_eq!(Schedule::new(200, 64, 132), Schedule { tiles: 200, whole: 132, split: 3 });
        assert_eq!(Schedule::new(250, 64, 132), Schedule { tiles: 250, whole: 250, split: 1 });
        assert_eq!(Schedule::new(264, 64, 132), Schedule { tiles: 264, whole: 264, split: 1 });
        // Too shallow, and at most eight parts.
        assert_eq!(Schedule::new(2, 4, 132).split, 1);
        assert_eq!(Schedule::new(2, 3, 132).split, 1);
        assert_eq!(Schedule::new(2, 512, 132), Schedule { tiles: 2, whole: 0, split: 8 });
        for workers in [132, 108 * MAX_CUBES] {
            for tiles in 1..1000 {
                let schedule = Schedule::new(tiles, 64, workers);
                assert!(schedule.whole.is_multiple_of(workers) || schedule.split == 1, "split tiles start a round");
                assert!(schedule.slots() < workers, "a counter for each");
            }
        }
    }
}
