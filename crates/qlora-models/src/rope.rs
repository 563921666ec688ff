//! Rotary position embeddings (Su et al., 2021, arXiv 2104.09864), in the half-split layout of
//! Hugging Face checkpoints or by pairs of neighbours, with the scalings for longer contexts that transformers knows.

use burn::tensor::{DType, Device, Tensor, TensorData};
use std::f64::consts::PI;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Which frequencies rotate.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Dimensions of a head that are rotated, the first ones; 0 for none.
    pub dim: usize,
    /// Dimensions of a head that are turned: [`dim`](Self::dim), or with [`Pairs::Adjacent`] the whole head, where those
    /// beyond are turned by an angle of zero. A head that is not rotated is turned so too.
    pub turned: usize,
    /// Scaling of the frequencies.
    pub scaling: RopeScaling,
    /// Which of them are a pair.
    pub pairs: Pairs,
    /// Growth of queries with their position.
    pub query_growth: Option<QueryGrowth>,
}

/// Which dimensions of a head are rotated by one angle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// One of the first half with one of the second.
    Halves,
    /// Neighbours.
    Adjacent,
}

/// Queries at position `p` are multiplied by `1 + beta · ln(1 + floor(p / original))` as in Llama 4.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryGrowth {
    /// How fast.
    pub beta: f64,
    /// Context length before the extension.
    pub original_max_position_embeddings: f64,
}

impl QueryGrowth {
    /// The factor at a position, in f32 as transformers computes it.
    pub fn factor(&self, position: usize) -> f32 {
        let periods = (position as f32 / self.original_max_position_embeddings as f32).floor();
        1.0 + self.beta as f32 * (1.0 + periods).ln()
    }

    /// Whether the factor of some of these positions is not 1.
    pub(crate) fn reaches(&self, positions: &Range<usize>) -> bool {
        positions.end as f64 > self.original_max_position_embeddings
    }
}

/// Frequency scaling of rotary position embeddings.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// NTK-aware: a larger theta for sequences longer than the model was made for.
    Dynamic {
        /// The extension of the context.
        factor: f64,
        /// The longest context without it.
        max_position_embeddings: usize,
    },
    /// Llama 3.1's: low frequencies divided by `factor`, high ones kept, a smooth ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` count as low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` count as high frequencies.
        high_freq_factor: f64,
        /// Context length before the extension.
        original_max_position_embeddings: f64,
    },
    /// YaRN (Peng et al., 2023, arXiv 2309.00071, section 3).
    Yarn {
        /// The divisor of low frequencies.
        factor: f64,
        /// Factor of cosines and sines, which scales scores by its square.
        attention_factor: f64,
        /// Rotations over the original context above which a frequency is kept.
        beta_fast: f64,
        /// Rotations over the original context below which it is divided.
        beta_slow: f64,
        /// Context length before the extension.
        original_max_position_embeddings: f64,
        /// Whether the ramp's ends are whole dimensions.
        truncate: bool,
    },
    /// LongRoPE (Ding et al., 2024, arXiv 2402.13753): a divisor for each frequency, one set for sequences within
    /// the original context and one beyond.
    Long {
        /// Within.
        short: Vec<f64>,
        /// Beyond.
        long: Vec<f64>,
        /// Factor of cosines and sines, which scales scores by its square.
        attention_factor: f64,
        /// Context length before the extension.
        original_max_position_embeddings: f64,
    },
}

impl Rope {
    /// One frequency per pair of dimensions, for a sequence of `len` tokens, in f32 as transformers computes them.
    pub fn frequencies(&self, len: usize) -> Vec<f32> {
        let power = |theta: f64, i: usize| (theta as f32).powf((2 * i) as f32 / self.dim as f32);
        let plain = |i: usize| 1.0 / power(self.theta, i);
        let pairs = 0..self.dim / 2;
        match &self.scaling {
            RopeScaling::Default => pairs.map(plain).collect(),
            RopeScaling::Linear { factor } => pairs.map(|i| plain(i) / *factor as f32).collect(),
            RopeScaling::Dynamic { factor, max_position_embeddings } => {
                let longer = len.max(*max_position_embeddings) as f64 / *max_position_embeddings as f64;
                let dim = self.dim as f64;
                let theta = self.theta * (factor * longer - (factor - 1.0)).powf(dim / (dim - 2.0));
                pairs.map(|i| 1.0 / power(theta, i)).collect()
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let original = *original_max_position_embeddings;
                let scaled = |i: usize| {
                    let frequency = f64::from(plain(i));
                    let rotations = original * frequency / (2.0 * PI);
                    let kept = ((rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    ((1.0 - kept) * frequency / factor + kept * frequency) as f32
                };
                pairs.map(scaled).collect()
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_position_embeddings, truncate, .. } => {
                let dim = self.dim as f64;
                // The dimension whose frequency makes that many rotations over the original context.
                let dimension = |rotations: f64| {
                    dim * (original_max_position_embeddings / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln())
                };
                let (low, high) = (dimension(*beta_fast), dimension(*beta_slow));
                let (low, high) = if *truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let high = if low == high { high + 0.001 } else { high };
                let scaled = |i: usize| {
                    let divided = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0) as f32;
                    plain(i) * (1.0 - divided) + plain(i) / *factor as f32 * divided
                };
                pairs.map(scaled).collect()
            }
            RopeScaling::Long { short, long, original_max_position_embeddings, .. } => {
                let factors = if len as f64 > *original_max_position_embeddings { long } else { short };
                pairs.zip(factors).map(|(i, factor)| 1.0 / (*factor as f32 * power(self.theta, i))).collect()
            }
        }
    }

    /// What tells sequences of different lengths apart that rotate the same position differently; `None` where all lengths
    /// are rotated alike. What a cache holds of one is of no use to the other.
    pub fn variant(&self, len: usize) -> Option<u64> {
        match &self.scaling {
            RopeScaling::Dynamic { max_position_embeddings, .. } => Some(len.max(*max_position_embeddings) as u64),
            RopeScaling::Long { original_max_position_embeddings: original, .. } => {
                Some(u64::from(len as f64 > *original))
            }
            _ => None,
        }
    }

    /// Brings what is a pair into the places where kernels look for it. Queries and keys change alike, so that their products
    /// stay what they are.
    ///
    /// # Shapes
    /// `[tokens, heads * head_dim]` in and out.
    pub(crate) fn paired(&self, x: Tensor<2>, head_dim: usize) -> Tensor<2> {
        match self.pairs {
            Pairs::Halves => x,
            Pairs::Adjacent => {
                let [tokens, features] = x.dims();
                let neighbours = x.reshape([tokens, features / head_dim, head_dim / 2, 2]);
                neighbours.swap_dims(2, 3).reshape([tokens, features])
            }
        }
    }

    /// Appends the cosines and sines of the angles at `positions`, one row for each.
    fn append_angles(&self, frequencies: &[f32], positions: Range<usize>, cos: &mut Vec<f32>, sin: &mut Vec<f32>) {
        let factor = match &self.scaling {
            RopeScaling::Yarn { attention_factor, .. } | RopeScaling::Long { attention_factor, .. } => {
                *attention_factor
            }
            _ => 1.0,
        };
        for position in positions {
            for frequency in frequencies {
                // The angle is an f32 product, as in transformers; its sine and cosine are then exact to an ulp.
                let (s, c) = f64::from(position as f32 * frequency).sin_cos();
                cos.push((c * factor) as f32);
                sin.push((s * factor) as f32);
            }
            let still = self.turned / 2 - frequencies.len();
            cos.extend(std::iter::repeat_n(1.0, still));
            sin.extend(std::iter::repeat_n(0.0, still));
        }
    }
}

/// Cosines and sines of the first positions, kept in the host's memory from pass to pass: a step of 16 thousand tokens
/// would wait for a million of each.
#[derive(Debug, Default)]
pub(crate) struct RotaryTables(Mutex<Known>);

/// Rows of frequencies, from position 0 on.
#[derive(Debug, Default)]
struct Known {
    /// Whether `frequencies` are there.
    made: bool,
    /// The [`Rope::variant`] that has these frequencies.
    variant: Option<u64>,
    frequencies: Vec<f32>,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RotaryTables {
    /// [`spans`](Self::spans) on a device.
    ///
    /// # Shapes
    /// Each `[positions, turned / 2]`, f32.
    pub fn get(
        &self,
        rope: &Rope,
        spans: impl IntoIterator<Item = (usize, Range<usize>)>,
        device: &Device,
    ) -> (Tensor<2>, Tensor<2>) {
        let mut len = 0;
        let spans = spans.into_iter().inspect(|(_, positions)| len += positions.len());
        let (cos, sin) = self.spans(rope, spans);
        let pairs = rope.turned / 2;
        let table = |values| Tensor::from_data(TensorData::new(values, [len, pairs]), (device, DType::F32));
        (table(cos), table(sin))
    }

    /// Cosines and sines of the angles at positions of several sequences, `turned / 2` of each for every position: of each
    /// sequence the length that it is rotated for, and the positions.
    pub fn spans(&self, rope: &Rope, spans: impl IntoIterator<Item = (usize, Range<usize>)>) -> (Vec<f32>, Vec<f32>) {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for (rotated_for, positions) in spans {
            self.append(rope, rotated_for, positions, &mut cos, &mut sin);
        }
        (cos, sin)
    }

    fn append(
        &self,
        rope: &Rope,
        rotated_for: usize,
        positions: Range<usize>,
        cos_out: &mut Vec<f32>,
        sin_out: &mut Vec<f32>,
    ) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let variant = rope.variant(rotated_for);
        if !known.made || known.variant != variant {
            *known = Known { made: true, variant, frequencies: rope.frequencies(rotated_for), ..Known::default() };
        }
        let Known { frequencies, cos, sin, .. } = &mut *known;
        let pairs = rope.turned / 2;
        let rows = cos.len() / pairs.max(1);
        if positions.start > rows {
            // A dynamic rope has other angles for every length: tables of earlier positions would not be used again.
            return rope.append_angles(frequencies, positions, cos_out, sin_out);
        }
        if positions.end > rows {
            rope.append_angles(frequencies, rows..positions.end, cos, sin);
        }
        let range = positions.start * pairs..positions.end * pairs;
        cos_out.extend_from_slice(&cos[range.clone()]);
        sin_out.extend_from_slice(&sin[range]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope { theta: 10_000.0, dim: 8, turned: 8, scaling, pairs: Pairs::Halves, query_growth: None }
    }

    #[test]
    fn a_long_rope_changes_once_and_a_dynamic_one_with_every_token() {
        let long = rope(RopeScaling::Long {
            short: vec![1.0; 4],
            long: vec![2.0; 4],
            attention_factor: 1.0,
            original_max_position_embeddings: 8.0,
        });
        assert_eq!([7, 8, 9, 10].map(|len| long.variant(len)), [Some(0), Some(0), Some(1), Some(1)]);
        assert_eq!(long.frequencies(9)[0], 0.5);
        let dynamic = rope(RopeScaling::Dynamic { factor: 2.0, max_position_embeddings: 8 });
        assert_eq!([7, 8, 9, 10].map(|len| dynamic.variant(len)), [Some(8), Some(8), Some(9), Some(10)]);
        assert_eq!(dynamic.frequencies(8), rope(RopeScaling::Default).frequencies(8));
    }

    #[test]
    fn what_is_not_rotated_is_turned_by_nothing() {
        let device = Device::flex();
        let rope = Rope { dim: 4, pairs: Pairs::Adjacent, ..rope(RopeScaling::Linear { factor: 2.0 }) };
        let (cos, sin) = RotaryTables::default().get(&rope, [(5, 3..5)], &device);
        let [cos, sin] = [cos, sin].map(|table| table.try_into_vec_as::<f32>().unwrap());
        assert_eq!([&cos[2..4], &cos[6..8]], [[1.0, 1.0]; 2]);
        assert_eq!([&sin[2..4], &sin[6..8]], [[0.0, 0.0]; 2]);
        assert!((sin[0] - 1.5f32.sin()).abs() < 1e-7, "{sin:?}");
        // Neighbours come into the halves.
        let x = Tensor::<2>::from_data(TensorData::from([[0.0f32, 1., 2., 3., 4., 5., 6., 7.]]), &device);
        let paired = rope.paired(x, 8).try_into_vec_as::<f32>().unwrap();
        assert_eq!(paired, [0., 2., 4., 6., 1., 3., 5., 7.]);
    }

    #[test]
    fn queries_grow_from_the_original_context_on() {
        let growth = QueryGrowth { beta: 0.1, original_max_position_embeddings: 16.0 };
        assert_eq!([0, 15].map(|position| growth.factor(position)), [1.0; 2]);
        assert!((growth.factor(16) - (1.0 + 0.1 * 2f32.ln())).abs() < 1e-7);
        assert!((growth.factor(50) - (1.0 + 0.1 * 4f32.ln())).abs() < 1e-7);
        assert_eq!([growth.reaches(&(0..16)), growth.reaches(&(16..17))], [false, true]);
    }

    #[test]
    fn kept_tables_are_those_of_one_pass() {
        let device = Device::flex();
        let values =
            |(cos, sin): (Tensor<2>, Tensor<2>)| [cos, sin].map(|table| table.try_into_vec_as::<f32>().unwrap());
        let original_max_position_embeddings = 8.0;
        let (short, long) = (vec![1.0; 4], vec![2.0; 4]);
        for scaling in [
            RopeScaling::Default,
            RopeScaling::Dynamic { factor: 2.0, max_position_embeddings: 8 },
            RopeScaling::Long { short, long, attention_factor: 1.5, original_max_position_embeddings },
        ] {
            let (rope, kept) = (rope(scaling), RotaryTables::default());
            // Shorter and longer batches, and tokens behind a cache.
            for (start, len) in [(0, 5), (0, 3), (5, 1), (6, 1), (0, 12), (12, 1), (13, 2), (40, 1), (2, 4)] {
                let (mut cos, mut sin) = (Vec::new(), Vec::new());
                rope.append_angles(&rope.frequencies(start + len), start..start + len, &mut cos, &mut sin);
                assert_eq!(
                    values(kept.get(&rope, [(start + len, start..start + len)], &device)),
                    [cos, sin],
                    "{rope:?} {start} {len}"
                );
            }
        }
    }
}
