//! `response_format`: answers that must be JSON.

use serde_json::json;

use super::HttpState;
use super::error::ApiError;
use super::types::{FormatKind, ResponseFormat};
use crate::text::Grammar;

/// What an answer must look like; `None` for anything.
///
/// # Errors
/// There is no schema, or it can't be enforced.
pub(super) fn grammar(state: &HttpState, format: Option<&ResponseFormat>) -> Result<Option<Grammar>, ApiError> {
    let Some(format) = format else { return Ok(None) };
    let any = json!({ "type": "object" });
    let param = "response_format.json_schema";
    let schema = match (format.kind, &format.json_schema) {
        (FormatKind::Text, _) => return Ok(None),
        (FormatKind::JsonObject, _) => &any,
        (FormatKind::JsonSchema, None) => return Err(ApiError::field(param, format!("{param}: is missing"))),
        (FormatKind::JsonSchema, Some(named)) => named.schema.as_ref().unwrap_or(&any),
    };
    let grammar = state.grammars()?.json(schema);
    grammar.map(Some).map_err(|error| {
        let param = format!("{param}.schema");
        ApiError::field(&param, format!("{param}: can't be enforced: {error}")).with_code("unsupported_schema")
    })
}
