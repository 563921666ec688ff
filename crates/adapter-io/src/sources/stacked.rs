//! MXFP4 of gpt-oss: `X_blocks` [experts, out, in / 32, 16] and `X_scales` [experts, out, in / 32].
//!
//! The dense checkpoint has X as [experts, in, out], inputs down: a block of 32 codes becomes a column.

use std::ops::Range;

use bytemuck::Pod;
use nf4_quant::Element;

use super::lookup;
use super::scales::{E2M1, Scales};

/// Codes of a block.
pub(super) const BLOCK: usize = 32;

/// The experts of one projection.
#[derive(Debug, Clone)]
pub(super) struct Stacked<'a> {
    pub codes: &'a [u8],
    pub scales: Scales<'a>,
    /// Blocks of inputs of an output.
    pub blocks: usize,
    pub outputs: usize,
}

impl Stacked<'_> {
    /// Decodes a rectangle of [experts * in, out]; its rows lie `stride` apart in `out`.
    pub(super) fn tile<E: Element + Pod>(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [E], stride: usize) {
        let mut row = rows.start;
        while row < rows.end {
            // Experts' inputs are whole blocks, so that blocks count on through all of them.
            let (expert, block) = (row / BLOCK / self.blocks, row / BLOCK % self.blocks);
            let end = ((row / BLOCK + 1) * BLOCK).min(rows.end);
            for column in columns.clone() {
                let at = (expert * self.outputs + column) * self.blocks + block;
                let scale = self.scales.at(at);
                let table = lookup::table::<E>(&E2M1, 0.0, scale);
                let codes = &self.codes[at * BLOCK / 2..][..BLOCK / 2];
                for row in row..end {
                    let code = codes[row % BLOCK / 2] >> (4 * (row % 2));
                    out[(row - rows.start) * stride + column - columns.start] = table[usize::from(code & 15)];
                }
            }
            row = end;
        }
    }
}
