//! The HTTP side: OpenAI's API over an engine's [`Handle`].
//!
//! | file | what is there |
//! |---|---|
//! | `serve.rs`, `write_timeout.rs` | connections: bounds, timeouts, shutdown |
//! | `auth.rs`, `body.rs`, `unsupported.rs`, `types/` | what comes in |
//! | `chat.rs`, `completions.rs`, `tokenize.rs`, `adapters.rs`, `models.rs`, `metrics.rs` | the endpoints |
//! | `sampling.rs`, `format.rs`, `tools.rs` | what a request asks of its answer |
//! | `session.rs` | the engine's answers to one request, read as text |
//! | `page.rs`, `page.html` | the page at `/` |
//! | `stream.rs`, `logprobs.rs`, `error.rs` | what goes out |

mod adapters;
mod auth;
mod body;
mod chat;
mod completions;
mod config;
mod error;
mod format;
mod logprobs;
mod metrics;
mod models;
mod page;
mod sampling;
mod serve;
mod session;
mod stream;
mod tokenize;
mod tools;
mod types;
mod unsupported;
mod write_timeout;

use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::http::StatusCode;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{get, post};
use chat_text::{Prompting, Tokenizer};
use tokio::sync::Semaphore;

use crate::handle::Handle;
use crate::text::{Grammars, Vocabulary};
use error::ApiError;
use metrics::Metrics;
use models::with_template;

pub use config::HttpConfig;
pub use serve::serve;

/// What all requests share. Clones are the same state.
#[derive(Clone, Debug)]
pub struct HttpState(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    handle: Handle,
    tokenizer: Arc<Tokenizer>,
    config: HttpConfig,
    base_prompting: Arc<Prompting>,
    vocabulary: OnceLock<Vocabulary>,
    grammars: OnceLock<Result<Grammars, String>>,
    metrics: Arc<Metrics>,
    /// KiB of bodies that may yet be read.
    bodies: Arc<Semaphore>,
    /// Requests that may yet be prepared at once.
    workers: Arc<Semaphore>,
    started: u64,
}

impl HttpState {
    /// The state of a server before the engine that `handle` reaches.
    pub fn new(handle: Handle, tokenizer: Tokenizer, config: HttpConfig) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self(Arc::new(Shared {
            handle,
            tokenizer: Arc::new(tokenizer),
            base_prompting: Arc::new(with_template(config.prompting.clone(), config.chat_template.as_ref())),
            vocabulary: OnceLock::new(),
            grammars: OnceLock::new(),
            metrics: Arc::default(),
            bodies: Arc::new(Semaphore::new((config.max_bodies_bytes >> 10).min(Semaphore::MAX_PERMITS))),
            workers: Arc::new(Semaphore::new(cores)),
            started: now(),
            config,
        }))
    }

    /// The line to the engine.
    pub fn handle(&self) -> &Handle {
        &self.0.handle
    }

    fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.0.tokenizer
    }

    fn config(&self) -> &HttpConfig {
        &self.0.config
    }

    fn base_prompting(&self) -> &Arc<Prompting> {
        &self.0.base_prompting
    }

    fn metrics(&self) -> &Arc<Metrics> {
        &self.0.metrics
    }

    fn bodies(&self) -> Arc<Semaphore> {
        self.0.bodies.clone()
    }

    fn started(&self) -> u64 {
        self.0.started
    }

    /// The texts of tokens; read at the first use.
    fn vocabulary(&self) -> &Vocabulary {
        self.0.vocabulary.get_or_init(|| Vocabulary::new(&self.0.tokenizer))
    }

    /// What makes constraints; built at the first use.
    fn grammars(&self) -> Result<&Grammars, ApiError> {
        let make = || {
            let eos = self.base_prompting().stop_ids(self.tokenizer());
            Grammars::new(self.vocabulary(), self.handle().limits().vocab_size, &eos)
        };
        self.0.grammars.get_or_init(make).as_ref().map_err(|error| {
            ApiError::internal(format!("answers can't be constrained with this model's vocabulary: {error}"))
        })
    }

    /// Does what takes a while, such as writing and encoding a prompt, on a thread for such work. As many run at once as
    /// there are cores; the others wait.
    async fn work<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let permit = self.0.workers.clone().acquire_owned().await;
        let state = self.clone();
        let done = tokio::task::spawn_blocking(move || {
            // Also where nobody waits any more, the place is taken until the work is done.
            let _permit = permit;
            work(&state)
        });
        done.await.unwrap_or_else(|_| Err(ApiError::internal("the request made the server's code fail")))
    }
}

/// The endpoints.
pub fn router(state: HttpState) -> Router {
    Router::new()
        .route("/", get(page::get))
        .route("/health", get(health))
        .route("/metrics", get(metrics::get))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::get))
        .route("/v1/chat/completions", post(chat::post))
        .route("/v1/completions", post(completions::post))
        .route("/v1/load_lora_adapter", post(adapters::load))
        .route("/v1/unload_lora_adapter", post(adapters::unload))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .fallback(unknown_path)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn_with_state(state.clone(), auth::check))
        .layer(from_fn(serve::bounded_header))
        .layer(from_fn_with_state(state.clone(), metrics::count))
        .with_state(state)
}

/// `GET /health`: 200 while requests are taken.
async fn health(axum::extract::State(state): axum::extract::State<HttpState>) -> Result<&'static str, ApiError> {
    if state.handle().is_closed() { Err(state.handle().refusal().into()) } else { Ok("") }
}

async fn unknown_path(uri: axum::http::Uri) -> ApiError {
    ApiError::new(StatusCode::NOT_FOUND, "unknown_path", format!("there is nothing at {}", uri.path()))
}

async fn wrong_method(method: axum::http::Method, uri: axum::http::Uri) -> ApiError {
    let message = format!("{} does not take {method}", uri.path());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "wrong_method", message)
}

/// Seconds since the Unix epoch.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A name that nothing else has.
fn unique(prefix: &str) -> String {
    format!("{prefix}{:032x}", rand::random::<u128>())
}
