//! Attention of generation over a paged cache: the kernel on tensor cores beside the portable one.

use anyhow::Result;
use cubecl::server::Handle;
use fused_kernels::paged_attention::{self, Attend, Batch, Options, Path, Row, Shape};
use nf4_quant::FloatFormat;

use crate::bench::Bench;
use crate::case::{Case, Run, Work};

/// Tokens of a block, as the engine has them.
const BLOCK: usize = 16;

/// Sizes of a case.
#[derive(Clone, Copy)]
struct Sizes {
    model: &'static str,
    rows: usize,
    len: usize,
    /// Length of the first row.
    first: usize,
    /// New tokens of each row.
    new: usize,
    /// The length that there is room for, as in a recorded pass.
    room: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
}

const LLAMA_2: Sizes = Sizes {
    model: "Llama-2-7B",
    rows: 64,
    len: 640,
    first: 640,
    new: 1,
    room: 1024,
    heads: 32,
    kv_heads: 32,
    head_dim: 128,
    window: None,
};
const LLAMA_3: Sizes = Sizes { model: "Llama-3.1-8B", kv_heads: 8, ..LLAMA_2 };

impl Sizes {
    /// Rows of one length, with the room that a recorded pass leaves.
    fn of(self, rows: usize, len: usize) -> Self {
        Self { rows, len, first: len, room: len.next_power_of_two().max(512), ..self }
    }
}

pub(crate) fn cases(bench: &Bench) -> Vec<Case> {
    let sizes = [
        LLAMA_2,
        LLAMA_2.of(16, 640),
        LLAMA_2.of(1, 300),
        LLAMA_2.of(1, 4096),
        LLAMA_3,
        LLAMA_3.of(16, 640),
        LLAMA_3.of(1, 300),
        LLAMA_3.of(1, 4096),
        LLAMA_3.of(1, 32768),
        LLAMA_3.of(16, 4096),
        // One long row among many, which the room is for.
        Sizes { first: 8000, room: 8192, ..LLAMA_3 },
        Sizes { new: 4, ..LLAMA_3 },
        Sizes { model: "Mistral-7B", window: Some(4096), ..LLAMA_3.of(16, 16384) },
        Sizes { model: "Qwen2.5-0.5B", heads: 14, kv_heads: 2, head_dim: 64, ..LLAMA_2 },
        Sizes { model: "Phi-3-mini", head_dim: 96, ..LLAMA_2 },
        Sizes { model: "Gemma-2-9B", heads: 16, kv_heads: 8, head_dim: 256, ..LLAMA_2 },
        Sizes { model: "Qwen3-235B", heads: 64, kv_heads: 4, ..LLAMA_2 },
    ];
    sizes.into_iter().flat_map(|sizes| sizes.cases(bench)).collect()
}

/// Queries, keys, values, the batch's words, and the result.
type Buffers = [Handle; 5];

impl Sizes {
    fn lens(self) -> impl Iterator<Item = usize> {
        (0..self.rows).map(move |row| if row == 0 { self.first } else { self.len })
    }

    /// Positions of all rows that a new token sees.
    fn seen(self) -> usize {
        let span = self.window.map_or(usize::MAX, |window| window + self.new - 1);
        self.lens().map(|len| len.min(span)).sum()
    }

    /// Pairs of query and key that see each other, of one head.
    fn pairs(self) -> usize {
        let of_row = |len: usize| (len - self.new + 1..=len).map(|seen| seen.min(self.window.unwrap_or(seen)));
        self.lens().flat_map(of_row).sum()
    }

    fn work(self) -> Work {
        let queries = self.rows * self.new * self.heads * self.head_dim;
        Work {
            bytes: 2 * (2 * queries + 2 * self.seen() * self.kv_heads * self.head_dim),
            flops: 4 * self.pairs() * self.heads * self.head_dim,
        }
    }

    fn blocks(self) -> usize {
        self.lens().map(|len| len.div_ceil(BLOCK)).sum()
    }

    fn shape(self) -> Shape {
        let Self { heads, kv_heads, head_dim, .. } = self;
        Shape { heads, kv_heads, head_dim, slots: self.blocks() * BLOCK, format: fused_kernels::FloatFormat::BF16 }
    }

    /// Rows whose blocks lie far from each other.
    fn batch(self) -> Result<Batch> {
        let count = self.blocks();
        let step = (count * 3 / 8..).find(|step| greatest_divisor(*step, count) == 1).unwrap_or(1);
        let order: Vec<u32> = (0..count).map(|i| (i * step % count) as u32).collect();
        let mut rest = &order[..];
        let rows = self.lens().map(|len| {
            let (blocks, behind) = rest.split_at(len.div_ceil(BLOCK));
            rest = behind;
            Row { blocks, len, new: self.new }
        });
        Ok(Batch::with_room(&rows.collect::<Vec<_>>(), BLOCK, self.room)?)
    }

    fn cases(self, bench: &Bench) -> Vec<Case> {
        if bench.format != FloatFormat::BF16 {
            return Vec::new();
        }
        let Self { model, rows, len, first, new, heads, kv_heads, head_dim, window, .. } = self;
        let long = if first == len { String::new() } else { format!(" + {first}") };
        let new = if new == 1 { String::new() } else { format!(", {new} new") };
        let window = window.map_or_else(String::new, |window| format!(" window {window}"));
        let case = |path| Case {
            kernel: match path {
                Path::Mma => "paged attention",
                Path::Portable => "paged attention, portable",
            },
            shape: format!("{rows} x {len}{long}{new}, {heads}/{kv_heads} x {head_dim}{window}"),
            model,
            work: self.work(),
            peer: None,
            bar: None,
            prepare: Box::new(move |bench| self.prepare(bench, path)),
        };
        paged_attention::paths(&bench.client, &self.shape()).into_iter().map(case).collect()
    }

    fn prepare(self, bench: &Bench, path: Path) -> Result<Run> {
        let (client, shape, batch) = (bench.client.clone(), self.shape(), self.batch()?);
        let options = Options { scale: 1.0 / (self.head_dim as f32).sqrt(), window: self.window, softcap: None };
        let (queries, cached) =
            (batch.tokens() * self.heads * self.head_dim, shape.slots * self.kv_heads * self.head_dim);
        let words: Vec<u8> = batch.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        let buffers = |seed: u32| -> Buffers {
            let random = |elements, part| bench.random(elements, seed * 4 + part, 1.0);
            let words = client.create_from_slice(&words);
            [random(queries, 0), random(cached, 1), random(cached, 2), words, client.empty(2 * queries)]
        };
        let sets: Vec<Buffers> = (0..bench.sets(self.work().bytes) as u32).map(buffers).collect();
        let outputs = sets.iter().map(|buffers| buffers[4].clone()).collect();
        let call = Box::new(move |i: usize| {
            let [q, keys, values, words, out] = &sets[i % sets.len()];
            let buffers = Attend { q, keys, values, words, sinks: None, out };
            Ok(paged_attention::attend_on(&client, path, buffers, &batch, &shape, options)?)
        });
        Ok(Run { call, outputs })
    }
}

fn greatest_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_what_new_tokens_see() {
        let small = Sizes { heads: 4, kv_heads: 2, head_dim: 8, new: 2, first: 40, ..LLAMA_2.of(3, 20) };
        assert_eq!((small.seen(), small.pairs()), (80, 39 + 40 + 2 * (19 + 20)));
        assert_eq!(small.work(), Work { bytes: 2 * (2 * 3 * 2 * 32 + 2 * 80 * 16), flops: 4 * 157 * 32 });
        let small = Sizes { window: Some(10), ..small };
        assert_eq!((small.seen(), small.pairs()), (3 * 11, 6 * 10));
    }

    #[test]
    fn every_block_has_one_owner() {
        let batch = LLAMA_3.of(3, 70).batch().unwrap();
        let mut blocks: Vec<u32> = (0..3).flat_map(|row| batch.table(row)[..5].to_vec()).collect();
        blocks.sort_unstable();
        assert_eq!(blocks, (0..15).collect::<Vec<u32>>());
        assert_eq!((batch.max_len(), batch.tokens()), (512, 3));
    }
}
