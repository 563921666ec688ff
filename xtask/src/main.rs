//! `cargo xtask <task>`: everything that is done to the workspace rather than by it.

#![allow(clippy::print_stdout, clippy::print_stderr)] // a program for people and CI logs

mod bench;
mod checkpoint;
mod ci;
mod dependants;
mod fuzz;
mod kill;
mod program;
mod random;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Parser;

/// What is done to the workspace rather than by it.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Everything CI checks: formatting, the architecture's rules, clippy, documentation, tests
    Ci,
    /// The tests, in release, on every device at hand
    Test {
        /// Arguments of `cargo test`, such as `-p nf4-quant` or `-- --nocapture`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// The examples as crates of their own, outside of the workspace: built and tested there
    Dependants(dependants::Options),
    /// The architecture's rules: crate edges, names, headers, file lengths
    Tidy,
    /// What kernels and training steps do on a device
    Bench(bench::Options),
    /// Training runs, killed and gone on with again and again: each must end as the unbroken one
    KillTest(kill::Options),
    /// Mutated files for every command that reads them: no panic, no abort, within bounds
    Fuzz(fuzz::Options),
    /// Cut a full reference folder (testdata/make_reference.py) down to testdata/reference
    Golden {
        /// The full folder
        full: PathBuf,
    },
    /// A checkpoint with random bf16 weights
    RandomCheckpoint(checkpoint::Options),
}

fn main() -> ExitCode {
    match run(Task::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Ci => ci::ci(),
        Task::Test { args } => ci::test(&args),
        Task::Dependants(options) => dependants::run(&options),
        Task::Tidy => tidy::tidy(),
        Task::Bench(options) => bench::run(&options),
        Task::KillTest(options) => kill::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Golden { full } => golden(&full),
        Task::RandomCheckpoint(options) => checkpoint::run(&options),
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn parse(line: &str) -> Task {
        Task::try_parse_from(line.split(' ')).unwrap()
    }

    #[test]
    fn arguments_of_other_programs_go_through() {
        let Task::Test { args } = parse("xtask test -p nf4-quant --test kernels -- --nocapture") else { panic!() };
        assert_eq!(args.join(" "), "-p nf4-quant --test kernels -- --nocapture");
        let Task::Bench(options) = parse("xtask bench kernels --binary b --only x -v") else { panic!() };
        assert_eq!(options.binary, Some("b".into()));
        assert_eq!((options.what.as_str(), options.args.join(" ").as_str()), ("kernels", "--only x -v"));
        let Task::Bench(options) = parse("xtask bench step --case 4x2048") else { panic!() };
        assert_eq!((options.binary, options.args.join(" ").as_str()), (None, "--case 4x2048"));
    }

    #[test]
    fn mistakes_are_told() {
        for (line, message) in [
            ("xtask random-checkpoint --shape llama-9 --out x", "llama-2-70b"),
            ("xtask random-checkpoint --shape tiny", "--out"),
            ("xtask random-checkpoint --shape tiny --out x --max-shard-size 5bananas", "no size"),
            ("xtask golden", "FULL"),
            ("xtask kill-test --kills many", "--kills"),
            ("xtask fuzz --only x", "--only"),
        ] {
            let error = Task::try_parse_from(line.split(' ')).unwrap_err().to_string();
            assert!(error.contains(message), "{line}: {error}");
        }
    }
}
