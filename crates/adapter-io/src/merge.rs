//! Folding an adapter into the weight it adapts: W + scaling * B A.
//!
//! Merging belongs on the full-precision weight: adding the update to a dequantized 4-bit weight and
//! quantizing again rounds the update away. Everything is accumulated in 32-bit floats and rounded to
//! the weight's type once.

use nf4_quant::Element;
use rayon::prelude::*;

use crate::adapter::HostTensor;
use crate::error::FormatError;

/// Multiply-adds below which a product is not worth several threads.
const PARALLEL_FROM: usize = 1 << 16;

/// The update of a weight: `scaling * lora_b @ lora_a`, in 32-bit floats.
///
/// # Shapes
/// `lora_a` [r, in], `lora_b` [out, r]; returns [out, in]. Factors that do not fit are the caller's
/// error ([`crate::Adapter::load`] has checked those of a file); the common rank is used then.
pub fn lora_delta(lora_a: &HostTensor, lora_b: &HostTensor, scaling: f32) -> HostTensor {
    let (rank, columns) = dims(lora_a);
    let (rows, b_rank) = dims(lora_b);
    let rank = rank.min(b_rank);
    let mut data = vec![0.0f32; rows * columns];
    for_each_row(&mut data, columns, rank, |row, out| {
        accumulate_row(lora_a, &lora_b.data[row * b_rank..][..rank], scaling, columns, out);
    });
    HostTensor { shape: vec![rows, columns], data }
}

/// Adds `scaling * lora_b @ lora_a` to a weight; each element is rounded to the weight's type once.
///
/// Returns the largest absolute change of an element, as stored.
///
/// # Shapes
/// `weight` [out, in] row-major, `lora_a` [r, in], `lora_b` [out, r].
///
/// # Errors
/// [`FormatError::Factors`], which names `module`, when the factors do not fit the weight.
pub fn merge_into<E: Element>(
    module: &str,
    weight: &mut [E],
    shape: &[usize],
    lora_a: &HostTensor,
    lora_b: &HostTensor,
    scaling: f32,
) -> Result<f32, FormatError> {
    let ((rank, columns), (rows, b_rank)) = (dims(lora_a), dims(lora_b));
    if shape != [rows, columns] || weight.len() != rows * columns || rank != b_rank {
        return Err(FormatError::Factors {
            module: module.to_string(),
            reason: format!(
                "lora_A {:?} and lora_B {:?} do not fit the weight {shape:?}; the adapter belongs to another base model",
                lora_a.shape, lora_b.shape
            ),
        });
    }
    let merge_row = |row: usize, out: &mut [E], delta: &mut Vec<f32>| -> f32 {
        delta.clear();
        delta.resize(columns, 0.0);
        accumulate_row(lora_a, &lora_b.data[row * rank..][..rank], scaling, columns, delta);
        let mut largest = 0.0f32;
        for (w, d) in out.iter_mut().zip(delta.iter()) {
            let before = w.to_f32();
            *w = E::from_f32(before + d);
            largest = largest.max((w.to_f32() - before).abs());
        }
        largest
    };
    if columns == 0 {
        return Ok(0.0);
    }
    let largest = weight
        .par_chunks_mut(columns)
        .enumerate()
        .map_init(Vec::new, |delta, (row, out)| merge_row(row, out, delta))
        .reduce(|| 0.0, f32::max);
    Ok(largest)
}

/// `out += scaling * (b_row @ lora_a)`: one row of the product, as rank times a scaled row of A, which
/// reads and writes memory forward.
fn accumulate_row(lora_a: &HostTensor, b_row: &[f32], scaling: f32, columns: usize, out: &mut [f32]) {
    for (k, &b) in b_row.iter().enumerate() {
        for (o, a) in out.iter_mut().zip(&lora_a.data[k * columns..][..columns]) {
            *o += b * a;
        }
    }
    // Scaled at the end, as PEFT does: the same rounding.
    for o in out {
        *o *= scaling;
    }
}

fn for_each_row(data: &mut [f32], columns: usize, rank: usize, row: impl Fn(usize, &mut [f32]) + Sync) {
    if columns == 0 {
        return;
    }
    if data.len() * rank < PARALLEL_FROM {
        data.chunks_mut(columns).enumerate().for_each(|(i, out)| row(i, out));
    } else {
        data.par_chunks_mut(columns).enumerate().for_each(|(i, out)| row(i, out));
    }
}

/// Rows and columns, by what the data holds.
fn dims(matrix: &HostTensor) -> (usize, usize) {
    let rows = matrix.shape.first().copied().unwrap_or(0);
    (rows, matrix.data.len().checked_div(rows).unwrap_or(0))
}
