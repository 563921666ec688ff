//! `qlora serve`: a model and its adapters answer over HTTP.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use burn_qlora::chat_text::Prompting;
use burn_qlora::config::ServeConfig;
use burn_qlora::qlora_serve::http::{HttpConfig, HttpState, serve};
use burn_qlora::qlora_serve::{CacheSize, EngineConfig, Handle};
use burn_qlora::{ChatTemplate, Device, Tokenizer, TrainConfig};
use tokio::net::TcpListener;
use tokio::sync::Notify;

use crate::adapters::{self, NamedAdapter};
use crate::answers::Running;
use crate::args::{ModelArgs, ServeArgs};
use crate::exit::{Code, UsageError};
use crate::model::{Placement, base_dir, base_name, default_cache};
use crate::output::say;
use crate::signals::on_interrupt;

/// How long clients may take for the errors that a failed engine leaves them.
const AFTER_FAILURE: Duration = Duration::from_secs(2);

const GIB: f64 = (1u64 << 30) as f64;

/// Runs the command until a signal ends it.
pub fn run(args: &ServeArgs) -> Result<Code> {
    if args.api_key.as_deref() == Some("") {
        return Err(UsageError("--api-key must be a text that is not empty".into()).into());
    }
    let (config, base) = settings(args)?;
    let serve = &config.serve;
    let (adapters, named) = adapters::named(serve.adapters.as_deref().unwrap_or_default())?;
    let model = base_name(&base, &named)?;
    let dir = base_dir(&base, model, &named)?;
    let tokenizer = Tokenizer::from_dir(&dir)?;
    let mut http = HttpConfig::new(served_name(serve, model));
    http.api_key = args.api_key.clone();
    http.prompting = Prompting::of_adapter(&dir)?.unwrap_or_default();
    http.chat_template = serve.chat_template.as_deref().map(ChatTemplate::from_setting).transpose()?;
    // Whoever can load adapters can have any folder read.
    http.adapter_updates = !serve.fixed_adapters && !is_open(serve, &http);
    http.request_timeout = Duration::from_secs(serve.request_timeout);
    adapters::check_names(&adapters, &http.served_name)?;

    let loaded = Placement::over(&base, config.clone())?.load(&dir)?;
    let engine_config = engine_config(serve, loaded.device());
    let engine = Running::start(loaded, &engine_config)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("can't start the server")?;
    let loaded = engine.load_adapters(&adapters);
    let served = loaded.and_then(|()| runtime.block_on(answer(serve, &adapters, &engine.handle, tokenizer, http)));
    let ended = engine.end();
    served?;
    ended?;
    Ok(Code::Done)
}

/// The configuration with the flags that are given, and what both say of the base.
fn settings(args: &ServeArgs) -> Result<(TrainConfig, ModelArgs)> {
    let mut base = args.base.clone();
    let mut config = TrainConfig::default();
    if let Some(file) = &args.config {
        config = TrainConfig::load(file)?;
        if base.model.is_none() && !config.model.path.is_empty() {
            base.model = Some(config.model.path.clone());
            base.revision = base.revision.or(config.model.revision.clone());
        }
        if config.serve.adapters.is_none() && args.adapter.is_empty() {
            config.serve.adapters = Some(vec![adapter_of(&config.train.output_dir, file)?]);
        }
    }
    args.apply(&mut config.serve);
    config.serve.validate()?;
    Ok((config, base))
}

/// The adapter that a run has left, by the name of its folder.
fn adapter_of(run: &Path, file: &Path) -> Result<String, UsageError> {
    let dir = run.join("adapter");
    let name = run.file_name().map(|name| name.to_string_lossy());
    match name {
        Some(name) if dir.is_dir() => Ok(format!("{name}={}", dir.display())),
        _ => Err(UsageError(format!(
            "{} is not there: train it with {}, name others with --adapter, or serve the base alone with adapters = [] under [serve]",
            dir.display(),
            file.display()
        ))),
    }
}

/// Listens, and serves until a signal comes.
async fn answer(
    serve_config: &ServeConfig,
    adapters: &[NamedAdapter],
    handle: &Handle,
    tokenizer: Tokenizer,
    http: HttpConfig,
) -> Result<()> {
    let address = SocketAddr::new(serve_config.host, serve_config.port);
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("can't listen at {address}: is another server there? --port 0 takes a free port"))?;
    let address = listener.local_addr().context("can't read the address")?;
    if is_open(serve_config, &http) {
        say!("warning: every machine that reaches {address} can ask; none can load adapters. --api-key asks for a key");
    }
    let names: Vec<&str> = adapters.iter().map(|adapter| adapter.name.as_str()).collect();
    let tokens = handle.limits().max_tokens;
    if let Some(asked) = serve_config.max_tokens.filter(|asked| *asked > tokens) {
        say!("note: model and cache have room for {tokens} tokens of prompt and answer, not for max_tokens = {asked}");
    }
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
    // A server whose engine has failed answers nothing; whoever started it is to know at once.
    let shutdown = async {
        tokio::select! {
            () = stop.notified() => {}
            _ = handle.ended() => {}
        }
    };
    let failed = async {
        if handle.ended().await {
            tokio::time::sleep(AFTER_FAILURE).await;
        } else {
            std::future::pending().await
        }
    };
    tokio::select! {
        served = serve(listener, state, shutdown) => served.context("the server failed"),
        () = failed => Ok(()),
    }
}

/// The base's name: the one that is given, else the last part of the model's.
fn served_name(serve: &ServeConfig, model: &str) -> String {
    let last = || Path::new(model).file_name().map(|name| name.to_string_lossy().into_owned());
    serve.served_name.clone().or_else(last).unwrap_or_else(|| model.to_string())
}

/// Whether other machines can ask without a key.
fn is_open(serve: &ServeConfig, http: &HttpConfig) -> bool {
    !serve.host.is_loopback() && http.api_key.is_none()
}

fn engine_config(serve: &ServeConfig, device: &Device) -> EngineConfig {
    let cache = match serve.cache_gib {
        Some(gib) => CacheSize::Bytes((gib * GIB) as u64),
        None => default_cache(device),
    };
    EngineConfig {
        cache,
        max_batch: serve.max_batch,
        max_batch_tokens: serve.max_batch_tokens,
        max_waiting: serve.max_waiting,
        max_tokens: serve.max_tokens,
        max_adapters: serve.max_adapters,
        max_adapters_on_device: serve.max_adapters_on_device,
        ..EngineConfig::default()
    }
}
