//! What a server is told: names, bounds, defaults.

use std::fmt;
use std::time::Duration;

use chat_text::{ChatTemplate, Prompting};

use crate::request::Sampling;
use crate::text::ToolFormat;

/// What a server is told.
#[derive(Clone)]
pub struct HttpConfig {
    /// The base model's name in requests.
    pub served_name: String,
    /// What clients must send as `Authorization: Bearer ..`; `None` lets everybody ask.
    pub api_key: Option<String>,
    /// How prompts of the base model are written, and of adapters beside which nothing about it lies.
    pub prompting: Prompting,
    /// The chat template of the base model and of every adapter, whatever lies beside them; `None` leaves them theirs.
    pub chat_template: Option<ChatTemplate>,
    /// How models write tool calls, where their chat templates don't say.
    pub tool_format: Option<ToolFormat>,
    /// How tokens are chosen where a request does not say. The seed is not used: without one each answer is different.
    pub sampling: Sampling,
    /// Whether clients can load and unload adapters. Whoever can has the server read any folder that it can read.
    pub adapter_updates: bool,
    /// Bytes of a request's body at most.
    pub max_body_bytes: usize,
    /// Bytes of all bodies that are being read at most.
    pub max_bodies_bytes: usize,
    /// Answers to one request at most: prompts times `n`.
    pub max_choices: usize,
    /// Likeliest tokens of which log probabilities are given at most.
    pub max_logprobs: usize,
    /// Connections at most; further ones wait to be accepted.
    pub max_connections: usize,
    /// How long an answer may take, the wait for its turn among it.
    pub request_timeout: Duration,
    /// How long a client may take to send a request's header, and then its body; also how long a connection may be
    /// idle.
    pub read_timeout: Duration,
    /// How long a client may take no more of an answer.
    pub write_timeout: Duration,
}

impl HttpConfig {
    /// The default bounds, for a base model of this name.
    pub fn new(served_name: impl Into<String>) -> Self {
        Self {
            served_name: served_name.into(),
            api_key: None,
            prompting: Prompting::default(),
            chat_template: None,
            tool_format: None,
            sampling: Sampling { temperature: 1.0, ..Sampling::default() },
            adapter_updates: true,
            max_body_bytes: 8 << 20,
            max_bodies_bytes: 256 << 20,
            max_choices: 256,
            max_logprobs: 20,
            max_connections: 16_384,
            request_timeout: Duration::from_secs(600),
            read_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(60),
        }
    }
}

impl fmt::Debug for HttpConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the key.
        f.debug_struct("HttpConfig")
            .field("served_name", &self.served_name)
            .field("has_api_key", &self.api_key.is_some())
            .field("request_timeout", &self.request_timeout)
            .finish_non_exhaustive()
    }
}
