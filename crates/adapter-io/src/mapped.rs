//! One memory-mapped safetensors file, and the view of one tensor in it.

use std::borrow::Cow;
use std::fs::File;
use std::path::{Path, PathBuf};

use bytemuck::Pod;
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::Dtype;

use crate::error::{FormatError, nearest_names};
use crate::header::{self, TensorInfo};

/// A mapped file and its checked header.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    /// To read what need not be mapped.
    #[cfg(unix)]
    file: File,
    map: Mmap,
    tensors: Vec<TensorInfo>,
}

impl MappedFile {
    pub(crate) fn open(path: &Path) -> Result<Self, FormatError> {
        let read = |source| FormatError::Read { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(read)?;
        if !file.metadata().map_err(read)?.is_file() {
            return Err(FormatError::Header { file: path.to_path_buf(), reason: "not a regular file".into() });
        }
        // SAFETY: the map is read-only. The usual caveat of mapping stays: another process that shrinks
        // the file while it is mapped takes this one down with SIGBUS. Everything in this workspace
        // replaces files by rename, which leaves a mapped one alone.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        let tensors = header::parse(path, &map)?;
        Ok(Self {
            path: path.to_path_buf(),
            #[cfg(unix)]
            file,
            map,
            tensors,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// The tensor at `index` of [`Self::tensors`].
    pub(crate) fn view(&self, index: usize) -> TensorView<'_> {
        let info = &self.tensors[index];
        TensorView {
            file: &self.path,
            name: &info.name,
            dtype: info.dtype,
            shape: info.shape.clone(),
            // The header's check put every range inside the file.
            data: &self.map[info.range.clone()],
        }
    }

    /// Copies the bytes of a part of the map, without mapping its pages: mapping costs as much as copying. `None` for a part
    /// that lies elsewhere.
    pub(crate) fn read(&self, part: &[u8], to: &mut [u8]) -> Option<Result<(), FormatError>> {
        let start = (part.as_ptr() as usize).checked_sub(self.map.as_ptr() as usize)?;
        if start.checked_add(part.len())? > self.map.len() || part.len() != to.len() {
            return None;
        }
        #[cfg(unix)]
        let read = std::os::unix::fs::FileExt::read_exact_at(&self.file, to, start as u64)
            .map_err(|source| FormatError::Read { path: self.path.clone(), source });
        #[cfg(not(unix))]
        let read = Ok(to.copy_from_slice(part));
        Some(read)
    }

    /// Lets go of the pages of a tensor that has been read: they stay in the page cache, but no longer count as this
    /// process's memory. Reading them again is allowed, and maps them again.
    pub(crate) fn release(&self, index: usize) {
        #[cfg(unix)]
        {
            let range = &self.tensors[index].range;
            // SAFETY: the map is of a file and read-only: pages that are let go come back with the same bytes.
            // Failing to let go costs memory, nothing else.
            let _ = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
            };
        }
        #[cfg(not(unix))]
        let _ = index;
    }

    pub(crate) fn position(&self, name: &str) -> Option<usize> {
        self.tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok()
    }

    pub(crate) fn missing(&self, name: &str) -> FormatError {
        let nearest = nearest_names(name, self.tensors.iter().map(|t| t.name.as_str()));
        FormatError::MissingTensor { path: self.path.clone(), tensor: name.to_string(), nearest }
    }
}

/// One tensor of a mapped file: its bytes lie in the page cache, nothing is copied.
#[derive(Debug, Clone)]
pub struct TensorView<'a> {
    /// The file that holds it.
    pub file: &'a Path,
    /// Its name.
    pub name: &'a str,
    /// Its data type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes, row-major, little-endian.
    pub data: &'a [u8],
}

/// The elements of a floating-point tensor, borrowed from the file where its alignment permits.
#[derive(Debug, Clone)]
pub enum Floats<'a> {
    /// 32-bit floats.
    F32(Cow<'a, [f32]>),
    /// IEEE half precision.
    F16(Cow<'a, [f16]>),
    /// bfloat16.
    BF16(Cow<'a, [bf16]>),
}

impl<'a> TensorView<'a> {
    /// The number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
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

    /// The elements of an F32, F16 or BF16 tensor as they are.
    ///
    /// # Errors
    /// [`FormatError::Dtype`] for any other data type.
    pub fn floats(&self) -> Result<Floats<'a>, FormatError> {
        match self.dtype {
            Dtype::F32 => Ok(Floats::F32(cast(self.data))),
            Dtype::F16 => Ok(Floats::F16(cast(self.data))),
            Dtype::BF16 => Ok(Floats::BF16(cast(self.data))),
            _ => Err(self.wrong_dtype("F32, F16 or BF16")),
        }
    }

    /// The elements as 32-bit floats; F32, F16, BF16 and F64 (rounded) are converted.
    ///
    /// # Errors
    /// [`FormatError::Dtype`] for any other data type.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>, FormatError> {
        if self.dtype == Dtype::F64 {
            return Ok(cast::<f64>(self.data).par_iter().map(|&x| x as f32).collect());
        }
        let floats = self.floats().map_err(|_| self.wrong_dtype("F32, F16, BF16 or F64"))?;
        Ok(match floats {
            Floats::F32(x) => x.into_owned(),
            Floats::F16(x) => x.par_iter().map(|x| x.to_f32()).collect(),
            Floats::BF16(x) => x.par_iter().map(|x| x.to_f32()).collect(),
        })
    }

    /// The elements of an integer tensor (I64, I32 or U8), widened.
    ///
    /// # Errors
    /// [`FormatError::Dtype`] for any other data type.
    pub fn to_i64_vec(&self) -> Result<Vec<i64>, FormatError> {
        match self.dtype {
            Dtype::I64 => Ok(cast::<i64>(self.data).into_owned()),
            Dtype::I32 => Ok(cast::<i32>(self.data).iter().map(|&x| x.into()).collect()),
            Dtype::U8 => Ok(self.data.iter().map(|&x| x.into()).collect()),
            _ => Err(self.wrong_dtype("I64, I32 or U8")),
        }
    }

    pub(crate) fn wrong_dtype(&self, expected: &'static str) -> FormatError {
        FormatError::Dtype { file: self.file.to_path_buf(), tensor: self.name.to_string(), dtype: self.dtype, expected }
    }
}

/// The header's check made the length a multiple of the element; only alignment can force a copy.
fn cast<T: Pod>(bytes: &[u8]) -> Cow<'_, [T]> {
    bytemuck::try_cast_slice(bytes).map_or_else(|_| Cow::Owned(bytemuck::pod_collect_to_vec(bytes)), Cow::Borrowed)
}
