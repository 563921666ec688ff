//! One weight in another storage: which tensors it is made of, and decoding a part of it.

use std::ops::Range;

use bytemuck::Pod;
use half::{bf16, f16};
use nf4_quant::Element;
use safetensors::Dtype;

use super::grid::{Code, Grid, Zeros};
use super::input_major::{InputMajor, Order};
use super::scales::{Scales, word};
use super::stacked::Stacked;
use crate::checkpoint::Checkpoint;
use crate::error::FormatError;
use crate::mapped::TensorView;

/// A weight that is decoded while it is read.
#[derive(Debug, Clone)]
pub(crate) struct Coded {
    /// F16, BF16 or F32.
    pub dtype: Dtype,
    /// As in the dense checkpoint; two dimensions at least, none of them 0.
    pub shape: Vec<usize>,
    /// The storage's name, for people.
    pub kind: &'static str,
    pub layout: Layout,
}

/// How the tensors that it is made of lie, by their names.
#[derive(Debug, Clone)]
pub(crate) enum Layout {
    Grid(GridParts),
    InputMajor(InputMajorParts),
    Stacked(StackedParts),
}

/// See [`Grid`].
#[derive(Debug, Clone)]
pub(crate) struct GridParts {
    pub(super) code: Code,
    pub codes: String,
    pub row_bytes: usize,
    pub scales: String,
    pub divisor: Option<String>,
    pub zeros: Option<String>,
    pub packed_zeros: bool,
    pub groups: Option<String>,
    /// Rows and columns of scales, and those of a block.
    pub grid: ([usize; 2], [usize; 2]),
}

/// See [`InputMajor`].
#[derive(Debug, Clone)]
pub(crate) struct InputMajorParts {
    pub(super) order: Order,
    pub codes: String,
    pub zeros: String,
    pub add: u32,
    pub scales: String,
    pub outputs: usize,
    pub group: usize,
    pub places: Option<String>,
}

/// See [`Stacked`].
#[derive(Debug, Clone)]
pub(crate) struct StackedParts {
    pub codes: String,
    pub scales: String,
    pub blocks: usize,
    pub outputs: usize,
}

impl StackedParts {
    fn stack<'a>(&self, checkpoint: &'a Checkpoint) -> Result<Stacked<'a>, FormatError> {
        let (codes, scales) = (checkpoint.tensor(&self.codes)?, checkpoint.tensor(&self.scales)?);
        let scales = Scales { dtype: scales.dtype, data: scales.data, divisor: None };
        Ok(Stacked { codes: codes.data, scales, blocks: self.blocks, outputs: self.outputs })
    }
}

impl Coded {
    /// Stacked experts, where the weight is those.
    pub(super) fn stacked<'a>(&self, checkpoint: &'a Checkpoint) -> Result<Option<Stacked<'a>>, FormatError> {
        match &self.layout {
            Layout::Stacked(parts) => parts.stack(checkpoint).map(Some),
            _ => Ok(None),
        }
    }

    /// The tensors that it is made of, its codes first.
    pub(crate) fn parts(&self) -> impl Iterator<Item = &str> {
        let parts: [Option<&String>; 5] = match &self.layout {
            Layout::Grid(p) => {
                [Some(&p.codes), Some(&p.scales), p.divisor.as_ref(), p.zeros.as_ref(), p.groups.as_ref()]
            }
            Layout::InputMajor(p) => [Some(&p.codes), Some(&p.zeros), Some(&p.scales), p.places.as_ref(), None],
            Layout::Stacked(p) => [Some(&p.codes), Some(&p.scales), None, None, None],
        };
        parts.into_iter().flatten().map(String::as_str)
    }

    /// The tensor of its codes.
    pub(crate) fn codes(&self) -> &str {
        match &self.layout {
            Layout::Grid(parts) => &parts.codes,
            Layout::InputMajor(parts) => &parts.codes,
            Layout::Stacked(parts) => &parts.codes,
        }
    }

    /// Decodes the elements from `first` on, as many as `to` has bytes for. Threads may decode at once.
    ///
    /// # Errors
    /// [`FormatError::Coded`] for a group that is not there, [`FormatError::MissingTensor`]; [`FormatError::Read`] for
    /// elements beyond the last.
    pub(crate) fn decode(&self, checkpoint: &Checkpoint, first: usize, to: &mut [u8]) -> Result<(), FormatError> {
        match self.dtype {
            Dtype::F32 => self.decode_as::<f32>(checkpoint, first, to),
            Dtype::F16 => self.decode_as::<f16>(checkpoint, first, to),
            _ => self.decode_as::<bf16>(checkpoint, first, to),
        }
    }

    fn decode_as<E: Element + Pod>(
        &self,
        checkpoint: &Checkpoint,
        first: usize,
        to: &mut [u8],
    ) -> Result<(), FormatError> {
        match bytemuck::try_cast_slice_mut::<u8, E>(to) {
            Ok(to) => self.fill(checkpoint, first, to),
            Err(_) => {
                let mut aligned = vec![E::zeroed(); to.len() / size_of::<E>()];
                self.fill(checkpoint, first, &mut aligned)?;
                to.copy_from_slice(bytemuck::cast_slice(&aligned));
                Ok(())
            }
        }
    }

    fn fill<E: Element + Pod>(&self, checkpoint: &Checkpoint, first: usize, to: &mut [E]) -> Result<(), FormatError> {
        let columns = self.shape.last().copied().unwrap_or(0);
        let range = first..first + to.len();
        let codes = checkpoint.tensor(self.codes())?;
        if range.end > self.shape.iter().product() {
            let source = std::io::ErrorKind::UnexpectedEof.into();
            return Err(FormatError::Read { path: codes.file.into(), source });
        }
        let scales = |name: &str, divisor: Option<f32>| -> Result<_, FormatError> {
            let view = checkpoint.tensor(name)?;
            Ok(Scales { dtype: view.dtype, data: view.data, divisor })
        };
        let places = |name: &Option<String>, groups: usize| {
            name.as_ref().map(|name| places(&checkpoint.tensor(name)?, groups)).transpose()
        };
        match &self.layout {
            Layout::Grid(parts) => {
                let bytes = |name: &Option<String>| name.as_ref().map(|name| checkpoint.tensor(name)).transpose();
                let divisor =
                    bytes(&parts.divisor)?.map(|view| word(view.data, 0).map_or(f32::NAN, f32::from_le_bytes));
                let zeros = bytes(&parts.zeros)?.map(|view| match parts.packed_zeros {
                    true => Zeros::Packed(view.data, parts.code.bits()),
                    false => Zeros::Bytes(view.data),
                });
                let (grid, block) = parts.grid;
                let grid = Grid {
                    code: parts.code,
                    codes: codes.data,
                    row_bytes: parts.row_bytes,
                    rows: self.shape[self.shape.len() - 2],
                    block,
                    scales: scales(&parts.scales, divisor)?,
                    grid,
                    zeros,
                    groups: places(&parts.groups, grid[1])?,
                };
                tiles(range, columns, to, |rows, columns, to, stride| grid.tile(rows, columns, to, stride));
            }
            Layout::InputMajor(parts) => {
                let weight = InputMajor {
                    order: parts.order,
                    codes: codes.data,
                    zeros: checkpoint.tensor(&parts.zeros)?.data,
                    add: parts.add,
                    scales: scales(&parts.scales, None)?,
                    outputs: parts.outputs,
                    group: parts.group,
                    groups: places(&parts.places, columns.div_ceil(parts.group))?,
                };
                tiles(range, columns, to, |rows, columns, to, stride| weight.tile(rows, columns, to, stride));
            }
            Layout::Stacked(parts) => {
                let stack = parts.stack(checkpoint)?;
                tiles(range, columns, to, |rows, columns, to, stride| stack.tile(rows, columns, to, stride));
            }
        }
        Ok(())
    }
}

/// The group of each input, checked against their number.
fn places(view: &TensorView<'_>, groups: usize) -> Result<Vec<u32>, FormatError> {
    let place = |(input, group): (usize, i64)| match u32::try_from(group) {
        Ok(place) if (place as usize) < groups => Ok(place),
        _ => Err(FormatError::Coded {
            file: view.file.to_path_buf(),
            tensor: view.name.to_string(),
            reason: format!("input {input} is in group {group}, and there are {groups}; download the file again"),
        }),
    };
    view.to_i64_vec()?.into_iter().enumerate().map(place).collect()
}

/// Cuts a range of a matrix's elements into rectangles: the rest of a row, whole rows, the beginning of one.
fn tiles<E>(
    range: Range<usize>,
    columns: usize,
    to: &mut [E],
    mut tile: impl FnMut(Range<usize>, Range<usize>, &mut [E], usize),
) {
    let mut at = range.start;
    let mut to = to;
    while at < range.end {
        let (row, column) = (at / columns, at % columns);
        let left = range.end - at;
        let (rows, across) = match column {
            0 if left >= columns => (left / columns, 0..columns),
            _ => (1, column..(column + left).min(columns)),
        };
        let (now, rest) = to.split_at_mut(rows * across.len());
        let stride = across.len();
        tile(row..row + rows, across, now, stride);
        at += now.len();
        to = rest;
    }
}
