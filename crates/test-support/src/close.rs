//! Comparison by element.

use std::fmt::Display;

/// Asserts that every element of `found` is as near to the one of `expected` as `bound` says for the element's
/// number and expected value. NaN is near to nothing.
///
/// # Panics
/// If the lengths differ or an element is too far off; the message has the first of them, and how many there are.
#[track_caller]
pub fn assert_close<F, E>(what: impl Display, found: &[F], expected: &[E], bound: impl Fn(usize, f64) -> f64)
where
    F: Copy + Into<f64>,
    E: Copy + Into<f64>,
{
    assert_eq!(found.len(), expected.len(), "{what}: length");
    let pairs = found.iter().zip(expected).map(|(f, e)| ((*f).into(), (*e).into()));
    let within = |i: usize, f: f64, e: f64| (f - e).abs() <= bound(i, e);
    let mut off = pairs.enumerate().filter(|(i, (f, e))| !within(*i, *f, *e));
    if let Some((i, (f, e))) = off.next() {
        let (others, len, bound) = (off.count(), found.len(), bound(i, e));
        panic!("{what}: element {i} is {f:e}, should be {e:e} within {bound:e}; {} of {len} are off", others + 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_near_passes() {
        assert_close("near", &[1.0_f32, 2.0], &[1.5_f64, 2.0], |i, _| [0.5, 0.0][i]);
    }

    #[test]
    #[should_panic(expected = "far: element 1 is 2e0, should be 1e0 within 1e-1; 1 of 2 are off")]
    fn what_is_far_is_named() {
        assert_close("far", &[1.0_f32, 2.0], &[1.0_f32, 1.0], |_, e| 0.1 * e);
    }

    #[test]
    #[should_panic(expected = "element 0 is NaN")]
    fn nan_is_never_near() {
        assert_close("nan", &[f32::NAN], &[0.0_f32], |_, _| f64::INFINITY);
    }
}
