//! Conversations: `messages`, ShareGPT's `conversations`, and `prompt` with `completion` as lists of
//! messages.

use chat_text::Message;
use serde_json::{Map, Value as Json, json};

use super::{Row, take_optional_text};
use crate::source::Object;

pub(super) const ASSISTANT: &str = "assistant";

/// Takes a conversation out of an object; what can't be read of it goes to `unread`.
pub(super) fn read(object: &mut Object, system_prompt: Option<&str>, unread: &mut Vec<String>) -> Result<Row, String> {
    let mut messages = if let Some(list) = object.shift_remove("messages") {
        messages_of(list, "messages", Message::try_from)?
    } else if let Some(list) = object.shift_remove("conversations") {
        messages_of(list, "conversations", sharegpt_message)?
    } else {
        let [prompt, completion] = ["prompt", "completion"].map(|key| object.shift_remove(key).unwrap_or_default());
        let mut both = messages_of(prompt, "prompt", sharegpt_message)?;
        both.iter_mut().for_each(|message| message.learn = false);
        both.extend(messages_of(completion, "completion", sharegpt_message)?);
        both
    };
    let Some(first) = messages.first() else {
        return Err("the conversation has no messages".into());
    };
    let has_system = matches!(first.role.as_str(), "system" | "developer");
    match take_optional_text(object, "system")? {
        Some(_) if has_system => unread.push("`system` beside a system message".into()),
        Some(system) => messages.insert(0, Message::system(system)),
        None => {
            if let Some(system) = system_prompt.filter(|_| !has_system) {
                messages.insert(0, Message::system(system));
            }
        }
    }
    // Some data sets keep them as JSON in a string.
    let template_kwargs = match json_of(object, "chat_template_kwargs")? {
        Json::Null => Map::new(),
        Json::Object(kwargs) => kwargs,
        _ => return Err("`chat_template_kwargs` is not an object".into()),
    };
    let tools = match json_of(object, "tools")? {
        Json::Null => None,
        Json::Array(tools) if tools.is_empty() => None,
        tools => Some(tools),
    };
    Ok(Row::Chat { messages, tools, template_kwargs })
}

/// Takes a value that may also be written as JSON in a string; null if there is none.
fn json_of(object: &mut Object, key: &str) -> Result<Json, String> {
    match object.shift_remove(key) {
        Some(Json::String(text)) if text.trim().is_empty() => Ok(Json::Null),
        Some(Json::String(text)) => {
            serde_json::from_str(&text).map_err(|error| format!("`{key}` is not valid JSON: {error}"))
        }
        value => Ok(value.unwrap_or_default()),
    }
}

fn messages_of(list: Json, key: &str, read: impl Fn(Json) -> Result<Message, String>) -> Result<Vec<Message>, String> {
    let Json::Array(list) = list else {
        return Err(format!("`{key}` is not a list"));
    };
    list.into_iter().enumerate().map(|(index, item)| read(item).map_err(|e| format!("`{key}[{index}]`: {e}"))).collect()
}

/// Whether a ShareGPT message with this `from` is what the model says.
pub(super) fn is_assistant(from: &str) -> bool {
    matches!(from, "gpt" | "chatgpt" | "bot" | "model" | ASSISTANT)
}

/// Whether it is what the model calls.
pub(super) fn is_call(from: &str) -> bool {
    matches!(from, "function_call" | "tool_call")
}

/// A message of the ShareGPT layout: `{"from": .., "value": ..}`, or the usual keys. Whatever else it
/// has is read as in other messages.
fn sharegpt_message(item: Json) -> Result<Message, String> {
    let mut item = match item {
        Json::Object(item) if !item.contains_key("role") => item,
        item => return Message::try_from(item),
    };
    let mut text = |key: &str| match item.shift_remove(key) {
        Some(Json::String(text)) => Ok(text),
        _ => Err(format!("must be an object with the strings `from` and `value`; `{key}` is not")),
    };
    let from = text("from")?;
    let role = match from.as_str() {
        "human" | "user" => "user",
        from if is_assistant(from) || is_call(from) => ASSISTANT,
        "system" => "system",
        "tool" | "observation" | "function_response" | "tool_response" => "tool",
        other => {
            return Err(format!(
                "`from` is {other:?}; known are human, user, gpt, assistant, model, system, tool, function_call and \
                 observation"
            ));
        }
    };
    let value = text("value")?;
    item.insert("role".into(), role.into());
    if is_call(&from) {
        item.insert("content".into(), "".into());
        item.insert("tool_calls".into(), tool_calls(&value, &from)?);
    } else {
        item.insert("content".into(), value.into());
    }
    Message::try_from(Json::Object(item))
}

/// The calls of a `function_call` turn, which LLaMA-Factory writes as JSON text: one call
/// `{"name", "arguments"}` or a list of them.
fn tool_calls(value: &str, from: &str) -> Result<Json, String> {
    let wrong = |problem: &str| format!("`value` of {from} {problem}; expected JSON with `name` and `arguments`");
    let value: Json = serde_json::from_str(value).map_err(|error| wrong(&format!("is not valid JSON: {error}")))?;
    let calls = match value {
        Json::Array(calls) => calls,
        call => vec![call],
    };
    let calls = calls.into_iter().map(|mut call| {
        // Some data sets write the object of OpenAI's API.
        let call = match call.get_mut("function") {
            Some(function) => function.take(),
            None => call,
        };
        let Some(Json::String(name)) = call.get("name") else {
            return Err(wrong("has a call without a name"));
        };
        let arguments = call.get("arguments").or_else(|| call.get("parameters")).cloned();
        let arguments = arguments.unwrap_or_else(|| Json::Object(Map::new()));
        Ok(json!({"type": "function", "function": {"name": name, "arguments": arguments}}))
    });
    let calls: Vec<_> = calls.collect::<Result<_, _>>()?;
    match calls.is_empty() {
        true => Err(wrong("has no call")),
        false => Ok(Json::Array(calls)),
    }
}
