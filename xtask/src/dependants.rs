//! `cargo xtask dependants`: the examples as a user's own crates.
//!
//! Inside the workspace a crate gets its dependencies' features, versions and patches from the workspace's table. A user's crate has none
//! of that. So each example that other people are meant to copy is copied into an empty folder, its `workspace = true` entries are written
//! out as a user would write them (paths in place of versions, as nothing is published), and its tests run there.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use toml::{Table, Value};

use crate::{cargo, root, run_command};

/// Examples that stand for crates of Burn users.
const EXAMPLES: [&str; 1] = ["burn-transformer"];

/// Where to build.
#[derive(Debug, Args)]
pub struct Options {
    /// An empty folder to copy to; a temporary one without it
    #[arg(long)]
    folder: Option<PathBuf>,
}

/// Copies, builds and tests each example.
pub fn run(options: &Options) -> Result<()> {
    let temporary = tempfile::tempdir()?;
    let folder = options.folder.clone().unwrap_or_else(|| temporary.path().to_owned());
    let workspace = read(&root().join("Cargo.toml"))?;
    for name in EXAMPLES {
        let (from, to) = (root().join("examples").join(name), folder.join(name));
        if to.exists() {
            bail!("{} exists: give an empty folder", to.display());
        }
        copy(&from, &to)?;
        // The versions that the workspace is tested with.
        fs::copy(root().join("Cargo.lock"), to.join("Cargo.lock"))?;
        let manifest = standalone(read(&from.join("Cargo.toml"))?, &workspace, &root())?;
        fs::write(to.join("Cargo.toml"), toml::to_string(&manifest)?)?;
        println!("xtask: {name} alone, in {}", to.display());
        run_command(cargo().current_dir(&to).args(["test", "--release"]))?;
    }
    Ok(())
}

fn read(path: &Path) -> Result<Table> {
    let text = fs::read_to_string(path).with_context(|| format!("can't read {}", path.display()))?;
    text.parse().with_context(|| format!("{} is not TOML", path.display()))
}

/// A member's manifest as that of a crate outside: what it took from the workspace is written out, with absolute paths.
fn standalone(mut manifest: Table, workspace: &Table, root: &Path) -> Result<Table> {
    let workspace_of = |key: &str| workspace.get("workspace").and_then(|table| table.get(key)?.as_table());
    let mut inherit = |section: &str, from: Option<&Table>| -> Result<()> {
        let Some(Value::Table(entries)) = manifest.get_mut(section) else { return Ok(()) };
        for (key, value) in entries.iter_mut() {
            if value.get("workspace").and_then(Value::as_bool) != Some(true) {
                continue;
            }
            let mut given = from.and_then(|table| table.get(key)).cloned();
            let Some(given) = given.as_mut() else { bail!("[{section}] {key}: not in the workspace's table") };
            absolute(given, root);
            *value = given.clone();
        }
        Ok(())
    };
    inherit("package", workspace_of("package"))?;
    inherit("dependencies", workspace_of("dependencies"))?;
    inherit("dev-dependencies", workspace_of("dependencies"))?;
    manifest.remove("lints");
    // Its own root, wherever it lies.
    manifest.insert("workspace".into(), Table::new().into());
    if let Some(Value::Table(patches)) = workspace.get("patch") {
        let mut patches = patches.clone();
        for (_, crates) in patches.iter_mut() {
            crates
                .as_table_mut()
                .into_iter()
                .flat_map(|crates| crates.iter_mut())
                .for_each(|(_, at)| absolute(at, root));
        }
        manifest.insert("patch".into(), patches.into());
    }
    Ok(manifest)
}

/// Makes the path of a dependency absolute.
fn absolute(dependency: &mut Value, root: &Path) {
    if let Some(Value::String(path)) = dependency.get_mut("path") {
        *path = root.join(&*path).display().to_string();
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => copy(&entry.path(), &target)?,
            false => drop(fs::copy(entry.path(), target)?),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_a_member_inherits_is_written_out() {
        let workspace = "[workspace.package]\nedition = '2024'\n\
             [workspace.dependencies]\nburn = { version = '=1.0', features = ['std'] }\nours = { path = 'crates/ours' }\n\
             [patch.crates-io]\nturso = { path = 'third_party/turso' }"
            .parse()
            .unwrap();
        let member: Table = "[package]\nname = 'x'\nedition.workspace = true\n[lints]\nworkspace = true\n\
             [dependencies]\nburn.workspace = true\nours.workspace = true\nother = '2'"
            .parse()
            .unwrap();
        let alone = standalone(member.clone(), &workspace, Path::new("/w")).unwrap();
        let expected: Table = "[package]\nname = 'x'\nedition = '2024'\n[workspace]\n\
             [dependencies]\nburn = { version = '=1.0', features = ['std'] }\nours = { path = '/w/crates/ours' }\nother = '2'\n\
             [patch.crates-io]\nturso = { path = '/w/third_party/turso' }"
            .parse()
            .unwrap();
        assert_eq!(alone, expected);
        let missing = standalone(member, &Table::new(), Path::new("/w")).unwrap_err().to_string();
        assert!(missing.contains("edition"), "{missing}");
    }
}
