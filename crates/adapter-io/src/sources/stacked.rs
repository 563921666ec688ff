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
    /// What codes stand for, by the code of their scale.
    pub(super) fn tables<E: Element + Pod>(&self) -> Vec<[E; 16]> {
        (0..=255).map(|code| lookup::table(&E2M1, 0.0, self.scales.of_code(code))).collect()
    }

    /// Decodes an output's inputs from `first` on, in the order in which they lie. `tables` are [`Self::tables`].
    pub(super) fn output<E: Element + Pod>(
        &self,
        expert: usize,
        output: usize,
        first: usize,
        tables: &[[E; 16]],
        to: &mut [E],
    ) {
        let mut side = [E::zeroed(); BLOCK];
        let (mut input, mut rest) = (first, to);
        while !rest.is_empty() {
            let at = (expert * self.outputs + output) * self.blocks + input / BLOCK;
            let table = &tables[usize::from(self.scales.code(at).unwrap_or(255))];
            let codes = &self.codes[at * BLOCK / 2..][..BLOCK / 2];
            let (now, after) = rest.split_at_mut(rest.len().min(BLOCK - input % BLOCK));
            match now.len() {
                BLOCK => lookup::pairs(codes, table, now),
                len => {
                    lookup::pairs(codes, table, &mut side);
                    now.copy_from_slice(&side[input % BLOCK..][..len]);
                }
            }
            input += now.len();
            rest = after;
        }
    }

    /// Decodes a rectangle of [experts * in, out]; its rows lie `stride` apart in `out`.
    pub(super) fn tile<E: Element + Pod>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        out: &mut [E],
        stride: usize,
    ) {
        let tables = self.tables::<E>();
        let mut side = [[E::zeroed(); BLOCK]; BLOCK];
        let mut row = rows.start;
        while row < rows.end {
            // Experts' inputs are whole blocks, so that blocks count on through all of them.
            let (expert, block) = (row / BLOCK / self.blocks, row / BLOCK % self.blocks);
            let end = ((row / BLOCK + 1) * BLOCK).min(rows.end);
            // Blocks of some outputs are decoded side by side, and go out row by row.
            for run in columns.clone().step_by(BLOCK) {
                let run = run..(run + BLOCK).min(columns.end);
                for (column, to) in run.clone().zip(&mut side) {
                    let at = (expert * self.outputs + column) * self.blocks + block;
                    let table = &tables[usize::from(self.scales.code(at).unwrap_or(255))];
                    lookup::pairs(&self.codes[at * BLOCK / 2..][..BLOCK / 2], table, to);
                }
                for row in row..end {
                    let place = (row - rows.start) * stride + run.start - columns.start;
                    let to = &mut out[place..place + run.len()];
                    to.iter_mut().zip(&side).for_each(|(to, block)| *to = block[row % BLOCK]);
                }
            }
            row = end;
        }
    }
}
