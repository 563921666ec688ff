//! The layouts of a row: which one an object has, and reading it.
//!
//! Reading takes the keys it knows out of the object; what is left says something that nobody reads,
//! and is handed on to be told. Errors are words about the object; the caller adds its place and what
//! the layout asks for.

mod alpaca;
mod answers;
mod chat;

use chat_text::Message;
use serde_json::{Map, Value as Json};

use crate::config::Format;
use crate::source::Object;
use crate::visible;

/// A row, ready to be written as one text.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Row {
    /// A conversation.
    Chat {
        messages: Vec<Message>,
        tools: Option<Json>,
        /// Variables for the template of this row alone.
        template_kwargs: Map<String, Json>,
    },
    /// What is given and what is to be learned, turn by turn; there is at least one.
    Completion(Vec<Turn>),
    /// A text to learn from beginning to end.
    Text(String),
}

/// A part that is given and the part that should follow it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Turn {
    pub prompt: String,
    pub completion: String,
}

/// What a row says of its answers.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Answers {
    /// There is one to learn.
    One(Row),
    /// There is one, and whether it is wanted.
    Judged(Row, bool),
    /// There are two, and the first is preferred.
    Pair(Row, Row),
}

/// A row, and what of its object was not read: keys, in words.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Read {
    pub answers: Answers,
    pub unread: Vec<String>,
}

impl Format {
    /// The layout whose keys an object has.
    pub(crate) fn of_object(object: &Object) -> Result<Self, String> {
        detect(object).ok_or_else(|| keys_found(object))
    }

    /// Reads an object of this layout as a row; `system_prompt` is that of the configuration.
    pub(crate) fn read(self, object: Object, system_prompt: Option<&str>) -> Result<Read, String> {
        if !has_keys_of(&object, self) {
            return Err(self.missing(&object));
        }
        let mut unread = Vec::new();
        let answers = match answers::Answers::of(self, object)? {
            answers::Answers::One(object) => Answers::One(self.read_row(object, system_prompt, &mut unread)?),
            answers::Answers::Judged(object, wanted) => {
                let mut row = self.read_row(object, system_prompt, &mut unread)?;
                row.learn_last_answer();
                Answers::Judged(row, wanted)
            }
            answers::Answers::Pair(chosen, rejected) => {
                let mut row = |object| self.read_row(object, system_prompt, &mut unread);
                let answers = Answers::Pair(row(chosen)?, row(rejected)?);
                // Both rows leave the same keys unread.
                unread.sort_unstable();
                unread.dedup();
                answers
            }
        };
        Ok(Read { answers, unread })
    }

    /// Reads an object with one answer; what is not read of it goes to `unread`.
    fn read_row(
        self,
        mut object: Object,
        system_prompt: Option<&str>,
        unread: &mut Vec<String>,
    ) -> Result<Row, String> {
        let row = match self {
            Self::Chat => chat::read(&mut object, system_prompt, unread)?,
            Self::PromptCompletion => Row::Completion(vec![Turn {
                prompt: take_text(&mut object, "prompt")?,
                completion: take_text(&mut object, "completion")?,
            }]),
            Self::Alpaca => alpaca::read(&mut object, system_prompt)?,
            Self::Text | Self::Auto => Row::Text(take_text(&mut object, "text")?),
        };
        let rest = object.into_iter().filter(|(_, value)| !says_nothing(value));
        unread.extend(rest.map(|(key, _)| format!("`{}`", visible::text(&key))));
        Ok(row)
    }
}

impl Row {
    /// Has the last answer of a conversation be the only one that is learned.
    fn learn_last_answer(&mut self) {
        let Self::Chat { messages, .. } = self else { return };
        let last = messages.iter().rposition(|message| message.role == chat::ASSISTANT);
        messages
            .iter_mut()
            .enumerate()
            .filter(|(at, _)| Some(*at) != last)
            .for_each(|(_, message)| message.learn = false);
    }
}

impl Format {
    /// What an object lacks of this layout.
    fn missing(self, object: &Object) -> String {
        let keys: &[&str] = match self {
            Self::PromptCompletion => &["prompt", "completion"],
            Self::Alpaca => &["instruction", "output"],
            Self::Text => &["text"],
            Self::Chat | Self::Auto => &[],
        };
        let missing: Vec<_> =
            keys.iter().filter(|key| !object.contains_key(**key)).map(|key| format!("`{key}`")).collect();
        match missing.as_slice() {
            [] => keys_found(object),
            [key] => format!("{key} is missing: {}", keys_found(object)),
            keys => format!("{} are missing: {}", keys.join(" and "), keys_found(object)),
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
        Format::Chat => {
            let is_pair = answers::is_pair(object) && answers::are_messages(object);
            has("messages") || has("conversations") || is_message_pair(object) || is_pair
        }
        Format::PromptCompletion => {
            let is_pair = answers::is_pair(object) && !answers::are_messages(object) && !has("instruction");
            (has("prompt") && has("completion") && !is_message_pair(object)) || is_pair
        }
        Format::Alpaca => has("instruction") && (has("output") || answers::is_pair(object)),
        Format::Text => has("text"),
    }
}

fn is_message_pair(object: &Object) -> bool {
    let is_list = |key: &str| object.get(key).is_some_and(Json::is_array);
    is_list("prompt") && is_list("completion")
}

/// Whether a value is what tables write where a row has none.
fn says_nothing(value: &Json) -> bool {
    match value {
        Json::Null => true,
        Json::String(text) => text.is_empty(),
        Json::Array(list) => list.is_empty(),
        Json::Object(object) => object.is_empty(),
        Json::Bool(_) | Json::Number(_) => false,
    }
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

/// Takes a text that must be there.
fn take_text(object: &mut Object, key: &str) -> Result<String, String> {
    match object.shift_remove(key) {
        Some(Json::String(text)) => Ok(text),
        Some(_) => Err(format!("`{key}` is not a string")),
        None => Err(format!("`{key}` is missing")),
    }
}

/// Takes a text that may be missing, null or blank.
fn take_optional_text(object: &mut Object, key: &str) -> Result<Option<String>, String> {
    match object.shift_remove(key) {
        None | Some(Json::Null) => Ok(None),
        Some(Json::String(text)) if text.trim().is_empty() => Ok(None),
        Some(Json::String(text)) => Ok(Some(text)),
        Some(_) => Err(format!("`{key}` is not a string")),
    }
}
