//! The transpose of a matrix, or of every few of its columns: experts whose files have inputs first, and the columns of gate and input
//! projection taking turns.

use std::ops::Range;

use bytemuck::Pod;
use half::{bf16, f16};
use nf4_quant::Element;
use safetensors::Dtype;

use super::coded::Coded;
use crate::checkpoint::Checkpoint;
use crate::error::FormatError;

/// Columns `first`, `first + step`, .. of a matrix `[rows, columns]`, as rows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turned<'a> {
    pub matrix: Matrix<'a>,
    pub rows: usize,
    pub columns: usize,
    pub first: usize,
    pub step: usize,
}

/// Where the values of the matrix are.
#[derive(Debug, Clone, Copy)]
pub(super) enum Matrix<'a> {
    Stored(&'a [u8]),
    /// From this element on.
    Coded(&'a Coded, &'a Checkpoint, usize),
}

impl Turned<'_> {
    /// The elements from `start` on, as many as `to` has bytes for.
    pub(super) fn read(&self, dtype: Dtype, start: usize, to: &mut [u8]) -> Result<(), FormatError> {
        match dtype {
            Dtype::F32 => self.read_as::<f32>(dtype, start, to),
            Dtype::F16 => self.read_as::<f16>(dtype, start, to),
            Dtype::BF16 => self.read_as::<bf16>(dtype, start, to),
            _ => match dtype.bitsize() {
                8 => self.gather::<1>(start, to),
                64 => self.gather::<8>(start, to),
                32 => self.gather::<4>(start, to),
                _ => self.gather::<2>(start, to),
            },
        }
    }

    fn read_as<E: Element + Pod>(&self, dtype: Dtype, start: usize, to: &mut [u8]) -> Result<(), FormatError> {
        if let Matrix::Coded(coded, checkpoint, offset) = self.matrix
            && let Some(stack) = coded.stacked(checkpoint)?
        {
            // The codes lie in this order.
            let expert = offset / (self.rows * self.columns);
            let mut values = vec![E::zeroed(); to.len() / size_of::<E>()];
            let tables = stack.tables();
            let (mut at, mut rest) = (start, &mut values[..]);
            while !rest.is_empty() {
                let (output, input) = (at / self.rows, at % self.rows);
                let (now, after) = rest.split_at_mut(rest.len().min(self.rows - input));
                stack.output(expert, self.first + self.step * output, input, &tables, now);
                at += now.len();
                rest = after;
            }
            to.copy_from_slice(bytemuck::cast_slice(&values));
            return Ok(());
        }
        match dtype {
            Dtype::F32 => self.gather::<4>(start, to),
            _ => self.gather::<2>(start, to),
        }
    }

    /// Elements of `N` bytes, row by row of the matrix.
    fn gather<const N: usize>(&self, start: usize, to: &mut [u8]) -> Result<(), FormatError> {
        let to = to.as_chunks_mut::<N>().0;
        let range = start..start + to.len();
        let outputs = start / self.rows..range.end.div_ceil(self.rows);
        let columns = self.first + self.step * outputs.start..self.first + self.step * (outputs.end - 1) + 1;
        let mut decoded = Vec::new();
        for input in 0..self.rows {
            let span = input * self.columns + columns.start..input * self.columns + columns.end;
            let span = self.bytes::<N>(span, &mut decoded)?;
            for (output, value) in outputs.clone().zip(span.as_chunks::<N>().0.iter().step_by(self.step)) {
                let at = output * self.rows + input;
                if range.contains(&at) {
                    to[at - range.start] = *value;
                }
            }
        }
        Ok(())
    }

    /// Elements of the matrix.
    fn bytes<'b, const N: usize>(
        &'b self,
        span: Range<usize>,
        decoded: &'b mut Vec<u8>,
    ) -> Result<&'b [u8], FormatError> {
        match self.matrix {
            Matrix::Stored(data) => Ok(&data[span.start * N..span.end * N]),
            Matrix::Coded(coded, checkpoint, offset) => {
                decoded.resize(span.len() * N, 0);
                coded.decode(checkpoint, offset + span.start, decoded)?;
                Ok(decoded)
            }
        }
    }
}
