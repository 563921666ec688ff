//! Attention over a paged cache on every device of this machine: against the oracle in f64, and in what must not change
//! its bits.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use fused_kernels::paged_attention::oracle;
use half::{bf16, f16};
use qlora_layers::ops::fused::{Rotation, rotate};
use qlora_layers::ops::{
    AttentionOptions, NewTokens, PagedBatch, PagedRow, Sinks, paged_attention, paged_write, rotate_into_cache,
};
use test_support::{Random, assert_close, devices, dtypes, noise};

const BLOCK: usize = 16;

/// (sequence, length, new tokens) of the rows of a batch.
type Rows<'a> = &'a [(usize, usize, usize)];

/// Sequences whose blocks take turns in one cache.
struct World {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    dtype: FloatDType,
    blocks: Vec<Vec<u32>>,
    slots: usize,
    /// Of each sequence: `[len, heads or kv_heads, dim]`, as `dtype` holds them.
    q: Vec<Vec<f32>>,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
}

fn rounded(value: f32, dtype: FloatDType) -> f32 {
    match dtype {
        FloatDType::BF16 => bf16::from_f32(value).to_f32(),
        FloatDType::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

impl World {
    fn new([heads, kv_heads, dim]: [usize; 3], lens: &[usize], dtype: FloatDType) -> Self {
        let mut random = Random(dim as u64);
        let mut draw = |width: usize| -> Vec<Vec<f32>> {
            lens.iter().map(|len| (0..len * width).map(|_| rounded(random.normal(), dtype)).collect()).collect()
        };
        let (q, k, v) = (draw(heads * dim), draw(kv_heads * dim), draw(kv_heads * dim));
        let most = lens.iter().max().unwrap().div_ceil(BLOCK);
        let blocks = |i: usize| (0..most).map(|block| ((most - 1 - block) * lens.len() + i) as u32).collect();
        let blocks = (0..lens.len()).map(blocks).collect();
        Self { heads, kv_heads, dim, dtype, blocks, slots: most * lens.len() * BLOCK, q, k, v }
    }

    fn batch(&self, rows: Rows<'_>, device: &Device) -> PagedBatch {
        let rows: Vec<PagedRow<'_>> =
            rows.iter().map(|&(of, len, new)| PagedRow { blocks: &self.blocks[of], len, new }).collect();
        PagedBatch::new(&rows, BLOCK, device)
    }

    fn tensor(&self, values: Vec<f32>, heads: usize, device: &Device) -> Tensor<3> {
        let tokens = values.len() / (heads * self.dim);
        let data = TensorData::new(values, [tokens, heads, self.dim]);
        Tensor::<3>::from_data(data, (device, DType::F32)).cast(self.dtype)
    }

    fn new_tokens(&self, rows: Rows<'_>, of: &[Vec<f32>], heads: usize) -> Vec<f32> {
        let width = heads * self.dim;
        rows.iter().flat_map(|&(i, len, new)| of[i][(len - new) * width..len * width].to_vec()).collect()
    }

    /// Keys and values: nothing but NaN, so that what is read too early shows.
    fn caches(&self, device: &Device) -> [Tensor<3>; 2] {
        [(); 2].map(|()| self.tensor(vec![f32::NAN; self.slots * self.kv_heads * self.dim], self.kv_heads, device))
    }

    /// A pass over the rows: what it computes, and the caches after it.
    fn pass(
        &self,
        [keys, values]: [Tensor<3>; 2],
        rows: Rows<'_>,
        options: &AttentionOptions,
        device: &Device,
    ) -> (Vec<f32>, [Tensor<3>; 2]) {
        let batch = self.batch(rows, device);
        let new = |of| self.tensor(self.new_tokens(rows, of, self.kv_heads), self.kv_heads, device);
        let (keys, values) = (paged_write(keys, new(&self.k), &batch), paged_write(values, new(&self.v), &batch));
        let q = self.tensor(self.new_tokens(rows, &self.q, self.heads), self.heads, device);
        let out = paged_attention(q, &keys, &values, &batch, options);
        assert_eq!(FloatDType::from(out.dtype()), self.dtype);
        (floats(out), [keys, values])
    }
}

fn floats(tensor: Tensor<3>) -> Vec<f32> {
    tensor.into_data_as::<f32>().iter::<f32>().collect()
}

/// Every device, and each dtype of attention that it has for sure.
fn everywhere(test: impl Fn(&str, &Device, FloatDType)) {
    for (name, device) in devices() {
        for dtype in [FloatDType::F32, FloatDType::F16, FloatDType::BF16] {
            // WGSL has no bfloat16, and not everywhere float16.
            if name != "wgpu" || dtype == FloatDType::F32 {
                test(name, &device, dtype);
            }
        }
    }
}

/// On software Vulkan a kernel's compilation takes seconds, so the shapes that are told apart there are few; the
/// kernel's own suite has more.
fn shapes(device: &str) -> &'static [[usize; 3]] {
    match device {
        "flex" => &[[1, 1, 16], [4, 2, 64], [5, 1, 80], [8, 1, 96], [3, 3, 17], [2, 1, 256], [7, 1, 33]],
        _ => &[[4, 2, 64]],
    }
}

#[test]
fn passes_are_the_oracles() {
    everywhere(|name, device, dtype| {
        for &[heads, kv_heads, dim] in shapes(name) {
            for (window, softcap, has_sinks) in
                [(None, None, false), (Some(70), None, true), (None, None, true), (Some(5), Some(2.0), false)]
            {
                let world = World::new([heads, kv_heads, dim], &[150, 70, 20], dtype);
                let scale = AttentionOptions::causal(dim).scores.scale;
                let sinks: Option<Vec<f32>> = has_sinks.then(|| noise(9, heads).into_iter().map(|x| 3.0 * x).collect());
                let options = AttentionOptions::new(scale, window, softcap)
                    .with_sinks(sinks.as_ref().map(|sinks| Sinks::new(sinks, device)));
                // A prompt in two chunks beside one in one; then a step, and another sequence's prompt.
                let passes: [Rows<'_>; 3] =
                    [&[(0, 100, 100), (2, 19, 19)], &[(0, 149, 49), (2, 20, 1)], &[(1, 70, 70), (0, 150, 1)]];
                let mut caches = world.caches(device);
                for rows in passes {
                    let (found, after) = world.pass(caches, rows, &options, device);
                    let [keys, values] = [0, 1].map(|i| floats(after[i].clone()));
                    let q = world.new_tokens(rows, &world.q, heads);
                    let batch = world.batch(rows, device);
                    let dims = [heads, kv_heads, dim];
                    let sinks = sinks.as_deref();
                    let expected = oracle::attend(&q, &keys, &values, batch.host(), dims, sinks, options.scores);
                    // A rounding to the dtype, and f32's errors in scores (weights are relative to them) and sums.
                    let relative = match dtype {
                        FloatDType::BF16 => 3.91e-3,
                        FloatDType::F16 => 4.9e-4,
                        _ => 6e-8,
                    };
                    let what = format!(
                        "{name}, {dtype:?}, {heads}/{kv_heads} x {dim}, {window:?}, {softcap:?}, {sinks:?}, {rows:?}"
                    );
                    assert_close(what, &found, &expected, |_, e: f64| relative * e.abs() + 1e-5);
                    caches = after;
                }
            }
        }
    });
}

#[test]
fn a_token_is_alone_with_its_sequence() {
    everywhere(|name, device, dtype| {
        let (heads, width) = (4, 4 * 64);
        let lens = [150, 70, 20];
        let world = World::new([heads, 2, 64], &lens, dtype);
        for window in [None, Some(33)] {
            let options = AttentionOptions::new(0.125, window, None);
            let alone: Vec<Vec<f32>> = (0..3)
                .map(|i| world.pass(world.caches(device), &[(i, lens[i], lens[i])], &options, device).0)
                .collect();
            let passes: [Rows<'_>; 4] = [
                &[(0, 99, 99), (1, 3, 3)],
                &[(1, 69, 66), (0, 100, 1), (2, 17, 17)],
                &[(2, 18, 1), (1, 70, 1), (0, 130, 30)],
                &[(0, 150, 20), (2, 20, 2)],
            ];
            let mut caches = world.caches(device);
            for rows in passes {
                let (found, after) = world.pass(caches, rows, &options, device);
                let mut token = 0;
                for &(of, len, new) in rows {
                    let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                    let (found, expected) = (
                        bits(&found[token * width..(token + new) * width]),
                        bits(&alone[of][(len - new) * width..len * width]),
                    );
                    assert!(found == expected, "{name}, {dtype:?}: sequence {of} of {rows:?}, window {window:?}");
                    token += new;
                }
                caches = after;
            }
        }
    });
}

#[test]
fn a_cache_is_written_where_it_lies() {
    let device = Device::flex();
    let world = World::new([2, 1, 8], &[20], FloatDType::F32);
    let [keys, _] = world.caches(&device);
    let batch = world.batch(&[(0, 3, 3)], &device);
    let new = world.tensor(world.new_tokens(&[(0, 3, 3)], &world.k, 1), 1, &device);
    let shared = keys.clone();
    let written = paged_write(keys, new, &batch);
    // On the CPU, one that someone else holds is left alone.
    assert!(floats(shared).iter().all(|x| x.is_nan()));
    let found = floats(written);
    let first = world.blocks[0][0] as usize * BLOCK * 8;
    assert_eq!(found[first..first + 24], world.k[0][..24]);
    assert_eq!(found.iter().filter(|x| !x.is_nan()).count(), 24);
}

#[test]
#[should_panic(expected = "paged_write: the batch's blocks reach slot 96, the cache has 32")]
fn blocks_beyond_the_cache_are_refused() {
    let device = Device::flex();
    let batch = PagedBatch::new(&[PagedRow { blocks: &[5], len: 1, new: 1 }], BLOCK, &device);
    let zeros = |tokens| Tensor::<3>::zeros([tokens, 1, 4], &device);
    paged_write(zeros(32), zeros(1), &batch);
}

#[test]
#[should_panic(expected = "its blocks hold all of its tokens")]
fn too_few_blocks_are_refused() {
    PagedBatch::new(&[PagedRow { blocks: &[5], len: 17, new: 1 }], BLOCK, &Device::flex());
}

#[test]
#[should_panic(expected = "a paged cache is for inference")]
fn nothing_is_tracked() {
    let device = Device::flex();
    let batch = PagedBatch::new(&[PagedRow { blocks: &[0], len: 1, new: 1 }], BLOCK, &device);
    let zeros = |tokens| Tensor::<3>::zeros([tokens, 1, 4], &device.clone().autodiff());
    let q = zeros(1).require_grad();
    paged_attention(q, &zeros(16), &zeros(16), &batch, &AttentionOptions::causal(4));
}

/// Rotations and writes in one launch, against those by themselves, bit for bit: whole heads rotated and parts of them, rows of
/// several tokens.
#[test]
fn rotating_into_the_cache_is_rotating_and_writing() {
    for (name, device) in devices() {
        for dtype in dtypes(name) {
            for ([heads, kv_heads, dim], rotary) in
                [([4, 2, 64], 64), ([3, 3, 24], 8), ([8, 1, 128], 64), ([2, 2, 64], 0)]
            {
                let world = World::new([heads, kv_heads, dim], &[40, 7, 33], dtype);
                let rows: Rows<'_> = &[(0, 40, 3), (1, 7, 1), (2, 33, 5)];
                let batch = world.batch(rows, &device);
                let tokens = rows.iter().map(|(.., new)| new).sum::<usize>();
                let of = |values: &[Vec<f32>], heads: usize| {
                    world.tensor(world.new_tokens(rows, values, heads), heads, &device).reshape([tokens, heads * dim])
                };
                let (q, k, v) = (of(&world.q, heads), of(&world.k, kv_heads), of(&world.v, kv_heads));
                let table = |f: fn(f32) -> f32| {
                    let values: Vec<f32> = (0..tokens * rotary / 2).map(|i| f(0.37 * i as f32)).collect();
                    Tensor::<2>::from_data(TensorData::new(values, [tokens, rotary / 2]), (&device, DType::F32))
                };
                let rotation = Rotation { len: tokens, head_dim: dim, rotary, inverse: false };
                let turned = |x: Tensor<2>| match rotary {
                    0 => x,
                    _ => rotate(x, table(f32::cos), table(f32::sin), rotation),
                };
                let bits = |x: Tensor<3>| -> Vec<u32> {
                    x.cast(FloatDType::F32).into_data().iter::<f32>().map(f32::to_bits).collect()
                };
                let heads_of = |x: Tensor<2>, heads: usize| x.reshape([tokens, heads, dim]);
                let [keys, values] = world.caches(&device);
                let keys = paged_write(keys, heads_of(turned(k.clone()), kv_heads), &batch);
                let values = paged_write(values, heads_of(v.clone(), kv_heads), &batch);
                let expected = [bits(heads_of(turned(q.clone()), heads)), bits(keys), bits(values)];
                let new = NewTokens { q, k, v };
                let tables = [table(f32::cos), table(f32::sin)];
                let (q, [keys, values]) = rotate_into_cache(new, tables, world.caches(&device), &batch, rotation);
                let found = [bits(heads_of(q, heads)), bits(keys), bits(values)];
                assert_eq!(
                    found, expected,
                    "{name}, {dtype:?}, {heads} and {kv_heads} heads of {dim}, {rotary} rotated"
                );
            }
        }
    }
}
