//! The turns of a conversation, as data sets and templates know them.
//!
//! A message has a role and a text; whatever else stands in its JSON, such as `tool_calls`, is kept
//! as it is and passed on to the template.

use serde::{Deserialize, Serialize};
use serde_json::Map;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "serde_json::Value")]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
    /// Whether there is a `content`: beside tool calls it may be missing or null. Then `content` is empty.
    #[serde(skip)]
    pub has_content: bool,
    /// Whether the model is to learn this message, if an assistant wrote it. Templates don't see it.
    #[serde(skip)]
    pub learn: bool,
    /// Further keys of the message, e.g. `tool_calls`, passed on to the template.
    #[serde(flatten)]
    pub extra: Map<String, serde_json::Value>,
}

/// Names that data sets give the functions that a message calls.
const CALLS: [&str; 2] = ["tool_calls", "function_call"];

/// Names that data sets give a reasoning beside the content; the first is the one that most templates read.
pub(crate) const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

impl Default for Message {
    fn default() -> Self {
        Self::new("", "")
    }
}

impl Message {
    /// A message with no further keys.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), has_content: true, learn: true, extra: Map::new() }
    }

    /// A message of the user.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new("user", content)
    }

    /// A message of the assistant.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new("assistant", content)
    }

    /// A system message.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new("system", content)
    }

    /// Whether the message says something: in its content, a reasoning or a call.
    pub fn speaks(&self) -> bool {
        use serde_json::Value as Json;
        let given = |key: &&str| match self.extra.get(*key) {
            None | Some(Json::Null) => false,
            Some(Json::String(text)) => !text.is_empty(),
            Some(Json::Array(list)) => !list.is_empty(),
            Some(Json::Object(object)) => !object.is_empty(),
            Some(Json::Bool(_) | Json::Number(_)) => true,
        };
        !self.content.trim().is_empty() || CALLS.iter().chain(&REASONING).any(given)
    }
}

/// Reads `{"role": .., "content": .., ..}`. Content may be a string, a list of text parts, or,
/// beside `tool_calls` or a reasoning, nothing. `weight` (0 or 1), `train`, `trainable`, `loss` and
/// `training` (true or false) become `learn`. The error says in words what is wrong.
impl TryFrom<serde_json::Value> for Message {
    type Error = String;

    fn try_from(value: serde_json::Value) -> Result<Self, String> {
        use serde_json::Value as Json;
        let Json::Object(mut extra) = value else {
            return Err("a message must be an object with `role` and `content`".into());
        };
        let role = match extra.shift_remove("role") {
            Some(Json::String(role)) if !role.is_empty() => role,
            Some(_) => return Err("`role` must be a string that is not empty".into()),
            None => return Err("a message has no `role`".into()),
        };
        let learn = learn(&mut extra)?;
        let mut has_content = true;
        let content = match extra.shift_remove("content") {
            Some(Json::String(text)) => text,
            Some(Json::Null) | None if SAYS_WITHOUT_CONTENT.iter().any(|key| extra.contains_key(*key)) => {
                has_content = false;
                String::new()
            }
            None => return Err(format!("the message of `{role}` has no `content`")),
            Some(Json::Array(parts)) => parts
                .iter()
                .map(|part| match part.get("text") {
                    Some(Json::String(text)) => Ok(text.as_str()),
                    _ => Err(format!("the message of `{role}` has a part that is not text")),
                })
                .collect::<Result<String, String>>()?,
            Some(_) => return Err(format!("`content` of `{role}` must be a string")),
        };
        Ok(Self { role, content, has_content, learn, extra })
    }
}

/// Keys beside which a message needs no content.
const SAYS_WITHOUT_CONTENT: [&str; 4] = ["tool_calls", REASONING[0], REASONING[1], REASONING[2]];

/// Takes the keys by which data sets say whether a message is to be learned; by default it is.
fn learn(extra: &mut Map<String, serde_json::Value>) -> Result<bool, String> {
    use serde_json::Value as Json;
    let mut learn = true;
    for key in ["weight", "train", "trainable", "loss", "training"] {
        let wanted = match extra.shift_remove(key) {
            None | Some(Json::Null) => continue,
            Some(Json::Bool(wanted)) if key != "weight" => wanted,
            Some(Json::Number(number)) if number.as_f64() == Some(0.0) => false,
            Some(Json::Number(number)) if number.as_f64() == Some(1.0) => true,
            Some(other) if key == "weight" => {
                return Err(format!("`weight` of a message must be 0 (not learned) or 1 (learned), not {other}"));
            }
            Some(other) => return Err(format!("`{key}` of a message must be true or false, not {other}")),
        };
        // One key that says no is enough.
        learn &= wanted;
    }
    Ok(learn)
}
