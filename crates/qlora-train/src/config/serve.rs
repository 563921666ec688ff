//! `[serve]`: what `qlora serve` is told. Training reads none of it, but refuses what the server would refuse.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Deserializer, Serialize};

use super::validate::check;
use crate::error::TrainError;

/// `[serve]`: a server over the base of `[model]`.
///
/// A client's key has no place here: a configuration is copied into checkpoints and reports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServeConfig {
    /// Adapters that answer, each `NAME=DIR`; `None` is the one in `train.output_dir`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapters: Option<Vec<String>>,
    /// The base's name in requests; `None` is the last part of the model's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub served_name: Option<String>,
    /// The chat template of the base and of every adapter, a Jinja file or text; `None` is what lies beside each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// The address to listen at.
    #[serde(deserialize_with = "host")]
    pub host: IpAddr,
    /// The port to listen at; 0 takes a free one.
    pub port: u16,
    /// Memory for keys and values of past tokens, in GiB; `None` is most of what is free on CUDA, elsewhere half a GiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_gib: Option<f64>,
    /// Tokens of prompt and answer at most; `None` for what model and cache have room for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_tokens: Option<usize>,
    /// Answers that are written at once at most.
    pub max_batch: usize,
    /// Tokens of a forward pass at most; what is left beside the answers goes to prompts.
    pub max_batch_tokens: usize,
    /// Requests that wait for their turn at most.
    pub max_waiting: usize,
    /// Adapters at most, those that clients load among them.
    pub max_adapters: usize,
    /// Adapters on the device at most; the others wait in the host's memory.
    pub max_adapters_on_device: usize,
    /// Seconds that an answer may take, the wait for its turn among them.
    pub request_timeout: u64,
    /// Whether nobody can load or unload adapters while the server runs.
    pub fixed_adapters: bool,
}

impl Default for ServeConfig {
    fn default() -> Self {
        Self {
            adapters: None,
            served_name: None,
            chat_template: None,
            host: Ipv4Addr::LOCALHOST.into(),
            port: 8000,
            cache_gib: None,
            max_tokens: None,
            max_batch: 64,
            max_batch_tokens: 2048,
            max_waiting: 1024,
            max_adapters: 64,
            max_adapters_on_device: 16,
            request_timeout: 600,
            fixed_adapters: false,
        }
    }
}

/// Reads an address to listen at; `localhost` is 127.0.0.1.
///
/// # Errors
/// It is neither, as a name of another machine; the text says what is allowed.
pub fn listen_address(text: &str) -> Result<IpAddr, String> {
    match text {
        "localhost" => Ok(Ipv4Addr::LOCALHOST.into()),
        _ => text.parse().map_err(|_| {
            "must be localhost or an IP address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them".into()
        }),
    }
}

fn host<'de, D: Deserializer<'de>>(deserializer: D) -> Result<IpAddr, D::Error> {
    listen_address(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

impl ServeConfig {
    /// Checks the section's ranges.
    ///
    /// # Errors
    /// The first value out of its range, named `serve.key`, with what is allowed.
    pub fn validate(&self) -> Result<(), TrainError> {
        for (key, number) in [
            ("serve.max_batch", self.max_batch as u64),
            ("serve.max_batch_tokens", self.max_batch_tokens as u64),
            ("serve.max_waiting", self.max_waiting as u64),
            ("serve.request_timeout", self.request_timeout),
        ] {
            check(key, number, number >= 1, "must be 1 or more")?;
        }
        if let Some(tokens) = self.max_tokens {
            check("serve.max_tokens", tokens, tokens >= 2, "must be 2 or more: a prompt and an answer")?;
        }
        if let Some(gib) = self.cache_gib {
            check("serve.cache_gib", gib, gib > 0.0 && gib.is_finite(), "must be a finite number above 0")?;
        }
        if let Some(name) = &self.served_name {
            check("serve.served_name", "\"\"", !name.is_empty(), "must be a text that is not empty")?;
        }
        Ok(())
    }
}
