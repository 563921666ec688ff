//! `cargo xtask random-checkpoint`: a checkpoint of a real model's shape with random weights, to
//! measure loading and training without downloading anything.
//!
//! Linear layers and embeddings are normal with the usual initialisation's deviation 0.02, norms
//! are ones, everything in bf16. The tokenizer is testdata's: its vocabulary is a part of each
//! shape's, so tokenized text is valid input.

use std::path::{Path, PathBuf};
use std::time::Instant;

use adapter_io::{Dtype, ShardedWriter, TensorSpec, atomic};
use anyhow::{Context, Result, anyhow};
use half::bf16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, Normal};
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::{Map, Value};

/// `config.json` of the models, by name.
const SHAPES: &str = include_str!("../../testdata/llama_shapes.json");

/// The numbers of a `config.json` that decide its tensors.
#[derive(Debug, Clone, Deserialize)]
struct Sizes {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    tie_word_embeddings: bool,
}

/// A model's shape.
#[derive(Debug, Clone)]
pub struct Shape {
    name: String,
    config: Value,
    sizes: Sizes,
}

/// Files that make up testdata's tokenizer.
const TOKENIZER: [&str; 3] = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];

impl Shape {
    /// The shape of a model of `testdata/llama_shapes.json`.
    pub fn named(name: &str) -> Result<Self> {
        let mut shapes: Map<String, Value> = serde_json::from_str(SHAPES).context("testdata/llama_shapes.json")?;
        let names = shapes.keys().cloned().collect::<Vec<_>>().join(", ");
        let config = shapes.remove(name).with_context(|| format!("no shape `{name}`; there are {names}"))?;
        Self::of(name, config)
    }

    /// The shape that a `config.json` describes.
    pub fn of(name: &str, config: Value) -> Result<Self> {
        let sizes = Sizes::deserialize(&config)?;
        Ok(Self { name: name.to_owned(), config, sizes })
    }

    /// Names and shapes of all tensors, in the order of a checkpoint's files.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let Sizes { vocab_size: vocab, hidden_size: hidden, intermediate_size: intermediate, .. } = self.sizes;
        let kv = self.sizes.num_key_value_heads * hidden / self.sizes.num_attention_heads;
        let mut tensors = vec![("model.embed_tokens.weight".to_string(), vec![vocab, hidden])];
        for layer in 0..self.sizes.num_hidden_layers {
            let mut add = |name: &str, shape: &[usize]| {
                tensors.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
            };
            add("self_attn.q_proj", &[hidden, hidden]);
            add("self_attn.k_proj", &[kv, hidden]);
            add("self_attn.v_proj", &[kv, hidden]);
            add("self_attn.o_proj", &[hidden, hidden]);
            add("mlp.gate_proj", &[intermediate, hidden]);
            add("mlp.up_proj", &[intermediate, hidden]);
            add("mlp.down_proj", &[hidden, intermediate]);
            add("input_layernorm", &[hidden]);
            add("post_attention_layernorm", &[hidden]);
        }
        tensors.push(("model.norm.weight".to_string(), vec![hidden]));
        if !self.sizes.tie_word_embeddings {
            tensors.push(("lm_head.weight".to_string(), vec![vocab, hidden]));
        }
        tensors
    }
}

/// What `cargo xtask random-checkpoint` takes.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The model whose shape it has; testdata/llama_shapes.json names them
    #[arg(long, value_parser = Shape::named)]
    shape: Shape,
    /// The folder to write
    #[arg(long)]
    out: PathBuf,
    /// The most bytes of weights per file
    #[arg(long, default_value = "5GB", value_parser = parse_size)]
    max_shard_size: u64,
    /// Another seed gives other weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Runs the task.
pub fn run(options: &Options) -> Result<()> {
    let Options { shape, out, max_shard_size, seed } = options;
    let start = Instant::now();
    let bytes = write(shape, out, *max_shard_size, *seed)?;
    println!(
        "{}: {}, {:.2} GB of weights, in {:.1} s",
        out.display(),
        shape.name,
        bytes as f64 / 1e9,
        start.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Writes a checkpoint with random weights and testdata's tokenizer; returns the bytes of the weights.
pub(crate) fn write(shape: &Shape, out: &Path, max_shard_bytes: u64, seed: u64) -> Result<u64> {
    let tensors = shape.tensors();
    let normal = Normal::new(0.0, 0.02).map_err(|error| anyhow!("0.02: {error}"))?;
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
                fill_random(&normal, seed, stream as u64, &mut values);
            }
            writer.write(name, bytemuck::cast_slice(&values))?;
        }
        writer.finish()?;
        std::fs::write(dir.join("config.json"), serde_json::to_string_pretty(&shape.config)? + "\n")?;
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

/// Fills a tensor with values that depend on the seed, the tensor's number and the position only.
fn fill_random(normal: &Normal<f32>, seed: u64, tensor: u64, out: &mut [bf16]) {
    /// Values of one generator, so that a tensor is filled by all threads.
    const RUN: usize = 1 << 16;
    out.par_chunks_mut(RUN).enumerate().for_each(|(run, values)| {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        random.set_stream(tensor << 32 | run as u64);
        values.fill_with(|| bf16::from_f32(normal.sample(&mut random)));
    });
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
        let bytes = write(&shape, &out, 300_000, 0).unwrap();
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
    fn shapes_have_their_parameters() {
        let count = |name| -> usize {
            Shape::named(name).unwrap().tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
        };
        assert_eq!(count("llama-2-7b"), 6_738_415_616);
        assert_eq!(count("llama-3.1-8b"), 8_030_261_248);
        assert_eq!(count("llama-2-70b"), 68_976_648_192);
        assert!(Shape::named("llama-9").unwrap_err().to_string().contains("llama-2-70b"));
    }

    #[test]
    fn random_values_are_normal_and_repeat() {
        let fill = |seed, tensor| {
            let mut values = vec![bf16::ZERO; 1_000_003];
            fill_random(&Normal::new(0.0, 0.02).unwrap(), seed, tensor, &mut values);
            values
        };
        let values = fill(7, 3);
        assert!(values == fill(7, 3) && values != fill(7, 4) && values != fill(8, 3));
        assert!(values[..100] != values[1 << 16..][..100]);
        let n = values.len() as f64;
        let moment = |k: i32| values.iter().map(|v| (v.to_f64() / 0.02).powi(k)).sum::<f64>() / n;
        // Five standard errors of a million samples: 1, sqrt(2) and sqrt(96) over 1,000.
        for (k, expected, tolerance) in [(1, 0.0, 0.005), (2, 1.0, 0.0071), (4, 3.0, 0.05)] {
            assert!((moment(k) - expected).abs() < tolerance, "moment {k}: {}", moment(k));
        }
    }

    #[test]
    fn sizes_are_parsed() {
        assert_eq!(parse_size("5GB").unwrap(), 5_000_000_000);
        assert_eq!(parse_size("0.5MB").unwrap(), 500_000);
        assert_eq!(parse_size("4096").unwrap(), 4096);
        assert!(parse_size("5 bananas").is_err() && parse_size("-1GB").is_err());
    }
}
