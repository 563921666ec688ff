//! The `qlora` command. Everything that prints or exits is here; the work is done by the libraries.

#![allow(clippy::exit, reason = "a program ends with a code")]

mod adapters;
mod answers;
mod args;
mod bars;
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
mod warnings;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use burn_qlora::profile::ProfileLayer;
use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use args::{Cli, Command};
use output::{is_colored, say};

fn main() -> ExitCode {
    let cli = Cli::of_program();
    let profile = match &cli.command {
        Command::Train(args) => args.profile(),
        _ => None,
    };
    // A server's warnings are a log: what happens again is told again.
    let is_server = matches!(cli.command, Command::Serve(_));
    let log = warnings::asked_for().or_else(|| is_server.then(warnings::filter));
    let once = log.is_none().then(|| warnings::Once::default().with_filter(warnings::filter()));
    let log = log.map(|filter| {
        tracing_subscriber::fmt::layer()
            .with_writer(warnings::AboveTheBar)
            .with_ansi(is_colored(&std::io::stderr()))
            .log_internal_errors(false)
            .with_filter(filter)
    });
    tracing_subscriber::registry()
        .with(log)
        .with(once)
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
