//! A GGUF file in words.

use std::fmt::Write as _;
use std::io::Read;
use std::path::Path;

use anyhow::Result;
use burn_qlora::gguf::{GgufListing, Value};

use super::{one_line, tensors};

/// Whether a file is one, by its first bytes.
pub fn is_gguf(path: &Path) -> bool {
    let mut magic = [0; 4];
    std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && &magic == b"GGUF"
}

/// Metadata and tensors of one.
pub fn describe(path: &Path, all: bool) -> Result<String> {
    let GgufListing { metadata, tensors: listing } = GgufListing::open(path)?;
    let mut text = format!("{}: GGUF, {}\n\n", path.display(), tensors::totals(&listing));
    for (key, value) in &metadata {
        writeln!(text, "{:<40} {}", one_line(key), one_line(&words(value)))?;
    }
    write!(text, "\n{}", tensors::table(&listing, all))?;
    Ok(text)
}

/// A value as people write it; of a list its length, as vocabularies are long.
fn words(value: &Value) -> String {
    match value {
        Value::String(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Value::Bool(true) => "yes".into(),
        Value::Bool(false) => "no".into(),
        Value::F32(number) => number.to_string(),
        Value::F64(number) => number.to_string(),
        Value::Array(values) => format!("{} values", values.len()),
        Value::I8(number) => number.to_string(),
        Value::I16(number) => number.to_string(),
        Value::I32(number) => number.to_string(),
        Value::I64(number) => number.to_string(),
        whole => whole.as_u64().map_or_else(String::new, |number| number.to_string()),
    }
}
