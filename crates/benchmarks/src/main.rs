//! `qlora-bench`: what kernels and training steps do on this machine's GPU, and what others do on the same shapes.
//!
//! - `kernels`: the median time of each kernel on real models' shapes, GB/s or TFLOP/s, and the share of
//!   what the card gives at best, measured in the same run. With `--peer python3` the same shapes through
//!   bitsandbytes and cuBLAS.
//! - `step`: whole training steps of models with random weights, beside PEFT and Unsloth.
//! - `curves`: what a step costs by tokens, rank, experts and memory, as tables and drawings.
//! - `serve`: an engine with streams and adapters: tokens a second, time to the first token, memory.
//! - `load`: a checkpoint's way to the device, in seconds and GB/s.
//! - `stress`: rows that grow until the device is short of memory.
//! - `first-use`: the time to the first 4-bit product of a process, with nothing compiled and with
//!   everything in the cache.
//!
//! A kernel family is a file in `families` with a list of cases; nothing else needs to know it.
#![allow(clippy::print_stdout, clippy::print_stderr)] // a program for people

mod bench;
mod case;
mod ceilings;
mod families;
mod first_use;
mod kernels;
mod load;
mod machine;
mod peer;
mod report;
mod serve;
mod shapes;
mod step;
mod timer;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Measures kernels and training steps on a device.
#[derive(Parser)]
#[command(name = "qlora-bench", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Time, throughput and share of the card's ceilings for each kernel and shape.
    Kernels(kernels::Args),
    /// Time, memory and launches of whole training steps.
    Step(Box<step::Args>),
    /// What a step costs by tokens, rank, experts and memory: tables and drawings.
    Curves(step::curves::Args),
    /// Tokens a second of an engine with streams and adapters.
    Serve(serve::Args),
    /// The time that a checkpoint takes to the device, in 4 bits.
    Load(load::Args),
    /// Rows that grow until the device is short of memory: optimizer state makes way, and the run goes on.
    Stress(step::stress::Args),
    /// Cold and warm time to the first 4-bit product of a process.
    FirstUse(first_use::Args),
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "error".into()))
        .with_writer(std::io::stderr)
        .init();
    let result = match Args::parse().command {
        Command::Kernels(args) => kernels::run(&args),
        Command::Step(args) => step::run(&args),
        Command::Curves(args) => step::curves::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Load(args) => load::run(&args),
        Command::Stress(args) => step::stress::run(&args),
        Command::FirstUse(args) => first_use::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
