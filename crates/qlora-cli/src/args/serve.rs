//! `qlora serve`.

use std::net::IpAddr;

use clap::Args;

use super::ModelArgs;

/// `qlora serve`.
#[derive(Debug, Args)]
#[command(after_help = "\
The API is OpenAI's: POST /v1/chat/completions and /v1/completions, GET /v1/models. A request's `model` is the name of an
adapter, or of the base. The page at / talks with all of them.

Ctrl-C or SIGTERM ends the server when what it answers is answered; a second one at once.")]
pub struct ServeArgs {
    /// The model.
    #[command(flatten)]
    pub base: ModelArgs,
    /// An adapter, a folder or a hub id, and the name that requests use; may be repeated
    #[arg(long, value_name = "[NAME=]DIR")]
    pub adapter: Vec<String>,
    /// The base's name in requests; left out, the last part of --model
    #[arg(long, value_name = "NAME")]
    pub served_name: Option<String>,
    /// The address to listen at; 0.0.0.0 lets other machines ask
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// The port to listen at; 0 takes a free one
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// What clients must send as `Authorization: Bearer KEY`
    #[arg(long, env = "QLORA_API_KEY", hide_env_values = true, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Memory for keys and values of past tokens, in GiB; left out, on CUDA most of what is free, elsewhere half a GiB
    #[arg(long, value_name = "GIB")]
    pub cache_gib: Option<f64>,
    /// Tokens of prompt and answer at most; left out, what model and cache have room for
    #[arg(long, value_name = "TOKENS")]
    pub max_tokens: Option<usize>,
    /// Answers that are written at once at most
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub max_batch: usize,
    /// Tokens of a forward pass at most; what is left beside the answers goes to prompts
    #[arg(long, default_value_t = 1024, value_name = "TOKENS")]
    pub max_batch_tokens: usize,
    /// Requests that wait for their turn at most; further ones are refused with 429
    #[arg(long, default_value_t = 1024, value_name = "N")]
    pub max_waiting: usize,
    /// Adapters at most, those that clients load among them
    #[arg(long, default_value_t = 64, value_name = "N")]
    pub max_adapters: usize,
    /// Adapters on the device at most; the others wait in the host's memory
    #[arg(long, default_value_t = 16, value_name = "N")]
    pub max_adapters_on_device: usize,
    /// Seconds that an answer may take, the wait for its turn among them
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    pub request_timeout: u64,
    /// Let nobody load or unload adapters while the server runs
    #[arg(long)]
    pub fixed_adapters: bool,
}
