//! The probe of merged checkpoints: what a merge wrote passes, and what is wrong with it is seen.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use adapter_io::{Adapter, Checkpoint, MergeBase, MergeOptions, ShardedWriter, TensorSpec, merge_checkpoint};
use nf4_quant::QuantConfig;
use qlora_models::{MergeProbe, Probed, probe_merge};
use std::path::{Path, PathBuf};

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference").join(name)
}

fn compared(base: &Path, adapter: &Adapter, merged: &Path, quantization: Option<QuantConfig>) -> MergeProbe {
    match probe_merge(base, adapter, merged, quantization).unwrap() {
        Probed::Compared(probe) => probe,
        Probed::NotCompared(why) => panic!("{why}"),
    }
}

#[test]
fn merged_checkpoints_of_every_kind_of_adapter_agree() {
    let (base, dir) = (reference("tiny-llama"), tempfile::tempdir().unwrap());
    for kind in ["plain", "rslora", "patterns", "dora", "modules_to_save", "lora_bias", "tokens"] {
        let adapter = Adapter::load(&reference("adapters").join(kind)).unwrap();
        let out = dir.path().join(kind);
        if merge_checkpoint(&base, &adapter, &out, &MergeOptions::default(), &mut |_| {}).is_err() {
            // What can't be merged has nothing to be compared.
            continue;
        }
        let probe = compared(&base, &adapter, &out, None);
        assert!(probe.agrees() && probe.effect > 5.0 * probe.apart, "{kind}: {probe:?}");
    }
    let adapter = Adapter::load(&reference("adapters/plain")).unwrap();
    let options = MergeOptions {
        base: MergeBase::Dequantized { config: QuantConfig::default(), skip_modules: Vec::new() },
        ..MergeOptions::default()
    };
    let out = dir.path().join("dequantized");
    merge_checkpoint(&base, &adapter, &out, &options, &mut |_| {}).unwrap();
    assert!(compared(&base, &adapter, &out, Some(QuantConfig::default())).agrees());
    // Of the base in full precision it is another model.
    let full = compared(&base, &adapter, &out, None);
    assert!(!full.agrees(), "{full:?}");
}

#[test]
fn a_wrong_merge_is_seen() {
    let (base, dir) = (reference("tiny-llama"), tempfile::tempdir().unwrap());
    let adapter = Adapter::load(&reference("adapters/plain")).unwrap();
    let merge = |adapter: &Adapter, name: &str| {
        let out = dir.path().join(name);
        merge_checkpoint(&base, adapter, &out, &MergeOptions::default(), &mut |_| {}).unwrap();
        out
    };
    // A scale taken twice, and modules left out.
    let mut twice = adapter.clone();
    twice.config.lora_alpha *= 2.0;
    let mut fewer = adapter.clone();
    fewer.tensors.retain(|name, _| !name.contains("v_proj"));
    for (name, wrong) in [("twice", &twice), ("fewer", &fewer)] {
        let probe = compared(&base, &adapter, &merge(wrong, name), None);
        assert!(!probe.agrees(), "{name}: {probe:?}");
    }
    // The base itself.
    let untouched = compared(&base, &adapter, &base, None);
    assert!(!untouched.agrees() && untouched.apart == untouched.effect, "{untouched:?}");
    // A file that does not load.
    let out = merge(&adapter, "cut");
    let checkpoint = Checkpoint::open(&out).unwrap();
    let kept: Vec<&str> = checkpoint.names().filter(|name| !name.ends_with("model.norm.weight")).collect();
    let cut = dir.path().join("without-norm");
    std::fs::create_dir(&cut).unwrap();
    let specs = kept
        .iter()
        .map(|name| checkpoint.tensor(name).unwrap())
        .map(|view| TensorSpec::new(view.name, view.dtype, &view.shape));
    let mut writer = ShardedWriter::create(&cut, specs.collect(), 1 << 30).unwrap();
    kept.iter().for_each(|name| writer.write(name, checkpoint.tensor(name).unwrap().data).unwrap());
    writer.finish().unwrap();
    std::fs::copy(out.join("config.json"), cut.join("config.json")).unwrap();
    assert!(probe_merge(&base, &adapter, &cut, None).unwrap_err().to_string().contains("model.norm.weight"));
}

#[test]
fn what_cannot_be_computed_here_is_said() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), r#"{"model_type": "mamba"}"#).unwrap();
    let adapter = Adapter::load(&reference("adapters/plain")).unwrap();
    let Probed::NotCompared(why) = probe_merge(dir.path(), &adapter, dir.path(), None).unwrap() else { panic!() };
    assert!(why.contains("mamba"), "{why}");
}
