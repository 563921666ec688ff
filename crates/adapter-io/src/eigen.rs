//! Eigenvalues and eigenvectors of a symmetric matrix, in 64-bit floats.
//!
//! Householder's reduction to a tridiagonal matrix, then QL with implicit shifts (Golub and Van Loan, "Matrix
//! Computations", 4th ed., 8.3; Bowdler, Martin, Reinsch and Wilkinson, 1968): about 9 n³ operations, which is what
//! Jacobi's method needs for one or two of its ten sweeps. Matrices here have sides up to a thousand.

use crate::linalg::Matrix;

/// The eigenvalues, largest first, and the eigenvectors as rows.
pub(crate) fn symmetric_eigen(a: &Matrix) -> (Vec<f64>, Matrix) {
    let n = a.rows;
    if n == 0 {
        return (Vec::new(), Matrix::zeros(0, 0));
    }
    // Column j of the usual algorithm is row j here: rows are contiguous, and so are the rotations' operands.
    let mut v = a.clone();
    let (mut d, mut e) = tridiagonal(&mut v);
    ql(&mut d, &mut e, &mut v);
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&i, &j| d[j].total_cmp(&d[i]));
    let mut vectors = Matrix::zeros(n, n);
    for (k, &i) in order.iter().enumerate() {
        vectors.row_mut(k).copy_from_slice(v.row(i));
    }
    (order.iter().map(|&i| d[i]).collect(), vectors)
}

/// Reduces the symmetric `v` to the diagonal d and the subdiagonal e (`e[i]` beside `d[i - 1]`); `v` becomes the
/// transformation, transposed: its rows are the basis.
fn tridiagonal(v: &mut Matrix) -> (Vec<f64>, Vec<f64>) {
    let n = v.rows;
    let (mut d, mut e) = (vec![0.0; n], vec![0.0; n]);
    // The reflectors, each over the leading entries, with twice their inverse squared norms.
    let mut reflectors: Vec<(Vec<f64>, f64)> = Vec::with_capacity(n);
    let mut p = vec![0.0; n];
    for i in (1..n).rev() {
        // Row i left of the diagonal becomes (0, .., 0, e).
        let mut u = v.row(i)[..i].to_vec();
        let norm = u.iter().map(|x| x * x).sum::<f64>().sqrt();
        let rest = u[..i - 1].iter().map(|x| x * x).sum::<f64>();
        if rest == 0.0 {
            e[i] = u[i - 1];
            reflectors.push((Vec::new(), 0.0));
            continue;
        }
        let alpha = if u[i - 1] > 0.0 { -norm } else { norm };
        e[i] = alpha;
        u[i - 1] -= alpha;
        let beta = 2.0 / (rest + u[i - 1] * u[i - 1]);
        // A ← H A H with H = I - beta u uᵀ on the leading block: A -= u wᵀ + w uᵀ.
        for (row, p) in p.iter_mut().enumerate().take(i) {
            *p = beta * v.row(row)[..i].iter().zip(&u).map(|(x, y)| x * y).sum::<f64>();
        }
        let k = 0.5 * beta * p[..i].iter().zip(&u).map(|(x, y)| x * y).sum::<f64>();
        p[..i].iter_mut().zip(&u).for_each(|(p, u)| *p -= k * u);
        for row in 0..i {
            let (ur, wr) = (u[row], p[row]);
            let entries = v.row_mut(row)[..i].iter_mut();
            entries.zip(u.iter().zip(&p)).for_each(|(x, (u, w))| *x -= ur * w + wr * u);
        }
        reflectors.push((u, beta));
    }
    for (i, d) in d.iter_mut().enumerate() {
        *d = v.row(i)[i];
    }
    // Accumulates Qᵀ = .. H H: with rows as basis vectors, Q's columns.
    let mut q = Matrix::zeros(n, n);
    (0..n).for_each(|i| q.row_mut(i)[i] = 1.0);
    for (u, beta) in reflectors.iter().rev() {
        let i = u.len();
        if i == 0 {
            continue;
        }
        // Q ← H Q on the leading block; q holds Qᵀ, so every row is reflected.
        for row in 0..i {
            let entries = &mut q.row_mut(row)[..i];
            let c = beta * entries.iter().zip(u).map(|(x, y)| x * y).sum::<f64>();
            entries.iter_mut().zip(u).for_each(|(x, u)| *x -= c * u);
        }
    }
    *v = q;
    (d, e)
}

/// Diagonalises the tridiagonal matrix, turning the rows of `v` along.
fn ql(d: &mut [f64], e: &mut [f64], v: &mut Matrix) {
    let n = d.len();
    e.rotate_left(1);
    e[n - 1] = 0.0;
    for l in 0..n {
        // Sixty rounds are far more than any matrix needs; the bound only rules out a hang on NaN.
        for _ in 0..60 {
            let small = |m: &usize| e[*m].abs() <= f64::EPSILON * (d[*m].abs() + d[*m + 1].abs());
            let m = (l..n - 1).find(small).unwrap_or(n - 1);
            if m == l {
                break;
            }
            let g = (d[l + 1] - d[l]) / (2.0 * e[l]);
            let r = g.hypot(1.0);
            let mut g = d[m] - d[l] + e[l] / (g + r.copysign(g));
            let (mut s, mut c, mut p) = (1.0, 1.0, 0.0);
            let mut split = false;
            for i in (l..m).rev() {
                let (f, b) = (s * e[i], c * e[i]);
                let r = f.hypot(g);
                e[i + 1] = r;
                if r == 0.0 {
                    d[i + 1] -= p;
                    e[m] = 0.0;
                    split = true;
                    break;
                }
                (s, c) = (f / r, g / r);
                g = d[i + 1] - p;
                let r = (d[i] - g) * s + 2.0 * c * b;
                p = s * r;
                d[i + 1] = g + p;
                g = c * r - b;
                let columns = v.columns;
                let (head, tail) = v.data.split_at_mut((i + 1) * columns);
                let (low, high) = (&mut head[i * columns..], &mut tail[..columns]);
                for (x, y) in low.iter_mut().zip(high) {
                    (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
                }
            }
            if !split {
                d[l] -= p;
                e[l] = g;
                e[m] = 0.0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_and_values_restore_the_matrix() {
        for n in [1, 2, 3, 17, 60] {
            let mut a = Matrix::zeros(n, n);
            for i in 0..n {
                for j in 0..=i {
                    let x = ((i * 31 + j * 7 + 3) as f64 * 0.37).sin();
                    (a.data[i * n + j], a.data[j * n + i]) = (x, x);
                }
            }
            let (values, vectors) = symmetric_eigen(&a);
            assert!(values.windows(2).all(|w| w[0] >= w[1]));
            let mut scaled = vectors.clone();
            (0..n).for_each(|i| scaled.row_mut(i).iter_mut().for_each(|x| *x *= values[i]));
            let again = vectors.transpose().product(&scaled);
            let gram = vectors.product(&vectors.transpose());
            for i in 0..n * n {
                // Some n³ operations on numbers around 1 in 64-bit floats.
                assert!((again.data[i] - a.data[i]).abs() < 1e-11, "{n}: {} {}", again.data[i], a.data[i]);
                let unit = if i % (n + 1) == 0 { 1.0 } else { 0.0 };
                assert!((gram.data[i] - unit).abs() < 1e-11, "{n}");
            }
        }
    }

    #[test]
    fn diagonal_and_zero_matrices_are_no_special_case() {
        let mut a = Matrix::zeros(4, 4);
        assert_eq!(symmetric_eigen(&a).0, [0.0; 4]);
        (0..4).for_each(|i| a.row_mut(i)[i] = i as f64);
        assert_eq!(symmetric_eigen(&a).0, [3.0, 2.0, 1.0, 0.0]);
    }
}
