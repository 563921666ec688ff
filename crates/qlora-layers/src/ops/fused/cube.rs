//! The GPU implementation, for every CubeCL runtime.

use super::super::cube_tensors::empty;
use super::{Activation, Conv, FusedGradients, FusedOps, Norm, Rotation};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, FloatDType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::{cast, into_contiguous};
use burn_cubecl::tensor::CubeTensor;
use fused_kernels::{
    FloatFormat, KernelError, Matrix, adapted_norms, add_norm, causal_conv, columns, cross_entropy, gated, rms_norm,
    rope,
};

fn format(x: &CubeTensor) -> FloatFormat {
    match x.dtype {
        DType::BF16 => FloatFormat::BF16,
        DType::F16 => FloatFormat::F16,
        _ => FloatFormat::F32,
    }
}

/// The shape of a tensor of rank 2.
fn matrix(x: &CubeTensor) -> Matrix {
    let [rows, width] = x.meta.shape().dims();
    Matrix { rows, width, format: format(x) }
}

fn like(x: &CubeTensor) -> CubeTensor {
    empty(&x.client, &x.device, x.meta.shape().clone(), x.dtype)
}

/// A gradient in the dtype of what it belongs to.
fn as_dtype(dy: CubeTensor, x: &CubeTensor) -> CubeTensor {
    into_contiguous(if dy.dtype == x.dtype { dy } else { cast(dy, x.dtype) })
}

fn launched(result: Result<(), KernelError>) {
    result.unwrap_or_else(|e| panic!("tensors that Burn holds were refused: {e}"));
}

/// The sum and its norm; see [`super::add_norm`].
pub(super) fn add_norm(x: &CubeTensor, delta: &CubeTensor, weight: &CubeTensor, norm: Norm) -> [CubeTensor; 2] {
    let (sum, out) = (like(x), like(x));
    let buffers = add_norm::Buffers {
        x: &x.handle,
        delta: &delta.handle,
        weight: &weight.handle,
        sum: &sum.handle,
        out: &out.handle,
    };
    launched(add_norm::add_norm(&x.client, buffers, matrix(x), norm));
    [sum, out]
}

/// See [`super::split`].
pub(super) fn split(x: &CubeTensor, dtype: FloatDType) -> CubeTensor {
    let [rows, width] = x.meta.shape().dims();
    let parts = empty(&x.client, &x.device, Shape::new([2 * rows, width]), dtype.into());
    let buffers = adapted_norms::Split { x: &x.handle, parts: &parts.handle };
    launched(adapted_norms::split(&x.client, buffers, rows * width, format(&parts)));
    parts
}

/// The norms, `[1, out_features]`; see [`super::adapted_norms`].
pub(super) fn adapted_norms(
    weight_squares: &CubeTensor,
    a_w: &CubeTensor,
    lora_a: &CubeTensor,
    lora_b: &CubeTensor,
    scaling: f32,
) -> Option<CubeTensor> {
    let ([rank, in_features], [out_features, _]) = (lora_a.meta.shape().dims(), lora_b.meta.shape().dims());
    let norms = empty(&a_w.client, &a_w.device, Shape::new([1, out_features]), DType::F32);
    let buffers = adapted_norms::Buffers {
        weight_squares: &weight_squares.handle,
        a_w: &a_w.handle,
        lora_a: &lora_a.handle,
        lora_b: &lora_b.handle,
        norms: &norms.handle,
    };
    let sizes = adapted_norms::Sizes { out_features, in_features, rank };
    match adapted_norms::adapted_norms(&a_w.client, buffers, sizes, scaling) {
        Err(KernelError::Rank(_)) => None,
        result => {
            launched(result);
            Some(norms)
        }
    }
}

impl FusedOps for CubeBackend {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, norm: Norm) -> FloatTensor<Self> {
        let (x, weight) = (into_contiguous(x), into_contiguous(weight));
        let y = like(&x);
        let buffers = rms_norm::Forward { x: &x.handle, weight: &weight.handle, out: &y.handle };
        launched(rms_norm::forward(&x.client, buffers, matrix(&x), norm));
        y
    }

    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        let (gate, up) = (into_contiguous(gate), into_contiguous(up));
        let (y, elements) = (like(&gate), gate.meta.shape().num_elements());
        let buffers = gated::Forward { gate: &gate.handle, up: &up.handle, out: &y.handle };
        launched(gated::forward(&gate.client, buffers, elements, activation, format(&gate)));
        y
    }

    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        rotation: Rotation,
    ) -> FloatTensor<Self> {
        let (x, cos, sin) = (into_contiguous(x), into_contiguous(cos), into_contiguous(sin));
        let y = like(&x);
        let buffers = rope::Buffers { x: &x.handle, cos: &cos.handle, sin: &sin.handle, out: &y.handle };
        launched(rope::rotate(&x.client, buffers, matrix(&x), rotation));
        y
    }

    fn causal_conv(x: FloatTensor<Self>, weight: FloatTensor<Self>, conv: Conv) -> FloatTensor<Self> {
        let (x, weight) = (into_contiguous(x), into_contiguous(weight));
        let y = like(&x);
        let buffers = causal_conv::Forward { x: &x.handle, weight: &weight.handle, out: &y.handle };
        launched(causal_conv::forward(&x.client, buffers, matrix(&x), &conv));
        y
    }

    fn scale_columns(x: FloatTensor<Self>, scale: FloatTensor<Self>, out: FloatDType) -> FloatTensor<Self> {
        let (x, scale) = (into_contiguous(x), into_contiguous(scale));
        let y = empty(&x.client, &x.device, x.meta.shape().clone(), out.into());
        let buffers = columns::Forward { x: &x.handle, scale: &scale.handle, out: &y.handle };
        launched(columns::forward(&x.client, buffers, matrix(&x), format(&y)));
        y
    }

    fn gained(y: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        y
    }

    fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        let [losses, _] = Self::losses(logits, targets);
        losses
    }
}

impl FusedGradients for CubeBackend {
    fn rms_norm_input_grad(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        norm: Norm,
    ) -> FloatTensor<Self> {
        let (x, weight) = (into_contiguous(x), into_contiguous(weight));
        let (dy, dx) = (as_dtype(dy, &x), like(&x));
        let buffers = rms_norm::Backward { dy: &dy.handle, x: &x.handle, weight: &weight.handle, dx: &dx.handle };
        launched(rms_norm::backward(&x.client, buffers, matrix(&x), norm));
        dx
    }

    fn rms_norm_weight_grad(dy: FloatTensor<Self>, x: FloatTensor<Self>, norm: Norm) -> FloatTensor<Self> {
        let x = into_contiguous(x);
        let (dy, rows) = (as_dtype(dy, &x), matrix(&x));
        let dweight = empty(&x.client, &x.device, Shape::new([rows.width]), DType::F32);
        let buffers = rms_norm::WeightGradient { dy: &dy.handle, x: &x.handle, dweight: &dweight.handle };
        launched(rms_norm::weight_gradient(&x.client, buffers, rows, norm));
        dweight
    }

    fn gated_grads(
        dy: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: Activation,
    ) -> [FloatTensor<Self>; 2] {
        let (gate, up) = (into_contiguous(gate), into_contiguous(up));
        let (dy, dgate, dup) = (as_dtype(dy, &gate), like(&gate), like(&gate));
        let buffers = gated::Backward {
            dy: &dy.handle,
            gate: &gate.handle,
            up: &up.handle,
            dgate: &dgate.handle,
            dup: &dup.handle,
        };
        let elements = gate.meta.shape().num_elements();
        launched(gated::backward(&gate.client, buffers, elements, activation, format(&gate)));
        [dgate, dup]
    }

    fn causal_conv_grad(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        conv: Conv,
    ) -> FloatTensor<Self> {
        let (x, weight) = (into_contiguous(x), into_contiguous(weight));
        let (dy, dx) = (as_dtype(dy, &x), like(&x));
        let buffers = causal_conv::Backward { dy: &dy.handle, x: &x.handle, weight: &weight.handle, dx: &dx.handle };
        launched(causal_conv::backward(&x.client, buffers, matrix(&x), &conv));
        dx
    }

    fn scale_columns_grads(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        scale: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 2] {
        let (x, scale) = (into_contiguous(x), into_contiguous(scale));
        let (dy, dx, dscale) = (as_dtype(dy, &x), like(&x), like(&scale));
        let buffers = columns::Backward {
            dy: &dy.handle,
            x: &x.handle,
            scale: &scale.handle,
            dx: &dx.handle,
            dscale: &dscale.handle,
        };
        launched(columns::backward(&x.client, buffers, matrix(&x)));
        [dx, dscale]
    }

    fn gain_gradient(dy: FloatTensor<Self>, y: FloatTensor<Self>, gain: FloatTensor<Self>) -> FloatTensor<Self> {
        let (y, gain) = (into_contiguous(y), into_contiguous(gain));
        let (dy, dgain) = (as_dtype(dy, &y), like(&gain));
        let buffers = columns::Gain { dy: &dy.handle, y: &y.handle, gain: &gain.handle, dgain: &dgain.handle };
        launched(columns::gain_gradient(&y.client, buffers, matrix(&y)));
        dgain
    }

    fn losses(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> [FloatTensor<Self>; 2] {
        let (logits, targets) = (into_contiguous(logits), into_contiguous(targets));
        let shape = matrix(&logits);
        let [losses, log_sum_exp] =
            [(); 2].map(|()| empty(&logits.client, &logits.device, Shape::new([shape.rows]), DType::F32));
        let buffers = cross_entropy::Forward {
            logits: &logits.handle,
            targets: &targets.handle,
            losses: &losses.handle,
            log_sum_exp: &log_sum_exp.handle,
        };
        launched(cross_entropy::forward(&logits.client, buffers, shape));
        [losses, log_sum_exp]
    }

    fn logit_grads(
        dloss: FloatTensor<Self>,
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        log_sum_exp: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let (dloss, targets) = (into_contiguous(dloss), into_contiguous(targets));
        let logits = into_contiguous(logits);
        let grads = if logits.can_mut() { logits } else { logits.copy() };
        let buffers = cross_entropy::Backward {
            dloss: &dloss.handle,
            logits: &grads.handle,
            targets: &targets.handle,
            log_sum_exp: &log_sum_exp.handle,
        };
        launched(cross_entropy::backward(&grads.client, buffers, matrix(&grads)));
        grads
    }
}
