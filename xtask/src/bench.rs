//! `cargo xtask bench`: builds `qlora-bench` and runs it.
//!
//! The program links Burn and CubeCL; this one doesn't, so it starts cargo instead. On a machine with a GPU
//! and no Rust, `--binary` names a program that was built elsewhere; where this one was built elsewhere too,
//! they run in the folder that they are started in.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{cargo, root, run_command};

/// What `cargo xtask bench` takes.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// kernels, step, curves, load, stress or first-use
    pub what: String,
    /// A `qlora-bench` that was built elsewhere
    #[arg(long)]
    pub binary: Option<PathBuf>,
    /// Arguments of qlora-bench, such as `--peer python3` or `--only TEXT`; after our own
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub args: Vec<String>,
}

/// Runs `qlora-bench`.
pub fn run(options: &Options) -> Result<()> {
    let binary = match &options.binary {
        Some(binary) => std::path::absolute(binary)?,
        None => build("qlora-bench")?,
    };
    let mut command = Command::new(binary);
    if root().is_dir() {
        command.current_dir(root());
    }
    run_command(command.arg(&options.what).args(&options.args))
}

/// Builds a program with the whole workspace's features: another set would build Burn once more.
pub(crate) fn build(program: &str) -> Result<PathBuf> {
    let output = cargo()
        .args(["build", "--release", "--workspace", "--bin", program])
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()?;
    if !output.status.success() {
        bail!("cargo build failed: {}", output.status);
    }
    executable(&String::from_utf8_lossy(&output.stdout)).context("cargo built no program")
}

/// The last program among cargo's messages.
fn executable(messages: &str) -> Option<PathBuf> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    messages.filter_map(|message| Some(message.get("executable")?.as_str()?.into())).next_back()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_says_where_the_program_is() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null}\n\
            {\"reason\":\"compiler-artifact\",\"executable\":\"/t/qlora-bench\"}\n{\"reason\":\"build-finished\"}\n";
        assert_eq!(executable(messages), Some("/t/qlora-bench".into()));
        assert_eq!(executable(""), None);
    }
}
