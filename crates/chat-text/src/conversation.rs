//! A conversation as a template sees it.
//!
//! Messages reach a template as transformers' `apply_chat_template` gives them: keys that are null are left out, and
//! a reasoning is given as `reasoning_content` and as `thinking`, whichever name the data uses. Three things differ
//! from it, as what transformers does there is of no use in training:
//!
//! - Tool calls whose `arguments` are JSON in a string (OpenAI's layout) are given as an object. A template that
//!   fails on an object, or writes it as Python would, gets the JSON text instead.
//! - A message without content gets an empty one, where a template fails without.
//! - Contents are given as lists of one text each, where a template fails on texts or writes none of them.

use minijinja::Value;
use minijinja::value::Serde;
use serde_json::{Map, Value as Json, json};

use crate::message::{Message, REASONING};

/// How tool calls' arguments are given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arguments {
    Object,
    Text,
}

/// In what form a template is given what data sets write in several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Form {
    pub arguments: Arguments,
    /// Whether a message without content gets an empty one.
    pub empty_content: bool,
    /// Whether contents are lists of parts, as templates of models that see images want them.
    pub parts: bool,
}

impl Form {
    /// The forms worth trying with these messages, in order.
    pub fn of(messages: &[Message]) -> Vec<Self> {
        let calls = messages.iter().any(|message| calls(&message.extra).next().is_some());
        let missing = messages.iter().any(|message| !message.has_content);
        let mut forms = Vec::new();
        for parts in [false, true] {
            for arguments in [Arguments::Object, Arguments::Text] {
                for empty_content in [false, true] {
                    if (calls || arguments == Arguments::Object) && (missing || !empty_content) {
                        forms.push(Self { arguments, empty_content, parts });
                    }
                }
            }
        }
        forms
    }
}

/// The functions that a message calls.
pub(crate) fn calls(message: &Map<String, Json>) -> impl Iterator<Item = &Map<String, Json>> {
    let calls = message.get("tool_calls").and_then(Json::as_array).into_iter().flatten();
    calls.filter_map(|call| call.get("function").unwrap_or(call).as_object())
}

/// As [`calls`], to be changed.
pub(crate) fn calls_mut(message: &mut Map<String, Json>) -> impl Iterator<Item = &mut Map<String, Json>> {
    let calls = message.get_mut("tool_calls").and_then(Json::as_array_mut).into_iter().flatten();
    calls.filter_map(|call| match call.get("function").is_some() {
        true => call.get_mut("function").and_then(Json::as_object_mut),
        false => call.as_object_mut(),
    })
}

/// A message's keys as the template gets them.
pub(crate) fn message_json(message: &Message, form: Form) -> Map<String, Json> {
    let mut json = Map::new();
    json.insert("role".into(), message.role.as_str().into());
    if message.has_content || form.empty_content {
        let content = message.content.as_str();
        let content = if form.parts { json!([{"type": "text", "text": content}]) } else { content.into() };
        json.insert("content".into(), content);
    }
    let extra = message.extra.iter().filter(|(_, value)| !value.is_null());
    json.extend(extra.map(|(key, value)| (key.clone(), value.clone())));
    let reasoning = REASONING.iter().find_map(|key| json.get(*key)).cloned();
    if let Some(reasoning) = reasoning {
        if !json.contains_key("thinking") {
            json.insert("thinking".into(), reasoning.clone());
        }
        json.insert("reasoning_content".into(), reasoning);
    }
    for call in calls_mut(&mut json) {
        let Some(arguments) = call.get_mut("arguments") else { continue };
        match (form.arguments, &*arguments) {
            (Arguments::Object, Json::String(text)) => {
                if let Ok(object @ Json::Object(_)) = serde_json::from_str(text) {
                    *arguments = object;
                }
            }
            (Arguments::Text, Json::Object(_)) => *arguments = dumps(arguments).into(),
            _ => {}
        }
    }
    json
}

/// The messages of a conversation, ready for the engine.
pub(crate) fn values<'a>(messages: impl IntoIterator<Item = &'a Map<String, Json>>) -> Vec<Value> {
    messages.into_iter().map(|message| Value::from(Serde(message))).collect()
}

/// Whether a text holds the arguments of a call as Python writes a dict, which is what becomes of an object in a
/// template that expects JSON text.
pub(crate) fn has_python_dict(text: &str, messages: &[Message]) -> bool {
    messages.iter().flat_map(|message| calls(&message.extra)).any(|call| {
        let parsed: Json;
        let arguments = match call.get("arguments") {
            Some(Json::String(text)) => {
                parsed = serde_json::from_str(text).unwrap_or_default();
                &parsed
            }
            Some(arguments) => arguments,
            None => return false,
        };
        let first = arguments.as_object().and_then(|arguments| arguments.keys().next());
        first.is_some_and(|key| text.contains(&format!("{{'{key}': ")))
    })
}

/// Whether a text holds none of what messages say.
pub(crate) fn says_nothing(text: &str, messages: &[Message]) -> bool {
    let last = |message: &Message| message.content.trim().lines().next_back().map(str::to_owned);
    let mut lines = messages.iter().filter_map(last).peekable();
    lines.peek().is_some() && lines.all(|line| !text.contains(line.trim()))
}

/// JSON with blanks, as `json.dumps` writes it.
fn dumps(value: &Json) -> String {
    match value {
        Json::Array(items) => format!("[{}]", items.iter().map(dumps).collect::<Vec<_>>().join(", ")),
        Json::Object(map) => {
            let pairs = map.iter().map(|(key, value)| format!("{}: {}", Json::from(key.as_str()), dumps(value)));
            format!("{{{}}}", pairs.collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}
