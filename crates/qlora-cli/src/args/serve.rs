//! `qlora serve`.

use std::net::IpAddr;
use std::path::PathBuf;

use burn_qlora::config::{ServeConfig, listen_address};
use clap::Args;

use super::{ModelArgs, whole};

/// `qlora serve`.
#[derive(Debug, Args)]
#[command(after_help = "\
The API is OpenAI's: POST /v1/chat/completions and /v1/completions, GET /v1/models. A request's `model` is the name of an
adapter, or of the base. The page at / talks with all of them.

An adapter without a NAME goes by its DIR, as it is written.

With --config the model, the device and the quantization are the configuration's, and so is what stands under [serve].
Without a list of adapters the run's own answers, under the name of its output folder.

Ctrl-C or SIGTERM ends the server when what it answers is answered; a second one at once.")]
pub struct ServeArgs {
    /// A configuration, as `qlora init` writes it: its base, and its section `serve`; flags override it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The model.
    #[command(flatten)]
    pub base: ModelArgs,
    /// An adapter, a folder or a hub id, and the name that requests use; may be repeated. Left out, the configuration's,
    /// or else the one that its run has left
    #[arg(long, value_name = "[NAME=]DIR")]
    pub adapter: Vec<String>,
    /// The base's name in requests; left out, the last part of --model
    #[arg(long, value_name = "NAME")]
    pub served_name: Option<String>,
    /// A Jinja chat template, or a file with one, for the base and every adapter, whatever lies beside them
    #[arg(long, value_name = "FILE|TEXT")]
    pub chat_template: Option<String>,
    /// The address to listen at (default 127.0.0.1, which is localhost); 0.0.0.0 lets other machines ask
    #[arg(long, value_parser = listen_address)]
    pub host: Option<IpAddr>,
    /// The port to listen at (default 8000); 0 takes a free one
    #[arg(long)]
    pub port: Option<u16>,
    /// What clients must send as `Authorization: Bearer KEY`
    #[arg(long, env = "QLORA_API_KEY", hide_env_values = true, value_name = "KEY")]
    pub api_key: Option<String>,
    /// Memory for keys and values of past tokens, in GiB; left out, on CUDA most of what is free, elsewhere half a GiB
    #[arg(long, value_name = "GIB")]
    pub cache_gib: Option<f64>,
    /// Tokens of prompt and answer at most; left out, what model and cache have room for
    #[arg(long, value_name = "TOKENS", value_parser = whole::<usize>)]
    pub max_tokens: Option<usize>,
    /// Answers that are written at once at most (default 64)
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    pub max_batch: Option<usize>,
    /// Tokens of a forward pass at most (default 2048); what is left beside the answers goes to prompts
    #[arg(long, value_name = "TOKENS", value_parser = whole::<usize>)]
    pub max_batch_tokens: Option<usize>,
    /// Requests that wait for their turn at most (default 1024); further ones are refused with 429
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    pub max_waiting: Option<usize>,
    /// Adapters at most (default 64), those that clients load among them
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    pub max_adapters: Option<usize>,
    /// Adapters on the device at most (default 16); the others wait in the host's memory
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    pub max_adapters_on_device: Option<usize>,
    /// Seconds that an answer may take (default 600), the wait for its turn among them
    #[arg(long, value_name = "SECONDS", value_parser = whole::<u64>)]
    pub request_timeout: Option<u64>,
    /// Let nobody load or unload adapters while the server runs
    #[arg(long)]
    pub fixed_adapters: bool,
}

impl ServeArgs {
    /// Puts the flags that are given into `[serve]`.
    pub fn apply(&self, serve: &mut ServeConfig) {
        fn set<T: Clone>(key: &mut T, flag: &Option<T>) {
            if let Some(value) = flag {
                *key = value.clone();
            }
        }
        fn set_some<T: Clone>(key: &mut Option<T>, flag: &Option<T>) {
            if flag.is_some() {
                *key = flag.clone();
            }
        }
        set_some(&mut serve.adapters, &Some(self.adapter.clone()).filter(|adapters| !adapters.is_empty()));
        set_some(&mut serve.served_name, &self.served_name);
        set_some(&mut serve.chat_template, &self.chat_template);
        set(&mut serve.host, &self.host);
        set(&mut serve.port, &self.port);
        set_some(&mut serve.cache_gib, &self.cache_gib);
        set_some(&mut serve.max_tokens, &self.max_tokens);
        set(&mut serve.max_batch, &self.max_batch);
        set(&mut serve.max_batch_tokens, &self.max_batch_tokens);
        set(&mut serve.max_waiting, &self.max_waiting);
        set(&mut serve.max_adapters, &self.max_adapters);
        set(&mut serve.max_adapters_on_device, &self.max_adapters_on_device);
        set(&mut serve.request_timeout, &self.request_timeout);
        serve.fixed_adapters |= self.fixed_adapters;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use clap::Parser;

    use super::super::{Cli, Command};
    use super::*;

    /// A flag or a key that was added without the other, or left out of [`ServeArgs::apply`], would do nothing.
    #[test]
    fn every_flag_reaches_its_key() {
        let flags = "--adapter a=b --served-name x --chat-template x --host 0.0.0.0 --port 7 --cache-gib 7 --max-tokens 7 --max-batch 7 \
            --max-batch-tokens 7 --max-waiting 7 --max-adapters 7 --max-adapters-on-device 7 --request-timeout 7 --fixed-adapters";
        let line = ["qlora", "serve"].into_iter().chain(flags.split_whitespace());
        let Command::Serve(args) = Cli::try_parse_from(line).unwrap().command else { panic!("serve") };
        let mut changed = ServeConfig::default();
        args.apply(&mut changed);
        let json = |serve: &ServeConfig| serde_json::to_value(serve).unwrap();
        let (before, after) = (json(&ServeConfig::default()), json(&changed));
        let keys = burn_qlora::config::known_keys();
        let keys: Vec<&str> = keys.iter().filter_map(|key| key.strip_prefix("serve.")).collect();
        assert_eq!(keys.len(), 14);
        keys.iter().for_each(|key| assert_ne!(before.get(*key), after.get(*key), "{key}"));
        let Command::Serve(args) = Cli::try_parse_from(["qlora", "serve"]).unwrap().command else { panic!("serve") };
        let mut same = changed.clone();
        args.apply(&mut same);
        assert_eq!(same, changed, "a flag that is not given changes nothing");
    }
}
