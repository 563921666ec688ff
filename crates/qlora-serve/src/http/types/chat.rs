//! `POST /v1/chat/completions`.

use chat_text::Message;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value as Json};

use super::request;

request! {
    /// A conversation to be answered.
    ChatRequest {
        messages: Vec<Message>,
        max_tokens: Option<usize>,
        max_completion_tokens: Option<usize>,
        logprobs: Option<bool>,
        top_logprobs: Option<usize>,
        tools: Option<Vec<Tool>>,
        tool_choice: Option<ToolChoice>,
        parallel_tool_calls: Option<bool>,
        chat_template_kwargs: Option<Map<String, Json>>,
        /// A variable of the template.
        reasoning_effort: Option<String>,
        add_generation_prompt: Option<bool>,
    }
}

/// `response_format`.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct ResponseFormat {
    #[serde(rename = "type")]
    pub kind: FormatKind,
    pub json_schema: Option<NamedSchema>,
}

/// What an answer must look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FormatKind {
    Text,
    JsonObject,
    JsonSchema,
}

/// `response_format.json_schema`. Its name is of no use here, and every schema is strict.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct NamedSchema {
    pub schema: Option<Json>,
}

/// A tool: as it is for the template, and read.
#[derive(Clone, Debug)]
pub(crate) struct Tool {
    pub json: Json,
    pub function: Function,
}

/// A function that may be called.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Function {
    pub name: String,
    pub parameters: Option<Json>,
}

#[derive(Deserialize)]
struct ToolFields {
    #[serde(rename = "type")]
    kind: ToolKind,
    function: Function,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum ToolKind {
    Function,
}

impl<'de> Deserialize<'de> for Tool {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = Json::deserialize(deserializer)?;
        let ToolFields { kind: ToolKind::Function, function } =
            ToolFields::deserialize(&json).map_err(serde::de::Error::custom)?;
        Ok(Self { json, function })
    }
}

/// `tool_choice`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    None,
    Auto,
    Required,
    /// This function.
    Named(String),
}

impl<'de> Deserialize<'de> for ToolChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let json = Json::deserialize(deserializer)?;
        let named = json.get("function").and_then(|function| function.get("name")).and_then(Json::as_str);
        match (json.as_str(), named) {
            (Some("none"), _) => Ok(Self::None),
            (Some("auto"), _) => Ok(Self::Auto),
            (Some("required"), _) => Ok(Self::Required),
            (None, Some(name)) => Ok(Self::Named(name.into())),
            _ => Err(serde::de::Error::custom(
                "expected none, auto, required, or {\"type\": \"function\", \"function\": {\"name\": ..}}",
            )),
        }
    }
}
