//! The CPU implementation: tokens of a row and one key head at a time, on all threads.
//!
//! Positions are taken in tiles of 64 whose borders are multiples of 64, by the online softmax; within a tile, values
//! are added position by position. All of it depends on a token's own sequence alone.

use super::tile::{Running, TILE, take_tile};
use super::{PagedOperand, PagedOps};
use crate::ops::AttentionOptions;
use crate::ops::exponential::exponential;
use burn::backend::Flex;
use burn::backend::TensorMetadata;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{Element as BurnElement, FloatDType, TensorData};
use burn_flex::FlexTensor;
use fused_kernels::paged_attention::{Batch, slot};
use half::{bf16, f16};
use nf4_quant::{Element, FloatFormat};
use rayon::prelude::*;

/// Tokens that go through a tile together: its keys and values are widened once for them.
const TOKENS: usize = 8;

/// A float of a cache.
trait CacheElement: Element + BurnElement + bytemuck::Pod {}

impl<T: Element + BurnElement + bytemuck::Pod> CacheElement for T {}

/// The tensor with its elements one after the other from the first of its memory, without a copy where it is so.
fn contiguous(x: FlexTensor) -> FlexTensor {
    let whole = x.layout().num_elements() * x.dtype().size() == x.bytes().len();
    if x.is_contiguous() && x.layout().start_offset() == 0 && whole { x } else { x.to_contiguous() }
}

fn write<T: CacheElement>(cache: FlexTensor, new: FlexTensor, batch: &Batch) -> FlexTensor {
    let (mut cache, new) = (contiguous(cache), contiguous(new));
    let shape = cache.shape();
    let width = shape[1] * shape[2];
    if width > 0 {
        let slots = cache.storage_mut::<T>();
        for (slot, new) in batch.slots().iter().zip(new.storage::<T>().chunks_exact(width)) {
            slots[*slot as usize * width..][..width].copy_from_slice(new);
        }
    }
    cache
}

/// Some tokens of a row.
#[derive(Clone, Copy)]
struct Task {
    row: usize,
    /// The first of them in the batch.
    token: usize,
    count: usize,
    /// Its position.
    position: usize,
}

fn tasks(batch: &Batch) -> Vec<Task> {
    let of_row = |row: usize| {
        let (start, end) = (batch.starts()[row] as usize, batch.starts()[row + 1] as usize);
        let len = batch.lens()[row] as usize;
        (start..end).step_by(TOKENS).map(move |token| Task {
            row,
            token,
            count: TOKENS.min(end - token),
            position: len - (end - token),
        })
    };
    (0..batch.rows()).flat_map(of_row).collect()
}

/// The dimensions.
#[derive(Clone, Copy)]
struct Dims {
    heads: usize,
    kv_heads: usize,
    dim: usize,
}

impl Dims {
    fn group(self) -> usize {
        self.heads / self.kv_heads
    }
}

/// The heads `[dim]` of a cache in f32: the cache itself, or widened into `wide`.
fn heads_of<'a, T: CacheElement>(cache: &'a [T], firsts: &[usize], dim: usize, wide: &'a mut [f32]) -> Vec<&'a [f32]> {
    if T::FORMAT == FloatFormat::F32 {
        let cache: &[f32] = bytemuck::cast_slice(cache);
        return firsts.iter().map(|first| &cache[*first..first + dim]).collect();
    }
    for (first, wide) in firsts.iter().zip(wide.chunks_exact_mut(dim)) {
        T::widen(&cache[*first..first + dim], wide);
    }
    wide.chunks_exact(dim).take(firsts.len()).collect()
}

/// The results of a task's query heads that share key head `kv_head`: `[count, group, dim]`.
fn attend_task<T: CacheElement>(
    [q, keys, values]: [&[T]; 3],
    batch: &Batch,
    task: Task,
    kv_head: usize,
    dims: Dims,
    options: &AttentionOptions,
) -> Vec<f32> {
    let (sinks, options) = (options.sinks(), options.scores);
    let Dims { heads, kv_heads, dim } = dims;
    let (group, table) = (dims.group(), batch.table(task.row));
    let mut queries = vec![0.0_f32; task.count * group * dim];
    for (i, wide) in queries.chunks_exact_mut(group * dim).enumerate() {
        let first = ((task.token + i) * heads + kv_head * group) * dim;
        T::widen(&q[first..first + group * dim], wide);
    }
    let mut out = vec![0.0_f32; queries.len()];
    let (mut peaks, mut sums) = (vec![f32::NEG_INFINITY; task.count * group], vec![0.0_f32; task.count * group]);
    let first_seen = |position: usize| options.window.map_or(0, |window| (position + 1).saturating_sub(window));
    let (seen, stop) = (first_seen(task.position), task.position + task.count);
    let wide_len = if T::FORMAT == FloatFormat::F32 { 0 } else { TILE * dim };
    let (mut wide_keys, mut wide_values) = (vec![0.0_f32; wide_len], vec![0.0_f32; wide_len]);
    for tile in (seen / TILE * TILE..stop).step_by(TILE) {
        // What a query of the task sees of the tile.
        let (start, end) = (tile.max(seen), (tile + TILE).min(stop));
        let place = |position| (slot(table, position, batch.block_tokens()) * kv_heads + kv_head) * dim;
        let firsts: Vec<usize> = (start..end).map(place).collect();
        let keys = heads_of(keys, &firsts, dim, &mut wide_keys);
        let values = heads_of(values, &firsts, dim, &mut wide_values);
        for row in 0..task.count * group {
            let position = task.position + row / group;
            let (from, to) = (first_seen(position).max(start), (position + 1).min(end));
            if from >= to {
                continue;
            }
            let (keys, values) = (&keys[from - start..to - start], &values[from - start..to - start]);
            let running = Running { peak: &mut peaks[row], sum: &mut sums[row], values: &mut out[row * dim..][..dim] };
            take_tile(&queries[row * dim..][..dim], keys, values, options, running);
        }
    }
    for (row, values) in out.chunks_exact_mut(dim).enumerate() {
        let (mut sum, mut factor) = (sums[row], 1.0);
        if let Some(sinks) = sinks {
            let sink = sinks[kv_head * group + row % group];
            let most = peaks[row].max(sink);
            factor = exponential(peaks[row] - most);
            sum = sum * factor + exponential(sink - most);
        }
        values.iter_mut().for_each(|value| *value = *value * factor / sum);
    }
    out
}

fn attend<T: CacheElement>(
    [q, keys, values]: [FlexTensor; 3],
    batch: &Batch,
    options: &AttentionOptions,
) -> FlexTensor {
    let [q, keys, values] = [q, keys, values].map(contiguous);
    let (shape, of_keys) = (q.shape(), keys.shape());
    let dims = Dims { heads: shape[1], kv_heads: of_keys[1], dim: shape[2] };
    let operands = [q.storage::<T>(), keys.storage::<T>(), values.storage::<T>()];
    let items: Vec<(Task, usize)> =
        tasks(batch).into_iter().flat_map(|task| (0..dims.kv_heads).map(move |head| (task, head))).collect();
    let results: Vec<Vec<f32>> =
        items.par_iter().map(|&(task, head)| attend_task(operands, batch, task, head, dims, options)).collect();
    let mut out = vec![T::from_f32(0.0); operands[0].len()];
    let width = dims.group() * dims.dim;
    for ((task, head), result) in items.iter().zip(&results) {
        for (i, result) in result.chunks_exact(width).enumerate() {
            let first = (task.token + i) * dims.heads * dims.dim + head * width;
            T::narrow(result, &mut out[first..first + width]);
        }
    }
    FlexTensor::from_data(TensorData::new(out, [shape[0], shape[1], shape[2]]))
}

/// The index of each row's first largest value, -1 where one is no number.
fn likeliest<T: CacheElement>(logits: &[T], width: usize) -> TensorData {
    let of_row = |row: &[T]| {
        let (mut best, mut index) = (f32::NEG_INFINITY, 0);
        for (i, value) in row.iter().enumerate() {
            let value = value.to_f32();
            if value.is_nan() {
                return -1;
            }
            if value > best {
                (best, index) = (value, i as i32);
            }
        }
        index
    };
    let found: Vec<i32> = logits.par_chunks_exact(width.max(1)).map(of_row).collect();
    let rows = found.len();
    TensorData::new(found, [rows])
}

impl PagedOps for Flex {
    fn paged_write(cache: FloatTensor<Self>, new: FloatTensor<Self>, batch: PagedOperand<Self>) -> FloatTensor<Self> {
        match FloatDType::from(cache.dtype()) {
            FloatDType::BF16 => write::<bf16>(cache, new, &batch.host),
            FloatDType::F16 => write::<f16>(cache, new, &batch.host),
            _ => write::<f32>(cache, new, &batch.host),
        }
    }

    fn paged_attention(
        q: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        batch: PagedOperand<Self>,
        options: AttentionOptions,
    ) -> FloatTensor<Self> {
        let operands = [q, keys, values];
        match FloatDType::from(operands[0].dtype()) {
            FloatDType::BF16 => attend::<bf16>(operands, &batch.host, &options),
            FloatDType::F16 => attend::<f16>(operands, &batch.host, &options),
            _ => attend::<f32>(operands, &batch.host, &options),
        }
    }

    fn likeliest(logits: FloatTensor<Self>) -> IntTensor<Self> {
        let logits = contiguous(logits);
        let width = logits.shape()[1];
        FlexTensor::from_data(match FloatDType::from(logits.dtype()) {
            FloatDType::BF16 => likeliest(logits.storage::<bf16>(), width),
            FloatDType::F16 => likeliest(logits.storage::<f16>(), width),
            _ => likeliest(logits.storage::<f32>(), width),
        })
    }
}
