//! `cargo xtask ci` and `cargo xtask test`.
//!
//! Everything builds in the release profile: clippy and the documentation share one check of the
//! dependencies, tests and programs one build of them, which take minutes each. The tests run last:
//! their closing lines are the end of the log.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::{cargo, root, run_command, tidy};

/// The devices that the test suites must find; `test-support` reads it.
const DEVICES: &str = "QLORA_TEST_DEVICES";

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
    // What the workspace's build never does: the codec alone, and the stand-in that is no member.
    let codec = ["check", "--release", "--package", "nf4-quant", "--no-default-features"];
    step("nf4-quant without kernels", run_command(cargo().args(codec)));
    let stand_in = ["test", "--release", "--manifest-path", "third_party/turso/Cargo.toml"];
    step("third_party/turso", run_command(cargo().args(stand_in)));
    step("deny", if_installed("cargo-deny", cargo().args(["deny", "--all-features", "check"])));
    step("typos", if_installed("typos", Command::new("typos").current_dir(root())));
    step("test", test(&[]));
    match failed.is_empty() {
        true => Ok(()),
        false => bail!("failed: {}", failed.join(", ")),
    }
}

/// Runs a tool that is no part of a Rust installation, where it is there.
fn if_installed(program: &str, command: &mut Command) -> Result<()> {
    if Command::new(program).arg("--version").output().is_err() {
        println!("xtask: {program} is not installed: `cargo install` gets it (CONTRIBUTING.md)");
        return Ok(());
    }
    run_command(command)
}

/// Runs the tests. Suites look for the GPU devices of this machine themselves and skip what is missing; a device that
/// is known to be here is named, so that a suite without it fails. What is skipped is in the log, test by test.
pub fn test(args: &[String]) -> Result<()> {
    let named = match std::env::var(DEVICES) {
        Ok(named) => named,
        Err(_) => devices_here().join(","),
    };
    let mut command = cargo();
    command.args(["test", "--release", "--workspace"]).args(args);
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // Mesa's drivers want a folder of the user's own.
        command.env("XDG_RUNTIME_DIR", std::env::temp_dir());
    }
    match named.as_str() {
        "" => println!("xtask: tests run on the CPU and on GPU devices that answer; {DEVICES} names those that must"),
        named => {
            println!("xtask: tests run on the CPU and on {named}, which must be there ({DEVICES})");
            command.env(DEVICES, named);
        }
    }
    run_command(&mut command)
}

/// GPU devices that are known to be on this machine.
fn devices_here() -> Vec<&'static str> {
    let cuda = Path::new("/dev/nvidia0").exists();
    [("wgpu", software_vulkan()), ("cuda", cuda)].into_iter().filter(|(_, here)| *here).map(|(name, _)| name).collect()
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
