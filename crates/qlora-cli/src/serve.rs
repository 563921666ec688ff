//! `qlora serve`: a model and its adapters answer over HTTP.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use burn_qlora::chat_text::Prompting;
use burn_qlora::qlora_serve::http::{HttpConfig, HttpState, serve};
use burn_qlora::qlora_serve::{CacheSize, EngineConfig, Handle};
use burn_qlora::{Device, Tokenizer};
use tokio::net::TcpListener;
use tokio::sync::Notify;

use crate::adapters::{self, NamedAdapter};
use crate::answers::Running;
use crate::args::ServeArgs;
use crate::exit::{Code, UsageError};
use crate::model::{Placement, base_dir, base_name, default_cache};
use crate::output::say;
use crate::signals::on_interrupt;

const GIB: f64 = (1u64 << 30) as f64;

/// Runs the command until a signal ends it.
pub fn run(args: &ServeArgs) -> Result<Code> {
    check(args)?;
    let (adapters, named) = adapters::named(&args.adapter)?;
    let model = base_name(&args.base, named.as_deref())?;
    let dir = base_dir(&args.base, model)?;
    let tokenizer = Tokenizer::from_dir(&dir)?;
    let mut http = HttpConfig::new(served_name(args, model));
    http.api_key = args.api_key.clone();
    http.prompting = Prompting::of_adapter(&dir)?.unwrap_or_default();
    // Whoever can load adapters can have any folder read.
    http.adapter_updates = !args.fixed_adapters && !is_open(args);
    http.request_timeout = Duration::from_secs(args.request_timeout);
    adapters::check_names(&adapters, &http.served_name)?;

    let loaded = Placement::new(&args.base)?.load(&dir)?;
    let config = engine_config(args, loaded.device());
    let engine = Running::start(loaded, &config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("can't start the server")?;
    let loaded = engine.load_adapters(&adapters);
    let served = loaded.and_then(|()| runtime.block_on(answer(args, &adapters, &engine.handle, tokenizer, http)));
    let ended = engine.end();
    served?;
    ended?;
    Ok(Code::Done)
}

/// Listens, and serves until a signal comes.
async fn answer(
    args: &ServeArgs,
    adapters: &[NamedAdapter],
    handle: &Handle,
    tokenizer: Tokenizer,
    http: HttpConfig,
) -> Result<()> {
    let address = SocketAddr::new(args.host, args.port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("can't listen at {address}: is another server there? --port 0 takes a free port"))?;
    let address = listener.local_addr().context("can't read the address")?;
    if is_open(args) {
        say!("warning: every machine that reaches {address} can ask; none can load adapters. --api-key asks for a key");
    }
    let names: Vec<&str> = adapters.iter().map(|adapter| adapter.name.as_str()).collect();
    let tokens = handle.limits().max_tokens;
    let models = [&[http.served_name.as_str()], &names[..]].concat().join(", ");
    say!("{models} at http://{address}, {tokens} tokens of prompt and answer; Ctrl-C ends the server");
    let stop = Arc::new(Notify::new());
    let notify = stop.clone();
    let mut asked = false;
    on_interrupt(move || {
        if std::mem::replace(&mut asked, true) {
            std::process::exit(Code::Interrupted as i32);
        }
        say!("answers that are under way are finished; once more ends the server at once");
        notify.notify_one();
    })?;
    let state = HttpState::new(handle.clone(), tokenizer, http);
    serve(listener, state, stop.notified()).await.context("the server failed")
}

/// The base's name: as the flag says, else the last part of the model's.
fn served_name(args: &ServeArgs, model: &str) -> String {
    let last = || Path::new(model).file_name().map(|name| name.to_string_lossy().into_owned());
    args.served_name.clone().or_else(last).unwrap_or_else(|| model.to_string())
}

/// Whether other machines can ask without a key.
fn is_open(args: &ServeArgs) -> bool {
    !args.host.is_loopback() && args.api_key.is_none()
}

fn engine_config(args: &ServeArgs, device: &Device) -> EngineConfig {
    let cache = match args.cache_gib {
        Some(gib) => CacheSize::Bytes((gib * GIB) as u64),
        None => default_cache(device),
    };
    EngineConfig {
        cache,
        max_batch: args.max_batch,
        max_batch_tokens: args.max_batch_tokens,
        max_waiting: args.max_waiting,
        max_tokens: args.max_tokens,
        max_adapters: args.max_adapters,
        max_adapters_on_device: args.max_adapters_on_device,
        ..EngineConfig::default()
    }
}

fn check(args: &ServeArgs) -> Result<(), UsageError> {
    let wrong = |flag: &str, allowed: &str| Err(UsageError(format!("{flag} must be {allowed}")));
    for (flag, number) in [
        ("--max-batch", args.max_batch),
        ("--max-batch-tokens", args.max_batch_tokens),
        ("--max-waiting", args.max_waiting),
        ("--max-tokens", args.max_tokens.unwrap_or(2).saturating_sub(1)),
    ] {
        if number == 0 {
            return wrong(flag, if flag == "--max-tokens" { "2 or more" } else { "1 or more" });
        }
    }
    match args.cache_gib {
        Some(gib) if !(gib > 0.0 && gib.is_finite()) => wrong("--cache-gib", "above 0"),
        _ if args.api_key.as_deref() == Some("") => wrong("--api-key", "a text that is not empty"),
        _ => Ok(()),
    }
}
