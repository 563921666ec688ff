//! `GET /metrics`: what the engine and the server did, in Prometheus' text format.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::HttpState;

/// Upper bounds of the buckets of latencies, in seconds.
const SECONDS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// How often durations fell into each bucket.
#[derive(Debug, Default)]
struct Histogram {
    buckets: [AtomicU64; SECONDS.len() + 1],
    nanoseconds: AtomicU64,
}

impl Histogram {
    fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = SECONDS.iter().position(|bound| seconds <= *bound).unwrap_or(SECONDS.len());
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn write(&self, text: &mut String, name: &str, help: &str) {
        head(text, name, "histogram", help);
        let mut count = 0;
        let bounds = SECONDS.iter().map(f64::to_string).chain(["+Inf".into()]);
        for (bucket, bound) in self.buckets.iter().zip(bounds) {
            count += bucket.load(Ordering::Relaxed);
            line(text, format_args!("{name}_bucket{{le=\"{bound}\"}} {count}"));
        }
        let seconds = Duration::from_nanos(self.nanoseconds.load(Ordering::Relaxed)).as_secs_f64();
        line(text, format_args!("{name}_sum {seconds}\n{name}_count {count}"));
    }
}

/// What the server counts; the engine counts for itself.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    first_token: Histogram,
    between_tokens: Histogram,
    answer: Histogram,
    /// Responses by status.
    responses: Mutex<BTreeMap<u16, u64>>,
}

/// Times of one answer.
#[derive(Debug)]
pub(super) struct RequestTimes {
    metrics: Arc<Metrics>,
    start: Instant,
    last: Option<Instant>,
}

impl RequestTimes {
    /// For an answer that is asked for now.
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { metrics, start: Instant::now(), last: None }
    }

    /// A token came.
    pub fn token(&mut self) {
        let now = Instant::now();
        match self.last.replace(now) {
            None => self.metrics.first_token.observe(now - self.start),
            Some(last) => self.metrics.between_tokens.observe(now - last),
        }
    }

    /// The answer is whole.
    pub fn finish(&mut self) {
        self.metrics.answer.observe(self.start.elapsed());
    }
}

/// Counts responses by their status, and tells of them.
pub(super) async fn count(State(state): State<HttpState>, request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let start = Instant::now();
    let response = next.run(request).await;
    tracing::debug!(%method, path, status = response.status().as_u16(), elapsed = ?start.elapsed(), "answered");
    let mut responses = state.metrics().responses.lock().unwrap_or_else(PoisonError::into_inner);
    *responses.entry(response.status().as_u16()).or_default() += 1;
    drop(responses);
    response
}

/// `GET /metrics`.
pub(super) async fn get(State(state): State<HttpState>) -> impl IntoResponse {
    let counters = state.handle().counters();
    let mut text = String::new();
    let gauges: [(&str, &AtomicUsize, &str); 4] = [
        ("qlora_requests_waiting", &counters.waiting, "Requests that wait to be run."),
        ("qlora_requests_running", &counters.running, "Requests in the running batch."),
        ("qlora_cache_blocks_used", &counters.blocks_used, "Blocks of the cache that requests hold."),
        ("qlora_cache_blocks", &counters.blocks, "Blocks of the cache."),
    ];
    for (name, value, help) in gauges {
        head(&mut text, name, "gauge", help);
        line(&mut text, format_args!("{name} {}", value.load(Ordering::Relaxed)));
    }
    head(&mut text, "qlora_adapters", "gauge", "Adapters that are loaded.");
    line(&mut text, format_args!("qlora_adapters {}", state.handle().adapters().len()));
    let totals: [(&str, &AtomicU64, &str); 9] = [
        ("qlora_requests_total", &counters.requests, "Requests that the engine took."),
        (
            "qlora_requests_finished_total",
            &counters.finished,
            "Requests that ended with an answer, at a stop text too.",
        ),
        ("qlora_requests_cancelled_total", &counters.cancelled, "Requests whose reader went away."),
        ("qlora_requests_failed_total", &counters.failed, "Requests that failed."),
        ("qlora_prompt_tokens_total", &counters.prompt_tokens, "Tokens of prompts that were computed."),
        ("qlora_cached_tokens_total", &counters.cached_tokens, "Tokens of prompts that were taken from the cache."),
        ("qlora_generated_tokens_total", &counters.generated_tokens, "New tokens."),
        ("qlora_preemptions_total", &counters.preemptions, "Times that a request gave its cache back."),
        ("qlora_steps_total", &counters.steps, "Forward passes."),
    ];
    for (name, value, help) in totals {
        head(&mut text, name, "counter", help);
        line(&mut text, format_args!("{name} {}", value.load(Ordering::Relaxed)));
    }
    let metrics = state.metrics();
    head(&mut text, "qlora_http_responses_total", "counter", "HTTP responses by status.");
    for (status, count) in metrics.responses.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        line(&mut text, format_args!("qlora_http_responses_total{{status=\"{status}\"}} {count}"));
    }
    metrics.first_token.write(&mut text, "qlora_time_to_first_token_seconds", "From a request to its first token.");
    metrics.between_tokens.write(&mut text, "qlora_time_between_tokens_seconds", "From a token to the next.");
    metrics.answer.write(&mut text, "qlora_request_seconds", "From a request to the end of its answer.");
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

fn head(text: &mut String, name: &str, kind: &str, help: &str) {
    line(text, format_args!("# HELP {name} {help}\n# TYPE {name} {kind}"));
}

fn line(text: &mut String, line: std::fmt::Arguments) {
    // Writing to a `String` does not fail.
    let _ = writeln!(text, "{line}");
}
