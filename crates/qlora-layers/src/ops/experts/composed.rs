//! Products expert by expert, for backends without kernels for groups.

use std::ops::Range;

use burn::backend::TensorMetadata;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{Shape, Slice};
use nf4_quant::matmul::Direction;

use super::{ExpertParts, RoutedRows, Stacked4bit};
use crate::ops::{LoraFactor, float_dtype};

/// Each expert's first row, and the number of rows; `None` when the device failed.
fn offsets<B: ExpertParts>(routed: &RoutedRows<B>) -> Option<&[usize]> {
    let routing = &routed.host.routing;
    let read = || {
        let words = B::read_words(&routed.words).unwrap_or_default();
        let offsets = words.get(routing.offsets()).unwrap_or_default();
        offsets.iter().map(|word| *word as usize).collect()
    };
    let offsets = routed.host.offsets.get_or_init(read);
    let sound = offsets.last() == Some(&routing.rows()) && offsets.is_sorted();
    sound.then_some(offsets)
}

/// Rows of a matrix.
pub(super) fn rows_of<B: ExpertParts>(x: &FloatTensor<B>, rows: Range<usize>) -> FloatTensor<B> {
    let columns = x.shape()[1];
    B::float_slice(x.clone(), &[Slice::from(rows), Slice::from(0..columns)])
}

/// The rows of all experts, `width` wide in the dtype of `x`, one expert after the other by `run`. A device that failed has no
/// rows to go by: what follows is not a number, which every reader reports.
fn by_expert<B: ExpertParts>(
    x: &FloatTensor<B>,
    width: usize,
    routed: &RoutedRows<B>,
    run: impl Fn(FloatTensor<B>, usize) -> FloatTensor<B>,
) -> FloatTensor<B> {
    let (dtype, shape) = (float_dtype(x.dtype()), Shape::new([routed.host.routing.rows(), width]));
    let Some(offsets) = offsets(routed) else {
        return B::float_full(shape, f32::NAN.into(), &x.device(), dtype);
    };
    let groups = offsets.windows(2).map(|pair| pair[0]..pair[1]).enumerate().filter(|(_, rows)| !rows.is_empty());
    let parts: Vec<_> = groups.map(|(expert, rows)| run(rows_of::<B>(x, rows), expert)).collect();
    match parts.is_empty() {
        true => B::float_empty(shape, &x.device(), dtype),
        false => B::float_cat(parts, 0),
    }
}

/// An expert's factor, of those that lie one above the other.
fn factor_of<B: ExpertParts>(factor: &FloatTensor<B>, expert: usize, routed: &RoutedRows<B>) -> FloatTensor<B> {
    let rows = factor.shape()[0] / routed.host.routing.experts();
    rows_of::<B>(factor, expert * rows..(expert + 1) * rows)
}

/// [`ExpertParts::expert_project`].
pub(super) fn project<B: ExpertParts>(
    x: &FloatTensor<B>,
    factor: &FloatTensor<B>,
    which: LoraFactor,
    scaling: f32,
    routed: &RoutedRows<B>,
) -> FloatTensor<B> {
    let rank = match which {
        LoraFactor::A => factor.shape()[0] / routed.host.routing.experts(),
        LoraFactor::B => factor.shape()[1],
    };
    by_expert::<B>(x, rank, routed, |x, expert| {
        B::low_rank_project(x, factor_of::<B>(factor, expert, routed), which, scaling, None)
    })
}

/// [`ExpertParts::expert_product`].
pub(super) fn product<B: ExpertParts>(
    x: &FloatTensor<B>,
    weight: &Stacked4bit<B>,
    direction: Direction,
    low_rank: Option<(FloatTensor<B>, FloatTensor<B>)>,
    routed: &RoutedRows<B>,
) -> FloatTensor<B> {
    let width = match direction {
        Direction::Forward => weight.layout.out_features,
        Direction::InputGradient => weight.layout.in_features,
    };
    let dtype = float_dtype(x.dtype());
    // Its rows go the same way as those of x.
    let joined = low_rank.as_ref().map(|(product, factor)| (product, factor));
    let Some((product, factor)) = joined else {
        return by_expert::<B>(x, width, routed, |x, expert| match direction {
            Direction::Forward => B::linear_4bit(x, weight.expert(expert), dtype),
            Direction::InputGradient => B::linear_4bit_input_grad(x, weight.expert(expert)),
        });
    };
    let starts = offsets(routed).unwrap_or_default();
    by_expert::<B>(x, width, routed, |x, expert| {
        let u = rows_of::<B>(product, starts[expert]..starts[expert + 1]);
        let factor = factor_of::<B>(factor, expert, routed);
        match direction {
            Direction::Forward => B::linear_4bit_low_rank(x, weight.expert(expert), u, factor),
            Direction::InputGradient => B::linear_4bit_low_rank_input_grad(x, weight.expert(expert), u, factor, None),
        }
    })
}

/// [`ExpertParts::expert_expand`].
pub(super) fn expand<B: ExpertParts>(
    v: &FloatTensor<B>,
    lora_a: &FloatTensor<B>,
    routed: &RoutedRows<B>,
) -> FloatTensor<B> {
    let dtype = float_dtype(v.dtype());
    by_expert::<B>(v, lora_a.shape()[1], routed, |v, expert| {
        B::matmul(v, B::float_cast(factor_of::<B>(lora_a, expert, routed), dtype), dtype)
    })
}
