//! The scalar oracle: the definitions, summed in f64.

use super::{FactorLayout, Shape};
use crate::{Dropout, FloatFormat};
use half::{bf16, f16};

/// The nearest value of the format.
pub fn round(value: f32, format: FloatFormat) -> f32 {
    match format {
        FloatFormat::BF16 => bf16::from_f32(value).to_f32(),
        FloatFormat::F16 => f16::from_f32(value).to_f32(),
        FloatFormat::F32 => value,
    }
}

/// `x` as the products see it: masked and scaled, not rounded.
pub fn masked(x: &[f32], dropout: Option<Dropout>) -> Vec<f64> {
    let factor = |i: usize| dropout.map_or(1.0, |dropout| dropout.factor(i as u32));
    x.iter().enumerate().map(|(i, &x)| f64::from(x) * f64::from(factor(i))).collect()
}

/// [`super::project`], not rounded: `scaling · masked(x) factorᵀ` of the factor rounded to the format.
///
/// # Shapes
/// `x` `[tokens, features]` of values of the format, `factor` as `layout` says, output `[tokens, rank]`.
pub fn project(
    x: &[f32],
    factor: &[f32],
    shape: Shape,
    layout: FactorLayout,
    scaling: f32,
    dropout: Option<Dropout>,
    format: FloatFormat,
) -> Vec<f64> {
    let Shape { tokens, features, rank } = shape;
    let x = masked(x, dropout);
    let mut out = Vec::with_capacity(tokens * rank);
    for t in 0..tokens {
        for r in 0..rank {
            let products = (0..features).map(|f| {
                let factor = factor[layout.index(f, r, features, rank)];
                x[t * features + f] * f64::from(round(factor, format))
            });
            out.push(products.sum::<f64>() * f64::from(scaling));
        }
    }
    out
}

/// [`super::gradient`]: `productᵀ masked(x)`, transposed as `layout` says.
///
/// # Shapes
/// `x` `[tokens, features]` and `product` `[tokens, rank]` of values of the format.
pub fn gradient(x: &[f32], product: &[f32], shape: Shape, layout: FactorLayout, dropout: Option<Dropout>) -> Vec<f64> {
    let Shape { tokens, features, rank } = shape;
    let x = masked(x, dropout);
    let mut out = vec![0.0; features * rank];
    for f in 0..features {
        for r in 0..rank {
            let products = (0..tokens).map(|t| x[t * features + f] * f64::from(product[t * rank + r]));
            out[layout.index(f, r, features, rank)] = products.sum();
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two tokens, three features, rank one: 1 2 3 / 4 5 6, by 1 10 100.
    const X: [f32; 6] = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
    const SHAPE: Shape = Shape { tokens: 2, features: 3, rank: 1 };

    #[test]
    fn products_by_hand() {
        for layout in [FactorLayout::RankFirst, FactorLayout::FeaturesFirst] {
            let u = project(&X, &[1.0, 10.0, 100.0], SHAPE, layout, 0.5, None, FloatFormat::BF16);
            assert_eq!(u, [160.5, 327.0]);
            let d = gradient(&X, &[1.0, 10.0], SHAPE, layout, None);
            assert_eq!(d, [41.0, 52.0, 63.0]);
        }
    }

    #[test]
    fn a_factor_of_rank_two_is_read_either_way() {
        let shape = Shape { rank: 2, ..SHAPE };
        let rank_first =
            project(&X, &[1.0, 0.0, 0.0, 0.0, 1.0, 2.0], shape, FactorLayout::RankFirst, 1.0, None, FloatFormat::F16);
        let features_first = project(
            &X,
            &[1.0, 0.0, 0.0, 1.0, 0.0, 2.0],
            shape,
            FactorLayout::FeaturesFirst,
            1.0,
            None,
            FloatFormat::F16,
        );
        assert_eq!(rank_first, [1.0, 8.0, 4.0, 17.0]);
        assert_eq!(features_first, rank_first);
    }

    #[test]
    fn masked_values_are_zero_or_scaled() {
        let dropout = Dropout { seed: 1, threshold: 1 << 15, scale: 2.0 };
        let masked = masked(&X, Some(dropout));
        for (i, (value, x)) in masked.iter().zip(X).enumerate() {
            let kept = dropout.factor(i as u32) == 2.0;
            assert_eq!(*value, if kept { 2.0 * f64::from(x) } else { 0.0 }, "{i}");
        }
        assert!(masked.contains(&0.0) && masked.iter().any(|value| *value != 0.0), "{masked:?}");
    }
}
