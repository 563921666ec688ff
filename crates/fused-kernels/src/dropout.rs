//! Dropout whose mask is a pure function of a seed and an element's index: nothing to store, and the same mask on
//! every runtime and in every kernel that masks while it loads.

/// A dropout mask over a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Picks the mask. Its bits should be well mixed: seeds that differ by a little have masks that are shifts of each other.
    pub seed: u64,
    /// Elements whose [`dropout_hash`] is below are zero; below 2^16.
    pub threshold: u32,
    /// Factor of the others.
    pub scale: f32,
}

impl Dropout {
    /// Zeroes elements with probability `p`, from 0 to below 1 and rounded to a multiple of 2^-16, and scales the others by
    /// `1 / (1 - p)`.
    pub fn new(seed: u64, p: f32) -> Self {
        const STEPS: f64 = 65_536.0;
        let threshold = (f64::from(p) * STEPS).round().clamp(0.0, STEPS - 1.0);
        Self { seed, threshold: threshold as u32, scale: (STEPS / (STEPS - threshold)) as f32 }
    }

    /// The factor of an element, by its row-major index, which counts modulo 2^32.
    pub fn factor(&self, index: u32) -> f32 {
        if dropout_hash(index, self.seed) < self.threshold { 0.0 } else { self.scale }
    }
}

/// A uniform number of 16 bits from an element's index and a seed. Two neighbours have a half each of MurmurHash3's 32-bit finalizer
/// of a sequence that begins at one word of the seed and goes in steps of the other, made odd, as in SplitMix (Steele, Lea and
/// Flood, 2014): in kernels that wait for memory or tensor cores, hashing is what dropout costs.
pub fn dropout_hash(index: u32, seed: u64) -> u32 {
    let (start, step) = (seed as u32, (seed >> 32) as u32 | 1);
    let mut both = (index / 2).wrapping_mul(step).wrapping_add(start);
    both = (both ^ (both >> 16)).wrapping_mul(0x85EB_CA6B);
    both = (both ^ (both >> 13)).wrapping_mul(0xC2B2_AE35);
    both ^= both >> 16;
    (both >> (16 * (index % 2))) & 0xFFFF
}

/// A uniform number between -1 and 1 from an element's index and a seed: [`dropout_hash`] as one of 2^16 values, symmetric about 0.
pub fn noise_unit(index: u32, seed: u64) -> f32 {
    (2 * dropout_hash(index, seed) + 1) as f32 / 65_536.0 - 1.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_the_given_share() {
        let dropout = Dropout::new(7, 0.25);
        let dropped = (0..1_000_000).filter(|&i| dropout.factor(i) == 0.0).count();
        // A million independent draws: six standard deviations are 6 * sqrt(0.25 * 0.75 * 1e6) = 2,600.
        assert!(dropped.abs_diff(250_000) < 2_600, "{dropped}");
        // Neighbours are independent: both are dropped in a sixteenth of pairs, within six deviations of half a million draws.
        let both = (0..500_000).filter(|&i| dropout.factor(2 * i) == 0.0 && dropout.factor(2 * i + 1) == 0.0).count();
        assert!(both.abs_diff(31_250) < 1_030, "{both}");
    }

    /// Elements at a distance, and masks of seeds that come one after the other out of a mixer, know nothing of each other.
    #[test]
    fn masks_are_independent() {
        let mix = |mut z: u64| {
            z = z.wrapping_add(0x9E37_79B9_7F4A_7C15);
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        };
        const N: u32 = 200_000;
        let dropped = |seed: u64, i: u32| Dropout::new(mix(seed), 0.25).factor(i) == 0.0;
        // N draws, both of a pair dropped in a sixteenth: six standard deviations are 6 * sqrt(N / 16 * 15 / 16).
        let (expected, bound) = (f64::from(N) / 16.0, 6.0 * (f64::from(N) * 15.0 / 256.0).sqrt());
        for seed in 0..24 {
            for distance in [1, 2, 3, 4, 64, 1024, 4096, 4098, 11_008, 1 << 16, 1 << 24] {
                let both = (0..N).filter(|&i| dropped(seed, i) && dropped(seed, i + distance)).count();
                assert!((both as f64 - expected).abs() < bound, "seed {seed}, distance {distance}: {both}");
            }
            for other in [seed + 1, seed + 2, seed + 224] {
                let both = (0..N).filter(|&i| dropped(seed, i) && dropped(other, i)).count();
                assert!((both as f64 - expected).abs() < bound, "seeds {seed}, {other}: {both}");
            }
        }
    }

    #[test]
    fn probabilities_have_16_bits() {
        assert_eq!(Dropout::new(0, 0.0), Dropout { seed: 0, threshold: 0, scale: 1.0 });
        let tenth = Dropout::new(0, 0.05);
        assert_eq!(tenth.threshold, 3277);
        // What is kept is scaled by what is dropped in fact.
        assert!((f64::from(tenth.scale) * (1.0 - 3277.0 / 65_536.0) - 1.0).abs() < 1e-7);
        assert_eq!(Dropout::new(0, 0.999_999_9).threshold, 65_535);
    }
}
