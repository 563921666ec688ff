//! `qlora-bench first-use`: how long a process takes to its first 4-bit product.
//!
//! Kernels are compiled when they are first launched, and kept on disk by the program (CubeCL's cache) and
//! by NVIDIA's driver (machine code of PTX). A cold run is a process with both caches empty, a warm one the
//! same process again. Each runs as a child, because a process has only one first time.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::tensor::{DType, Tensor, TensorData};
use burn_qlora::qlora_layers::Linear4bit;
use burn_qlora::qlora_models::default_compute_dtype;
use burn_qlora::{QuantConfig, Quantized4bit, select_device};
use serde_json::{Value, json};

use crate::bench::Bench;
use crate::kernels::write;
use crate::machine;

const OUT_FEATURES: usize = 4096;
const IN_FEATURES: usize = 4096;
const TOKENS: usize = 512;
const WARM_RUNS: usize = 3;

/// Options of `first-use`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// cuda, `cuda:<index>`, vulkan or metal.
    #[arg(long, default_value = "cuda")]
    device: String,
    /// Writes the figures to a file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// One process's part.
    #[arg(long, hide = true)]
    child: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if args.child {
        println!("{}", first_product(&args.device)?);
        return Ok(());
    }
    let caches = tempfile::tempdir()?;
    let cold = process(&args.device, caches.path())?;
    let mut warm = (0..WARM_RUNS).map(|_| process(&args.device, caches.path())).collect::<Result<Vec<_>>>()?;
    warm.sort_by(|a, b| seconds(a, "process").total_cmp(&seconds(b, "process")));
    let warm = warm.swap_remove(WARM_RUNS / 2);
    println!("{TOKENS} tokens by {OUT_FEATURES} x {IN_FEATURES}, seconds      cold     warm");
    for (key, text) in [
        ("process", "process start to first product"),
        ("device", "  of which device and driver"),
        ("first", "  of which first product"),
        ("second", "second product"),
    ] {
        println!("{text:<41} {:>8.3} {:>8.3}", seconds(&cold, key), seconds(&warm, key));
    }
    println!("{:<41} {:>8} {:>8}", "kernels launched", cold["kernels"], warm["kernels"]);
    let Some(path) = &args.json else { return Ok(()) };
    let mut record =
        machine::describe(&Bench::open(if args.device.starts_with("cuda") { &args.device } else { "wgpu" })?.client);
    record["script"] = json!("cargo xtask bench first-use");
    record["first_use"] = json!({"cold": cold, "warm": warm});
    write(path, &record)
}

fn seconds(run: &Value, key: &str) -> f64 {
    run[key].as_f64().unwrap_or(f64::NAN)
}

/// Runs a child with its caches in a folder.
fn process(device: &str, caches: &Path) -> Result<Value> {
    let start = Instant::now();
    let mut child = Command::new(std::env::current_exe()?)
        .args(["first-use", "--child", "--device", device])
        .env("BURN_QLORA_KERNEL_CACHE", caches.join("kernels"))
        .env("CUDA_CACHE_PATH", caches.join("driver"))
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("the child has no output")?).read_line(&mut line)?;
    let total = start.elapsed().as_secs_f64();
    let status = child.wait()?;
    if !status.success() {
        bail!("the measured process failed: {status}");
    }
    let mut run: Value = serde_json::from_str(&line).context("the measured process's answer")?;
    // Less what it did after its first product.
    run["process"] = json!(total - seconds(&run, "second"));
    Ok(run)
}

/// Loads a layer and multiplies by it, twice.
fn first_product(device: &str) -> Result<Value> {
    let start = Instant::now();
    let device = select_device(device)?;
    let opened = start.elapsed().as_secs_f64();
    let values = |n: usize| (0..n).map(|i| ((i as f32) * 0.618).sin() * 0.02).collect::<Vec<f32>>();
    let weight = Quantized4bit::quantize(
        &values(OUT_FEATURES * IN_FEATURES),
        &[OUT_FEATURES, IN_FEATURES],
        &QuantConfig::default(),
    )?;
    let dtype = DType::from(default_compute_dtype(&device));
    let tokens = TensorData::new(values(TOKENS * IN_FEATURES), [TOKENS, IN_FEATURES]).convert_dtype(dtype);
    let launched = cubecl::launched::LaunchedKernels::new();
    let product = || -> Result<(f64, Vec<u8>)> {
        let start = Instant::now();
        let layer = Linear4bit::from_quantized(&weight, &device)?;
        let x = Tensor::<2>::from_data(tokens.clone(), (&device, dtype));
        // Data are read when they are first looked at.
        let y = layer.forward(x).try_into_data().context("the product does not run")?.bytes().to_vec();
        Ok((start.elapsed().as_secs_f64(), y))
    };
    let ((first, y), (second, again)) = (product()?, product()?);
    if y != again {
        bail!("two products of the same operands differ");
    }
    let kernels = launched.finish().len();
    Ok(json!({"device": opened, "first": first, "second": second, "kernels": kernels}))
}
