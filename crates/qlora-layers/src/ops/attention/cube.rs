//! The GPU implementation: the fused kernels where the device and the dtype have them.

use super::{AttentionOps, AttentionOptions, AttentionPasses, Operands, Sinks, composed};
use crate::ops::cube_tensors::empty;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Shape as TensorShape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use fused_kernels::attention::{self, Backward, Forward, Operand, PackedRows, Rows, Shape, Strides};
use fused_kernels::{FloatFormat, KernelError};

/// The shape for the kernels, if they take it.
fn fused(operands: &Operands<CubeTensor>, options: &AttentionOptions) -> Option<Shape> {
    let Operands { q, k, .. } = operands;
    let format = match q.dtype {
        DType::BF16 => FloatFormat::BF16,
        DType::F16 => FloatFormat::F16,
        _ => return None,
    };
    let [rows, q_len, heads, head_dim] = q.meta.shape().dims();
    let [_, kv_len, kv_heads, _] = k.meta.shape().dims();
    if !attention::supports(&q.client, format) || !attention::supports_head_dim(head_dim) {
        return None;
    }
    let rows = match &options.packed {
        None => Rows::Equal { rows, q_len, kv_len },
        Some(bounds) => Rows::Packed(expect(PackedRows::new(&q.client, bounds))),
    };
    Some(Shape { rows, heads, kv_heads, head_dim, format })
}

/// Shapes and options were checked, so what is left is a failed launch.
fn expect<T>(result: Result<T, KernelError>) -> T {
    result.unwrap_or_else(|e| panic!("attention: {e}"))
}

/// The tensor itself where the kernels can read it, else a contiguous copy.
fn readable(x: CubeTensor) -> CubeTensor {
    let strides = x.meta.strides();
    let in_place = strides[3] == 1
        && strides[..3].iter().all(|stride| stride.is_multiple_of(8))
        && x.handle.offset_start.unwrap_or(0).is_multiple_of(16);
    if in_place { x } else { into_contiguous(x) }
}

fn operand(x: &CubeTensor) -> Operand<'_> {
    let strides = x.meta.strides();
    Operand { handle: &x.handle, strides: Strides { row: strides[0], token: strides[1], head: strides[2] } }
}

fn like(x: &CubeTensor) -> CubeTensor {
    empty(&x.client, &x.device, x.meta.shape().clone(), x.dtype)
}

impl AttentionPasses for CubeBackend {
    fn attention_forward(
        operands: Operands<FloatTensor<Self>>,
        options: &AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let Some(shape) = fused(&operands, options) else {
            return composed::forward::<Self>(operands, options);
        };
        let Operands { q, k, v } = operands;
        let (q, k, v) = (readable(q), readable(k), readable(v));
        let o = like(&q);
        let lse = TensorShape::new([1, 1, shape.heads, shape.rows.queries()]);
        let lse = empty(&q.client, &q.device, lse, DType::F32);
        let sinks = options.sinks.as_ref().map(Sinks::on_device);
        let forward = Forward {
            q: operand(&q),
            k: operand(&k),
            v: operand(&v),
            sinks: sinks.as_ref().map(|sinks| &sinks.handle),
            o: operand(&o),
            lse: &lse.handle,
        };
        expect(attention::forward(&q.client, forward, &shape, options.scores));
        (o, lse)
    }

    fn attention_backward(
        operands: Operands<FloatTensor<Self>>,
        o: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        d_out: FloatTensor<Self>,
        options: &AttentionOptions,
    ) -> [FloatTensor<Self>; 3] {
        let Some(shape) = fused(&operands, options) else {
            return composed::backward::<Self>(operands, o, lse, d_out, options);
        };
        let Operands { q, k, v } = operands;
        let [q, k, v, o, d_out] = [q, k, v, o, d_out].map(readable);
        let (d_q, d_k, d_v) = (like(&q), like(&k), like(&v));
        let backward = Backward {
            q: operand(&q),
            k: operand(&k),
            v: operand(&v),
            o: operand(&o),
            lse: &lse.handle,
            d_out: operand(&d_out),
            d_q: operand(&d_q),
            d_k: operand(&d_k),
            d_v: operand(&d_v),
        };
        expect(attention::backward(&q.client, backward, &shape, options.scores));
        [d_q, d_k, d_v]
    }
}

impl AttentionOps for CubeBackend {
    fn attention_keeping(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        options: AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        Self::attention_forward(Operands { q, k, v }, &options)
    }
}
