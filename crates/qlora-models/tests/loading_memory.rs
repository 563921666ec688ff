//! What loading takes: the model, and one weight of the checkpoint. All memory of the process is counted, so that this file has one test.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use std::fs;
use std::path::Path;

use adapter_io::{Dtype, ShardedWriter, TensorSpec};
use burn::tensor::{Device, FloatDType};
use nf4_quant::QuantConfig;
use qlora_models::{Decoder, LoadOptions};
use serde_json::json;

const LAYERS: usize = 6;
const WIDTH: usize = 1024;
const INNER: usize = 4096;
const WORDS: usize = 256;
/// What the allocator, threads and tables take beside what is asked for: 10 MiB are measured.
const SLACK: usize = 32 << 20;

fn line(key: &str) -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

/// A Llama of 100 million weights in FP8.
fn checkpoint(dir: &Path) {
    let mut tensors: Vec<(String, Dtype, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), Dtype::BF16, vec![WORDS, WIDTH]),
        ("model.norm.weight".into(), Dtype::BF16, vec![WIDTH]),
    ];
    for layer in 0..LAYERS {
        let block = format!("model.layers.{layer}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((format!("{block}.{norm}.weight"), Dtype::BF16, vec![WIDTH]));
        }
        let square = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
            .map(|name| (name, [WIDTH, WIDTH]));
        let mlp =
            [("mlp.gate_proj", [INNER, WIDTH]), ("mlp.up_proj", [INNER, WIDTH]), ("mlp.down_proj", [WIDTH, INNER])];
        for (name, [rows, columns]) in square.into_iter().chain(mlp) {
            tensors.push((format!("{block}.{name}.weight"), Dtype::F8_E4M3, vec![rows, columns]));
            tensors.push((format!("{block}.{name}.weight_scale_inv"), Dtype::F32, vec![rows / 128, columns / 128]));
        }
    }
    let specs = tensors.iter().map(|(name, dtype, shape)| TensorSpec::new(name, *dtype, shape)).collect();
    let mut writer = ShardedWriter::create(dir, specs, u64::MAX).unwrap();
    for (name, dtype, shape) in &tensors {
        let count: usize = shape.iter().product();
        let data: Vec<u8> = match dtype {
            Dtype::BF16 => {
                (0..count).flat_map(|i| half::bf16::from_f32(1.0 - (i % 97) as f32 / 100.0).to_le_bytes()).collect()
            }
            Dtype::F32 => (0..count).flat_map(|i| (0.001 + i as f32 * 1e-5).to_le_bytes()).collect(),
            // No NaN has this bit clear.
            _ => (0..count).map(|i| ((i * 2_654_435_761) >> 7) as u8 & 0xbf).collect(),
        };
        writer.write(name, &data).unwrap();
    }
    writer.finish().unwrap();
    let config = json!({"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": 8, "vocab_size": WORDS, "tie_word_embeddings": true, "dtype": "bfloat16", "quantization_config":
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}});
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn loading_holds_the_model_and_one_weight() {
    let dir = tempfile::tempdir().unwrap();
    checkpoint(dir.path());
    let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype: FloatDType::F32 };
    // The peak begins anew.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = line("VmRSS:");
    let model = Decoder::load(dir.path(), options, &Device::flex(), &mut |_| {}).unwrap();
    let peak = line("VmHWM:").saturating_sub(before);
    // The largest weight as it is decoded, in bfloat16.
    let weight = 2 * INNER * WIDTH;
    let bound = model.device_bytes() + weight + SLACK;
    let decoded = 2 * model.num_params();
    assert!(decoded > 2 * bound, "the bound says nothing: {decoded} {bound}");
    assert!(peak <= bound, "{} MiB at the peak, {} are allowed", peak >> 20, bound >> 20);
}
