//! Backward passes, written by hand.

use super::{Layout4bit, QloraOps};
use burn::backend::Autodiff;
use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::FloatDType;

/// Backward of `y = x Wᵀ`: `dx = dy W`. The state is the packed weight; `x` is not kept.
#[derive(Debug)]
struct Linear4bitBackward;

#[derive(Clone, Debug)]
struct Weight<I> {
    codes: I,
    absmax: I,
    nested_absmax: I,
    layout: Layout4bit,
}

impl<B: QloraOps> Backward<B, 1> for Linear4bitBackward {
    type State = Weight<IntTensor<B>>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [parent] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        if let Some(parent) = parent {
            let Weight { codes, absmax, nested_absmax, layout } = ops.state;
            grads.register::<B>(parent.id, B::linear_4bit_input_grad(dy, codes, absmax, nested_absmax, layout));
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
    fn dequantize_4bit(
        codes: IntTensor<Self>,
        absmax: IntTensor<Self>,
        nested_absmax: IntTensor<Self>,
        layout: Layout4bit,
        dtype: FloatDType,
    ) -> FloatTensor<Self> {
        use burn::backend::AutodiffBackend;
        Self::from_inner(B::dequantize_4bit(codes, absmax, nested_absmax, layout, dtype))
    }

    fn linear_4bit(
        x: FloatTensor<Self>,
        codes: IntTensor<Self>,
        absmax: IntTensor<Self>,
        nested_absmax: IntTensor<Self>,
        layout: Layout4bit,
    ) -> FloatTensor<Self> {
        match Linear4bitBackward.prepare::<C>([x.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (x, _guard) = x.into_parts();
                let y = B::linear_4bit(x, codes.clone(), absmax.clone(), nested_absmax.clone(), layout);
                prep.finish(Weight { codes, absmax, nested_absmax, layout }, y)
            }
            OpsKind::UnTracked(prep) => {
                let (x, _guard) = x.into_parts();
                prep.finish(B::linear_4bit(x, codes, absmax, nested_absmax, layout))
            }
        }
    }

    fn linear_4bit_input_grad(
        dy: FloatTensor<Self>,
        codes: IntTensor<Self>,
        absmax: IntTensor<Self>,
        nested_absmax: IntTensor<Self>,
        layout: Layout4bit,
    ) -> FloatTensor<Self> {
        // The adjoint map is linear too, so its own backward is the forward product.
        #[derive(Debug)]
        struct InputGradBackward;
        impl<B: QloraOps> Backward<B, 1> for InputGradBackward {
            type State = Weight<IntTensor<B>>;

            fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
                let [parent] = ops.parents;
                let ddx = grads.consume::<B>(&ops.node);
                if let Some(parent) = parent {
                    let Weight { codes, absmax, nested_absmax, layout } = ops.state;
                    grads.register::<B>(parent.id, B::linear_4bit(ddx, codes, absmax, nested_absmax, layout));
                }
            }
        }
        match InputGradBackward.prepare::<C>([dy.node()]).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (dy, _guard) = dy.into_parts();
                let dx = B::linear_4bit_input_grad(dy, codes.clone(), absmax.clone(), nested_absmax.clone(), layout);
                prep.finish(Weight { codes, absmax, nested_absmax, layout }, dx)
            }
            OpsKind::UnTracked(prep) => {
                let (dy, _guard) = dy.into_parts();
                prep.finish(B::linear_4bit_input_grad(dy, codes, absmax, nested_absmax, layout))
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
}
