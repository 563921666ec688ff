//! The GPU implementation: the fused kernels where the device, the dtype and the widths have them, else composed.

use super::{DeltaRows, DeltaRuleOps, DeltaRulePasses, Operands, composed};
use crate::ops::cube_tensors::empty;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{DType, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use fused_kernels::delta_rule::{self, Gradients, Inputs, Operand, Recurrent, Rows, Shape, Sizes};
use fused_kernels::{FloatFormat, KernelError};
use host_copies::{from_cube, into_cube, owned};

/// Tokens up to which rows go on token by token.
const FEW_TOKENS: usize = 16;

fn format(x: &CubeTensor) -> FloatFormat {
    match x.dtype {
        DType::BF16 => FloatFormat::BF16,
        DType::F16 => FloatFormat::F16,
        _ => FloatFormat::F32,
    }
}

/// The shape for the kernels, if they take it.
fn fused(operands: &Operands<CubeTensor>, rows: &DeltaRows) -> Option<Shape> {
    let Operands { k, v, .. } = operands;
    let format = format(k);
    let [count, len, key_heads, key_dim] = k.meta.shape().dims();
    let [_, _, value_heads, value_dim] = v.meta.shape().dims();
    if !format.is_half() || !delta_rule::supports(&k.client, format, [key_dim, value_dim]) {
        return None;
    }
    let rows = match &rows.packed {
        Some(bounds) => Rows::new(&k.client, bounds),
        None => {
            let bounds: Vec<u32> = (0..=count).map(|row| (row * len) as u32).collect();
            Rows::new(&k.client, &bounds)
        }
    };
    Some(Shape { rows: expect(rows), key_heads, value_heads, format })
}

/// Shapes were checked, so what is left is a failed launch.
fn expect<T>(result: Result<T, KernelError>) -> T {
    result.unwrap_or_else(|e| panic!("delta_rule: {e}"))
}

/// The tensor itself where the kernels can read it, else a contiguous copy: a token's heads are neighbours, and rows follow one
/// another.
fn readable(x: CubeTensor) -> CubeTensor {
    let ([rows, len, _, dim], strides) = (x.meta.shape().dims(), x.meta.strides());
    let in_place = strides[3] == 1
        && strides[2] == dim
        && strides[1].is_multiple_of(8)
        && (rows == 1 || strides[0] == len * strides[1])
        && x.handle.offset_start.unwrap_or(0).is_multiple_of(16);
    if in_place { x } else { into_contiguous(x) }
}

fn operand(x: &CubeTensor) -> Operand<'_> {
    Operand { handle: &x.handle, stride: x.meta.strides()[1] }
}

fn like(x: &CubeTensor) -> CubeTensor {
    empty(&x.client, &x.device, x.meta.shape().clone(), x.dtype)
}

/// The operands as the kernels read them.
fn prepared(operands: Operands<CubeTensor>) -> Operands<CubeTensor> {
    let Operands { q, k, v, g, beta } = operands;
    let [q, k, v] = [q, k, v].map(readable);
    let [g, beta] = [g, beta].map(into_contiguous);
    Operands { q, k, v, g, beta }
}

fn inputs(operands: &Operands<CubeTensor>) -> Inputs<'_> {
    let Operands { q, k, v, g, beta } = operands;
    Inputs { q: operand(q), k: operand(k), v: operand(v), g: &g.handle, beta: &beta.handle }
}

/// The outputs of rows that start from zeros, by the kernels.
fn fused_forward(operands: Operands<CubeTensor>, shape: &Shape) -> CubeTensor {
    let operands = prepared(operands);
    let out = like(&operands.v);
    expect(delta_rule::forward(&out.client, inputs(&operands), operand(&out), shape));
    out
}

/// Outputs and states of rows that go on by a few tokens, token by token.
fn recurrent(operands: Operands<CubeTensor>, state: CubeTensor) -> (CubeTensor, CubeTensor) {
    let Operands { q, k, v, g, beta } = operands;
    let [q, k, v, g, beta] = [q, k, v, g, beta].map(into_contiguous);
    let state = owned(state);
    let ([rows, len, key_heads, key_dim], [_, _, value_heads, value_dim]) =
        (k.meta.shape().dims(), v.meta.shape().dims());
    let format = format(&k);
    let out = like(&v);
    let buffers = Recurrent {
        q: &q.handle,
        k: &k.handle,
        v: &v.handle,
        g: &g.handle,
        beta: &beta.handle,
        state: &state.handle,
        out: &out.handle,
    };
    let sizes = Sizes { rows, len, key_heads, value_heads, key_dim, value_dim, format };
    expect(delta_rule::recurrent(&v.client, buffers, sizes));
    (out, state)
}

fn tensors(operands: Operands<CubeTensor>) -> composed::Inputs {
    let Operands { q, k, v, g, beta } = operands;
    composed::Inputs { q: from_cube(q), k: from_cube(k), v: from_cube(v), g: from_cube(g), beta: from_cube(beta) }
}

/// The tensor, which came from a device and is on it.
fn cube<const D: usize>(tensor: Tensor<D>) -> CubeTensor {
    into_cube(tensor).unwrap_or_else(|| panic!("delta_rule: a tensor left its device"))
}

impl DeltaRulePasses for CubeBackend {
    fn delta_rule_forward(operands: Operands<FloatTensor<Self>>, rows: &DeltaRows) -> FloatTensor<Self> {
        match fused(&operands, rows) {
            Some(shape) => fused_forward(operands, &shape),
            None => cube(composed::forward(tensors(operands), None, rows).0),
        }
    }

    fn delta_rule_forward_after(
        operands: Operands<FloatTensor<Self>>,
        state: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [_, len, _, _] = operands.v.meta.shape().dims();
        if len <= FEW_TOKENS {
            return recurrent(operands, state);
        }
        let (o, state) = composed::forward(tensors(operands), Some(from_cube(state)), &DeltaRows::default());
        (cube(o), cube(state))
    }

    fn delta_rule_backward(
        operands: Operands<FloatTensor<Self>>,
        d_out: FloatTensor<Self>,
        rows: &DeltaRows,
    ) -> [FloatTensor<Self>; 5] {
        let Some(shape) = fused(&operands, rows) else {
            let composed::Inputs { q, k, v, g, beta } = composed::backward(tensors(operands), from_cube(d_out), rows);
            return [cube(q), cube(k), cube(v), cube(g), cube(beta)];
        };
        let (operands, d_out) = (prepared(operands), readable(d_out));
        let Operands { q, k, v, g, beta } = &operands;
        let [d_q, d_k, d_v, d_g, d_beta] = [q, k, v, g, beta].map(like);
        let gradients =
            Gradients { q: &d_q.handle, k: &d_k.handle, v: &d_v.handle, g: &d_g.handle, beta: &d_beta.handle };
        expect(delta_rule::backward(&q.client, inputs(&operands), operand(&d_out), gradients, &shape));
        [d_q, d_k, d_v, d_g, d_beta]
    }
}

impl DeltaRuleOps for CubeBackend {
    fn delta_rule(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        g: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        rows: DeltaRows,
    ) -> FloatTensor<Self> {
        Self::delta_rule_forward(Operands { q, k, v, g, beta }, &rows)
    }

    fn delta_rule_after(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        g: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        state: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        Self::delta_rule_forward_after(Operands { q, k, v, g, beta }, state)
    }
}
