//! Codes in the order of the weight, whose scales form a grid over it.
//!
//! FP8 in blocks, by rows or as a whole, MXFP8, MXFP4, NVFP4, integers of 8 and 4 bits: they differ in what a code
//! stands for and in the blocks' size. A stack of matrices has a grid for each.

use std::ops::Range;

use bytemuck::Pod;
use nf4_quant::Element;

use super::lookup;
use super::scales::{E2M1, E4M3, E5M2, Scales};

/// From so many elements with one scale on, a table of all 256 values is made for them.
const WORTH_A_TABLE: usize = 1024;
/// Elements that are rounded together where there is none.
const PART: usize = 32;

/// What a code is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    /// An 8-bit float with 4 bits of exponent.
    E4M3,
    /// One with 5.
    E5M2,
    /// A signed byte.
    I8,
    /// A byte less 128.
    Offset128,
    /// A 4-bit float; the first of a byte in the low bits.
    E2M1,
    /// A nibble less 8.
    Offset8,
}

impl Code {
    pub(super) fn bits(self) -> usize {
        match self {
            Self::E4M3 | Self::E5M2 | Self::I8 | Self::Offset128 => 8,
            Self::E2M1 | Self::Offset8 => 4,
        }
    }

    /// The values of the codes 0, 1, ..; of 4-bit codes there are 16.
    fn values(self) -> [f32; 256] {
        match self {
            Self::E4M3 => *E4M3,
            Self::E5M2 => *E5M2,
            Self::I8 => std::array::from_fn(|code| f32::from(code as u8 as i8)),
            Self::Offset128 => std::array::from_fn(|code| code as f32 - 128.0),
            Self::E2M1 => std::array::from_fn(|code| E2M1[code % 16]),
            Self::Offset8 => std::array::from_fn(|code| (code % 16) as f32 - 8.0),
        }
    }
}

/// The code of 0 for each scale.
#[derive(Debug, Clone, Copy)]
pub(super) enum Zeros<'a> {
    /// A signed byte for each.
    Bytes(&'a [u8]),
    /// Codes of a group under each other in words, so many bits each, less half their range.
    Packed(&'a [u8], usize),
}

impl Zeros<'_> {
    /// For scale `scale`, which is that of row `row` and group `group` of `groups` where rows have their own.
    fn at(&self, scale: usize, row: usize, group: usize, groups: usize) -> f32 {
        match *self {
            Self::Bytes(bytes) => bytes.get(scale).map_or(f32::NAN, |x| f32::from(*x as i8)),
            Self::Packed(words, bits) => {
                let each = 32 / bits;
                let word = super::scales::word(words, row / each * groups + group).map(u32::from_le_bytes);
                let code = word.map(|word| (word >> (row % each * bits)) & ((1 << bits) - 1));
                code.map_or(f32::NAN, |code| code as f32 - (1 << (bits - 1)) as f32)
            }
        }
    }
}

/// A weight, or a stack of them.
#[derive(Debug, Clone)]
pub(super) struct Grid<'a> {
    pub code: Code,
    pub codes: &'a [u8],
    /// Bytes of a row of codes.
    pub row_bytes: usize,
    /// Rows of one matrix.
    pub rows: usize,
    /// Rows and columns that share a scale.
    pub block: [usize; 2],
    pub scales: Scales<'a>,
    /// Rows and columns of one matrix's scales.
    pub grid: [usize; 2],
    pub zeros: Option<Zeros<'a>>,
    /// The group of each column, where it is not that of its place.
    pub groups: Option<Vec<u32>>,
}

impl Grid<'_> {
    /// Decodes a rectangle; its rows lie `stride` apart in `out`.
    pub(super) fn tile<E: Element + Pod>(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [E], stride: usize) {
        let values = self.code.values();
        let nibble_values: [f32; 16] = std::array::from_fn(|code| values[code]);
        let mut row = rows.start;
        while row < rows.end {
            let (matrix, inside) = (row / self.rows, row % self.rows);
            let band = inside / self.block[0];
            let last = matrix * self.rows + ((band + 1) * self.block[0]).min(self.rows);
            let end = last.min(rows.end);
            let first_scale = (matrix * self.grid[0] + band) * self.grid[1];
            let place = (row - rows.start) * stride;
            let mut column = columns.start;
            while column < columns.end {
                let (group, stop) = match &self.groups {
                    None => (column / self.block[1], (column / self.block[1] + 1) * self.block[1]),
                    Some(groups) => (groups[column] as usize, column + 1),
                };
                let stop = stop.min(columns.end);
                let scale = self.scales.at(first_scale + group);
                let zero = self.zeros.map_or(0.0, |zeros| zeros.at(first_scale + group, row, group, self.grid[1]));
                let value = |code: u8| E::from_f32((values[usize::from(code)] - zero) * scale);
                let to = &mut out[place + column - columns.start..];
                let blocks = to.chunks_mut(stride).take(end - row).enumerate().map(|(i, to)| {
                    let codes = &self.codes[(row + i) * self.row_bytes..][..self.row_bytes];
                    (codes, &mut to[..stop - column])
                });
                match self.code.bits() {
                    4 => {
                        let table = lookup::table::<E>(&nibble_values, zero, scale);
                        blocks.for_each(|(codes, to)| nibbles(codes, column, &table, to));
                    }
                    _ if (end - row) * (stop - column) >= WORTH_A_TABLE => {
                        let table: [E; 256] = std::array::from_fn(|code| value(code as u8));
                        blocks.for_each(|(codes, to)| {
                            to.iter_mut().zip(&codes[column..]).for_each(|(to, code)| *to = table[usize::from(*code)]);
                        });
                    }
                    _ => blocks.for_each(|(codes, to)| {
                        let mut floats = [0.0; PART];
                        for (to, codes) in to.chunks_mut(PART).zip(codes[column..].chunks(PART)) {
                            let floats = &mut floats[..to.len()];
                            let each = floats.iter_mut().zip(codes);
                            each.for_each(|(x, code)| *x = (values[usize::from(*code)] - zero) * scale);
                            E::narrow(floats, to);
                        }
                    }),
                }
                column = stop;
            }
            row = end;
        }
    }
}

/// Looks up nibbles from `first` on.
fn nibbles<E: Element + Pod>(codes: &[u8], first: usize, table: &[E; 16], to: &mut [E]) {
    let odd = first % 2;
    let (head, rest) = to.split_at_mut(odd.min(to.len()));
    if let [to] = head {
        *to = table[usize::from(codes[first / 2] >> 4)];
    }
    let codes = &codes[(first + odd) / 2..];
    let bytes = rest.len() / 2;
    let (pairs, tail) = rest.split_at_mut(2 * bytes);
    lookup::pairs(&codes[..bytes], table, pairs);
    if let [to] = tail {
        *to = table[usize::from(codes[bytes] & 15)];
    }
}
