//! The API key.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;

use super::HttpState;
use super::error::ApiError;

/// Paths that everybody may ask for: the page asks for the key itself, and a load balancer has none.
const OPEN: [&str; 2] = ["/", "/health"];

/// Lets a request through that has the key, or needs none.
pub(super) async fn check(State(state): State<HttpState>, request: Request, next: Next) -> Response {
    match &state.config().api_key {
        Some(key) if !OPEN.contains(&request.uri().path()) && !has_key(request.headers(), key) => {
            let message = "the API key is missing or wrong: send it as `Authorization: Bearer KEY`";
            ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message).into_response()
        }
        _ => next.run(request).await,
    }
}

fn has_key(headers: &HeaderMap, key: &str) -> bool {
    let value = headers.get(header::AUTHORIZATION).map_or(&[][..], |value| value.as_bytes());
    let given = match value.split_at_checked(7) {
        Some((scheme, given)) if scheme.eq_ignore_ascii_case(b"bearer ") => given.trim_ascii(),
        _ => return false,
    };
    // In a time that does not tell how much of the key is right.
    given.ct_eq(key.as_bytes()).into()
}
