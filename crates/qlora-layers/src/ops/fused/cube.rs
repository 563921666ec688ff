//! The GPU implementation, for every CubeCL runtime.

use super::super::cube_tensors::empty;
use super::{Activation, FusedGradients, FusedOps, Norm, Rotation};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::{cast, into_contiguous};
use burn_cubecl::tensor::CubeTensor;
use fused_kernels::rms_norm::RmsNorm;
use fused_kernels::rope::Rope;
use fused_kernels::{Format, KernelError, cross_entropy, gated, rms_norm, rope};

fn format(x: &CubeTensor) -> Format {
    match x.dtype {
        DType::BF16 => Format::Bf16,
        DType::F16 => Format::F16,
        _ => Format::F32,
    }
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

fn dimensions(x: &CubeTensor, norm: Norm) -> RmsNorm {
    let [rows, width] = x.meta.shape().dims();
    RmsNorm { rows, width, eps: norm.eps, offset: norm.offset }
}

impl FusedOps for CubeBackend {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, norm: Norm) -> FloatTensor<Self> {
        let (x, weight, norm) = (into_contiguous(x.clone()), into_contiguous(weight), dimensions(&x, norm));
        let y = like(&x);
        launched(rms_norm::forward(&x.client, &x.handle, &weight.handle, &y.handle, norm, format(&x)));
        y
    }

    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        let (gate, up) = (into_contiguous(gate), into_contiguous(up));
        let (y, elements) = (like(&gate), gate.meta.shape().num_elements());
        let format = format(&gate);
        launched(gated::forward(&gate.client, &gate.handle, &up.handle, &y.handle, elements, activation, format));
        y
    }

    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        rotation: Rotation,
    ) -> FloatTensor<Self> {
        let (x, cos, sin) = (into_contiguous(x), into_contiguous(cos), into_contiguous(sin));
        let [tokens, features] = x.meta.shape().dims();
        let Rotation { len, head_dim, rotary, inverse } = rotation;
        let shape = Rope { tokens, len, heads: features / head_dim, head_dim, rotary };
        let y = like(&x);
        launched(rope::rotate(&x.client, &x.handle, &cos.handle, &sin.handle, &y.handle, shape, inverse, format(&x)));
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
        let (x, weight, norm) = (into_contiguous(x.clone()), into_contiguous(weight), dimensions(&x, norm));
        let (dy, dx) = (as_dtype(dy, &x), like(&x));
        let format = format(&x);
        launched(rms_norm::backward(&x.client, &dy.handle, &x.handle, &weight.handle, &dx.handle, norm, format));
        dx
    }

    fn rms_norm_weight_grad(dy: FloatTensor<Self>, x: FloatTensor<Self>, norm: Norm) -> FloatTensor<Self> {
        let (x, norm) = (into_contiguous(x.clone()), dimensions(&x, norm));
        let dy = as_dtype(dy, &x);
        let dweight = empty(&x.client, &x.device, Shape::new([norm.width]), DType::F32);
        launched(rms_norm::weight_gradient(&x.client, &dy.handle, &x.handle, &dweight.handle, norm, format(&x)));
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
        launched(gated::backward(
            &gate.client,
            &dy.handle,
            &gate.handle,
            &up.handle,
            &dgate.handle,
            &dup.handle,
            gate.meta.shape().num_elements(),
            activation,
            format(&gate),
        ));
        [dgate, dup]
    }

    fn losses(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> [FloatTensor<Self>; 2] {
        let (logits, targets) = (into_contiguous(logits), into_contiguous(targets));
        let [rows, width] = logits.meta.shape().dims();
        let [losses, log_sum_exp] =
            [(); 2].map(|()| empty(&logits.client, &logits.device, Shape::new([rows]), DType::F32));
        launched(cross_entropy::forward(
            &logits.client,
            &logits.handle,
            &targets.handle,
            &losses.handle,
            &log_sum_exp.handle,
            rows,
            width,
            format(&logits),
        ));
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
        let [rows, width] = grads.meta.shape().dims();
        launched(cross_entropy::backward(
            &grads.client,
            &dloss.handle,
            &grads.handle,
            &targets.handle,
            &log_sum_exp.handle,
            rows,
            width,
            format(&grads),
        ));
        grads
    }
}
