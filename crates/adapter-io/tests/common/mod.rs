//! Small files made for the tests.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use adapter_io::{Dtype, ShardedWriter, TensorSpec};

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
