//! The layouts of a row: which one an object has, and reading it.
//!
//! Errors are words about the object; the caller adds its place and what the layout asks for.

use chat_text::Message;
use serde_json::Value as Json;

use crate::config::Format;
use crate::source::Object;

/// What introduces an instruction in the Alpaca data set, without and with an input.
const ALPACA: &str = "Below is an instruction that describes a task. \
    Write a response that appropriately completes the request.";
const ALPACA_WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an \
    input that provides further context. Write a response that appropriately completes the request.";

/// A row, ready to be written as one text.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Row {
    /// A conversation.
    Chat { messages: Vec<Message>, tools: Option<Json> },
    /// A text whose first part is given and whose second part is to be learned.
    Completion { prompt: String, completion: String },
    /// A text to learn from beginning to end.
    Text(String),
}

impl Format {
    /// The layout whose keys an object has.
    pub(crate) fn of_object(object: &Object) -> Result<Self, String> {
        detect(object).ok_or_else(|| keys_found(object))
    }

    /// Reads an object of this layout as a row; `system_prompt` is that of the configuration.
    pub(crate) fn read(self, object: Object, system_prompt: Option<&str>) -> Result<Row, String> {
        if !has_keys_of(&object, self) {
            return Err(keys_found(&object));
        }
        match self {
            Self::Chat => chat(object, system_prompt),
            Self::PromptCompletion => {
                let (prompt, completion) = (text_field(&object, "prompt")?, text_field(&object, "completion")?);
                Ok(Row::Completion { prompt, completion })
            }
            Self::Alpaca => alpaca(&object, system_prompt),
            Self::Text | Self::Auto => text_field(&object, "text").map(Row::Text),
        }
    }
}

fn detect(object: &Object) -> Option<Format> {
    // Conversations first: `prompt` and `completion` may be lists of messages.
    let formats = [Format::Chat, Format::PromptCompletion, Format::Alpaca, Format::Text];
    formats.into_iter().find(|format| has_keys_of(object, *format))
}

fn has_keys_of(object: &Object, format: Format) -> bool {
    let has = |key: &str| object.contains_key(key);
    match format {
        Format::Auto => detect(object).is_some(),
        Format::Chat => has("messages") || has("conversations") || is_message_pair(object),
        Format::PromptCompletion => has("prompt") && has("completion") && !is_message_pair(object),
        Format::Alpaca => has("instruction") && has("output"),
        Format::Text => has("text"),
    }
}

fn is_message_pair(object: &Object) -> bool {
    let is_list = |key: &str| object.get(key).is_some_and(Json::is_array);
    is_list("prompt") && is_list("completion")
}

fn keys_found(object: &Object) -> String {
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

fn text_field(object: &Object, key: &str) -> Result<String, String> {
    match object.get(key) {
        Some(Json::String(text)) => Ok(text.clone()),
        Some(_) => Err(format!("`{key}` is not a string")),
        None => Err(format!("`{key}` is missing")),
    }
}

fn chat(mut object: Object, system: Option<&str>) -> Result<Row, String> {
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
fn alpaca(object: &Object, system: Option<&str>) -> Result<Row, String> {
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
