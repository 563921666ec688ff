//! JSON as Python writes it, so that a file that was only loaded and saved stays the same byte for byte.
//!
//! `json.dumps(.., indent=2, sort_keys=True)` escapes everything beyond ASCII, writes empty containers
//! as `{}` and `[]`, and floats as `repr` does: shortest digits that round-trip, always with a `.0` or
//! an exponent, the exponent of at least two digits and used below 1e-4 and from 1e16 on.

use std::path::Path;

use nf4_quant::python_float;
use serde::de::DeserializeOwned;
use serde_json::{Map, Number, Value};

use crate::error::FormatError;

/// Reads and parses a JSON file.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, FormatError> {
    let text = std::fs::read(path).map_err(|source| FormatError::Read { path: path.to_path_buf(), source })?;
    parse(&text, path)
}

/// Parses the text of a JSON file; `path` is named in errors.
pub(crate) fn parse<T: DeserializeOwned>(text: &[u8], path: &Path) -> Result<T, FormatError> {
    let reason = |e: serde_json::Error| if is_lfs_pointer(text) { LFS_POINTER.into() } else { e.to_string() };
    serde_json::from_slice(text).map_err(|e| FormatError::Json { path: path.to_path_buf(), reason: reason(e) })
}

/// What lies in the place of a large file when a repository was cloned without Git LFS.
pub(crate) fn is_lfs_pointer(bytes: &[u8]) -> bool {
    // The specification has it as the first line (<https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md>).
    bytes.starts_with(b"version https://git-lfs.github.com/spec/")
}

/// What is said of one.
pub(crate) const LFS_POINTER: &str = "it is a Git LFS pointer in the place of the file, as a clone without Git LFS leaves it; run `git lfs pull` in its folder, or download the file";

/// `json.dumps(value, indent=2, sort_keys=True)`.
pub(crate) fn to_python(value: &Value) -> String {
    let mut out = String::new();
    write(value, 0, &mut out);
    out
}

fn write(value: &Value, depth: usize, out: &mut String) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
        Value::Number(n) => out.push_str(&number(n)),
        Value::String(s) => string(s, out),
        Value::Array(items) => list(items.iter(), ('[', ']'), depth, out, |item, out| write(item, depth + 1, out)),
        Value::Object(map) => list(sorted(map).into_iter(), ('{', '}'), depth, out, |(key, item), out| {
            string(key, out);
            out.push_str(": ");
            write(item, depth + 1, out);
        }),
    }
}

fn sorted(map: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let mut entries: Vec<_> = map.iter().collect();
    // Python orders strings by code point, which is the order of their UTF-8 bytes.
    entries.sort_by_key(|(key, _)| *key);
    entries
}

fn list<T>(
    items: impl ExactSizeIterator<Item = T>,
    (open, close): (char, char),
    depth: usize,
    out: &mut String,
    each: impl Fn(T, &mut String),
) {
    out.push(open);
    let empty = items.len() == 0;
    for (i, item) in items.enumerate() {
        out.push_str(if i == 0 { "\n" } else { ",\n" });
        out.push_str(&"  ".repeat(depth + 1));
        each(item, out);
    }
    if !empty {
        out.push('\n');
        out.push_str(&"  ".repeat(depth));
    }
    out.push(close);
}

fn string(s: &str, out: &mut String) {
    out.push('"');
    for c in s.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(c),
            // Everything else as UTF-16 units.
            _ => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
    out.push('"');
}

fn number(n: &Number) -> String {
    if n.is_f64() { n.as_f64().map_or_else(|| n.to_string(), python_float) } else { n.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn layout_as_python_writes_it() {
        let value = json!({"b": [], "a": {"y": 1, "x": [true, null]}, "é🙂\u{7f}": {}});
        let text = "{\n  \"a\": {\n    \"x\": [\n      true,\n      null\n    ],\n    \"y\": 1\n  },\n  \"b\": [],\n  \"\\u00e9\\ud83d\\ude42\\u007f\": {}\n}";
        assert_eq!(to_python(&value), text);
    }
}
