//! Bodies of requests: bounded in size and time, and read as JSON with errors that name the field.

use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, TryAcquireError};

use super::HttpState;
use super::error::ApiError;

/// The unit of the budget for bodies.
const KIB: usize = 1 << 10;

/// A body, and its part of the budget for bodies.
#[derive(Debug)]
pub(super) struct ReadBody {
    pub bytes: Vec<u8>,
    _budget: Option<OwnedSemaphorePermit>,
}

/// Reads a request's body.
///
/// # Errors
/// It is no JSON by its type (a form that a foreign page sends is none), too large, too slow, or it breaks off.
pub(super) async fn read(state: &HttpState, request: Request) -> Result<ReadBody, ApiError> {
    check_type(request.headers())?;
    let most = state.config().max_body_bytes;
    let too_large = || {
        let message = format!("the request's body is larger than {most} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    };
    let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if announced.is_some_and(|length: u64| length > most as u64) {
        return Err(too_large());
    }
    match tokio::time::timeout(state.config().read_timeout, collect(state, request.into_body(), most)).await {
        Ok(Ok(body)) => body.ok_or_else(too_large),
        Ok(Err(error)) => Err(error),
        Err(_) => {
            let message = "the request's body did not come in time";
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message))
        }
    }
}

/// The body; `None` if it has more bytes than it may.
async fn collect(state: &HttpState, body: Body, most: usize) -> Result<Option<ReadBody>, ApiError> {
    let mut body = body.into_data_stream();
    let mut read = ReadBody { bytes: Vec::new(), _budget: None };
    let mut held = 0;
    while let Some(chunk) = body.next().await {
        let chunk: Bytes = chunk.map_err(|error| {
            let message = format!("the request's body broke off: {error}");
            ApiError::new(StatusCode::BAD_REQUEST, "body_incomplete", message)
        })?;
        let length = read.bytes.len() + chunk.len();
        if length > most {
            return Ok(None);
        }
        let needed = length.div_ceil(KIB);
        if needed > held {
            let further = u32::try_from(needed - held).unwrap_or(u32::MAX);
            let permit = match state.bodies().try_acquire_many_owned(further) {
                Ok(permit) => permit,
                Err(TryAcquireError::NoPermits | TryAcquireError::Closed) => {
                    let message = "too many requests are being read: try again later";
                    return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, "bodies_full", message));
                }
            };
            held = needed;
            match &mut read._budget {
                Some(budget) => budget.merge(permit),
                none => *none = Some(permit),
            }
        }
        read.bytes.extend_from_slice(&chunk);
    }
    Ok(Some(read))
}

fn check_type(headers: &HeaderMap) -> Result<(), ApiError> {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    if essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json")) {
        return Ok(());
    }
    let message = "send JSON, with the header `Content-Type: application/json`";
    Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "not_json", message))
}

/// Reads JSON.
///
/// # Errors
/// It is malformed, or a field has a wrong type: the error names it.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    // Lists would be taken as a request's fields in order.
    if body.trim_ascii_start().first().is_some_and(|byte| *byte != b'{') {
        let message = "the request's body is no JSON object";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", message));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let error = error.into_inner();
        // The position is of use where the text is broken, the path where a value is wrong.
        let text = error.to_string();
        let text = text.rsplit_once(" at line ").map_or(text.as_str(), |(text, _)| text);
        let missing = text.strip_prefix("missing field `").and_then(|text| text.strip_suffix('`'));
        match missing {
            _ if !error.is_data() => malformed(&error),
            Some(field) => {
                let param = if path == "." { field.to_owned() } else { format!("{path}.{field}") };
                ApiError::field(&param, format!("{param}: is missing")).with_code("missing_field")
            }
            None if path == "." => malformed(&error),
            None => ApiError::field(&path, format!("{path}: {}", plain(text))).with_code("invalid_type"),
        }
    })?;
    json.end().map_err(|error| malformed(&error))?;
    Ok(value)
}

/// Characters of a client's text that are repeated to it at most.
const MOST_REPEATED: usize = 60;

/// What serde says of a value with a wrong type, in words of JSON.
fn plain(text: &str) -> String {
    let wrong = text.strip_prefix("invalid type: ").or_else(|| text.strip_prefix("invalid value: "));
    let Some((found, expected)) = wrong.and_then(|text| text.rsplit_once(", expected ")) else { return text.into() };
    let expected = match expected {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "a map" => "an object",
        "path string" | "string or map" => "a string",
        other if other.starts_with("struct ") => "an object",
        other => other,
    };
    let value = |kind: &str| found.strip_prefix(kind)?.strip_prefix('`')?.strip_suffix('`');
    let found = match found {
        "sequence" => "a list",
        "map" => "an object",
        other if other.starts_with("string ") => &other["string ".len()..],
        other => ["integer ", "floating point ", "boolean "].into_iter().find_map(value).unwrap_or(other),
    };
    let shown = match found.char_indices().nth(MOST_REPEATED) {
        Some((end, _)) => format!("{}…", &found[..end]),
        None => found.into(),
    };
    format!("must be {expected}, not {shown}")
}

pub(super) fn malformed(error: &serde_json::Error) -> ApiError {
    let message = format!("the request's body can't be read as JSON of this request: {error}");
    ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", message)
}
