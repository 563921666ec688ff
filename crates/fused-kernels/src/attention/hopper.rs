//! The kernels for Hopper, compute capability 9.0: wgmma and TMA, after FlashAttention-3 (Shah et al., 2024, arXiv
//! 2407.08608). Formulas, masks and rounding are those of the kernels for `mma`.
//!
//! # How
//!
//! - A cube of 128 queries, or keys, has two warp groups that compute, with 64 rows and 232 registers a thread each,
//!   and a warp that loads. Tiles come by TMA from the operands where they lie (four dimensions with any strides; zeros
//!   past a row's end) into rings in shared memory, swizzled as wgmma reads them.
//! - Products of scores take both operands from shared memory. Their result is in the order of a first operand, so
//!   P and dS stay in registers; the second operand of those products is the same tile with its rows contracted. dK and
//!   dV compute transposed scores for that reason.
//! - Products are queued ahead: the scores of the next tile run behind the sums of this one, and the exponentials of
//!   one group run under the products of the other. Where it helps, groups take turns at the tensor cores. (The
//!   assembler starts a wait for wgmma as early as it can, over independent arithmetic; a branch or a store hold it
//!   back.)
//! - As many cubes as multiprocessors draw tiles from a counter ([`counters`](cuda_source::counters)), so that loads
//!   run ahead over the end of a tile. Heads are taken in sections whose keys and values, or queries and gradients,
//!   stay in the second-level cache, the heaviest tiles first. The lightest tiles of all heads come last and even out
//!   the end ([`section`], [`light`]). The bits of a tile do not depend on the cube that computes it.
//! - dQ has a kernel of its own, as in the other kernels. It costs seven products instead of the five of one kernel for
//!   all gradients, which would have to add dQ up across cubes, in an order, and pass dS and dQ through shared memory.
//!
//! # Wide heads
//!
//! Sums of 64 rows of 256 take 128 registers of a thread. The forward pass and dQ have room for them beside smaller tiles;
//! dQ multiplies P with the softcap's derivative at once, so that it keeps no scores. dK and dV of 64 keys take 256, so a
//! cube has 64 keys, and each of its groups one of the two:
//!
//! - The first computes `K Qᵀ`, P and `dV += Pᵀ dO`, the second `V dOᵀ`, dS and `dK += dSᵀ Q`: two products each, none
//!   twice. P goes from one to the other through shared memory, in f32, so that dS is rounded once. Each thread
//!   reads what its counterpart wrote, as its registers held it: no transposition, no conflict of banks, and barriers of
//!   two warps each.
//! - The groups take turns at the tensor cores.
//! - For heads of 192 the registers that are left hold K and V as first operands: their scores read half as much of
//!   shared memory, and the next tile of keys comes while this one is computed.
//!
//! # Bound
//!
//! Tensor cores, and the exponentials that must hide behind them: with 32 heads of 128, 4 x 2048 runs at 557 TFLOP/s
//! forward, 629 for dK and dV and 616 for dQ, 1 x 16384 at 709, 690 and 808 (one H100 at 700 W, bf16, causal, of the
//! products that each kernel computes); with 16 heads of 256, 4 x 2048 at 588, 571 and 618. By arithmetic,
//! shared memory bounds dK and dV of heads of 256: only 64 rows of scores share what is read for them.
//! `docs/src/kernels/attention.md` has more shapes and the variants that lost.
//!
//! # What was not done
//!
//! - Tiles across the diagonal are computed whole: 6 % of the work at a length of 2048.
//! - Values of another width than queries and keys (192 and 128 of multi-head latent attention).
//! - A packed row's last tile holds the first tokens of the next row; they weigh nothing, but zero times NaN is NaN.
//! - A cheaper softcap: its tanh doubles the work of the special function units, a third of the forward pass.

use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{Arguments, CudaDevice, Source, Swizzle, TensorMap};

use super::{Backward, Forward, OPERATION, Operand, Options, Params, Shape, Side, check_limit};
use crate::{FloatFormat, KernelError};

/// The text of a kernel: what all share, and its own.
macro_rules! text {
    ($($file:literal),+) => {
        concat!(
            cuda_source::prelude!(),
            cuda_source::tensor_cores!(),
            include_str!("primitives.cu"),
            include_str!("shape.cu"),
            cuda_source::tma_barriers!(),
            include_str!("wgmma.cu"),
            include_str!("hopper.cu"),
            $(include_str!($file)),+
        )
    };
}
const FORWARD: &str = text!("hopper_forward.cu");
const KEYS: &str = text!("hopper_backward.cu", "hopper_keys_shared.cu", "hopper_keys.cu");
const KEYS_WIDE: &str = text!("hopper_backward.cu", "hopper_keys_shared.cu", "hopper_keys_wide.cu");
const QUERIES: &str = text!("hopper_backward.cu", "hopper_queries.cu");
const THREADS: u32 = 384;
/// Rows of queries, or keys, that both groups of a cube compute, 64 each.
const CUBE_ROWS: usize = 128;
/// Tiles of P on their way from the group of dV to that of dK, of wide heads.
const PASSED: usize = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Forward,
    /// dK and dV.
    Keys,
    /// dQ.
    Queries,
}

/// A kernel with its macros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Variant {
    kind: Kind,
    /// head_dim, padded: 64, 128, 192 or 256.
    dim: usize,
    softcap: bool,
    format: FloatFormat,
}

/// Tiles of the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tiling {
    /// Rows of each.
    tile: usize,
    /// How many of keys, or of queries and gradients, shared memory holds.
    stages: usize,
    /// How many of values.
    v_stages: usize,
}

impl Variant {
    /// # Panics
    /// Never: the caller checked that `head_dim` is at most 256.
    fn new(kind: Kind, head_dim: usize, softcap: bool, format: FloatFormat) -> Self {
        let dim = [64, 128, 192].into_iter().find(|dim| head_dim <= *dim).unwrap_or(256);
        Self { kind, dim, softcap, format }
    }

    fn tiling(self) -> Tiling {
        let (tile, stages, v_stages) = match (self.kind, self.dim) {
            (Kind::Forward, 64 | 128) => (128, 2, 2),
            (Kind::Forward, 192) => (112, 2, 2),
            (Kind::Forward, _) => (80, 2, 2),
            (Kind::Keys, 64) if !self.softcap => (128, 3, 3),
            (Kind::Keys, 64 | 128 | 192) => (64, 3, 3),
            (Kind::Keys, _) => (64, 2, 2),
            // The softcap's derivative needs the scores once more: registers for half a tile.
            (Kind::Queries, 128) if self.softcap => (64, 4, 4),
            (Kind::Queries, 64 | 128) => (128, 2, 2),
            (Kind::Queries, 192) => (64, 3, 2),
            (Kind::Queries, _) => (64, 2, 1),
        };
        Tiling { tile, stages, v_stages }
    }

    /// Rows of queries, or keys, that a cube computes.
    fn cube_rows(self) -> usize {
        if self.is_split() { CUBE_ROWS / 2 } else { CUBE_ROWS }
    }

    /// Whether one group has the sums of dV and the other those of dK, of the same keys.
    fn is_split(self) -> bool {
        self.kind == Kind::Keys && self.dim > 128
    }

    /// How many sixteenths of K's columns, and V's, the groups of such a kernel hold in registers: what is left of them.
    fn held(self) -> usize {
        if self.dim == 192 { 12 } else { 0 }
    }

    /// Whether the two groups take turns at the tensor cores.
    fn turns(self) -> bool {
        match self.kind {
            Kind::Forward => self.dim == 64,
            Kind::Keys => self.is_split() || self.dim == 128 && !self.softcap,
            Kind::Queries => self.dim == 192,
        }
    }

    fn source(self) -> Source {
        let Tiling { tile, stages, v_stages } = self.tiling();
        let (file, name, tile_name) = match self.kind {
            Kind::Forward => (FORWARD, "attention_forward", "KEYS"),
            Kind::Keys if self.is_split() => (KEYS_WIDE, "attention_keys", "TILE"),
            Kind::Keys => (KEYS, "attention_keys", "TILE"),
            Kind::Queries => (QUERIES, "attention_queries", "TILE"),
        };
        let mut defines = vec![
            self.format.define(),
            ("D", self.dim as i64),
            ("SOFTCAP", i64::from(self.softcap)),
            (tile_name, tile as i64),
            ("STAGES", stages as i64),
            ("V_STAGES", v_stages as i64),
            ("TURNS", self.turns().into()),
        ];
        if self.is_split() {
            defines.extend([("PASSED", PASSED as i64), ("HELD", self.held() as i64)]);
        }
        Source::with_defines(file, name, THREADS, &defines)
    }
}

/// Whether the device runs these kernels, and there are some for heads of that many dimensions.
pub(super) fn takes(device: &CudaDevice, head_dim: usize) -> bool {
    // They have more than 48 KB of static shared memory, which the assembler of CUDA 13 takes.
    device.compute_capability == (9, 0) && device.takes_large_static_memory() && head_dim <= 256
}

/// Whether they are the better ones for rows that the device takes.
pub(super) fn suits(shape: &Shape, operands: &[Operand<'_>]) -> bool {
    // Fewer queries leave half of a cube idle. TMA's strides don't overlap.
    let apart = |operand: &Operand<'_>| operand.strides.token.min(operand.strides.head) >= shape.head_dim;
    shape.rows.longest().0 > CUBE_ROWS / 2 && operands.iter().all(apart)
}

/// What all launches of a call share.
pub(super) struct Call<'a> {
    pub client: &'a Client,
    pub shape: &'a Shape,
    pub options: Options,
    pub params: Params,
    /// The row bounds, or some buffer in their place.
    pub bounds: &'a Handle,
}

impl Call<'_> {
    pub(super) fn forward(&self, operands: &Forward<'_>) -> Result<(), KernelError> {
        let Forward { q, k, v, sinks, o, lse } = *operands;
        self.launch(Kind::Forward, |variant, counter| {
            let tile = variant.tiling().tile;
            Arguments::new()
                .tensor_map(self.map(q, Side::Queries, CUBE_ROWS))
                .tensor_map(self.map(k, Side::Keys, tile))
                .tensor_map(self.map(v, Side::Keys, tile))
                .read(self.bounds)
                .read(sinks.unwrap_or(self.bounds))
                .counters(counter)
                .write(o.handle)
                .write(lse)
        })
    }

    pub(super) fn backward(&self, operands: &Backward<'_>, delta: &Handle) -> Result<(), KernelError> {
        let Backward { q, k, v, lse, d_out, d_q, d_k, d_v, .. } = *operands;
        let inputs = |queries, keys, counter: &Handle| {
            Arguments::new()
                .tensor_map(self.map(q, Side::Queries, queries))
                .tensor_map(self.map(k, Side::Keys, keys))
                .tensor_map(self.map(v, Side::Keys, keys))
                .tensor_map(self.map(d_out, Side::Queries, queries))
                .read(self.bounds)
                .read(lse)
                .read(delta)
                .counters(counter)
        };
        self.launch(Kind::Keys, |variant, counter| {
            inputs(variant.tiling().tile, variant.cube_rows(), counter).write(d_k.handle).write(d_v.handle)
        })?;
        self.launch(Kind::Queries, |variant, counter| {
            inputs(CUBE_ROWS, variant.tiling().tile, counter).write(d_q.handle)
        })
    }

    /// `[rows, heads, len, head_dim]` in boxes of that many tokens and 64 dimensions.
    fn map(&self, operand: Operand<'_>, side: Side, tokens: usize) -> TensorMap {
        let Operand { handle, strides } = operand;
        let (rows, len, heads) = self.shape.extent(side);
        // A stride that nothing is multiplied with may be anything.
        let stride = |count: usize, stride| if count > 1 { stride } else { self.shape.head_dim };
        TensorMap {
            handle: handle.clone(),
            shape: vec![rows, heads, len, self.shape.head_dim],
            strides: vec![stride(rows, strides.row), stride(heads, strides.head), stride(len, strides.token)],
            tile: vec![1, 1, tokens, 64],
            swizzle: Swizzle::B128,
            element: self.shape.format.tensor_element(),
        }
    }

    fn launch(&self, kind: Kind, arguments: impl FnOnce(Variant, &Handle) -> Arguments) -> Result<(), KernelError> {
        let Self { client, shape, options, mut params, .. } = *self;
        let variant = Variant::new(kind, shape.head_dim, options.softcap.is_some(), shape.format);
        let (queries, keys) = shape.rows.longest();
        let (len, heads) = if kind == Kind::Keys { (keys, shape.kv_heads) } else { (queries, shape.heads) };
        let (tiles, pairs) = (len.div_ceil(variant.cube_rows()), heads * shape.rows.count());
        check_limit("tiles of all heads and rows", tiles * pairs, i32::MAX as usize)?;
        if tiles * pairs == 0 {
            return Ok(());
        }
        let Some(device) = cuda_source::device(client) else {
            return Err(KernelError::Unsupported { runtime: client.name().to_owned(), operation: OPERATION });
        };
        params.tiles = tiles as u32;
        let cubes = (tiles * pairs).min(device.multiprocessors as usize);
        params.section = section(kind, shape, device.l2_bytes).min(pairs) as u32;
        params.light = light(tiles, pairs, cubes) as u32;
        let counter = cuda_source::counters(client, &client.empty(4), 1);
        let arguments = arguments(variant, &counter).params(params);
        cuda_source::launch(client, &variant.source(), (cubes as u32, 1, 1), arguments)
            .map_err(|e| KernelError::Launch { operation: OPERATION, message: e.to_string() })
    }
}

/// Heads whose other side a sixth of the second-level cache holds: they are taken together.
fn section(kind: Kind, shape: &Shape, l2_bytes: usize) -> usize {
    let group = shape.heads / shape.kv_heads;
    let (queries, keys) = shape.rows.longest();
    // Two operands of two bytes an element.
    match kind {
        Kind::Keys => l2_bytes / 6 / (4 * shape.head_dim * queries * group).max(1),
        // Query heads of a group share their keys.
        _ => (l2_bytes / 6 / (4 * shape.head_dim * keys).max(1)).next_multiple_of(group),
    }
    .max(1)
}

/// How many of a head's tiles, the lightest, are left for the end, where they even out what the heavy ones left: half
/// of the heaviest for each cube.
fn light(tiles: usize, pairs: usize, cubes: usize) -> usize {
    // The lightest takes one step, the heaviest as many as there are tiles.
    (0..tiles).find(|light| pairs * light * (light + 1) >= cubes * tiles).unwrap_or(tiles)
}

#[cfg(test)]
mod tests {
    use super::super::Rows;
    use super::*;

    const KINDS: [Kind; 3] = [Kind::Forward, Kind::Keys, Kind::Queries];

    fn variants() -> impl Iterator<Item = Variant> {
        let all = KINDS.into_iter().flat_map(|kind| [64, 128, 192, 256].map(|dim| (kind, dim)));
        all.flat_map(|(kind, dim)| [false, true].map(|softcap| Variant::new(kind, dim, softcap, FloatFormat::F16)))
    }

    #[test]
    fn heads_are_padded_to_the_next_kernel() {
        for (head_dim, dim) in [(8, 64), (72, 128), (128, 128), (136, 192), (192, 192), (200, 256), (256, 256)] {
            assert_eq!(Variant::new(Kind::Queries, head_dim, false, FloatFormat::BF16).dim, dim);
        }
    }

    #[test]
    fn tiles_fit_in_shared_memory() {
        for variant in variants() {
            let Tiling { tile, stages, v_stages } = variant.tiling();
            let own = match variant.kind {
                Kind::Forward => CUBE_ROWS,
                _ => 2 * variant.cube_rows(),
            };
            // What one group passes to the other: f32 of 64 keys.
            let passed = if variant.is_split() { PASSED * 64 * tile * 4 } else { 0 };
            // 227 KB less barriers and statistics.
            assert!((own + tile * (stages + v_stages)) * variant.dim * 2 + passed <= 225 << 10, "{variant:?}");
            // Contractions take 16 rows at once, swizzled tiles start at multiples of 1024 bytes.
            assert!(tile.is_multiple_of(16) && tile <= 256, "{variant:?}: what wgmma and TMA take");
        }
    }

    #[test]
    fn sections_fill_a_sixth_of_the_cache() {
        let shape = |q_len, heads, kv_heads| Shape {
            rows: Rows::Equal { rows: 4, q_len, kv_len: q_len },
            heads,
            kv_heads,
            head_dim: 128,
            format: FloatFormat::BF16,
        };
        // 1 MiB a head.
        assert_eq!(section(Kind::Forward, &shape(2048, 32, 32), 48 << 20), 8);
        assert_eq!(section(Kind::Queries, &shape(2048, 14, 2), 48 << 20), 14);
        assert_eq!(section(Kind::Keys, &shape(2048, 32, 8), 48 << 20), 2);
        for kind in KINDS {
            assert_eq!(section(kind, &shape(1 << 20, 32, 32), 48 << 20), 1);
        }
    }

    #[test]
    fn the_lightest_tiles_fill_the_end() {
        assert_eq!(light(16, 128, 132), 4);
        assert_eq!(light(16, 32, 132), 8);
        assert_eq!(light(128, 32, 132), 23);
        assert_eq!(light(16, 1, 16), 16);
        assert_eq!(light(1, 8, 8), 1);
    }

    #[test]
    fn only_hopper_with_cuda_13_takes_them() {
        let device = CudaDevice {
            compute_capability: (9, 0),
            multiprocessors: 132,
            l2_bytes: 50 << 20,
            toolkit: (13, 0),
            driver: (13, 1),
        };
        assert!(takes(&device, 256) && takes(&device, 8));
        assert!(!takes(&device, 264));
        for other in [
            CudaDevice { compute_capability: (10, 0), ..device },
            CudaDevice { compute_capability: (8, 9), ..device },
            CudaDevice { toolkit: (12, 9), ..device },
            CudaDevice { driver: (12, 9), ..device },
        ] {
            assert!(!takes(&other, 128), "{other:?}");
        }
    }

    /// Without NVRTC there is nothing to see.
    #[test]
    fn kernels_assemble() {
        for variant in variants() {
            let Some(resources) = cuda_source::assemble(&variant.source(), (9, 0)).unwrap() else { return };
            assert_eq!(resources.cubes(THREADS, 228 << 10), 1, "{variant:?}: {resources:?}");
            assert!(resources.spilled_bytes <= 64, "{variant:?}: {resources:?}");
        }
    }

    #[test]
    fn signatures_are_plain() {
        for variant in variants() {
            let parameters = [9, 11, 10][KINDS.iter().position(|kind| *kind == variant.kind).unwrap()];
            let source = variant.source();
            let at = source.text().find(&format!("{}(", source.name())).unwrap();
            let list = source.text()[at..].split(')').next().unwrap();
            assert_eq!(list.matches(',').count() + 1, parameters, "{variant:?}");
        }
    }
}
