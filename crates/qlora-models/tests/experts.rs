//! Experts that run as one against experts one by one, in whole models on every device.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use burn::tensor::{Device, FloatDType, Tensor};
use nf4_quant::QuantConfig;
use qlora_layers::ops::backward_from;
use qlora_layers::{LoraConfig, Pass, TargetModules, trainable};
use qlora_models::{Decoder, LoadOptions};
use std::collections::BTreeMap;
use std::path::Path;
use test_support::{devices, noise};

const IDS: [u32; 12] = [3, 9, 4, 1, 30, 11, 5, 9, 2, 6, 5, 3];

fn load(name: &str, device: &Device) -> Decoder {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference/archs").join(name);
    let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype: FloatDType::F32 };
    Decoder::load(&dir, options, device, &mut |_| ()).unwrap()
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
        for name in ["qwen3_moe", "mixtral", "glm4_moe_groups"] {
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
