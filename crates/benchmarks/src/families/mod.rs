//! The kernels to measure, one file per family.

mod attention;
mod burn;
mod codec;
mod low_rank;
mod matmul;

use crate::bench::Bench;
use crate::case::Case;

/// Everything that `kernels` measures, in the order of the table.
pub(crate) fn all(bench: &Bench) -> Vec<Case> {
    [codec::cases(bench), matmul::cases(bench), low_rank::cases(bench), attention::cases(bench)]
        .into_iter()
        .flatten()
        .collect()
}

/// Candidates for the fastest dense product.
pub(crate) fn peak(bench: &Bench) -> Vec<Case> {
    [matmul::peak(bench), burn::peak(bench)].into_iter().flatten().collect()
}
