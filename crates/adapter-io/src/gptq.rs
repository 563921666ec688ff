//! GPTQ (Frantar et al., arXiv 2210.17323): 4-bit weights that keep a layer's output, not each weight.
//!
//! Given H = X^T X over calibration inputs X [tokens, in], the columns of W are rounded one after the other,
//! and what a column's rounding does to the output is undone as well as possible by the columns still to
//! come (eq. 2 and 3): with U^T U = (H + damping)^-1, U upper, column i's error e = (w_i - q_i) / U_ii, and
//! every later column j loses e U_ij. Rows of W are independent, so they are the threads' work.
//!
//! Groups of `group_size` inputs of one output share an f16 scale; codes are symmetric around 8. Asymmetric
//! codes are left out: the fast kernels of vLLM do not take them, and the first version of the format cannot
//! hold a zero point of 0. Scales are rounded to f16 before the codes are chosen, so that the errors that are
//! undone are those that an engine will see.
//!
//! With `act_order` columns go in the order of falling H_ii, so that the inputs that matter most are rounded
//! while the most columns are left to correct; groups then hold inputs that are not neighbours (`g_idx`).
//!
//! In memory, for a module X: `X.qweight` I32 [in/8, out] (eight inputs in one word, the first in the low
//! bits), `X.qzeros` I32 [groups, out/8] (zero point less one), `X.scales` F16 [groups, out], `X.g_idx` I32 \[in\].

use half::f16;
use rayon::prelude::*;
use safetensors::Dtype;

use crate::cholesky::upper_of_inverse;
use crate::error::FormatError;
use crate::header::TensorSpec;
use crate::linalg::Matrix;

/// The code of 0.
const ZERO: i32 = 8;
/// Codes in a word.
const PER_WORD: usize = 8;
/// Rows that a thread works on together, to read each row of U once for all of them.
const TILE: usize = 16;

/// How to quantize.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GptqOptions {
    /// Inputs that share a scale; all of an output's when `None` (-1 in the files).
    pub group_size: Option<usize>,
    /// Columns in the order of falling H_ii (`desc_act`).
    pub act_order: bool,
    /// Added to the diagonal of H, as a part of its mean.
    pub damp_percent: f64,
}

impl Default for GptqOptions {
    /// Groups of 128, in order, 1 % damping: the paper's.
    fn default() -> Self {
        Self { group_size: Some(128), act_order: false, damp_percent: 0.01 }
    }
}

/// A weight in 4-bit codes.
#[derive(Debug, Clone, PartialEq)]
pub struct GptqWeight {
    /// Outputs and inputs, as the weight has them.
    pub shape: [usize; 2],
    /// 0 to 15, row-major [out, in].
    pub codes: Vec<u8>,
    /// Row-major [groups, out].
    pub scales: Vec<f16>,
    /// The group of each input.
    pub g_idx: Vec<u32>,
}

impl GptqOptions {
    /// Whether a weight of this shape can be written.
    ///
    /// # Errors
    /// [`FormatError::Gptq`], which names `module`.
    pub fn check(&self, module: &str, shape: &[usize]) -> Result<[usize; 2], FormatError> {
        let fail = |reason: String| FormatError::Gptq { module: module.to_string(), reason };
        let &[rows, columns] = shape else { return Err(fail(format!("its weight {shape:?} is no matrix"))) };
        let group = self.group_size.unwrap_or(columns);
        if rows == 0 || columns == 0 || !rows.is_multiple_of(PER_WORD) || !columns.is_multiple_of(PER_WORD) {
            return Err(fail(format!("its weight {shape:?} does not divide by 8; leave it out (skip_modules)")));
        }
        if group == 0 || !columns.is_multiple_of(group) {
            return Err(fail(format!(
                "its {columns} inputs do not divide into groups of {group}; choose another group_size, or leave it out (skip_modules)"
            )));
        }
        if !(0.0..1.0).contains(&self.damp_percent) {
            return Err(fail(format!("damp_percent is {}; it must lie in [0, 1)", self.damp_percent)));
        }
        Ok([rows, columns])
    }
}

/// The scale of a group: its largest magnitude is 7.5 steps away from 0.
fn scale_of(group: impl Iterator<Item = f32>) -> f32 {
    let largest = group.fold(0.0f32, |m, x| m.max(x.abs()));
    // The smallest normal f16 keeps a group of tiny weights from dividing by zero.
    f16::from_f32(largest * 2.0 / 15.0).to_f32().clamp(6.103_515_6e-5, 65504.0)
}

fn code(x: f32, scale: f32) -> i32 {
    ((x / scale).round() as i32 + ZERO).clamp(0, 15)
}

impl GptqWeight {
    /// Rounds every weight to the nearest code: what GPTQ has to beat.
    ///
    /// # Shapes
    /// `weight` [out, in].
    ///
    /// # Errors
    /// As [`GptqOptions::check`].
    pub fn round_to_nearest(
        module: &str,
        weight: &[f32],
        shape: &[usize],
        options: &GptqOptions,
    ) -> Result<Self, FormatError> {
        let order: Vec<usize> = (0..shape.last().copied().unwrap_or(0)).collect();
        Self::quantize_in(module, weight, shape, options, &order, None)
    }

    /// GPTQ.
    ///
    /// # Shapes
    /// `weight` [out, in], `hessian` = X^T X [in, in], symmetric; its scale does not matter.
    ///
    /// # Errors
    /// [`FormatError::Gptq`] for shapes that do not fit, and a Hessian that is not positive definite even
    /// with damping (inputs that are not finite); as [`GptqOptions::check`].
    pub fn quantize(
        module: &str,
        weight: &[f32],
        shape: &[usize],
        hessian: &[f32],
        options: &GptqOptions,
    ) -> Result<Self, FormatError> {
        let fail = |reason: String| FormatError::Gptq { module: module.to_string(), reason };
        let [_, columns] = options.check(module, shape)?;
        if hessian.len() != columns * columns {
            return Err(fail(format!(
                "its Hessian has {} entries, {columns} inputs need {}",
                hessian.len(),
                columns * columns
            )));
        }
        let diagonal: Vec<f64> = (0..columns).map(|i| f64::from(hessian[i * columns + i])).collect();
        let mean = diagonal.iter().sum::<f64>() / columns as f64;
        if !mean.is_finite() || mean <= 0.0 {
            return Err(fail(
                "its Hessian is zero or not finite; collect it from more, or other, calibration rows".into(),
            ));
        }
        let mut order: Vec<usize> = (0..columns).collect();
        if options.act_order {
            order.sort_by(|&i, &j| diagonal[j].total_cmp(&diagonal[i]).then(i.cmp(&j)));
        }
        let mut damped = Matrix::zeros(columns, columns);
        for (i, &from) in order.iter().enumerate() {
            let row = &hessian[from * columns..][..columns];
            damped.row_mut(i).iter_mut().zip(&order).for_each(|(h, &column)| *h = f64::from(row[column]));
            // An input that was always zero takes no part; any weight will do for it.
            let dead = if diagonal[from] == 0.0 { mean } else { 0.0 };
            damped.row_mut(i)[i] += options.damp_percent * mean + dead;
        }
        let upper = upper_of_inverse(&damped).map_err(|row| {
            fail(format!(
                "its Hessian is not positive definite at input {}; raise damp_percent or calibrate on more rows",
                order[row]
            ))
        })?;
        let upper: Vec<f32> = upper.data.iter().map(|x| *x as f32).collect();
        Self::quantize_in(module, weight, shape, options, &order, Some(&upper))
    }

    fn quantize_in(
        module: &str,
        weight: &[f32],
        shape: &[usize],
        options: &GptqOptions,
        order: &[usize],
        upper: Option<&[f32]>,
    ) -> Result<Self, FormatError> {
        let [rows, columns] = options.check(module, shape)?;
        if weight.len() != rows * columns || weight.iter().any(|x| !x.is_finite()) {
            let reason = format!("its weight has {} values for {shape:?}, or one that is not finite", weight.len());
            return Err(FormatError::Gptq { module: module.to_string(), reason });
        }
        let group = options.group_size.unwrap_or(columns);
        let groups = columns / group;
        let mut codes = vec![0u8; rows * columns];
        // [out, groups] here: a row's scales are one thread's.
        let mut scales = vec![0.0f32; rows * groups];
        let tiles = codes.par_chunks_mut(TILE * columns).zip(scales.par_chunks_mut(TILE * groups));
        tiles.enumerate().for_each(|(tile, (codes, scales))| {
            let first = tile * TILE;
            let count = scales.len() / groups;
            // The rows in the order of columns that is worked through.
            let mut work: Vec<f32> = Vec::with_capacity(count * columns);
            for row in first..first + count {
                work.extend(order.iter().map(|&column| weight[row * columns + column]));
            }
            for i in 0..columns {
                for r in 0..count {
                    let row = &mut work[r * columns..][..columns];
                    if i % group == 0 {
                        scales[r * groups + i / group] = scale_of(row[i..i + group].iter().copied());
                    }
                    let scale = scales[r * groups + i / group];
                    let code = code(row[i], scale);
                    codes[r * columns + order[i]] = code as u8;
                    if let Some(upper) = upper {
                        let u = &upper[i * columns..][..columns];
                        let error = (row[i] - scale * (code - ZERO) as f32) / u[i];
                        row[i + 1..].iter_mut().zip(&u[i + 1..]).for_each(|(w, u)| *w -= error * u);
                    }
                }
            }
        });
        let mut g_idx = vec![0u32; columns];
        order.iter().enumerate().for_each(|(i, &column)| g_idx[column] = (i / group) as u32);
        let by_group = (0..groups).flat_map(|g| (0..rows).map(move |row| (row, g)));
        let scales = by_group.map(|(row, g)| f16::from_f32(scales[row * groups + g])).collect();
        Ok(Self { shape: [rows, columns], codes, scales, g_idx })
    }

    /// The weights that an engine computes with, [out, in].
    pub fn dequantize(&self) -> Vec<f32> {
        let [rows, columns] = self.shape;
        let value = |i: usize| {
            let (row, column) = (i / columns, i % columns);
            let scale = self.scales[self.g_idx[column] as usize * rows + row].to_f32();
            scale * (i32::from(self.codes[i]) - ZERO) as f32
        };
        (0..rows * columns).into_par_iter().map(value).collect()
    }

    /// How far the layer's outputs are off, relative to their size: |X (W - Q)^T| / |X W^T|, from the Hessian.
    pub fn output_error(&self, weight: &[f32], hessian: &[f32]) -> f64 {
        let columns = self.shape[1];
        // x H x^T for a row x: the squared norm of its outputs over the calibration inputs.
        let energy = |x: &[f32]| -> f64 {
            let row =
                |(xi, h): (&f32, &[f32])| f64::from(*xi) * h.iter().zip(x).map(|(h, x)| f64::from(h * x)).sum::<f64>();
            x.iter().zip(hessian.chunks_exact(columns)).map(row).sum()
        };
        let quantized = self.dequantize();
        let sums = weight.par_chunks_exact(columns).zip(quantized.par_chunks_exact(columns)).map(|(w, q)| {
            let rest: Vec<f32> = w.iter().zip(q).map(|(w, q)| w - q).collect();
            (energy(&rest), energy(w))
        });
        let (error, whole) = sums.reduce(|| (0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
        if whole > 0.0 { (error / whole).max(0.0).sqrt() } else { 0.0 }
    }

    /// The tensors that make up the module in a checkpoint, with their bytes.
    pub fn to_tensors(&self, module: &str) -> Vec<(TensorSpec, Vec<u8>)> {
        let [rows, columns] = self.shape;
        let groups = self.scales.len() / rows;
        let mut qweight = vec![0u32; columns / PER_WORD * rows];
        qweight.par_chunks_mut(rows).enumerate().for_each(|(word, out)| {
            for (row, o) in out.iter_mut().enumerate() {
                let codes = &self.codes[row * columns + word * PER_WORD..][..PER_WORD];
                *o = codes.iter().enumerate().fold(0, |bits, (k, code)| bits | u32::from(*code) << (4 * k));
            }
        });
        // Every zero point is 8, written as 7.
        let qzeros = vec![0x7777_7777u32; groups * rows / PER_WORD];
        let data: [Vec<u8>; 4] = [
            bytemuck::cast_slice(&qweight).to_vec(),
            bytemuck::cast_slice(&qzeros).to_vec(),
            bytemuck::cast_slice(&self.scales).to_vec(),
            bytemuck::cast_slice(&self.g_idx).to_vec(),
        ];
        specs(module, self.shape, groups).into_iter().zip(data).collect()
    }
}

/// The tensors of a module in a checkpoint.
pub(crate) fn specs(module: &str, [rows, columns]: [usize; 2], groups: usize) -> [TensorSpec; 4] {
    let spec = |name: &str, dtype, shape: &[usize]| TensorSpec::new(format!("{module}.{name}"), dtype, shape);
    [
        spec("qweight", Dtype::I32, &[columns / PER_WORD, rows]),
        spec("qzeros", Dtype::I32, &[groups, rows / PER_WORD]),
        spec("scales", Dtype::F16, &[groups, rows]),
        spec("g_idx", Dtype::I32, &[columns]),
    ]
}
