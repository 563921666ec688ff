//! Experts that run as one against experts one by one, in whole models on every device.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use adapter_io::{Checkpoint, Dtype, ShardedWriter, TensorSpec};
use burn::tensor::{Device, FloatDType, Tensor};
use nf4_quant::QuantConfig;
use qlora_layers::ops::backward_from;
use qlora_layers::{FrozenLinear, LoraConfig, Pass, TargetModules, trainable};
use qlora_models::{Decoder, LoadOptions};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use test_support::{devices, noise};

const IDS: [u32; 12] = [3, 9, 4, 1, 30, 11, 5, 9, 2, 6, 5, 3];

fn arch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference/archs").join(name)
}

fn load(name: &str, device: &Device) -> Decoder {
    load_from(&arch(name), Some(QuantConfig::default()), device)
}

fn load_from(dir: &Path, quantization: Option<QuantConfig>, device: &Device) -> Decoder {
    Decoder::load(dir, LoadOptions { quantization, dtype: FloatDType::F32 }, device, &mut |_| ()).unwrap()
}

fn names(names: [&str; 2]) -> TargetModules {
    TargetModules::Names(names.map(String::from).into())
}

/// With adapters that change the result.
fn adapted(name: &str, config: &LoraConfig, device: &Device) -> Decoder {
    let mut model = load(name, device);
    model.attach_lora(config, 3).unwrap();
    for (i, (_, adapter)) in model.adapters_mut().enumerate() {
        let shape = adapter.lora_b.dims();
        let values = noise(i as u64, shape[0] * shape[1]).into_iter().map(|value| 0.2 * value).collect::<Vec<f32>>();
        let values = Tensor::<1>::from_data(values.as_slice(), device).reshape(shape);
        adapter.lora_b = trainable(values);
    }
    model
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.without_autodiff().try_into_vec_as::<f32>().unwrap()
}

/// Logits, and the gradient of each parameter by name; factors of joined experts as the experts' own.
fn run(model: &Decoder) -> (Vec<f32>, BTreeMap<String, Vec<f32>>) {
    let mut model = model.clone();
    model.track();
    let logits = model.forward(&IDS, 2, Pass::training(1));
    let (rows, words) = (logits.dims()[0], logits.dims()[1]);
    let dy = noise(8, rows * words);
    let dy = Tensor::<1>::from_data(dy.as_slice(), model.device()).reshape([rows, words]);
    let mut grads = backward_from(logits.clone(), dy);
    let experts = model.config().experts.unwrap().count;
    let mut found = BTreeMap::new();
    for (name, parameter) in model.parameters() {
        let shape = parameter.dims();
        let grad = parameter.grad_remove(&mut grads).map_or_else(|| vec![0.0; shape[0] * shape[1]], values);
        match name.split_once(".experts.") {
            Some((block, rest)) if rest.split('.').count() == 2 => {
                for (expert, grad) in grad.chunks(grad.len() / experts).enumerate() {
                    found.insert(format!("{block}.experts.{expert}.{rest}"), grad.to_vec());
                }
            }
            _ => drop(found.insert(name, grad)),
        }
    }
    (values(logits), found)
}

fn assert_near(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    for (a, b) in found.iter().zip(expected) {
        // f32 sums in another order, through the few blocks of a small model.
        assert!((a - b).abs() <= 1e-4 * largest + 1e-6, "{what}: {a} against {b} of {largest}");
    }
}

#[test]
fn joined_experts_give_the_same_results_and_gradients() {
    for (device_name, device) in devices() {
        for name in ["qwen3_moe", "mixtral", "glm4_moe_groups", "gpt_oss_tied"] {
            for config in [
                LoraConfig { rank: 2, ..Default::default() },
                LoraConfig { rank: 8, target_modules: names(["down_proj", "w2"]), ..Default::default() },
            ] {
                let model = adapted(name, &config, &device);
                let (logits, grads) = run(&model);
                let exported = model.export_adapter("base", None).unwrap();
                let count = model.adapters().count();
                let mut joined = model;
                joined.join_experts();
                let what = format!("{name} on {device_name}");
                assert!(joined.adapters().count() < count, "{what}: experts' own layers have none");
                let (joined_logits, joined_grads) = run(&joined);
                assert_near(&what, &joined_logits, &logits);
                assert_eq!(joined_grads.keys().collect::<Vec<_>>(), grads.keys().collect::<Vec<_>>(), "{what}");
                for (parameter, grad) in &grads {
                    assert_near(&format!("{what}, {parameter}"), &joined_grads[parameter], grad);
                }
                // What is saved is per module, bit for bit, and the model can be had as it was.
                assert_eq!(joined.export_adapter("base", None).unwrap().tensors, exported.tensors, "{what}");
                assert_eq!(joined.parted().adapters().count(), count, "{what}");
                assert_eq!(joined.adapted_modules().len(), count, "{what}");
                assert_eq!(run(&joined.parted()).0, logits, "{what}");
                joined.unload_adapter().unwrap();
                assert!(joined.parameters().is_empty(), "{what}");
            }
        }
    }
}

/// Without adapters experts run as one from the start; with some on a few experts they can't.
#[test]
fn what_can_not_be_joined_runs_one_by_one() {
    let device = Device::flex();
    let base = values(load("qwen3_moe", &device).forward(&IDS, 2, Pass::INFERENCE));
    let mut model = load("qwen3_moe", &device);
    // Fresh adapters change nothing, and are on the experts' own layers.
    model.attach_lora(&LoraConfig { rank: 2, ..Default::default() }, 3).unwrap();
    assert_near("one by one", &values(model.forward(&IDS, 2, Pass::INFERENCE)), &base);
    for config in [
        LoraConfig { rank: 2, use_dora: true, ..Default::default() },
        LoraConfig { rank: 2, lora_bias: true, ..Default::default() },
        LoraConfig {
            rank: 2,
            exclude_modules: Some(TargetModules::Pattern(r".*experts\.[01]\..*".into())),
            ..Default::default()
        },
    ] {
        let mut model = adapted("qwen3_moe", &config, &device);
        let (before, count) = (values(model.forward(&IDS, 2, Pass::INFERENCE)), model.adapters().count());
        model.join_experts();
        assert_eq!(model.adapters().count(), count, "nothing was joined");
        assert_eq!(values(model.forward(&IDS, 2, Pass::INFERENCE)), before);
    }
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A folder of these tensors, with the configuration of a model and what is said of its quantization.
fn folder(base: &str, tensors: &Tensors, quantization: Option<serde_json::Value>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let specs = tensors.iter().map(|(name, (dtype, shape, _))| TensorSpec::new(name, *dtype, shape)).collect();
    let mut writer = ShardedWriter::create(dir.path(), specs, u64::MAX).unwrap();
    tensors.iter().for_each(|(name, (_, _, bytes))| writer.write(name, bytes).unwrap());
    writer.finish().unwrap();
    let config = std::fs::read(arch(base).join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    if let Some(said) = quantization {
        config["quantization_config"] = said;
    }
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

/// gpt-oss as it is published: experts in MXFP4, the rest in BF16; and the dense checkpoint of the same values.
fn mxfp4() -> (Tensors, [tempfile::TempDir; 2]) {
    let stored = Checkpoint::open(&arch("gpt_oss_tied")).unwrap();
    let mut tensors = Tensors::new();
    for (seed, name) in stored.names().enumerate() {
        let view = stored.tensor(name).unwrap();
        if !name.ends_with("_up_proj") && !name.ends_with("down_proj") {
            tensors.insert(name.into(), (view.dtype, view.shape.clone(), view.data.to_vec()));
            continue;
        }
        let &[experts, inputs, outputs] = &view.shape[..] else { panic!("{name} is stacked") };
        let shape = [experts, outputs, inputs / 32, 16];
        let bytes = |seed, len| noise(seed, len).into_iter().map(|x| ((x + 1.0) * 127.5) as u8).collect::<Vec<u8>>();
        let codes = bytes(seed as u64, shape.iter().product());
        // Powers of two from 2^-9 to 2^-2.
        let scales = bytes(99 + seed as u64, shape[..3].iter().product()).into_iter().map(|b| 118 + b % 8).collect();
        tensors.insert(format!("{name}_blocks"), (Dtype::U8, shape.into(), codes));
        tensors.insert(format!("{name}_scales"), (Dtype::U8, shape[..3].into(), scales));
    }
    let coded = folder("gpt_oss_tied", &tensors, Some(serde_json::json!({"quant_method": "mxfp4"})));
    let checkpoint = Checkpoint::open(coded.path()).unwrap();
    let decoded = checkpoint.names().map(|name| {
        let tensor = checkpoint.dense(name).unwrap();
        (name.to_string(), (tensor.dtype, tensor.shape.clone(), tensor.bytes().unwrap().into_owned()))
    });
    let dense = folder("gpt_oss_tied", &decoded.collect(), None);
    (tensors, [coded, dense])
}

#[test]
fn published_experts_in_mxfp4_are_their_values() {
    const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let (tensors, [coded, dense]) = mxfp4();
    let model = load_from(coded.path(), None, &Device::flex());
    // By hand: rows of the gate and of the input projection take turns.
    for (name, expert, output, row) in [("gate_proj", 0, 0, 0), ("up_proj", 2, 7, 15), ("gate_proj", 1, 31, 62)] {
        let stack = "model.layers.1.mlp.experts.gate_up_proj";
        let [codes, scales] = ["blocks", "scales"].map(|part| &tensors[&format!("{stack}_{part}")].2);
        let at = expert * 64 + row;
        let value = |input: usize| {
            let code = codes[at * 16 + input / 2] >> (input % 2 * 4) & 15;
            let value = E2M1[usize::from(code % 8)] * if code < 8 { 1.0 } else { -1.0 };
            value * 2f32.powi(i32::from(scales[at]) - 127)
        };
        let path = format!("model.layers.1.mlp.experts.{expert}.{name}");
        let (_, linear) = model.linears().find(|(found, _)| *found == path).unwrap();
        let weight = values(linear.base.to_dense(FloatDType::F32));
        assert_eq!(weight[output * 32..][..32], (0..32).map(value).collect::<Vec<f32>>(), "{path}");
    }
    let logits = |model: &Decoder| values(model.forward(&IDS, 2, Pass::INFERENCE));
    assert!(logits(&model).iter().all(|value| value.is_finite()));
    assert_eq!(logits(&model), logits(&load_from(dense.path(), None, &Device::flex())));
    for (name, device) in devices() {
        let [coded, dense] = [&coded, &dense].map(|dir| load_from(dir.path(), Some(QuantConfig::default()), &device));
        assert_eq!(logits(&coded), logits(&dense), "{name}");
        // Attention's four projections and the experts' three.
        let held = coded.linears().filter(|(_, linear)| matches!(linear.base, FrozenLinear::Quantized(_))).count();
        assert_eq!(held, 2 * (4 + 3 * 3), "{name}");
    }
}

/// As PEFT has them over stacked experts; saved, loaded and saved again.
#[test]
fn adapters_of_stacked_experts_are_parameters() {
    for name in ["gpt_oss", "gpt_oss_tied"] {
        let device = Device::flex();
        let model = adapted(name, &LoraConfig { rank: 2, ..Default::default() }, &device);
        let logits = values(model.forward(&IDS, 2, Pass::INFERENCE));
        let adapter = model.export_adapter("base", None).unwrap();
        assert_eq!(adapter.config.parameters(), ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], "{name}");
        let (count, hidden) = (model.config().experts.unwrap().count, model.config().hidden_size);
        let (lora_a, _) = adapter.lora("model.layers.1.mlp.experts.base_layer").unwrap();
        assert_eq!(lora_a.shape, [count * 2 * 2, hidden], "{name}: the ranks of gate and input projection");
        let mut again = load(name, &device);
        again.load_adapter(&adapter).unwrap();
        assert_eq!(values(again.forward(&IDS, 2, Pass::INFERENCE)), logits, "{name}");
        assert!(again.adapters().all(|(_, adapter)| adapter.rank() == 2), "{name}");
        assert_eq!(again.export_adapter("base", None).unwrap(), adapter, "{name}");
    }
}
