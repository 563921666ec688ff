//! The little dense linear algebra that combining adapters, starting them from a weight and GPTQ need, in
//! 64-bit floats, on matrices whose sides are ranks (tens to hundreds) or, for Cholesky and products, a layer's.
//!
//! No library: a BLAS would be the largest dependency of this crate, for three textbook algorithms
//! (Golub and Van Loan, "Matrix Computations", 4th ed.).

use rayon::prelude::*;

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
        let mut out = Self::zeros(self.rows, other.columns);
        if other.columns == 0 {
            return out;
        }
        out.data.par_chunks_mut(other.columns).zip(self.data.par_chunks(self.columns.max(1))).for_each(|(out, row)| {
            for (k, x) in row.iter().enumerate() {
                out.iter_mut().zip(other.row(k)).for_each(|(o, y)| *o += x * y);
            }
        });
        out
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
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

/// The lower triangle L of a symmetric positive definite matrix = L L^T; the row that fails otherwise.
pub(crate) fn cholesky(a: &Matrix) -> Result<Matrix, usize> {
    let n = a.rows;
    let mut l = Matrix::zeros(n, n);
    for j in 0..n {
        let (done, rest) = l.data.split_at_mut(j * n);
        let pivot_row = &mut rest[..n];
        for k in 0..j {
            let other = &done[k * n..][..k + 1];
            pivot_row[k] = (a.data[j * n + k] - dot(&pivot_row[..k], &other[..k])) / other[k];
        }
        let diagonal = a.data[j * n + j] - dot(&pivot_row[..j], &pivot_row[..j]);
        if !(diagonal > 0.0 && diagonal.is_finite()) {
            return Err(j);
        }
        pivot_row[j] = diagonal.sqrt();
    }
    Ok(l)
}

/// The upper triangle U with `U^T U = a^-1`, for a symmetric positive definite matrix; the row that fails
/// otherwise.
///
/// With rows and columns reversed, a = L L^T gives a = V V^T with V upper, and U is its inverse: one
/// Cholesky and one triangular inverse, without forming a^-1.
pub(crate) fn upper_of_inverse(a: &Matrix) -> Result<Matrix, usize> {
    let n = a.rows;
    let mut flipped = Matrix::zeros(n, n);
    flipped.data.iter_mut().zip(a.data.iter().rev()).for_each(|(f, x)| *f = *x);
    let l = cholesky(&flipped).map_err(|row| n - 1 - row)?;
    // Row i of `columns` solves L x = e_i: it is column i of L^-1.
    let mut columns = Matrix::zeros(n, n);
    columns.data.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, x)| {
        for r in i..n {
            let rhs = if r == i { 1.0 } else { 0.0 };
            x[r] = (rhs - dot(&l.row(r)[i..r], &x[i..r])) / l.row(r)[r];
        }
    });
    let mut upper = Matrix::zeros(n, n);
    upper.data.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, out)| {
        out.iter_mut().enumerate().for_each(|(j, o)| *o = columns.row(n - 1 - j)[n - 1 - i]);
    });
    Ok(upper)
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

    #[test]
    fn cholesky_and_the_inverses_upper_triangle() {
        let a = matrix(8, 8);
        let mut spd = a.product(&a.transpose());
        (0..8).for_each(|i| spd.row_mut(i)[i] += 0.5);
        let l = cholesky(&spd).unwrap();
        close(&l.product(&l.transpose()), &spd);
        let u = upper_of_inverse(&spd).unwrap();
        assert!((0..8).all(|i| u.row(i)[..i].iter().all(|x| *x == 0.0)));
        close(&spd.product(&u.transpose().product(&u)), &identity(8));
        spd.row_mut(5)[5] = -1.0;
        assert_eq!(cholesky(&spd).unwrap_err(), 5);
        assert!(upper_of_inverse(&spd).is_err());
    }
}
