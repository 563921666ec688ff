//! The turns of a conversation, as data sets and templates know them.
//!
//! A message has a role and a text; whatever else stands in its JSON, such as `tool_calls`, is kept
//! as it is and passed on to the template.

use serde::{Deserialize, Serialize};
use serde_json::Map;

/// One turn of a conversation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "serde_json::Value")]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, `tool`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
    /// Further keys of the message, e.g. `tool_calls`, passed on to the template.
    #[serde(flatten)]
    pub extra: Map<String, serde_json::Value>,
}

impl Message {
    /// A message with no further keys.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), extra: Map::new() }
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
}

/// Reads `{"role": .., "content": .., ..}`. Content may be a string, a list of text parts, or,
/// beside `tool_calls`, nothing. The error says in words what is wrong.
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
        let content = match extra.shift_remove("content") {
            Some(Json::String(text)) => text,
            Some(Json::Null) | None if extra.contains_key("tool_calls") => String::new(),
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
        Ok(Self { role, content, extra })
    }
}
