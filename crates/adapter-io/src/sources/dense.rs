//! A tensor as a dense model has it.

use std::borrow::Cow;
use std::path::Path;

use rayon::prelude::*;
use safetensors::Dtype;

use super::coded::Coded;
use super::turned::{Matrix, Turned};
use crate::checkpoint::Checkpoint;
use crate::error::FormatError;
use crate::finite::first_not_finite;
use crate::mapped::TensorView;

/// Bytes that one thread decodes at a time: they fit its core's own cache.
const CHUNK: usize = 512 << 10;
/// Bytes that are in memory at a time where all of a tensor need not be.
const PIECE: usize = 32 << 20;

/// A tensor whose values can be read in slices, whatever the files hold for it.
#[derive(Debug, Clone)]
pub struct DenseTensor<'a> {
    /// The file that holds it, or its codes.
    pub file: &'a Path,
    /// Its name.
    pub name: &'a str,
    /// The data type in which its values come.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    values: Values<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Values<'a> {
    /// They are there.
    Stored(&'a [u8], Option<&'a Checkpoint>),
    /// They are decoded, from this byte on.
    Coded(&'a Coded, &'a Checkpoint, usize),
    /// They are columns of another matrix.
    Turned(Turned<'a>),
}

impl<'a> From<TensorView<'a>> for DenseTensor<'a> {
    fn from(view: TensorView<'a>) -> Self {
        let TensorView { file, name, dtype, shape, data } = view;
        Self { file, name, dtype, shape, values: Values::Stored(data, None) }
    }
}

impl<'a> DenseTensor<'a> {
    /// A tensor that lies in a checkpoint as it is.
    pub(crate) fn stored(view: TensorView<'a>, checkpoint: &'a Checkpoint) -> Self {
        let data = view.data;
        Self { values: Values::Stored(data, Some(checkpoint)), ..Self::from(view) }
    }

    /// One that is decoded.
    pub(crate) fn coded(name: &'a str, file: &'a Path, coded: &'a Coded, checkpoint: &'a Checkpoint) -> Self {
        let Coded { dtype, shape, .. } = coded;
        Self { file, name, dtype: *dtype, shape: shape.clone(), values: Values::Coded(coded, checkpoint, 0) }
    }

    /// The bytes of its values.
    pub fn num_bytes(&self) -> usize {
        match self.values {
            Values::Stored(data, _) => data.len(),
            _ => self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8,
        }
    }

    /// The tensor itself when it has the shape that its place asks for.
    ///
    /// # Errors
    /// [`FormatError::Shape`].
    pub fn expect_shape(&self, expected: &[usize]) -> Result<&Self, FormatError> {
        if self.shape == expected {
            return Ok(self);
        }
        Err(FormatError::Shape {
            file: self.file.to_path_buf(),
            tensor: self.name.to_string(),
            expected: expected.to_vec(),
            actual: self.shape.clone(),
        })
    }

    /// Part `index` of `count` equal ones along the first dimensions, in the shape of one; `None` where they do not
    /// make up the tensor.
    pub fn part(&self, index: usize, count: usize, shape: &[usize]) -> Option<Self> {
        let elements: usize = self.shape.iter().product();
        let part = shape.iter().try_fold(1usize, |n, size| n.checked_mul(*size))?;
        if index >= count || part.checked_mul(count)? != elements {
            return None;
        }
        let bytes = self.num_bytes() / count;
        let values = match self.values {
            Values::Stored(data, from) => Values::Stored(data.get(index * bytes..(index + 1) * bytes)?, from),
            Values::Coded(coded, from, start) => Values::Coded(coded, from, start + index * bytes),
            Values::Turned(_) => return None,
        };
        Some(Self { shape: shape.to_vec(), values, ..self.clone() })
    }

    /// Columns `first`, `first + step`, .. of a matrix, as rows: `[columns / step, rows]`. `None` where the tensor is no matrix, or
    /// columns do not make up whole steps.
    pub fn turned(&self, first: usize, step: usize) -> Option<Self> {
        let &[rows, columns] = &self.shape[..] else { return None };
        if first >= step || !columns.is_multiple_of(step) {
            return None;
        }
        let matrix = match self.values {
            Values::Stored(data, _) => Matrix::Stored(data),
            Values::Coded(coded, from, start) => Matrix::Coded(coded, from, start * 8 / self.dtype.bitsize()),
            Values::Turned(_) => return None,
        };
        let values = Values::Turned(Turned { matrix, rows, columns, first, step });
        Some(Self { shape: vec![columns / step, rows], values, ..self.clone() })
    }

    /// Copies or decodes the bytes of its values from `start` on, as many as `to` has. Both lie on whole elements. The
    /// pages of a stored tensor are not mapped for it. Threads may read at once.
    ///
    /// # Errors
    /// [`FormatError::Read`]: the file can't be read, or the tensor ends before; [`FormatError::Coded`] where codes
    /// stand for nothing.
    pub fn read(&self, start: usize, to: &mut [u8]) -> Result<(), FormatError> {
        let fits = start.checked_add(to.len()).is_some_and(|end| end <= self.num_bytes());
        let end = || FormatError::Read { path: self.file.into(), source: std::io::ErrorKind::UnexpectedEof.into() };
        if !fits {
            return Err(end());
        }
        match self.values {
            Values::Stored(data, None) => {
                to.copy_from_slice(&data[start..][..to.len()]);
                Ok(())
            }
            Values::Stored(data, Some(checkpoint)) => {
                let &Self { file, name, dtype, ref shape, .. } = self;
                let view = TensorView { file, name, dtype, shape: shape.clone(), data };
                checkpoint.read(&view, start, to)
            }
            Values::Coded(coded, checkpoint, offset) => {
                coded.decode(checkpoint, (offset + start) * 8 / self.dtype.bitsize(), to)
            }
            Values::Turned(turned) => turned.read(self.dtype, start * 8 / self.dtype.bitsize(), to),
        }
    }

    /// [`Self::read`] on all processor cores.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_all(&self, start: usize, to: &mut [u8]) -> Result<(), FormatError> {
        to.par_chunks_mut(CHUNK).enumerate().try_for_each(|(i, to)| self.read(start + i * CHUNK, to))
    }

    /// All bytes of its values; decoded or turned on all processor cores where they are not there.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn bytes(&self) -> Result<Cow<'a, [u8]>, FormatError> {
        if let Values::Stored(data, _) = self.values {
            return Ok(Cow::Borrowed(data));
        }
        let mut bytes = vec![0; self.num_bytes()];
        self.read_all(0, &mut bytes)?;
        Ok(Cow::Owned(bytes))
    }

    /// What `look` makes of it with all its values in memory.
    ///
    /// # Errors
    /// As [`Self::read`], and those of `look`.
    pub fn with_values<T, Error: From<FormatError>>(
        &self,
        look: impl FnOnce(&TensorView<'_>) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let data = self.bytes()?;
        let &Self { file, name, dtype, ref shape, .. } = self;
        look(&TensorView { file, name, dtype, shape: shape.clone(), data: &data })
    }

    /// Its finite elements as 32-bit floats.
    ///
    /// # Errors
    /// [`FormatError::NotFinite`], [`FormatError::Dtype`], and as [`Self::read`].
    pub fn to_f32_vec(&self) -> Result<Vec<f32>, FormatError> {
        self.with_values(|view| view.expect_finite()?.to_f32_vec())
    }

    /// The tensor itself when all its elements are finite.
    ///
    /// # Errors
    /// [`FormatError::NotFinite`], which names the first that is not; as [`Self::read`].
    pub fn expect_finite(&self) -> Result<&Self, FormatError> {
        let not_finite = |(index, value): (usize, f64)| FormatError::NotFinite {
            file: self.file.to_path_buf(),
            tensor: self.name.to_string(),
            index,
            value,
        };
        let size = self.dtype.bitsize() / 8;
        let found = match self.values {
            Values::Stored(data, _) => first_not_finite(self.dtype, data),
            _ => (0..self.num_bytes().div_ceil(CHUNK))
                .into_par_iter()
                .map(|i| {
                    let mut part = vec![0; CHUNK.min(self.num_bytes() - i * CHUNK)];
                    self.read(i * CHUNK, &mut part)?;
                    Ok(first_not_finite(self.dtype, &part).map(|(at, value)| (i * CHUNK / size + at, value)))
                })
                .find_map_first(Result::transpose)
                .transpose()?,
        };
        found.map_or(Ok(self), |found| Err(not_finite(found)))
    }

    /// Gives all bytes of its values in order, those of coded ones in pieces: no more than a few of them are in memory.
    ///
    /// # Errors
    /// As [`Self::read`], and those of `take`.
    pub fn for_each_piece<Error: From<FormatError>>(
        &self,
        mut take: impl FnMut(&[u8]) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if let Values::Stored(data, _) = self.values {
            return take(data);
        }
        let mut piece = vec![0; PIECE.min(self.num_bytes())];
        for start in (0..self.num_bytes()).step_by(PIECE) {
            let piece = &mut piece[..PIECE.min(self.num_bytes() - start)];
            self.read_all(start, piece)?;
            take(piece)?;
        }
        Ok(())
    }
}
