//! Low-rank parts of a weight, for adapters that start from one: PiSSA, OLoRA, LoftQ and EVA.
//!
//! Decompositions run in 64-bit floats on the CPU. A weight whose smaller side is at most [`EXACT_SIDE`] is
//! decomposed through the eigenvectors of its Gram matrix, which gives the leading part to full precision. A larger
//! one goes through subspace iteration (Halko, Martinsson and Tropp, 2011, arXiv 0909.4061, algorithm 4.4): the cost of
//! the exact way grows with the cube of the side, and an adapter needs a few dozen vectors of thousands. Not done: a
//! device's product in place of the host's.

use rayon::prelude::*;

use crate::eigen::symmetric_eigen;
use crate::error::FormatError;
use crate::host_tensor::HostTensor;
use crate::linalg::{Matrix, row_basis};

/// Weights with a smaller side of at most this are decomposed exactly.
pub const EXACT_SIDE: usize = 1024;
/// Subspace iterations where no number is given. With oversampling the leading vectors have settled to f32 precision
/// unless the singular values beside the cut are nearly equal, and then it matters little which of them is kept.
const ITERATIONS: usize = 16;
/// Vectors beyond the rank that subspace iteration carries along.
const OVERSAMPLING: usize = 16;

/// The two factors of a low-rank matrix B A.
#[derive(Debug, Clone, PartialEq)]
pub struct Factors {
    /// [rank, in].
    pub a: HostTensor,
    /// [out, rank].
    pub b: HostTensor,
}

impl Factors {
    /// `weight - scaling * B A`, summed in 64-bit floats and rounded once.
    ///
    /// # Errors
    /// [`FormatError::Factors`] when the shapes do not fit.
    pub fn taken_from(&self, weight: &HostTensor, scaling: f32) -> Result<HostTensor, FormatError> {
        let (columns, rank) = (self.a.shape[1], self.a.shape[0]);
        if weight.shape != [self.b.shape[0], columns] {
            return Err(misfit(weight, format!("factors {:?} and {:?} do not fit", self.a.shape, self.b.shape)));
        }
        let mut out = weight.clone();
        out.data.par_chunks_mut(columns.max(1)).enumerate().for_each(|(row, out)| {
            let mut sums = vec![0.0f64; columns];
            for k in 0..rank {
                let b = f64::from(self.b.data[row * rank + k]) * f64::from(scaling);
                sums.iter_mut().zip(&self.a.data[k * columns..]).for_each(|(s, a)| *s += b * f64::from(*a));
            }
            out.iter_mut().zip(sums).for_each(|(w, s)| *w = (f64::from(*w) - s) as f32);
        });
        Ok(out)
    }
}

/// The leading part of a weight: `weight ≈ scaling * B A`, the singular values' roots on both sides.
///
/// `iterations` is the number of subspace iterations of the fast decomposition (PiSSA, arXiv 2404.02948, section 4.4);
/// `None` decomposes as precisely as the module says. The same seed gives the same factors.
///
/// # Shapes
/// `weight` [out, in]; A [rank, in], B [out, rank].
///
/// # Errors
/// [`FormatError::Factors`] when the rank is larger than the weight's smaller side.
pub fn principal(
    weight: &HostTensor,
    rank: usize,
    scaling: f32,
    iterations: Option<usize>,
    seed: u64,
) -> Result<Factors, FormatError> {
    let w = matrix(weight, rank)?;
    let (u, s, v) = leading(&w, rank, iterations, seed);
    let roots: Vec<f64> = s.iter().map(|s| (s / f64::from(scaling)).sqrt()).collect();
    Ok(scaled_factors(&u, &roots, &v, &roots))
}

/// The first `rank` columns of Q as B and rows of R as A, of `weight = Q R`: OLoRA (arXiv 2406.01775, algorithm 1).
///
/// # Errors
/// As [`principal`].
pub fn orthonormal(weight: &HostTensor, rank: usize) -> Result<Factors, FormatError> {
    let w = matrix(weight, rank)?;
    // The first columns of Q need the first columns of W alone.
    let columns = w.transpose();
    let first = Matrix { rows: rank, columns: w.rows, data: columns.data[..rank * w.rows].to_vec() };
    let (basis, _) = row_basis(&first);
    let mut q = Matrix::zeros(rank, w.rows);
    q.data[..basis.data.len()].copy_from_slice(&basis.data);
    let r = q.product(&w);
    let ones = vec![1.0; rank];
    Ok(scaled_factors(&q, &ones, &r, &ones))
}

/// LoftQ (arXiv 2310.08659, algorithm 1): rounds of quantizing what the factors do not hold and decomposing what
/// quantization lost. `quantize` gives a weight as it comes back from 4 bits. Returns the factors, with
/// `weight ≈ quantize(rest) + scaling * B A`, and that rest: the weight itself after one round.
///
/// # Errors
/// As [`principal`], and those of `quantize`.
pub fn quantization_error<E: From<FormatError>>(
    weight: &HostTensor,
    rank: usize,
    scaling: f32,
    rounds: usize,
    seed: u64,
    mut quantize: impl FnMut(&HostTensor) -> Result<HostTensor, E>,
) -> Result<(Factors, HostTensor), E> {
    let mut rest = weight.clone();
    let mut round = 1;
    loop {
        let quantized = quantize(&rest)?;
        let lost = weight.data.iter().zip(&quantized.data).map(|(w, q)| w - q).collect();
        let lost = HostTensor { shape: weight.shape.clone(), data: lost };
        let factors = principal(&lost, rank, scaling, None, seed)?;
        if round >= rounds {
            return Ok((factors, rest));
        }
        rest = factors.taken_from(weight, scaling)?;
        round += 1;
    }
}

/// The leading singular triplets: rows u_i `[k, m]`, s `[k]`, rows v_i `[k, n]`. Vectors of vanishing singular values are 0.
fn leading(w: &Matrix, rank: usize, iterations: Option<usize>, seed: u64) -> (Matrix, Vec<f64>, Matrix) {
    let transposed = w.transpose();
    if iterations.is_none() && w.rows.min(w.columns) <= EXACT_SIDE {
        return exact(w, &transposed, rank);
    }
    let width = (rank + OVERSAMPLING).min(w.rows).min(w.columns);
    let mut basis = row_basis(&gaussian(width, w.columns, seed).product(&transposed)).0;
    for _ in 0..iterations.unwrap_or(ITERATIONS) {
        let back = row_basis(&basis.product(w)).0;
        basis = row_basis(&back.product(&transposed)).0;
    }
    // W ≈ basisᵀ (basis W), and the small side is decomposed exactly.
    let core = basis.product(w);
    let (u, s, v) = exact(&core, &core.transpose(), rank.min(basis.rows));
    let (mut left, mut right) = (u.product(&basis), v);
    let mut s = s;
    left.data.resize(rank * w.rows, 0.0);
    right.data.resize(rank * w.columns, 0.0);
    s.resize(rank, 0.0);
    (left.rows, right.rows) = (rank, rank);
    (left, s, right)
}

/// [`leading`] through the eigenvectors of the smaller Gram matrix.
fn exact(w: &Matrix, transposed: &Matrix, rank: usize) -> (Matrix, Vec<f64>, Matrix) {
    let tall = w.rows > w.columns;
    let (gram, other) = if tall { (transposed.product(w), transposed) } else { (w.product(transposed), w) };
    let (values, vectors) = symmetric_eigen(&gram);
    let s: Vec<f64> = values[..rank].iter().map(|x| x.max(0.0).sqrt()).collect();
    let near = Matrix { rows: rank, columns: vectors.columns, data: vectors.data[..rank * vectors.columns].to_vec() };
    let mut far = near.product(other);
    // A Gram matrix knows singular values below 1e-8 of the largest as noise only.
    let floor = s.first().copied().unwrap_or(0.0) * 1e-7;
    for (k, s) in s.iter().enumerate() {
        let factor = if *s > floor { 1.0 / s } else { 0.0 };
        far.row_mut(k).iter_mut().for_each(|x| *x *= factor);
    }
    if tall { (far, s, near) } else { (near, s, far) }
}

/// Principal components of rows that come in chunks: incremental PCA (Ross, Lim, Lin and Yang, 2008), which PEFT
/// uses for EVA's activations. Memory is that of the components and one chunk, whatever number of rows goes in.
#[derive(Debug, Clone)]
pub struct Components {
    kept: usize,
    seen: usize,
    mean: Vec<f64>,
    /// Sum of squared distances from the mean, over all features.
    scatter: f64,
    values: Vec<f64>,
    vectors: Matrix,
}

impl Components {
    /// Of rows with `features` entries, `kept` components at most.
    pub fn new(features: usize, kept: usize) -> Self {
        let kept = kept.min(features);
        let vectors = Matrix::zeros(0, features);
        Self { kept, seen: 0, mean: vec![0.0; features], scatter: 0.0, values: Vec::new(), vectors }
    }

    /// Rows so far.
    pub fn seen(&self) -> usize {
        self.seen
    }

    /// Takes rows in, `[rows, features]` row-major.
    pub fn add(&mut self, rows: &[f32]) {
        let features = self.mean.len();
        let count = rows.len() / features.max(1);
        if count == 0 {
            return;
        }
        let mut chunk_mean = vec![0.0; features];
        for row in rows.chunks_exact(features) {
            chunk_mean.iter_mut().zip(row).for_each(|(m, x)| *m += f64::from(*x) / count as f64);
        }
        // The components so far, the centred rows, and one row for the distance of the two means.
        let mut stacked = Matrix::zeros(0, features);
        for (k, value) in self.values.iter().enumerate() {
            stacked.data.extend(self.vectors.row(k).iter().map(|x| x * value));
        }
        let before = stacked.data.len();
        for row in rows.chunks_exact(features) {
            stacked.data.extend(row.iter().zip(&chunk_mean).map(|(x, m)| f64::from(*x) - m));
        }
        let (old, new) = (self.seen as f64, count as f64);
        let weight = (old * new / (old + new)).sqrt();
        stacked.data.extend(self.mean.iter().zip(&chunk_mean).map(|(old, new)| weight * (old - new)));
        stacked.rows = stacked.data.len() / features;
        self.scatter += stacked.data[before..].iter().map(|x| x * x).sum::<f64>();
        let kept = self.kept.min(stacked.rows);
        let (_, values, vectors) = exact(&stacked, &stacked.transpose(), kept);
        (self.values, self.vectors) = (values, vectors);
        self.mean
            .iter_mut()
            .zip(&chunk_mean)
            .for_each(|(old_mean, m)| *old_mean += (m - *old_mean) * new / (old + new));
        self.seen += count;
    }

    /// The part of the rows' variance that each component explains, largest first.
    pub fn explained(&self) -> Vec<f64> {
        let total = if self.scatter > 0.0 { self.scatter } else { 1.0 };
        self.values.iter().map(|value| value * value / total).collect()
    }

    /// The first components, `[rank, features]`, each with its largest entry positive; zero rows where there are fewer.
    pub fn leading(&self, rank: usize) -> HostTensor {
        let features = self.mean.len();
        let mut data = Vec::with_capacity(rank * features);
        for k in 0..rank.min(self.vectors.rows) {
            let row = self.vectors.row(k);
            let largest = row.iter().fold(0.0f64, |best, x| if x.abs() > best.abs() { *x } else { best });
            let sign = if largest < 0.0 { -1.0 } else { 1.0 };
            data.extend(row.iter().map(|x| (x * sign) as f32));
        }
        data.resize(rank * features, 0.0);
        HostTensor { shape: vec![rank, features], data }
    }
}

fn matrix(weight: &HostTensor, rank: usize) -> Result<Matrix, FormatError> {
    let &[rows, columns] = weight.shape.as_slice() else {
        return Err(misfit(weight, "it is no matrix".into()));
    };
    if rank == 0 || rank > rows.min(columns) {
        return Err(misfit(
            weight,
            format!("it has no part of rank {rank}; the rank is at most {}", rows.min(columns)),
        ));
    }
    if weight.data.iter().any(|x| !x.is_finite()) {
        return Err(misfit(weight, "it has values that are not finite".into()));
    }
    Ok(Matrix { rows, columns, data: weight.data.iter().map(|x| f64::from(*x)).collect() })
}

fn misfit(weight: &HostTensor, reason: String) -> FormatError {
    FormatError::Decompose { shape: weight.shape.clone(), reason }
}

/// A from the rows of `v`, B from the rows of `u` as columns, each scaled.
fn scaled_factors(u: &Matrix, u_scales: &[f64], v: &Matrix, v_scales: &[f64]) -> Factors {
    let rank = u.rows;
    let mut a = Vec::with_capacity(rank * v.columns);
    for (k, scale) in v_scales.iter().enumerate() {
        a.extend(v.row(k).iter().map(|x| (x * scale) as f32));
    }
    let mut b = vec![0.0; u.columns * rank];
    for (k, scale) in u_scales.iter().enumerate() {
        u.row(k).iter().enumerate().for_each(|(row, x)| b[row * rank + k] = (x * scale) as f32);
    }
    Factors {
        a: HostTensor { shape: vec![rank, v.columns], data: a },
        b: HostTensor { shape: vec![u.columns, rank], data: b },
    }
}

/// Standard normal numbers that depend on the seed alone.
fn gaussian(rows: usize, columns: usize, seed: u64) -> Matrix {
    let mut state = seed;
    // SplitMix64 (Steele, Lea and Flood, 2014), then Box and Muller's transformation.
    let mut uniform = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let draw = |_| (-2.0 * (1.0 - uniform()).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
    Matrix { rows, columns, data: (0..rows * columns).map(draw).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(rows: usize, columns: usize, seed: u64) -> HostTensor {
        let data = gaussian(rows, columns, seed).data.iter().map(|x| *x as f32).collect();
        HostTensor { shape: vec![rows, columns], data }
    }

    fn norm(t: &HostTensor) -> f64 {
        t.data.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
    }

    /// A matrix with the singular values 1, 1/2, 1/4, ...
    fn decaying(rows: usize, columns: usize) -> HostTensor {
        let n = rows.min(columns);
        let (u, v) = (row_basis(&gaussian(n, rows, 1)).0, row_basis(&gaussian(n, columns, 2)).0);
        let scales: Vec<f64> = (0..n).map(|k| 0.5f64.powi(k as i32)).collect();
        let Factors { a, b } = scaled_factors(&u, &scales, &v, &vec![1.0; n]);
        let nothing = HostTensor { shape: vec![rows, columns], data: vec![0.0; rows * columns] };
        Factors { a, b }.taken_from(&nothing, -1.0).unwrap()
    }

    #[test]
    fn the_principal_part_is_the_best_one_and_fast_decomposition_finds_it() {
        for (rows, columns) in [(30, 20), (20, 30), (24, 24)] {
            let weight = decaying(rows, columns);
            for iterations in [None, Some(8)] {
                let factors = principal(&weight, 4, 2.0, iterations, 7).unwrap();
                let rest = factors.taken_from(&weight, 2.0).unwrap();
                // Eckart and Young: the rest holds the singular values from the fifth on, 1/16, 1/32, ...
                let expected = (4..20).map(|k| 0.25f64.powi(k)).sum::<f64>().sqrt();
                // f32 factors of numbers up to 1: 1e-7 each.
                assert!((norm(&rest) - expected).abs() < 1e-5, "{iterations:?}: {} {expected}", norm(&rest));
                let balance = norm(&factors.a) / norm(&factors.b);
                assert!((balance - 1.0).abs() < 1e-5, "{balance}");
            }
        }
    }

    #[test]
    fn orthonormal_factors_take_the_first_columns_out() {
        let weight = noise(12, 9, 3);
        let factors = orthonormal(&weight, 4).unwrap();
        let rest = factors.taken_from(&weight, 1.0).unwrap();
        // The first columns lie in the span of Q's; what is left of the others is orthogonal to it.
        for row in 0..12 {
            assert!(rest.data[row * 9..row * 9 + 4].iter().all(|x| x.abs() < 1e-6));
        }
        for k in 0..4 {
            for column in 0..9 {
                let dot: f32 = (0..12).map(|row| factors.b.data[row * 4 + k] * rest.data[row * 9 + column]).sum();
                assert!(dot.abs() < 1e-5, "{dot}");
            }
        }
    }

    #[test]
    fn more_rounds_of_quantization_lose_less() {
        let weight = noise(40, 48, 5);
        // A coarse quantizer: halves.
        let halves = |w: &HostTensor| {
            let data = w.data.iter().map(|x| (x * 2.0).round() / 2.0).collect();
            Ok::<_, FormatError>(HostTensor { shape: w.shape.clone(), data })
        };
        let lost = |rounds| {
            let (factors, rest) = quantization_error(&weight, 8, 0.5, rounds, 0, halves).unwrap();
            let data = weight.data.iter().zip(&halves(&rest).unwrap().data).map(|(w, q)| w - q).collect();
            norm(&factors.taken_from(&HostTensor { shape: vec![40, 48], data }, 0.5).unwrap())
        };
        let plain = {
            let data = weight.data.iter().zip(&halves(&weight).unwrap().data).map(|(w, q)| w - q).collect();
            norm(&HostTensor { shape: vec![40, 48], data })
        };
        let (one, five) = (lost(1), lost(5));
        assert!(plain / one > 1.03 && one / five > 1.0, "{plain} {one} {five}");
        assert_eq!(quantization_error(&weight, 8, 0.5, 1, 0, halves).unwrap().1, weight);
    }

    #[test]
    fn components_in_chunks_are_those_of_the_whole() {
        let mut rows = noise(60, 6, 9);
        for row in rows.data.chunks_exact_mut(6) {
            row.iter_mut().enumerate().for_each(|(i, x)| *x = *x * (6 - i) as f32 + 3.0);
        }
        let (mut whole, mut chunks) = (Components::new(6, 6), Components::new(6, 6));
        whole.add(&rows.data);
        rows.data.chunks(6 * 17).for_each(|chunk| chunks.add(chunk));
        assert_eq!((whole.seen(), chunks.seen()), (60, 60));
        assert!((whole.explained().iter().sum::<f64>() - 1.0).abs() < 1e-9);
        for (a, b) in whole.explained().iter().zip(chunks.explained()) {
            // All components are kept, so nothing is lost between chunks but rounding.
            assert!((a - b).abs() < 1e-9, "{a} {b}");
        }
        for (a, b) in whole.leading(4).data.iter().zip(&chunks.leading(4).data) {
            assert!((a - b).abs() < 1e-4, "{a} {b}");
        }
    }

    #[test]
    fn a_rank_beyond_the_weight_is_refused() {
        let message = principal(&noise(3, 5, 1), 4, 1.0, None, 0).unwrap_err().to_string();
        assert!(message.contains("rank 4") && message.contains("at most 3"), "{message}");
        assert!(orthonormal(&noise(3, 5, 1), 0).is_err());
    }
}
