//! What was measured, and with what: the head of a record.

use std::path::{Path, PathBuf};
use std::process::Command;

use cubecl::client::Client;
use serde_json::{Value, json};

/// Versions that a record names.
const LOCK: &str = include_str!("../../../Cargo.lock");

/// Card, driver, CUDA, host, versions, commit and command, with today's date.
pub(crate) fn describe(client: &Client) -> Value {
    let smi = |field: &str| {
        let query = format!("--query-gpu={field}");
        let output = Command::new("nvidia-smi").args([&query, "--format=csv,noheader"]).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        Some(text.lines().next()?.trim().to_owned()).filter(|_| output.status.success())
    };
    let version = |(major, minor)| format!("{major}.{minor}");
    let cuda = cuda_source::device(client);
    json!({
        "date": chrono::Local::now().format("%Y-%m-%d").to_string(),
        "gpu": gpu(client),
        "memory": smi("memory.total"),
        "driver": smi("driver_version"),
        "cuda": cuda.map(|device| json!({
            "driver": version(device.driver),
            "nvrtc": version(device.toolkit),
            "compute_capability": version(device.compute_capability),
            "multiprocessors": device.multiprocessors,
            "l2_bytes": device.l2_bytes,
        })),
        "host": {"cpu": cpu(), "cores": std::thread::available_parallelism().ok().map(usize::from)},
        "commit": commit(),
        "command": command(),
        "versions": {"burn": locked("burn"), "cubecl": locked("cubecl"), "nf4-quant": locked("nf4-quant")},
    })
}

/// The host's processor, as Linux names it.
fn cpu() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "))?.1;
    Some(name.trim().to_owned())
}

/// How this program was called, without the folder that it lies in.
pub(crate) fn command() -> String {
    let mut arguments: Vec<_> = std::env::args().collect();
    if let Some(program) = arguments.first_mut()
        && let Some(name) = Path::new(program).file_name()
    {
        *program = name.to_string_lossy().into_owned();
    }
    arguments.join(" ")
}

/// The commit that is checked out where the program runs, and whether files differ from it; `QLORA_BENCH_COMMIT` where it runs
/// without its repository.
fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let named = std::env::var("QLORA_BENCH_COMMIT").ok();
    named.or_else(|| {
        let commit = git(&["rev-parse", "HEAD"])?;
        let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|files| !files.is_empty());
        Some(if changed { format!("{commit}, changed") } else { commit })
    })
}

/// `DIR/<gpu>/<date>-<what>.json`, numbered where there is one already: nothing that was recorded is replaced.
pub(crate) fn record_path(dir: &Path, gpu: &str, what: &str) -> PathBuf {
    let folder = dir.join(slug(gpu));
    free_path(&folder, &format!("{}-{what}", chrono::Local::now().format("%Y-%m-%d")))
}

/// `<folder>/<name>.json`, or `<name>-2.json` and so on.
fn free_path(folder: &Path, name: &str) -> PathBuf {
    let numbered = (2..).map(|number| folder.join(format!("{name}-{number}.json")));
    let mut paths = std::iter::once(folder.join(format!("{name}.json"))).chain(numbered);
    // There are numbers without end.
    paths.find(|path| !path.exists()).unwrap_or_else(|| folder.join(name))
}

/// The card's name.
pub(crate) fn gpu(client: &Client) -> String {
    client.properties().identity.name.clone()
}

/// A name for a folder: lower case, with hyphens.
pub(crate) fn slug(name: &str) -> String {
    let words = name.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-").to_lowercase()
}

/// The version of a crate in this build.
fn locked(name: &str) -> Option<&'static str> {
    let start = LOCK.find(&format!("\nname = \"{name}\"\n"))?;
    LOCK[start..].split_once("\nversion = \"")?.1.split('"').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_folders() {
        assert_eq!(slug("NVIDIA H200"), "nvidia-h200");
        assert_eq!(slug("llvmpipe (LLVM 15.0.6, 256 bits)"), "llvmpipe-llvm-15-0-6-256-bits");
    }

    #[test]
    fn a_record_replaces_none() {
        let dir = tempfile::tempdir().unwrap();
        for expected in ["a.json", "a-2.json", "a-3.json"] {
            let path = free_path(dir.path(), "a");
            assert_eq!(path, dir.path().join(expected));
            std::fs::write(path, "{}").unwrap();
        }
    }

    #[test]
    fn versions_come_from_the_lock_file() {
        assert_eq!(locked("burn"), Some("0.22.1"));
        assert_eq!(locked("cubecl"), Some("0.11.3"));
        assert_eq!(locked("no-such-crate"), None);
    }
}
