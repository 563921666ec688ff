//! Random orders that can be found again.
//!
//! The generator is ChaCha8 and the shuffle is written out here, so an order stays the same on every
//! machine and with every version of a library.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What a random order is for: each use draws from its own stream.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Purpose {
    Rows = 1,
    Batches = 2,
    Split = 3,
    Weights = 4,
}

/// A random order of `0..count`: Fisher-Yates, driven by ChaCha8 with the seed, the purpose and
/// the epoch as its key. Rows are counted in 32 bits.
pub(crate) fn permutation(count: usize, seed: u64, purpose: Purpose, epoch: u64) -> Vec<u32> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&(purpose as u64).to_le_bytes());
    key[16..24].copy_from_slice(&epoch.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    let mut order: Vec<u32> = (0..count as u32).collect();
    for last in (1..count).rev() {
        order.swap(last, below(&mut rng, last as u64 + 1) as usize);
    }
    order
}

/// A uniform number below `bound` (Lemire 2019, arXiv 1805.10941, algorithm 5).
fn below(rng: &mut ChaCha8Rng, bound: u64) -> u64 {
    let threshold = bound.wrapping_neg() % bound;
    loop {
        let product = u128::from(rng.next_u64()) * u128::from(bound);
        if product as u64 >= threshold {
            return (product >> 64) as u64;
        }
    }
}
