//! Causal attention whose scores never reach memory: FlashAttention-2 (Dao, 2023, arXiv 2307.08691), and on Hopper
//! FlashAttention-3 (Shah et al., 2024, arXiv 2407.08608).
//!
//! Per head of the queries, with the key head that its group shares (GQA):
//!
//! `S = scale · Q Kᵀ` (or `cap · tanh(S / cap)`), `P = softmax(S)` over the keys that a query sees, `O = P V`
//!
//! A query sees itself and what came before it in its row, or of that the last `window` ([`Options`]). Rows are of one
//! length, or lie one after the other with any lengths ([`Rows`]); no mask exists. Queries may be the last of longer
//! rows of keys, as in generation.
//!
//! A query head may have a sink (Xiao et al., 2024, arXiv 2309.17453): a logit that joins the softmax's sum and has no value, so
//! that weights may sum to less than 1. It comes in at the end of the forward pass, which multiplies the output by
//! `exp(lse) / (exp(lse) + exp(sink))` and leaves `log(exp(lse) + exp(sink))`. The gradients of `q`, `k` and `v` are those of the same
//! kernels for that output and that `lse`; the sinks have none.
//!
//! # Work
//!
//! With `pairs` the visible pairs of query and key, about `len² / 2` per row: a forward pass does `4 · head_dim`
//! operations per pair and head, a backward pass `14 · head_dim`: the scores and `dO Vᵀ` are computed twice, once for
//! dK and dV and once for dQ, against `10 · head_dim` of kernels that add dQ up with atomics, in another order on every
//! run. Memory sees each operand and result, plus `lse` (f32 per query and head) and, in the backward pass, as much
//! again: at a length of 2048 that is some thousand operations per byte, so tensor cores and what feeds them are the
//! bound.
//!
//! # How
//!
//! Two families of kernels compute the same ([`Path`]): `mma` from compute capability 8.0 on (with f16 from 7.5 on), and wgmma on 9.0 for
//! more than a few queries (`attention/hopper.rs` describes those). `FUSED_KERNELS_ATTENTION`
//! forces one: `mma` or `hopper`. Those for `mma`:
//!
//! - A cube of four warps owns 64 queries (forward, dQ) or 64 keys (dK, dV), 16 per warp, and holds their operands in
//!   registers as `mma` wants them, with the sums. Forward, heads up to 64 have 32 queries per warp; in the backward pass, where
//!   registers do not suffice for wide heads, two warps share 16 rows. The other side passes through a ring of tiles in shared
//!   memory, filled by `cp.async` with one barrier per tile. Chunks of 16 bytes are permuted by XOR, so that `ldmatrix` meets
//!   no bank conflict. 48 KB hold everything.
//! - What `mma` leaves is already in the order of its next first operand, so probabilities stay in registers. dK and dV
//!   compute scores with keys as rows for the same reason.
//! - Gradients take the products in the order in which arithmetic hides under them: scores, dO Vᵀ under which P is computed,
//!   dV under which dS is, then dK. `lse` and `delta` come with the tiles.
//! - Softmax runs online, in f32 and powers of two, with the scale folded into the exponent. The backward pass takes
//!   `lse` instead and needs no maximum.
//! - Tiles that no query sees are skipped: those after the diagonal and those before the window. The heaviest tiles are
//!   started first.
//! - A cube of dK and dV goes through all query heads of its group, so that nothing is added by atomics: the same bits
//!   on every run.
//!
//! Operands and results have strides ([`Strides`]): token-major as projections write them, head-major as a cache may
//! be, or parts of one fused buffer.
//!
//! # Numerics
//!
//! Scores, softmax and all sums are f32. P and dS are rounded to the 16-bit format for their products, O and the
//! gradients once at the end; P is not normalised before it is rounded. The error against f64 is that of a computation
//! which stores P and dS in the 16-bit format; `tests/attention.rs` compares elements with it.
//!
//! # Measured
//!
//! One H100, bf16, causal, 4 x 2048 with 32 heads of 128, TFLOP/s (the gradients counted as five products): wgmma 557
//! forward and 415 for the gradients; `mma` 262 and 202, where torch's FlashAttention-2, of `mma` too, has 285 and 213.
//! With 16 heads of 256, wgmma 588 and 399, torch (cuDNN) 553 and 312. `docs/src/kernels/attention.md` has more shapes.
//!
//! # What was not done
//!
//! - `mma` on the cards that it is for: it was measured on an H100 alone.
//! - Splitting keys between cubes: a single query over a long cache uses one cube per head.
//! - Heads that are no multiple of 8 wide.

mod hopper;
pub mod oracle;
mod plan;

pub use plan::{Path, paths};

use bytemuck::{Pod, Zeroable};
use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::Arguments;

use crate::elementwise::check_half;
use crate::error::check_size;
use crate::{FloatFormat, KernelError};
use plan::{Kind, Variant};

const OPERATION: &str = "attention";
/// The most tokens of all rows together.
const MAX_TOKENS: usize = 1 << 30;
/// A window that no row is longer than.
const NO_WINDOW: u32 = 1 << 31;

/// What differs between models.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Of the scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// How many keys a query sees at most, itself counted.
    pub window: Option<usize>,
    /// The cap of `cap · tanh(score / cap)`.
    pub softcap: Option<f32>,
}

/// Where rows begin when they lie one after the other: checked, and on the device.
#[derive(Clone, Debug)]
pub struct PackedRows {
    bounds: Handle,
    rows: usize,
    tokens: usize,
    longest: usize,
}

impl PackedRows {
    /// `bounds` are the first tokens of all rows, from 0 on, and the number of tokens. Padding is a row too.
    ///
    /// # Errors
    /// [`KernelError::Attention`] when they don't start at 0 or decrease, [`KernelError::TooLarge`].
    pub fn new(client: &Client, bounds: &[u32]) -> Result<Self, KernelError> {
        let wrong = |value: String, reason| Err(KernelError::Attention { name: "row bounds", value, reason });
        if bounds.len() < 2 || bounds[0] != 0 {
            return wrong(format!("{:?}", bounds.first()), "they start with 0 and end with the number of tokens");
        }
        if let Some(pair) = bounds.windows(2).find(|pair| pair[0] > pair[1]) {
            return wrong(format!("{} before {}", pair[0], pair[1]), "they must not decrease");
        }
        let tokens = bounds[bounds.len() - 1] as usize;
        check_limit("tokens", tokens, MAX_TOKENS)?;
        let longest = bounds.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(0);
        let handle = client.create_from_slice(bytemuck::cast_slice(bounds));
        Ok(Self { bounds: handle, rows: bounds.len() - 1, tokens, longest })
    }

    /// Tokens of all rows.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

/// How the batch divides into rows, none of which sees another.
#[derive(Clone, Debug)]
pub enum Rows {
    /// All of one length.
    Equal {
        /// Their number.
        rows: usize,
        /// Queries of each: the last of its tokens.
        q_len: usize,
        /// Keys of each.
        kv_len: usize,
    },
    /// Of any lengths, each query with its key.
    Packed(PackedRows),
}

impl Rows {
    fn count(&self) -> usize {
        match self {
            Self::Equal { rows, .. } => *rows,
            Self::Packed(packed) => packed.rows,
        }
    }

    /// Queries of all rows.
    pub fn queries(&self) -> usize {
        match self {
            Self::Equal { rows, q_len, .. } => rows * q_len,
            Self::Packed(packed) => packed.tokens,
        }
    }

    /// Queries and keys of the longest row.
    fn longest(&self) -> (usize, usize) {
        match self {
            Self::Equal { q_len, kv_len, .. } => (*q_len, *kv_len),
            Self::Packed(packed) => (packed.longest, packed.longest),
        }
    }
}

/// The dimensions of one attention.
#[derive(Clone, Debug)]
pub struct Shape {
    /// The batch.
    pub rows: Rows,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, a divisor of `heads`.
    pub kv_heads: usize,
    /// Dimensions of a head, a multiple of 8 up to 256.
    pub head_dim: usize,
    /// Format of operands and results, of 16 bits.
    pub format: FloatFormat,
}

impl Shape {
    /// Rows, tokens of each and heads of a side as its buffers have them.
    fn extent(&self, side: Side) -> (usize, usize, usize) {
        let heads = if side == Side::Keys { self.kv_heads } else { self.heads };
        match (&self.rows, side) {
            (Rows::Equal { rows, q_len, .. }, Side::Queries) => (*rows, *q_len, heads),
            (Rows::Equal { rows, kv_len, .. }, Side::Keys) => (*rows, *kv_len, heads),
            (Rows::Packed(packed), _) => (1, packed.tokens, heads),
        }
    }
}

/// Elements from one row of the batch, token and head to the next, multiples of 8. The dimensions of a head are
/// neighbours. Packed rows have no row stride: their tokens follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strides {
    /// To the next row.
    pub row: usize,
    /// To the next token.
    pub token: usize,
    /// To the next head.
    pub head: usize,
}

impl Strides {
    /// Contiguous `[rows, len, heads, head_dim]`: what a projection writes.
    pub fn token_major(len: usize, heads: usize, head_dim: usize) -> Self {
        Self { row: len * heads * head_dim, token: heads * head_dim, head: head_dim }
    }
}

/// A buffer and how heads lie in it.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    /// The buffer, of the shape's format, from a multiple of 16 bytes on.
    pub handle: &'a Handle,
    /// Its strides.
    pub strides: Strides,
}

/// `Strides` of `shape.cu`.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct DeviceStrides {
    row: u32,
    token: u32,
    head: u32,
}

/// `struct Params` of `shape.cu`.
#[repr(C)]
#[derive(Clone, Copy, Default, Pod, Zeroable)]
struct Params {
    q: DeviceStrides,
    k: DeviceStrides,
    v: DeviceStrides,
    o: DeviceStrides,
    d_out: DeviceStrides,
    d_q: DeviceStrides,
    d_k: DeviceStrides,
    d_v: DeviceStrides,
    rows: u32,
    heads: u32,
    group: u32,
    head_dim: u32,
    q_len: u32,
    kv_len: u32,
    tokens: u32,
    window: u32,
    packed: u32,
    tiles: u32,
    scale: f32,
    scale_log2: f32,
    cap_scale: f32,
    section: u32,
    light: u32,
    sinks: u32,
}

impl Params {
    /// Of a shape that was checked: everything fits.
    fn new(shape: &Shape, options: Options) -> Self {
        let (q_len, kv_len) = shape.rows.longest();
        Self {
            rows: shape.rows.count() as u32,
            heads: shape.heads as u32,
            group: (shape.heads / shape.kv_heads) as u32,
            head_dim: shape.head_dim as u32,
            q_len: q_len as u32,
            kv_len: kv_len as u32,
            tokens: shape.rows.queries() as u32,
            window: options.window.map_or(NO_WINDOW, |window| window.min(NO_WINDOW as usize) as u32),
            packed: u32::from(matches!(shape.rows, Rows::Packed(_))),
            scale: options.scale,
            scale_log2: options.softcap.unwrap_or(options.scale) * std::f32::consts::LOG2_E,
            cap_scale: options.softcap.map_or(0.0, |cap| options.scale / cap),
            ..Self::default()
        }
    }
}

/// Whether this device runs the kernels for operands of a format: CUDA, compute capability 8.0 or later, and 7.5 for f16.
pub fn supports(client: &Client, format: FloatFormat) -> bool {
    cuda_source::device(client).is_some_and(|device| device.multiplies(format))
}

/// Whether there are kernels for heads of that many dimensions.
pub fn supports_head_dim(head_dim: usize) -> bool {
    head_dim.is_multiple_of(8) && (8..=256).contains(&head_dim)
}

/// Operands and results of [`forward`].
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// Queries, `[rows, q_len, heads, head_dim]` by their strides.
    pub q: Operand<'a>,
    /// Keys, `[rows, kv_len, kv_heads, head_dim]` by their strides.
    pub k: Operand<'a>,
    /// Values, in the shape of the keys.
    pub v: Operand<'a>,
    /// f32 `[heads]`: the sink of each query head, if they have some.
    pub sinks: Option<&'a Handle>,
    /// The output, in the shape of the queries, which this writes.
    pub o: Operand<'a>,
    /// Log-sum-exp of each query's scores, f32, contiguous `[heads, queries of all rows]`, which this writes.
    pub lse: &'a Handle,
}

/// `o = softmax(scale · q kᵀ) v`, and what [`backward`] needs of the softmax.
///
/// # Shapes
/// [`Forward`] has them.
///
/// # Errors
/// [`KernelError::Unsupported`], and the variants that name the shape, format, option or buffer that does not fit.
pub fn forward(client: &Client, operands: Forward<'_>, shape: &Shape, options: Options) -> Result<(), KernelError> {
    let Forward { q, k, v, .. } = operands;
    forward_on(client, plan::path(client, shape, &[q, k, v]), operands, shape, options)
}

/// As [`forward`], by kernels of the caller's choice among [`paths`].
///
/// # Errors
/// As [`forward`]; [`KernelError::Launch`] where they don't take the operands.
pub fn forward_on(
    client: &Client,
    path: Path,
    operands: Forward<'_>,
    shape: &Shape,
    options: Options,
) -> Result<(), KernelError> {
    check(client, shape, options)?;
    let Forward { q, k, v, sinks, o, lse } = operands;
    let mut params = Params::new(shape, options);
    params.q = check_operand("q", q, shape, Side::Queries)?;
    params.k = check_operand("k", k, shape, Side::Keys)?;
    params.v = check_operand("v", v, shape, Side::Keys)?;
    params.o = check_operand("o", o, shape, Side::Queries)?;
    check_statistics("lse", lse, shape, shape.rows.queries())?;
    if let Some(sinks) = sinks {
        check_statistics("sinks", sinks, shape, 1)?;
        params.sinks = 1;
    }
    let bounds = bounds(shape, q);
    if path == Path::Hopper {
        return hopper::Call { client, shape, options, params, bounds }.forward(&operands);
    }
    let arguments = Arguments::new().read(q.handle).read(k.handle).read(v.handle).read(bounds);
    let arguments = arguments.read(sinks.unwrap_or(bounds)).write(o.handle).write(lse);
    launch(client, Kind::Forward, shape, options, arguments, params)
}

/// Operands, results and gradients of [`backward`].
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a> {
    /// As in [`forward`].
    pub q: Operand<'a>,
    /// As in [`forward`].
    pub k: Operand<'a>,
    /// As in [`forward`].
    pub v: Operand<'a>,
    /// As [`forward`] left it.
    pub o: Operand<'a>,
    /// As [`forward`] left it.
    pub lse: &'a Handle,
    /// The gradient of `o`.
    pub d_out: Operand<'a>,
    /// The gradient of `q`, which this writes.
    pub d_q: Operand<'a>,
    /// The gradient of `k`, which this writes.
    pub d_k: Operand<'a>,
    /// The gradient of `v`, which this writes.
    pub d_v: Operand<'a>,
}

/// The gradients of `q`, `k` and `v`: three launches, and 4 bytes of scratch per query and head.
///
/// # Shapes
/// `d_out`, `d_q` as `q`; `d_k`, `d_v` as `k`: the same dimensions, each with its strides.
///
/// # Errors
/// As [`forward`].
pub fn backward(client: &Client, operands: Backward<'_>, shape: &Shape, options: Options) -> Result<(), KernelError> {
    let Backward { q, k, v, d_out, .. } = operands;
    backward_on(client, plan::path(client, shape, &[q, k, v, d_out]), operands, shape, options)
}

/// As [`backward`], by kernels of the caller's choice among [`paths`]. They need not be those of the forward pass.
///
/// # Errors
/// As [`backward`]; [`KernelError::Launch`] where they don't take the operands.
pub fn backward_on(
    client: &Client,
    path: Path,
    operands: Backward<'_>,
    shape: &Shape,
    options: Options,
) -> Result<(), KernelError> {
    check(client, shape, options)?;
    let Backward { q, k, v, o, lse, d_out, d_q, d_k, d_v } = operands;
    let mut params = Params::new(shape, options);
    params.q = check_operand("q", q, shape, Side::Queries)?;
    params.k = check_operand("k", k, shape, Side::Keys)?;
    params.v = check_operand("v", v, shape, Side::Keys)?;
    params.o = check_operand("o", o, shape, Side::Queries)?;
    params.d_out = check_operand("d_out", d_out, shape, Side::Queries)?;
    params.d_q = check_operand("d_q", d_q, shape, Side::Queries)?;
    params.d_k = check_operand("d_k", d_k, shape, Side::Keys)?;
    params.d_v = check_operand("d_v", d_v, shape, Side::Keys)?;
    check_statistics("lse", lse, shape, shape.rows.queries())?;

    let delta = client.empty((shape.heads * shape.rows.queries() * 4).max(4));
    let bounds = bounds(shape, q);
    let arguments = Arguments::new().read(o.handle).read(d_out.handle).read(bounds).write(&delta);
    launch(client, Kind::Delta, shape, options, arguments, params)?;
    if path == Path::Hopper {
        return hopper::Call { client, shape, options, params, bounds }.backward(&operands, &delta);
    }
    let inputs = || {
        let operands = Arguments::new().read(q.handle).read(k.handle).read(v.handle).read(bounds);
        operands.read(d_out.handle).read(lse).read(&delta)
    };
    launch(client, Kind::Keys, shape, options, inputs().write(d_k.handle).write(d_v.handle), params)?;
    launch(client, Kind::Queries, shape, options, inputs().write(d_q.handle), params)
}

/// The row bounds, or some buffer in their place that the kernels don't look at.
fn bounds<'a>(shape: &'a Shape, otherwise: Operand<'a>) -> &'a Handle {
    match &shape.rows {
        Rows::Packed(packed) => &packed.bounds,
        Rows::Equal { .. } => otherwise.handle,
    }
}

fn launch(
    client: &Client,
    kind: Kind,
    shape: &Shape,
    options: Options,
    arguments: Arguments,
    mut params: Params,
) -> Result<(), KernelError> {
    let variant = Variant::new(kind, shape.head_dim, options.softcap.is_some(), shape.format);
    let (queries, keys) = shape.rows.longest();
    let tiles = if kind == Kind::Keys { keys } else { queries }.div_ceil(variant.cube_rows());
    let cubes = match kind {
        Kind::Delta => (shape.rows.queries() * shape.heads).div_ceil(variant.pairs()),
        Kind::Keys => tiles * shape.kv_heads * shape.rows.count(),
        Kind::Forward | Kind::Queries => tiles * shape.heads * shape.rows.count(),
    };
    check_limit("tiles of all heads and rows", cubes, i32::MAX as usize)?;
    if cubes == 0 {
        return Ok(());
    }
    params.tiles = tiles as u32;
    cuda_source::launch(client, &variant.source(), (cubes as u32, 1, 1), arguments.params(params))
        .map_err(|e| KernelError::Launch { operation: OPERATION, message: e.to_string() })
}

fn check_limit(name: &'static str, value: usize, limit: usize) -> Result<(), KernelError> {
    if value > limit { Err(KernelError::TooLarge { name, value, limit }) } else { Ok(()) }
}

fn check(client: &Client, shape: &Shape, options: Options) -> Result<(), KernelError> {
    check_half(client, OPERATION, shape.format)?;
    if !supports(client, shape.format) {
        return Err(KernelError::Unsupported { runtime: client.name().to_owned(), operation: OPERATION });
    }
    if !supports_head_dim(shape.head_dim) {
        return Err(KernelError::HeadDim(shape.head_dim));
    }
    let &Shape { heads, kv_heads, .. } = shape;
    if kv_heads == 0 || heads == 0 || !heads.is_multiple_of(kv_heads) {
        return Err(KernelError::Heads { heads, kv_heads });
    }
    let wrong = |name, value: String, reason| Err(KernelError::Attention { name, value, reason });
    if let Rows::Equal { rows, q_len, kv_len } = shape.rows {
        if q_len > kv_len {
            return wrong("q_len", q_len.to_string(), "each query has a key: kv_len is at least as large");
        }
        check_limit("tokens", rows.saturating_mul(kv_len), MAX_TOKENS)?;
    }
    check_limit("statistics of queries and heads", shape.rows.queries().saturating_mul(heads), u32::MAX as usize)?;
    let positive = |x: f32| x.is_finite() && x > 0.0;
    if !positive(options.scale) {
        return wrong("scale", options.scale.to_string(), "it must be positive");
    }
    match options {
        Options { softcap: Some(cap), .. } if !positive(cap) => {
            wrong("softcap", cap.to_string(), "it must be positive")
        }
        Options { window: Some(0), .. } => wrong("window", "0".to_owned(), "a query sees itself at least"),
        _ => Ok(()),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Queries,
    Keys,
}

/// The strides for the device, if the buffer holds every element that they reach.
fn check_operand(
    name: &'static str,
    operand: Operand<'_>,
    shape: &Shape,
    side: Side,
) -> Result<DeviceStrides, KernelError> {
    let Operand { handle, strides: Strides { row, token, head } } = operand;
    let (rows, len, heads) = shape.extent(side);
    for stride in [row, token, head] {
        if !stride.is_multiple_of(8) {
            return Err(KernelError::Attention {
                name,
                value: format!("has a stride of {stride}"),
                reason: "rows, tokens and heads start at multiples of 8 elements",
            });
        }
        check_limit("stride", stride, u32::MAX as usize)?;
    }
    let offset = handle.offset_start.unwrap_or(0) as usize;
    if !offset.is_multiple_of(16) {
        return Err(KernelError::Alignment { name, offset, size: 16 });
    }
    let elements = match rows * len {
        0 => 0,
        _ => (rows - 1) * row + (len - 1) * token + (heads - 1) * head + shape.head_dim,
    };
    check_size(name, handle, 2 * elements)?;
    Ok(DeviceStrides { row: row as u32, token: token as u32, head: head as u32 })
}

/// f32 of each head, and of this many of its queries.
fn check_statistics(name: &'static str, handle: &Handle, shape: &Shape, queries: usize) -> Result<(), KernelError> {
    check_size(name, handle, 4 * shape.heads * queries)?;
    match handle.offset_start.unwrap_or(0) as usize {
        offset if !offset.is_multiple_of(4) => Err(KernelError::Alignment { name, offset, size: 4 }),
        _ => Ok(()),
    }
}
