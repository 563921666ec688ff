//! The CPU implementation: loops over rows, on all threads, sums in the order of a row's elements.

use super::{Activation, FusedGradients, FusedOps, Norm, Rotation};
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{Element as BurnElement, FloatDType, TensorData};
use burn_flex::FlexTensor;
use half::{bf16, f16};
use nf4_quant::Element;
use rayon::prelude::*;

/// Work per task of the element-wise loops: large enough to hide the hand-over between threads.
const CHUNK: usize = 1 << 13;

/// Calls the generic function for the dtype of a tensor.
macro_rules! by_dtype {
    ($x:expr, $function:ident($($argument:expr),*)) => {
        match FloatDType::from($x.dtype()) {
            FloatDType::BF16 => $function::<bf16>($($argument),*),
            FloatDType::F16 => $function::<f16>($($argument),*),
            _ => $function::<f32>($($argument),*),
        }
    };
}

fn dims(x: &FlexTensor) -> [usize; 2] {
    let shape = x.shape();
    [shape[0], shape[1]]
}

fn values<T: Element + BurnElement + bytemuck::Pod>(x: &FlexTensor) -> Vec<T> {
    x.to_contiguous().storage::<T>().to_vec()
}

fn tensor<T: BurnElement>(values: Vec<T>, shape: Vec<usize>) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

/// 1 / sqrt(mean(x²) + eps).
fn scale<T: Element>(row: &[T], eps: f32) -> f32 {
    let sum: f32 = row.iter().map(|v| v.to_f32() * v.to_f32()).sum();
    1.0 / (sum / row.len() as f32 + eps).sqrt()
}

fn rms_norm<T: Element + BurnElement + bytemuck::Pod>(x: &FlexTensor, weight: &FlexTensor, norm: Norm) -> FlexTensor {
    let ([rows, width], mut y, weight) = (dims(x), values::<T>(x), values::<f32>(weight));
    y.par_chunks_mut(width.max(1)).for_each(|row| {
        let scale = scale(row, norm.eps);
        row.iter_mut().zip(&weight).for_each(|(v, w)| *v = T::from_f32(v.to_f32() * scale * (w + norm.offset)));
    });
    tensor(y, vec![rows, width])
}

fn rms_norm_input_grad<T: Element + BurnElement + bytemuck::Pod>(
    dy: &FlexTensor,
    x: &FlexTensor,
    weight: &FlexTensor,
    norm: Norm,
) -> FlexTensor {
    let ([rows, width], mut dx, x, weight) = (dims(x), values::<T>(dy), values::<T>(x), values::<f32>(weight));
    dx.par_chunks_mut(width.max(1)).zip(x.par_chunks(width.max(1))).for_each(|(dx, x)| {
        let scale = scale(x, norm.eps);
        let weighted = |d: &T, w: &f32| d.to_f32() * (w + norm.offset);
        let product: f32 = dx.iter().zip(&weight).zip(x).map(|((d, w), x)| weighted(d, w) * x.to_f32()).sum();
        let back = scale * scale * (product / width as f32);
        for ((d, w), x) in dx.iter_mut().zip(&weight).zip(x) {
            *d = T::from_f32(scale * (weighted(d, w) - x.to_f32() * back));
        }
    });
    tensor(dx, vec![rows, width])
}

fn rms_norm_weight_grad<T: Element + BurnElement + bytemuck::Pod>(
    dy: &FlexTensor,
    x: &FlexTensor,
    norm: Norm,
) -> FlexTensor {
    let ([_, width], dy, x) = (dims(x), values::<T>(dy), values::<T>(x));
    let mut sums = vec![0.0_f32; width];
    for (dy, x) in dy.chunks(width.max(1)).zip(x.chunks(width.max(1))) {
        let scale = scale(x, norm.eps);
        sums.iter_mut().zip(dy.iter().zip(x)).for_each(|(sum, (d, x))| *sum += d.to_f32() * x.to_f32() * scale);
    }
    tensor(sums, vec![width])
}

fn gated<T: Element + BurnElement + bytemuck::Pod>(
    gate: &FlexTensor,
    up: &FlexTensor,
    activation: Activation,
) -> FlexTensor {
    let (shape, mut y, up) = (dims(gate), values::<T>(gate), values::<T>(up));
    y.par_chunks_mut(CHUNK).zip(up.par_chunks(CHUNK)).for_each(|(y, up)| {
        y.iter_mut().zip(up).for_each(|(y, up)| *y = T::from_f32(activation.value(y.to_f32()) * up.to_f32()));
    });
    tensor(y, shape.to_vec())
}

fn gated_grads<T: Element + BurnElement + bytemuck::Pod>(
    dy: &FlexTensor,
    gate: &FlexTensor,
    up: &FlexTensor,
    activation: Activation,
) -> [FlexTensor; 2] {
    let (shape, dy, mut gate, mut up) = (dims(gate), values::<T>(dy), values::<T>(gate), values::<T>(up));
    gate.par_chunks_mut(CHUNK).zip(up.par_chunks_mut(CHUNK)).zip(dy.par_chunks(CHUNK)).for_each(|((gate, up), dy)| {
        for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
            let (x, dy) = (gate.to_f32(), dy.to_f32());
            *gate = T::from_f32(dy * up.to_f32() * activation.slope(x));
            *up = T::from_f32(dy * activation.value(x));
        }
    });
    [tensor(gate, shape.to_vec()), tensor(up, shape.to_vec())]
}

fn rotate<T: Element + BurnElement + bytemuck::Pod>(
    x: &FlexTensor,
    cos: &FlexTensor,
    sin: &FlexTensor,
    rotation: Rotation,
) -> FlexTensor {
    let Rotation { len, head_dim, rotary, inverse } = rotation;
    let (shape, mut y, half) = (dims(x), values::<T>(x), rotary / 2);
    let (cos, sin, sign) = (values::<f32>(cos), values::<f32>(sin), if inverse { -1.0 } else { 1.0 });
    y.par_chunks_mut(shape[1].max(1)).enumerate().for_each(|(token, features)| {
        let row = token % len * half;
        let (cos, sin) = (&cos[row..row + half], &sin[row..row + half]);
        for head in features.chunks_mut(head_dim) {
            let (first, second) = head.split_at_mut(half);
            for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                let (x, y, s) = (a.to_f32(), b.to_f32(), s * sign);
                (*a, *b) = (T::from_f32(x * c - y * s), T::from_f32(y * c + x * s));
            }
        }
    });
    tensor(y, shape.to_vec())
}

fn scale_columns<T: Element + BurnElement + bytemuck::Pod, O: Element + BurnElement>(
    x: &FlexTensor,
    scale: &FlexTensor,
) -> FlexTensor {
    let (shape, x, scale) = (dims(x), values::<T>(x), values::<f32>(scale));
    let mut y = vec![O::from_f32(0.0); x.len()];
    let width = shape[1].max(1);
    y.par_chunks_mut(width).zip(x.par_chunks(width)).for_each(|(y, x)| {
        y.iter_mut().zip(x.iter().zip(&scale)).for_each(|(y, (x, s))| *y = O::from_f32(x.to_f32() * s));
    });
    tensor(y, shape.to_vec())
}

fn scaled_to_f32<T: Element + BurnElement + bytemuck::Pod>(x: &FlexTensor, scale: &FlexTensor) -> FlexTensor {
    scale_columns::<T, f32>(x, scale)
}

/// The gradient of the factors.
fn column_products<T: Element + BurnElement + bytemuck::Pod>(dy: &FlexTensor, x: &FlexTensor) -> FlexTensor {
    let ([_, width], dy, x) = (dims(x), values::<T>(dy), values::<T>(x));
    let mut sums = vec![0.0_f32; width];
    for (dy, x) in dy.chunks(width.max(1)).zip(x.chunks(width.max(1))) {
        sums.iter_mut().zip(dy.iter().zip(x)).for_each(|(sum, (dy, x))| *sum += dy.to_f32() * x.to_f32());
    }
    tensor(sums, vec![1, width])
}

/// Loss and log-sum-exp of each row.
fn losses<T: Element + BurnElement + bytemuck::Pod>(logits: &FlexTensor, targets: &FlexTensor) -> [FlexTensor; 2] {
    let ([rows, width], logits, targets) = (dims(logits), values::<T>(logits), targets.to_contiguous());
    let row = |(row, &target): (&[T], &i32)| {
        let top = row.iter().map(|v| v.to_f32()).fold(f32::NEG_INFINITY, f32::max);
        // One running sum of a whole vocabulary: in f32 it would lose three digits.
        let sum: f64 = row.iter().map(|v| f64::from((v.to_f32() - top).exp())).sum();
        let whole = top + sum.ln() as f32;
        (whole - row[target as usize].to_f32(), whole)
    };
    let (losses, whole) = logits.par_chunks(width.max(1)).zip(targets.storage::<i32>()).map(row).unzip();
    [tensor::<f32>(losses, vec![rows]), tensor::<f32>(whole, vec![rows])]
}

fn logit_grads<T: Element + BurnElement + bytemuck::Pod>(
    dloss: &FlexTensor,
    logits: &FlexTensor,
    targets: &FlexTensor,
    log_sum_exp: &FlexTensor,
) -> FlexTensor {
    let ([rows, width], mut grads) = (dims(logits), values::<T>(logits));
    let (dloss, whole) = (values::<f32>(dloss), values::<f32>(log_sum_exp));
    let targets = targets.to_contiguous();
    let each = grads.par_chunks_mut(width.max(1)).zip(targets.storage::<i32>()).zip(dloss).zip(whole);
    each.for_each(|(((row, &target), dloss), whole)| {
        for (i, v) in row.iter_mut().enumerate() {
            let hit = f32::from(i == target as usize);
            *v = T::from_f32(dloss * ((v.to_f32() - whole).exp() - hit));
        }
    });
    tensor(grads, vec![rows, width])
}

/// A gradient in the dtype of what it belongs to.
fn as_dtype(dy: FlexTensor, x: &FlexTensor) -> FlexTensor {
    if dy.dtype() == x.dtype() { dy } else { Flex::float_cast(dy, x.dtype().into()) }
}

impl FusedOps for Flex {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, norm: Norm) -> FloatTensor<Self> {
        by_dtype!(x, rms_norm(&x, &weight, norm))
    }

    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        by_dtype!(gate, gated(&gate, &up, activation))
    }

    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        rotation: Rotation,
    ) -> FloatTensor<Self> {
        by_dtype!(x, rotate(&x, &cos, &sin, rotation))
    }

    fn scale_columns(x: FloatTensor<Self>, scale: FloatTensor<Self>, out: FloatDType) -> FloatTensor<Self> {
        match (FloatDType::from(x.dtype()), out) {
            (FloatDType::BF16, FloatDType::BF16) => scale_columns::<bf16, bf16>(&x, &scale),
            (FloatDType::F16, FloatDType::F16) => scale_columns::<f16, f16>(&x, &scale),
            (FloatDType::F32, out) if out != FloatDType::F32 => {
                Self::float_cast(scale_columns::<f32, f32>(&x, &scale), out)
            }
            _ => by_dtype!(x, scaled_to_f32(&x, &scale)),
        }
    }

    fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        let [losses, _] = Self::losses(logits, targets);
        losses
    }
}

impl FusedGradients for Flex {
    fn rms_norm_input_grad(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        norm: Norm,
    ) -> FloatTensor<Self> {
        let dy = as_dtype(dy, &x);
        by_dtype!(x, rms_norm_input_grad(&dy, &x, &weight, norm))
    }

    fn rms_norm_weight_grad(dy: FloatTensor<Self>, x: FloatTensor<Self>, norm: Norm) -> FloatTensor<Self> {
        let dy = as_dtype(dy, &x);
        by_dtype!(x, rms_norm_weight_grad(&dy, &x, norm))
    }

    fn gated_grads(
        dy: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        activation: Activation,
    ) -> [FloatTensor<Self>; 2] {
        let dy = as_dtype(dy, &gate);
        by_dtype!(gate, gated_grads(&dy, &gate, &up, activation))
    }

    fn scale_columns_grads(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        scale: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 2] {
        let dy = as_dtype(dy, &x);
        let dscale = by_dtype!(x, column_products(&dy, &x));
        [Self::scale_columns(dy, scale, x.dtype().into()), dscale]
    }

    fn losses(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> [FloatTensor<Self>; 2] {
        by_dtype!(logits, losses(&logits, &targets))
    }

    fn logit_grads(
        dloss: FloatTensor<Self>,
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        log_sum_exp: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        by_dtype!(logits, logit_grads(&dloss, &logits, &targets, &log_sum_exp))
    }
}
