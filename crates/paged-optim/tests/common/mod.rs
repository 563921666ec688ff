//! Numbers for the tests.

use test_support::Random;

/// Reproducible values in [-1, 1) of magnitudes from 1e-4 to 1.
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut random = Random(seed);
    (0..len).map(|_| random.signed() * 10_f32.powi(-((random.next_u64() % 5) as i32))).collect()
}
