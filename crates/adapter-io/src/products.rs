//! Products of blocks of matrices in 64-bit floats, by the `gemm` crate, which Burn's CPU backend brings along.
//!
//! Its results depend on the shapes and on the processor (instruction set, caches), not on the number of threads: a
//! product is cut into tiles of the result, and each element is summed by one thread in one order.

use gemm::Parallelism;

/// A matrix, or a part of one, in a slice that begins with its first element.
#[derive(Clone, Copy)]
pub(crate) struct Block<'a> {
    data: &'a [f64],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Block<'a> {
    /// Row-major, with `stride` elements from row to row.
    pub(crate) fn new(data: &'a [f64], rows: usize, columns: usize, stride: usize) -> Self {
        assert!(holds(data.len(), rows, columns, stride), "{rows} x {columns} by {stride} of {}", data.len());
        Self { data, rows, columns, row_stride: stride, column_stride: 1 }
    }

    /// Rows for columns.
    pub(crate) fn transposed(self) -> Self {
        let Self { data, rows, columns, row_stride, column_stride } = self;
        Self { data, rows: columns, columns: rows, row_stride: column_stride, column_stride: row_stride }
    }
}

fn holds(len: usize, rows: usize, columns: usize, stride: usize) -> bool {
    rows == 0 || columns == 0 || (columns <= stride || rows == 1) && (rows - 1) * stride + columns <= len
}

/// `out += factor * a b`, where `out` is row-major with `stride` elements from row to row.
///
/// # Shapes
/// `a` `[m, k]`, `b` `[k, n]`, `out` `[m, n]`.
pub(crate) fn add_product(out: &mut [f64], stride: usize, factor: f64, a: Block<'_>, b: Block<'_>, threads: Threads) {
    let (m, k, n) = (a.rows, a.columns, b.columns);
    assert!(k == b.rows && holds(out.len(), m, n, stride), "{m} x {k} by {} x {n}", b.rows);
    if m == 0 || n == 0 || k == 0 {
        return;
    }
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(0),
    };
    let strides = |block: Block<'_>| (block.column_stride as isize, block.row_stride as isize);
    let ((a_cs, a_rs), (b_cs, b_rs)) = (strides(a), strides(b));
    let (out, a, b) = (out.as_mut_ptr(), a.data.as_ptr(), b.data.as_ptr());
    // SAFETY: every element of the three blocks lies within its slice, as checked here and by `Block::new`; `out` is
    // borrowed exclusively, so it overlaps neither of the others.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            stride as isize,
            true,
            a,
            a_cs,
            a_rs,
            b,
            b_cs,
            b_rs,
            1.0,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Who computes a product.
#[derive(Clone, Copy)]
pub(crate) enum Threads {
    /// The caller alone, which may be one of many.
    One,
    /// Rayon's threads.
    All,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn values(count: usize) -> Vec<f64> {
        (0..count).map(|i| ((i * i + 3) as f64 * 0.37).sin()).collect()
    }

    #[test]
    fn parts_are_multiplied_and_what_lies_between_is_left_alone() {
        let (a, b) = (values(5 * 9), values(7 * 8));
        // 3 x 4 of the first by 4 x 2 of the second, and by the same of its transpose.
        let part = Block::new(&a[9 + 2..], 3, 4, 9);
        for (block, at) in [
            (Block::new(&b[8..], 4, 2, 8), (|k: usize, j: usize| 8 + k * 8 + j) as fn(usize, usize) -> usize),
            (Block::new(&b[8..], 2, 4, 8).transposed(), |k, j| 8 + j * 8 + k),
        ] {
            let mut out = vec![1.0; 3 * 6];
            add_product(&mut out, 6, -2.0, part, block, Threads::One);
            for (i, found) in out.iter().enumerate() {
                let (row, column) = (i / 6, i % 6);
                let sum = |_| (0..4).map(|k| a[9 + 2 + row * 9 + k] * b[at(k, column)]).sum::<f64>();
                let expected = if column < 2 { 1.0 - 2.0 * sum(()) } else { 1.0 };
                // Four products of numbers below 1 in 64-bit floats.
                assert!((found - expected).abs() < 1e-14, "{row} {column}: {found} {expected}");
            }
        }
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        for (m, k, n) in [(80, 1500, 700), (1000, 300, 90), (513, 257, 129)] {
            let (a, b) = (values(m * k), values(k * n));
            let product = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut out = vec![0.0; m * n];
                let (a, b) = (Block::new(&a, m, k, k), Block::new(&b, k, n, n));
                pool.install(|| add_product(&mut out, n, 1.0, a, b, Threads::All));
                out.into_iter().map(f64::to_bits).collect::<Vec<_>>()
            };
            let one = product(1);
            for threads in [2, 3, 8] {
                assert!(product(threads) == one, "{m} x {k} x {n} on {threads} threads");
            }
        }
    }
}
