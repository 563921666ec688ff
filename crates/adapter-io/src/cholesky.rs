//! Cholesky's decomposition and the inverse of its factor, on matrices as wide as a layer, for GPTQ.
//!
//! In blocks of [`BLOCK`] rows and columns, so that nearly all of the n³ / 2 multiplications are products of blocks
//! (Golub and Van Loan, "Matrix Computations", 4th ed., 4.2.9 and 3.1.4). Blocks are shared out to threads whole and
//! summed in a fixed order: the bits don't depend on the number of threads.
//!
//! Measured on two cores of an EPYC that had other work to do, in seconds of CPU time for both steps:
//!
//! | n | row by row | blocks | faer 0.24 |
//! |---|---|---|---|
//! | 1,024 | 0.32 | 0.06 | 0.04 |
//! | 2,048 | 3.8 | 0.29 | 0.21 |
//! | 4,096 | 35 | 2.1 | |
//! | 14,336 | | 63 | 46 |
//!
//! 14,336 is the widest layer of Llama 3.1 8B. Not taken: faer, for the reasons in `linalg`.

use rayon::prelude::*;

use crate::linalg::{Matrix, dot};
use crate::products::{Block, Threads, add_product};

/// Rows and columns of a block.
const BLOCK: usize = 128;

/// Replaces the lower triangle of a symmetric positive definite matrix by L, with the matrix = L Lᵀ; the row that fails
/// otherwise. What is above the diagonal is left alone.
pub(crate) fn cholesky(a: &mut Matrix) -> Result<(), usize> {
    let n = a.rows;
    for start in (0..n).step_by(BLOCK) {
        let width = BLOCK.min(n - start);
        let (above, below) = a.data.split_at_mut((start + width) * n);
        let block_rows = &mut above[start * n..];
        // The rows' part left of the diagonal block, which the rows below need too.
        let left: Vec<f64> = (0..width).flat_map(|row| &block_rows[row * n..][..start]).copied().collect();
        let left = Block::new(&left, width, start, start);
        add_product(&mut block_rows[start..], n, -1.0, left, left.transposed(), Threads::All);
        factor(block_rows, start, width, n).map_err(|row| start + row)?;
        let diagonal = &*block_rows;
        below.par_chunks_mut(BLOCK * n).for_each(|rows| {
            let count = rows.len() / n;
            let own: Vec<f64> = (0..count).flat_map(|row| &rows[row * n..][..start]).copied().collect();
            let own = Block::new(&own, count, start, start);
            add_product(&mut rows[start..], n, -1.0, own, left.transposed(), Threads::One);
            // X Lᵀ = what is there, row by row.
            for row in rows.chunks_exact_mut(n) {
                let x = &mut row[start..start + width];
                for k in 0..width {
                    let l = &diagonal[k * n + start..][..k + 1];
                    x[k] = (x[k] - dot(&x[..k], &l[..k])) / l[k];
                }
            }
        });
    }
    Ok(())
}

/// The diagonal block alone: `rows` begins with its first row, `start` is its column.
fn factor(rows: &mut [f64], start: usize, width: usize, n: usize) -> Result<(), usize> {
    for j in 0..width {
        let (done, rest) = rows.split_at_mut(j * n);
        let row = &mut rest[start..start + j + 1];
        for k in 0..j {
            let other = &done[k * n + start..][..k + 1];
            row[k] = (row[k] - dot(&row[..k], &other[..k])) / other[k];
        }
        let diagonal = row[j] - dot(&row[..j], &row[..j]);
        if !(diagonal > 0.0 && diagonal.is_finite()) {
            return Err(j);
        }
        row[j] = diagonal.sqrt();
    }
    Ok(())
}

/// The upper triangle U with `Uᵀ U = a⁻¹`, for a symmetric positive definite matrix; the row that fails otherwise.
///
/// With rows and columns reversed, a = L Lᵀ gives a = V Vᵀ with V upper, and U is its inverse: one Cholesky and one
/// triangular inverse, without forming a⁻¹.
pub(crate) fn upper_of_inverse(a: &Matrix) -> Result<Matrix, usize> {
    let n = a.rows;
    let mut l = Matrix::zeros(n, n);
    l.data.iter_mut().zip(a.data.iter().rev()).for_each(|(l, x)| *l = *x);
    cholesky(&mut l).map_err(|row| n - 1 - row)?;
    // Columns of L⁻¹ in blocks, each from its first row that isn't zero, row-major.
    let starts: Vec<usize> = (0..n).step_by(BLOCK).collect();
    let columns: Vec<Vec<f64>> = starts.par_iter().map(|start| inverse_columns(&l, *start)).collect();
    drop(l);
    let mut upper = Matrix::zeros(n, n);
    upper.data.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, out)| {
        let row = n - 1 - i;
        for (start, block) in starts.iter().zip(&columns).take_while(|(start, _)| **start <= row) {
            let width = BLOCK.min(n - start);
            let values = &block[(row - start) * width..][..width];
            values.iter().enumerate().for_each(|(j, x)| out[n - 1 - start - j] = *x);
        }
    });
    Ok(upper)
}

/// [`BLOCK`] columns of L⁻¹ from `start` on, rows from `start` on: forward substitution in blocks of rows.
fn inverse_columns(l: &Matrix, start: usize) -> Vec<f64> {
    let n = l.rows;
    let width = BLOCK.min(n - start);
    let mut x = vec![0.0; (n - start) * width];
    (0..width).for_each(|i| x[i * width + i] = 1.0);
    for first in (start..n).step_by(BLOCK) {
        let count = BLOCK.min(n - first);
        let (done, rest) = x.split_at_mut((first - start) * width);
        let known = Block::new(done, first - start, width, width);
        let left = Block::new(&l.data[first * n + start..], count, first - start, n);
        add_product(rest, width, -1.0, left, known, Threads::One);
        for row in 0..count {
            let (above, own) = rest.split_at_mut(row * width);
            let own = &mut own[..width];
            let coefficients = &l.row(first + row)[first..=first + row];
            for (c, other) in coefficients[..row].iter().zip(above.chunks_exact(width)) {
                own.iter_mut().zip(other).for_each(|(x, y)| *x -= c * y);
            }
            own.iter_mut().for_each(|x| *x /= coefficients[row]);
        }
    }
    x
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Symmetric positive definite: a Gram matrix and a diagonal.
    fn matrix(n: usize) -> Matrix {
        let data = (0..n * n).map(|i| ((i * i + 3) as f64 * 0.37).sin()).collect();
        let a = Matrix { rows: n, columns: n, data };
        let mut spd = a.product(&a.transpose());
        (0..n).for_each(|i| spd.row_mut(i)[i] += 0.5 * n as f64);
        spd
    }

    fn assert_close(what: &str, found: &Matrix, expected: impl Fn(usize, usize) -> f64, bound: f64) {
        for i in 0..found.rows {
            for (j, x) in found.row(i).iter().enumerate() {
                assert!((x - expected(i, j)).abs() < bound, "{what} {i} {j}: {x} {}", expected(i, j));
            }
        }
    }

    #[test]
    fn factors_and_inverses_on_both_sides_of_a_block() {
        for n in [1, 8, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5] {
            let a = matrix(n);
            let mut l = a.clone();
            cholesky(&mut l).unwrap();
            (0..n).for_each(|i| l.row_mut(i)[i + 1..].fill(0.0));
            // Sums of n products, in 64-bit floats, of which the matrix's elements are as large as n.
            let bound = 1e-14 * (n * n) as f64 + 1e-14;
            assert_close("L Lt", &l.product(&l.transpose()), |i, j| a.row(i)[j], bound);
            let u = upper_of_inverse(&a).unwrap();
            assert!((0..n).all(|i| u.row(i)[..i].iter().all(|x| *x == 0.0)));
            let unit = |i, j| if i == j { 1.0 } else { 0.0 };
            assert_close("inverse", &a.product(&u.transpose().product(&u)), unit, 1e-14 * n as f64 + 1e-14);
        }
    }

    #[test]
    fn the_row_that_fails_is_named() {
        for row in [5, BLOCK + 7] {
            let mut a = matrix(2 * BLOCK);
            a.row_mut(row)[row] = -1.0;
            assert_eq!(cholesky(&mut a.clone()).unwrap_err(), row);
            assert!(upper_of_inverse(&a).is_err());
        }
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let a = matrix(4 * BLOCK + 40);
        let inverse = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| upper_of_inverse(&a).unwrap().data.into_iter().map(f64::to_bits).collect::<Vec<_>>())
        };
        let one = inverse(1);
        assert!(inverse(2) == one && inverse(7) == one);
    }
}
