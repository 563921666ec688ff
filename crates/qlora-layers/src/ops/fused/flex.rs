//! The CPU implementation: loops over rows, on all threads, sums in the order of a row's elements.

use super::{Activation, Conv, FusedGradients, FusedOps, LEAST_GAIN, Norm, Rotation, loops};
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{Element as BurnElement, FloatDType, TensorData};
use burn_flex::FlexTensor;
use half::{bf16, f16};
use nf4_quant::Element;
use rayon::prelude::*;
use std::borrow::Cow;

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

/// A float as rows hold it.
trait RowElement: Element + BurnElement + bytemuck::Pod {}

impl<T: Element + BurnElement + bytemuck::Pod> RowElement for T {}

/// The elements, row-major; without a copy where they lie so.
fn values<T: RowElement>(x: &FlexTensor) -> Cow<'_, [T]> {
    match x.as_slice::<T>() {
        Some(slice) => slice.into(),
        None => x.to_contiguous().storage::<T>().to_vec().into(),
    }
}

fn zeros<T: Element>(like: &[T]) -> Vec<T> {
    vec![T::from_f32(0.0); like.len()]
}

fn tensor<T: BurnElement>(values: Vec<T>, shape: Vec<usize>) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, shape))
}

/// 1 / sqrt(mean(x²) + eps).
fn scale<T: Element>(row: &[T], eps: f32) -> f32 {
    let sum: f32 = row.iter().map(|v| v.to_f32() * v.to_f32()).sum();
    1.0 / (sum / row.len() as f32 + eps).sqrt()
}

fn rms_norm<T: RowElement>(x: &FlexTensor, weight: &FlexTensor, norm: Norm) -> FlexTensor {
    let ([rows, width], x, weight) = (dims(x), values::<T>(x), values::<f32>(weight));
    let mut y = zeros(&x);
    y.par_chunks_mut(width.max(1)).zip(x.par_chunks(width.max(1))).for_each(|(y, x)| {
        let scale = scale(x, norm.eps);
        for ((y, x), w) in y.iter_mut().zip(x).zip(&*weight) {
            *y = T::from_f32(x.to_f32() * scale * (w + norm.offset));
        }
    });
    tensor(y, vec![rows, width])
}

fn rms_norm_input_grad<T: RowElement>(dy: &FlexTensor, x: &FlexTensor, weight: &FlexTensor, norm: Norm) -> FlexTensor {
    let ([rows, width], dy, x, weight) = (dims(x), values::<T>(dy), values::<T>(x), values::<f32>(weight));
    let mut dx = zeros(&x);
    let each = dx.par_chunks_mut(width.max(1)).zip(dy.par_chunks(width.max(1))).zip(x.par_chunks(width.max(1)));
    each.for_each(|((dx, dy), x)| {
        let scale = scale(x, norm.eps);
        let weighted = |d: &T, w: &f32| d.to_f32() * (w + norm.offset);
        let product: f32 = dy.iter().zip(&*weight).zip(x).map(|((d, w), x)| weighted(d, w) * x.to_f32()).sum();
        let back = scale * scale * (product / width as f32);
        for (((dx, d), w), x) in dx.iter_mut().zip(dy).zip(&*weight).zip(x) {
            *dx = T::from_f32(scale * (weighted(d, w) - x.to_f32() * back));
        }
    });
    tensor(dx, vec![rows, width])
}

fn rms_norm_weight_grad<T: RowElement>(dy: &FlexTensor, x: &FlexTensor, norm: Norm) -> FlexTensor {
    let ([_, width], dy, x) = (dims(x), values::<T>(dy), values::<T>(x));
    let mut sums = vec![0.0_f32; width];
    for (dy, x) in dy.chunks(width.max(1)).zip(x.chunks(width.max(1))) {
        let scale = scale(x, norm.eps);
        sums.iter_mut().zip(dy.iter().zip(x)).for_each(|(sum, (d, x))| *sum += d.to_f32() * x.to_f32() * scale);
    }
    tensor(sums, vec![width])
}

fn gated<T: RowElement>(gate: &FlexTensor, up: &FlexTensor, activation: Activation) -> FlexTensor {
    let (shape, gate, up) = (dims(gate), values::<T>(gate), values::<T>(up));
    let mut y = zeros(&gate);
    y.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK)).for_each(|((y, gate), up)| {
        loops::gated(activation, gate, up, y);
    });
    tensor(y, shape.to_vec())
}

fn gated_grads<T: RowElement>(
    dy: &FlexTensor,
    gate: &FlexTensor,
    up: &FlexTensor,
    activation: Activation,
) -> [FlexTensor; 2] {
    let (shape, dy, gate, up) = (dims(gate), values::<T>(dy), values::<T>(gate), values::<T>(up));
    let (mut dgate, mut dup) = (zeros(&gate), zeros(&up));
    let read = dy.par_chunks(CHUNK).zip(gate.par_chunks(CHUNK)).zip(up.par_chunks(CHUNK));
    let written = dgate.par_chunks_mut(CHUNK).zip(dup.par_chunks_mut(CHUNK));
    written.zip(read).for_each(|((dgate, dup), ((dy, gate), up))| {
        loops::gated_grads(activation, [dy, gate, up], [dgate, dup]);
    });
    [tensor(dgate, shape.to_vec()), tensor(dup, shape.to_vec())]
}

fn rotate<T: RowElement>(x: &FlexTensor, cos: &FlexTensor, sin: &FlexTensor, rotation: Rotation) -> FlexTensor {
    let Rotation { len, head_dim, rotary, inverse } = rotation;
    let (shape, x, half) = (dims(x), values::<T>(x), rotary / 2);
    let (cos, sin, sign) = (values::<f32>(cos), values::<f32>(sin), if inverse { -1.0 } else { 1.0 });
    let (mut y, width) = (zeros(&x), shape[1].max(1));
    y.par_chunks_mut(width).zip(x.par_chunks(width)).enumerate().for_each(|(token, (features, x))| {
        features.copy_from_slice(x);
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

/// A token's sums before the activation: of the tokens that it sees, itself first.
fn filter<T: Element>(x: &[T], weight: &[f32], token: usize, conv: &Conv, sums: &mut [f32]) {
    let channels = sums.len();
    sums.fill(0.0);
    for back in 0..conv.taps.min(token - conv.row(token).start + 1) {
        let taps = &weight[(conv.taps - 1 - back) * channels..][..channels];
        let x = &x[(token - back) * channels..][..channels];
        sums.iter_mut().zip(taps).zip(x).for_each(|((sum, w), x)| *sum += w * x.to_f32());
    }
}

fn causal_conv<T: RowElement>(x: &FlexTensor, weight: &FlexTensor, conv: &Conv) -> FlexTensor {
    let (shape, x, weight) = (dims(x), values::<T>(x), values::<f32>(weight));
    let (mut y, channels) = (zeros(&x), shape[1].max(1));
    y.par_chunks_mut(channels).enumerate().for_each_init(
        || vec![0.0; channels],
        |sums, (token, y)| {
            filter(&x, &weight, token, conv, sums);
            let value = |sum: f32| if conv.silu { Activation::Silu.value(sum) } else { sum };
            y.iter_mut().zip(sums).for_each(|(y, sum)| *y = T::from_f32(value(*sum)));
        },
    );
    tensor(y, shape.to_vec())
}

fn causal_conv_grad<T: RowElement>(dy: &FlexTensor, x: &FlexTensor, weight: &FlexTensor, conv: &Conv) -> FlexTensor {
    let (shape, dy, x, weight) = (dims(x), values::<T>(dy), values::<T>(x), values::<f32>(weight));
    let (mut dx, channels) = (zeros(&x), shape[1].max(1));
    // The gradients before the activation, a row at a time.
    let (mut rest, mut rows) = (&mut dx[..], Vec::new());
    for row in conv.rows(shape[0]) {
        let (of_row, behind) = std::mem::take(&mut rest).split_at_mut(row.len() * channels);
        rows.push((row.start, of_row));
        rest = behind;
    }
    rows.into_par_iter().for_each(|(first, dx)| {
        let len = dx.len() / channels;
        let (mut inner, mut sums) = (vec![0.0_f32; dx.len()], vec![0.0_f32; channels]);
        for (position, inner) in inner.chunks_mut(channels).enumerate() {
            filter(&x, &weight, first + position, conv, &mut sums);
            let dy = &dy[(first + position) * channels..][..channels];
            let each = inner.iter_mut().zip(dy).zip(&sums);
            let slope = |sum: f32| if conv.silu { Activation::Silu.slope(sum) } else { 1.0 };
            each.for_each(|((inner, dy), sum)| *inner = dy.to_f32() * slope(*sum));
        }
        for (position, dx) in dx.chunks_mut(channels).enumerate() {
            sums.fill(0.0);
            for ahead in 0..conv.taps.min(len - position) {
                let taps = &weight[(conv.taps - 1 - ahead) * channels..][..channels];
                let inner = &inner[(position + ahead) * channels..][..channels];
                sums.iter_mut().zip(taps).zip(inner).for_each(|((sum, w), inner)| *sum += w * inner);
            }
            dx.iter_mut().zip(&sums).for_each(|(dx, sum)| *dx = T::from_f32(*sum));
        }
    });
    tensor(dx, shape.to_vec())
}

fn scale_columns<T: Element + BurnElement + bytemuck::Pod, O: Element + BurnElement>(
    x: &FlexTensor,
    scale: &FlexTensor,
) -> FlexTensor {
    let (shape, x, scale) = (dims(x), values::<T>(x), values::<f32>(scale));
    let mut y = vec![O::from_f32(0.0); x.len()];
    let width = shape[1].max(1);
    y.par_chunks_mut(width).zip(x.par_chunks(width)).for_each(|(y, x)| {
        y.iter_mut().zip(x.iter().zip(scale.iter())).for_each(|(y, (x, s))| *y = O::from_f32(x.to_f32() * s));
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
fn losses<T: RowElement>(logits: &FlexTensor, targets: &FlexTensor) -> [FlexTensor; 2] {
    let ([rows, width], logits, targets) = (dims(logits), values::<T>(logits), targets.to_contiguous());
    let row = |(row, &target): (&[T], &i32)| {
        let whole = loops::log_sum_exp(row);
        (whole - row[target as usize].to_f32(), whole)
    };
    let (losses, whole) = logits.par_chunks(width.max(1)).zip(targets.storage::<i32>()).map(row).unzip();
    [tensor::<f32>(losses, vec![rows]), tensor::<f32>(whole, vec![rows])]
}

/// The logits become their gradient, in place where nobody else holds them.
fn logit_grads<T: RowElement>(
    dloss: &FlexTensor,
    logits: FlexTensor,
    targets: &FlexTensor,
    log_sum_exp: &FlexTensor,
) -> FlexTensor {
    let ([rows, width], mut grads) = (dims(&logits), logits.to_contiguous());
    drop(logits);
    let (dloss, whole) = (values::<f32>(dloss), values::<f32>(log_sum_exp));
    let targets = targets.to_contiguous();
    let rows_of = grads.storage_mut::<T>()[..rows * width].par_chunks_mut(width.max(1));
    rows_of.zip(targets.storage::<i32>()).zip(&*dloss).zip(&*whole).for_each(|(((row, &target), dloss), whole)| {
        loops::logit_grads(row, target as usize, *dloss, *whole);
    });
    grads
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

    fn causal_conv(x: FloatTensor<Self>, weight: FloatTensor<Self>, conv: Conv) -> FloatTensor<Self> {
        by_dtype!(x, causal_conv(&x, &weight, &conv))
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

    fn gained(y: FloatTensor<Self>, _: FloatTensor<Self>) -> FloatTensor<Self> {
        y
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

    fn causal_conv_grad(
        dy: FloatTensor<Self>,
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        conv: Conv,
    ) -> FloatTensor<Self> {
        let dy = as_dtype(dy, &x);
        by_dtype!(x, causal_conv_grad(&dy, &x, &weight, &conv))
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

    fn gain_gradient(dy: FloatTensor<Self>, y: FloatTensor<Self>, gain: FloatTensor<Self>) -> FloatTensor<Self> {
        let dy = as_dtype(dy, &y);
        let sums = by_dtype!(y, column_products(&dy, &y));
        Self::float_div(sums, Self::float_add_scalar(gain, LEAST_GAIN.into()))
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
        by_dtype!(logits, logit_grads(&dloss, logits, &targets, &log_sum_exp))
    }
}
