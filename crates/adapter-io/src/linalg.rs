//! The little dense linear algebra that combining adapters and starting them from a weight need, in 64-bit floats, on
//! matrices one of whose sides is a rank (tens to hundreds).
//!
//! Products are the `gemm` crate's; what is left are two textbook algorithms (Golub and Van Loan, "Matrix Computations",
//! 4th ed.) on top. Not taken: faer 0.24, which has them all. The lock file would grow by forty crates, two minutes of CPU
//! time to build, and faer's eigenvectors have other bits on another number of threads. Subspace iteration for PiSSA
//! (16 rounds, 80 vectors, a weight of 4,096 x 4,096) takes 6.4 s of CPU time here and 3.0 s with faer; it took 38 s
//! when products were loops.

use crate::products::{Block, Threads, add_product};

/// A row-major matrix of 64-bit floats.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub data: Vec<f64>,
}

impl Matrix {
    pub(crate) fn zeros(rows: usize, columns: usize) -> Self {
        Self { rows, columns, data: vec![0.0; rows * columns] }
    }

    pub(crate) fn row(&self, i: usize) -> &[f64] {
        &self.data[i * self.columns..][..self.columns]
    }

    pub(crate) fn row_mut(&mut self, i: usize) -> &mut [f64] {
        &mut self.data[i * self.columns..][..self.columns]
    }

    pub(crate) fn transpose(&self) -> Self {
        let mut out = Self::zeros(self.columns, self.rows);
        for i in 0..self.rows {
            for (j, x) in self.row(i).iter().enumerate() {
                out.data[j * self.rows + i] = *x;
            }
        }
        out
    }

    /// `self @ other`.
    pub(crate) fn product(&self, other: &Self) -> Self {
        let (rows, inner, columns) = (self.rows, self.columns, other.columns);
        let mut out = Self::zeros(rows, columns);
        let (a, b) = (Block::new(&self.data, rows, inner, inner), Block::new(&other.data, inner, columns, columns));
        add_product(&mut out.data, columns, 1.0, a, b, Threads::All);
        out
    }
}

/// In eight sums, which the compiler makes vectors of.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    const LANES: usize = 8;
    let (a_chunks, b_chunks) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f64 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    let mut sums = [0.0; LANES];
    for (a, b) in a_chunks.zip(b_chunks) {
        (0..LANES).for_each(|i| sums[i] += a[i] * b[i]);
    }
    sums.iter().sum::<f64>() + rest
}

/// An orthonormal basis of the rows of `rows` and the coefficients: `rows = coefficients @ basis`.
///
/// Gram-Schmidt, twice, which is orthogonal to working precision ("twice is enough": Giraud, Langou,
/// Rozloznik 2005). Rows that depend on earlier ones add nothing to the basis.
pub(crate) fn row_basis(rows: &Matrix) -> (Matrix, Matrix) {
    let mut basis = Matrix::zeros(0, rows.columns);
    let mut coefficients = Matrix::zeros(rows.rows, rows.rows.min(rows.columns));
    for i in 0..rows.rows {
        let mut row = rows.row(i).to_vec();
        let norm = dot(&row, &row).sqrt();
        for _ in 0..2 {
            for k in 0..basis.rows {
                let c = dot(&row, basis.row(k));
                coefficients.row_mut(i)[k] += c;
                row.iter_mut().zip(basis.row(k)).for_each(|(x, b)| *x -= c * b);
            }
        }
        let rest = dot(&row, &row).sqrt();
        // Below this only the rounding of the subtraction is left.
        if rest > norm * 1e-13 && basis.rows < rows.columns {
            coefficients.row_mut(i)[basis.rows] = rest;
            basis.data.extend(row.iter().map(|x| x / rest));
            basis.rows += 1;
        }
    }
    let mut cut = Matrix::zeros(rows.rows, basis.rows);
    for i in 0..rows.rows {
        cut.row_mut(i).copy_from_slice(&coefficients.row(i)[..basis.rows]);
    }
    (basis, cut)
}

/// The singular value decomposition of a small matrix: `a = sum_i s[i] u_i v_i^T`, largest first.
///
/// One-sided Jacobi on the rows of `a^T` (Golub and Van Loan, 8.6.3): exact to working precision, and short.
///
/// # Shapes
/// `a` `[m, n]`; returns the rows u_i `[k, m]`, s `[k]`, the rows v_i `[k, n]`, with k = min(m, n) at most.
pub(crate) fn svd(a: &Matrix) -> (Matrix, Vec<f64>, Matrix) {
    // The rows of `u` are the columns of `a`; rotations make them orthogonal and are collected in `v`.
    let mut u = a.transpose();
    let n = a.columns;
    let mut v = Matrix::zeros(n, n);
    (0..n).for_each(|i| v.row_mut(i)[i] = 1.0);
    for _sweep in 0..60 {
        let mut turned = false;
        for i in 0..n {
            for j in i + 1..n {
                let (aa, bb, ab) = (dot(u.row(i), u.row(i)), dot(u.row(j), u.row(j)), dot(u.row(i), u.row(j)));
                if ab.abs() <= 1e-15 * (aa * bb).sqrt() || ab == 0.0 {
                    continue;
                }
                turned = true;
                let zeta = (bb - aa) / (2.0 * ab);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let c = 1.0 / (1.0 + t * t).sqrt();
                rotate(&mut u, i, j, c, c * t);
                rotate(&mut v, i, j, c, c * t);
            }
        }
        if !turned {
            break;
        }
    }
    let norms: Vec<f64> = (0..n).map(|i| dot(u.row(i), u.row(i)).sqrt()).collect();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| norms[j].total_cmp(&norms[i]));
    order.truncate(a.rows.min(n));
    let (mut us, mut vs) = (Matrix::zeros(order.len(), a.rows), Matrix::zeros(order.len(), n));
    for (k, &i) in order.iter().enumerate() {
        if norms[i] > 0.0 {
            us.row_mut(k).iter_mut().zip(u.row(i)).for_each(|(o, x)| *o = x / norms[i]);
        }
        // The rotations were applied to the rows of V^T, so row i of `v` is v_i.
        vs.row_mut(k).copy_from_slice(v.row(i));
    }
    (us, order.iter().map(|&i| norms[i]).collect(), vs)
}

/// Rows i and j become c r_i - s r_j and s r_i + c r_j.
fn rotate(m: &mut Matrix, i: usize, j: usize, c: f64, s: f64) {
    let (head, tail) = m.data.split_at_mut(j * m.columns);
    let (a, b) = (&mut head[i * m.columns..][..m.columns], &mut tail[..m.columns]);
    for (x, y) in a.iter_mut().zip(b) {
        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, columns: usize) -> Matrix {
        let data = (0..rows * columns).map(|i| ((i * i + 3) as f64 * 0.37).sin()).collect();
        Matrix { rows, columns, data }
    }

    fn close(a: &Matrix, b: &Matrix) {
        assert_eq!((a.rows, a.columns), (b.rows, b.columns));
        for (x, y) in a.data.iter().zip(&b.data) {
            // A few dozen operations on numbers around 1 in 64-bit floats.
            assert!((x - y).abs() < 1e-11, "{x} {y}");
        }
    }

    fn identity(n: usize) -> Matrix {
        let mut m = Matrix::zeros(n, n);
        (0..n).for_each(|i| m.row_mut(i)[i] = 1.0);
        m
    }

    #[test]
    fn basis_spans_the_rows() {
        let mut rows = matrix(5, 9);
        let copy = rows.row(1).to_vec();
        rows.row_mut(3).copy_from_slice(&copy);
        let (basis, coefficients) = row_basis(&rows);
        assert_eq!(basis.rows, 4);
        close(&coefficients.product(&basis), &rows);
        close(&basis.product(&basis.transpose()), &identity(4));
    }

    #[test]
    fn singular_values_and_vectors_restore_the_matrix() {
        for (m, n) in [(6, 6), (4, 7), (7, 4), (1, 3), (3, 1)] {
            let a = matrix(m, n);
            let (u, s, v) = svd(&a);
            assert!(s.windows(2).all(|w| w[0] >= w[1]));
            let mut us = u.transpose();
            for i in 0..us.rows {
                us.row_mut(i).iter_mut().zip(&s).for_each(|(x, s)| *x *= s);
            }
            close(&us.product(&v), &a);
            close(&v.product(&v.transpose()), &identity(v.rows));
        }
    }
}
