//! `cargo xtask ci` and `cargo xtask test`.
//!
//! Everything builds in the release profile: clippy and the documentation share one check of the
//! dependencies, tests and programs one build of them, which take minutes each. The tests run last:
//! their closing lines are the end of the log.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::{cargo, run_command, tidy};

/// Runs every check, and the tests even if a check before them failed.
pub fn ci() -> Result<()> {
    let mut failed = Vec::new();
    let mut step = |name: &'static str, result: Result<()>| match result {
        Ok(()) => println!("xtask: {name}: ok"),
        Err(error) => {
            println!("xtask: {name}: FAILED: {error:#}");
            failed.push(name);
        }
    };
    step("fmt", run_command(cargo().args(["fmt", "--all", "--check"])));
    step("tidy", tidy::tidy());
    let clippy = ["clippy", "--release", "--workspace", "--all-targets", "--", "--deny", "warnings"];
    step("clippy", run_command(cargo().args(clippy)));
    let doc = ["doc", "--release", "--workspace", "--no-deps", "--document-private-items"];
    step("doc", run_command(cargo().args(doc).env("RUSTDOCFLAGS", "--deny warnings")));
    step("test", test(&[]));
    match failed.is_empty() {
        true => Ok(()),
        false => bail!("failed: {}", failed.join(", ")),
    }
}

/// Runs the tests. Kernel tests find the runtimes of this machine themselves and skip the others;
/// a runtime that we know to be here is required, so that it isn't skipped unnoticed.
pub fn test(args: &[String]) -> Result<()> {
    const RUNTIMES: &str = "NF4_QUANT_RUNTIMES";
    let mut runtimes = Vec::new();
    if software_vulkan() {
        runtimes.push("wgpu");
    }
    if Path::new("/dev/nvidia0").exists() {
        runtimes.push("cuda");
    }
    let mut command = cargo();
    command.args(["test", "--release", "--workspace"]).args(args);
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // Mesa's drivers want a folder of the user's own.
        command.env("XDG_RUNTIME_DIR", std::env::temp_dir());
    }
    if std::env::var_os(RUNTIMES).is_none() && !runtimes.is_empty() {
        command.env(RUNTIMES, runtimes.join(","));
    }
    println!(
        "xtask: GPU runtimes that must work: {}",
        if runtimes.is_empty() { "none".into() } else { runtimes.join(", ") }
    );
    run_command(&mut command)
}

/// Whether Mesa's software Vulkan is here; installs it on Linux where that needs no questions.
fn software_vulkan() -> bool {
    let lavapipe = || {
        let drivers = Path::new("/usr/share/vulkan/icd.d").read_dir().into_iter().flatten().flatten();
        drivers.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("lvp_icd"))
    };
    if !lavapipe() && cfg!(target_os = "linux") && is_root() {
        let install = |args: &[&str]| {
            let command = Command::new("apt-get").args(args).env("DEBIAN_FRONTEND", "noninteractive").output();
            command.is_ok_and(|output| output.status.success())
        };
        let packages = ["install", "--yes", "--no-install-recommends", "mesa-vulkan-drivers", "libvulkan1"];
        // A fresh container has no package lists yet.
        let installed = install(&packages) || install(&["update"]) && install(&packages);
        println!("xtask: Mesa's software Vulkan: {}", if installed { "installed" } else { "can't be installed" });
    }
    lavapipe()
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.starts_with(b"0\n"))
}
