//! The GPU implementation, composed of stock operations and the products of [`QloraOps`](crate::ops::QloraOps).

use super::{DeltaRows, DeltaRuleOps, DeltaRulePasses, Operands, composed};
use burn::backend::tensor::FloatTensor;
use burn::tensor::Tensor;
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use host_copies::{from_cube, into_cube};

fn tensors(operands: Operands<CubeTensor>) -> composed::Inputs {
    let Operands { q, k, v, g, beta } = operands;
    composed::Inputs { q: from_cube(q), k: from_cube(k), v: from_cube(v), g: from_cube(g), beta: from_cube(beta) }
}

/// The tensor, which came from a device and is on it.
fn cube<const D: usize>(tensor: Tensor<D>) -> CubeTensor {
    into_cube(tensor).unwrap_or_else(|| panic!("delta_rule: a tensor left its device"))
}

impl DeltaRulePasses for CubeBackend {
    fn delta_rule_forward(
        operands: Operands<FloatTensor<Self>>,
        state: Option<FloatTensor<Self>>,
        rows: &DeltaRows,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (o, state) = composed::forward(tensors(operands), state.map(from_cube), rows);
        (cube(o), cube(state))
    }

    fn delta_rule_backward(
        operands: Operands<FloatTensor<Self>>,
        d_out: FloatTensor<Self>,
        rows: &DeltaRows,
    ) -> [FloatTensor<Self>; 5] {
        let composed::Inputs { q, k, v, g, beta } = composed::backward(tensors(operands), from_cube(d_out), rows);
        [cube(q), cube(k), cube(v), cube(g), cube(beta)]
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
        Self::delta_rule_forward(Operands { q, k, v, g, beta }, None, &rows).0
    }

    fn delta_rule_after(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        g: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        state: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        Self::delta_rule_forward(Operands { q, k, v, g, beta }, Some(state), &DeltaRows::default())
    }
}
