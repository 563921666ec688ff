//! Dropout whose mask is a pure function of a seed and an element's index: nothing to store, and the same mask on
//! every runtime and in every kernel that masks while it loads.

/// A dropout mask over a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Picks the mask.
    pub seed: u64,
    /// Elements whose [`dropout_hash`] is below are zero.
    pub threshold: u32,
    /// Factor of the others.
    pub scale: f32,
}

impl Dropout {
    /// Zeroes elements with probability `p`, from 0 to below 1, and scales the others by `1 / (1 - p)`.
    pub fn new(seed: u64, p: f32) -> Self {
        Self { seed, threshold: (f64::from(p) * 4_294_967_296.0) as u32, scale: 1.0 / (1.0 - p) }
    }

    /// The factor of an element, by its row-major index, which counts modulo 2^32.
    pub fn factor(&self, index: u32) -> f32 {
        if dropout_hash(index, self.seed) < self.threshold { 0.0 } else { self.scale }
    }
}

/// A uniform u32 from an element's index and a seed: two rounds of MurmurHash3's 32-bit finalizer.
pub fn dropout_hash(index: u32, seed: u64) -> u32 {
    let round = |mut h: u32| {
        h = (h ^ (h >> 16)).wrapping_mul(0x85EB_CA6B);
        h = (h ^ (h >> 13)).wrapping_mul(0xC2B2_AE35);
        h ^ (h >> 16)
    };
    round(round(index ^ seed as u32) ^ (seed >> 32) as u32)
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
    }
}
