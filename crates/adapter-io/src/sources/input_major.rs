//! GPTQ's and AWQ's weights: inputs go down, outputs across, as their kernels read them.
//!
//! GPTQ [in * bits / 32, out]: a word has consecutive inputs of one output, the first in the low bits. AWQ [in,
//! out / 8]: a word has eight outputs of one input, in the order 0 2 4 6 1 3 5 7 from the low bits. Zero points
//! [groups, out * bits / 32] lie in words across, AWQ's in the same order. GPTQ's first version holds them less one:
//! a stored 15 of 4 bits then is a zero point of 16, as vLLM and AutoGPTQ read it.

use std::ops::Range;

use bytemuck::Pod;
use nf4_quant::Element;

use super::lookup;
use super::scales::{Scales, word};

/// Outputs that are worked on together, so that a line of the words that lie across is used while it is in the cache:
/// it holds 16 of GPTQ's, and 128 of AWQ's.
const TILE: [usize; 2] = [16, 64];
/// Inputs whose words are brought together before they are looked up.
const RUN: usize = 128;
/// Where AWQ has each of eight outputs: in this nibble.
const NIBBLE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// How words hold codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// Consecutive inputs, of so many bits.
    Inputs(usize),
    /// Eight outputs of 4 bits.
    Outputs,
}

/// A weight.
#[derive(Debug, Clone)]
pub(super) struct InputMajor<'a> {
    pub order: Order,
    pub codes: &'a [u8],
    pub zeros: &'a [u8],
    /// What is added to a stored zero point.
    pub add: u32,
    pub scales: Scales<'a>,
    pub outputs: usize,
    /// Inputs that share a scale.
    pub group: usize,
    /// The group of each input, where it is not that of its place.
    pub groups: Option<Vec<u32>>,
}

fn at(words: &[u8], i: usize) -> u32 {
    word(words, i).map_or(0, u32::from_le_bytes)
}

impl InputMajor<'_> {
    fn zero(&self, group: usize, output: usize) -> f32 {
        let (bits, place) = match self.order {
            Order::Inputs(bits) => (bits, output % (32 / bits)),
            Order::Outputs => (4, NIBBLE[output % 8]),
        };
        let each = 32 / bits;
        let word = at(self.zeros, group * self.outputs.div_ceil(each) + output / each);
        (((word >> (place * bits)) & ((1 << bits) - 1)) + self.add) as f32
    }

    fn group_of(&self, input: usize) -> usize {
        self.groups.as_ref().map_or(input / self.group, |groups| groups[input] as usize)
    }

    /// Decodes a rectangle of the weight [out, in]; its rows lie `stride` apart in `out`.
    pub(super) fn tile<E: Element + Pod>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        out: &mut [E],
        stride: usize,
    ) {
        let values: [f32; 16] = std::array::from_fn(|code| code as f32);
        let groups = match &self.groups {
            None => columns.start / self.group..(columns.end - 1) / self.group + 1,
            Some(groups) => 0..groups[columns.clone()].iter().max().map_or(0, |g| *g as usize + 1),
        };
        let tile = TILE[usize::from(self.order == Order::Outputs)];
        let mut row = rows.start;
        while row < rows.end {
            let end = ((row / tile + 1) * tile).min(rows.end);
            let to = &mut out[(row - rows.start) * stride..];
            match self.order {
                Order::Inputs(8) => self.bytes(row..end, columns.clone(), to, stride),
                _ => {
                    // Tables of a group's rows lie side by side.
                    let mut tables: Vec<[E; 16]> = Vec::with_capacity(groups.len() * (end - row));
                    for group in groups.clone() {
                        tables.extend((row..end).map(|row| {
                            let scale = self.scales.at(group * self.outputs + row);
                            lookup::table(&values, self.zero(group, row), scale)
                        }));
                    }
                    let tables = Tables { all: &tables, first: groups.start, rows: end - row };
                    match self.order {
                        Order::Inputs(_) => self.words_of_inputs(row..end, columns.clone(), to, stride, &tables),
                        Order::Outputs => self.words_of_outputs(row..end, columns.clone(), to, stride, &tables),
                    }
                }
            }
            row = end;
        }
    }

    /// GPTQ in 4 bits.
    fn words_of_inputs<E: Element + Pod>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        out: &mut [E],
        stride: usize,
        tables: &Tables<'_, E>,
    ) {
        let mut codes = [0; RUN / 2];
        let mut column = columns.start;
        while column < columns.end {
            let (run, whole) = self.run(column, &columns);
            for row in rows.clone() {
                let i = row - rows.start;
                let to = &mut out[i * stride + run.start - columns.start..][..run.len()];
                if whole && self.groups.is_none() {
                    for (j, bytes) in codes.as_chunks_mut::<4>().0.iter_mut().take(run.len() / 8).enumerate() {
                        *bytes = at(self.codes, (run.start / 8 + j) * self.outputs + row).to_le_bytes();
                    }
                    lookup::pairs(&codes[..run.len() / 2], tables.of(run.start / self.group, i), to);
                } else {
                    for (input, to) in run.clone().zip(to) {
                        let word = at(self.codes, input / 8 * self.outputs + row);
                        *to = tables.of(self.group_of(input), i)[(word >> (4 * (input % 8))) as usize & 15];
                    }
                }
            }
            column = run.end;
        }
    }

    /// Inputs from `first` on that are worked on together: of one group where groups count up, and whole words if any.
    fn run(&self, first: usize, columns: &Range<usize>) -> (Range<usize>, bool) {
        let of_group = match &self.groups {
            None => (first / self.group + 1) * self.group,
            Some(_) => columns.end,
        };
        let end = (first + RUN).min(of_group).min(columns.end);
        let words = end / 8 * 8;
        match first.is_multiple_of(8) && words > first {
            true => (first..words, true),
            // Up to where words are whole again.
            false => (first..end.min((first / 8 + 1) * 8), false),
        }
    }

    /// AWQ.
    fn words_of_outputs<E: Element + Pod>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        out: &mut [E],
        stride: usize,
        tables: &Tables<'_, E>,
    ) {
        let across = self.outputs / 8;
        let (mut words, mut codes) = ([0; RUN], [0; RUN]);
        let mut column = columns.start;
        while column < columns.end {
            let group = column / self.group;
            let run = column..(column + RUN).min((group + 1) * self.group).min(columns.end);
            for row in rows.clone() {
                if row == rows.start || row % 8 == 0 {
                    for (input, word) in run.clone().zip(&mut words) {
                        *word = at(self.codes, input * across + row / 8);
                    }
                }
                let (i, shift) = (row - rows.start, 4 * NIBBLE[row % 8]);
                let codes = &mut codes[..run.len()];
                codes.iter_mut().zip(&words).for_each(|(code, word)| *code = (word >> shift) as u8);
                let to = &mut out[i * stride + run.start - columns.start..][..run.len()];
                lookup::singles(codes, tables.of(group, i), to);
            }
            column = run.end;
        }
    }

    /// GPTQ in 8 bits, where a table would be as large as what it is for.
    fn bytes<E: Element>(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [E], stride: usize) {
        let (mut codes, mut floats) = ([0_u8; RUN], [0.0; RUN]);
        let mut column = columns.start;
        while column < columns.end {
            let (run, whole) = self.run(column, &columns);
            for row in rows.clone() {
                let to = &mut out[(row - rows.start) * stride + run.start - columns.start..][..run.len()];
                let floats = &mut floats[..run.len()];
                if whole && self.groups.is_none() {
                    for (j, bytes) in codes.as_chunks_mut::<4>().0.iter_mut().take(run.len() / 4).enumerate() {
                        *bytes = at(self.codes, (run.start / 4 + j) * self.outputs + row).to_le_bytes();
                    }
                    let group = run.start / self.group;
                    let (zero, scale) = (self.zero(group, row), self.scales.at(group * self.outputs + row));
                    floats.iter_mut().zip(&codes).for_each(|(x, code)| *x = (f32::from(*code) - zero) * scale);
                } else {
                    for (input, x) in run.clone().zip(floats.iter_mut()) {
                        let group = self.group_of(input);
                        let (zero, scale) = (self.zero(group, row), self.scales.at(group * self.outputs + row));
                        let code = (at(self.codes, input / 4 * self.outputs + row) >> (8 * (input % 4))) & 255;
                        *x = (code as f32 - zero) * scale;
                    }
                }
                E::narrow(floats, to);
            }
            column = run.end;
        }
    }
}

/// The values of all codes of some groups and rows.
struct Tables<'a, E> {
    all: &'a [[E; 16]],
    first: usize,
    rows: usize,
}

impl<E> Tables<'_, E> {
    fn of(&self, group: usize, row: usize) -> &[E; 16] {
        &self.all[(group - self.first) * self.rows + row]
    }
}
