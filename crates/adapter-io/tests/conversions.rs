//! Whole checkpoints: merging and quantizing, on the recorded model and on small ones made here.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{adapter_on, tensor};

use adapter_io::{
    Adapter, BnbConfig, BnbOptions, Checkpoint, Dtype, InitLoraWeights, MergeBase, MergeOptions, MergeReport, Progress,
    TensorSpec, merge_checkpoint, quantize_checkpoint,
};
use nf4_quant::{Absmax, FloatFormat, Metadata, NestedAbsmax, QuantConfig, Quantized4bit};
use serde_json::{Value, json};

fn reference(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/reference")).join(path)
}

fn config_of(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
}

fn merge(base: &Path, adapter: &Adapter, out: &Path, options: &MergeOptions) -> Result<MergeReport, String> {
    merge_checkpoint(base, adapter, out, options, &mut |_| {}).map_err(|e| e.to_string())
}

/// A base of f32 tensors: tied embeddings, one block, a bias; values below 1.
fn small_base(dir: &Path) {
    let specs: Vec<TensorSpec> = [
        ("model.embed_tokens.weight", &[8, 6][..]),
        ("model.layers.0.self_attn.q_proj.bias", &[5]),
        ("model.layers.0.self_attn.q_proj.weight", &[5, 6]),
        ("model.norm.weight", &[6]),
    ]
    .into_iter()
    .map(|(name, shape)| TensorSpec::new(name, Dtype::F32, shape))
    .collect();
    common::write(dir, &specs, 64);
    let config = json!({"model_type": "x", "tie_word_embeddings": true, "quantization_config": null});
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("tokenizer.json"), "{}").unwrap();
    fs::write(dir.join("chat_template.jinja"), "hi").unwrap();
    fs::write(dir.join("generation_config.json"), "{\"a\": 1}").unwrap();
    fs::write(dir.join("README.md"), "not carried").unwrap();
}

fn contents(dir: &Path) -> BTreeMap<String, Vec<f32>> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    checkpoint.names().map(|n| (n.to_string(), checkpoint.tensor(n).unwrap().to_f32_vec().unwrap())).collect()
}

#[test]
fn the_recorded_adapter_merges_into_the_recorded_model() {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (reference("tiny-llama"), dir.path().join("merged"));
    let adapter = Adapter::load(&reference("qlora/final_adapter_f32")).unwrap();
    let options = MergeOptions { max_shard_bytes: 3_000_000, ..MergeOptions::default() };
    let mut calls = Vec::new();
    let report = merge_checkpoint(&base, &adapter, &out, &options, &mut |p: &Progress<'_>| {
        calls.push((p.tensor.to_string(), p.done_bytes, p.total_bytes));
    })
    .unwrap();
    let (before, after) = (Checkpoint::open(&base).unwrap(), Checkpoint::open(&out).unwrap());
    assert!(before.names().eq(after.names()));
    assert_eq!(report.total_bytes, before.total_bytes());
    assert_eq!(calls.last().map(|c| (c.1, c.2)), Some((report.total_bytes, report.total_bytes)));
    assert_eq!(calls.len(), before.names().count());
    assert!(calls.windows(2).all(|w| w[0].1 < w[1].1));
    assert_eq!(report.files.last().unwrap(), "model.safetensors.index.json");
    assert!(report.files.len() >= 5 && !report.untied);
    let modules = adapter.modules();
    assert_eq!(report.tensors.len(), modules.len());
    for name in before.names() {
        let (old, new) = (before.tensor(name).unwrap(), after.tensor(name).unwrap());
        assert_eq!((old.dtype, &old.shape), (new.dtype, &new.shape), "{name}");
        let module = name.strip_suffix(".weight").unwrap();
        let found = report.tensors.iter().find(|t| t.name == name);
        if let Some(module) = adapter.lora_module(module).unwrap() {
            let mut expected: Vec<half::bf16> = bytemuck::pod_collect_to_vec(old.data);
            let change = module.merge_into(&mut expected, &old.shape).unwrap();
            assert!(new.data == bytemuck::cast_slice::<_, u8>(&expected), "{name}");
            assert_eq!(found.unwrap().change, change);
            assert!(change.largest > 0.0 && change.relative > 0.0 && change.relative < 1.0, "{change:?}");
        } else {
            assert!(old.data == new.data && found.is_none(), "{name}");
        }
    }
    assert_eq!(report.by_layer().len(), 6);
    // What belongs to the model comes along, byte for byte.
    for name in
        ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    {
        assert_eq!(fs::read(base.join(name)).unwrap(), fs::read(out.join(name)).unwrap(), "{name}");
    }
}

#[test]
fn a_quantized_base_is_merged_only_when_asked() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("merged");
    let adapter = Adapter::load(&reference("qlora/final_adapter_f32")).unwrap();
    let quantized = reference("tiny-llama-bnb-4bit");
    let message = merge(&quantized, &adapter, &out, &MergeOptions::default()).unwrap_err();
    assert!(message.contains("full-precision") && message.contains("dequantized") && !out.exists(), "{message}");
    let base = MergeBase::Dequantized { config: QuantConfig::default(), skip_modules: vec![] };
    let options = MergeOptions { base, ..MergeOptions::default() };
    let report = merge(&quantized, &adapter, &out, &options).unwrap();
    assert!(report.tensors.iter().all(|t| t.quantization.is_none()));
    assert!(config_of(&out).get("quantization_config").is_none());
    let (before, after) = (Checkpoint::open(&quantized).unwrap(), Checkpoint::open(&out).unwrap());
    let full = Checkpoint::open(&reference("tiny-llama")).unwrap();
    assert!(full.names().eq(after.names()));
    for path in adapter.modules() {
        let weight = before.quantized(&path).unwrap().unwrap();
        let mut expected: Vec<half::bf16> = weight.dequantize().unwrap();
        adapter.lora_module(&path).unwrap().unwrap().merge_into(&mut expected, &weight.state.shape).unwrap();
        let merged = after.tensor(&format!("{path}.weight")).unwrap();
        assert!(merged.data == bytemuck::cast_slice::<_, u8>(&expected), "{path}");
    }
    // From the full-precision base the same, with the size of the rounding.
    let again = dir.path().join("again");
    let report = merge(&reference("tiny-llama"), &adapter, &again, &options).unwrap();
    for tensor in &report.tensors {
        let quantization = tensor.quantization.unwrap();
        // NF4 in blocks of 64 changes normal weights by about a tenth.
        assert!(quantization.relative > 0.05 && quantization.relative < 0.15, "{tensor:?}");
    }
    let (one, two) = (contents(&out), contents(&again));
    for (name, values) in &one {
        let worst = values.iter().zip(&two[name]).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // The offset's last bit may differ (see golden.rs); a bf16 of size 0.5 moves by 2^-9 then.
        assert!(worst <= 0.002, "{name}: {worst}");
    }
}

#[test]
fn tied_embeddings_are_untied_when_one_side_is_adapted() {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (dir.path().join("base"), dir.path().join("out"));
    small_base(&base);
    let before = contents(&base);
    let embed = "model.embed_tokens.weight";
    let plus = |values: &[f32], x: f32| values.iter().map(|v| v + x).collect::<Vec<_>>();
    let factors_embed = [
        ("model.embed_tokens.lora_embedding_A", tensor(&[2, 8], 0.5)),
        ("model.embed_tokens.lora_embedding_B", tensor(&[6, 2], 0.5)),
    ];
    let factors_head =
        [("lm_head.lora_A.weight", tensor(&[2, 6], 0.5)), ("lm_head.lora_B.weight", tensor(&[8, 2], 0.25))];
    // (adapter, expected embedding, expected head or None where it stays tied)
    let head_saved = [("lm_head.weight", tensor(&[8, 6], 3.0))];
    let both_saved = [("lm_head.weight", tensor(&[8, 6], 3.0)), ("model.embed_tokens.weight", tensor(&[8, 6], 3.0))];
    let cases: Vec<(Adapter, Vec<f32>, Option<Vec<f32>>)> = vec![
        (adapter_on(&factors_embed), plus(&before[embed], 0.5), Some(before[embed].clone())),
        (adapter_on(&factors_head), before[embed].clone(), Some(plus(&before[embed], 0.25))),
        (adapter_on(&head_saved), before[embed].clone(), Some(vec![3.0; 48])),
        (adapter_on(&both_saved), vec![3.0; 48], None),
        (adapter_on(&[("model.norm.weight", tensor(&[6], 2.0))]), before[embed].clone(), None),
    ];
    for (adapter, embedding, head) in cases {
        let report = merge(&base, &adapter, &out, &MergeOptions::default()).unwrap();
        let after = contents(&out);
        assert_eq!(after[embed], embedding);
        assert_eq!(after.get("lm_head.weight"), head.as_ref());
        assert_eq!((report.untied, config_of(&out)["tie_word_embeddings"] == false), (head.is_some(), head.is_some()));
        for name in ["tokenizer.json", "chat_template.jinja", "generation_config.json"] {
            assert_eq!(fs::read(base.join(name)).unwrap(), fs::read(out.join(name)).unwrap());
        }
        assert!(!out.join("README.md").exists() && config_of(&out).get("quantization_config").is_none());
    }
    // Trained with tied weights they stay tied.
    let mut tied = adapter_on(&factors_head);
    tied.config.ensure_weight_tying = true;
    assert!(!merge(&base, &tied, &out, &MergeOptions::default()).unwrap().untied);
    assert_eq!(contents(&out)[embed], plus(&before[embed], 0.25));
}

#[test]
fn adapters_that_do_not_fit_are_refused_by_name_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (dir.path().join("base"), dir.path().join("out"));
    small_base(&base);
    let q = "model.layers.0.self_attn.q_proj";
    let on = |module: &str, out: usize, columns: usize| {
        adapter_on(&[
            (&format!("{module}.lora_A.weight"), tensor(&[2, columns], 0.5)),
            (&format!("{module}.lora_B.weight"), tensor(&[out, 2], 0.5)),
        ])
    };
    let with = |mut adapter: Adapter, change: fn(&mut Adapter)| {
        change(&mut adapter);
        adapter
    };
    let mut bias = on("model.layers.0.self_attn.q_proj", 5, 6);
    bias.config.lora_bias = true;
    bias.tensors.insert(format!("base_model.model.{q}.lora_B.bias"), tensor(&[5], 1.0));
    merge(&base, &bias, &out, &MergeOptions::default()).unwrap();
    let (before, after) = (contents(&base), contents(&out));
    assert_eq!(after[&format!("{q}.bias")][3], before[&format!("{q}.bias")][3] + 1.0);
    fs::remove_dir_all(&out).unwrap();
    let cases: Vec<(Adapter, Vec<&str>)> = vec![
        (on(q, 7, 6), vec!["q_proj.weight", "[7, 2]", "[5, 6]", "another base"]),
        (on("model.layers.1.self_attn.q_proj", 5, 6), vec!["layers.1", "layers.0.self_attn.q_proj.weight"]),
        (adapter_on(&[("model.norm.weight", tensor(&[7], 1.0))]), vec!["model.norm.weight", "[7]", "[6]"]),
        (adapter_on(&[("model.nrm.weight", tensor(&[6], 1.0))]), vec!["model.nrm.weight", "model.norm.weight"]),
        (with(on(q, 5, 6), |a| a.config.fan_in_fan_out = true), vec!["fan_in_fan_out", "Conv1D"]),
        (with(on(q, 5, 6), |a| a.config.target_parameters = Some(json!(["x"]))), vec!["target_parameters"]),
        (
            with(on(q, 5, 6), |a| a.config.init_lora_weights = InitLoraWeights::Method("pissa".into())),
            vec!["init_lora_weights", "pissa", "path_initial_model_for_weight_conversion"],
        ),
    ];
    for (adapter, says) in cases {
        let message = merge(&base, &adapter, &out, &MergeOptions::default()).unwrap_err();
        assert!(says.iter().all(|s| message.contains(s)) && !out.exists(), "{says:?}: {message}");
    }
    let message = merge(&base, &on(q, 5, 6), &base, &MergeOptions::default()).unwrap_err();
    assert!(message.contains("choose another folder"), "{message}");
}

/// The child of the test below: merges the model named in the environment, over and over.
#[test]
fn child_that_is_killed() {
    let Ok(dir) = std::env::var("ADAPTER_IO_KILLED_IN") else { return };
    let dir = Path::new(&dir);
    for _ in 0..1000 {
        for adapter in ["one", "two"] {
            let adapter = Adapter::load(&dir.join(adapter)).unwrap();
            merge(&dir.join("base"), &adapter, &dir.join("out"), &MergeOptions::default()).unwrap();
        }
    }
}

#[test]
fn a_merge_that_is_killed_leaves_the_old_output_or_none() {
    let dir = tempfile::tempdir().unwrap();
    small_base(&dir.path().join("base"));
    let out = dir.path().join("out");
    let mut possible = Vec::new();
    for (name, value) in [("one", 2.0), ("two", 5.0)] {
        let adapter = adapter_on(&[("model.norm.weight", tensor(&[6], value))]);
        adapter.save(&dir.path().join(name)).unwrap();
        merge(&dir.path().join("base"), &adapter, &out, &MergeOptions::default()).unwrap();
        possible.push(contents(&out));
    }
    let mut seen = 0;
    for round in 0u64..25 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["child_that_is_killed", "--exact"])
            .env("ADAPTER_IO_KILLED_IN", dir.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // From before the first merge to well into many of them, at times that no schedule favours.
        std::thread::sleep(Duration::from_micros(2_000 + round * round * 137 % 60_000));
        child.kill().unwrap();
        child.wait().unwrap();
        if out.exists() {
            assert!(possible.contains(&contents(&out)), "round {round}");
            assert!(out.join("config.json").exists() && out.join("tokenizer.json").exists());
            seen += 1;
        }
    }
    assert!(seen > 0);
}

#[test]
fn a_quantized_checkpoint_is_the_one_that_bitsandbytes_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let (base, theirs, out) = (reference("tiny-llama"), reference("tiny-llama-bnb-4bit"), dir.path().join("out"));
    let mut calls = 0;
    let report = quantize_checkpoint(&base, &out, &BnbOptions::default(), &mut |_| calls += 1).unwrap();
    assert_eq!((report.quantized, calls), (42, Checkpoint::open(&base).unwrap().names().count()));
    for name in ["config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"] {
        assert_eq!(fs::read_to_string(theirs.join(name)).unwrap(), fs::read_to_string(out.join(name)).unwrap());
    }
    let (theirs, ours) = (Checkpoint::open(&theirs).unwrap(), Checkpoint::open(&out).unwrap());
    let mut offsets = 0;
    for name in theirs.names() {
        let module = name.split(".weight").next().unwrap();
        let (a, b) = (theirs.tensor(name).unwrap(), ours.tensor(name));
        let Some(weight) = theirs.quantized(module).unwrap() else {
            assert!(a.data == b.unwrap().data, "{name}");
            continue;
        };
        let original =
            Checkpoint::open(&base).unwrap().tensor(&format!("{module}.weight")).unwrap().to_f32_vec().unwrap();
        let absmax: Vec<f32> = original.chunks(64).map(|b| b.iter().fold(0.0, |m: f32, x| m.max(x.abs()))).collect();
        let Absmax::Nested(nested) = &weight.state.absmax else { panic!("{name}") };
        if nested.offset == NestedAbsmax::mean(&absmax) {
            offsets += 1;
            let b = b.unwrap();
            assert!(a.data == b.data && a.shape == b.shape && a.dtype == b.dtype, "{name}");
        } else {
            // The mean's last bit depends on the order of summation; given theirs, all is theirs.
            let ours = ours.quantized(module).unwrap().unwrap();
            assert_eq!(ours.codes, weight.codes, "{name}");
            let ulps = nested.offset.to_bits().abs_diff(NestedAbsmax::mean(&absmax).to_bits());
            assert!(ulps <= 1, "{name}: {ulps}");
            assert_eq!(NestedAbsmax::quantize_with(&absmax, nested.offset, 256).unwrap(), *nested);
        }
    }
    assert!(offsets > 42, "most offsets agree: {offsets}");
    assert!(theirs.names().eq(ours.names()));
}

#[test]
fn quantizing_keeps_what_is_skipped_and_refuses_what_is_quantized() {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (reference("tiny-llama"), dir.path().join("out"));
    let options = BnbOptions {
        config: QuantConfig { double_quant: false, ..QuantConfig::default() },
        compute_dtype: Some(FloatFormat::F16),
        skip_modules: vec!["v_proj".into(), "model.layers.2".into()],
        max_shard_bytes: 1_000_000,
        ..BnbOptions::default()
    };
    let report = quantize_checkpoint(&base, &out, &options, &mut |_| {}).unwrap();
    assert_eq!(report.quantized, 5 * 6);
    assert!(report.bytes_after < report.bytes_before);
    let ours = Checkpoint::open(&out).unwrap();
    assert!(ours.files().count() > 3);
    assert!(ours.quantized_modules().iter().all(|m| !m.contains("v_proj") && !m.contains("layers.2.")));
    let config = BnbConfig::from_config(&config_of(&out), Path::new("c")).unwrap().unwrap();
    assert_eq!(config.skip_modules, ["v_proj", "model.layers.2", "lm_head"]);
    assert_eq!((config.double_quant, config.compute_dtype), (false, FloatFormat::F16));
    let module = "model.layers.5.mlp.down_proj";
    let original = Checkpoint::open(&base).unwrap();
    let view = original.tensor(&format!("{module}.weight")).unwrap();
    let weight: Vec<half::bf16> = bytemuck::pod_collect_to_vec(view.data);
    let expected = Quantized4bit::quantize(&weight, &view.shape, &options.config).unwrap();
    assert_eq!(ours.quantized(module).unwrap().unwrap(), expected);
    let state = ours.tensor(&format!("{module}.weight.quant_state.bitsandbytes__nf4")).unwrap();
    assert!(Metadata::parse(std::str::from_utf8(state.data).unwrap()).unwrap().nested.is_none());
    let again = |from: &Path, options: &BnbOptions| {
        quantize_checkpoint(from, &dir.path().join("again"), options, &mut |_| {}).unwrap_err().to_string()
    };
    assert!(again(&out, &BnbOptions::default()).contains("quantized already"));
    let config = QuantConfig { blocksize: 128, ..QuantConfig::default() };
    assert!(again(&base, &BnbOptions { config, ..BnbOptions::default() }).contains("blocks of 64"));
    assert!(!dir.path().join("again").exists());
}

#[test]
fn routers_are_never_and_experts_only_on_request_quantized() {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (dir.path().join("base"), dir.path().join("out"));
    let names = ["mlp.gate", "mlp.experts.0.up_proj", "mlp.experts.1.up_proj", "self_attn.q_proj"];
    let specs: Vec<_> =
        names.iter().map(|n| TensorSpec::new(format!("model.layers.0.{n}.weight"), Dtype::F32, &[8, 16])).collect();
    common::write(&base, &specs, 1 << 20);
    fs::write(base.join("config.json"), "{}").unwrap();
    for (quantize_experts, count) in [(false, 1), (true, 3)] {
        let options = BnbOptions { quantize_experts, ..BnbOptions::default() };
        assert_eq!(quantize_checkpoint(&base, &out, &options, &mut |_| {}).unwrap().quantized, count);
        assert_eq!(config_of(&out)["quantization_config"]["llm_int8_skip_modules"], Value::Null);
    }
}
