//! What a GGUF file holds, whatever the types of its tensors: llama.cpp has many more than are read here.

use std::fs::File;
use std::path::Path;

use memmap2::Mmap;

use super::file::{Entry, Table, table};
use super::value::Value;
use crate::error::FormatError;
use crate::listing::{ListedTensor, Listing};

/// Number, name, elements of a block and its bytes of ggml's types in files (`GGML_QUANT_SIZES` of llama.cpp's `gguf` package, 0.17).
const TYPES: [(u32, &str, usize, usize); 33] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
];

/// Metadata and tensors of a GGUF file.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufListing {
    /// The metadata, in file order.
    pub metadata: Vec<(String, Value)>,
    /// The tensors, in file order. Types that are not known have a number for a name, and no bytes.
    pub tensors: Listing,
}

impl GgufListing {
    /// Reads what stands before the data, and checks that the data of all tensors is there.
    ///
    /// # Errors
    /// [`FormatError::Read`], [`FormatError::Header`].
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let read = |source| FormatError::Read { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(read)?;
        // SAFETY: as for safetensors files: read-only, and our own writers replace files by rename.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        list(&map).map_err(|reason| FormatError::Header { file: path.to_path_buf(), reason })
    }
}

fn list(bytes: &[u8]) -> Result<GgufListing, String> {
    let Table { metadata, entries, start, .. } = table(bytes)?;
    let room = bytes.len().saturating_sub(start);
    let tensors = entries.into_iter().map(|entry| listed(entry, room)).collect::<Result<_, _>>()?;
    Ok(GgufListing { metadata, tensors: Listing::from_tensors(tensors) })
}

fn listed(Entry { name, shape, id, offset }: Entry, room: usize) -> Result<ListedTensor, String> {
    let Some((_, kind, elements, bytes)) = TYPES.iter().find(|(number, ..)| *number == id) else {
        return Ok(ListedTensor { name, dtype: format!("type {id}"), shape, bytes: 0 });
    };
    let total = shape.iter().try_fold(1usize, |n, size| n.checked_mul(*size));
    let size = total.and_then(|n| n.div_ceil(*elements).checked_mul(*bytes));
    let size = size.ok_or_else(|| format!("tensor `{name}`: shape {shape:?} of {kind} has no valid size"))?;
    if offset.checked_add(size).is_none_or(|end| end > room) {
        return Err(format!(
            "it is cut short: the data of tensor `{name}` is not all there; download or copy the file again"
        ));
    }
    Ok(ListedTensor { name, dtype: (*kind).into(), shape, bytes: size as u64 })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// A file of one Q4_K tensor of 2 x 512 elements, `present` bytes of which are there.
    fn file(id: u32, present: usize) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend([1u64.to_le_bytes(), 1u64.to_le_bytes()].concat());
        let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
        bytes.extend(text("general.architecture"));
        bytes.extend(8u32.to_le_bytes());
        bytes.extend(text("llama"));
        bytes.extend(text("blk.0.attn_q.weight"));
        bytes.extend(2u32.to_le_bytes());
        bytes.extend([512u64.to_le_bytes(), 2u64.to_le_bytes()].concat());
        bytes.extend(id.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.resize(bytes.len().next_multiple_of(32) + present, 0);
        bytes
    }

    #[test]
    fn types_that_are_not_read_are_listed() {
        // Four blocks of 144 bytes.
        let listing = list(&file(12, 576)).unwrap();
        assert_eq!(listing.metadata[0].1.as_str(), Some("llama"));
        let expected =
            ListedTensor { name: "blk.0.attn_q.weight".into(), dtype: "Q4_K".into(), shape: vec![2, 512], bytes: 576 };
        assert_eq!(listing.tensors.tensors(), [expected]);
        assert_eq!(list(&file(99, 0)).unwrap().tensors.tensors()[0].dtype, "type 99");
        let error = list(&file(12, 575)).unwrap_err();
        assert!(error.contains("cut short") && error.contains("blk.0.attn_q.weight"), "{error}");
    }

    #[test]
    fn sizes_are_those_of_the_types_that_are_read() {
        for kind in super::super::GgmlType::ALL {
            let (_, name, elements, bytes) = TYPES.iter().find(|(id, ..)| *id == kind.id()).unwrap();
            assert_eq!((*name, (*elements, *bytes)), (kind.name(), kind.block()));
        }
    }
}
