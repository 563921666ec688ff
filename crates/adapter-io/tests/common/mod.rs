//! Small files made for the tests.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use adapter_io::{Adapter, AdapterConfig, Checkpoint, Dtype, HostTensor, ShardedWriter, TensorSpec};

/// A safetensors file from a header's JSON and its data.
pub fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

/// Three tensors, in three shards when `shard_bytes` is 64.
pub fn write_checkpoint(dir: &Path, shard_bytes: u64) {
    write(dir, &specs(), shard_bytes);
}

/// These tensors, with [`content`].
pub fn write(dir: &Path, specs: &[TensorSpec], shard_bytes: u64) {
    fs::create_dir_all(dir).unwrap();
    let mut writer = ShardedWriter::create(dir, specs.to_vec(), shard_bytes).unwrap();
    for spec in specs.iter().rev() {
        writer.write(&spec.name, &content(spec)).unwrap();
    }
    writer.finish().unwrap();
}

pub fn specs() -> Vec<TensorSpec> {
    vec![
        TensorSpec::new("model.embed_tokens.weight", Dtype::F32, &[4, 4]),
        TensorSpec::new("model.layers.0.mlp.up_proj.weight", Dtype::BF16, &[4, 8]),
        TensorSpec::new("model.norm.weight", Dtype::F16, &[16]),
    ]
}

/// Bytes that are valid small floats of every type.
pub fn content(spec: &TensorSpec) -> Vec<u8> {
    (0..spec.num_bytes().unwrap()).map(|i| (i * 7 + spec.name.len()) as u8 & 0x3f).collect()
}

/// A model of one layer in bf16, with its `config.json`.
pub fn model(dir: &Path) {
    let bf16 = |name: &str, shape: &[usize]| TensorSpec::new(name, Dtype::BF16, shape);
    let block = |name: &str, shape: &[usize]| bf16(&format!("model.layers.0.{name}.weight"), shape);
    let specs = [
        bf16("model.embed_tokens.weight", &[32, 16]),
        bf16("model.norm.weight", &[16]),
        bf16("lm_head.weight", &[32, 16]),
        block("input_layernorm", &[16]),
        block("post_attention_layernorm", &[16]),
        block("self_attn.q_proj", &[16, 16]),
        block("self_attn.k_proj", &[8, 16]),
        block("self_attn.v_proj", &[8, 16]),
        block("self_attn.o_proj", &[16, 16]),
        block("mlp.gate_proj", &[32, 16]),
        block("mlp.up_proj", &[32, 16]),
        block("mlp.down_proj", &[16, 32]),
    ];
    write(dir, &specs, 1 << 30);
    fs::write(dir.join("config.json"), MODEL_CONFIG).unwrap();
}

/// Makes the output head of [`model`] a copy of its embedding table.
pub fn copy_head(dir: &Path) {
    let path = dir.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    let data = |name: &str| checkpoint.tensor(name).unwrap().data.to_vec();
    let (embed, head) = (data("model.embed_tokens.weight"), data("lm_head.weight"));
    drop(checkpoint);
    let at = bytes.windows(head.len()).position(|window| window == head).unwrap();
    bytes[at..at + head.len()].copy_from_slice(&embed);
    fs::write(path, bytes).unwrap();
}

/// The configuration of [`model`].
pub const MODEL_CONFIG: &str = r#"{
  "model_type": "llama", "hidden_act": "silu", "hidden_size": 16, "intermediate_size": 32,
  "max_position_embeddings": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "num_key_value_heads": 2,
  "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": false, "vocab_size": 32
}"#;

/// A tensor of one value.
pub fn tensor(shape: &[usize], value: f32) -> HostTensor {
    HostTensor::new(shape, vec![value; shape.iter().product()]).unwrap()
}

/// An adapter of rank 2 with these tensors, by module.
pub fn adapter_on(entries: &[(&str, HostTensor)]) -> Adapter {
    let mut adapter = Adapter::new(AdapterConfig { r: 2, lora_alpha: 2.0, ..AdapterConfig::default() });
    for (key, tensor) in entries {
        adapter.tensors.insert(format!("base_model.model.{key}"), tensor.clone());
    }
    adapter
}
