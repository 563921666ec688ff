//! DoRA over a 4-bit weight: the absmax of scaled rows, the gradient of magnitudes, the norms of adapted rows.

use anyhow::Result;
use fused_kernels::{Matrix, adapted_norms, columns};
use nf4_quant::{QuantConfig, kernels};

use crate::bench::Bench;
use crate::case::{Case, Run, Work};
use crate::shapes::{LINEAR, Shape};

const RANK: usize = 64;
const TOKENS: usize = 8192;

pub(crate) fn cases(_: &Bench) -> Vec<Case> {
    let llama = || LINEAR.iter().copied().filter(|shape| shape.model.starts_with("Llama-2-7B"));
    let all = [scaled_rows as fn(Shape) -> Case, gains, norms];
    all.into_iter().flat_map(|case| llama().map(case)).collect()
}

/// Two f32 for each block would be the plain form; with double quantization a byte becomes an f32.
fn scaled_rows(shape: Shape) -> Case {
    let Shape { model, out_features, in_features } = shape;
    let bytes = 5 * shape.elements().div_ceil(64) + 4 * out_features;
    Case {
        kernel: "scaled rows",
        shape: format!("{out_features} x {in_features}"),
        model,
        work: Work { bytes, flops: 0 },
        bar: None,
        peer: None,
        prepare: Box::new(move |bench| {
            let Bench { client, format, .. } = bench.clone();
            let n = shape.elements();
            let weight = bench.random(n, 1, 0.02);
            let weight = kernels::quantize(&client, weight, format, n, &QuantConfig::default())?;
            let factors = f32s(bench, out_features, 2);
            kernels::scale_rows(&client, &weight, &factors, in_features)?;
            let call = Box::new(move |_| {
                kernels::scale_rows(&client, &weight, &factors, in_features)?;
                Ok(())
            });
            Ok(Run { call, outputs: Vec::new() })
        }),
    }
}

fn gains(shape: Shape) -> Case {
    let Shape { model, out_features: width, .. } = shape;
    Case {
        kernel: "gain gradient",
        shape: format!("{TOKENS} x {width}"),
        model,
        // The format is two bytes wherever this is measured against a ceiling.
        work: Work { bytes: 2 * TOKENS * width * 2, flops: 0 },
        bar: None,
        peer: None,
        prepare: Box::new(move |bench| {
            let Bench { client, format, .. } = bench.clone();
            let rows = Matrix { rows: TOKENS, width, format: cuda_source::FloatFormat::from(format) };
            let (gain, dgain) = (f32s(bench, width, 3), client.empty(4 * width));
            let one = |seed| bench.random(TOKENS * width, seed as u32, 1.0);
            let sets: Vec<_> =
                (0..bench.sets(2 * TOKENS * width * 2)).map(|set| [one(2 * set), one(2 * set + 1)]).collect();
            let outputs = vec![dgain.clone()];
            let call = Box::new(move |i: usize| {
                let [dy, y] = &sets[i % sets.len()];
                let buffers = columns::Gain { dy, y, gain: &gain, dgain: &dgain };
                Ok(columns::gain_gradient(&client, buffers, rows)?)
            });
            Ok(Run { call, outputs })
        }),
    }
}

fn norms(shape: Shape) -> Case {
    let Shape { model, out_features, in_features } = shape;
    Case {
        kernel: "adapted norms",
        shape: format!("{out_features} x {in_features} rank {RANK}"),
        model,
        work: Work {
            bytes: 4 * (RANK * in_features + 2 * RANK * out_features + 2 * out_features),
            flops: 2 * RANK * RANK * (in_features + out_features),
        },
        bar: None,
        peer: None,
        prepare: Box::new(move |bench| {
            let client = bench.client.clone();
            let [squares, a_w, lora_a, lora_b] =
                [out_features, RANK * out_features, RANK * in_features, RANK * out_features]
                    .map(|len| f32s(bench, len, len as u32));
            let norms = client.empty(4 * out_features);
            let outputs = vec![norms.clone()];
            let sizes = adapted_norms::Sizes { out_features, in_features, rank: RANK };
            let call = Box::new(move |_| -> Result<()> {
                let buffers = adapted_norms::Buffers {
                    weight_squares: &squares,
                    a_w: &a_w,
                    lora_a: &lora_a,
                    lora_b: &lora_b,
                    norms: &norms,
                };
                Ok(adapted_norms::adapted_norms(&client, buffers, sizes, 1.0)?)
            });
            Ok(Run { call, outputs })
        }),
    }
}

/// Random f32.
fn f32s(bench: &Bench, len: usize, seed: u32) -> cubecl::server::Handle {
    let values: Vec<f32> = (0..len as u32).map(|i| ((i ^ seed) as f32 * 0.618).sin() + 1.5).collect();
    bench.client.create_from_slice(bytemuck::cast_slice(&values))
}
