//! Rows that lie one after the other in one pass against each row alone: logits and gradients, in every family.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use burn::tensor::{Device, FloatDType, Tensor};
use nf4_quant::QuantConfig;
use qlora_layers::ops::backward_from;
use qlora_layers::{LoraConfig, Pass, trainable};
use qlora_models::{Decoder, LoadOptions, ModelConfig, Sequence};
use serde_json::json;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use test_support::{devices, dtypes, noise};

/// Shorter than a convolution, longer than windows, than a chunk of the delta rule, and empty.
const LENS: [usize; 6] = [7, 1, 0, 70, 2, 19];
/// Fewer, where each length is other kernels to compile.
const FEW: [usize; 3] = [2, 0, 70];

fn archs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference/archs")
}

/// With adapters that change the result.
fn adapted(name: &str, device: &Device) -> Decoder {
    let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype: FloatDType::F32 };
    with_adapters(Decoder::load(&archs().join(name), options, device, &mut |_| ()).unwrap())
}

fn with_adapters(mut model: Decoder) -> Decoder {
    model.attach_lora(&LoraConfig { rank: 2, ..Default::default() }, 3).unwrap();
    for (i, (_, adapter)) in model.adapters_mut().enumerate() {
        let shape = adapter.lora_b.dims();
        let values = noise(i as u64, shape[0] * shape[1]).into_iter().map(|value| 0.2 * value).collect::<Vec<f32>>();
        adapter.lora_b = trainable(Tensor::<1>::from_data(values.as_slice(), &adapter.lora_b.device()).reshape(shape));
    }
    model.track();
    model
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.without_autodiff().cast(FloatDType::F32).try_into_vec_as::<f32>().unwrap()
}

/// Logits of a pass, and the gradients of all parameters for `dy`.
fn run(model: &Decoder, ids: &[u32], sequence: &Sequence, dy: &[f32]) -> (Vec<f32>, BTreeMap<String, Vec<f32>>) {
    let pass = Pass::training(1);
    let x = model.begin(sequence, ids, pass);
    let x = model.blocks().iter().fold(x, |x, block| model.run_block(block, x, sequence, pass));
    let logits = model.logits(x, pass);
    let dy = Tensor::<1>::from_data(dy, model.device()).reshape(logits.dims()).cast(model.dtype());
    let mut grads = backward_from(logits.clone(), dy);
    let gradient = |(name, parameter): (String, &Tensor<2>)| {
        let len = parameter.dims().iter().product();
        (name, parameter.grad_remove(&mut grads).map_or_else(|| vec![0.0; len], values))
    };
    (values(logits), model.parameters().into_iter().map(gradient).collect())
}

/// Elements within a part of the largest one.
fn assert_near(what: &str, found: &[f32], expected: &[f32], bar: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= bar * largest.max(0.1), "{what}, element {i}: {a} against {b} of {largest}");
    }
}

/// Logits and gradients of rows in one pass, and of the same rows one by one.
type Found = (Vec<f32>, BTreeMap<String, Vec<f32>>);

fn both(model: &Decoder, lens: &[usize]) -> [Found; 2] {
    let words = model.config().vocab_size as u32;
    let total: usize = lens.iter().sum();
    let ids: Vec<u32> = (0..total as u32).map(|i| (7 * i + i * i / 3 + 3) % (words - 4)).collect();
    let dy = noise(8, total * words as usize);
    let packed = run(model, &ids, &model.packed_sequence(lens), &dy);
    let (mut alone, mut expected, mut first) = (Vec::new(), BTreeMap::<String, Vec<f32>>::new(), 0);
    for len in lens.iter().copied().filter(|len| *len > 0) {
        let own = &dy[first * words as usize..][..len * words as usize];
        let (logits, gradients) = run(model, &ids[first..first + len], &model.sequence(1, len, 0), own);
        alone.extend(logits);
        for (parameter, gradient) in gradients {
            let sum = expected.entry(parameter).or_insert_with(|| vec![0.0; gradient.len()]);
            sum.iter_mut().zip(gradient).for_each(|(sum, part)| *sum += part);
        }
        first += len;
    }
    assert!(!expected.is_empty() && packed.1.keys().eq(expected.keys()));
    [packed, (alone, expected)]
}

fn check(what: &str, model: &Decoder, lens: &[usize]) {
    let [(logits, found), (alone, expected)] = both(model, lens);
    assert_near(&format!("{what}, logits"), &logits, &alone, F32_BAR);
    for (parameter, gradient) in &found {
        assert_near(&format!("{what}, {parameter}"), gradient, &expected[parameter], F32_BAR);
    }
}

/// The length of the difference by the length of the second.
fn distance(found: &[f32], exact: &[f32]) -> f32 {
    assert_eq!(found.len(), exact.len());
    let difference: f32 = found.iter().zip(exact).map(|(a, b)| (a - b).powi(2)).sum();
    (difference / exact.iter().map(|b| b.powi(2)).sum::<f32>()).sqrt()
}

/// The same sums in another order: some f32 roundings of the largest term.
const F32_BAR: f32 = 1e-5;

#[test]
fn packed_rows_are_alone_in_every_family() {
    let mut names: Vec<String> =
        std::fs::read_dir(archs()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    for name in names {
        check(&name, &adapted(&name, &Device::flex()), &LENS);
    }
}

/// Where attention and linear attention are other code.
#[test]
fn packed_rows_are_alone_on_every_device() {
    for (device_name, device) in devices().into_iter().filter(|(name, _)| *name != "flex") {
        check(&format!("qwen3_5 on {device_name}"), &adapted("qwen3_5", &device), &FEW);
    }
}

/// Heads of the widths that kernels on tensor cores have.
#[test]
fn packed_rows_are_alone_in_narrow_formats() {
    let shape = json!({
        "model_type": "qwen3_next", "vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    });
    for (device_name, device) in devices() {
        for dtype in dtypes(device_name).into_iter().filter(|dtype| *dtype != FloatDType::F32) {
            let config = ModelConfig::from_json(&shape, Path::new("shape")).unwrap();
            let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype };
            let model = with_adapters(Decoder::random(config, options, 5, &device, &mut |_| ()).unwrap());
            let [(logits, found), (alone, expected)] = both(&model, &FEW);
            // Products of more tokens are cut otherwise, which is other roundings to 8 bits: on an H200 single elements are up to 5 % of the
            // largest apart.
            let what = format!("{dtype:?} on {device_name}");
            assert!(distance(&logits, &alone) < 5e-2, "{what}, logits: {}", distance(&logits, &alone));
            for (parameter, gradient) in &found {
                let distance = distance(gradient, &expected[parameter]);
                assert!(distance < 5e-2, "{what}, {parameter}: {distance}");
            }
        }
    }
}
