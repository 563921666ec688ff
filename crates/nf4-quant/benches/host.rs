//! Host codec: elements and bytes per second on all cores, on a 4096 x 4096 weight.
//!
//! `RAYON_NUM_THREADS=1` gives the rate of one core.
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use nf4_quant::{Element, NestedAbsmax, QuantConfig, QuantType, Quantized4bit, dequantize_blocks, quantize_blocks};

const N: usize = 4096 * 4096;
const BLOCKSIZE: usize = 64;

fn weight<E: Element>() -> Vec<E> {
    let mut state = 1_u64;
    let mut uniform = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
    };
    // A sum of four uniforms is near enough to normal.
    (0..N).map(|_| E::from_f32((0..4).map(|_| uniform()).sum::<f32>() * 0.02)).collect()
}

fn element<E: Element>(c: &mut Criterion) {
    let weight = weight::<E>();
    let (mut codes, mut absmax) = (vec![0; N / 2], vec![0.0; N / BLOCKSIZE]);
    let mut out = vec![E::from_f32(0.0); N];
    for quant_type in QuantType::ALL {
        let id = |what: &str| BenchmarkId::new(format!("{what}_{quant_type}"), E::FORMAT);
        let mut group = c.benchmark_group("host");
        group.sample_size(10);
        // The bytes of the wide side: what loading a checkpoint reads.
        group.throughput(Throughput::Bytes((N * E::FORMAT.size()) as u64));
        group.bench_function(id("quantize"), |b| {
            b.iter(|| quantize_blocks(black_box(&weight), quant_type, BLOCKSIZE, &mut codes, &mut absmax).unwrap());
        });
        group.bench_function(id("dequantize"), |b| {
            b.iter(|| dequantize_blocks(black_box(&codes), &absmax, quant_type, BLOCKSIZE, &mut out).unwrap());
        });
        group.finish();
    }
    let mut group = c.benchmark_group("host");
    group.sample_size(10).throughput(Throughput::Bytes((N * E::FORMAT.size()) as u64));
    group.bench_function(BenchmarkId::new("quantize_nf4_double", E::FORMAT), |b| {
        b.iter(|| Quantized4bit::quantize(black_box(&weight), &[4096, 4096], &QuantConfig::default()).unwrap());
    });
    group.finish();
}

fn nested(c: &mut Criterion) {
    let absmax: Vec<f32> = weight::<f32>().into_iter().take(1 << 20).map(f32::abs).collect();
    let mut group = c.benchmark_group("nested");
    group.throughput(Throughput::Elements(1 << 20));
    group.bench_function("quantize", |b| b.iter(|| NestedAbsmax::quantize(black_box(&absmax))));
    let quantized = NestedAbsmax::quantize(&absmax);
    group.bench_function("dequantize", |b| b.iter(|| black_box(&quantized).dequantize()));
    group.finish();
}

criterion_group!(benches, element::<f32>, element::<bf16>, element::<f16>, nested);
criterion_main!(benches);
