//! Reproducible random values: SplitMix64 (Steele, Lea and Flood 2014).

/// SplitMix64's output function on the state after `value`: a bijection that scrambles every bit.
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The upper 24 bits as a number in [-1, 1), exactly.
fn signed(bits: u64) -> f32 {
    (bits >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
}

/// `len` values in [-1, 1), each a function of seed and position.
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    (0..len as u64).map(|i| signed(mix(seed ^ mix(i)))).collect()
}

/// A generator; the field is its state, and at first its seed.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        let bits = mix(self.0);
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        bits
    }

    /// Uniform in (0, 1].
    pub fn uniform(&mut self) -> f64 {
        ((self.next_u64() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    /// Uniform in [-1, 1).
    pub fn signed(&mut self) -> f32 {
        signed(self.next_u64())
    }

    /// Standard normal (Box and Muller 1958).
    pub fn normal(&mut self) -> f32 {
        let (radius, angle) = ((-2.0 * self.uniform().ln()).sqrt(), std::f64::consts::TAU * self.uniform());
        (radius * angle.cos()) as f32
    }

    /// `len` standard normal values.
    pub fn normals(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.normal()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_generator_is_splitmix64() {
        // The first three outputs for seed 1234567, as the authors' program prints them.
        let mut random = Random(1_234_567);
        let outputs = [(); 3].map(|()| random.next_u64());
        assert_eq!(outputs, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    }

    #[test]
    fn values_have_the_moments_of_their_distributions() {
        let n = 100_000;
        let mut random = Random(7);
        let normals = random.normals(n);
        let uniform = noise(7, n);
        assert!(uniform.iter().all(|v| (-1.0..1.0).contains(v)));
        let moment = |values: &[f32], k| values.iter().map(|v| f64::from(*v).powi(k)).sum::<f64>() / n as f64;
        // Five standard errors: sqrt(1/3), 1, sqrt(4/45), sqrt(2), each over sqrt(n).
        for (values, k, expected, deviation) in [
            (&uniform, 1, 0.0, 0.577),
            (&normals, 1, 0.0, 1.0),
            (&uniform, 2, 1.0 / 3.0, 0.298),
            (&normals, 2, 1.0, 1.414),
        ] {
            let found = moment(values, k);
            assert!((found - expected).abs() < 5.0 * deviation / (n as f64).sqrt(), "moment {k} is {found}");
        }
    }
}
