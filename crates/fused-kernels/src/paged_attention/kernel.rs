//! The kernels and what they are made for.

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::{Batch, MAX_PARTIAL, Options, Shape};
use crate::elementwise::{UNITS, vector_size};

/// Positions of a tile.
const TILE: usize = 32;
/// Positions of a split, a multiple of [`TILE`].
pub(super) const SPLIT: usize = 256;
/// Units that share the product of a query and a key.
const PARTS: usize = 4;
/// Rows of scores that a cube works on at a time.
const SCORE_LANES: usize = UNITS / (PARTS * TILE);
/// Query heads of a token that share a cube, at most.
const MAX_SHARE: usize = 8;
/// Rows that share a cube, at most, unless one token has more.
const MAX_ROWS: usize = 16;
/// Rows that a unit sums values of, at most: registers.
const MAX_SUM_ROWS: usize = 4;
/// Cubes that fill a device: with as many, splits stay in one cube.
const ENOUGH_CUBES: usize = 1024;
/// Far below any score, yet finite: WGSL has no literal for infinity.
const HIDDEN: f32 = -1e30;
/// A window that no row is longer than.
const NO_WINDOW: u32 = 1 << 31;

/// What a kernel is compiled for. All but `tokens` and `partial` depends on the heads and their format alone, and so does the
/// order of every sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    head_dim: usize,
    /// Query heads of a key head.
    group: usize,
    /// Of these, those that share a cube.
    share: usize,
    /// Tokens that share a cube.
    tokens: usize,
    /// Elements that are read of a key at a time, and of a value.
    wide: usize,
    narrow: usize,
    /// Of the units with the same columns of the values: how many rows they work on at a time.
    row_lanes: usize,
    /// And how many positions.
    lanes: usize,
    /// Whether splits have cubes of their own.
    partial: bool,
}

impl Plan {
    /// For a shape that was checked.
    pub(super) fn new(client: &Client, batch: &Batch, shape: &Shape) -> Self {
        let &Shape { heads, kv_heads, head_dim, format, .. } = shape;
        let group = heads / kv_heads;
        let wide = vector_size(client, format, &[head_dim]);
        let narrow = wide.min(4);
        // The launch refuses heads of more columns than a cube has units.
        let of_columns = (UNITS / (head_dim / narrow)).max(1);
        let with_share = |share: usize| {
            let row_lanes = share.next_power_of_two().min(of_columns);
            let lanes = (of_columns / row_lanes).min(TILE);
            Self { head_dim, group, share, tokens: 1, wide, narrow, row_lanes, lanes, partial: false }
        };
        // Queries of the widest heads leave shared memory for some of them only.
        let shares = (1..=group.min(MAX_SHARE)).rev().filter(|n| group.is_multiple_of(*n));
        let plan = shares.map(with_share).find(|plan| plan.fits(client)).unwrap_or_else(|| with_share(1));
        if batch.max_new() <= 1 {
            return plan;
        }
        let most = MAX_ROWS.min(MAX_SUM_ROWS * plan.row_lanes);
        let wider = [most, most / 2].map(|rows| plan.with_tokens((rows / plan.share).max(1)));
        wider.into_iter().find(|plan| plan.fits(client)).unwrap_or(plan)
    }

    /// Whether the device has the shared memory for it.
    pub(super) fn fits(self, client: &Client) -> bool {
        self.shared_bytes() <= client.properties().hardware.max_shared_memory_size
    }

    /// As it is, with another number of tokens in a cube.
    pub(super) fn with_tokens(self, tokens: usize) -> Self {
        Self { tokens, ..self }
    }

    /// Rows of a cube: heads of its tokens.
    fn rows(self) -> usize {
        self.tokens * self.share
    }

    /// f32 elements for partial scores, and after them for partial sums.
    fn scratch(self) -> usize {
        (self.rows() * TILE * PARTS).max(UNITS * self.narrow)
    }

    fn shared_bytes(self) -> usize {
        4 * (self.rows() * (self.head_dim + 2 * TILE + 2) + self.scratch() + UNITS)
    }

    /// Whether a cube has a unit for each column of values.
    pub(super) fn has_columns(self) -> bool {
        self.head_dim / self.narrow <= UNITS
    }

    /// Elements that are read of a key at a time, and of a value.
    pub(super) fn vectors(self) -> (usize, usize) {
        (self.wide, self.narrow)
    }

    /// Places for the tiles of tokens of all rows; some rows leave one empty.
    fn tiles(self, batch: &Batch) -> usize {
        batch.tokens() / self.tokens + batch.rows()
    }

    /// Cubes for all tiles and heads.
    pub(super) fn cubes(self, batch: &Batch, shape: &Shape) -> usize {
        self.tiles(batch).saturating_mul(shape.heads / self.share)
    }

    /// Whether a device is better filled by cubes that take a split each.
    pub(super) fn splits_among_cubes(self, batch: &Batch, shape: &Shape) -> bool {
        let splits = batch.max_len().div_ceil(SPLIT);
        let bytes = splits.saturating_mul(4 * batch.tokens() * shape.heads * (shape.head_dim + 2));
        splits > 1 && self.cubes(batch, shape) < ENOUGH_CUBES && bytes <= MAX_PARTIAL
    }

    pub(super) fn work(
        self,
        batch: &Batch,
        shape: &Shape,
        options: Options,
        splits: usize,
        partial: bool,
        sinks: bool,
    ) -> WorkLaunch {
        let window = options.window.map_or(NO_WINDOW, |window| window.min(NO_WINDOW as usize) as u32);
        WorkLaunch::new(
            self.tiles(batch),
            batch.rows(),
            batch.tokens(),
            batch.tables().len() / batch.rows().max(1),
            batch.block_tokens(),
            shape.heads,
            shape.kv_heads,
            splits,
            window as usize,
            options.scale,
            options.softcap.unwrap_or(0.0),
            sinks,
            Self { partial, ..self },
        )
    }
}

/// What the kernels do.
#[derive(CubeType, CubeLaunch)]
pub(super) struct Work {
    tiles: usize,
    rows: usize,
    tokens: usize,
    max_blocks: usize,
    block_tokens: usize,
    heads: usize,
    kv_heads: usize,
    /// Cubes along the positions.
    splits: usize,
    window: usize,
    scale: f32,
    /// 0 where there is none.
    softcap: f32,
    /// Whether query heads have sinks.
    #[cube(comptime)]
    sinks: bool,
    #[cube(comptime)]
    plan: Plan,
}

/// `exp(old - new)`, 1 without rounding where they are equal.
#[cube]
fn weight(old: f32, new: f32) -> f32 {
    let mut weight = 1.0f32;
    if old != new {
        weight = (old - new).exp();
    }
    weight
}

/// Where the token at `position` of a sequence lies in the cache.
#[cube]
fn slot(words: &[u32], table: usize, position: usize, block_tokens: usize) -> usize {
    words[table + position / block_tokens] as usize * block_tokens + position % block_tokens
}

/// The last row whose first place is at or before `place`, where a row's first place is its first token's number over
/// `tokens`, plus its own number.
#[cube]
fn row_of(words: &[u32], starts: usize, rows: usize, place: usize, #[comptime] tokens: usize) -> usize {
    let mut low = 0usize;
    let mut high = rows;
    while low + 1 < high {
        let middle = (low + high) / 2;
        if words[starts + middle] as usize / tokens + middle <= place {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}

#[cube(launch_unchecked)]
pub(super) fn attention<F: Float, K: Size, V: Size>(
    q: &[F],
    keys: &[Vector<F, K>],
    values: &[Vector<F, V>],
    words: &[u32],
    sinks: &[f32],
    out: &mut [F],
    partial: &mut [f32],
    work: &Work,
    #[define(F)] _format: ElemType,
) {
    let plan = comptime!(work.plan);
    let (wide, narrow) = (K::value().comptime(), V::value().comptime());
    let head_dim = comptime!(plan.head_dim);
    let rows = comptime!(plan.tokens * plan.share);
    let mut queries = Shared::<[f32]>::new_slice(comptime!(rows * head_dim));
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(plan.scratch()));
    let mut sums = Shared::<[f32]>::new_slice(UNITS);
    let mut scores = Shared::<[f32]>::new_slice(comptime!(rows * TILE));
    let mut weights = Shared::<[f32]>::new_slice(comptime!(rows * TILE));
    let mut peaks = Shared::<[f32]>::new_slice(rows);
    let mut factors = Shared::<[f32]>::new_slice(rows);
    let unit = UNIT_POS as usize;

    // This cube's tokens, heads and positions.
    let of_splits = CUBE_POS / work.splits;
    let (block_tokens, kv_heads) = (work.block_tokens, work.kv_heads);
    let of_heads = work.heads / comptime!(plan.share);
    let place = of_splits / of_heads;
    let first_head = of_splits % of_heads * comptime!(plan.share);
    let kv_head = first_head / comptime!(plan.group);
    let starts = work.tokens;
    let row = row_of(words, starts, work.rows, min(place, work.tiles - 1), comptime!(plan.tokens));
    let (start, end) = (words[starts + row] as usize, words[starts + row + 1] as usize);
    let len = words[starts + work.rows + 1 + row] as usize;
    let table = starts + 2 * work.rows + 1 + row * work.max_blocks;
    let token = start + (place - (start / comptime!(plan.tokens) + row)) * comptime!(plan.tokens);
    // No token is left for a row's last place, and for cubes beyond the last place.
    let count = select(place < work.tiles && token < end, min(end - min(token, end), comptime!(plan.tokens)), 0);
    // Positions of the first token, and one past the last.
    let position = len - (end - min(token, end));
    let stop = select(count > 0, position + count, 0);
    let window = work.window;
    let seen = select(position + 1 > window, position + 1 - min(window, position + 1), 0);
    let mut split = seen / SPLIT;
    let mut last_split = stop.div_ceil(SPLIT);
    if comptime!(plan.partial) {
        let own = CUBE_POS % work.splits;
        last_split = select(own >= split, min(last_split, own + 1), 0);
        split = own;
    }

    let mut i = unit;
    while i < comptime!(rows * head_dim) {
        let (r, d) = (i / head_dim, i % head_dim);
        let mut value = 0.0f32;
        if r / comptime!(plan.share) < count {
            let head = (token + r / comptime!(plan.share)) * work.heads + first_head + r % comptime!(plan.share);
            value = f32::cast_from(q[head * head_dim + d]);
        }
        queries[i] = value;
        i += UNITS;
    }
    sync_cube();

    // Scores: a unit has a position, a part of the head and every `SCORE_LANES`th row.
    let part = unit % PARTS;
    let of_tile = unit / PARTS % TILE;
    let score_lane = unit / comptime!(PARTS * TILE);
    let score_rows = comptime!(rows.div_ceil(SCORE_LANES));
    // Weights: a unit has a position of a row, and of later rows.
    let weight_rows = comptime!((rows * TILE).div_ceil(UNITS));
    // Sums: a unit has some columns, every `row_lanes`th row and every `lanes`th position.
    let columns = comptime!(head_dim / narrow);
    let (column, others) = (unit % columns, unit / columns);
    let (row_lane, lane) = (others % comptime!(plan.row_lanes), others / comptime!(plan.row_lanes));
    let sum_rows = comptime!(rows.div_ceil(plan.row_lanes));

    let mut total = Array::<f32>::new(comptime!(sum_rows * narrow));
    let mut total_sum = Array::<f32>::new(sum_rows);
    let mut total_peak = Array::<f32>::new(sum_rows);
    #[unroll]
    for j in 0..sum_rows {
        total_sum[j] = 0.0f32;
        total_peak[j] = HIDDEN;
        #[unroll]
        for k in 0..narrow {
            total[j * narrow + k] = 0.0f32;
        }
    }

    while split < last_split {
        let mut peak = Array::<f32>::new(weight_rows);
        #[unroll]
        for j in 0..weight_rows {
            peak[j] = HIDDEN;
        }
        let mut acc = Array::<f32>::new(comptime!(sum_rows * narrow));
        let mut sum = Array::<f32>::new(sum_rows);
        #[unroll]
        for j in 0..sum_rows {
            sum[j] = 0.0f32;
            #[unroll]
            for k in 0..narrow {
                acc[j * narrow + k] = 0.0f32;
            }
        }
        let mut tile = max(split * SPLIT, seen / TILE * TILE);
        let split_stop = min((split + 1) * SPLIT, stop);
        while tile < split_stop {
            let mut dots = Array::<f32>::new(score_rows);
            #[unroll]
            for j in 0..score_rows {
                dots[j] = 0.0f32;
            }
            let at = tile + of_tile;
            if at < stop && score_lane < SCORE_LANES {
                let vectors = comptime!(head_dim / wide);
                let first = (slot(words, table, at, block_tokens) * kv_heads + kv_head) * vectors;
                let mut v = part;
                while v < vectors {
                    let key = keys[first + v];
                    #[unroll]
                    for k in 0..wide {
                        let element = f32::cast_from(key.extract(k));
                        #[unroll]
                        for j in 0..score_rows {
                            let r = min(score_lane + j * SCORE_LANES, comptime!(rows - 1));
                            dots[j] = fma(queries[r * head_dim + v * wide + k], element, dots[j]);
                        }
                    }
                    v += PARTS;
                }
            }
            #[unroll]
            for j in 0..score_rows {
                let r = score_lane + j * SCORE_LANES;
                if r < rows && score_lane < SCORE_LANES {
                    scratch[(r * TILE + of_tile) * PARTS + part] = dots[j];
                }
            }
            sync_cube();

            let mut own = Array::<f32>::new(weight_rows);
            #[unroll]
            for j in 0..weight_rows {
                let item = unit + j * UNITS;
                own[j] = HIDDEN;
                if item < comptime!(rows * TILE) {
                    let of_token = item / TILE / comptime!(plan.share);
                    let (at, query) = (tile + item % TILE, position + of_token);
                    if of_token < count && at <= query && at + window > query {
                        let first = item * PARTS;
                        let mut dot = scratch[first];
                        #[unroll]
                        for part in 1..PARTS {
                            dot += scratch[first + part];
                        }
                        let mut score = dot * work.scale;
                        if work.softcap > 0.0f32 {
                            // tanh, which is exact enough beside scores that a cap bounds, and has no overflow.
                            let double = (score / work.softcap * 2.0f32).clamp(-40.0f32, 40.0f32).exp();
                            score = work.softcap * (1.0f32 - 2.0f32 / (double + 1.0f32));
                        }
                        own[j] = max(score, comptime!(0.99 * HIDDEN));
                    }
                    scores[item] = own[j];
                }
            }
            sync_cube();

            #[unroll]
            for j in 0..weight_rows {
                let item = unit + j * UNITS;
                if item < comptime!(rows * TILE) {
                    let (r, of_row, old) = (item / TILE, item % TILE, peak[j]);
                    let mut new = old;
                    for t in 0..TILE {
                        new = max(new, scores[r * TILE + t]);
                    }
                    let mut p = 0.0f32;
                    if own[j] > HIDDEN {
                        p = weight(own[j], new);
                    }
                    weights[item] = p;
                    if of_row == 0 {
                        factors[r] = weight(old, new);
                        peaks[r] = new;
                    }
                    peak[j] = new;
                }
            }
            sync_cube();

            if lane < comptime!(plan.lanes) {
                #[unroll]
                for j in 0..sum_rows {
                    let r = min(row_lane + j * comptime!(plan.row_lanes), comptime!(rows - 1));
                    let factor = factors[r];
                    sum[j] *= factor;
                    #[unroll]
                    for k in 0..narrow {
                        acc[j * narrow + k] *= factor;
                    }
                }
                let limit = min(stop - tile, TILE);
                let mut t = lane;
                while t < limit {
                    let of_slot = slot(words, table, tile + t, block_tokens);
                    let value = values[(of_slot * kv_heads + kv_head) * columns + column];
                    #[unroll]
                    for j in 0..sum_rows {
                        let r = min(row_lane + j * comptime!(plan.row_lanes), comptime!(rows - 1));
                        let p = weights[r * TILE + t];
                        // A value that is not seen may be anything.
                        if p > 0.0f32 {
                            sum[j] += p;
                            #[unroll]
                            for k in 0..narrow {
                                acc[j * narrow + k] = fma(p, f32::cast_from(value.extract(k)), acc[j * narrow + k]);
                            }
                        }
                    }
                    t += comptime!(plan.lanes);
                }
            }
            tile += TILE;
        }

        // Lanes are added in order, then the split is joined to those before it.
        #[unroll]
        for j in 0..sum_rows {
            if comptime!(plan.lanes > 1) {
                if lane < comptime!(plan.lanes) {
                    sums[unit] = sum[j];
                    #[unroll]
                    for k in 0..narrow {
                        scratch[unit * narrow + k] = acc[j * narrow + k];
                    }
                }
                sync_cube();
            }
            let r = row_lane + j * comptime!(plan.row_lanes);
            if lane == 0 && r < rows {
                let of_token = r / comptime!(plan.share);
                let query = position + of_token;
                let sees = (split + 1) * SPLIT + window > query + 1 && split * SPLIT <= query;
                if of_token < count && sees {
                    let mut whole_sum = sum[j];
                    let mut whole = Array::<f32>::new(narrow);
                    #[unroll]
                    for k in 0..narrow {
                        whole[k] = acc[j * narrow + k];
                    }
                    for other in 1..comptime!(plan.lanes) {
                        let at = unit + other * comptime!(columns * plan.row_lanes);
                        whole_sum += sums[at];
                        #[unroll]
                        for k in 0..narrow {
                            whole[k] += scratch[at * narrow + k];
                        }
                    }
                    let peak = peaks[r];
                    if comptime!(plan.partial) {
                        let head = (token + of_token) * work.heads + first_head + r % comptime!(plan.share);
                        let first = (split * work.tokens * work.heads + head) * comptime!(head_dim + 2);
                        #[unroll]
                        for k in 0..narrow {
                            partial[first + column * narrow + k] = whole[k];
                        }
                        if column == 0 {
                            partial[first + head_dim] = whole_sum;
                            partial[first + head_dim + 1] = peak;
                        }
                    } else {
                        let new = max(total_peak[j], peak);
                        let (before, this) = (weight(total_peak[j], new), weight(peak, new));
                        total_peak[j] = new;
                        total_sum[j] = fma(total_sum[j], before, whole_sum * this);
                        #[unroll]
                        for k in 0..narrow {
                            total[j * narrow + k] = fma(total[j * narrow + k], before, whole[k] * this);
                        }
                    }
                }
            }
            if comptime!(plan.lanes > 1) {
                sync_cube();
            }
        }
        if comptime!(plan.lanes == 1) {
            // Everyone has read the peaks before they are written again.
            sync_cube();
        }
        split += 1;
    }

    if comptime!(!plan.partial) {
        #[unroll]
        for j in 0..sum_rows {
            let r = row_lane + j * comptime!(plan.row_lanes);
            let of_token = r / comptime!(plan.share);
            if lane == 0 && r < rows && of_token < count {
                let head = (token + of_token) * work.heads + first_head + r % comptime!(plan.share);
                let mut factor = 1.0f32;
                let mut sum = total_sum[j];
                if comptime!(work.sinks) {
                    let sink = sinks[head % work.heads];
                    let new = max(total_peak[j], sink);
                    factor = weight(total_peak[j], new);
                    sum = fma(sum, factor, weight(sink, new));
                }
                #[unroll]
                for k in 0..narrow {
                    let value = total[j * narrow + k] * factor / sum;
                    out[head * head_dim + column * narrow + k] = F::cast_from(value);
                }
            }
        }
    }
}

/// Joins the splits of each token and head, an element a unit, as a cube that has them all does.
#[cube(launch_unchecked)]
pub(super) fn join<F: Float>(
    partial: &[f32],
    words: &[u32],
    sinks: &[f32],
    out: &mut [F],
    work: &Work,
    #[define(F)] _format: ElemType,
) {
    let head_dim = comptime!(work.plan.head_dim);
    let item = ABSOLUTE_POS;
    if item < work.tokens * work.heads * head_dim {
        let (head, d) = (item / head_dim, item % head_dim);
        let token = head / work.heads;
        let starts = work.tokens;
        // Rows without a token begin where the next one does: the last of them is wanted.
        let mut low = 0usize;
        let mut high = work.rows;
        while low + 1 < high {
            let middle = (low + high) / 2;
            if words[starts + middle] as usize <= token {
                low = middle;
            } else {
                high = middle;
            }
        }
        let end = words[starts + low + 1] as usize;
        let query = words[starts + work.rows + 1 + low] as usize - (end - token);
        let seen = select(query + 1 > work.window, query + 1 - min(work.window, query + 1), 0);
        let mut peak = f32::new(HIDDEN);
        let mut sum = 0.0f32;
        let mut value = 0.0f32;
        for split in seen / SPLIT..query / SPLIT + 1 {
            let first = (split * work.tokens * work.heads + head) * comptime!(head_dim + 2);
            let of_split = partial[first + head_dim + 1];
            let new = max(peak, of_split);
            let (before, this) = (weight(peak, new), weight(of_split, new));
            peak = new;
            sum = fma(sum, before, partial[first + head_dim] * this);
            value = fma(value, before, partial[first + d] * this);
        }
        let mut factor = 1.0f32;
        if comptime!(work.sinks) {
            let sink = sinks[head % work.heads];
            let new = max(peak, sink);
            factor = weight(peak, new);
            sum = fma(sum, factor, weight(sink, new));
        }
        out[item] = F::cast_from(value * factor / sum);
    }
}
