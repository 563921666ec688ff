//! The attention of generation on CUDA's tensor cores, bound by reading keys and values once.
//!
//! **Idea** (flash-decoding: Dao et al., 2023, with splits of a fixed length). A cube takes 128 positions of one key
//! head for all query heads that share it, and of a row of several new tokens for as many of those as make up 8 or 16
//! queries; each of its four warps takes 32 of the positions. Multiplying is free here, so there is one kernel for any
//! number of query heads to a key head, on `mma.sync` with positions (then dimensions) as rows and queries as the 8
//! columns: a single query uses an eighth of it, and tensor cores are still idle most of the time.
//!
//! **Layout.**
//!
//! - The order of dimensions within a score is free as long as keys and queries keep the same one, and so is the order
//!   in which sums of values come out. So a lane's 16 bytes of a key, and of four values, are its part of `mma`'s first
//!   operand: as they are, or after eight `prmt` for four words. Eight neighbouring lanes copy 128 bytes of one row
//!   (`cp.async`, 16 bytes each) to where those lanes that need them read them. A warp needs no barrier but its own and no
//!   `ldmatrix`, meets no bank conflict, and has as many bytes on their way as its ring holds.
//! - A lane looks one position up in the table of blocks, once for a split; the others get it by shuffles.
//! - Scores leave `mma` with positions as rows; `movmatrix` turns their exponentials into the second operand of the
//!   product with the values. Each goes as two numbers of 16 bits that hold it to 2^-17 of itself, so the result
//!   is as exact as with weights in f32.
//!
//! **Order.** A warp's 32 positions have one maximum; four warps are joined in order, then the splits of a section
//! of 16, then sections: the same tree for each token, whatever cubes do it. Joining a part that a token does not see
//! changes no bit.
//!
//! **Who does what.** The grid is fixed by what the caller has room for, so that a recorded pass can be replayed with
//! other lengths; the cubes themselves count what there is to do, from the lengths, and each takes an equal share of all
//! splits, one after the other (as stream-K divides a product: Osama et al., 2023, arXiv 2301.03598). So copies never
//! pause between rows, room that no row uses costs nothing, and rows may have any lengths. Cubes of all key heads go
//! through the same positions side by side, as these are neighbours in memory. A share that has all
//! of a section's splits joins them in registers. Where others have some of them, partial results lie in memory, and
//! whoever arrives last, by a counter, joins them: no second launch. Where these would take more than 64 MiB, shares are
//! of whole sections.
//!
//! **What is read.** No position that no token of a tile sees. In a tile of several tokens the weights of what an earlier
//! one does not see are zeros, which are multiplied: a value that is no number, of a later token of the same row, makes
//! the earlier ones' results no numbers as well.
//!
//! Not measured yet. `docs/src/kernels/paged-attention.md` has figures of another layout of the copies (each lane what it
//! reads itself), and what was to be expected of this one.

use bytemuck::{Pod, Zeroable};
use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{Arguments, Source};

use super::{Call, MAX_PARTIAL, OPERATION, Shape, buffer, check_limit, check_reach};
use crate::KernelError;
use crate::elementwise::check_half;

const TEXT: &str = concat!(
    cuda_source::prelude!(),
    cuda_source::tensor_cores!(),
    include_str!("../attention/primitives.cu"),
    include_str!("mma.cu")
);
const WARPS: usize = 4;
const THREADS: usize = 32 * WARPS;
/// Positions of a split.
const SPLIT: usize = 32 * WARPS;
/// Splits that are joined before they are joined to others.
const SECTION: usize = 16;
/// Slabs of 2 KB in a warp's ring. With the cube's other tables they make 43 KB of shared memory.
const STAGES: usize = 4;
/// Rows of a launch: each has a word of shared memory.
const MAX_ROWS: usize = 512;
/// Cubes of a key head at most: CUDA's limit.
const MAX_STREAMS: usize = 65_535;
/// A window that no row is longer than.
const NO_WINDOW: u32 = 1 << 31;
/// Counters are made in at least this number, and in powers of two, so that few lengths of them are kept.
const MIN_COUNTERS: usize = 1 << 12;

/// The widest head: a warp holds the sums of its values in registers.
const WIDEST: usize = 256;

/// Whether the kernel takes a shape.
pub(super) fn takes(client: &Client, shape: &Shape) -> bool {
    shape.head_dim.is_multiple_of(8)
        && shape.head_dim <= WIDEST
        && cuda_source::device(client).is_some_and(|device| device.multiplies(shape.format))
}

/// [`super::Division::Mma`].
#[derive(Clone, Copy)]
pub(super) struct Division {
    pub whole_sections: bool,
    pub query_tiles: usize,
    pub cubes: usize,
}

/// `struct Divisor` of mma.cu: a division by multiplication (Granlund and Montgomery, 1994).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
struct Divisor {
    factor: u32,
    shift: u32,
}

impl Divisor {
    /// Of numbers below 2^31 by `divisor`, which is one of them and not 0.
    fn new(divisor: usize) -> Self {
        let divisor = divisor as u64;
        let shift = divisor.next_power_of_two().ilog2();
        let factor = ((1 << 32) * ((1 << shift) - divisor)) / divisor + 1;
        Self { factor: factor as u32, shift }
    }
}

/// `struct Params` of mma.cu.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    first_row: u32,
    rows: u32,
    all_rows: u32,
    tokens: u32,
    max_blocks: u32,
    block_tokens: u32,
    heads: u32,
    kv_heads: u32,
    group: u32,
    head_dim: u32,
    window: u32,
    queries: u32,
    unit_log2: u32,
    units: u32,
    by_group: Divisor,
    by_block_tokens: Divisor,
    by_streams: Divisor,
    scale_log2: f32,
    cap_scale: f32,
    sinks: u32,
}

/// What a kernel is compiled for, beside the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Variant {
    /// head_dim, padded: 64, 128, 192 or 256.
    dim: usize,
    query_tiles: usize,
}

impl Variant {
    /// The widest that the most queries of a row and key head fill.
    fn new(head_dim: usize, most_queries: usize) -> Self {
        let dim = head_dim.next_multiple_of(64);
        Self { dim, query_tiles: if most_queries > 8 && dim <= 128 { 2 } else { 1 } }
    }

    fn queries(self) -> usize {
        8 * self.query_tiles
    }

    /// Cubes per multiprocessor that registers must leave room for, by measurement where there was a choice. CUDA 12.8's
    /// assembler keeps up to 16 bytes of a variant elsewhere.
    fn cubes(self) -> usize {
        match (self.dim, self.query_tiles) {
            (64, 1) => 5,
            (..=128, 1) | (64, _) => 4,
            (192, _) => 3,
            _ => 2,
        }
    }

    fn source(self, shape: &Shape, softcap: bool) -> Source {
        let defines = [
            shape.format.define(),
            ("D", self.dim as i64),
            ("SOFTCAP", softcap.into()),
            ("QUERY_TILES", self.query_tiles as i64),
            ("WARPS", WARPS as i64),
            ("STAGES", STAGES as i64),
            ("MIN_CUBES", self.cubes() as i64),
            ("MAX_ROWS", MAX_ROWS as i64),
        ];
        Source::with_defines(TEXT, "paged_attention", THREADS as u32, &defines)
    }
}

/// One launch, or one for each 512 rows and 64 MiB of partial results.
pub(super) fn attend(call: &Call<'_>, division: Option<Division>) -> Result<(), KernelError> {
    let &Call { client, batch, shape, options, .. } = call;
    check_half(client, OPERATION, shape.format)?;
    if !shape.head_dim.is_multiple_of(8) || shape.head_dim > WIDEST {
        return Err(KernelError::HeadDim(shape.head_dim));
    }
    let Some(device) = cuda_source::device(client).filter(|device| device.multiplies(shape.format)) else {
        return Err(KernelError::Unsupported { runtime: client.name().to_owned(), operation: OPERATION });
    };
    check_reach(batch, shape.slots)?;
    check_buffers(call)?;
    let group = shape.heads / shape.kv_heads;
    let most_queries = batch.max_new() * group;
    let mut variant = Variant::new(shape.head_dim, most_queries);
    let mut unit_splits = None;
    let mut cubes = device.multiprocessors as usize * variant.cubes();
    if let Some(division) = division {
        variant.query_tiles = division.query_tiles;
        if !(1..=if variant.dim <= 128 { 2 } else { 1 }).contains(&division.query_tiles) || division.cubes == 0 {
            let value = format!("{} by {} cubes", division.query_tiles, division.cubes);
            let reason = "1 or, for heads up to 128, 2, and at least one cube";
            return Err(KernelError::Attention { name: "eights of queries", value, reason });
        }
        unit_splits = Some(if division.whole_sections { SECTION } else { 1 });
        cubes = division.cubes;
    }
    let window = options.window.map_or(NO_WINDOW, |window| window.min(NO_WINDOW as usize) as u32);
    let work = Work {
        queries: variant.queries().min(most_queries),
        // Of a row's positions, all that any of its new tokens sees.
        span: batch.max_len().min((window as usize).saturating_add(batch.max_new())),
        max_len: batch.max_len(),
        kv_heads: shape.kv_heads,
        dim: variant.dim,
    };
    let tiles = |row: usize| {
        let new = batch.starts()[row + 1] - batch.starts()[row];
        (new as usize * group).div_ceil(variant.queries())
    };
    let unit_splits = unit_splits.unwrap_or_else(|| {
        let tiles = (0..batch.rows()).map(tiles).sum();
        if work.partial_bytes(tiles, 1) <= MAX_PARTIAL { 1 } else { SECTION }
    });
    let source = variant.source(shape, options.softcap.is_some());
    for Slice { first, rows, tiles } in slices(batch.rows(), tiles, &work, unit_splits) {
        let units = work.units(tiles, unit_splits);
        check_limit("units of an attention", units, i32::MAX as usize / 2)?;
        // Cubes of a key head.
        let streams = (cubes / shape.kv_heads).clamp(1, (units / shape.kv_heads).min(MAX_STREAMS));
        let partial = client.empty(work.partial_bytes(tiles, unit_splits).max(4));
        let counters = (2 * units).next_power_of_two().max(MIN_COUNTERS);
        let counters = cuda_source::counters(client, &partial, counters);
        let params = Params {
            first_row: first as u32,
            rows: rows as u32,
            all_rows: batch.rows() as u32,
            tokens: batch.tokens() as u32,
            max_blocks: (batch.tables().len() / batch.rows()) as u32,
            block_tokens: batch.block_tokens() as u32,
            heads: shape.heads as u32,
            kv_heads: shape.kv_heads as u32,
            group: group as u32,
            head_dim: shape.head_dim as u32,
            window,
            queries: work.queries as u32,
            unit_log2: unit_splits.ilog2(),
            units: units as u32,
            by_group: Divisor::new(group),
            by_block_tokens: Divisor::new(batch.block_tokens().min(i32::MAX as usize)),
            by_streams: Divisor::new(streams),
            scale_log2: options.softcap.unwrap_or(options.scale) * std::f32::consts::LOG2_E,
            cap_scale: options.softcap.map_or(0.0, |cap| options.scale / cap),
            sinks: call.buffers.sinks.is_some().into(),
        };
        let buffers = &call.buffers;
        let arguments = Arguments::new().read(buffers.q).read(buffers.keys).read(buffers.values).read(buffers.words);
        let arguments = arguments
            .read(buffers.sinks.unwrap_or(buffers.words))
            .write(buffers.out)
            .write(&partial)
            .counters(&counters)
            .params(params);
        cuda_source::launch(client, &source, (shape.kv_heads as u32, streams as u32, 1), arguments)
            .map_err(|e| KernelError::Launch { operation: OPERATION, message: e.to_string() })?;
    }
    Ok(())
}

/// Fails where a buffer is too small, or copies of 16 bytes can't reach its elements.
fn check_buffers(call: &Call<'_>) -> Result<(), KernelError> {
    let &Call { buffers, batch, shape, .. } = call;
    let (queries, cached) = (batch.tokens() * shape.heads, shape.slots.saturating_mul(shape.kv_heads));
    let check = |name, handle: &Handle, heads: usize| {
        buffer(name, handle, heads.saturating_mul(shape.head_dim), shape.format.size(), 1)?;
        match handle.offset_start.unwrap_or(0) as usize {
            offset if !offset.is_multiple_of(16) => Err(KernelError::Alignment { name, offset, size: 16 }),
            _ => Ok(()),
        }
    };
    check("q", buffers.q, queries)?;
    check("out", buffers.out, queries)?;
    check("keys", buffers.keys, cached)?;
    check("values", buffers.values, cached)?;
    call.sinks()?;
    buffer("words", buffers.words, batch.num_words(), 4, 1).map(|_| ())
}

/// What bounds the units of a launch, splits or sections, and their partial results.
struct Work {
    /// Of a tile, at most.
    queries: usize,
    /// Positions that a row's new tokens see, at most.
    span: usize,
    max_len: usize,
    kv_heads: usize,
    dim: usize,
}

impl Work {
    /// Units of a tile and key head, at most.
    fn units_of_head(&self, unit_splits: usize) -> usize {
        let positions = unit_splits * SPLIT;
        // A span that begins in the midst of one.
        self.max_len.div_ceil(positions).min(self.span.div_ceil(positions) + 1)
    }

    fn units(&self, tiles: usize, unit_splits: usize) -> usize {
        tiles.saturating_mul(self.units_of_head(unit_splits)).saturating_mul(self.kv_heads)
    }

    /// Those of a context that is one unit stay in registers.
    fn partial_bytes(&self, tiles: usize, unit_splits: usize) -> usize {
        match self.units_of_head(unit_splits) {
            ..=1 => 0,
            // Sums, and behind them the maximum and the sum of exponentials.
            _ => self.units(tiles, unit_splits).saturating_mul(4 * self.queries * (self.dim + 4)),
        }
    }
}

/// Rows of one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Slice {
    first: usize,
    rows: usize,
    tiles: usize,
}

/// The rows in launches of up to [`MAX_ROWS`] and [`MAX_PARTIAL`], or one row; without those that have nothing to do.
fn slices(rows: usize, tiles: impl Fn(usize) -> usize, work: &Work, unit_splits: usize) -> Vec<Slice> {
    let mut slices: Vec<Slice> = Vec::new();
    for row in 0..rows {
        let own = tiles(row);
        match slices.last_mut() {
            Some(slice)
                if slice.rows < MAX_ROWS && work.partial_bytes(slice.tiles + own, unit_splits) <= MAX_PARTIAL =>
            {
                slice.rows += 1;
                slice.tiles += own;
            }
            _ => slices.push(Slice { first: row, rows: 1, tiles: own }),
        }
    }
    slices.retain(|slice| slice.tiles > 0);
    slices
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORK: Work = Work { queries: 8, span: 1 << 20, max_len: 1024, kv_heads: 8, dim: 128 };

    #[test]
    fn launches_have_their_share_of_rows_and_memory() {
        let slice = |first, rows, tiles| Slice { first, rows, tiles };
        assert_eq!(slices(700, |_| 1, &WORK, SECTION), [slice(0, 512, 512), slice(512, 188, 188)]);
        // 8 splits by 8 heads by 8 queries of 132 numbers: 270,336 bytes a tile.
        assert_eq!(WORK.partial_bytes(1, 1), 270_336);
        assert_eq!(slices(300, |_| 1, &WORK, 1), [slice(0, 248, 248), slice(248, 52, 52)]);
        // A row that is too large has its own launch.
        assert_eq!(slices(3, |row| if row == 1 { 300 } else { 1 }, &WORK, 1).len(), 3);
        assert_eq!(slices(4, |row| row / 2, &WORK, 1), [slice(0, 4, 2)]);
        assert_eq!(slices(4, |_| 0, &WORK, 1), []);
    }

    #[test]
    fn division_is_exact() {
        for divisor in [1, 2, 3, 7, 12, 16, 71, 100, 65_537, i32::MAX as usize] {
            let Divisor { factor, shift } = Divisor::new(divisor);
            let by = divisor as u32;
            let near = [0, 1, by - 1, by, by.saturating_add(1), by.saturating_mul(2) - 1, 1 << 30, i32::MAX as u32];
            for n in near.into_iter().filter(|n| *n < 1 << 31) {
                let high = ((u64::from(n) * u64::from(factor)) >> 32) as u32;
                assert_eq!((high + n) >> shift, n / by, "{n} by {by}");
            }
        }
    }

    #[test]
    fn a_window_bounds_the_splits() {
        let units = |span, max_len| Work { span, max_len, ..WORK }.units_of_head(1);
        assert_eq!([units(1 << 30, 0), units(1 << 30, 1), units(1 << 30, 129)], [0, 1, 2]);
        // 130 positions may touch three splits.
        assert_eq!([units(130, 5000), units(130, 256), units(1, 5000)], [3, 2, 2]);
    }

    #[test]
    fn tiles_are_as_wide_as_queries_fill() {
        for (head_dim, queries, dim, query_tiles) in
            [(32, 1, 64, 1), (64, 9, 64, 2), (96, 8, 128, 1), (128, 16, 128, 2), (136, 16, 192, 1), (256, 99, 256, 1)]
        {
            assert_eq!(Variant::new(head_dim, queries), Variant { dim, query_tiles });
        }
    }

    #[test]
    fn the_signature_is_plain() {
        let shape = Shape { heads: 1, kv_heads: 1, head_dim: 64, slots: 1, format: crate::FloatFormat::F16 };
        let source = Variant::new(64, 1).source(&shape, false);
        let at = source.text().find("paged_attention(").unwrap();
        let list = source.text()[at..].split(')').next().unwrap();
        assert_eq!(list.matches(',').count() + 1, 9);
    }
}
