//! How two sets of numbers are compared: element by element.

use anyhow::{Result, anyhow};
use burn::tensor::Tensor;

/// A tensor's elements as f32, on the host.
pub(crate) fn to_vec<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    tensor.try_into_vec_as::<f32>().map_err(|e| anyhow!("reading a tensor back: {e:?}"))
}

/// The largest absolute difference; infinite when lengths differ or one side is not a number.
pub(crate) fn max_abs_diff(ours: &[f32], theirs: &[f32]) -> f64 {
    if ours.len() != theirs.len() {
        return f64::INFINITY;
    }
    let diffs = ours.iter().zip(theirs).map(|(a, b)| {
        let diff = (f64::from(*a) - f64::from(*b)).abs();
        if diff.is_nan() && a.to_bits() != b.to_bits() { f64::INFINITY } else { diff }
    });
    diffs.fold(0.0, f64::max)
}

/// The logits that were recorded of those of a model with `vocabulary` tokens, where `columns` were recorded of each position: all, or
/// every n-th.
pub(crate) fn recorded_columns(logits: Vec<f32>, vocabulary: usize, columns: usize) -> Vec<f32> {
    if vocabulary == columns || columns == 0 {
        return logits;
    }
    let step = vocabulary.div_ceil(columns);
    logits.chunks(vocabulary).flat_map(|position| position.iter().copied().step_by(step)).collect()
}

/// The largest magnitude.
pub(crate) fn max_abs(x: &[f32]) -> f64 {
    x.iter().fold(0.0, |m, v| m.max(f64::from(v.abs())))
}

/// How many entries differ; a missing entry differs.
pub(crate) fn count_different<T: PartialEq>(ours: &[T], theirs: &[T]) -> f64 {
    let differing = ours.iter().zip(theirs).filter(|(a, b)| a != b).count();
    (differing + ours.len().abs_diff(theirs.len())) as f64
}

/// How many floats differ in any bit.
pub(crate) fn count_different_bits(ours: &[f32], theirs: &[f32]) -> f64 {
    let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    count_different(&bits(ours), &bits(theirs))
}

/// The distance of two floats in units in the last place.
pub(crate) fn ulps(a: f32, b: f32) -> f64 {
    let ordered = |x: f32| {
        let bits = i64::from(x.to_bits() as i32);
        if bits < 0 { i64::from(i32::MIN) - bits } else { bits }
    };
    if a.is_nan() || b.is_nan() { f64::INFINITY } else { (ordered(a) - ordered(b)).unsigned_abs() as f64 }
}

/// |ours - theirs| / |theirs|.
pub(crate) fn relative(ours: f64, theirs: f64) -> f64 {
    if ours == theirs { 0.0 } else { (ours - theirs).abs() / theirs.abs() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_unequal_passes_for_equal() {
        assert_eq!(max_abs_diff(&[1.0, 2.0], &[1.0, 2.5]), 0.5);
        assert_eq!(max_abs_diff(&[1.0], &[1.0, 2.0]), f64::INFINITY);
        assert_eq!(max_abs_diff(&[f32::NAN], &[1.0]), f64::INFINITY);
        assert_eq!(max_abs_diff(&[f32::INFINITY], &[f32::INFINITY]), 0.0);
        assert_eq!(count_different(&[1, 2, 3], &[1, 5]), 2.0);
        let logits = vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0];
        assert_eq!(recorded_columns(logits.clone(), 5, 5), logits);
        assert_eq!(recorded_columns(logits, 5, 3), [0.0, 2.0, 4.0, 5.0, 7.0, 9.0]);
        assert_eq!(count_different_bits(&[0.0], &[-0.0]), 1.0);
        assert_eq!(ulps(1.0, 1.0 + f32::EPSILON), 1.0);
        assert_eq!(ulps(-f32::from_bits(1), f32::from_bits(1)), 2.0);
        assert_eq!(relative(0.0, 0.0), 0.0);
        assert_eq!(relative(1.0, 0.0), f64::INFINITY);
    }
}
