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

/// Runs `qlora-bench` with `args`, less our own `--binary FILE`.
pub fn run(args: &[String]) -> Result<()> {
    let (binary, rest) = split(args)?;
    let binary = match binary {
        Some(binary) => std::path::absolute(binary)?,
        None => build()?,
    };
    let mut command = Command::new(binary);
    if root().is_dir() {
        command.current_dir(root());
    }
    run_command(command.args(rest))
}

fn split(args: &[String]) -> Result<(Option<PathBuf>, Vec<String>)> {
    let mut rest = args.to_vec();
    let Some(at) = rest.iter().position(|arg| arg == "--binary") else { return Ok((None, rest)) };
    rest.remove(at);
    if at == rest.len() {
        bail!("--binary needs a file");
    }
    Ok((Some(rest.remove(at).into()), rest))
}

/// Builds with the whole workspace's features: another set would build Burn once more.
fn build() -> Result<PathBuf> {
    let output = cargo()
        .args(["build", "--release", "--workspace", "--bin", "qlora-bench"])
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
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_binary_is_taken_out_of_the_arguments() {
        let args = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(split(&args("kernels --only x")).unwrap(), (None, args("kernels --only x")));
        assert_eq!(split(&args("kernels --binary b --only x")).unwrap(), (Some("b".into()), args("kernels --only x")));
        assert!(split(&args("kernels --binary")).is_err());
    }

    #[test]
    fn cargo_says_where_the_program_is() {
        let messages = "{\"reason\":\"compiler-artifact\",\"executable\":null}\n\
            {\"reason\":\"compiler-artifact\",\"executable\":\"/t/qlora-bench\"}\n{\"reason\":\"build-finished\"}\n";
        assert_eq!(executable(messages), Some("/t/qlora-bench".into()));
        assert_eq!(executable(""), None);
    }
}
