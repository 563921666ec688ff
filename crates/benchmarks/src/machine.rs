//! What was measured, and with what: the head of a record.

use std::process::Command;

use cubecl::client::Client;
use serde_json::{Value, json};

/// Versions that a record names.
const LOCK: &str = include_str!("../../../Cargo.lock");

/// Card, driver, CUDA and versions, with today's date.
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
        "versions": {"burn": locked("burn"), "cubecl": locked("cubecl"), "nf4-quant": locked("nf4-quant")},
    })
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
    fn versions_come_from_the_lock_file() {
        assert_eq!(locked("burn"), Some("0.22.1"));
        assert_eq!(locked("cubecl"), Some("0.11.3"));
        assert_eq!(locked("no-such-crate"), None);
    }
}
