//! `cargo xtask <task>`: everything that is done to the workspace rather than by it.

#![allow(clippy::print_stdout, clippy::print_stderr)] // a program for people and CI logs

mod bench;
mod checkpoint;
mod ci;
mod normal;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

const HELP: &str = "\
usage: cargo xtask <task>

  ci                 everything CI checks: formatting, tidy, clippy, documentation, tests
  test [ARGS...]     the tests, in release, on every runtime at hand; ARGS go to `cargo test`
  tidy               the architecture's rules: crate edges, names, headers, file lengths
  bench kernels|step|stress|first-use [--binary FILE] [ARGS...]
                     what kernels and training steps do; ARGS go to qlora-bench, such as --peer python3 or --only TEXT;
                     --binary runs one that was built elsewhere
  golden FULL_DIR    cut a full reference folder (testdata/make_reference.py) down to testdata/reference
  random-checkpoint --shape SHAPE --out DIR [--max-shard-size 5GB] [--seed 0]
                     a checkpoint with random bf16 weights; SHAPE: llama-2-7b, llama-3.1-8b, tiny";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    let (task, rest) = args.split_first().context(HELP)?;
    match (task.as_str(), rest) {
        ("ci", []) => ci::ci(),
        ("test", rest) => ci::test(rest),
        ("tidy", []) => tidy::tidy(),
        ("bench", rest) => bench::run(rest),
        ("golden", [full]) => golden(Path::new(full)),
        ("random-checkpoint", rest) => checkpoint::run(rest),
        ("help" | "--help" | "-h", _) => {
            println!("{HELP}");
            Ok(())
        }
        _ => bail!("{HELP}"),
    }
}

fn golden(full: &Path) -> Result<()> {
    let testdata = root().join("testdata");
    run_command(Command::new("python3").arg(testdata.join("trim.py")).arg(full).arg(testdata.join("reference")))
}

/// The workspace's folder, from what cargo says when it runs this program: checkouts that share a build folder may share
/// the program too.
fn root() -> PathBuf {
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&manifest).parent().map(Path::to_owned).unwrap_or_default()
}

/// Cargo, in the workspace's folder.
fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

fn run_command(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("can't start {command:?}"))?;
    if !status.success() {
        bail!("{command:?} failed: {status}");
    }
    Ok(())
}
