//! A model's tokenizer as GGUF metadata, as llama.cpp's converter writes it.
//!
//! Two kinds: `llama` (SentencePiece: pieces with scores, from `tokenizer.model`, or from a `tokenizer.json`
//! with byte fallback) and `gpt2` (byte-level BPE: tokens and merges, from `tokenizer.json`), which needs the
//! name of llama.cpp's pre-tokenizer. The converter finds that name by hashing the tokens of a test text; it
//! is found here by the regular expression in `tokenizer.json`, and one that is not known is an error.
//!
//! Without `tokenizer.model` the converter gives every piece the same score; here they are scored by the rank
//! of the merge that makes them, which is what SentencePiece's scores are.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json};

use super::architecture::{Model, field, table};
use super::sentencepiece::pieces;
use super::value::{Array, Value};
use crate::error::FormatError;
use crate::json;
use crate::paths::resolve_inside;

const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// A token that was added to the vocabulary.
struct Added {
    content: String,
    special: bool,
}

struct Files {
    path: PathBuf,
    tokenizer: Map<String, Json>,
    config: Map<String, Json>,
    added: BTreeMap<usize, Added>,
}

/// The metadata of the tokenizer in `dir`; `pre_tokenizer` names llama.cpp's where it is not known.
pub(super) fn tokenizer_metadata(
    dir: &Path,
    model: &Model,
    pre_tokenizer: Option<&str>,
) -> Result<Vec<(String, Value)>, FormatError> {
    let files = Files::read(dir)?;
    let size = model.needed(&["vocab_size"])? as usize;
    let mut out: Vec<(String, Value)> = Vec::new();
    let mut put = |key: &str, value: Value| out.push((format!("tokenizer.{key}"), value));
    let pieces_file = resolve_inside(dir, "tokenizer.model", dir)?;
    let bpe = files.tokenizer.get("model").and_then(Json::as_object);
    let byte_fallback = bpe.and_then(|m| m.get("byte_fallback")?.as_bool()).unwrap_or(false);
    let vocabulary = match (&pieces_file, bpe) {
        (Some(path), _) => from_pieces(path, size)?,
        (None, Some(bpe)) => files.bpe_tokens(bpe, size, byte_fallback)?,
        (None, None) => {
            return Err(FormatError::Read {
                path: dir.join("tokenizer.json"),
                source: std::io::Error::new(
                    std::io::ErrorKind::NotFound,
                    "a GGUF file needs the tokenizer; download it",
                ),
            });
        }
    };
    let sentencepiece = pieces_file.is_some() || byte_fallback;
    let vocabulary = files.with_added(vocabulary, sentencepiece)?;
    let kind = table().tokenizer_models.get(if sentencepiece { "pieces" } else { "byte_level" });
    put("ggml.model", kind.map_or("", String::as_str).into());
    let pre = match (sentencepiece, pre_tokenizer) {
        (_, Some(name)) => name.to_string(),
        (true, None) => "default".into(),
        (false, None) => files.pre_tokenizer()?,
    };
    put("ggml.pre", pre.as_str().into());
    put("ggml.tokens", Value::Array(Array::String(vocabulary.iter().map(|t| t.text.clone()).collect())));
    if sentencepiece {
        put("ggml.scores", Value::Array(Array::F32(vocabulary.iter().map(|t| t.score).collect())));
    }
    put("ggml.token_type", Value::Array(Array::I32(vocabulary.iter().map(|t| t.kind).collect())));
    if let (false, Some(bpe)) = (sentencepiece, bpe) {
        put("ggml.merges", Value::Array(Array::String(files.merges(bpe)?)));
    }
    for (key, id) in files.special_ids(model) {
        put(&format!("ggml.{key}"), Value::U32(id));
    }
    for (key, add) in files.added_at_ends() {
        put(&format!("ggml.{key}"), Value::Bool(add));
    }
    let prefix = files.config.get("add_prefix_space").and_then(Json::as_bool);
    if let Some(prefix) = model.kind.space_prefix.or(prefix.filter(|_| model.kind.permute_rotary)) {
        put("ggml.add_space_prefix", Value::Bool(prefix));
    }
    if let Some(template) = files.chat_template(dir)? {
        put("chat_template", template.as_str().into());
    }
    Ok(out)
}

struct Token {
    text: Vec<u8>,
    score: f32,
    kind: i32,
}

fn padded(size: usize) -> Vec<Token> {
    (0..size).map(|i| Token { text: format!("[PAD{i}]").into_bytes(), score: -10_000.0, kind: UNUSED }).collect()
}

fn from_pieces(path: &Path, size: usize) -> Result<Vec<Token>, FormatError> {
    let bytes = std::fs::read(path).map_err(|source| FormatError::Read { path: path.to_path_buf(), source })?;
    let pieces = pieces(&bytes).map_err(|reason| FormatError::Header { file: path.to_path_buf(), reason })?;
    let mut tokens = padded(size);
    for (token, piece) in tokens.iter_mut().zip(pieces) {
        *token = Token { text: piece.text, score: piece.score, kind: piece.kind };
    }
    Ok(tokens)
}

/// Whether a token that is not marked special is one all the same (`does_token_look_special`).
fn looks_special(text: &str) -> bool {
    ["<pad>", "<mask>", "<2mass>", "[@BOS@]"].contains(&text)
        || (text.starts_with("<|") && text.ends_with("|>"))
        || (text.starts_with("<｜") && text.ends_with("｜>"))
        || (text.starts_with("<unused") && text.ends_with('>'))
}

impl Files {
    fn read(dir: &Path) -> Result<Self, FormatError> {
        let load = |name: &str| -> Result<Map<String, Json>, FormatError> {
            resolve_inside(dir, name, dir)?.map_or_else(|| Ok(Map::new()), |path| json::read(&path))
        };
        let (tokenizer, config) = (load("tokenizer.json")?, load("tokenizer_config.json")?);
        let mut added = BTreeMap::new();
        let mut put = |id: Option<usize>, token: &Json| {
            let content = token.get("content").and_then(Json::as_str);
            if let (Some(id), Some(content)) = (id, content) {
                let special = token.get("special").and_then(Json::as_bool).unwrap_or(false);
                added.insert(id, Added { content: content.to_string(), special });
            }
        };
        for token in tokenizer.get("added_tokens").and_then(Json::as_array).into_iter().flatten() {
            put(token.get("id").and_then(Json::as_u64).map(|id| id as usize), token);
        }
        for (id, token) in config.get("added_tokens_decoder").and_then(Json::as_object).into_iter().flatten() {
            put(id.parse().ok(), token);
        }
        for (content, id) in load("added_tokens.json")? {
            if let Some(id) = id.as_u64().map(|id| id as usize).filter(|id| !added.contains_key(id)) {
                added.insert(id, Added { content, special: false });
            }
        }
        Ok(Self { path: dir.join("tokenizer.json"), tokenizer, config, added })
    }

    fn fail(&self, name: &str, reason: impl Into<String>) -> FormatError {
        field(&self.path, name, reason.into())
    }

    fn bpe_tokens(&self, bpe: &Map<String, Json>, size: usize, byte_fallback: bool) -> Result<Vec<Token>, FormatError> {
        if bpe.get("type").and_then(Json::as_str) != Some("BPE") {
            return Err(self.fail("model.type", "only BPE vocabularies can be written without a tokenizer.model"));
        }
        let vocabulary = bpe.get("vocab").and_then(Json::as_object);
        let vocabulary = vocabulary.ok_or_else(|| self.fail("model.vocab", "it is missing"))?;
        let mut tokens = padded(size);
        for (text, id) in vocabulary {
            let place = id.as_u64().and_then(|id| tokens.get_mut(usize::try_from(id).ok()?));
            let token = place.ok_or_else(|| {
                self.fail("model.vocab", format!("`{text}` has the number {id}, config.json has vocab_size {size}"))
            })?;
            let byte = byte_fallback && text.len() == 6 && text.starts_with("<0x") && text.ends_with('>');
            *token = Token { text: text.as_bytes().to_vec(), score: -1000.0, kind: if byte { BYTE } else { NORMAL } };
        }
        if byte_fallback {
            for (rank, merged) in self.merges(bpe)?.into_iter().enumerate() {
                let text = String::from_utf8_lossy(&merged).replace(' ', "");
                let id = vocabulary.get(&text).and_then(Json::as_u64);
                if let Some(token) = id.and_then(|id| tokens.get_mut(usize::try_from(id).ok()?)) {
                    token.score = token.score.max(-(rank as f32));
                }
            }
        }
        Ok(tokens)
    }

    fn with_added(&self, mut tokens: Vec<Token>, sentencepiece: bool) -> Result<Vec<Token>, FormatError> {
        let size = tokens.len();
        for (id, added) in &self.added {
            let token = tokens.get_mut(*id).ok_or_else(|| {
                let content = &added.content;
                self.fail("added_tokens", format!("`{content}` has the number {id}, config.json has vocab_size {size}"))
            })?;
            let kept = sentencepiece && token.kind != UNUSED && token.text == added.content.as_bytes();
            let control = added.special || looks_special(&added.content);
            let unknown = kept && token.kind == 2;
            token.text = match control {
                true => added.content.clone().into_bytes(),
                false => added.content.replace('\u{2581}', " ").into_bytes(),
            };
            token.score = -1000.0;
            token.kind = if unknown {
                2
            } else if control {
                CONTROL
            } else {
                USER_DEFINED
            };
        }
        Ok(tokens)
    }

    fn merges(&self, bpe: &Map<String, Json>) -> Result<Vec<Vec<u8>>, FormatError> {
        let fail = || self.fail("model.merges", "expected pairs of tokens");
        let list = bpe.get("merges").and_then(Json::as_array).ok_or_else(fail)?;
        let text = |merge: &Json| match merge {
            Json::String(text) => Some(text.clone().into_bytes()),
            Json::Array(pair) => {
                let [Json::String(a), Json::String(b)] = pair.as_slice() else { return None };
                // A space inside a part is written as byte-level BPE writes it.
                Some(format!("{} {}", a.replace(' ', "\u{120}"), b.replace(' ', "\u{120}")).into_bytes())
            }
            _ => None,
        };
        list.iter().map(|merge| text(merge).ok_or_else(fail)).collect()
    }

    /// llama.cpp's name for the pre-tokenizer.
    fn pre_tokenizer(&self) -> Result<String, FormatError> {
        let pre = self.tokenizer.get("pre_tokenizer").unwrap_or(&Json::Null);
        let steps = match pre.get("pretokenizers").and_then(Json::as_array) {
            Some(steps) => steps.clone(),
            None => vec![pre.clone()],
        };
        let kind = |step: &Json| step.get("type").and_then(Json::as_str).unwrap_or_default().to_string();
        let kinds: Vec<String> = steps.iter().map(kind).collect();
        let own_regex = |step: &Json| step.get("use_regex").and_then(Json::as_bool).unwrap_or(true);
        let regexes: Vec<&str> = steps.iter().filter_map(|s| s.get("pattern")?.get("Regex")?.as_str()).collect();
        let name = match (kinds.iter().map(String::as_str).collect::<Vec<_>>().as_slice(), regexes.as_slice()) {
            (["ByteLevel"], _) if own_regex(&steps[0]) => Some("gpt-2"),
            (["Digits", "ByteLevel"], _) if own_regex(&steps[1]) => Some("smollm"),
            (["Split", "ByteLevel"], [regex]) => table().pre_tokenizers.get(*regex).map(String::as_str),
            _ => None,
        };
        name.map(str::to_string).ok_or_else(|| {
            self.fail(
                "pre_tokenizer",
                "its name in GGUF files is not known here; pass the one that convert_hf_to_gguf.py writes as tokenizer.ggml.pre",
            )
        })
    }

    /// The text of a special token in `tokenizer_config.json`.
    fn special(&self, name: &str) -> Option<&str> {
        let entry = self.config.get(&format!("{name}_token"))?;
        entry.as_str().or_else(|| entry.get("content")?.as_str())
    }

    fn special_ids(&self, model: &Model) -> Vec<(String, u32)> {
        let of_config = |name: &str| {
            let value = model.config.map.get(&format!("{name}_token_id"))?;
            u32::try_from(value.as_u64()?).ok()
        };
        let of_text = |name: &str| {
            let text = self.special(name)?;
            self.added.iter().find(|(_, a)| a.content == text).and_then(|(id, _)| u32::try_from(*id).ok())
        };
        let gguf = |name: &str| match name {
            "unk" => "unknown".to_string(),
            "sep" => "seperator".to_string(),
            "pad" => "padding".to_string(),
            other => other.to_string(),
        };
        let ids = ["bos", "eos", "unk", "sep", "pad", "cls", "mask"].into_iter();
        ids.filter_map(|name| Some((format!("{}_token_id", gguf(name)), of_text(name).or_else(|| of_config(name))?)))
            .collect()
    }

    /// Whether the tokenizer puts special tokens at the ends: by its post-processor, else by the flags.
    fn added_at_ends(&self) -> Vec<(String, bool)> {
        let mut found: BTreeMap<&str, bool> = BTreeMap::new();
        let post = self.tokenizer.get("post_processor").unwrap_or(&Json::Null);
        let one = vec![post.clone()];
        for processor in post.get("processors").and_then(Json::as_array).unwrap_or(&one) {
            match processor.get("type").and_then(Json::as_str) {
                Some("ByteLevel") => {
                    found.entry("bos").or_insert(false);
                    found.entry("eos").or_insert(false);
                }
                Some("TemplateProcessing") => {
                    let single = processor.get("single").and_then(Json::as_array).filter(|s| s.len() > 1);
                    let token =
                        |entry: Option<&Json>| Some(entry?.get("SpecialToken")?.get("id")?.as_str()?.to_string());
                    if let Some(first) = token(single.and_then(|s| s.first())) {
                        found.insert("bos", self.special("bos") == Some(&first) || self.special("cls") == Some(&first));
                    }
                    if let Some(last) = token(single.and_then(|s| s.last())) {
                        found.insert("eos", self.special("eos") == Some(&last));
                    }
                }
                _ => {}
            }
        }
        for name in ["bos", "eos"] {
            if let Some(add) = self.config.get(&format!("add_{name}_token")).and_then(Json::as_bool) {
                found.entry(name).or_insert(add);
            }
        }
        found.into_iter().map(|(name, add)| (format!("add_{name}_token"), add)).collect()
    }

    fn chat_template(&self, dir: &Path) -> Result<Option<String>, FormatError> {
        // A file of its own goes first, as in transformers.
        if let Some(path) = resolve_inside(dir, "chat_template.jinja", dir)? {
            let text = std::fs::read_to_string(&path).map_err(|source| FormatError::Read { path, source })?;
            return Ok(Some(text));
        }
        if let Some(path) = resolve_inside(dir, "chat_template.json", dir)? {
            let map: Map<String, Json> = json::read(&path)?;
            if let Some(template) = map.get("chat_template").and_then(Json::as_str) {
                return Ok(Some(template.to_string()));
            }
        }
        Ok(self.config.get("chat_template").and_then(Json::as_str).map(str::to_string))
    }
}
