//! Writing a GGUF file: header first, then tensor after tensor, under its final name only when complete.

use std::io::{self, Write};
use std::path::Path;

use super::blocks::GgmlType;
use super::file::{ALIGNMENT, MAGIC, VERSION};
use super::value::{Value, write_string};
use crate::atomic;
use crate::error::FormatError;

/// Name, type and shape of a tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Planned {
    pub name: String,
    /// Row-major.
    pub shape: Vec<usize>,
    pub kind: GgmlType,
}

impl Planned {
    fn num_bytes(&self, path: &Path) -> Result<usize, FormatError> {
        self.kind.num_bytes(&self.shape).ok_or_else(|| FormatError::Plan {
            path: path.to_path_buf(),
            tensor: self.name.clone(),
            reason: format!("shape {:?} of {} has no valid size", self.shape, self.kind.name()),
        })
    }
}

/// The data of all tensors together.
pub(crate) fn total_bytes(path: &Path, tensors: &[Planned]) -> Result<u64, FormatError> {
    tensors.iter().try_fold(0, |sum, t| Ok(sum + t.num_bytes(path)? as u64))
}

/// Writes a file; `data` gives each tensor's bytes in the order of `tensors`.
pub(crate) fn write(
    path: &Path,
    metadata: &[(String, Value)],
    tensors: &[Planned],
    mut data: impl FnMut(usize) -> Result<Vec<u8>, FormatError>,
) -> Result<(), FormatError> {
    let mut head = MAGIC.to_vec();
    head.extend(VERSION.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        write_string(key.as_bytes(), &mut head);
        value.write(&mut head);
    }
    let mut offset = 0usize;
    for tensor in tensors {
        write_string(tensor.name.as_bytes(), &mut head);
        head.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|d| head.extend((*d as u64).to_le_bytes()));
        head.extend(tensor.kind.id().to_le_bytes());
        head.extend((offset as u64).to_le_bytes());
        offset += tensor.num_bytes(path)?.next_multiple_of(ALIGNMENT);
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
    // The closure of `write_file` speaks io::Error; ours is kept beside it.
    let mut failure = None;
    let written = atomic::write_file(path, |out| {
        out.write_all(&head)?;
        for (i, tensor) in tensors.iter().enumerate() {
            let checked = data(i).and_then(|bytes| match tensor.num_bytes(path)? {
                expected if expected == bytes.len() => Ok(bytes),
                expected => Err(FormatError::Plan {
                    path: path.to_path_buf(),
                    tensor: tensor.name.clone(),
                    reason: format!("{} bytes came, {expected} were announced", bytes.len()),
                }),
            });
            let bytes = checked.map_err(|error| {
                failure = Some(error);
                io::Error::other("a tensor could not be made")
            })?;
            out.write_all(&bytes)?;
            out.write_all(&[0; ALIGNMENT][..bytes.len().next_multiple_of(ALIGNMENT) - bytes.len()])?;
        }
        Ok(())
    });
    match failure {
        Some(error) => Err(error),
        None => written,
    }
}
