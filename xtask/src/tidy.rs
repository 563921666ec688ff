//! `cargo xtask tidy`: the architecture's rules that a program can check.
//!
//! | rule | where |
//! |---|---|
//! | crates use each other only along the arrows of ARCHITECTURE.md | `edges` |
//! | what a crate must not name; headers, lengths, tests that are switched off, home folders | `names` |
//!
//! That libraries don't print or exit and that nothing is left unfinished is clippy's to find (`Cargo.toml`).

mod edges;
mod names;

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::{cargo, root};

/// Checks the workspace and prints every violation.
pub fn tidy() -> Result<()> {
    let metadata = cargo().args(["metadata", "--format-version", "1", "--no-deps"]).output()?;
    if !metadata.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&metadata.stderr));
    }
    let metadata = serde_json::from_slice(&metadata.stdout).context("cargo metadata's output")?;
    let mut violations = edges::check(&metadata)?;
    let root = root();
    for path in files(&root)? {
        // Deleted but not yet committed files are listed too.
        let Ok(bytes) = std::fs::read(root.join(&path)) else { continue };
        if let Ok(text) = String::from_utf8(bytes) {
            violations.extend(names::check(&path, &text));
        }
    }
    for violation in &violations {
        println!("{violation}");
    }
    match violations.len() {
        0 => Ok(()),
        n => bail!("{n} violations"),
    }
}

/// Every file that is in version control or could be added to it.
fn files(root: &Path) -> Result<Vec<String>> {
    let listed = std::process::Command::new("git")
        .current_dir(root)
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .output()
        .context("git lists the files to check")?;
    if !listed.status.success() {
        bail!("git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
    }
    let mut files: Vec<String> = String::from_utf8(listed.stdout)?.lines().map(str::to_owned).collect();
    files.sort();
    files.dedup();
    Ok(files)
}
