//! Quantize and dequantize, NF4 in blocks of 64.

use nf4_quant::{QuantConfig, kernels};
use serde_json::json;

use crate::bench::Bench;
use crate::case::{Case, Run, Work};
use crate::shapes::{LINEAR, Shape};

pub(crate) fn cases(bench: &Bench) -> Vec<Case> {
    let mut cases = Vec::new();
    for operation in [dequantize, quantize] {
        // Double quantization is what QLoRA trains with; the plain form only where it is a form of its own.
        cases.extend(LINEAR.iter().map(|shape| operation(bench, *shape, true)));
        let large = LINEAR.iter().filter(|shape| shape.model == "Llama-2-70B");
        cases.extend(large.map(|shape| operation(bench, *shape, false)));
    }
    cases
}

fn config(double_quant: bool) -> QuantConfig {
    QuantConfig { double_quant, ..QuantConfig::default() }
}

fn name(bench: &Bench, shape: Shape, double_quant: bool) -> String {
    let Shape { out_features, in_features, .. } = shape;
    let plain = if double_quant { "" } else { ", plain absmax" };
    format!("{out_features} x {in_features} {}{plain}", bench.format)
}

/// Codes, statistics and the dense weight, each once.
fn bytes(bench: &Bench, shape: Shape, double_quant: bool) -> usize {
    let n = shape.elements();
    let blocks = n.div_ceil(64);
    let statistics = if double_quant { blocks + 4 * blocks.div_ceil(256) } else { 4 * blocks };
    n.div_ceil(2) + statistics + n * bench.format.size()
}

pub(super) fn dequantize(bench: &Bench, shape: Shape, double_quant: bool) -> Case {
    let bytes = bytes(bench, shape, double_quant);
    let Shape { model, out_features, in_features } = shape;
    Case {
        kernel: "dequantize",
        shape: name(bench, shape, double_quant),
        model,
        work: Work { bytes, flops: 0 },
        bar: None,
        peer: Some(json!({"op": "dequantize", "out": out_features, "in": in_features, "nested": double_quant})),
        prepare: Box::new(move |bench| {
            let Bench { client, format, .. } = bench.clone();
            let n = shape.elements();
            let mut sets = Vec::new();
            for seed in 0..bench.sets(bytes) {
                let weight = bench.random(n, seed as u32, 0.02);
                let weight = kernels::quantize(&client, weight, format, n, &config(double_quant))?;
                sets.push((weight, client.empty(n * format.size())));
            }
            let outputs = sets.iter().map(|(_, out)| out.clone()).collect();
            let call = Box::new(move |i: usize| {
                let (weight, out) = &sets[i % sets.len()];
                Ok(kernels::dequantize(&client, weight, out.clone(), format)?)
            });
            Ok(Run { call, outputs })
        }),
    }
}

pub(super) fn quantize(bench: &Bench, shape: Shape, double_quant: bool) -> Case {
    let bytes = bytes(bench, shape, double_quant);
    let Shape { model, out_features, in_features } = shape;
    Case {
        kernel: "quantize",
        shape: name(bench, shape, double_quant),
        model,
        work: Work { bytes, flops: 0 },
        bar: None,
        peer: Some(json!({"op": "quantize", "out": out_features, "in": in_features, "nested": double_quant})),
        prepare: Box::new(move |bench| {
            let Bench { client, format, .. } = bench.clone();
            let n = shape.elements();
            let sets: Vec<_> = (0..bench.sets(bytes)).map(|seed| bench.random(n, seed as u32, 0.02)).collect();
            // Its buffers are its own: once, it is waited for, to see that it runs.
            kernels::quantize(&client, sets[0].clone(), format, n, &config(double_quant))?;
            let call = Box::new(move |i: usize| {
                let weight = sets[i % sets.len()].clone();
                kernels::queue_quantize(&client, weight, format, n, &config(double_quant))?;
                Ok(())
            });
            Ok(Run { call, outputs: Vec::new() })
        }),
    }
}
