//! The `qlora` command. Everything that prints or exits is here; the work is done by the libraries.

#![allow(clippy::exit, reason = "a program ends with a code")]

mod adapters;
mod answers;
mod args;
mod chat;
mod convert;
mod doctor;
mod eval;
mod exit;
mod generate;
mod hub;
mod init;
mod inspect;
mod manual;
mod merge;
mod model;
mod output;
mod outputs;
mod preview;
mod progress;
mod prompts;
mod push;
mod quantize;
mod reading;
mod serve;
mod signals;
mod sources;
mod train;
mod verify;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use burn_qlora::profile::ProfileLayer;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _};

use args::{Cli, Command};
use output::{is_colored, say};

/// What is logged unless RUST_LOG says otherwise. hf-hub and Xet log what comes back as an error, too, with the
/// addresses of storage.
const LOGGED: &str = "error,qlora_models=warn,qlora_train=warn,qlora_serve=warn,hf_hub=off,xet=off,xet_client=off,xet_data=off,xet_runtime=off";

fn main() -> ExitCode {
    let cli = Cli::of_program();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(LOGGED));
    let profile = match &cli.command {
        Command::Train(args) => args.profile(),
        _ => None,
    };
    tracing_subscriber::registry()
        .with(
            tracing_subscriber::fmt::layer()
                .with_writer(std::io::stderr)
                .with_ansi(is_colored(&std::io::stderr()))
                .log_internal_errors(false)
                .with_filter(filter),
        )
        .with(profile.as_ref().map(|profile| profile.layer().with_filter(filter_fn(ProfileLayer::filter))))
        .init();
    exit::install_panic_message();
    let run = || match cli.command {
        Command::Train(args) => train::run(&args, profile),
        Command::Preview(args) => preview::run(&args),
        Command::Init(args) => init::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Chat(args) => chat::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Eval(args) => eval::run(&args),
        Command::Merge(args) => merge::run(&args),
        Command::Combine(args) => merge::run_combine(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Push(args) => push::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Completions(args) => manual::completions(&args),
        Command::Man(args) => manual::man(&args),
    };
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(code)) => code.into(),
        Ok(Err(error)) => {
            say!("error: {}", exit::chain(&error));
            exit::code_of(&error).into()
        }
        // The panic hook has said what happened.
        Err(_) => exit::Code::Failed.into(),
    }
}
