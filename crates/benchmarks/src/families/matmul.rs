//! Products with a weight, 4-bit or dense, and LoRA folded in.
//!
//! Where no fused kernel takes a shape, what is measured is what the layer does then: dequantize, and Burn's
//! own product.

use anyhow::{Context, Result};
use burn::tensor::{DType, Distribution, Tensor};
use burn_qlora::qlora_layers::Linear4bit;
use burn_qlora::qlora_layers::ops::LoraTerms;
use burn_qlora::qlora_models::default_compute_dtype;
use nf4_quant::matmul::{self, Direction, LowRank, Operands, Problem, Weight};
use nf4_quant::{QuantConfig, Quantized4bit, kernels};
use serde_json::{Value, json};

use crate::bench::Bench;
use crate::case::{Case, Run, Work};
use crate::shapes::{LINEAR, Shape};

const BLOCKSIZE: usize = 64;

#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    pub shape: Shape,
    pub tokens: usize,
    pub direction: Direction,
    pub rank: usize,
    pub four_bit: bool,
}

pub(crate) fn cases(bench: &Bench) -> Vec<Case> {
    let mut products = Vec::new();
    let product = |shape, tokens, direction, rank, four_bit| Product { shape, tokens, direction, rank, four_bit };
    // A training batch on every shape, and other batches on one.
    for direction in [Direction::Forward, Direction::InputGradient] {
        for shape in LINEAR.iter().filter(|shape| shape.out_features < 100_000) {
            products.push(product(*shape, 2048, direction, 0, true));
        }
        for tokens in [16, 128, 512, 8192] {
            products.push(product(LINEAR[1], tokens, direction, 0, true));
        }
        for rank in [16, 64] {
            products.push(product(LINEAR[1], 2048, direction, rank, true));
        }
        for (shape, tokens) in [(LINEAR[0], 2048), (LINEAR[1], 2048), (LINEAR[1], 8192), (LINEAR[7], 8192)] {
            products.push(product(shape, tokens, direction, 0, false));
        }
    }
    // A token at a time, as in generation.
    for shape in [LINEAR[0], LINEAR[1], LINEAR[2], LINEAR[7], LINEAR[10]] {
        products.push(product(shape, 1, Direction::Forward, 0, true));
    }
    let head = LINEAR.iter().find(|shape| shape.out_features > 100_000);
    products.extend(head.map(|head| product(*head, 2048, Direction::Forward, 0, false)));
    let fused = products.into_iter().map(|product| product.case(bench));
    let layers = [(LINEAR[0], 2048, 16), (LINEAR[0], 2048, 64), (LINEAR[1], 2048, 64), (LINEAR[7], 2048, 64)];
    fused.chain(layers.into_iter().map(|(shape, tokens, rank)| lora_linear(bench, shape, tokens, rank))).collect()
}

/// Our dense product on sizes that fill a card.
pub(crate) fn peak(bench: &Bench) -> Vec<Case> {
    let square = |n| {
        let shape = Shape { model: "", out_features: n, in_features: n };
        Product { shape, tokens: n, direction: Direction::Forward, rank: 0, four_bit: false }
    };
    let squares = [4096, 8192].map(square).into_iter();
    squares.filter(|p| matmul::path(&bench.client, &p.problem(bench)).is_some()).map(|p| p.case(bench)).collect()
}

impl Product {
    fn problem(&self, bench: &Bench) -> Problem {
        let Shape { out_features, in_features, .. } = self.shape;
        let Self { tokens, direction, rank, .. } = *self;
        let blocksize = self.four_bit.then_some(BLOCKSIZE);
        Problem {
            tokens,
            out_features,
            in_features,
            direction,
            rank,
            format: bench.format,
            out: bench.format,
            blocksize,
        }
    }

    fn work(&self, problem: &Problem) -> Work {
        let (n, tokens, size) = (self.shape.elements(), self.tokens, problem.format.size());
        let weight = if self.four_bit { four_bit_bytes(n) } else { n * size };
        let low_rank = self.rank * (tokens * size + problem.features() * 4);
        Work {
            bytes: weight + low_rank + tokens * (problem.depth() + problem.features()) * size,
            flops: 2 * tokens * (n + self.rank * problem.features()),
        }
    }

    fn peer(&self, problem: &Problem) -> Option<Value> {
        let Shape { out_features, in_features, .. } = self.shape;
        let tokens = self.tokens;
        // PEFT has no product with an adapter folded in; `lora linear` compares the whole.
        (self.rank == 0).then(|| match (self.four_bit, self.direction) {
            (true, Direction::Forward) => {
                json!({"op": "matmul_4bit", "tokens": tokens, "out": out_features, "in": in_features})
            }
            (true, Direction::InputGradient) => {
                json!({"op": "matmul_4bit_gradient", "tokens": tokens, "out": out_features, "in": in_features})
            }
            (false, direction) => {
                let layout = if direction == Direction::Forward { "nt" } else { "nn" };
                json!({"op": "matmul", "m": tokens, "k": problem.depth(), "n": problem.features(), "layout": layout})
            }
        })
    }

    pub(super) fn case(self, bench: &Bench) -> Case {
        let problem = self.problem(bench);
        let Shape { model, out_features, in_features } = self.shape;
        let fused = matmul::path(&bench.client, &problem).is_some();
        let fold = if self.rank > 0 { format!(" rank {}", self.rank) } else { String::new() };
        let composed = if fused { "" } else { ", composed" };
        let work = self.work(&problem);
        Case {
            kernel: match (self.four_bit, self.direction) {
                (true, Direction::Forward) => "4-bit y",
                (true, Direction::InputGradient) => "4-bit dx",
                (false, Direction::Forward) => "dense y",
                (false, Direction::InputGradient) => "dense dx",
            },
            shape: format!("{} by {out_features} x {in_features}{fold}{composed}", self.tokens),
            model,
            work,
            bar: None,
            peer: self.peer(&problem),
            prepare: Box::new(move |bench| match fused {
                true => self.fused(bench, problem, bench.sets(work.bytes)),
                false => self.composed(bench, problem, bench.sets(work.bytes)),
            }),
        }
    }

    fn fused(self, bench: &Bench, problem: Problem, sets: usize) -> Result<Run> {
        struct Set {
            x: cubecl::server::Handle,
            four_bit: Option<kernels::DeviceWeight>,
            dense: cubecl::server::Handle,
            product: cubecl::server::Handle,
            factor: cubecl::server::Handle,
            out: cubecl::server::Handle,
        }
        let client = bench.client.clone();
        let (n, format) = (self.shape.elements(), bench.format);
        let path = matmul::path(&client, &problem).context("the fused kernel is gone")?;
        let mut buffers = Vec::new();
        for seed in 0..sets as u32 {
            let dense = bench.random(n, seed, 0.02);
            let four_bit = match self.four_bit {
                true => Some(kernels::quantize(&client, dense.clone(), format, n, &QuantConfig::default())?),
                false => None,
            };
            buffers.push(Set {
                x: bench.random(self.tokens * problem.depth(), seed + 1000, 1.0),
                // The dense weight of a 4-bit one is not kept.
                dense: if self.four_bit { client.empty(4) } else { dense },
                four_bit,
                product: bench.random(self.tokens * self.rank.max(1), seed + 2000, 0.1),
                factor: bench.random_in(
                    nf4_quant::FloatFormat::F32,
                    problem.features() * self.rank.max(1),
                    seed + 3000,
                    0.02,
                ),
                out: client.empty(self.tokens * problem.features() * format.size()),
            });
        }
        let outputs = buffers.iter().map(|set| set.out.clone()).collect();
        let rank = self.rank;
        let call = Box::new(move |i: usize| {
            let Set { x, four_bit, dense, product, factor, out } = &buffers[i % buffers.len()];
            let weight = four_bit.as_ref().map_or(Weight::Dense(dense), Weight::FourBit);
            let low_rank = (rank > 0).then_some(LowRank { product, factor, mask: None });
            let operands = Operands { x, weight, low_rank, bias: None };
            Ok(matmul::matmul(&client, path, &problem, &operands, out)?)
        });
        Ok(Run { call, outputs })
    }

    /// As the layer does without a kernel for it.
    fn composed(self, bench: &Bench, problem: Problem, sets: usize) -> Result<Run> {
        let Shape { out_features, in_features, .. } = self.shape;
        let dtype = default_compute_dtype(&bench.device);
        let layers: Vec<(Tensor<2>, Linear4bit)> = (0..sets)
            .map(|_| Ok((random(bench, self.tokens, problem.depth())?, layer(bench, out_features, in_features)?)))
            .collect::<Result<_>>()?;
        let direction = self.direction;
        let product = move |i: usize| {
            let (x, layer) = &layers[i % layers.len()];
            match direction {
                Direction::Forward => layer.forward(x.clone()),
                Direction::InputGradient => x.clone().matmul(layer.dequantize(dtype)),
            }
        };
        run(product)
    }
}

/// Codes and statistics with double quantization.
fn four_bit_bytes(elements: usize) -> usize {
    let blocks = elements.div_ceil(BLOCKSIZE);
    elements.div_ceil(2) + blocks + 4 * blocks.div_ceil(256)
}

/// The whole of a layer with its adapter: y = x Wᵀ + scaling (x Aᵀ) Bᵀ.
pub(super) fn lora_linear(bench: &Bench, shape: Shape, tokens: usize, rank: usize) -> Case {
    let Shape { model, out_features, in_features } = shape;
    let (n, features) = (shape.elements(), in_features + out_features);
    let work = Work {
        bytes: four_bit_bytes(n) + tokens * features * bench.format.size() + 4 * rank * features,
        flops: 2 * tokens * (n + rank * features),
    };
    Case {
        kernel: "lora linear",
        shape: format!("{tokens} by {out_features} x {in_features} rank {rank}"),
        model,
        work,
        bar: None,
        peer: Some(json!({
            "op": "lora_linear_4bit", "tokens": tokens, "out": out_features, "in": in_features, "rank": rank
        })),
        prepare: Box::new(move |bench| {
            let factor = |rows: usize, cols: usize| {
                Tensor::<2>::random([rows, cols], Distribution::Normal(0.0, 0.02), (&bench.device, DType::F32))
            };
            let (lora_a, lora_b) = (factor(rank, in_features), factor(out_features, rank));
            let terms = LoraTerms { scaling: 0.25, dropout: None, gradients_only: false };
            let layers: Vec<(Tensor<2>, Linear4bit)> = (0..bench.sets(work.bytes))
                .map(|_| Ok((random(bench, tokens, in_features)?, layer(bench, out_features, in_features)?)))
                .collect::<Result<_>>()?;
            run(move |i: usize| {
                let (x, layer) = &layers[i % layers.len()];
                layer.lora_forward(x.clone(), lora_a.clone(), lora_b.clone(), terms)
            })
        }),
    }
}

/// Runs a product of tensors once to see that it works: tensors keep their failures to themselves.
fn run(product: impl Fn(usize) -> Tensor<2> + 'static) -> Result<Run> {
    product(0).slice([0..1, 0..1]).try_into_data().context("the product does not run")?;
    let call = Box::new(move |i| {
        let _ = product(i);
        Ok(())
    });
    Ok(Run { call, outputs: Vec::new() })
}

fn random(bench: &Bench, rows: usize, cols: usize) -> Result<Tensor<2>> {
    let dtype = default_compute_dtype(&bench.device);
    Ok(Tensor::<2>::random([rows, cols], Distribution::Normal(0.0, 1.0), &bench.device).cast(dtype))
}

/// A layer with a random weight, quantized on the device.
fn layer(bench: &Bench, out_features: usize, in_features: usize) -> Result<Linear4bit> {
    let n = out_features * in_features;
    let dense = bench.random(n, 7, 0.02);
    let weight = kernels::quantize(&bench.client, dense, bench.format, n, &QuantConfig::default())?;
    let weight: Quantized4bit = weight.to_host(&bench.client, &[out_features, in_features], bench.format)?;
    Ok(Linear4bit::from_quantized(&weight, &bench.device)?)
}
