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
    pub(super) fn tile<E: Element + Pod>(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        out: &mut [E],
        stride: usize,
    ) {
        let values = self.code.values();
        let mut tables = Tables::default();
        let mut row = rows.start;
        while row < rows.end {
            let (matrix, inside) = (row / self.rows, row % self.rows);
            let band = inside / self.block[0];
            let last = matrix * self.rows + ((band + 1) * self.block[0]).min(self.rows);
            let end = last.min(rows.end);
            let first_scale = (matrix * self.grid[0] + band) * self.grid[1];
            let groups = Groups { grid: self, columns: &columns, first_scale };
            let to = &mut out[(row - rows.start) * stride..];
            let lines = to.chunks_mut(stride).zip(row..end).map(|(to, row)| {
                let codes = &self.codes[row * self.row_bytes..][..self.row_bytes];
                (row, codes, &mut to[..columns.len()])
            });
            match self.code.bits() {
                4 => lines.for_each(|(row, codes, to)| groups.nibbles(row, codes, &values, to, &mut tables)),
                // Rows one after the other, with the tables of all blocks beside each other.
                _ if (end - row) * self.block[1].min(columns.len()) >= WORTH_A_TABLE && self.groups.is_none() => {
                    let of_block = |(run, scale, zero)| {
                        let table: [E; 256] = std::array::from_fn(|code| E::from_f32((values[code] - zero) * scale));
                        (run, table)
                    };
                    let tables: Vec<(Range<usize>, [E; 256])> = groups.of(row).map(of_block).collect();
                    lines.for_each(|(_, codes, to)| {
                        for (run, table) in &tables {
                            let to = &mut to[run.start - columns.start..run.end - columns.start];
                            let each = to.iter_mut().zip(&codes[run.clone()]);
                            each.for_each(|(to, code)| *to = table[usize::from(*code)]);
                        }
                    });
                }
                _ => lines.for_each(|(row, codes, to)| groups.bytes(row, codes, &values, to)),
            }
            row = end;
        }
    }
}

/// The columns of a rectangle by the scales that they share.
struct Groups<'a> {
    grid: &'a Grid<'a>,
    columns: &'a Range<usize>,
    /// The scale of the first group.
    first_scale: usize,
}

impl Groups<'_> {
    /// Columns with one scale, their scale and code of 0.
    fn of(&self, row: usize) -> impl Iterator<Item = (Range<usize>, f32, f32)> {
        self.runs().map(move |(run, scale)| (run, self.grid.scales.at(scale), self.zero(row, scale)))
    }

    /// Columns with one scale, and which it is.
    fn runs(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        let mut column = self.columns.start;
        std::iter::from_fn(move || {
            let width = self.grid.block[1];
            let (group, end) = match &self.grid.groups {
                _ if column >= self.columns.end => return None,
                None => (column / width, (column / width + 1) * width),
                Some(groups) => (groups[column] as usize, column + 1),
            };
            let run = column..end.min(self.columns.end);
            column = run.end;
            Some((run, self.first_scale + group))
        })
    }

    fn zero(&self, row: usize, scale: usize) -> f32 {
        self.grid.zeros.map_or(0.0, |zeros| zeros.at(scale, row, scale - self.first_scale, self.grid.grid[1]))
    }

    fn nibbles<E: Element + Pod>(
        &self,
        row: usize,
        codes: &[u8],
        values: &[f32; 256],
        to: &mut [E],
        tables: &mut Tables<E>,
    ) {
        let values: [f32; 16] = std::array::from_fn(|code| values[code]);
        let scales = &self.grid.scales;
        for (run, scale) in self.runs() {
            let to = &mut to[run.start - self.columns.start..run.end - self.columns.start];
            match scales.code(scale).filter(|_| self.grid.zeros.is_none()) {
                // A scale of 8 bits has 256 values, and so have their tables.
                Some(code) => {
                    if tables.0.is_empty() {
                        tables.0 = (0..=255).map(|code| lookup::table(&values, 0.0, scales.of_code(code))).collect();
                    }
                    nibbles(codes, run.start, &tables.0[usize::from(code)], to);
                }
                None => {
                    let table = lookup::table(&values, self.zero(row, scale), scales.at(scale));
                    nibbles(codes, run.start, &table, to);
                }
            }
        }
    }

    fn bytes<E: Element>(&self, row: usize, codes: &[u8], values: &[f32; 256], to: &mut [E]) {
        let mut floats = [0.0; PART];
        for (run, scale, zero) in self.of(row) {
            let to = &mut to[run.start - self.columns.start..run.end - self.columns.start];
            for (to, codes) in to.chunks_mut(PART).zip(codes[run].chunks(PART)) {
                let floats = &mut floats[..to.len()];
                let each = floats.iter_mut().zip(codes);
                each.for_each(|(x, code)| *x = (values[usize::from(*code)] - zero) * scale);
                E::narrow(floats, to);
            }
        }
    }
}

/// The values of all 4-bit codes for each scale of 8 bits, where they were made.
struct Tables<E>(Vec<[E; 16]>);

impl<E> Default for Tables<E> {
    fn default() -> Self {
        Self(Vec::new())
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
