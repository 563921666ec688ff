//! The gated delta rule (Yang et al., 2024, arXiv 2412.06464, equation 10): linear attention whose state of each head, a matrix
//! `[key_dim, value_dim]`, forgets at a learned rate and is corrected by what it gets wrong.
//!
//! ```text
//! S ← exp(g) S      u = beta (v − Sᵀ k)      S ← S + k uᵀ      o = Sᵀ q
//! ```
//!
//! token by token, from zeros at the first token of a row. Heads of values share heads of queries and keys in groups. Scale and
//! normalisation of queries and keys are the caller's.
//!
//! # How
//!
//! By chunks of 64 tokens (Yang et al., 2024, arXiv 2406.06484, and the gated form of the paper above). With `G` the running sums of
//! `g` in a chunk and `D[t, i] = exp(G[t] − G[i])` for `i ≤ t`, the corrections `U` of a chunk behind the state `S` solve
//!
//! ```text
//! (I + L) U = beta (V − exp(G) K S)      L = beta (D ∘ K Kᵀ) below the diagonal
//! ```
//!
//! | kernel | cubes | computes |
//! |---|---|---|
//! | `delta_chunks` | a chunk and head | `A = (I + L)⁻¹`, `P = D ∘ Q Kᵀ`, `W = A beta exp(G) K`, `A beta V` |
//! | `delta_forward` | a row, head and some columns of values | chunk after chunk: `U = A beta V − W S`, `O = exp(G) Q S + P U`, and the next `S` |
//! | `delta_states` | likewise | from the last chunk to the first, the gradients of `U` and of the states |
//! | `delta_gradient` | a chunk and head of keys | all other gradients, over the heads of values that share it |
//!
//! - The state stays in registers as f32 sums of `mma`, 16 dimensions of keys a warp, with a copy of 16 bits in shared memory for
//!   the products with it. Outputs are computed where the state is, so that a forward pass writes no states.
//! - The backward pass runs `delta_chunks` and the walk of `delta_forward` again, which then writes states and corrections:
//!   nothing is kept from the forward pass.
//! - A cube of `delta_gradient` goes through all heads of values of its head of keys, so that nothing is added by atomics: the same
//!   bits on every run.
//! - Rows of generation, which go on from a state by a token or a few, go token by token ([`recurrent()`]), on every runtime.
//! - The inverse is made in f32: blocks of 16 by substitution, then `X ← −X₂₂ L₂₁ X₁₁` between them.
//!
//! # Numerics
//!
//! Sums, states, running sums and exponentials are f32; operands of products are rounded to the 16-bit format, the inverse and `W`
//! among them. Relative error (Frobenius) against f64 of the same operands: 3e-3 to 4e-3 in bf16, which is what one rounding of an
//! operand costs, for outputs and all gradients; 1e-2 to 4e-2 where keys repeat with strength 1 and nearly no decay, since outputs
//! are then small differences. `tests/delta_rule.rs` checks elements.
//!
//! # Measured
//!
//! One H200, bf16, 4 x 2048 with 16 heads of keys and 32 of values: 320 to 370 us forward and 997 to 1,071 for the gradients, where
//! flash-linear-attention's kernels take 430 and 1,463. `docs/src/kernels/delta-rule.md` has more shapes, and what was not done.

pub mod oracle;
mod recurrent;

use bytemuck::{Pod, Zeroable};
use cubecl::client::Client;
use cubecl::server::Handle;
use cuda_source::{Arguments, Source};

pub use recurrent::{Recurrent, Sizes, recurrent};

use crate::elementwise::check_half;
use crate::error::check_size;
use crate::{FloatFormat, KernelError};

const OPERATION: &str = "delta_rule";
/// Dimensions of a head.
const DIM: usize = 128;
/// Tokens of a chunk.
const CHUNK: usize = 64;
/// The most elements of a tensor of all heads.
const MAX_ELEMENTS: usize = u32::MAX as usize;

static SHARED: [&str; 4] = [
    concat!(
        cuda_source::prelude!(),
        cuda_source::tensor_cores!(),
        include_str!("delta_rule/shared.cu"),
        include_str!("delta_rule/chunks.cu")
    ),
    concat!(
        cuda_source::prelude!(),
        cuda_source::tensor_cores!(),
        include_str!("delta_rule/shared.cu"),
        include_str!("delta_rule/forward.cu")
    ),
    concat!(
        cuda_source::prelude!(),
        cuda_source::tensor_cores!(),
        include_str!("delta_rule/shared.cu"),
        include_str!("delta_rule/states.cu")
    ),
    concat!(
        cuda_source::prelude!(),
        cuda_source::tensor_cores!(),
        include_str!("delta_rule/shared.cu"),
        include_str!("delta_rule/gradient.cu")
    ),
];

/// Where rows begin, one after the other: checked, and on the device.
#[derive(Clone, Debug)]
pub struct Rows {
    bounds: Handle,
    count: usize,
    tokens: usize,
    longest: usize,
}

impl Rows {
    /// `bounds` are the first tokens of all rows, from 0 on, and the number of tokens.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when they don't start at 0 or decrease.
    pub fn new(client: &Client, bounds: &[u32]) -> Result<Self, KernelError> {
        let wrong = |reason| Err(KernelError::Shape { operation: OPERATION, reason });
        if bounds.len() < 2 || bounds[0] != 0 {
            return wrong("row bounds start with 0 and end with the number of tokens".into());
        }
        if let Some(pair) = bounds.windows(2).find(|pair| pair[0] > pair[1]) {
            return wrong(format!("row bounds decrease: {} before {}", pair[0], pair[1]));
        }
        let longest = bounds.windows(2).map(|pair| (pair[1] - pair[0]) as usize).max().unwrap_or(0);
        Ok(Self {
            bounds: client.create_from_slice(bytemuck::cast_slice(bounds)),
            count: bounds.len() - 1,
            tokens: bounds[bounds.len() - 1] as usize,
            longest,
        })
    }

    /// Chunks of the longest row.
    fn chunks(&self) -> usize {
        self.longest.div_ceil(CHUNK)
    }

    /// Places for the chunks of all rows.
    fn slots(&self) -> usize {
        self.tokens / CHUNK + self.count + 1
    }
}

/// The heads of a batch.
#[derive(Clone, Debug)]
pub struct Shape {
    /// The batch.
    pub rows: Rows,
    /// Heads of queries and keys, of 128 dimensions.
    pub key_heads: usize,
    /// Heads of values, of 128 dimensions; a multiple of `key_heads`.
    pub value_heads: usize,
    /// Format of queries, keys, values, outputs and their gradients, of 16 bits.
    pub format: FloatFormat,
}

/// Heads of each token: neighbours, with a distance from token to token.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    /// The buffer, from a multiple of 16 bytes on.
    pub handle: &'a Handle,
    /// Elements from token to token, a multiple of 8.
    pub stride: usize,
}

/// What both passes read.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Queries, `[tokens, key_heads, 128]`.
    pub q: Operand<'a>,
    /// Keys, `[tokens, key_heads, 128]`.
    pub k: Operand<'a>,
    /// Values, `[tokens, value_heads, 128]`.
    pub v: Operand<'a>,
    /// Logarithms of what states keep, not above 0; f32, contiguous `[tokens, value_heads]`.
    pub g: &'a Handle,
    /// Strengths of corrections; f32, contiguous `[tokens, value_heads]`.
    pub beta: &'a Handle,
}

/// What [`backward`] writes, all contiguous, each in the shape and format of what it is the gradient of.
#[derive(Clone, Copy, Debug)]
pub struct Gradients<'a> {
    /// Of the queries.
    pub q: &'a Handle,
    /// Of the keys.
    pub k: &'a Handle,
    /// Of the values.
    pub v: &'a Handle,
    /// Of the logarithms.
    pub g: &'a Handle,
    /// Of the strengths.
    pub beta: &'a Handle,
}

/// `struct Params` of `shared.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    heads: u32,
    group: u32,
    q_stride: u32,
    k_stride: u32,
    v_stride: u32,
    o_stride: u32,
    pad: [u32; 2],
}

/// Whether this device runs the kernels for a format and heads of such widths: CUDA, compute capability 9.0 or 10, whose cubes have
/// 168 KB of shared memory, with CUDA 13, whose assembler takes them; both widths 128.
pub fn supports(client: &Client, format: FloatFormat, [key_dim, value_dim]: [usize; 2]) -> bool {
    let has_room = |device: cuda_source::CudaDevice| {
        device.multiplies(format)
            && device.takes_large_static_memory()
            && matches!(device.compute_capability, (9, 0) | (10, _))
    };
    key_dim == DIM && value_dim == DIM && cuda_source::device(client).is_some_and(has_room)
}

/// The kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Chunks,
    Forward { columns: usize, keep: bool },
    States { columns: usize },
    Gradient,
}

impl Kind {
    fn source(self, format: FloatFormat) -> Source {
        let mut defines = vec![format.define()];
        let (file, name, threads) = match self {
            Self::Chunks => (0, "delta_chunks", 256),
            Self::Forward { columns, keep } => {
                defines.extend([("COLUMNS", columns as i64), ("KEEP", i64::from(keep))]);
                (1, "delta_forward", 256)
            }
            Self::States { columns } => {
                defines.push(("COLUMNS", columns as i64));
                (2, "delta_states", 256)
            }
            Self::Gradient => (3, "delta_gradient", 512),
        };
        Source::with_defines(SHARED[file], name, threads, &defines)
    }
}

/// What a pass computes without states.
struct Chunks {
    w: Handle,
    u: Handle,
    p: Handle,
    inverse: Handle,
    sums: Handle,
}

/// A call that was checked.
struct Call<'a> {
    client: &'a Client,
    shape: &'a Shape,
    params: Params,
    /// Columns of values of a cube that carries a state.
    columns: usize,
}

impl<'a> Call<'a> {
    fn new(
        client: &'a Client,
        inputs: &Inputs<'_>,
        (name, out): (&'static str, Operand<'_>),
        shape: &'a Shape,
    ) -> Result<Self, KernelError> {
        let Shape { rows, key_heads, value_heads, format } = shape;
        check_half(client, OPERATION, *format)?;
        if !supports(client, *format, [DIM; 2]) {
            return Err(KernelError::Unsupported { runtime: client.name().to_owned(), operation: OPERATION });
        }
        if *key_heads == 0 || *value_heads == 0 || !value_heads.is_multiple_of(*key_heads) {
            return Err(KernelError::Heads { heads: *value_heads, kv_heads: *key_heads });
        }
        let elements = rows.slots().saturating_mul(value_heads * DIM * DIM);
        if elements > MAX_ELEMENTS {
            return Err(KernelError::TooLarge { name: "states", value: elements, limit: MAX_ELEMENTS });
        }
        let stride = |name, operand: Operand<'_>, heads: usize| {
            let Operand { handle, stride } = operand;
            if !stride.is_multiple_of(8) || stride < heads * DIM {
                let reason = format!(
                    "`{name}` has {stride} elements from token to token; a multiple of 8 is needed, {} or more",
                    heads * DIM
                );
                return Err(KernelError::Shape { operation: OPERATION, reason });
            }
            let offset = handle.offset_start.unwrap_or(0) as usize;
            if !offset.is_multiple_of(16) {
                return Err(KernelError::Alignment { name, offset, size: 16 });
            }
            check_size(
                name,
                handle,
                2 * (rows.tokens.saturating_sub(1) * stride + heads * DIM).min(rows.tokens * stride),
            )?;
            Ok(stride as u32)
        };
        for (name, factor) in [("g", inputs.g), ("beta", inputs.beta)] {
            check_size(name, factor, 4 * rows.tokens * value_heads)?;
        }
        let params = Params {
            heads: *value_heads as u32,
            group: (value_heads / key_heads) as u32,
            q_stride: stride("q", inputs.q, *key_heads)?,
            k_stride: stride("k", inputs.k, *key_heads)?,
            v_stride: stride("v", inputs.v, *value_heads)?,
            o_stride: stride(name, out, *value_heads)?,
            pad: [0; 2],
        };
        let multiprocessors = cuda_source::device(client).map_or(0, |device| device.multiprocessors as usize);
        // Half as many columns where the cubes would leave multiprocessors idle.
        let columns = if 2 * rows.count * value_heads >= multiprocessors { 64 } else { 32 };
        Ok(Self { client, shape, params, columns })
    }

    fn half(&self, elements: usize) -> Handle {
        self.client.empty((2 * elements).max(16))
    }

    fn values(&self) -> usize {
        self.shape.rows.tokens * self.shape.value_heads * DIM
    }

    fn launch(&self, kind: Kind, arguments: Arguments) -> Result<(), KernelError> {
        let Shape { rows, key_heads, value_heads, format } = self.shape;
        let grid = match kind {
            Kind::Chunks => (rows.chunks(), *value_heads),
            Kind::Forward { columns, .. } | Kind::States { columns } => (DIM / columns, *value_heads),
            Kind::Gradient => (rows.chunks(), *key_heads),
        };
        let grid = (grid.0 as u32, grid.1 as u32, rows.count as u32);
        cuda_source::launch(self.client, &kind.source(*format), grid, arguments.params(self.params))
            .map_err(|e| KernelError::Launch { operation: OPERATION, message: e.to_string() })
    }

    fn chunks(&self, inputs: &Inputs<'_>) -> Result<Chunks, KernelError> {
        let values = self.values();
        let chunks = Chunks {
            w: self.half(values),
            u: self.half(values),
            p: self.half(values / 2),
            inverse: self.half(values / 2),
            sums: self.client.empty((4 * values / DIM).max(16)),
        };
        let arguments = Arguments::new().read(inputs.q.handle).read(inputs.k.handle).read(inputs.v.handle);
        let arguments = arguments.read(inputs.g).read(inputs.beta).read(&self.shape.rows.bounds);
        let arguments = arguments.write(&chunks.w).write(&chunks.u).write(&chunks.p).write(&chunks.inverse);
        self.launch(Kind::Chunks, arguments.write(&chunks.sums))?;
        Ok(chunks)
    }

    /// The states of all chunks, one after the other.
    fn states(&self) -> Handle {
        self.half(self.shape.rows.slots() * self.shape.value_heads * DIM * DIM)
    }
}

/// The outputs. Rows of no token have none.
///
/// # Shapes
/// [`Inputs`] has them; `out` as the values.
///
/// # Errors
/// [`KernelError::Unsupported`], and the variants that name the shape, format or buffer that does not fit.
pub fn forward(client: &Client, inputs: Inputs<'_>, out: Operand<'_>, shape: &Shape) -> Result<(), KernelError> {
    let call = Call::new(client, &inputs, ("out", out), shape)?;
    if shape.rows.tokens == 0 {
        return Ok(());
    }
    let Chunks { w, u, p, sums, .. } = call.chunks(&inputs)?;
    let arguments = Arguments::new().read(inputs.q.handle).read(inputs.k.handle).read(&w).read(&u).read(&p).read(&sums);
    // States are not written.
    let arguments = arguments.read(&shape.rows.bounds).write(out.handle).read(&sums);
    call.launch(Kind::Forward { columns: call.columns, keep: false }, arguments)
}

/// The gradients for `d_out`, the gradient of [`forward`]'s outputs: four launches, and scratch of 1,900 bytes for each token and
/// head of values.
///
/// # Shapes
/// [`Inputs`] and [`Gradients`] have them; `d_out` as the values.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    client: &Client,
    inputs: Inputs<'_>,
    d_out: Operand<'_>,
    gradients: Gradients<'_>,
    shape: &Shape,
) -> Result<(), KernelError> {
    let call = Call::new(client, &inputs, ("d_out", d_out), shape)?;
    let Inputs { q, k, v, beta, .. } = inputs;
    let (values, keys) = (call.values(), shape.rows.tokens * shape.key_heads * DIM);
    for (name, handle, bytes) in [
        ("d_q", gradients.q, 2 * keys),
        ("d_k", gradients.k, 2 * keys),
        ("d_v", gradients.v, 2 * values),
        ("d_g", gradients.g, 4 * values / DIM),
        ("d_beta", gradients.beta, 4 * values / DIM),
    ] {
        check_size(name, handle, bytes)?;
    }
    if shape.rows.tokens == 0 {
        return Ok(());
    }
    let (bounds, columns) = (&shape.rows.bounds, call.columns);
    let Chunks { w, u, p, inverse, sums } = call.chunks(&inputs)?;
    let (states, d_states, d_u) = (call.states(), call.states(), call.half(values));
    let arguments = Arguments::new().read(q.handle).read(k.handle).read(&w).read_write(&u).read(&p).read(&sums);
    // Outputs are not written.
    let arguments = arguments.read(bounds).read(&sums).write(&states);
    call.launch(Kind::Forward { columns, keep: true }, arguments)?;
    let arguments = Arguments::new().read(q.handle).read(k.handle).read(&w).read(&p).read(d_out.handle);
    let arguments = arguments.read(&sums).read(bounds).write(&d_u).write(&d_states);
    call.launch(Kind::States { columns }, arguments)?;
    let arguments = Arguments::new().read(q.handle).read(k.handle).read(v.handle).read(beta).read(&inverse);
    let arguments = arguments.read(&u).read(&d_u).read(&states).read(&d_states).read(d_out.handle).read(&sums);
    let arguments = arguments.read(bounds).write(gradients.q).write(gradients.k).write(gradients.v);
    call.launch(Kind::Gradient, arguments.write(gradients.g).write(gradients.beta))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 8] = [
        Kind::Chunks,
        Kind::Forward { columns: 64, keep: false },
        Kind::Forward { columns: 64, keep: true },
        Kind::Forward { columns: 32, keep: false },
        Kind::Forward { columns: 32, keep: true },
        Kind::States { columns: 64 },
        Kind::States { columns: 32 },
        Kind::Gradient,
    ];

    /// The assembler says what a kernel takes of a card. Without NVRTC there is nothing to see.
    #[test]
    fn kernels_fit_the_cards_that_they_are_for() {
        for format in [FloatFormat::BF16, FloatFormat::F16] {
            for kind in KINDS {
                let source = kind.source(format);
                let Some(resources) = cuda_source::assemble(&source, (9, 0)).unwrap() else { return };
                let what = format!("{kind:?} {format:?}: {resources:?}");
                // 227 KB of shared memory for cubes; two of them on a multiprocessor, but for the gradients.
                let cubes = if kind == Kind::Gradient { 1 } else { 2 };
                assert!(resources.cubes(source.cube_dim(), 228 << 10) >= cubes, "{what}");
                assert!(resources.spilled_bytes <= 128, "{what}");
            }
        }
    }
}
