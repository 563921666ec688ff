//! Answers as server-sent events: chunks of JSON as they come, then `[DONE]`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::unfold;
use serde_json::Value;

use super::error::ApiError;
use super::session::{Session, Update, Usage};
use super::types::StreamOptions;

/// How an endpoint writes what is new.
pub(super) trait Chunks: Send + 'static {
    /// Before anything came.
    fn start(&mut self) -> Vec<Value>;

    /// What is new.
    fn update(&mut self, update: Update) -> Vec<Value>;

    /// Behind the last.
    fn end(&mut self, usage: Usage) -> Vec<Value>;
}

/// Comments that tell a waiting client, and what is between, that the server is there.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

struct Streaming<C> {
    session: Option<Session>,
    chunks: C,
    ready: VecDeque<String>,
}

impl<C: Chunks> Streaming<C> {
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(text) = self.ready.pop_front() {
                return Some(text);
            }
            let session = self.session.as_mut()?;
            let (chunks, over) = match session.next().await {
                Some(Ok(update)) => (self.chunks.update(update), false),
                // What was sent can't be taken back: the error is the last event.
                Some(Err(error)) => (vec![ApiError::json(&error)], true),
                None => (self.chunks.end(session.usage()), true),
            };
            self.ready.extend(chunks.iter().map(Value::to_string));
            if over {
                self.ready.push_back("[DONE]".into());
                self.session = None;
            }
        }
    }
}

/// The response that streams a session.
pub(super) fn respond(session: Session, mut chunks: impl Chunks) -> Response {
    let ready = chunks.start().iter().map(Value::to_string).collect();
    let streaming = Streaming { session: Some(session), chunks, ready };
    let events = unfold(streaming, |mut streaming| async {
        let text = streaming.next().await?;
        Some((Ok::<_, Infallible>(Event::default().data(text)), streaming))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

/// Whether a request wants a stream, and the usage in it.
///
/// # Errors
/// There are options of a stream where none is wanted.
pub(super) fn wanted(stream: Option<bool>, options: Option<StreamOptions>) -> Result<(bool, bool), ApiError> {
    let stream = stream.unwrap_or(false);
    if options.is_some() && !stream {
        return Err(ApiError::field("stream_options", "stream_options: only with `stream`"));
    }
    Ok((stream, options.and_then(|options| options.include_usage).unwrap_or(false)))
}

/// `usage` of an answer.
pub(super) fn usage(usage: Usage) -> Value {
    serde_json::json!({
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": { "cached_tokens": usage.cached },
    })
}
