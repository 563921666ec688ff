//! LoRA's products with a narrow side: u = x Aᵀ and dA = vᵀ x, and the same of dy with B.

use anyhow::Result;
use fused_kernels::low_rank::{self, Factor, FactorLayout, Gradient, Output, Projection};
use nf4_quant::FloatFormat;
use serde_json::json;

use crate::bench::Bench;
use crate::case::{Case, Run, Work};

/// Whether the device runs the kernels.
pub(super) fn applies(bench: &Bench) -> bool {
    low_rank::supports(&bench.client, fused_kernels::FloatFormat::BF16) && bench.format == FloatFormat::BF16
}

pub(crate) fn cases(bench: &Bench) -> Vec<Case> {
    if !applies(bench) {
        return Vec::new();
    }
    let mut cases = Vec::new();
    for operation in [project, gradient] {
        let layout = FactorLayout::RankFirst;
        for (model, features) in [("Llama-2-7B", 4096), ("Llama-2-7B", 11008), ("Llama-2-70B", 28672)] {
            for (tokens, rank) in [(2048, 16), (2048, 64), (8192, 16), (8192, 64), (8192, 128)] {
                cases.push(operation(model, tokens, features, rank, layout));
            }
        }
        // Rows that 16-byte loads don't fit, and a rank that fills no tile.
        cases.push(operation("odd features", 2048, 4090, 64, layout));
        cases.push(operation("odd rank", 2048, 4096, 12, layout));
    }
    cases
}

/// u = x Aᵀ or v = dy B, the factor rounded and packed before.
pub(super) fn project(model: &'static str, tokens: usize, features: usize, rank: usize, layout: FactorLayout) -> Case {
    let bytes = 2 * (tokens * features + tokens * rank + rank * features);
    Case {
        kernel: if layout == FactorLayout::RankFirst { "low rank u" } else { "low rank v" },
        shape: format!("{tokens} x {features} by rank {rank}"),
        model,
        work: Work { bytes, flops: 2 * tokens * features * rank },
        bar: None,
        peer: Some(json!({"op": "matmul", "m": tokens, "k": features, "n": rank, "layout": match layout {
            FactorLayout::RankFirst => "nt",
            FactorLayout::FeaturesFirst => "nn",
        }})),
        prepare: Box::new(move |bench| {
            let client = bench.client.clone();
            let factor = bench.random_in(FloatFormat::F32, rank * features, 1, 0.02);
            let factor = Factor { values: &factor, features, rank, layout };
            let factor = low_rank::pack(&client, factor, fused_kernels::FloatFormat::BF16)?;
            let sets: Vec<_> = (0..bench.sets(bytes) as u32)
                .map(|seed| (bench.random(tokens * features, seed, 1.0), client.empty(2 * tokens * rank)))
                .collect();
            let outputs = sets.iter().map(|(_, out)| out.clone()).collect();
            let call = Box::new(move |i: usize| {
                let (x, out) = &sets[i % sets.len()];
                let operands = Projection { x, factor: &factor, out };
                Ok(low_rank::project(&client, operands, tokens, Output::Half, 0.25, None)?)
            });
            Ok(Run { call, outputs })
        }),
    }
}

/// dA = vᵀ x or dB = dyᵀ u.
pub(super) fn gradient(model: &'static str, tokens: usize, features: usize, rank: usize, layout: FactorLayout) -> Case {
    let bytes = 2 * (tokens * features + tokens * rank) + 4 * rank * features;
    Case {
        kernel: if layout == FactorLayout::RankFirst { "low rank dA" } else { "low rank dB" },
        shape: format!("{tokens} x {features} by rank {rank}"),
        model,
        work: Work { bytes, flops: 2 * tokens * features * rank },
        bar: None,
        peer: Some(match layout {
            FactorLayout::RankFirst => json!({"op": "matmul", "m": rank, "k": tokens, "n": features, "layout": "tn"}),
            FactorLayout::FeaturesFirst => {
                json!({"op": "matmul", "m": features, "k": tokens, "n": rank, "layout": "tn"})
            }
        }),
        prepare: Box::new(move |bench| -> Result<Run> {
            let client = bench.client.clone();
            let sets: Vec<_> = (0..bench.sets(bytes) as u32)
                .map(|seed| {
                    let x = bench.random(tokens * features, seed, 1.0);
                    (x, bench.random(tokens * rank, seed + 1000, 1.0), client.empty(4 * rank * features))
                })
                .collect();
            let outputs = sets.iter().map(|(_, _, out)| out.clone()).collect();
            let shape = low_rank::Shape { tokens, features, rank };
            let format = fused_kernels::FloatFormat::BF16;
            let call = Box::new(move |i: usize| {
                let (x, product, out) = &sets[i % sets.len()];
                Ok(low_rank::gradient(&client, Gradient { x, product, out }, shape, layout, None, format)?)
            });
            Ok(Run { call, outputs })
        }),
    }
}
