//! The program's comparisons on the files that the repository carries.

use std::path::Path;

use burn::tensor::Device;
use conformance::{Reference, Report, Section};

fn run(device: &Device, sections: &[Section]) {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/reference"));
    let reference = Reference::open(root).expect("testdata/reference is part of the repository");
    let mut report = Report::new();
    conformance::run(&reference, device, sections, &mut report);
    let failed: Vec<String> =
        report.lines().iter().map(ToString::to_string).filter(|line| line.starts_with("FAIL")).collect();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
    assert!(report.passed() > 0, "nothing was compared");
}

#[test]
fn bnb_on_flex() {
    run(&Device::flex(), &[Section::Bnb]);
}

#[test]
fn logits_on_flex() {
    run(&Device::flex(), &[Section::Logits]);
}

#[test]
fn qlora_on_flex() {
    run(&Device::flex(), &[Section::Qlora]);
}

#[test]
fn preference_on_flex() {
    run(&Device::flex(), &[Section::Preference]);
}

#[test]
fn adapters_on_flex() {
    run(&Device::flex(), &[Section::Adapters]);
}

#[test]
fn archs_on_flex() {
    run(&Device::flex(), &[Section::Archs]);
}

#[test]
fn chat() {
    run(&Device::flex(), &[Section::Chat]);
}

#[test]
fn optimizers_on_flex() {
    run(&Device::flex(), &[Section::Optimizers]);
}

/// Logits take two minutes on a software device: adapters run the same decoder.
#[test]
fn bnb_adapters_and_optimizers_on_vulkan() {
    let on_vulkan = test_support::devices().into_iter().find(|(name, _)| *name == "wgpu");
    if let Some((_, device)) = on_vulkan {
        run(&device, &[Section::Bnb, Section::Adapters, Section::Optimizers]);
    }
}
