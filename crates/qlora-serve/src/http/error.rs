//! Errors in the shape that OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`.

use std::error::Error as _;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use chat_text::ChatError;
use serde_json::{Value, json};

use crate::error::ServeError;

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub status: StatusCode,
    pub code: Option<&'static str>,
    /// The field at fault.
    pub param: Option<String>,
    pub message: String,
}

/// Seconds after which a client may try again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

impl ApiError {
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code: Some(code), param: None, message: message.into() }
    }

    /// A field of the request has a value that can't be.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        let (param, message) = (param.into(), message.into());
        Self { status: StatusCode::BAD_REQUEST, code: Some("invalid_value"), param: Some(param), message }
    }

    pub fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    pub fn unknown_model(name: &str) -> Self {
        let message = format!("the model {name:?} does not exist: GET /v1/models lists those that do");
        let error = Self::new(StatusCode::NOT_FOUND, "model_not_found", message);
        Self { param: Some("model".into()), ..error }
    }

    pub fn timeout() -> Self {
        Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout", "the answer took longer than the server allows")
    }

    pub fn closed() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", "the server is closing and takes no more requests")
    }

    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::FORBIDDEN => "permission_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        }
    }

    /// The body.
    pub fn json(&self) -> Value {
        json!({ "error": { "message": self.message, "type": self.kind(), "param": self.param, "code": self.code } })
    }
}

/// An error with what it comes from.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let further = error.to_string();
        if !text.contains(&further) {
            text = format!("{text}: {further}");
        }
        source = error.source();
    }
    text
}

impl From<ServeError> for ApiError {
    fn from(error: ServeError) -> Self {
        let message = if error.source().is_some() { chain(&error) } else { error.to_string() };
        let prompt = |code| Self::field("prompt", message.clone()).with_code(code);
        match &error {
            ServeError::EmptyPrompt => prompt("empty_prompt"),
            ServeError::BeyondVocabulary { .. } => prompt("unknown_token"),
            ServeError::TooLong { .. } => prompt("context_length_exceeded"),
            ServeError::UnknownAdapter { name } => Self::unknown_model(name),
            ServeError::NameTaken { .. } => Self::field("lora_name", message).with_code("name_taken"),
            ServeError::TooManyAdapters { .. } => Self::new(StatusCode::CONFLICT, "too_many_adapters", message),
            ServeError::Adapter { .. }
            | ServeError::Prompting { .. }
            | ServeError::NotAFile { .. }
            | ServeError::NoTargets { .. } => Self::field("lora_path", message).with_code("adapter_not_served"),
            ServeError::Busy { .. } => Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message),
            ServeError::Closed => Self::closed(),
            _ => Self::internal(message),
        }
    }
}

impl From<ChatError> for ApiError {
    /// For prompts: what a client sent is not what the template or the tokenizer takes.
    fn from(error: ChatError) -> Self {
        let message = chain(&error);
        let status = StatusCode::BAD_REQUEST;
        Self { status, code: Some("prompt_refused"), param: None, message }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.json())).into_response();
        let headers = response.headers_mut();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            headers.insert(header::RETRY_AFTER, RETRY_AFTER);
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // What is left of a body that was not read is no next request.
        if matches!(self.status, StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT) {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}
