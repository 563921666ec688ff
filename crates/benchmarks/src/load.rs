//! `qlora-bench load`: how long a checkpoint takes to the device, in 4 bits.
//!
//! The checkpoint is a model's, or one of random numbers that this program writes and removes again. Each run is a process of
//! its own, because the first load of a process also makes the allocator's memory; the file's pages are in the page cache
//! after the first. What is timed is `Decoder::load` until the device has everything; opening the device is not in it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn_qlora::adapter_io::{Dtype, ShardedWriter, TensorSpec};
use burn_qlora::qlora_layers::mix;
use burn_qlora::qlora_models::{ModelConfig, default_compute_dtype};
use burn_qlora::{Decoder, LoadOptions, QuantConfig, device_memory, select_device};
use serde_json::{Value, json};

use crate::bench::Bench;
use crate::kernels::write;
use crate::machine;
use crate::step::shapes;

/// Options of `load`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// A checkpoint's folder.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["shape", "layers"])]
    model: Option<PathBuf>,
    /// A shape of testdata/llama_shapes.json, moe_shapes.json, linear_shapes.json or latent_shapes.json, of which a random checkpoint in bf16 is written.
    #[arg(long, default_value = "llama-2-7b")]
    shape: String,
    /// Another number of layers.
    #[arg(long)]
    layers: Option<usize>,
    /// Where the random checkpoint is written; it is removed again. `/dev/shm` keeps the disk out of the figures.
    #[arg(long, value_name = "DIR")]
    folder: Option<PathBuf>,
    /// cuda, `cuda:<index>`, cpu, vulkan or metal.
    #[arg(long, default_value = "cuda")]
    device: String,
    /// How often each way is measured.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Also with the processor quantizing, where the device would.
    #[arg(long)]
    host: bool,
    /// Writes the figures to a file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// One process's part: the folder to load.
    #[arg(long, hide = true, value_name = "DIR")]
    child: Option<PathBuf>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(dir) = &args.child {
        println!("{}", load(dir, &args.device)?);
        return Ok(());
    }
    let written;
    let dir = match &args.model {
        Some(dir) => dir.as_path(),
        None => {
            let parent = args.folder.clone().unwrap_or_else(std::env::temp_dir);
            written = tempfile::tempdir_in(&parent).with_context(|| parent.display().to_string())?;
            let start = Instant::now();
            let bytes = random_checkpoint(&shapes::json(&args.shape, args.layers, None)?, written.path())?;
            println!("{} GB written in {:.1} s", gigabytes(bytes), start.elapsed().as_secs_f64());
            written.path()
        }
    };
    println!(
        "{:>10} {:>4} {:>9} {:>8} {:>12} {:>13}",
        "quantized", "run", "seconds", "GB/s", "in use GiB", "reserved GiB"
    );
    let ways: &[(&str, Option<&str>)] = match args.host {
        true => &[("as chosen", None), ("on host", Some("host"))],
        false => &[("as chosen", None)],
    };
    let mut rows = Vec::new();
    for (way, quantizer) in ways {
        for number in 1..=args.runs {
            let mut row = process(dir, &args.device, *quantizer)?;
            let [seconds, bytes] = ["seconds", "bytes"].map(|key| row[key].as_f64().unwrap_or(f64::NAN));
            let [in_use, reserved] = ["in_use", "reserved"].map(|key| row[key].as_f64().unwrap_or(f64::NAN) / GIB);
            println!(
                "{way:>10} {number:>4} {seconds:>9.3} {:>8.2} {in_use:>12.2} {reserved:>13.2}",
                bytes / seconds / 1e9
            );
            row["quantized"] = json!(way);
            rows.push(row);
        }
    }
    let Some(path) = &args.json else { return Ok(()) };
    let mut record = match args.device.as_str() {
        "cpu" => json!({}),
        device => machine::describe(&Bench::open(if device.starts_with("cuda") { device } else { "wgpu" })?.client),
    };
    record["script"] = json!("cargo xtask bench load");
    record["model"] = json!({"shape": args.shape, "layers": args.layers, "folder": args.model});
    record["loads"] = json!(rows);
    write(path, &record)
}

const GIB: f64 = (1_u64 << 30) as f64;

fn gigabytes(bytes: u64) -> String {
    format!("{:.2}", bytes as f64 / 1e9)
}

/// Loads in a process of its own.
fn process(dir: &Path, device: &str, quantizer: Option<&str>) -> Result<Value> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["load", "--device", device, "--child"]).arg(dir).stderr(Stdio::inherit());
    command.env_remove("BURN_QLORA_LOADING");
    command.envs(quantizer.map(|quantizer| ("BURN_QLORA_LOADING", quantizer)));
    let output = command.output()?;
    if !output.status.success() {
        bail!("the process that loads failed: {}", output.status);
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().rev().find(|line| line.starts_with('{')).context("the process that loads said nothing")?;
    Ok(serde_json::from_str(line)?)
}

fn load(dir: &Path, device: &str) -> Result<Value> {
    let device = select_device(device)?;
    let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype: default_compute_dtype(&device) };
    device.sync()?;
    let mut bytes = 0;
    let start = Instant::now();
    let model = Decoder::load(dir, options, &device, &mut |progress| bytes = progress.loaded_bytes)?;
    device.sync()?;
    let seconds = start.elapsed().as_secs_f64();
    let (in_use, reserved) = device_memory(&device).unzip();
    drop(model);
    Ok(json!({"seconds": seconds, "bytes": bytes, "in_use": in_use, "reserved": reserved}))
}

/// Writes a checkpoint of a shape: bf16 of either sign between 2^-7 and 2^-5, the same sequence in every tensor. Returns its
/// bytes.
fn random_checkpoint(config: &Value, dir: &Path) -> Result<u64> {
    std::fs::write(dir.join("config.json"), config.to_string())?;
    let shape = ModelConfig::from_dir(dir)?;
    let mut tensors =
        vec![TensorSpec::new("model.embed_tokens.weight", Dtype::BF16, &[shape.vocab_size, shape.hidden_size])];
    for spec in shape.linear_specs() {
        tensors.push(TensorSpec::new(format!("{}.weight", spec.path), Dtype::BF16, &spec.shape));
        if spec.bias {
            tensors.push(TensorSpec::new(format!("{}.bias", spec.path), Dtype::BF16, &spec.shape[..1]));
        }
    }
    let norms = shape.norms().into_iter();
    tensors.extend(norms.map(|(path, width)| TensorSpec::new(format!("{path}.weight"), Dtype::BF16, &[width])));
    let elements = |tensor: &TensorSpec| tensor.shape.iter().product::<usize>();
    let longest = tensors.iter().map(elements).max().unwrap_or(0);
    let numbers: Vec<u16> = (0..longest.div_ceil(4) as u64)
        .flat_map(|i| mix(i).to_le_bytes().as_chunks::<2>().0.to_vec())
        .map(|bits| u16::from_le_bytes(bits) & 0x80ff | 0x3c00)
        .collect();
    // Files of 5 GB, as the models have them.
    let mut writer = ShardedWriter::create(dir, tensors.clone(), 5_000_000_000)?;
    for tensor in &tensors {
        writer.write(&tensor.name, bytemuck::cast_slice(&numbers[..elements(tensor)]))?;
    }
    let bytes = writer.total_bytes();
    writer.finish()?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_checkpoint_loads() {
        for shape in ["tiny", "tiny-moe"] {
            let dir = tempfile::tempdir().unwrap();
            let bytes = random_checkpoint(&shapes::json(shape, Some(2), Some(300)).unwrap(), dir.path()).unwrap();
            let loaded = load(dir.path(), "cpu").unwrap();
            assert_eq!(loaded["bytes"].as_u64(), Some(bytes), "{shape}: all of it is read");
            assert!(loaded["seconds"].as_f64().unwrap() > 0.0);
        }
    }
}
