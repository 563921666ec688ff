//! Causal attention, forward and backward, beside torch's scaled_dot_product_attention.

use anyhow::Result;
use cubecl::server::Handle;
use fused_kernels::attention::{self, Backward, Forward, Operand, Options, Rows, Shape, Strides};
use nf4_quant::FloatFormat;
use serde_json::json;

use crate::bench::Bench;
use crate::case::{Case, Run, Work};

/// Sizes of a case.
#[derive(Clone, Copy)]
struct Sizes {
    model: &'static str,
    rows: usize,
    len: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
    softcap: Option<f32>,
}

const LLAMA: Sizes = Sizes {
    model: "Llama-2-7B",
    rows: 1,
    len: 2048,
    heads: 32,
    kv_heads: 32,
    head_dim: 128,
    window: None,
    softcap: None,
};
/// Its softcap is left out where torch is to run beside.
const GEMMA: Sizes = Sizes { model: "Gemma-2-9B", rows: 4, heads: 16, kv_heads: 8, head_dim: 256, ..LLAMA };

pub(crate) fn cases(bench: &Bench) -> Vec<Case> {
    if !attention::supports(&bench.client, fused_kernels::FloatFormat::BF16) || bench.format != FloatFormat::BF16 {
        return Vec::new();
    }
    let sizes = [
        LLAMA,
        Sizes { len: 4096, ..LLAMA },
        Sizes { rows: 4, ..LLAMA },
        Sizes { len: 16384, ..LLAMA },
        Sizes { model: "Llama-3.1-8B", rows: 4, kv_heads: 8, ..LLAMA },
        Sizes { model: "Mistral-7B", len: 16384, kv_heads: 8, window: Some(4096), ..LLAMA },
        Sizes { model: "Qwen2.5-0.5B", rows: 4, heads: 14, kv_heads: 2, head_dim: 64, ..LLAMA },
        Sizes { model: "Phi-3-mini", rows: 4, head_dim: 96, ..LLAMA },
        GEMMA,
        Sizes { softcap: Some(50.0), ..GEMMA },
        Sizes { rows: 1, len: 16384, ..GEMMA },
        Sizes { model: "Gemma-3-12B", rows: 1, len: 16384, window: Some(1024), ..GEMMA },
        Sizes { model: "DeepSeek-V2-Lite", kv_heads: 16, head_dim: 192, ..GEMMA },
        Sizes { model: "DeepSeek-V2-Lite", rows: 1, len: 16384, kv_heads: 16, head_dim: 192, ..GEMMA },
    ];
    [false, true].into_iter().flat_map(|backward| sizes.map(|sizes| sizes.case(backward))).collect()
}

/// q, k, v, o, lse, and the gradients of o, q, k and v.
type Buffers = [Handle; 9];

impl Sizes {
    /// Pairs of query and key that see each other, of one head.
    fn pairs(self) -> usize {
        let window = self.window.unwrap_or(self.len).min(self.len);
        self.rows * (window * (window + 1) / 2 + (self.len - window) * window)
    }

    /// Elements of the queries and of the keys.
    fn elements(self) -> (usize, usize) {
        let tokens = self.rows * self.len;
        (tokens * self.heads * self.head_dim, tokens * self.kv_heads * self.head_dim)
    }

    fn work(self, backward: bool) -> Work {
        let (q, k) = self.elements();
        let statistics = 4 * self.rows * self.len * self.heads;
        // Two products forward; five backward are what the gradients need, whatever a kernel computes again.
        let products = if backward { 5 } else { 2 };
        Work {
            bytes: if backward { 2 * (4 * q + 4 * k) } else { 2 * (2 * q + 2 * k) } + statistics,
            flops: products * 2 * self.pairs() * self.heads * self.head_dim,
        }
    }

    fn buffers(self, bench: &Bench, seed: u32) -> Buffers {
        let (q, k) = self.elements();
        let client = &bench.client;
        let random = |elements, part| bench.random(elements, seed * 4 + part, 1.0);
        [
            random(q, 0),
            random(k, 1),
            random(k, 2),
            client.empty(2 * q),
            client.empty(4 * self.rows * self.len * self.heads),
            random(q, 3),
            client.empty(2 * q),
            client.empty(2 * k),
            client.empty(2 * k),
        ]
    }

    fn case(self, backward: bool) -> Case {
        let Self { model, rows, len, heads, kv_heads, head_dim, window, softcap } = self;
        let work = self.work(backward);
        let window_text = window.map_or_else(String::new, |window| format!(" window {window}"));
        let softcap_text = softcap.map_or_else(String::new, |softcap| format!(" softcap {softcap}"));
        let peer = json!({
            "op": if backward { "attention_backward" } else { "attention" },
            "rows": rows, "len": len, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
        });
        Case {
            kernel: if backward { "attention gradients" } else { "attention" },
            shape: format!("{rows} x {len}, {heads}/{kv_heads} x {head_dim}{window_text}{softcap_text}"),
            model,
            work,
            // Torch's kernels take no window and no softcap.
            peer: (window.is_none() && softcap.is_none()).then_some(peer),
            bar: None,
            prepare: Box::new(move |bench| self.prepare(bench, backward)),
        }
    }

    fn prepare(self, bench: &Bench, backward: bool) -> Result<Run> {
        let Self { rows, len, heads, kv_heads, head_dim, window, softcap, .. } = self;
        let client = bench.client.clone();
        let shape = Shape {
            rows: Rows::Equal { rows, q_len: len, kv_len: len },
            heads,
            kv_heads,
            head_dim,
            format: fused_kernels::FloatFormat::BF16,
        };
        let options = Options { scale: 1.0 / (head_dim as f32).sqrt(), window, softcap };
        let of_queries = Strides::token_major(len, heads, head_dim);
        let of_keys = Strides::token_major(len, kv_heads, head_dim);
        let sets: Vec<Buffers> =
            (0..bench.sets(self.work(backward).bytes) as u32).map(|seed| self.buffers(bench, seed)).collect();
        let forward = move |client: &cubecl::client::Client, [q, k, v, o, lse, ..]: &Buffers, shape: &Shape| {
            let queries = |handle| Operand { handle, strides: of_queries };
            let keys = |handle| Operand { handle, strides: of_keys };
            let operands = Forward { q: queries(q), k: keys(k), v: keys(v), sinks: None, o: queries(o), lse };
            attention::forward(client, operands, shape, options)
        };
        if backward {
            for buffers in &sets {
                forward(&client, buffers, &shape)?;
            }
        }
        let written = if backward { 6..9 } else { 3..5 };
        let outputs = sets.iter().flat_map(|buffers| buffers[written.clone()].to_vec()).collect();
        let call = Box::new(move |i: usize| {
            let buffers = &sets[i % sets.len()];
            if !backward {
                return Ok(forward(&client, buffers, &shape)?);
            }
            let queries = |i: usize| Operand { handle: &buffers[i], strides: of_queries };
            let keys = |i: usize| Operand { handle: &buffers[i], strides: of_keys };
            let operands = Backward {
                q: queries(0),
                k: keys(1),
                v: keys(2),
                o: queries(3),
                lse: &buffers[4],
                d_out: queries(5),
                d_q: queries(6),
                d_k: keys(7),
                d_v: keys(8),
            };
            Ok(attention::backward(&client, operands, &shape, options)?)
        });
        Ok(Run { call, outputs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_those_of_visible_pairs() {
        let small = Sizes { len: 4, heads: 2, kv_heads: 1, head_dim: 8, ..LLAMA };
        assert_eq!(small.pairs(), 10);
        assert_eq!(Sizes { window: Some(2), ..small }.pairs(), 1 + 2 + 2 + 2);
        assert_eq!(small.work(false).flops, 2 * 2 * 10 * 2 * 8);
        assert_eq!(small.work(true).flops, 5 * 2 * 10 * 2 * 8);
    }
}
