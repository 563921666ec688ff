//! Which crate may use which.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::Deserialize;

/// The arrows of ARCHITECTURE.md. A library may also name the crates that its arrows reach; a
/// program uses nothing but its arrows.
const ARROWS: &[(&str, &[&str])] = &[
    ("test-support", &[]),
    ("cuda-source", &[]),
    ("nf4-quant", &["cuda-source"]),
    ("fused-kernels", &["cuda-source"]),
    ("adapter-io", &["nf4-quant"]),
    ("model-hub", &[]),
    ("host-copies", &[]),
    ("device-collectives", &["cuda-source", "host-copies"]),
    ("paged-optim", &["host-copies"]),
    ("qlora-layers", &["nf4-quant", "fused-kernels", "host-copies", "adapter-io"]),
    ("chat-text", &[]),
    ("qlora-data", &["chat-text", "model-hub"]),
    ("qlora-dist", &[]),
    ("qlora-models", &["qlora-layers", "adapter-io"]),
    (
        "qlora-train",
        &["qlora-data", "qlora-dist", "device-collectives", "qlora-models", "paged-optim", "model-hub", "adapter-io"],
    ),
    ("qlora-serve", &["qlora-models", "chat-text"]),
    ("burn-qlora", &["qlora-train", "qlora-serve"]),
    ("qlora-cli", &["burn-qlora"]),
    ("conformance", &["burn-qlora"]),
    ("benchmarks", &["burn-qlora", "nf4-quant", "fused-kernels", "cuda-source"]),
    ("xtask", &["adapter-io"]),
    ("burn-transformer", &["qlora-layers", "paged-optim", "nf4-quant"]),
];

/// Programs: no crate may use them, and they use nothing but their arrows.
const PROGRAMS: &[&str] = &["qlora-cli", "conformance", "benchmarks", "xtask", "burn-transformer"];

/// The crate that tests share: any crate may have it as a dev-dependency, and none otherwise.
const FOR_TESTS: &str = "test-support";

/// Crates from elsewhere that a crate must not use: the first part of the name, and why.
const FOREIGN: &[(&str, &[&str], &str)] = &[
    ("nf4-quant", &["burn"], "knows CubeCL, not Burn"),
    ("cuda-source", &["burn"], "knows CubeCL, not Burn"),
    ("fused-kernels", &["burn"], "knows CubeCL, not Burn"),
    ("adapter-io", &["burn", "cubecl"], "works on host memory: no Burn, no GPU"),
    ("chat-text", &["burn", "cubecl"], "works on text: no Burn, no GPU"),
    ("qlora-data", &["burn", "cubecl"], "works on host memory: no Burn, no GPU"),
    ("qlora-dist", &["burn", "cubecl"], "moves bytes: no Burn, no GPU"),
    ("model-hub", &["burn", "cubecl"], "moves files: no Burn, no GPU"),
    // qlora-cli draws what model-hub's callback is told.
    ("model-hub", &["indicatif"], "prints nothing"),
    ("xtask", &["burn", "cubecl"], "builds in seconds"),
    ("burn-qlora", &["anyhow"], "libraries have error enums"),
    ("qlora-train", &["anyhow"], "libraries have error enums"),
    ("qlora-dist", &["anyhow"], "libraries have error enums"),
    ("qlora-data", &["anyhow"], "libraries have error enums"),
    ("chat-text", &["anyhow"], "libraries have error enums"),
    ("qlora-models", &["anyhow"], "libraries have error enums"),
    ("qlora-serve", &["anyhow"], "libraries have error enums"),
    ("qlora-layers", &["anyhow"], "libraries have error enums"),
    ("paged-optim", &["anyhow"], "libraries have error enums"),
    ("host-copies", &["anyhow"], "libraries have error enums"),
    ("device-collectives", &["anyhow"], "libraries have error enums"),
    ("nf4-quant", &["anyhow"], "libraries have error enums"),
    ("cuda-source", &["anyhow"], "libraries have error enums"),
    ("fused-kernels", &["anyhow"], "libraries have error enums"),
    ("adapter-io", &["anyhow"], "libraries have error enums"),
    ("model-hub", &["anyhow"], "libraries have error enums"),
];

#[derive(Deserialize)]
pub(super) struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    /// `null` for an ordinary dependency, otherwise `dev` or `build`.
    kind: Option<String>,
    #[serde(default)]
    features: Vec<String>,
}

/// Checks every edge of the workspace.
pub(super) fn check(metadata: &serde_json::Value) -> Result<Vec<String>> {
    let metadata = Metadata::deserialize(metadata).context("cargo metadata's output")?;
    let arrows: BTreeMap<&str, &[&str]> = ARROWS.iter().copied().collect();
    let mut violations = Vec::new();
    for package in &metadata.packages {
        let from = package.name.as_str();
        let Some(direct) = arrows.get(from) else {
            violations.push(format!("{from}: the crate has no line in xtask's ARROWS and in ARCHITECTURE.md"));
            continue;
        };
        for dependency in &package.dependencies {
            let to = dependency.name.as_str();
            let for_tests = dependency.kind.as_deref() == Some("dev");
            if arrows.contains_key(to) {
                let allowed = direct.contains(&to)
                    || !PROGRAMS.contains(&from) && reaches(&arrows, from, to)
                    || for_tests && to == FOR_TESTS;
                if !allowed {
                    violations.push(format!("{from} -> {to}: this edge is not in the architecture"));
                }
            }
            for (name, foreign, reason) in FOREIGN {
                if *name != from {
                    continue;
                }
                if foreign.iter().any(|prefix| is_of_family(to, prefix)) {
                    violations.push(format!("{from} -> {to}: {from} {reason}"));
                }
                // Its features are named after what they bring along.
                if to == FOR_TESTS && dependency.features.iter().any(|feature| foreign.contains(&feature.as_str())) {
                    violations.push(format!("{from} -> {to} with {:?}: {from} {reason}", dependency.features));
                }
            }
        }
    }
    Ok(violations)
}

fn is_of_family(name: &str, family: &str) -> bool {
    name.strip_prefix(family).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

fn reaches(arrows: &BTreeMap<&str, &[&str]>, from: &str, to: &str) -> bool {
    let direct = arrows.get(from).copied().unwrap_or_default();
    direct.iter().any(|next| *next == to || reaches(arrows, next, to))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use serde_json::json;

    fn violations(from: &str, to: &str, kind: Option<&str>) -> Vec<String> {
        let dependencies = json!([{ "name": to, "kind": kind }]);
        check(&json!({ "packages": [{ "name": from, "dependencies": dependencies }] })).unwrap()
    }

    #[test]
    fn edges_along_the_arrows_pass() {
        for (from, to) in [
            ("adapter-io", "nf4-quant"),
            ("qlora-models", "adapter-io"),
            ("qlora-models", "nf4-quant"), // reached through adapter-io
            ("burn-qlora", "qlora-layers"),
            ("qlora-data", "chat-text"),
            ("qlora-data", "model-hub"),
            ("qlora-train", "chat-text"), // reached through qlora-data
            ("qlora-train", "model-hub"),
            ("burn-qlora", "model-hub"), // reached through qlora-train
            ("qlora-cli", "burn-qlora"),
            ("nf4-quant", "cubecl"),
            ("nf4-quant", "serde"),
        ] {
            assert_eq!(violations(from, to, None), [""; 0], "{from} -> {to}");
        }
    }

    #[test]
    fn any_other_edge_is_named() {
        for (from, to) in [
            ("nf4-quant", "adapter-io"),
            ("adapter-io", "qlora-layers"),
            ("paged-optim", "qlora-layers"),
            ("chat-text", "qlora-data"),
            ("qlora-data", "qlora-models"),
            ("qlora-models", "qlora-data"),
            ("qlora-dist", "burn"),
            ("qlora-serve", "qlora-dist"),
            ("chat-text", "burn"),
            ("qlora-data", "burn"),
            ("qlora-cli", "qlora-train"),
            ("qlora-train", "qlora-cli"),
            ("nf4-quant", "burn"),
            ("nf4-quant", "burn-cubecl"),
            ("adapter-io", "cubecl-cuda"),
            ("model-hub", "adapter-io"),
            ("qlora-models", "model-hub"),
            ("qlora-cli", "model-hub"),
            ("model-hub", "burn-core"),
            ("model-hub", "indicatif"),
            ("xtask", "burn"),
            ("qlora-train", "anyhow"),
        ] {
            for kind in [None, Some("dev"), Some("build")] {
                let found = violations(from, to, kind);
                assert!(found.len() == 1 && found[0].starts_with(&format!("{from} -> {to}: ")), "{found:?}");
            }
        }
    }

    #[test]
    fn what_tests_share_is_for_tests_and_brings_nothing_foreign() {
        assert_eq!(violations("nf4-quant", FOR_TESTS, Some("dev")), [""; 0]);
        assert_eq!(violations("qlora-cli", FOR_TESTS, Some("dev")), [""; 0]);
        assert!(violations("nf4-quant", FOR_TESTS, None)[0].starts_with("nf4-quant -> test-support: "));
        let with = |from: &str, feature: &str| {
            let dependencies = json!([{ "name": FOR_TESTS, "kind": "dev", "features": [feature] }]);
            check(&json!({ "packages": [{ "name": from, "dependencies": dependencies }] })).unwrap()
        };
        assert_eq!(with("nf4-quant", "cubecl"), [""; 0]);
        for (from, feature) in [("nf4-quant", "burn"), ("fused-kernels", "burn"), ("adapter-io", "cubecl")] {
            assert!(with(from, feature)[0].starts_with(&format!("{from} -> test-support with ")));
        }
    }

    #[test]
    fn a_crate_without_a_line_is_named() {
        assert!(violations("new-crate", "serde", None)[0].starts_with("new-crate: "));
    }
}
