//! The middle of a gated MLP: `y = activation(gate) · up` (Shazeer, 2020, arXiv 2002.05202), element by element. With
//! [`Activation::ClampedSwish`] it is `activation(gate) · (clamp(up) + 1)`.
//!
//! Computed in f32 and rounded once. The backward pass reads `dy`, `gate` and `up` and writes both gradients, so
//! nothing is kept but the two inputs:
//!
//! ```text
//! dgate = dy · up · activation'(gate)      dup = dy · activation(gate)
//! ```
//!
//! Bytes per element of 16 bits: 6 forward, 10 backward; some tens of operations, so memory is the bound. Out of
//! stock operations without fusion it is four to six passes each way, casts among them.

use std::f32::consts::FRAC_1_SQRT_2;

use cubecl::client::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use cubecl::server::Handle;

use crate::elementwise::{UNITS, buffer, check_format, cube_count, vector_size};
use crate::{FloatFormat, KernelError};

const OPERATION: &str = "gated";

/// The function of the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x · sigmoid(x)`, for SwiGLU.
    Silu,
    /// `x · Φ(x)`, for GeGLU.
    Gelu,
    /// GELU's approximation by tanh (Hendrycks and Gimpel, 2016, arXiv 1606.08415).
    GeluTanh,
    /// `max(x, 0)`, for ReGLU.
    Relu,
    /// `1 / (1 + exp(-x))`, for the first gated units and for gates of attention.
    Sigmoid,
    /// `c · sigmoid(1.702 c)` with `c = min(x, 7)`; what it is multiplied with is `clamp(up, -7, 7) + 1`.
    ClampedSwish,
}

impl Activation {
    /// Every function.
    pub const ALL: [Self; 6] = [Self::Silu, Self::Gelu, Self::GeluTanh, Self::Relu, Self::Sigmoid, Self::ClampedSwish];

    /// The function on the host, for backends without kernels.
    pub fn value(self, x: f32) -> f32 {
        match self {
            Self::Silu => x / (1.0 + (-x).exp()),
            Self::Gelu => 0.5 * x * (1.0 + libm::erff(x * FRAC_1_SQRT_2)),
            Self::GeluTanh => 0.5 * x * (1.0 + (TANH_SCALE * (x + TANH_CUBIC * x * x * x)).tanh()),
            Self::Relu => x.max(0.0),
            Self::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Self::ClampedSwish => {
                let c = x.min(CLAMP);
                c / (1.0 + (-SWISH * c).exp())
            }
        }
    }

    /// What the function's value is multiplied with.
    pub fn factor(self, up: f32) -> f32 {
        match self {
            Self::ClampedSwish => up.clamp(-CLAMP, CLAMP) + 1.0,
            _ => up,
        }
    }

    /// The derivative of [`factor`](Self::factor).
    pub fn factor_slope(self, up: f32) -> f32 {
        match self {
            Self::ClampedSwish => f32::from((-CLAMP..=CLAMP).contains(&up)),
            _ => 1.0,
        }
    }

    /// The derivative of [`value`](Self::value).
    pub fn slope(self, x: f32) -> f32 {
        match self {
            Self::Silu => {
                let sigmoid = 1.0 / (1.0 + (-x).exp());
                sigmoid * (1.0 + x * (1.0 - sigmoid))
            }
            Self::Gelu => 0.5 * (1.0 + libm::erff(x * FRAC_1_SQRT_2)) + x * DENSITY_AT_0 * (-0.5 * x * x).exp(),
            Self::GeluTanh => {
                let t = (TANH_SCALE * (x + TANH_CUBIC * x * x * x)).tanh();
                let inner = TANH_SCALE * (1.0 + 3.0 * TANH_CUBIC * x * x);
                0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
            }
            Self::Relu => f32::from(x > 0.0),
            Self::Sigmoid => {
                let sigmoid = 1.0 / (1.0 + (-x).exp());
                sigmoid * (1.0 - sigmoid)
            }
            Self::ClampedSwish if x > CLAMP => 0.0,
            Self::ClampedSwish => {
                let sigmoid = 1.0 / (1.0 + (-SWISH * x).exp());
                sigmoid * (1.0 + SWISH * x * (1.0 - sigmoid))
            }
        }
    }
}

/// Buffers of [`forward`].
#[derive(Clone, Copy, Debug)]
pub struct Forward<'a> {
    /// What the activation is applied to.
    pub gate: &'a Handle,
    /// What its result is multiplied with.
    pub up: &'a Handle,
    /// The product, which this writes.
    pub out: &'a Handle,
}

/// Buffers of [`backward`].
#[derive(Clone, Copy, Debug)]
pub struct Backward<'a> {
    /// The gradient of the product.
    pub dy: &'a Handle,
    /// As in [`forward`].
    pub gate: &'a Handle,
    /// As in [`forward`].
    pub up: &'a Handle,
    /// The gradient of `gate`, which this writes.
    pub dgate: &'a Handle,
    /// The gradient of `up`, which this writes.
    pub dup: &'a Handle,
}

/// `out = activation(gate) · up`.
///
/// # Shapes
/// All hold `elements` elements of `format`, contiguous.
///
/// # Errors
/// [`KernelError::Format`], and the variants about sizes when a buffer does not hold its elements.
pub fn forward(
    client: &Client,
    buffers: Forward<'_>,
    elements: usize,
    activation: Activation,
    format: FloatFormat,
) -> Result<(), KernelError> {
    check_format(client, OPERATION, format)?;
    let vector = vector_size(client, format, &[elements]);
    let argument = |name, handle| buffer(name, handle, elements, format.size(), vector);
    let (gate, up) = (argument("gate", buffers.gate)?, argument("up", buffers.up)?);
    let out = argument("out", buffers.out)?;
    if elements == 0 {
        return Ok(());
    }
    let vectors = elements / vector;
    // SAFETY: the buffers' sizes are checked, and the kernel stays within `vectors`.
    unsafe {
        forward_kernel::launch_unchecked(
            client,
            cube_count(client, vectors.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            vector,
            gate,
            up,
            out,
            WorkLaunch::new(vectors, activation),
            format.elem_type(),
        );
    }
    Ok(())
}

/// The gradients of both inputs of [`forward`].
///
/// # Shapes
/// All hold `elements` elements of `format`, contiguous.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    client: &Client,
    buffers: Backward<'_>,
    elements: usize,
    activation: Activation,
    format: FloatFormat,
) -> Result<(), KernelError> {
    check_format(client, OPERATION, format)?;
    let vector = vector_size(client, format, &[elements]);
    let argument = |name, handle| buffer(name, handle, elements, format.size(), vector);
    let (dy, gate, up) = (argument("dy", buffers.dy)?, argument("gate", buffers.gate)?, argument("up", buffers.up)?);
    let (dgate, dup) = (argument("dgate", buffers.dgate)?, argument("dup", buffers.dup)?);
    if elements == 0 {
        return Ok(());
    }
    let vectors = elements / vector;
    // SAFETY: as in `forward`.
    unsafe {
        backward_kernel::launch_unchecked(
            client,
            cube_count(client, vectors.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            vector,
            dy,
            gate,
            up,
            dgate,
            dup,
            WorkLaunch::new(vectors, activation),
            format.elem_type(),
        );
    }
    Ok(())
}

/// What the kernels do, a vector a unit.
#[derive(CubeType, CubeLaunch)]
struct Work {
    vectors: usize,
    #[cube(comptime)]
    activation: Activation,
}

#[cube(launch_unchecked)]
fn forward_kernel<F: Float, N: Size>(
    gate: &[Vector<F, N>],
    up: &[Vector<F, N>],
    out: &mut [Vector<F, N>],
    work: &Work,
    #[define(F)] _format: ElemType,
) {
    let position = ABSOLUTE_POS;
    let activation = comptime!(work.activation);
    if position < work.vectors {
        let (g, u) = (gate[position], up[position]);
        let mut y = Vector::<F, N>::empty();
        #[unroll]
        for i in 0..N::value().comptime() {
            let value =
                activate(f32::cast_from(g.extract(i)), activation) * factor(f32::cast_from(u.extract(i)), activation);
            y.insert(i, F::cast_from(value));
        }
        out[position] = y;
    }
}

#[cube(launch_unchecked)]
fn backward_kernel<F: Float, N: Size>(
    dy: &[Vector<F, N>],
    gate: &[Vector<F, N>],
    up: &[Vector<F, N>],
    dgate: &mut [Vector<F, N>],
    dup: &mut [Vector<F, N>],
    work: &Work,
    #[define(F)] _format: ElemType,
) {
    let position = ABSOLUTE_POS;
    let activation = comptime!(work.activation);
    if position < work.vectors {
        let (d, g, u) = (dy[position], gate[position], up[position]);
        let mut dg = Vector::<F, N>::empty();
        let mut du = Vector::<F, N>::empty();
        #[unroll]
        for i in 0..N::value().comptime() {
            let (grad, x) = (f32::cast_from(d.extract(i)), f32::cast_from(g.extract(i)));
            let up = f32::cast_from(u.extract(i));
            dg.insert(i, F::cast_from(grad * factor(up, activation) * slope(x, activation)));
            du.insert(i, F::cast_from(grad * activate(x, activation) * factor_slope(up, activation)));
        }
        dgate[position] = dg;
        dup[position] = du;
    }
}

/// sqrt(2 / π), of the approximation by tanh.
const TANH_SCALE: f32 = 0.797_884_6;
/// Its cubic term.
const TANH_CUBIC: f32 = 0.044_715;
/// 1 / sqrt(2 π), the standard normal density at 0.
const DENSITY_AT_0: f32 = 0.398_942_3;
/// What multiplies the sigmoid's argument: x · sigmoid(1.702 x) is close to GELU.
const SWISH: f32 = 1.702;
/// Gates are at most this, what they are multiplied with at most this far from 0.
const CLAMP: f32 = 7.0;

#[cube]
pub(crate) fn activate(x: f32, #[comptime] activation: Activation) -> f32 {
    match activation {
        Activation::Silu => x / (1.0f32 + (-x).exp()),
        Activation::Gelu => x * normal_distribution(x),
        Activation::GeluTanh => 0.5f32 * x * (1.0f32 + bounded_tanh(tanh_argument(x))),
        Activation::Relu => max(x, 0.0f32),
        Activation::Sigmoid => 1.0f32 / (1.0f32 + (-x).exp()),
        Activation::ClampedSwish => {
            let c = min(x, CLAMP);
            c / (1.0f32 + (-SWISH * c).exp())
        }
    }
}

/// What `activate`'s value is multiplied with.
#[cube]
pub(crate) fn factor(up: f32, #[comptime] activation: Activation) -> f32 {
    match activation {
        Activation::ClampedSwish => clamp(up, -CLAMP, CLAMP) + 1.0f32,
        _ => up,
    }
}

/// The derivative of `factor`.
#[cube]
pub(crate) fn factor_slope(up: f32, #[comptime] activation: Activation) -> f32 {
    match activation {
        Activation::ClampedSwish => select(up.abs() <= CLAMP, 1.0f32, 0.0f32),
        _ => 1.0f32.runtime(),
    }
}

/// The derivative of `activate`.
#[cube]
pub(crate) fn slope(x: f32, #[comptime] activation: Activation) -> f32 {
    match activation {
        Activation::Silu => {
            let sigmoid = 1.0f32 / (1.0f32 + (-x).exp());
            sigmoid * (1.0f32 + x * (1.0f32 - sigmoid))
        }
        Activation::Gelu => normal_distribution(x) + x * DENSITY_AT_0 * (-0.5f32 * x * x).exp(),
        Activation::GeluTanh => {
            let t = bounded_tanh(tanh_argument(x));
            let inner = TANH_SCALE * (1.0f32 + 3.0f32 * TANH_CUBIC * x * x);
            0.5f32 * (1.0f32 + t) + 0.5f32 * x * (1.0f32 - t * t) * inner
        }
        Activation::Relu => select(x > 0.0f32, 1.0f32, 0.0f32),
        Activation::Sigmoid => {
            let sigmoid = 1.0f32 / (1.0f32 + (-x).exp());
            sigmoid * (1.0f32 - sigmoid)
        }
        Activation::ClampedSwish => {
            let sigmoid = 1.0f32 / (1.0f32 + (-SWISH * x).exp());
            select(x > CLAMP, 0.0f32, sigmoid * (1.0f32 + SWISH * x * (1.0f32 - sigmoid)))
        }
    }
}

/// Φ(x), the standard normal distribution.
#[cube]
fn normal_distribution(x: f32) -> f32 {
    0.5f32 * (1.0f32 + Erf::erf(x * FRAC_1_SQRT_2))
}

#[cube]
fn tanh_argument(x: f32) -> f32 {
    TANH_SCALE * (x + TANH_CUBIC * x * x * x)
}

/// tanh, whose exponentials some devices let overflow; beyond 10 it is ±1 to the last bit.
#[cube]
fn bounded_tanh(x: f32) -> f32 {
    clamp(x, -10.0f32, 10.0f32).tanh()
}

/// The scalar oracle, in f64.
pub mod oracle {
    use super::Activation;

    /// `activation(gate) · up` of one element.
    pub fn forward(gate: f64, up: f64, activation: Activation) -> f64 {
        activate(gate, activation) * factor(up, activation)
    }

    /// The gradients of gate and up of one element.
    pub fn backward(dy: f64, gate: f64, up: f64, activation: Activation) -> (f64, f64) {
        let of_up = match activation {
            Activation::ClampedSwish if up.abs() > 7.0 => 0.0,
            _ => dy * activate(gate, activation),
        };
        (dy * factor(up, activation) * slope(gate, activation), of_up)
    }

    fn factor(up: f64, activation: Activation) -> f64 {
        match activation {
            Activation::ClampedSwish => up.clamp(-7.0, 7.0) + 1.0,
            _ => up,
        }
    }

    fn activate(x: f64, activation: Activation) -> f64 {
        match activation {
            Activation::Silu => x / (1.0 + (-x).exp()),
            Activation::Gelu => x * normal_distribution(x),
            Activation::GeluTanh => 0.5 * x * (1.0 + tanh_argument(x).tanh()),
            Activation::Relu => x.max(0.0),
            Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Activation::ClampedSwish => x.min(7.0) / (1.0 + (-1.702 * x.min(7.0)).exp()),
        }
    }

    fn slope(x: f64, activation: Activation) -> f64 {
        match activation {
            Activation::Silu => {
                let sigmoid = 1.0 / (1.0 + (-x).exp());
                sigmoid * (1.0 + x * (1.0 - sigmoid))
            }
            Activation::Gelu => normal_distribution(x) + x * (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt(),
            Activation::GeluTanh => {
                let t = tanh_argument(x).tanh();
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (1.0 + 3.0 * 0.044715 * x * x);
                0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner
            }
            Activation::Relu => f64::from(x > 0.0),
            Activation::Sigmoid => (-x).exp() / (1.0 + (-x).exp()).powi(2),
            Activation::ClampedSwish if x > 7.0 => 0.0,
            Activation::ClampedSwish => {
                let sigmoid = 1.0 / (1.0 + (-1.702 * x).exp());
                sigmoid * (1.0 + 1.702 * x * (1.0 - sigmoid))
            }
        }
    }

    fn tanh_argument(x: f64) -> f64 {
        (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))
    }

    fn normal_distribution(x: f64) -> f64 {
        0.5 * (1.0 + libm::erf(x / std::f64::consts::SQRT_2))
    }
}
