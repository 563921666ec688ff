//! What kind of forward pass is running.

/// How a forward pass treats the adapters: whether it records a graph through them, and whether
/// LoRA dropout is on.
///
/// Dropout masks are a pure function of the pass's seed, the adapter and the element, so a block
/// recomputed in the backward pass drops the same elements as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Record operations on adapters for a backward pass.
    pub tracked: bool,
    /// Seed of this pass's dropout masks; `None` turns dropout off.
    pub dropout_seed: Option<u64>,
}

impl Pass {
    /// Evaluation and generation: no graph, no dropout.
    pub const INFERENCE: Self = Self { tracked: false, dropout_seed: None };

    /// Training: records a graph, with dropout masks drawn from `seed`.
    pub fn training(seed: u64) -> Self {
        Self { tracked: true, dropout_seed: Some(seed) }
    }

    /// The same pass (same dropout) without recording a graph, for activation checkpointing.
    pub fn untracked(self) -> Self {
        Self { tracked: false, ..self }
    }

    /// The pass over part number `part` of the tokens: its own dropout masks, those of the whole for part 0.
    pub fn part(self, part: usize) -> Self {
        let seed = |seed| if part == 0 { seed } else { mix(seed ^ mix(part as u64)) };
        Self { dropout_seed: self.dropout_seed.map(seed), ..self }
    }

    /// The dropout seed of adapter number `index` in this pass.
    pub fn seed_for(self, index: u32) -> Option<u64> {
        self.dropout_seed.map(|seed| mix(seed ^ mix(u64::from(index) + 1)))
    }
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection that scrambles every bit.
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
