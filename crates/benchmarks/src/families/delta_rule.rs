//! The gated delta rule, forward and backward, beside flash-linear-attention's kernels.

use anyhow::Result;
use cubecl::server::Handle;
use fused_kernels::delta_rule::{self, Gradients, Inputs, Operand, Rows, Shape};
use nf4_quant::FloatFormat;
use serde_json::json;

use crate::bench::Bench;
use crate::case::{Case, Run, Work};

const DIM: usize = 128;
/// Tokens of a chunk.
const CHUNK: usize = 64;

/// Sizes of a case.
#[derive(Clone, Copy)]
struct Sizes {
    model: &'static str,
    rows: usize,
    len: usize,
    key_heads: usize,
    value_heads: usize,
}

const QWEN: Sizes = Sizes { model: "Qwen3.5-9B", rows: 4, len: 2048, key_heads: 16, value_heads: 32 };

pub(crate) fn cases(bench: &Bench) -> Vec<Case> {
    let supported = delta_rule::supports(&bench.client, fused_kernels::FloatFormat::BF16, [DIM; 2]);
    if !supported || bench.format != FloatFormat::BF16 {
        return Vec::new();
    }
    let sizes = [
        Sizes { rows: 1, ..QWEN },
        QWEN,
        Sizes { rows: 1, len: 16_384, ..QWEN },
        Sizes { model: "Qwen3.5-0.8B", value_heads: 16, ..QWEN },
        Sizes { model: "Qwen3.5-27B", value_heads: 48, ..QWEN },
    ];
    [false, true].into_iter().flat_map(|backward| sizes.map(|sizes| sizes.case(backward))).collect()
}

/// q, k, v, g, beta, the output and its gradient, and the gradients of the first five.
type Buffers = [Handle; 12];

impl Sizes {
    fn tokens(self) -> usize {
        self.rows * self.len
    }

    /// Elements of queries, or keys, and of values.
    fn elements(self) -> (usize, usize) {
        (self.tokens() * self.key_heads * DIM, self.tokens() * self.value_heads * DIM)
    }

    fn work(self, backward: bool) -> Work {
        let (keys, values) = self.elements();
        let factors = 4 * 2 * self.tokens() * self.value_heads;
        // For each chunk and head: five products of its tokens with one another, and three with a state, forward; backward twice as
        // many are what the gradients need, whatever a kernel computes again.
        let products = 2 * CHUNK * DIM * (5 * CHUNK + 3 * DIM);
        let chunks = self.tokens() / CHUNK * self.value_heads;
        match backward {
            false => Work { bytes: 2 * (2 * keys + 2 * values) + factors, flops: products * chunks },
            true => Work { bytes: 2 * (4 * keys + 3 * values) + 2 * factors, flops: 2 * products * chunks },
        }
    }

    fn buffers(self, bench: &Bench, seed: u32) -> Buffers {
        let (keys, values) = self.elements();
        let client = &bench.client;
        let factors = self.tokens() * self.value_heads;
        // Keys of length 1, and states that keep nine tenths.
        let key = |part| bench.random(keys, 4 * seed + part, 1.0 / (DIM as f32).sqrt());
        let constant = |value: f32| client.create_from_slice(bytemuck::cast_slice(&vec![value; factors]));
        [
            key(0),
            key(1),
            bench.random(values, 4 * seed + 2, 1.0),
            constant(-0.1),
            constant(0.5),
            client.empty(2 * values),
            bench.random(values, 4 * seed + 3, 1.0),
            client.empty(2 * keys),
            client.empty(2 * keys),
            client.empty(2 * values),
            client.empty(4 * factors),
            client.empty(4 * factors),
        ]
    }

    fn case(self, backward: bool) -> Case {
        let Self { model, rows, len, key_heads, value_heads } = self;
        let peer = json!({
            "op": if backward { "delta_rule_backward" } else { "delta_rule" },
            "rows": rows, "len": len, "key_heads": key_heads, "value_heads": value_heads, "dim": DIM,
        });
        Case {
            kernel: if backward { "delta rule gradients" } else { "delta rule" },
            shape: format!("{rows} x {len}, {key_heads}/{value_heads} x {DIM}"),
            model,
            work: self.work(backward),
            peer: Some(peer),
            bar: None,
            prepare: Box::new(move |bench| self.prepare(bench, backward)),
        }
    }

    fn prepare(self, bench: &Bench, backward: bool) -> Result<Run> {
        let Self { rows, len, key_heads, value_heads, .. } = self;
        let client = bench.client.clone();
        let bounds: Vec<u32> = (0..=rows).map(|row| (row * len) as u32).collect();
        let rows = Rows::new(&client, &bounds)?;
        let shape = Shape { rows, key_heads, value_heads, format: fused_kernels::FloatFormat::BF16 };
        let sets: Vec<Buffers> =
            (0..bench.sets(self.work(backward).bytes) as u32).map(|seed| self.buffers(bench, seed)).collect();
        let written = if backward { 7..12 } else { 5..6 };
        let outputs = sets.iter().flat_map(|buffers| buffers[written.clone()].to_vec()).collect();
        let call = Box::new(move |i: usize| {
            let [q, k, v, g, beta, out, d_out, d_q, d_k, d_v, d_g, d_beta] = &sets[i % sets.len()];
            let of_keys = |handle| Operand { handle, stride: key_heads * DIM };
            let of_values = |handle| Operand { handle, stride: value_heads * DIM };
            let inputs = Inputs { q: of_keys(q), k: of_keys(k), v: of_values(v), g, beta };
            match backward {
                false => delta_rule::forward(&client, inputs, of_values(out), &shape)?,
                true => {
                    let gradients = Gradients { q: d_q, k: d_k, v: d_v, g: d_g, beta: d_beta };
                    delta_rule::backward(&client, inputs, of_values(d_out), gradients, &shape)?;
                }
            }
            Ok(())
        });
        Ok(Run { call, outputs })
    }
}
