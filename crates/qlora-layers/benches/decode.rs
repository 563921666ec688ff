//! Products of few tokens on the CPU: from 4-bit codes, dequantized first, and dense.
//!
//! Prints, per shape and number of tokens, the least time of many runs in µs, and for the products from codes the GB/s
//! of codes that it amounts to. Runs take turns on copies of the weight, as the layers of a model do, so that a dense one
//! comes from memory. `RAYON_NUM_THREADS=1` gives one core's.
#![allow(clippy::print_stdout, clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use nf4_quant::{QuantConfig, Quantized4bit};
use qlora_layers::Linear4bit;
use qlora_layers::ops::{dequantize_4bit, frozen_linear, linear_4bit};

const SHAPES: [[usize; 2]; 4] = [[576, 1536], [1536, 576], [2048, 8192], [49_152, 576]];
const TOKENS: [usize; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];
/// Bytes of all copies of a dense weight.
const COPIES: usize = 128 << 20;

/// Pseudo-random values in ±0.5.
fn noise(len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32 - 0.5).collect()
}

fn tensor(shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(noise(shape[0] * shape[1]), shape), device)
}

/// The least time of runs that take half a second together, and of ten at least.
fn least<T>(weights: &[T], run: impl Fn(&T) -> Tensor<2>) -> f64 {
    let (mut best, mut spent, mut runs) = (Duration::MAX, Duration::ZERO, 0);
    while runs < 10 || (spent < Duration::from_millis(500) && runs < 1000) {
        let weight = &weights[runs % weights.len()];
        let start = Instant::now();
        black_box(run(weight));
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
    println!(
        "{:>12} {:>6} {:>10} {:>6} {:>12} {:>10} {:>10}",
        "out x in", "tokens", "codes", "GB/s", "dequantized", "dense", "Burn's"
    );
    for [rows, columns] in SHAPES {
        let weight =
            Quantized4bit::quantize(&noise(rows * columns), &[rows, columns], &QuantConfig::default()).unwrap();
        let copies = COPIES / (4 * rows * columns) + 1;
        let linear: Vec<_> = (0..copies).map(|_| Linear4bit::from_quantized(&weight, &device).unwrap()).collect();
        let dense: Vec<_> = linear.iter().map(|linear| linear.dequantize(FloatDType::F32)).collect();
        for tokens in TOKENS {
            let x = tensor([tokens, columns], &device);
            let codes = least(&linear, |linear| linear_4bit(x.clone(), linear.packed(), FloatDType::F32));
            let dequantized = least(&linear, |linear| {
                let weight = dequantize_4bit(linear.packed(), FloatDType::F32);
                x.clone().matmul(weight.transpose())
            });
            let rows_of = least(&dense, |dense| frozen_linear(x.clone(), dense.clone(), FloatDType::F32));
            let burn = least(&dense, |dense| x.clone().matmul(dense.clone().transpose()));
            let rate = (rows * columns / 2) as f64 / codes / 1e3;
            println!(
                "{:>12} {tokens:>6} {codes:>10.1} {rate:>6.2} {dequantized:>12.1} {rows_of:>10.1} {burn:>10.1}",
                format!("{rows}x{columns}")
            );
        }
    }
}
