//! Reading a GGUF file: mapped, its header checked in full, tensors as views.
//!
//! Files are untrusted: counts and lengths are believed only as far as bytes are there, every tensor must
//! lie in the file, aligned and apart from the others. Memory is bounded by four times the metadata's bytes.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::blocks::GgmlType;
use super::value::{Cursor, Value};
use crate::error::{FormatError, nearest_names};

/// What a file starts with.
pub(crate) const MAGIC: &[u8; 4] = b"GGUF";
/// The version that is written; 2 has the same layout and is read too.
pub(crate) const VERSION: u32 = 3;
/// The alignment without `general.alignment`.
pub(crate) const ALIGNMENT: usize = 32;
/// ggml's limit.
const MAX_DIMENSIONS: u32 = 4;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct GgufTensor {
    /// Its name.
    pub name: String,
    /// Its shape, row-major as everywhere here; the file has it reversed.
    pub shape: Vec<usize>,
    /// Its type.
    pub kind: GgmlType,
    /// Where its bytes lie in the file.
    pub range: std::ops::Range<usize>,
}

/// An opened GGUF file.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    map: Mmap,
    /// The metadata, in file order.
    pub metadata: Vec<(String, Value)>,
    /// The tensors, in file order.
    pub tensors: Vec<GgufTensor>,
}

impl GgufFile {
    /// Opens and checks a file.
    ///
    /// # Errors
    /// [`FormatError::Read`], [`FormatError::Header`].
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let read = |source| FormatError::Read { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(read)?;
        if !file.metadata().map_err(read)?.is_file() {
            return Err(FormatError::Header { file: path.to_path_buf(), reason: "not a regular file".into() });
        }
        // SAFETY: as for safetensors files: read-only, and our own writers replace files by rename.
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        let (metadata, tensors) =
            parse(&map).map_err(|reason| FormatError::Header { file: path.to_path_buf(), reason })?;
        Ok(Self { path: path.to_path_buf(), map, metadata, tensors })
    }

    /// The metadata entry of this key.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find(|(k, _)| k == key).map(|(_, value)| value)
    }

    /// The tensor of this name and its bytes.
    ///
    /// # Errors
    /// [`FormatError::MissingTensor`], which lists the nearest names.
    pub fn tensor(&self, name: &str) -> Result<(&GgufTensor, &[u8]), FormatError> {
        let found = self.tensors.iter().find(|t| t.name == name);
        found.map(|t| (t, &self.map[t.range.clone()])).ok_or_else(|| FormatError::MissingTensor {
            path: self.path.clone(),
            tensor: name.to_string(),
            nearest: nearest_names(name, self.tensors.iter().map(|t| t.name.as_str())),
        })
    }

    /// A tensor's elements, decoded.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn to_f32_vec(&self, name: &str) -> Result<Vec<f32>, FormatError> {
        self.tensor(name).map(|(tensor, bytes)| tensor.kind.decode(bytes))
    }
}

type Header = (Vec<(String, Value)>, Vec<GgufTensor>);

/// One entry of the table of tensors.
pub(super) struct Entry {
    pub name: String,
    pub shape: Vec<usize>,
    /// ggml's number of the type, which may be one that is not read here.
    pub id: u32,
    /// Relative to the data.
    pub offset: usize,
}

/// What stands before the data.
pub(super) struct Table {
    pub metadata: Vec<(String, Value)>,
    pub entries: Vec<Entry>,
    pub alignment: usize,
    /// Where the data begins.
    pub start: usize,
}

/// Metadata and table of a file whose content begins with `bytes`.
pub(super) fn table(bytes: &[u8]) -> Result<Table, String> {
    let mut cursor = Cursor::new(bytes);
    if cursor.take(4).ok() != Some(MAGIC) {
        return Err("not a GGUF file: it does not start with `GGUF`".into());
    }
    let version = cursor.u32()?;
    if !(2..=VERSION).contains(&version) {
        let hint = if version.swap_bytes() <= VERSION { "; it is big-endian" } else { "" };
        return Err(format!("GGUF version {version} cannot be read, only 2 and 3{hint}; convert the model again"));
    }
    let (tensor_count, entry_count) = (cursor.u64()?, cursor.u64()?);
    let mut metadata: Vec<(String, Value)> = Vec::new();
    let mut keys = std::collections::HashSet::new();
    for _ in 0..entry_count {
        let key = cursor.text()?;
        let value = cursor.value().map_err(|e| format!("metadata `{key}`: {e}"))?;
        if !keys.insert(key.clone()) {
            return Err(format!("metadata `{key}` appears twice"));
        }
        metadata.push((key, value));
    }
    let alignment = match metadata.iter().find(|(k, _)| k == "general.alignment").map(|(_, v)| v) {
        None => ALIGNMENT,
        Some(Value::U32(a)) if a.is_power_of_two() && *a <= 1 << 20 => *a as usize,
        Some(other) => return Err(format!("general.alignment is {other:?}, expected a power of two")),
    };
    let mut entries: Vec<Entry> = Vec::new();
    for _ in 0..tensor_count {
        entries.push(entry(&mut cursor)?);
    }
    let start = cursor.position().next_multiple_of(alignment);
    Ok(Table { metadata, entries, alignment, start })
}

/// The header of a file whose whole content is `bytes`.
pub(crate) fn parse(bytes: &[u8]) -> Result<Header, String> {
    let Table { metadata, entries, alignment, start } = table(bytes)?;
    let mut tensors: Vec<GgufTensor> = entries.into_iter().map(tensor).collect::<Result<_, _>>()?;
    for tensor in &mut tensors {
        let (from, to) = (tensor.range.start, tensor.range.end);
        let end = to.checked_add(start).filter(|end| *end <= bytes.len());
        let Some(end) = end else {
            return Err(format!(
                "it is cut short: tensor `{}` needs bytes {from}..{to} of the data, there are {}; download or copy the file again",
                tensor.name,
                bytes.len().saturating_sub(start)
            ));
        };
        if !from.is_multiple_of(alignment) {
            return Err(format!("tensor `{}`: offset {from} is no multiple of {alignment}", tensor.name));
        }
        tensor.range = from + start..end;
    }
    let mut order: Vec<&GgufTensor> = tensors.iter().collect();
    order.sort_by_key(|t| (t.range.start, t.range.end));
    if let Some(pair) = order.windows(2).find(|w| w[1].range.start < w[0].range.end) {
        return Err(format!("tensor `{}` overlaps `{}`", pair[1].name, pair[0].name));
    }
    order.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = order.windows(2).find(|w| w[0].name == w[1].name) {
        return Err(format!("tensor `{}` appears twice", pair[0].name));
    }
    Ok((metadata, tensors))
}

fn entry(cursor: &mut Cursor<'_>) -> Result<Entry, String> {
    let name = cursor.text()?;
    let fail = |reason: String| format!("tensor `{name}`: {reason}");
    let dimensions = cursor.u32()?;
    if dimensions > MAX_DIMENSIONS {
        return Err(fail(format!("{dimensions} dimensions, at most {MAX_DIMENSIONS} are possible")));
    }
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        shape.push(usize::try_from(cursor.u64()?).map_err(|_| fail("a dimension is too large".into()))?);
    }
    shape.reverse();
    let id = cursor.u32()?;
    let offset = usize::try_from(cursor.u64()?).map_err(|_| fail("its offset is too large".into()))?;
    Ok(Entry { name, shape, id, offset })
}

/// An entry whose type is read here; its range is relative to the data.
fn tensor(Entry { name, shape, id, offset }: Entry) -> Result<GgufTensor, String> {
    let fail = |reason: String| format!("tensor `{name}`: {reason}");
    let kind = GgmlType::from_id(id).ok_or_else(|| {
        fail(format!("ggml type {id} cannot be read, only F32, F16, BF16, Q8_0, Q4_0, Q4_1 and Q5_0"))
    })?;
    let bytes = kind.num_bytes(&shape);
    let end = bytes.and_then(|n| offset.checked_add(n));
    let end = end.ok_or_else(|| fail(format!("shape {shape:?} of {} has no valid size", kind.name())))?;
    Ok(GgufTensor { name, shape, kind, range: offset..end })
}
