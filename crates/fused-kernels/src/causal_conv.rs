//! The short convolution of linear attention: causal, each channel by itself, with SiLU behind it or without.
//!
//! ```text
//! s[t, c] = sum_j w[j, c] x[t - taps + 1 + j, c]      y = s · sigmoid(s)  or  y = s
//! ```
//!
//! with zeros before a row's first token, so that rows do not see each other. In f32, rounded once. The backward pass
//! reads `dy` and `x`, computes `s` again, and writes `dx`; the weight is frozen and has no gradient.
//!
//! A unit does a vector of channels of one token. Of the `taps` tokens that it reads all but one lie in the cache, so memory
//! moves 4 bytes an element of 16 bits forward and 6 backward.

use std::ops::Range;
use std::sync::Arc;

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::KernelError;
use crate::elementwise::{Matrix, UNITS, buffer, check_format, cube_count, vector_size};
use crate::gated::{Activation, activate, slope};

const OPERATION: &str = "causal_conv";
/// The longest filter.
pub const MAX_TAPS: usize = 16;

/// How a convolution runs over its tokens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Conv {
    /// Tokens of a row; of all rows, where they are packed.
    pub len: usize,
    /// Tokens that an output looks at, itself included.
    pub taps: usize,
    /// First tokens of rows of different lengths, one after the other, from 0 on, and the number of tokens.
    pub packed: Option<Arc<[u32]>>,
    /// Whether SiLU is behind it.
    pub silu: bool,
}

impl Conv {
    /// Over rows of `len` tokens, with SiLU behind it.
    pub fn new(len: usize, taps: usize) -> Self {
        Self { len, taps, packed: None, silu: true }
    }

    /// The tokens of the row that has `token`.
    pub fn row(&self, token: usize) -> Range<usize> {
        match &self.packed {
            None => {
                let first = token - token % self.len;
                first..first + self.len
            }
            Some(bounds) => {
                let row = bounds.partition_point(|first| *first as usize <= token);
                bounds[row - 1] as usize..bounds[row] as usize
            }
        }
    }

    /// The rows of `tokens` tokens, in order.
    pub fn rows(&self, tokens: usize) -> impl Iterator<Item = Range<usize>> {
        let mut first = 0;
        std::iter::from_fn(move || {
            let row = (first < tokens).then(|| self.row(first))?;
            first = row.end;
            Some(row)
        })
    }
}

/// Buffers of [`forward`].
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// `[tokens, channels]`, rows one after the other.
    pub x: &'a Handle,
    /// f32 `[taps, channels]`; the last tap is the token's own.
    pub weight: &'a Handle,
    /// As `x`, which this writes.
    pub out: &'a Handle,
}

/// Buffers of [`backward`].
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a> {
    /// The gradient of the output.
    pub dy: &'a Handle,
    /// As in [`forward`].
    pub x: &'a Handle,
    /// As in [`forward`].
    pub weight: &'a Handle,
    /// The gradient of `x`, which this writes.
    pub dx: &'a Handle,
}

/// The shape of a launch: its vectors of channels.
fn vector(client: &Client, tokens: Matrix, conv: &Conv) -> Result<usize, KernelError> {
    check_format(client, OPERATION, tokens.format)?;
    let wrong = |reason| Err(KernelError::Shape { operation: OPERATION, reason });
    if let Some(bounds) = &conv.packed {
        let covers = bounds.first() == Some(&0) && bounds.last().is_some_and(|last| *last as usize == tokens.rows);
        if !covers || !bounds.is_sorted() {
            return wrong(format!("row bounds {bounds:?} don't cover {} tokens", tokens.rows));
        }
    }
    if conv.len == 0 || !tokens.rows.is_multiple_of(conv.len) {
        return wrong(format!("{} tokens are no whole rows of {}", tokens.rows, conv.len));
    }
    if !(1..=MAX_TAPS).contains(&conv.taps) {
        return wrong(format!("{} taps; 1 to {MAX_TAPS} are supported", conv.taps));
    }
    Ok(vector_size(client, tokens.format, &[tokens.width]))
}

/// Where rows begin, for the kernels. Rows of one length have no bounds, and nothing is read of what stands there instead.
fn bounds(client: &Client, conv: &Conv, instead: &Handle) -> Result<BufferArg, KernelError> {
    match &conv.packed {
        Some(bounds) => {
            let handle = client.create_from_slice(bytemuck::cast_slice(bounds));
            buffer("bounds", &handle, bounds.len(), 4, 1)
        }
        None => buffer("weight", instead, 1, 4, 1),
    }
}

/// What the kernels do with vectors of `vector` channels.
fn work(tokens: Matrix, vector: usize, conv: &Conv) -> WorkLaunch {
    let rows = conv.packed.as_ref().map_or(0, |bounds| bounds.len() - 1);
    let vectors = tokens.elements() / vector;
    WorkLaunch::new(vectors, tokens.width / vector, conv.len, rows, conv.taps, conv.packed.is_some(), conv.silu)
}

/// `out = silu(conv(x))`. `tokens` is the shape of `x`.
///
/// # Shapes
/// [`Forward`] has them.
///
/// # Errors
/// [`KernelError::Format`], [`KernelError::Shape`] for tokens that are no whole rows or a filter too long, and the variants
/// about sizes when a buffer does not hold its shape.
pub fn forward(client: &Client, buffers: Forward<'_>, tokens: Matrix, conv: &Conv) -> Result<(), KernelError> {
    let vector = vector(client, tokens, conv)?;
    let (elements, size) = (tokens.elements(), tokens.format.size());
    let (x, out) =
        (buffer("x", buffers.x, elements, size, vector)?, buffer("out", buffers.out, elements, size, vector)?);
    let weight = buffer("weight", buffers.weight, conv.taps * tokens.width, 4, 1)?;
    if elements == 0 {
        return Ok(());
    }
    let bounds = bounds(client, conv, buffers.weight)?;
    let vectors = elements / vector;
    // SAFETY: the buffers' sizes are checked, and the kernel stays within `vectors` and each row.
    unsafe {
        forward_kernel::launch_unchecked(
            client,
            cube_count(client, vectors.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            vector,
            x,
            weight,
            bounds,
            out,
            work(tokens, vector, conv),
            tokens.format.elem_type(),
        );
    }
    Ok(())
}

/// The gradient of [`forward`]'s `x`.
///
/// # Shapes
/// [`Backward`] has them.
///
/// # Errors
/// As [`forward`].
pub fn backward(client: &Client, buffers: Backward<'_>, tokens: Matrix, conv: &Conv) -> Result<(), KernelError> {
    let vector = vector(client, tokens, conv)?;
    let elements = tokens.elements();
    let argument = |name, handle| buffer(name, handle, elements, tokens.format.size(), vector);
    let (dy, x, dx) = (argument("dy", buffers.dy)?, argument("x", buffers.x)?, argument("dx", buffers.dx)?);
    let weight = buffer("weight", buffers.weight, conv.taps * tokens.width, 4, 1)?;
    if elements == 0 {
        return Ok(());
    }
    let bounds = bounds(client, conv, buffers.weight)?;
    let vectors = elements / vector;
    // SAFETY: as in `forward`.
    unsafe {
        backward_kernel::launch_unchecked(
            client,
            cube_count(client, vectors.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            vector,
            dy,
            x,
            weight,
            bounds,
            dx,
            work(tokens, vector, conv),
            tokens.format.elem_type(),
        );
    }
    Ok(())
}

/// What the kernels do, a vector a unit.
#[derive(CubeType, CubeLaunch)]
struct Work {
    vectors: usize,
    /// Vectors of a token.
    width: usize,
    /// Tokens of a row, where rows have one length.
    len: usize,
    /// Rows, where they are packed.
    rows: usize,
    #[cube(comptime)]
    taps: usize,
    #[cube(comptime)]
    packed: bool,
    #[cube(comptime)]
    silu: bool,
}

/// The row of a token.
#[cube]
fn row_of(token: usize, bounds: &[u32], work: &Work) -> usize {
    let mut low = 0;
    if comptime!(work.packed) {
        let mut high = work.rows;
        while low + 1 < high {
            let middle = (low + high) / 2;
            if bounds[middle] as usize <= token {
                low = middle;
            } else {
                high = middle;
            }
        }
    } else {
        low = token / work.len;
    }
    low
}

/// Where a row begins.
#[cube]
fn first_of(row: usize, bounds: &[u32], work: &Work) -> usize {
    let mut first = row * work.len;
    if comptime!(work.packed) {
        first = bounds[row] as usize;
    }
    first
}

/// The sum before the activation, at the vector `index` of a token that has `position` in its row.
#[cube]
fn filtered<F: Float, N: Size>(
    x: &[Vector<F, N>],
    weight: &[f32],
    index: usize,
    position: usize,
    width: usize,
    #[comptime] taps: usize,
) -> Vector<f32, N> {
    let vector = N::value().comptime();
    let channel = index % width * vector;
    let mut sum = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for back in 0..taps {
        if position >= back {
            let value = x[index - back * width];
            let first = (taps - 1 - back) * width * vector + channel;
            #[unroll]
            for i in 0..vector {
                sum.insert(i, sum.extract(i) + weight[first + i] * f32::cast_from(value.extract(i)));
            }
        }
    }
    sum
}

#[cube(launch_unchecked)]
fn forward_kernel<F: Float, N: Size>(
    x: &[Vector<F, N>],
    weight: &[f32],
    bounds: &[u32],
    out: &mut [Vector<F, N>],
    work: &Work,
    #[define(F)] _format: ElemType,
) {
    let index = ABSOLUTE_POS;
    if index < work.vectors {
        let token = index / work.width;
        let position = token - first_of(row_of(token, bounds, work), bounds, work);
        let sum = filtered::<F, N>(x, weight, index, position, work.width, work.taps);
        let mut y = Vector::<F, N>::empty();
        #[unroll]
        for i in 0..N::value().comptime() {
            let mut value = sum.extract(i);
            if comptime!(work.silu) {
                value = activate(value, comptime!(Activation::Silu));
            }
            y.insert(i, F::cast_from(value));
        }
        out[index] = y;
    }
}

#[cube(launch_unchecked)]
fn backward_kernel<F: Float, N: Size>(
    dy: &[Vector<F, N>],
    x: &[Vector<F, N>],
    weight: &[f32],
    bounds: &[u32],
    dx: &mut [Vector<F, N>],
    work: &Work,
    #[define(F)] _format: ElemType,
) {
    let vector = N::value().comptime();
    let taps = comptime!(work.taps);
    let index = ABSOLUTE_POS;
    if index < work.vectors {
        let (width, token) = (work.width, index / work.width);
        let row = row_of(token, bounds, work);
        let (position, left) = (token - first_of(row, bounds, work), first_of(row + 1, bounds, work) - token);
        let channel = index % width * vector;
        let mut gradient = Vector::<f32, N>::new(0.0f32);
        #[unroll]
        for ahead in 0..taps {
            if ahead < left {
                let later = index + ahead * width;
                let d = dy[later];
                let mut slopes = Vector::<f32, N>::new(1.0f32);
                if comptime!(work.silu) {
                    let sum = filtered::<F, N>(x, weight, later, position + ahead, width, taps);
                    #[unroll]
                    for i in 0..vector {
                        slopes.insert(i, slope(sum.extract(i), comptime!(Activation::Silu)));
                    }
                }
                let first = (taps - 1 - ahead) * width * vector + channel;
                #[unroll]
                for i in 0..vector {
                    let part = f32::cast_from(d.extract(i)) * slopes.extract(i);
                    gradient.insert(i, gradient.extract(i) + weight[first + i] * part);
                }
            }
        }
        let mut written = Vector::<F, N>::empty();
        #[unroll]
        for i in 0..vector {
            written.insert(i, F::cast_from(gradient.extract(i)));
        }
        dx[index] = written;
    }
}

/// The scalar oracle, in f64, of `x` `[tokens, channels]` and a weight `[taps, channels]`.
pub mod oracle {
    use super::Conv;

    /// The sums before the activation.
    fn sums(x: &[f64], weight: &[f64], channels: usize, conv: &Conv) -> Vec<f64> {
        let mut sums = vec![0.0; x.len()];
        for (index, sum) in sums.iter_mut().enumerate() {
            let (token, channel) = (index / channels, index % channels);
            for back in 0..conv.taps.min(token - conv.row(token).start + 1) {
                *sum += weight[(conv.taps - 1 - back) * channels + channel] * x[index - back * channels];
            }
        }
        sums
    }

    /// The output.
    pub fn forward(x: &[f64], weight: &[f64], channels: usize, conv: &Conv) -> Vec<f64> {
        let activated = |s: f64| if conv.silu { s / (1.0 + (-s).exp()) } else { s };
        sums(x, weight, channels, conv).into_iter().map(activated).collect()
    }

    /// The gradient of `x`.
    pub fn backward(dy: &[f64], x: &[f64], weight: &[f64], channels: usize, conv: &Conv) -> Vec<f64> {
        let mut dx = vec![0.0; x.len()];
        for (index, s) in sums(x, weight, channels, conv).into_iter().enumerate() {
            let sigmoid = 1.0 / (1.0 + (-s).exp());
            let slope = if conv.silu { sigmoid * (1.0 + s * (1.0 - sigmoid)) } else { 1.0 };
            let gradient = dy[index] * slope;
            let (token, channel) = (index / channels, index % channels);
            for back in 0..conv.taps.min(token - conv.row(token).start + 1) {
                dx[index - back * channels] += gradient * weight[(conv.taps - 1 - back) * channels + channel];
            }
        }
        dx
    }
}
