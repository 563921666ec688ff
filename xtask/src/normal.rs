//! Normally distributed bf16 values by the billion: every 16 random bits pick an entry of a table
//! of quantiles. The result is the normal distribution rounded to 65,536 equally likely values.

use half::bf16;
use rayon::prelude::*;

/// Fills buffers with values of a normal distribution with mean 0.
pub struct Normal {
    table: Vec<bf16>,
    seed: u64,
}

impl Normal {
    /// A generator with a standard deviation and a seed.
    pub fn new(deviation: f64, seed: u64) -> Self {
        let count = 1 << 16;
        let quantile = |i: i32| deviation * standard_quantile((f64::from(i) + 0.5) / f64::from(count));
        Self { table: (0..count).map(|i| bf16::from_f64(quantile(i))).collect(), seed }
    }

    /// Fills `out` with values that depend on the seed, `stream` and the position only.
    pub fn fill(&self, stream: u64, out: &mut [bf16]) {
        let start = mix(self.seed ^ mix(stream));
        out.par_chunks_mut(4).enumerate().with_min_len(1 << 14).for_each(|(i, chunk)| {
            let mut bits = mix(start.wrapping_add((i as u64).wrapping_mul(GOLDEN)));
            for value in chunk {
                *value = self.table[(bits & 0xffff) as usize];
                bits >>= 16;
            }
        });
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's output function (Steele, Lea and Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(GOLDEN);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The value below which a standard normal variable falls with probability `p`, by bisecting the
/// distribution function; 65,536 of them take a few milliseconds.
fn standard_quantile(p: f64) -> f64 {
    let (mut low, mut high) = (-6.0, 6.0);
    for _ in 0..40 {
        let middle = 0.5 * (low + high);
        if probability_below(middle) < p {
            low = middle;
        } else {
            high = middle;
        }
    }
    0.5 * (low + high)
}

/// The standard normal distribution function, Abramowitz and Stegun 26.2.17: error below 7.5e-8.
fn probability_below(x: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * x.abs());
    let coefficients = [0.319_381_530, -0.356_563_782, 1.781_477_937, -1.821_255_978, 1.330_274_429];
    let polynomial = coefficients.iter().rev().fold(0.0, |sum, c| (sum + c) * t);
    let tail = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt() * polynomial;
    if x < 0.0 { tail } else { 1.0 - tail }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_the_moments_of_the_distribution() {
        let mut values = vec![bf16::ZERO; 1_000_003];
        Normal::new(0.02, 7).fill(3, &mut values);
        let n = values.len() as f64;
        let moment = |k: i32| values.iter().map(|v| (v.to_f64() / 0.02).powi(k)).sum::<f64>() / n;
        // Five standard errors of a million samples: 1, sqrt(2) and sqrt(96) over 1,000.
        for (k, expected, tolerance) in [(1, 0.0, 0.005), (2, 1.0, 0.0071), (4, 3.0, 0.05)] {
            assert!((moment(k) - expected).abs() < tolerance, "moment {k}: {}", moment(k));
        }
    }

    #[test]
    fn streams_and_seeds_differ_and_repeat() {
        let fill = |seed, stream| {
            let mut values = vec![bf16::ZERO; 100];
            Normal::new(1.0, seed).fill(stream, &mut values);
            values
        };
        assert_eq!(fill(1, 2), fill(1, 2));
        assert_ne!(fill(1, 2), fill(1, 3));
        assert_ne!(fill(1, 2), fill(2, 2));
    }

    #[test]
    fn quantiles_match_known_ones() {
        // The distribution function's error of 7.5e-8 over its slope of at least 0.02 here.
        for (p, x) in [(0.5, 0.0), (0.841_344_746, 1.0), (0.025, -1.959_963_985), (0.995, 2.575_829_304)] {
            assert!((standard_quantile(p) - x).abs() < 4e-6, "{p}");
        }
    }
}
