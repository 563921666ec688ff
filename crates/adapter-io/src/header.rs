//! The header of a safetensors file, read with every check and written as PyTorch's writer does.
//!
//! Format: 8 bytes little-endian length n, n bytes of JSON
//! `{"__metadata__": {..}, "name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ..}`
//! padded with spaces, then the data. The tensors must tile the data without gap or overlap.
//! (<https://github.com/huggingface/safetensors>, "Format".) The header is parsed here and not by the
//! safetensors crate so that an error can say which tensor is wrong, and that a file is cut short.

use std::fmt;
use std::ops::Range;
use std::path::Path;

use safetensors::Dtype;
use serde::de::{IgnoredAny, IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::error::FormatError;
use crate::json;

/// The longest header that is read, the limit of the format's own readers.
const MAX_HEADER: u64 = 100_000_000;

/// Name, data type and shape of one tensor: what a writer has to know before the data comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// The tensor's name.
    pub name: String,
    /// Its data type.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// A specification from its parts.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: &[usize]) -> Self {
        Self { name: name.into(), dtype, shape: shape.to_vec() }
    }

    /// The bytes the tensor takes, or `None` when that is no whole number or overflows.
    pub fn num_bytes(&self) -> Option<usize> {
        num_bytes(self.dtype, &self.shape)
    }
}

/// One tensor of a file: `range` counts from the start of the file.
#[derive(Debug, Clone)]
pub(crate) struct TensorInfo {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub range: Range<usize>,
}

fn num_bytes(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
    let bits = elements.checked_mul(dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// Reads the header of a file whose whole content is `bytes`.
///
/// Memory taken is bounded by the header, which lies in the file; shapes and offsets are checked
/// against the file's size before anything is made of them.
pub(crate) fn parse(file: &Path, bytes: &[u8]) -> Result<Vec<TensorInfo>, FormatError> {
    let bad = |reason: String| FormatError::Header { file: file.to_path_buf(), reason };
    let size = bytes.len() as u64;
    let Some((length, _)) = bytes.split_first_chunk::<8>() else {
        return Err(bad(format!("not a safetensors file: it has {size} bytes, a header takes at least 8")));
    };
    let n = u64::from_le_bytes(*length);
    if json::is_lfs_pointer(bytes) {
        return Err(bad(json::LFS_POINTER.into()));
    }
    if n > MAX_HEADER {
        return Err(bad(format!("not a safetensors file: its first 8 bytes announce a header of {n} bytes")));
    }
    // n is at most MAX_HEADER, so neither the sum nor the cast can overflow.
    let start = 8 + n as usize;
    let Some(text) = bytes.get(8..start) else {
        return Err(FormatError::Truncated {
            file: file.into(),
            tensor: "(header)".into(),
            expected: 8 + n,
            actual: size,
        });
    };
    let text = std::str::from_utf8(text).map_err(|e| bad(format!("the header is not UTF-8: {e}")))?;
    let raw: RawHeader = serde_json::from_str(text).map_err(|e| bad(format!("the header is not valid: {e}")))?;
    let mut tensors = Vec::with_capacity(raw.0.len());
    for (name, info) in raw.0 {
        tensors.push(checked(name, info, start).map_err(bad)?);
    }
    tensors.sort_by_key(|t| (t.range.start, t.range.end));
    let mut end = start;
    for t in &tensors {
        if t.range.start != end {
            let what = if t.range.start < end { "overlaps the tensor before it" } else { "leaves a gap before it" };
            return Err(bad(format!(
                "tensor `{}` {what} (offset {}, expected {})",
                t.name,
                t.range.start - start,
                end - start
            )));
        }
        end = t.range.end;
        if end > bytes.len() {
            let expected = tensors.iter().map(|t| t.range.end).max().unwrap_or(end) as u64;
            return Err(FormatError::Truncated { file: file.into(), tensor: t.name.clone(), expected, actual: size });
        }
    }
    if end != bytes.len() {
        return Err(bad(format!(
            "{} bytes follow the last tensor; the header does not belong to this file",
            bytes.len() - end
        )));
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    if let Some(pair) = tensors.windows(2).find(|w| w[0].name == w[1].name) {
        return Err(bad(format!("tensor `{}` appears twice in the header", pair[0].name)));
    }
    Ok(tensors)
}

fn checked(name: String, info: RawInfo, start: usize) -> Result<TensorInfo, String> {
    let dtype: Result<Dtype, serde::de::value::Error> = Dtype::deserialize(info.dtype.as_str().into_deserializer());
    let dtype = dtype.map_err(|_| format!("tensor `{name}` has the unknown data type `{}`", info.dtype))?;
    let [from, to] = info.data_offsets;
    let need = num_bytes(dtype, &info.shape)
        .ok_or_else(|| format!("tensor `{name}`: shape {:?} of {dtype} has no valid size", info.shape))?;
    if to.checked_sub(from) != Some(need) {
        return Err(format!(
            "tensor `{name}`: offsets {from}..{to} do not fit shape {:?} of {dtype}, {need} bytes",
            info.shape
        ));
    }
    let end = to.checked_add(start).ok_or_else(|| format!("tensor `{name}`: offset {to} is too large"))?;
    Ok(TensorInfo { name, dtype, shape: info.shape, range: from + start..end })
}

#[derive(Deserialize)]
struct RawInfo {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [usize; 2],
}

/// The header's entries in file order; a map type would hide a name that appears twice.
struct RawHeader(Vec<(String, RawInfo)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        let info =
                            map.next_value().map_err(|e| serde::de::Error::custom(format!("tensor `{name}`: {e}")))?;
                        entries.push((name, info));
                    }
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Sorts tensors as PyTorch's writer lays them out: widest data type first, then by name.
pub(crate) fn sort_for_file(specs: &mut [TensorSpec]) {
    specs.sort_by(|a, b| b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name)));
}

/// The bytes before the data, length prefix included, for tensors in the order given; and each
/// tensor's offset from the start of the file. `None` when a size overflows or is not whole bytes.
pub(crate) fn encode(specs: &[TensorSpec]) -> Option<(Vec<u8>, Vec<usize>)> {
    // PyTorch's writers always mark their files so, and PyTorch's readers ask for it.
    let mut json = String::from(r#"{"__metadata__":{"format":"pt"}"#);
    let mut offsets = Vec::with_capacity(specs.len());
    let mut at = 0usize;
    for spec in specs {
        let end = at.checked_add(spec.num_bytes()?)?;
        let name = serde_json::Value::from(spec.name.as_str());
        let shape = serde_json::Value::from(spec.shape.clone());
        json.push_str(&format!(r#",{name}:{{"dtype":"{}","shape":{shape},"data_offsets":[{at},{end}]}}"#, spec.dtype));
        offsets.push(at);
        at = end;
    }
    json.push('}');
    let padded = json.len().next_multiple_of(8);
    let mut header = Vec::with_capacity(8 + padded);
    header.extend((padded as u64).to_le_bytes());
    header.extend(json.as_bytes());
    header.resize(8 + padded, b' ');
    let start = header.len();
    Some((header, offsets.into_iter().map(|o| o + start).collect()))
}
