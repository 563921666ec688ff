//! The kernels to measure, one file per family.

mod attention;
mod bars;
mod burn;
mod codec;
mod delta_rule;
mod dora;
mod low_rank;
mod matmul;
mod paged_attention;

use crate::bench::Bench;
use crate::case::Case;

/// Everything that `kernels` measures, in the order of the table.
pub(crate) fn all(bench: &Bench) -> Vec<Case> {
    let families = [
        codec::cases,
        matmul::cases,
        low_rank::cases,
        dora::cases,
        attention::cases,
        paged_attention::cases,
        delta_rule::cases,
    ];
    families.into_iter().flat_map(|cases| cases(bench)).collect()
}

/// The cases of which something is asked.
pub(crate) fn bars(bench: &Bench) -> Vec<Case> {
    bars::cases(bench)
}

/// Candidates for the fastest dense product. Burn's own is tuned for minutes and slower than ours where we have one.
pub(crate) fn peak(bench: &Bench) -> Vec<Case> {
    match matmul::peak(bench) {
        ours if ours.is_empty() => burn::peak(bench),
        ours => ours,
    }
}
