//! Backward passes, written by hand.

use super::{LoraDropout, LoraFactor, LoraTerms, Packed4bit, QloraOps, float_dtype};
use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, TensorMetadata};
use burn::tensor::{FloatDType, Shape};

/// Backward of `y = x Wᵀ`: `dx = dy W`, in the dtype of `x`. The state is the packed weight; `x` is not kept.
#[derive(Debug)]
struct Linear4bitBackward;

/// The packed weight, and the dtype of the input, which its gradient has too.
type FrozenState<B> = (Packed4bit<B>, FloatDType);

/// The weight as the inner backend has it: integer tensors are the same there.
fn inner<B: Backend, C: CheckpointStrategy>(weight: Packed4bit<Autodiff<B, C>>) -> Packed4bit<B> {
    let Packed4bit { codes, absmax, nested_absmax, layout } = weight;
    Packed4bit { codes, absmax, nested_absmax, layout }
}

impl<B: QloraOps> Backward<B, 1> for Linear4bitBackward {
    type State = FrozenState<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [parent] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        if let Some(parent) = parent {
            let (weight, dtype) = ops.state;
            grads.register::<B>(parent.id, B::linear_4bit_input_grad(B::float_cast(dy, dtype), weight));
        }
    }
}

/// Backward of `y = x Wᵀ` for a frozen dense `W`: `dx = dy W`, in the dtype of `x`.
#[derive(Debug)]
struct FrozenLinearBackward;

impl<B: QloraOps> Backward<B, 1> for FrozenLinearBackward {
    type State = (FloatTensor<B>, FloatDType);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [parent] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        if let Some(parent) = parent {
            let (weight, dtype) = ops.state;
            grads.register::<B>(parent.id, B::frozen_linear_input_grad(B::float_cast(dy, dtype), weight));
        }
    }
}

/// Backward of `y = x Wᵀ + u Bᵀ` with `u = s·dropout(x) Aᵀ`; see the module above for the gradients.
#[derive(Debug)]
struct LoraLinearBackward;

#[derive(Clone, Debug)]
struct LoraState<B: Backend> {
    /// Kept for `dA`.
    x: Option<FloatTensor<B>>,
    /// Kept for `dB`.
    u: Option<FloatTensor<B>>,
    lora_a: FloatTensor<B>,
    lora_b: FloatTensor<B>,
    weight: Packed4bit<B>,
    /// Dtype of `x`, which its gradient has too.
    dtype: FloatDType,
    scaling: f32,
    dropout: Option<LoraDropout>,
}

impl<B: QloraOps> Backward<B, 3> for LoraLinearBackward {
    type State = LoraState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x_parent, a_parent, b_parent] = ops.parents;
        let LoraState { x, u, lora_a, lora_b, weight, dtype, scaling, dropout } = ops.state;
        let dy = B::float_cast(grads.consume::<B>(&ops.node), dtype);
        if let (Some(parent), Some(u)) = (b_parent, u) {
            grads.register::<B>(parent.id, B::low_rank_gradient(dy.clone(), u, LoraFactor::B, None));
        }
        if x_parent.is_none() && a_parent.is_none() {
            return;
        }
        let v = B::low_rank_project(dy.clone(), lora_b, LoraFactor::B, scaling, None);
        if let (Some(parent), Some(x)) = (a_parent, x) {
            grads.register::<B>(parent.id, B::low_rank_gradient(x, v.clone(), LoraFactor::A, dropout));
        }
        if let Some(parent) = x_parent {
            grads.register::<B>(parent.id, B::linear_4bit_low_rank_input_grad(dy, weight, v, lora_a, dropout));
        }
    }
}

/// Backward of `y = l r`: `dl = dy rᵀ`, `dr = lᵀ dy`, in the operands' dtype; keeps an operand only where the
/// other one needs it.
#[derive(Debug)]
struct MatmulBackward;

impl<B: QloraOps> Backward<B, 2> for MatmulBackward {
    type State = ([Option<FloatTensor<B>>; 2], FloatDType);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let ([lhs_parent, rhs_parent], ([lhs, rhs], dtype)) = (ops.parents, ops.state);
        let dy = B::float_cast(grads.consume::<B>(&ops.node), dtype);
        let transposed = |x: FloatTensor<B>| {
            let rank = x.shape().num_dims();
            B::float_swap_dims(x, rank - 2, rank - 1)
        };
        if let (Some(parent), Some(rhs)) = (lhs_parent, rhs) {
            grads.register::<B>(parent.id, B::matmul(dy.clone(), transposed(rhs), dtype));
        }
        if let (Some(parent), Some(lhs)) = (rhs_parent, lhs) {
            grads.register::<B>(parent.id, B::matmul(transposed(lhs), dy, dtype));
        }
    }
}

/// Backward of dropout: the same mask, drawn again, on the gradient.
#[derive(Debug)]
struct DropoutBackward;

impl<B: QloraOps> Backward<B, 1> for DropoutBackward {
    type State = (u64, f32);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [parent] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        if let Some(parent) = parent {
            let (seed, p) = ops.state;
            grads.register::<B>(parent.id, B::seeded_dropout(dy, seed, p));
        }
    }
}

impl<B: QloraOps, C: CheckpointStrategy> QloraOps for Autodiff<B, C> {
    fn dequantize_4bit(weight: Packed4bit<Self>, dtype: FloatDType) -> FloatTensor<Self> {
        use burn::backend::AutodiffBackend;
        Self::from_inner(B::dequantize_4bit(inner(weight), dtype))
    }

    fn linear_4bit(x: FloatTensor<Self>, weight: Packed4bit<Self>, out: FloatDType) -> FloatTensor<Self> {
        let weight = inner(weight);
        match Linear4bitBackward.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (x, _guard) = x.into_parts();
                let dtype = float_dtype(x.dtype());
                let y = B::linear_4bit(x, weight.clone(), out);
                prep.finish((weight, dtype), y)
            }
            OpsKind::UnTracked(prep) => {
                let (x, _guard) = x.into_parts();
                prep.finish(B::linear_4bit(x, weight, out))
            }
        }
    }

    fn linear_4bit_input_grad(dy: FloatTensor<Self>, weight: Packed4bit<Self>) -> FloatTensor<Self> {
        // The adjoint map is linear too, so its own backward is the forward product.
        #[derive(Debug)]
        struct InputGradBackward;
        impl<B: QloraOps> Backward<B, 1> for InputGradBackward {
            type State = FrozenState<B>;

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let [parent] = ops.parents;
                let ddx = grads.consume::<B>(&ops.node);
                if let Some(parent) = parent {
                    let (weight, dtype) = ops.state;
                    grads.register::<B>(parent.id, B::linear_4bit(ddx, weight, dtype));
                }
            }
        }
        let weight = inner(weight);
        match InputGradBackward.prepare::<C>([dy.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (dy, _guard) = dy.into_parts();
                let dtype = float_dtype(dy.dtype());
                let dx = B::linear_4bit_input_grad(dy, weight.clone());
                prep.finish((weight, dtype), dx)
            }
            OpsKind::UnTracked(prep) => {
                let (dy, _guard) = dy.into_parts();
                prep.finish(B::linear_4bit_input_grad(dy, weight))
            }
        }
    }

    fn frozen_linear(x: FloatTensor<Self>, weight: FloatTensor<Self>, out: FloatDType) -> FloatTensor<Self> {
        let (weight, _weight_guard) = weight.into_parts();
        match FrozenLinearBackward.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (x, _guard) = x.into_parts();
                let dtype = float_dtype(x.dtype());
                prep.finish((weight.clone(), dtype), B::frozen_linear(x, weight, out))
            }
            OpsKind::UnTracked(prep) => {
                let (x, _guard) = x.into_parts();
                prep.finish(B::frozen_linear(x, weight, out))
            }
        }
    }

    fn lora_linear_4bit(
        x: FloatTensor<Self>,
        weight: Packed4bit<Self>,
        lora_a: FloatTensor<Self>,
        lora_b: FloatTensor<Self>,
        LoraTerms { scaling, dropout, gradients_only }: LoraTerms,
    ) -> FloatTensor<Self> {
        let weight = inner(weight);
        let (a_tracked, b_tracked) = (lora_a.is_tracked(), lora_b.is_tracked());
        let nodes = [x.node(), lora_a.node(), lora_b.node()];
        let ((x, _x_guard), (lora_a, _a_guard), (lora_b, _b_guard)) =
            (x.into_parts(), lora_a.into_parts(), lora_b.into_parts());
        let dtype = float_dtype(x.dtype());
        let u = B::low_rank_project(x.clone(), lora_a.clone(), LoraFactor::A, scaling, dropout);
        let product = |u| B::linear_4bit_low_rank(x.clone(), weight.clone(), u, lora_b.clone());
        match LoraLinearBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let y = match gradients_only {
                    true => B::float_empty(Shape::new([x.shape()[0], weight.layout.out_features]), &x.device(), dtype),
                    false => product(u.clone()),
                };
                let state = LoraState {
                    x: a_tracked.then_some(x),
                    u: b_tracked.then_some(u),
                    lora_a,
                    lora_b,
                    weight,
                    dtype,
                    scaling,
                    dropout,
                };
                prep.finish(state, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(product(u)),
        }
    }

    fn matmul(lhs: FloatTensor<Self>, rhs: FloatTensor<Self>, out: FloatDType) -> FloatTensor<Self> {
        let (lhs_tracked, rhs_tracked) = (lhs.is_tracked(), rhs.is_tracked());
        match MatmulBackward.prepare::<C>([lhs.node(), rhs.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let ((lhs, _lhs_guard), (rhs, _rhs_guard)) = (lhs.into_parts(), rhs.into_parts());
                let state = [rhs_tracked.then(|| lhs.clone()), lhs_tracked.then(|| rhs.clone())];
                let dtype = float_dtype(lhs.dtype());
                prep.finish((state, dtype), B::matmul(lhs, rhs, out))
            }
            OpsKind::UnTracked(prep) => {
                let ((lhs, _lhs_guard), (rhs, _rhs_guard)) = (lhs.into_parts(), rhs.into_parts());
                prep.finish(B::matmul(lhs, rhs, out))
            }
        }
    }

    fn seeded_dropout(x: FloatTensor<Self>, seed: u64, p: f32) -> FloatTensor<Self> {
        match DropoutBackward.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (x, _guard) = x.into_parts();
                prep.finish((seed, p), B::seeded_dropout(x, seed, p))
            }
            OpsKind::UnTracked(prep) => {
                let (x, _guard) = x.into_parts();
                prep.finish(B::seeded_dropout(x, seed, p))
            }
        }
    }

    fn seeded_noise(magnitudes: FloatTensor<Self>, width: usize, seed: u64, out: FloatDType) -> FloatTensor<Self> {
        use burn::backend::AutodiffBackend;
        let (magnitudes, _guard) = magnitudes.into_parts();
        Self::from_inner(B::seeded_noise(magnitudes, width, seed, out))
    }
}
