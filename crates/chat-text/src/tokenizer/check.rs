//! What is wrong with a `tokenizer.json` that the `tokenizers` crate would panic on.
//!
//! Four kinds are known: values that are no JSON of this crate's (1e999), where a decoder is read; patterns that
//! match the empty text, with which a replacement never advances; pieces of no length; and SentencePiece's precompiled
//! character maps, whose tries are walked without looking at their length. They are told before the file is handed over.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value as Json;
use tokenizers::normalizers::Precompiled;
use tokenizers::utils::SysRegex;

/// Reads the file as JSON and looks at every step of its pipeline.
pub(super) fn check(bytes: &[u8]) -> Result<(), String> {
    let json: Json = serde_json::from_slice(bytes).map_err(|e| format!("not valid JSON: {e}"))?;
    for part in ["normalizer", "pre_tokenizer", "post_processor", "decoder"] {
        let found = json.get(part).map_or(Ok(()), steps);
        found.map_err(|problem| format!("`{part}`: {problem}"))?;
    }
    Ok(())
}

fn steps(value: &Json) -> Result<(), String> {
    match value {
        Json::Array(items) => items.iter().try_for_each(steps),
        Json::Object(map) => {
            match map.get("type").and_then(Json::as_str) {
                Some("Replace") => replace(value)?,
                Some("Precompiled") => precompiled(value)?,
                Some("FixedLength") if value["length"].as_u64() == Some(0) => {
                    return Err("`length` of FixedLength is 0: it must be 1 or more".into());
                }
                _ => {}
            }
            map.values().try_for_each(steps)
        }
        _ => Ok(()),
    }
}

fn replace(step: &Json) -> Result<(), String> {
    let text = |kind: &str| step["pattern"].get(kind).and_then(Json::as_str);
    if text("String") == Some("") {
        return Err("`pattern` of Replace is empty: it must be a text to be replaced".into());
    }
    let Some(pattern) = text("Regex") else { return Ok(()) };
    let regex = SysRegex::new(pattern).map_err(|e| format!("`pattern` {pattern:?} of Replace: {e}"))?;
    match regex.find_iter("").next() {
        None => Ok(()),
        Some(_) => Err(format!("`pattern` {pattern:?} of Replace matches the empty text: it would match everywhere")),
    }
}

fn precompiled(step: &Json) -> Result<(), String> {
    let fail = |problem: &str| format!("`precompiled_charsmap` of Precompiled {problem}");
    // The crate's type borrows its text.
    serde_json::from_str::<Precompiled>(&step.to_string()).map_err(|e| fail(&format!("can't be read: {e}")))?;
    let text = step["precompiled_charsmap"].as_str().unwrap_or_default();
    let bytes = STANDARD.decode(text).map_err(|e| fail(&format!("is not base64: {e}")))?;
    let units = |bytes: &[u8]| -> Vec<usize> {
        bytes.as_chunks::<4>().0.iter().map(|unit| u32::from_le_bytes(*unit) as usize).collect()
    };
    let (size, rest) = bytes.split_at_checked(4).ok_or_else(|| fail("is too short"))?;
    let size = units(size).first().map_or(0, |size| size / 4 * 4);
    let (trie, texts) = rest.split_at_checked(size).ok_or_else(|| fail("is cut off"))?;
    let texts = std::str::from_utf8(texts).map_err(|_| fail("holds texts that are not UTF-8"))?;
    match walk(&units(trie), texts) {
        Some(()) => Ok(()),
        None => Err(fail("is broken: its trie points out of the file")),
    }
}

/// Walks all of a double-array trie as the `tokenizers` crate walks it with any text; `None` if that leads out of
/// it or to a place that begins no text.
fn walk(trie: &[usize], texts: &str) -> Option<()> {
    let offset = |unit: usize| (unit >> 10) << ((unit & (1 << 9)) >> 6);
    let label = |unit: usize| unit & ((1 << 31) | 0xFF);
    let mut seen = vec![false; trie.len()];
    let mut nodes = vec![offset(*trie.first()?)];
    while let Some(node) = nodes.pop() {
        if std::mem::replace(seen.get_mut(node)?, true) {
            continue;
        }
        for byte in 1..=255 {
            let unit = *trie.get(node ^ byte)?;
            if label(unit) != byte {
                continue;
            }
            let next = node ^ byte ^ offset(unit);
            if unit >> 8 & 1 == 1 {
                let value = trie.get(next)? & ((1 << 31) - 1);
                texts.get(value..)?;
            }
            nodes.push(next);
        }
    }
    Some(())
}
