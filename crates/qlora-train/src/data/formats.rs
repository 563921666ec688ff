//! The layouts of a row, and reading lines into them.

use std::path::Path;

use qlora_models::chat_template::Message;
use serde_json::{Map, Value as Json};

use crate::error::TrainError;

use super::config::{DataConfig, Format};

/// What introduces an instruction in the Alpaca data set, without and with an input.
const ALPACA: &str = "Below is an instruction that describes a task. \
    Write a response that appropriately completes the request.";
const ALPACA_WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an \
    input that provides further context. Write a response that appropriately completes the request.";

/// A row, ready to be written as one text.
#[derive(Clone, Debug, PartialEq)]
pub enum Row {
    /// A conversation.
    Chat { messages: Vec<Message>, tools: Option<Json> },
    /// A text whose first part is given and whose second part is to be learned.
    Completion { prompt: String, completion: String },
    /// A text to learn from beginning to end.
    Text(String),
}

/// A file's lines that are not blank.
pub struct Lines<'a> {
    path: &'a Path,
    /// Line number, from 1, and text.
    pub rows: Vec<(usize, &'a [u8])>,
}

impl<'a> Lines<'a> {
    pub fn new(path: &'a Path, bytes: &'a [u8]) -> Result<Self, TrainError> {
        let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
        let rows: Vec<_> = bytes
            .split(|b| *b == b'\n')
            .enumerate()
            .map(|(index, line)| (index + 1, line.trim_ascii()))
            .filter(|(_, line)| !line.is_empty())
            .collect();
        if rows.is_empty() {
            return Err(TrainError::DataEmpty { path: path.to_owned() });
        }
        Ok(Self { path, rows })
    }

    /// The format to read all rows with: the given one, or that of the first row.
    pub fn format(&self, given: Format) -> Result<Format, TrainError> {
        if given != Format::Auto {
            return Ok(given);
        }
        let (line, bytes) = self.rows[0];
        let object = self.object(Format::Auto, line, bytes)?;
        detect(&object).ok_or_else(|| self.wrong(Format::Auto, line, keys_found(&object)))
    }

    /// Reads a line as a row of a format.
    pub fn parse(&self, format: Format, line: usize, bytes: &[u8], config: &DataConfig) -> Result<Row, TrainError> {
        let object = self.object(format, line, bytes)?;
        let wrong = |problem: String| self.wrong(format, line, problem);
        if !has_keys_of(&object, format) {
            return Err(wrong(keys_found(&object)));
        }
        let system = config.system_prompt.as_deref();
        match format {
            Format::Chat => chat(object, system),
            Format::PromptCompletion => text_field(&object, "prompt").and_then(|prompt| {
                let completion = text_field(&object, "completion")?;
                Ok(Row::Completion { prompt, completion })
            }),
            Format::Alpaca => alpaca(&object, system),
            Format::Text | Format::Auto => text_field(&object, "text").map(Row::Text),
        }
        .map_err(wrong)
    }

    fn object(&self, format: Format, line: usize, bytes: &[u8]) -> Result<Map<String, Json>, TrainError> {
        let problem = match serde_json::from_slice(bytes) {
            Ok(Json::Object(object)) => return Ok(object),
            Ok(Json::Array(_)) => "a JSON array, where each line must be an object".to_owned(),
            Ok(_) => "a JSON value that is not an object".to_owned(),
            Err(_) if bytes.first() == Some(&b'[') => {
                "the file seems to be one JSON array, which `jq -c '.[]'` turns into lines".to_owned()
            }
            Err(e) => {
                // The parser counts lines within what it was given, which is one line.
                let message = e.to_string();
                let message = message.split(" at line ").next().unwrap_or_default();
                format!("not valid JSON: {message} at column {}", e.column())
            }
        };
        Err(self.wrong(format, line, problem))
    }

    fn wrong(&self, format: Format, line: usize, problem: String) -> TrainError {
        TrainError::DataLine { path: self.path.to_owned(), line, problem, expected: format.expected().to_owned() }
    }
}

fn detect(object: &Map<String, Json>) -> Option<Format> {
    // Conversations first: `prompt` and `completion` may be lists of messages.
    let formats = [Format::Chat, Format::PromptCompletion, Format::Alpaca, Format::Text];
    formats.into_iter().find(|format| has_keys_of(object, *format))
}

fn has_keys_of(object: &Map<String, Json>, format: Format) -> bool {
    let has = |key: &str| object.contains_key(key);
    match format {
        Format::Auto => detect(object).is_some(),
        Format::Chat => has("messages") || has("conversations") || is_message_pair(object),
        Format::PromptCompletion => has("prompt") && has("completion") && !is_message_pair(object),
        Format::Alpaca => has("instruction") && has("output"),
        Format::Text => has("text"),
    }
}

fn is_message_pair(object: &Map<String, Json>) -> bool {
    let is_list = |key: &str| object.get(key).is_some_and(Json::is_array);
    is_list("prompt") && is_list("completion")
}

fn keys_found(object: &Map<String, Json>) -> String {
    const SHOWN: usize = 8;
    let mut keys: Vec<_> = object.keys().map(|key| format!("`{key}`")).collect();
    match keys.len() {
        0 => "the object is empty".into(),
        1..=SHOWN => format!("the object has {}", keys.join(", ")),
        n => {
            keys.truncate(SHOWN);
            format!("the object has {} and {} more", keys.join(", "), n - SHOWN)
        }
    }
}

fn text_field(object: &Map<String, Json>, key: &str) -> Result<String, String> {
    match object.get(key) {
        Some(Json::String(text)) => Ok(text.clone()),
        Some(_) => Err(format!("`{key}` is not a string")),
        None => Err(format!("`{key}` is missing")),
    }
}

fn chat(mut object: Map<String, Json>, system: Option<&str>) -> Result<Row, String> {
    let mut messages = if let Some(list) = object.shift_remove("messages") {
        messages_of(list, "messages", Message::try_from)?
    } else if let Some(list) = object.shift_remove("conversations") {
        messages_of(list, "conversations", sharegpt_message)?
    } else {
        let mut both = Vec::new();
        for key in ["prompt", "completion"] {
            let list = object.shift_remove(key).unwrap_or_default();
            both.extend(messages_of(list, key, Message::try_from)?);
        }
        both
    };
    if messages.is_empty() {
        return Err("the conversation has no messages".into());
    }
    if let Some(system) = system
        && messages[0].role != "system"
    {
        messages.insert(0, Message::system(system));
    }
    // Some data sets keep the tools as JSON in a string.
    let tools = match object.shift_remove("tools") {
        Some(Json::String(text)) => {
            Some(serde_json::from_str(&text).map_err(|e| format!("`tools` is not valid JSON: {e}"))?)
        }
        Some(Json::Null) | None => None,
        tools => tools,
    };
    Ok(Row::Chat { messages, tools })
}

fn messages_of(list: Json, key: &str, read: impl Fn(Json) -> Result<Message, String>) -> Result<Vec<Message>, String> {
    let Json::Array(list) = list else {
        return Err(format!("`{key}` is not a list"));
    };
    list.into_iter().enumerate().map(|(index, item)| read(item).map_err(|e| format!("`{key}[{index}]`: {e}"))).collect()
}

/// A message of the ShareGPT layout: `{"from": .., "value": ..}`, or the usual keys.
fn sharegpt_message(item: Json) -> Result<Message, String> {
    if item.get("role").is_some() {
        return Message::try_from(item);
    }
    let text = |key: &str| match item.get(key) {
        Some(Json::String(text)) => Ok(text.as_str()),
        _ => Err(format!("must be an object with the strings `from` and `value`; `{key}` is not")),
    };
    let role = match text("from")? {
        "human" | "user" => "user",
        "gpt" | "chatgpt" | "bot" | "model" | "assistant" => "assistant",
        "system" => "system",
        "tool" | "observation" | "function_response" => "tool",
        other => {
            return Err(format!("`from` is {other:?}; known are human, user, gpt, assistant, model, system and tool"));
        }
    };
    Ok(Message::new(role, text("value")?))
}

/// The prompt of the Stanford Alpaca data set (tatsu-lab/stanford_alpaca, `train.py`).
fn alpaca(object: &Map<String, Json>, system: Option<&str>) -> Result<Row, String> {
    let instruction = text_field(object, "instruction")?;
    let completion = text_field(object, "output")?;
    let input = match object.get("input") {
        None | Some(Json::Null) => String::new(),
        Some(_) => text_field(object, "input")?,
    };
    let prompt = if input.is_empty() {
        let intro = system.unwrap_or(ALPACA);
        format!("{intro}\n\n### Instruction:\n{instruction}\n\n### Response:\n")
    } else {
        let intro = system.unwrap_or(ALPACA_WITH_INPUT);
        format!("{intro}\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n")
    };
    Ok(Row::Completion { prompt, completion })
}
