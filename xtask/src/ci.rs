//! `cargo xtask ci` and `cargo xtask test`.
//!
//! Everything builds in the release profile, so that clippy, tests and the binaries share one build
//! of the dependencies, which takes a quarter of an hour. The tests run last: their closing lines
//! are the end of the log.

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

/// Runs the tests. Kernel tests find their runtimes themselves; this makes sure that there is one.
pub fn test(args: &[String]) -> Result<()> {
    software_vulkan();
    let mut command = cargo();
    command.args(["test", "--release", "--workspace"]).args(args);
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // Mesa's drivers want a folder of the user's own.
        command.env("XDG_RUNTIME_DIR", std::env::temp_dir());
    }
    run_command(&mut command)
}

/// Installs Mesa's software Vulkan where there is no Vulkan driver and we may install one.
fn software_vulkan() {
    const DRIVERS: [&str; 2] = ["/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d"];
    let driver = || {
        let folders = DRIVERS.iter().filter_map(|folder| Path::new(folder).read_dir().ok());
        folders.flatten().flatten().map(|entry| entry.path()).next()
    };
    if driver().is_none() && cfg!(target_os = "linux") && is_root() {
        let install =
            |args: &[&str]| Command::new("apt-get").args(args).env("DEBIAN_FRONTEND", "noninteractive").output();
        let packages = ["install", "--yes", "--no-install-recommends", "mesa-vulkan-drivers", "libvulkan1"];
        let installed =
            |result: std::io::Result<std::process::Output>| result.is_ok_and(|output| output.status.success());
        if !installed(install(&packages)) {
            // A fresh container has no package lists yet.
            let _ = install(&["update"]).and_then(|_| install(&packages));
        }
    }
    match driver() {
        Some(path) => println!("xtask: Vulkan driver: {}", path.display()),
        None => println!("xtask: no Vulkan driver: tests of GPU kernels run only where there is a GPU"),
    }
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout.starts_with(b"0\n"))
}
