//! LoRA's update for a batch whose tokens use different adapters, in two launches whatever their number (Chen et al.,
//! 2023, arXiv 2310.18547):
//!
//! `u = scaling · x Aᵀ`, `y += u Bᵀ`, each token with the factors of its adapter, or as it is where it has none.
//!
//! The factors of all adapters lie in two buffers: the `[rank, in_features]` of A one after the other, and so the
//! `[out_features, rank]` of B; ranks may differ. [`Adapters`] says where each begins, and [`Adapters::words`] says it to
//! the kernels, with the adapter of each token.
//!
//! Factors and `u` have the format of `x`, as in the training product; sums are f32. In the first kernel 32 units share
//! an element of `u`, in the second an element of `y` is one unit's; either way a token's sums are taken in an order that
//! depends on no other token. Memory is the bound: each token reads its adapter's factors, out of the second-level cache
//! where tokens share an adapter.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;
use cuda_source::FloatFormat;

use crate::KernelError;
use crate::elementwise::{Reduction, UNITS, buffer, check_format, cube_count, reduce_row, vector_size};

const OPERATION: &str = "grouped_low_rank";
/// Units that share an element of `u`.
const SHARING: usize = 32;

/// Adapters of one layer, and which of them each token of a batch has.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapters {
    in_features: usize,
    out_features: usize,
    /// `[adapters + 1]`: where the ranks of each begin among those of all, and their number.
    offsets: Vec<u32>,
    scalings: Vec<f32>,
    /// `[tokens]`: one more than the adapter's number, 0 for none.
    of_tokens: Vec<u32>,
}

impl Adapters {
    /// `ranks` has rank and scaling of each adapter of a layer; `of_tokens` an adapter's number for each token, or none.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when a token names an adapter that is not there.
    pub fn new(
        in_features: usize,
        out_features: usize,
        ranks: &[(usize, f32)],
        of_tokens: &[Option<usize>],
    ) -> Result<Self, KernelError> {
        if let Some(wrong) = of_tokens.iter().flatten().find(|adapter| **adapter >= ranks.len()) {
            let reason = format!("a token has adapter {wrong}, of {}", ranks.len());
            return Err(KernelError::Shape { operation: OPERATION, reason });
        }
        let mut offsets = vec![0];
        for (rank, _) in ranks {
            let end = offsets[offsets.len() - 1] as usize + rank;
            if end > i32::MAX as usize {
                return Err(KernelError::TooLarge { name: "ranks", value: end, limit: i32::MAX as usize });
            }
            offsets.push(end as u32);
        }
        let of_tokens = of_tokens.iter().map(|adapter| adapter.map_or(0, |adapter| adapter as u32 + 1)).collect();
        let scalings = ranks.iter().map(|(_, scaling)| *scaling).collect();
        Ok(Self { in_features, out_features, offsets, scalings, of_tokens })
    }

    /// Columns of A.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Rows of B.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Tokens of the batch.
    pub fn tokens(&self) -> usize {
        self.of_tokens.len()
    }

    /// Their number.
    pub fn count(&self) -> usize {
        self.scalings.len()
    }

    /// Ranks of all.
    pub fn total_rank(&self) -> usize {
        self.offsets[self.count()] as usize
    }

    /// Ranks of one, among those of all.
    pub fn ranks(&self, adapter: usize) -> std::ops::Range<usize> {
        self.offsets[adapter] as usize..self.offsets[adapter + 1] as usize
    }

    /// The factor of one's update.
    pub fn scaling(&self, adapter: usize) -> f32 {
        self.scalings[adapter]
    }

    /// The adapter of a token.
    pub fn of_token(&self, token: usize) -> Option<usize> {
        (self.of_tokens[token] as usize).checked_sub(1)
    }

    /// The largest rank among the tokens' adapters.
    pub fn max_rank(&self) -> usize {
        let rank = |token| self.of_token(token).map_or(0, |adapter| self.ranks(adapter).len());
        (0..self.tokens()).map(rank).max().unwrap_or(0)
    }

    /// What kernels read: adapters of tokens, offsets, and the bits of the scalings.
    pub fn words(&self) -> Vec<u32> {
        let scalings: Vec<u32> = self.scalings.iter().map(|scaling| scaling.to_bits()).collect();
        [&self.of_tokens[..], &self.offsets, &scalings].concat()
    }
}

/// Buffers of [`add`].
#[derive(Clone, Copy, Debug)]
pub struct Buffers<'a> {
    /// `[tokens, in_features]`.
    pub x: &'a Handle,
    /// `[rank, in_features]` of all adapters, one after the other, in the format of `x`.
    pub lora_a: &'a Handle,
    /// `[out_features, rank]` of all adapters, one after the other, in the format of `x`.
    pub lora_b: &'a Handle,
    /// [`Adapters::words`] on the device.
    pub words: &'a Handle,
    /// f32 `[tokens, out_features]`, to which the updates are added.
    pub y: &'a Handle,
}

/// Adds each token's update to `y`.
///
/// # Errors
/// [`KernelError::Format`], and the variants about sizes when a buffer does not hold its shape.
pub fn add(client: &Client, buffers: Buffers<'_>, adapters: &Adapters, format: FloatFormat) -> Result<(), KernelError> {
    check_format(client, OPERATION, format)?;
    let (tokens, rank, total) = (adapters.tokens(), adapters.max_rank(), adapters.total_rank());
    let (columns, rows) = (adapters.in_features, adapters.out_features);
    let vector = vector_size(client, format, &[columns]);
    let sized = |name, handle, elements: [usize; 2], size, vector| {
        buffer(name, handle, elements[0].saturating_mul(elements[1]), size, vector)
    };
    let x = sized("x", buffers.x, [tokens, columns], format.size(), vector)?;
    let lora_a = sized("lora_a", buffers.lora_a, [total, columns], format.size(), vector)?;
    let lora_b = sized("lora_b", buffers.lora_b, [total, rows], format.size(), 1)?;
    let y = sized("y", buffers.y, [tokens, rows], 4, 1)?;
    let count = adapters.count();
    let words = || buffer("words", buffers.words, tokens + 2 * count + 1, 4, 1);
    if tokens == 0 || rank == 0 || rows == 0 || columns == 0 {
        return Ok(());
    }
    let narrow = client.empty(tokens * rank * format.size());
    let u = || sized("u", &narrow, [tokens, rank], format.size(), 1);
    let work = || WorkLaunch::new(tokens, columns / vector, rows, rank, count);
    let dim = CubeDim::new_1d(UNITS as u32);
    // SAFETY: the buffers' sizes are checked, adapters' numbers and offsets are within what they hold, and the kernels
    // stay within tokens, ranks and rows.
    unsafe {
        project::launch_unchecked(
            client,
            cube_count(client, (tokens * rank).div_ceil(UNITS / SHARING)),
            dim,
            vector,
            x,
            lora_a,
            words()?,
            u()?,
            work(),
            format.elem_type(),
        );
        let cubes = cube_count(client, (tokens * rows).div_ceil(UNITS));
        expand::launch_unchecked(client, cubes, dim, u()?, lora_b, words()?, y, work(), format.elem_type());
    }
    Ok(())
}

/// What the kernels do.
#[derive(CubeType, CubeLaunch)]
struct Work {
    tokens: usize,
    /// Vectors of a row of `x`.
    vectors: usize,
    /// Rows of B.
    rows: usize,
    /// Ranks of a row of `u`.
    rank: usize,
    adapters: usize,
}

/// `u`, an element for [`SHARING`] units. What an adapter does not have is not written.
#[cube(launch_unchecked)]
fn project<F: Float, N: Size>(
    x: &[Vector<F, N>],
    lora_a: &[Vector<F, N>],
    words: &[u32],
    u: &mut [F],
    work: &Work,
    #[define(F)] _format: ElemType,
) {
    let width = N::value().comptime();
    let mut shared = Shared::<[f32]>::new_slice(UNITS);
    let unit = UNIT_POS as usize;
    let item = CUBE_POS * comptime!(UNITS / SHARING) + unit / SHARING;
    let (token, k, lane) = (item / work.rank, item % work.rank, unit % SHARING);
    let mut sum = 0.0f32;
    let mut scaling = 0.0f32;
    let mut has = false;
    if token < work.tokens {
        let adapter = words[token] as usize;
        if adapter > 0 {
            let first = words[work.tokens + adapter - 1] as usize;
            let end = words[work.tokens + adapter] as usize;
            has = first + k < end;
            scaling = f32::reinterpret(words[work.tokens + work.adapters + adapter]);
            if has {
                let mut v = lane;
                while v < work.vectors {
                    let (x, a) = (x[token * work.vectors + v], lora_a[(first + k) * work.vectors + v]);
                    #[unroll]
                    for i in 0..width {
                        sum += f32::cast_from(x.extract(i)) * f32::cast_from(a.extract(i));
                    }
                    v += SHARING;
                }
            }
        }
    }
    let whole = reduce_row(sum, &mut shared, SHARING, Reduction::Sum);
    if has && lane == 0 {
        u[item] = F::cast_from(whole * scaling);
    }
}

/// `y += u Bᵀ`, an element a unit.
#[cube(launch_unchecked)]
fn expand<F: Float>(u: &[F], lora_b: &[F], words: &[u32], y: &mut [f32], work: &Work, #[define(F)] _format: ElemType) {
    let item = ABSOLUTE_POS;
    if item < work.tokens * work.rows {
        let (token, row) = (item / work.rows, item % work.rows);
        let adapter = words[token] as usize;
        if adapter > 0 {
            let first = words[work.tokens + adapter - 1] as usize;
            let rank = words[work.tokens + adapter] as usize - first;
            let b = first * work.rows + row * rank;
            let mut sum = 0.0f32;
            for k in 0..rank {
                sum += f32::cast_from(u[token * work.rank + k]) * f32::cast_from(lora_b[b + k]);
            }
            y[item] += sum;
        }
    }
}

/// The scalar oracle, in f64, with `u` as it is: `y` and the updates.
///
/// # Shapes
/// As [`Buffers`] has them.
pub fn oracle(x: &[f64], lora_a: &[f64], lora_b: &[f64], y: &[f64], adapters: &Adapters) -> Vec<f64> {
    let (columns, rows) = (adapters.in_features, adapters.out_features);
    let mut out = y.to_vec();
    for (token, y) in out.chunks_mut(rows).enumerate() {
        let Some(adapter) = adapters.of_token(token) else { continue };
        let ranks = adapters.ranks(adapter);
        let x = &x[token * columns..][..columns];
        let dot = |k: usize| x.iter().zip(&lora_a[k * columns..][..columns]).map(|(x, a)| x * a).sum::<f64>();
        let u: Vec<f64> = ranks.clone().map(|k| f64::from(adapters.scaling(adapter)) * dot(k)).collect();
        for (row, y) in y.iter_mut().enumerate() {
            let b = &lora_b[ranks.start * rows + row * ranks.len()..][..ranks.len()];
            *y += u.iter().zip(b).map(|(u, b)| u * b).sum::<f64>();
        }
    }
    out
}
