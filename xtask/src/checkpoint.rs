//! `cargo xtask random-checkpoint`: a checkpoint of a real model's shape with random weights, to
//! measure loading and training without downloading anything.
//!
//! Linear layers and embeddings are normal with the usual initialisation's deviation 0.02, norms
//! are ones, everything in bf16. The tokenizer is testdata's: its vocabulary is a part of each
//! shape's, so tokenized text is valid input.

use std::path::{Path, PathBuf};
use std::time::Instant;

use adapter_io::{Dtype, ShardedWriter, TensorSpec, atomic};
use anyhow::{Context, Result, bail};
use half::bf16;
use serde_json::{Value, json};

use crate::normal::Normal;

/// The numbers of a `config.json` that decide its tensors.
struct Shape {
    name: &'static str,
    vocab: usize,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    context: usize,
    rope_theta: f64,
    /// llama3's long-context scaling of RoPE.
    rope_scaling: bool,
    tied: bool,
}

const SHAPES: [Shape; 3] = [
    Shape {
        name: "llama-2-7b",
        vocab: 32_000,
        hidden: 4096,
        intermediate: 11_008,
        layers: 32,
        heads: 32,
        kv_heads: 32,
        context: 4096,
        rope_theta: 10_000.0,
        rope_scaling: false,
        tied: false,
    },
    Shape {
        name: "llama-3.1-8b",
        vocab: 128_256,
        hidden: 4096,
        intermediate: 14_336,
        layers: 32,
        heads: 32,
        kv_heads: 8,
        context: 131_072,
        rope_theta: 500_000.0,
        rope_scaling: true,
        tied: false,
    },
    Shape {
        name: "tiny",
        vocab: 4096,
        hidden: 128,
        intermediate: 344,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        context: 1024,
        rope_theta: 10_000.0,
        rope_scaling: false,
        tied: true,
    },
];

/// Files that make up testdata's tokenizer.
const TOKENIZER: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

impl Shape {
    fn named(name: &str) -> Result<&'static Self> {
        let names: Vec<_> = SHAPES.iter().map(|shape| shape.name).collect();
        SHAPES
            .iter()
            .find(|shape| shape.name == name)
            .with_context(|| format!("no shape `{name}`; there are {}", names.join(", ")))
    }

    fn config(&self) -> Value {
        let mut config = json!({
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "dtype": "bfloat16",
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.context,
            "mlp_bias": false,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pad_token_id": 3,
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tied,
            "use_cache": true,
            "vocab_size": self.vocab,
        });
        if self.rope_scaling {
            config["rope_scaling"] = json!({
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            });
        }
        config
    }

    /// Names and shapes of all tensors, in the order of a checkpoint's files.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, head_dim) = (self.hidden, self.hidden / self.heads);
        let kv = self.kv_heads * head_dim;
        let mut tensors = vec![("model.embed_tokens.weight".to_string(), vec![self.vocab, hidden])];
        for layer in 0..self.layers {
            let mut add = |name: &str, shape: &[usize]| {
                tensors.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
            };
            add("self_attn.q_proj", &[hidden, hidden]);
            add("self_attn.k_proj", &[kv, hidden]);
            add("self_attn.v_proj", &[kv, hidden]);
            add("self_attn.o_proj", &[hidden, hidden]);
            add("mlp.gate_proj", &[self.intermediate, hidden]);
            add("mlp.up_proj", &[self.intermediate, hidden]);
            add("mlp.down_proj", &[hidden, self.intermediate]);
            add("input_layernorm", &[hidden]);
            add("post_attention_layernorm", &[hidden]);
        }
        tensors.push(("model.norm.weight".to_string(), vec![hidden]));
        if !self.tied {
            tensors.push(("lm_head.weight".to_string(), vec![self.vocab, hidden]));
        }
        tensors
    }
}

/// Runs the task with its arguments.
pub fn run(args: &[String]) -> Result<()> {
    let (mut shape, mut out, mut shard, mut seed) = (None, None, parse_size("5GB")?, 0);
    let mut args = args.iter();
    while let Some(flag) = args.next() {
        let value = args.next().with_context(|| format!("{flag} needs a value"))?;
        match flag.as_str() {
            "--shape" => shape = Some(Shape::named(value)?),
            "--out" => out = Some(PathBuf::from(value)),
            "--max-shard-size" => shard = parse_size(value)?,
            "--seed" => seed = value.parse().context("--seed must be a whole number")?,
            _ => bail!("unknown flag {flag}; there are --shape, --out, --max-shard-size, --seed"),
        }
    }
    let shape = shape.context("--shape is missing")?;
    let out = out.context("--out is missing")?;
    let start = Instant::now();
    let bytes = write(shape, &out, shard, seed)?;
    println!(
        "{}: {}, {:.2} GB of weights, in {:.1} s",
        out.display(),
        shape.name,
        bytes as f64 / 1e9,
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

fn write(shape: &Shape, out: &Path, max_shard_bytes: u64, seed: u64) -> Result<u64> {
    let tensors = shape.tensors();
    let normal = Normal::new(0.02, seed);
    let mut bytes = 0;
    let mut fill = |dir: &Path| -> Result<()> {
        let specs = tensors.iter().map(|(name, shape)| TensorSpec::new(name, Dtype::BF16, shape)).collect();
        let mut writer = ShardedWriter::create(dir, specs, max_shard_bytes)?;
        bytes = writer.total_bytes();
        let mut values = Vec::new();
        for (stream, (name, shape)) in tensors.iter().enumerate() {
            values.clear();
            values.resize(shape.iter().product(), bf16::ONE);
            if shape.len() > 1 {
                normal.fill(stream as u64, &mut values);
            }
            writer.write(name, bytemuck::cast_slice(&values))?;
        }
        writer.finish()?;
        std::fs::write(dir.join("config.json"), serde_json::to_string_pretty(&shape.config())? + "\n")?;
        let tokenizer = crate::root().join("testdata/reference/tiny-llama");
        for name in TOKENIZER {
            let from = tokenizer.join(name);
            std::fs::copy(&from, dir.join(name)).with_context(|| from.display().to_string())?;
        }
        Ok(())
    };
    // The folder appears whole or not at all.
    atomic::replace_dir(out, |dir| fill(dir).map_err(Failure))?;
    Ok(bytes)
}

/// Carries an `anyhow` error through `replace_dir`, which wants a type made from its own.
#[derive(Debug)]
struct Failure(anyhow::Error);

impl From<adapter_io::FormatError> for Failure {
    fn from(error: adapter_io::FormatError) -> Self {
        Self(error.into())
    }
}

impl From<Failure> for anyhow::Error {
    fn from(failure: Failure) -> Self {
        failure.0
    }
}

/// A size such as `5GB`, `200MB` or `4096`, in bytes; units are decimal, as for transformers.
fn parse_size(text: &str) -> Result<u64> {
    let units = [("KB", 1_000), ("MB", 1_000_000), ("GB", 1_000_000_000), ("", 1)];
    let size = units.iter().find_map(|(unit, factor)| {
        let number: f64 = text.strip_suffix(unit)?.parse().ok()?;
        (number > 0.0).then_some((number * f64::from(*factor)) as u64)
    });
    size.with_context(|| format!("`{text}` is no size; write it like 5GB or 200MB"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use adapter_io::Checkpoint;

    #[test]
    fn a_tiny_checkpoint_opens_again() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("model");
        let shape = Shape::named("tiny").unwrap();
        let bytes = write(shape, &out, 300_000, 0).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        assert_eq!(checkpoint.total_bytes(), bytes);
        assert!(checkpoint.files().count() > 2, "sharded");
        for (name, shape) in shape.tensors() {
            let tensor = checkpoint.tensor(&name).unwrap();
            assert_eq!(tensor.expect_shape(&shape).unwrap().dtype, Dtype::BF16);
        }
        assert_eq!(checkpoint.tensor("model.norm.weight").unwrap().to_f32_vec().unwrap(), vec![1.0; 128]);
        for name in TOKENIZER.iter().chain(&["config.json"]) {
            assert!(out.join(name).is_file(), "{name}");
        }
    }

    #[test]
    fn the_7b_shape_has_its_parameters() {
        let count = |name| -> usize {
            Shape::named(name).unwrap().tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
        };
        assert_eq!(count("llama-2-7b"), 6_738_415_616);
        assert_eq!(count("llama-3.1-8b"), 8_030_261_248);
    }

    #[test]
    fn sizes_are_parsed() {
        assert_eq!(parse_size("5GB").unwrap(), 5_000_000_000);
        assert_eq!(parse_size("0.5MB").unwrap(), 500_000);
        assert_eq!(parse_size("4096").unwrap(), 4096);
        assert!(parse_size("5 bananas").is_err() && parse_size("-1GB").is_err());
    }
}
