//! `conformance`: compares this workspace with a folder of recorded outputs and prints one line per case.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use conformance::{Reference, Report, Section};

/// Compares with recorded outputs of PEFT, bitsandbytes and transformers.
///
/// Prints one line per case (status, name, error, bar) and a last line `N passed, M failed`. Skipped
/// lines count as neither. Exit codes: 0 all passed, 1 some failed, 2 nothing could be run.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// A folder made by testdata/make_reference.py.
    #[arg(long, value_name = "DIR")]
    reference: PathBuf,
    /// auto, cpu, cuda, cuda:<index>, vulkan or metal.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Only these sections, separated by commas.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Section>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(args: &Args) -> anyhow::Result<usize> {
    let reference = Reference::open(&args.reference)?;
    let device = burn_qlora::select_device(&args.device)?;
    println!("device: {device:?}");
    let sections = if args.only.is_empty() { &Section::ALL[..] } else { &args.only[..] };
    let mut report = Report::with_listener(|line| println!("{line}"));
    conformance::run(&reference, &device, sections, &mut report);
    println!("{} passed, {} failed", report.passed(), report.failed());
    Ok(report.failed())
}
