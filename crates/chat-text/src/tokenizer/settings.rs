//! What stands beside `tokenizer.json`: special tokens, stop tokens, the chat template.

use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use crate::error::ChatError;
use crate::template::SpecialTokens;

/// The names templates and this crate ask for.
const SPECIAL: [&str; 4] = ["bos_token", "eos_token", "pad_token", "unk_token"];

/// Settings gathered from a checkpoint folder.
pub(super) struct Settings {
    pub special_tokens: SpecialTokens,
    /// Ids that `generation_config.json` or `config.json` name.
    pub bos_ids: Vec<u64>,
    pub eos_ids: Vec<u64>,
    pub pad_ids: Vec<u64>,
    pub model_max_length: Option<usize>,
    /// The template, or why there is none to choose.
    pub chat_template: Option<Result<String, String>>,
}

impl Settings {
    pub fn from_dir(dir: &Path) -> Result<Self, ChatError> {
        let config = JsonFile::read(dir, "tokenizer_config.json")?;
        let map = JsonFile::read(dir, "special_tokens_map.json")?;
        let generation = JsonFile::read(dir, "generation_config.json")?;
        let model = JsonFile::read(dir, "config.json")?;
        let mut special_tokens = SpecialTokens::default();
        for name in SPECIAL {
            for file in [&config, &map] {
                if let Some(text) = file.special_token(name)? {
                    special_tokens.insert_if_missing(name, text);
                }
            }
        }
        let ids = |field: &str| -> Result<Vec<u64>, ChatError> {
            let ids = generation.token_ids(field)?;
            if ids.is_empty() { model.token_ids(field) } else { Ok(ids) }
        };
        Ok(Self {
            special_tokens,
            bos_ids: ids("bos_token_id")?,
            eos_ids: ids("eos_token_id")?,
            pad_ids: ids("pad_token_id")?,
            // "No limit" is written as 1e30, which is not an integer in JSON.
            model_max_length: (config.get("model_max_length").and_then(Json::as_u64))
                .and_then(|n| usize::try_from(n).ok()),
            chat_template: chat_template(dir, &config)?,
        })
    }
}

/// The template's three homes, the newest first: its own file, `chat_template.json`, and
/// `tokenizer_config.json`.
fn chat_template(dir: &Path, config: &JsonFile) -> Result<Option<Result<String, String>>, ChatError> {
    let path = dir.join("chat_template.jinja");
    match crate::files::read_to_string(&path) {
        Ok(source) => return Ok(Some(Ok(source))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(source) => return Err(ChatError::Read { path, source }),
    }
    let file = JsonFile::read(dir, "chat_template.json")?;
    Ok(match file.chat_template()? {
        Some(found) => Some(found),
        None => config.chat_template()?,
    })
}

/// A JSON file that may be absent; then it has no fields.
struct JsonFile {
    path: PathBuf,
    json: Json,
}

impl JsonFile {
    fn read(dir: &Path, name: &str) -> Result<Self, ChatError> {
        let path = dir.join(name);
        let json = match crate::files::read(&path) {
            Ok(bytes) => {
                serde_json::from_slice(&bytes).map_err(|source| ChatError::Json { path: path.clone(), source })?
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Json::Null,
            Err(source) => return Err(ChatError::Read { path, source }),
        };
        Ok(Self { path, json })
    }

    /// A field that is there and not null.
    fn get(&self, field: &str) -> Option<&Json> {
        self.json.get(field).filter(|value| !value.is_null())
    }

    fn wrong(&self, field: &str, problem: &str) -> ChatError {
        ChatError::Field { path: self.path.clone(), field: field.to_owned(), problem: problem.to_owned() }
    }

    /// A token as a string or, as older files have it, an object with `content`.
    fn special_token(&self, name: &str) -> Result<Option<String>, ChatError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        match value.get("content").unwrap_or(value) {
            Json::String(text) => Ok(Some(text.clone())),
            // Some exporters write `false` for "none".
            Json::Bool(false) => Ok(None),
            _ => Err(self.wrong(name, "must be a string or an object with `content`")),
        }
    }

    /// One id or a list of ids.
    fn token_ids(&self, field: &str) -> Result<Vec<u64>, ChatError> {
        let one = |value: &Json| match value {
            // -1 stands for "none" in some older configurations.
            Json::Number(n) if n.as_i64().is_some_and(|n| n < 0) => Some(Vec::new()),
            Json::Number(n) => n.as_u64().map(|n| vec![n]),
            _ => None,
        };
        let ids = match self.get(field) {
            None => Some(Vec::new()),
            Some(Json::Array(list)) => {
                let ids: Option<Vec<_>> = list.iter().map(one).collect();
                ids.map(|ids| ids.concat())
            }
            Some(value) => one(value),
        };
        ids.ok_or_else(|| self.wrong(field, "must be a token id or a list of token ids"))
    }

    /// A template, or a list of named templates of which `default` is taken.
    fn chat_template(&self) -> Result<Option<Result<String, String>>, ChatError> {
        let field = "chat_template";
        let wrong = || self.wrong(field, "must be a string or a list of {name, template}");
        let list: Vec<(&str, &str)> = match self.get(field) {
            None => return Ok(None),
            Some(Json::String(source)) => return Ok(Some(Ok(source.clone()))),
            Some(Json::Object(named)) => {
                let pairs = named.iter().map(|(n, t)| Some((n.as_str(), t.as_str()?)));
                pairs.collect::<Option<_>>().ok_or_else(wrong)?
            }
            Some(Json::Array(list)) => {
                let mut pairs = Vec::new();
                for item in list {
                    match (item["name"].as_str(), item["template"].as_str()) {
                        (Some(name), Some(template)) => pairs.push((name, template)),
                        _ => return Err(wrong()),
                    }
                }
                pairs
            }
            Some(_) => return Err(wrong()),
        };
        Ok(match list.as_slice() {
            [] => None,
            [(_, only)] => Some(Ok((*only).to_owned())),
            _ => Some(match list.iter().find(|(name, _)| *name == "default") {
                Some((_, template)) => Ok((*template).to_owned()),
                None => {
                    let names: Vec<_> = list.iter().map(|(name, _)| *name).collect();
                    Err(format!("none of the templates {} is called default; give `chat_template`", names.join(", ")))
                }
            }),
        })
    }
}
