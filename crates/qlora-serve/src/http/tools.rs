//! The tools of a chat request: checked, and what they ask of prompt, answer and constraint.

use serde_json::{Value as Json, json};

use super::error::ApiError;
use super::types::{Tool, ToolChoice};
use crate::text::{ToolFormat, ToolSchema};

/// Tools that a model may call.
#[derive(Clone, Debug)]
pub(super) struct Tools {
    /// For the template.
    pub json: Json,
    pub names: Vec<String>,
    pub format: ToolFormat,
    /// The tools of which one must be called; empty where none must.
    pub forced: Vec<ToolSchema>,
    /// Whether one call is all.
    pub one_call: bool,
}

/// Longest name and number of tools.
const LONGEST_NAME: usize = 64;
const MOST_TOOLS: usize = 128;

/// Checks a request's tools. `format` is how the model of this name writes calls, where that is known.
///
/// # Errors
/// It names the field.
pub(super) fn read(
    tools: Option<Vec<Tool>>,
    choice: Option<ToolChoice>,
    parallel: Option<bool>,
    model: &str,
    format: Option<ToolFormat>,
) -> Result<Option<Tools>, ApiError> {
    let tools = tools.unwrap_or_default();
    if tools.len() > MOST_TOOLS {
        return Err(ApiError::field("tools", format!("tools: {} tools, more than {MOST_TOOLS}", tools.len())));
    }
    for (index, tool) in tools.iter().enumerate() {
        let name = &tool.function.name;
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-' || c == '.';
        let fail = |problem: &str| {
            let param = format!("tools[{index}].function.name");
            Err(ApiError::field(&param, format!("{param}: {name:?} {problem}")))
        };
        if name.is_empty() || name.len() > LONGEST_NAME || !name.chars().all(allowed) {
            return fail("is no name of letters, digits, `_`, `-` and `.`");
        }
        if tools[..index].iter().any(|other| other.function.name == *name) {
            return fail("is the name of another tool");
        }
    }
    let required = match choice {
        None | Some(ToolChoice::Auto) => None,
        Some(ToolChoice::None) => return Ok(None),
        Some(ToolChoice::Required) => Some(None),
        Some(ToolChoice::Named(name)) => Some(Some(name)),
    };
    if tools.is_empty() {
        return match required {
            None => Ok(None),
            Some(_) => Err(ApiError::field("tool_choice", "tool_choice: there are no `tools`")),
        };
    }
    let Some(format) = format else {
        let message = format!(
            "tools: the chat template of {model} writes no tools in a form that is known; the server's --chat-template gives another one"
        );
        return Err(ApiError::field("tools", message));
    };
    // A function without parameters takes none.
    let none = json!({ "type": "object", "properties": {}, "additionalProperties": false });
    let schema = |tool: &Tool| ToolSchema {
        name: tool.function.name.clone(),
        parameters: tool.function.parameters.clone().unwrap_or_else(|| none.clone()),
    };
    let (forced, named) = match required {
        None => (Vec::new(), false),
        Some(None) => (tools.iter().map(schema).collect(), false),
        Some(Some(name)) => match tools.iter().find(|tool| tool.function.name == name) {
            Some(tool) => (vec![schema(tool)], true),
            None => return Err(ApiError::field("tool_choice", format!("tool_choice: no tool is called {name:?}"))),
        },
    };
    Ok(Some(Tools {
        names: tools.iter().map(|tool| tool.function.name.clone()).collect(),
        json: tools.into_iter().map(|tool| tool.json).collect(),
        format,
        forced,
        one_call: named || parallel == Some(false),
    }))
}

/// A name for a call. Templates of Mistral take no others than of nine letters and digits.
pub(super) fn call_id(format: Option<ToolFormat>) -> String {
    let letters = |count| {
        const LETTERS: &[u8] = b"0123456789abcdefghijklmnopqrstuvwxyz";
        (0..count).map(|_| char::from(LETTERS[rand::random_range(0..LETTERS.len())])).collect::<String>()
    };
    match format {
        Some(ToolFormat::Listed) => letters(9),
        _ => format!("call_{}", letters(24)),
    }
}
