//! Products of few tokens on the CPU: from 4-bit codes, dequantized first, and dense.
//!
//! Prints, per shape and number of tokens, the least time of many runs in µs, and for the products from codes the GB/s
//! of codes that it amounts to. `RAYON_NUM_THREADS=1` gives one core's.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use nf4_quant::{QuantConfig, Quantized4bit};
use qlora_layers::Linear4bit;
use qlora_layers::ops::{dequantize_4bit, frozen_linear, linear_4bit, matmul};

const SHAPES: [[usize; 2]; 4] = [[576, 1536], [1536, 576], [2048, 8192], [49_152, 576]];
const TOKENS: [usize; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];

/// Pseudo-random values in ±0.5.
fn noise(len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32 - 0.5).collect()
}

fn tensor(shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(noise(shape[0] * shape[1]), shape), device)
}

/// The least time of runs that take a quarter of a second together, and of ten at least.
fn least(mut run: impl FnMut() -> Tensor<2>) -> f64 {
    let (mut best, mut spent, mut runs) = (Duration::MAX, Duration::ZERO, 0);
    while runs < 10 || (spent < Duration::from_millis(250) && runs < 1000) {
        let start = Instant::now();
        black_box(run());
        let time = start.elapsed();
        (best, spent, runs) = (best.min(time), spent + time, runs + 1);
    }
    best.as_secs_f64() * 1e6
}

fn main() {
    // Under `cargo test` a bench is run without `--bench`: it only has to build.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let device = Device::flex();
    println!("{:>12} {:>6} {:>10} {:>6} {:>12} {:>10} {:>10}", "out x in", "tokens", "codes", "GB/s", "dequantized", "dense", "Burn's");
    for [rows, columns] in SHAPES {
        let weight = Quantized4bit::quantize(&noise(rows * columns), &[rows, columns], &QuantConfig::default()).unwrap();
        let linear = Linear4bit::from_quantized(&weight, &device).unwrap();
        let dense = linear.dequantize(FloatDType::F32);
        for tokens in TOKENS {
            let x = tensor([tokens, columns], &device);
            let codes = least(|| linear_4bit(x.clone(), linear.packed(), FloatDType::F32));
            let dequantized = least(|| {
                let weight = dequantize_4bit(linear.packed(), FloatDType::F32);
                matmul(x.clone(), weight.transpose())
            });
            let rows_of = least(|| frozen_linear(x.clone(), dense.clone(), FloatDType::F32));
            let burn = least(|| matmul(x.clone(), dense.clone().transpose()));
            let rate = (rows * columns / 2) as f64 / codes / 1e3;
            println!(
                "{:>12} {tokens:>6} {codes:>10.1} {rate:>6.2} {dequantized:>12.1} {rows_of:>10.1} {burn:>10.1}",
                format!("{rows}x{columns}")
            );
        }
    }
}
