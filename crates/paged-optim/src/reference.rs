//! The scalar oracle: updates of one run of elements, as the crate's documentation writes them.
//!
//! The CPU path runs these functions in parallel over blocks; the kernels are compared with them. `factor` is
//! clipping's. All slices of a call have one length; the 8-bit ones take at most one block.

use crate::config::Scalars;
use crate::dynamic_map::{self, DynamicMap, SIGNED_ZERO};
use crate::{BLOCKSIZE, clip_factor};

/// The factor that clipping and the loss scale apply to gradients of norm `norm`; `None` where the norm is not finite and
/// the update is void.
pub fn gradient_factor(norm: f32, s: &Scalars) -> Option<f32> {
    norm.is_finite().then(|| clip_factor(norm * s.unscale, s.max_norm) * s.unscale)
}

/// One AdamW step of an element: the new parameter, and the new moments.
#[inline]
fn adamw_element(p: f32, g: f32, m: f32, v: f32, s: &Scalars) -> (f32, f32, f32) {
    let m = s.beta1 * m + s.rest1 * g;
    let v = s.beta2 * v + s.rest2 * (g * g);
    let denominator = v.sqrt() / s.correction2 + s.eps;
    (p * s.keep - s.step_size * (m / denominator), m, v)
}

/// One Lion step of an element: the new parameter and the new moment.
#[inline]
fn lion_element(p: f32, g: f32, m: f32, s: &Scalars) -> (f32, f32) {
    let direction = s.beta1 * m + s.rest1 * g;
    // Not `signum`, which is 1 at 0.
    let sign = f32::from(direction > 0.0) - f32::from(direction < 0.0);
    (p * s.keep - s.step_size * sign, s.beta2 * m + s.rest2 * g)
}

/// AdamW with 32-bit moments.
pub fn adamw(p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], factor: f32, s: &Scalars) {
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        (*p, *m, *v) = adamw_element(*p, g * factor, *m, *v, s);
    }
}

/// Lion with a 32-bit moment.
pub fn lion(p: &mut [f32], g: &[f32], m: &mut [f32], factor: f32, s: &Scalars) {
    for ((p, g), m) in p.iter_mut().zip(g).zip(m) {
        (*p, *m) = lion_element(*p, g * factor, *m, s);
    }
}

/// A block of a moment in 8 bits.
#[derive(Debug)]
pub struct Block8<'a> {
    /// One code per element.
    pub codes: &'a mut [u8],
    /// What the map's entries are multiplied by.
    pub absmax: &'a mut f32,
}

/// AdamW with 8-bit moments, of one block.
///
/// # Panics
/// On more than [`BLOCKSIZE`] elements.
pub fn adamw_8bit(p: &mut [f32], g: &[f32], m: Block8<'_>, v: Block8<'_>, factor: f32, s: &Scalars) {
    let mut new = [[0.0_f32; BLOCKSIZE]; 2];
    let (signed, unsigned) = (dynamic_map::signed(), dynamic_map::unsigned());
    for (i, (p, g)) in p.iter_mut().zip(g).enumerate() {
        let old_m = signed.values()[usize::from(m.codes[i])] * *m.absmax;
        let old_v = unsigned.values()[usize::from(v.codes[i])] * *v.absmax;
        (*p, new[0][i], new[1][i]) = adamw_element(*p, g * factor, old_m, old_v, s);
    }
    quantize(signed, &new[0][..p.len()], m);
    quantize(unsigned, &new[1][..p.len()], v);
}

/// Lion with an 8-bit moment, of one block.
///
/// # Panics
/// On more than [`BLOCKSIZE`] elements.
pub fn lion_8bit(p: &mut [f32], g: &[f32], m: Block8<'_>, factor: f32, s: &Scalars) {
    let mut new = [0.0_f32; BLOCKSIZE];
    let signed = dynamic_map::signed();
    for (i, (p, g)) in p.iter_mut().zip(g).enumerate() {
        let old = signed.values()[usize::from(m.codes[i])] * *m.absmax;
        (*p, new[i]) = lion_element(*p, g * factor, old, s);
    }
    quantize(signed, &new[..p.len()], m);
}

/// Quantizes one block. In the signed map a negative value never becomes 0, the other side may: bitsandbytes' rule
/// that a moment keeps its sign. A block whose absmax is no normal number counts as zero.
fn quantize(map: &DynamicMap, values: &[f32], block: Block8<'_>) {
    let max = values.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
    *block.absmax = if max < f32::MIN_POSITIVE { 0.0 } else { max };
    for (code, &value) in block.codes.iter_mut().zip(values) {
        let x = if *block.absmax == 0.0 { 0.0 } else { value / max };
        let nearest = map.nearest(x);
        // Negative values are in the signed map only.
        *code = if x < 0.0 && nearest == SIGNED_ZERO { SIGNED_ZERO - 1 } else { nearest };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{OptimizerConfig, OptimizerKind};

    fn grad(t: usize, i: usize) -> f32 {
        (((t * 7 + i * 13) % 11) as f32 * 0.1 - 0.5 + 1e-6 * i as f32) * 10_f32.powi(-((i % 4) as i32))
    }

    const START: [f32; 6] = [0.3, -0.2, 0.0, 1.0, -1.0, 0.5];

    /// The formulas of the crate's documentation in f64.
    #[test]
    fn ten_updates_of_adamw_match_the_formulas() {
        for weight_decay in [0.0, 0.1] {
            let config = OptimizerConfig { weight_decay, ..Default::default() };
            let (mut p, mut m, mut v) = (START, [0.0; 6], [0.0; 6]);
            let (mut p64, mut m64, mut v64) = (START.map(f64::from), [0.0_f64; 6], [0.0_f64; 6]);
            for t in 1..=10 {
                let g: [f32; 6] = std::array::from_fn(|i| grad(t, i));
                adamw(&mut p, &g, &mut m, &mut v, 0.5, &config.scalars(t as u64, 1e-2, 0.0));
                for i in 0..6 {
                    let g = f64::from(g[i]) * 0.5;
                    p64[i] -= 1e-2 * weight_decay * p64[i];
                    m64[i] = 0.9 * m64[i] + 0.1 * g;
                    v64[i] = 0.999 * v64[i] + 0.001 * g * g;
                    let denominator = v64[i].sqrt() / (1.0 - 0.999_f64.powi(t as i32)).sqrt() + 1e-8;
                    p64[i] -= 1e-2 / (1.0 - 0.9_f64.powi(t as i32)) * m64[i] / denominator;
                }
            }
            for (found, expected) in p.iter().zip(p64) {
                // Ten updates of about 1e-2 in f32: a few ulp of 1 each.
                assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} against {expected}");
            }
        }
    }

    #[test]
    fn ten_updates_of_lion_match_the_formulas() {
        let config = OptimizerConfig {
            kind: OptimizerKind::Lion8bit,
            betas: (0.9, 0.99),
            weight_decay: 0.1,
            ..Default::default()
        };
        let (mut p, mut m) = (START, [0.0; 6]);
        let (mut p64, mut m64) = (START.map(f64::from), [0.0_f64; 6]);
        for t in 1..=10 {
            let g: [f32; 6] = std::array::from_fn(|i| if i == 2 { 0.0 } else { grad(t, i) });
            lion(&mut p, &g, &mut m, 1.0, &config.scalars(t as u64, 1e-2, 0.0));
            for i in 0..6 {
                let direction = 0.9 * m64[i] + 0.1 * f64::from(g[i]);
                let sign = if direction == 0.0 { 0.0 } else { direction.signum() };
                p64[i] -= 1e-2 * 0.1 * p64[i] + 1e-2 * sign;
                m64[i] = 0.99 * m64[i] + 0.01 * f64::from(g[i]);
            }
        }
        assert_eq!(p[2], 0.0, "no gradient, no moment, no step");
        for (found, expected) in p.iter().zip(p64) {
            // Ten steps of 1e-2 in f32: a few ulp of 1 each.
            assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} against {expected}");
        }
    }

    #[test]
    fn a_moment_keeps_its_sign_and_a_block_of_zeros_is_zero() {
        let (mut codes, mut absmax) = ([0_u8; 4], 7.0);
        quantize(dynamic_map::signed(), &[1.0, -1e-9, 1e-9, 0.0], Block8 { codes: &mut codes, absmax: &mut absmax });
        assert_eq!((codes, absmax), ([255, 126, 127, 127], 1.0));
        quantize(dynamic_map::signed(), &[0.0; 4], Block8 { codes: &mut codes, absmax: &mut absmax });
        assert_eq!((codes, absmax), ([127; 4], 0.0));
        // An absmax below the normal numbers, which some devices flush to zero.
        quantize(dynamic_map::unsigned(), &[1e-40; 4], Block8 { codes: &mut codes, absmax: &mut absmax });
        assert_eq!((codes, absmax), ([0; 4], 0.0));
    }

    /// Each value comes back within half of the coarsest gap of the map around it.
    #[test]
    fn quantizing_loses_at_most_half_a_gap() {
        for (map, values) in [
            (dynamic_map::signed(), [0.5, -0.03, 0.0021, -1.0, 0.99, 3e-5].as_slice()),
            (dynamic_map::unsigned(), [0.5, 0.03, 0.0021, 1.0, 0.99, 3e-5].as_slice()),
        ] {
            let (mut codes, mut absmax) = ([0_u8; 6], 0.0);
            let scaled: Vec<f32> = values.iter().map(|v| v * 3.0).collect();
            quantize(map, &scaled, Block8 { codes: &mut codes, absmax: &mut absmax });
            for (code, value) in codes.iter().zip(&scaled) {
                let code = usize::from(*code);
                let around = &map.values()[code.saturating_sub(1)..(code + 2).min(256)];
                let gap = around.windows(2).map(|w| w[1] - w[0]).fold(0.0, f32::max) * absmax;
                let found = map.values()[code] * absmax;
                // And the rounding of two products.
                assert!((found - value).abs() <= gap / 2.0 + 1e-6, "{found} against {value}");
            }
        }
    }

    #[test]
    fn a_norm_that_is_not_finite_voids_the_update() {
        let scalars = |max_norm, unscale| Scalars { unscale, ..OptimizerConfig::default().scalars(1, 1e-3, max_norm) };
        assert_eq!(gradient_factor(f32::NAN, &scalars(1.0, 1.0)), None);
        assert_eq!(gradient_factor(f32::INFINITY, &scalars(0.0, 0.5)), None);
        assert_eq!(gradient_factor(3.0, &scalars(0.0, 1.0)), Some(1.0));
        assert_eq!(gradient_factor(3.0, &scalars(0.0, 0.25)), Some(0.25));
        // A scaled norm of 12 is one of 3.
        assert_eq!(gradient_factor(12.0, &scalars(1.5, 0.25)), Some(0.25 * clip_factor(3.0, 1.5)));
    }
}
