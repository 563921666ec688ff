//! Backward passes, written by hand.

use super::{Activation, Conv, FusedGradients, FusedOps, Norm, Rotation};
use burn::backend::Autodiff;
use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::FloatDType;

#[derive(Debug)]
struct RmsNormBackward;

impl<B: FusedGradients> Backward<B, 2> for RmsNormBackward {
    /// `x`, the weight, the constants.
    type State = (FloatTensor<B>, FloatTensor<B>, Norm);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let ([x_parent, weight_parent], (x, weight, norm)) = (ops.parents, ops.state);
        let dy = grads.consume::<B>(&ops.node);
        if let Some(parent) = weight_parent {
            grads.register::<B>(parent.id, B::rms_norm_weight_grad(dy.clone(), x.clone(), norm));
        }
        if let Some(parent) = x_parent {
            grads.register::<B>(parent.id, B::rms_norm_input_grad(dy, x, weight, norm));
        }
    }
}

#[derive(Debug)]
struct GatedBackward;

impl<B: FusedGradients> Backward<B, 2> for GatedBackward {
    /// `gate`, `up`, the function.
    type State = (FloatTensor<B>, FloatTensor<B>, Activation);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (parents, (gate, up, activation)) = (ops.parents, ops.state);
        let dy = grads.consume::<B>(&ops.node);
        for (parent, grad) in parents.into_iter().zip(B::gated_grads(dy, gate, up, activation)) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

#[derive(Debug)]
struct RotateBackward;

impl<B: FusedGradients> Backward<B, 1> for RotateBackward {
    /// The tables and the rotation.
    type State = (FloatTensor<B>, FloatTensor<B>, Rotation);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let ([parent], (cos, sin, rotation)) = (ops.parents, ops.state);
        let dy = grads.consume::<B>(&ops.node);
        if let Some(parent) = parent {
            let back = Rotation { inverse: !rotation.inverse, ..rotation };
            grads.register::<B>(parent.id, B::rotate(dy, cos, sin, back));
        }
    }
}

#[derive(Debug)]
struct CausalConvBackward;

impl<B: FusedGradients> Backward<B, 1> for CausalConvBackward {
    /// `x`, the weight, how it runs.
    type State = (FloatTensor<B>, FloatTensor<B>, Conv);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let ([parent], (x, weight, conv)) = (ops.parents, ops.state);
        let dy = grads.consume::<B>(&ops.node);
        if let Some(parent) = parent {
            grads.register::<B>(parent.id, B::causal_conv_grad(dy, x, weight, conv));
        }
    }
}

#[derive(Debug)]
struct ReorderColumnsBackward;

impl<B: FusedGradients> Backward<B, 1> for ReorderColumnsBackward {
    /// The order and its inverse.
    type State = (IntTensor<B>, IntTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let ([parent], (order, inverse)) = (ops.parents, ops.state);
        let dy = grads.consume::<B>(&ops.node);
        if let Some(parent) = parent {
            grads.register::<B>(parent.id, B::reorder_columns(dy, inverse, order));
        }
    }
}

#[derive(Debug)]
struct ScaleColumnsBackward;

impl<B: FusedGradients> Backward<B, 2> for ScaleColumnsBackward {
    /// `x` and the factors.
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (parents, (x, scale)) = (ops.parents, ops.state);
        let dy = grads.consume::<B>(&ops.node);
        for (parent, grad) in parents.into_iter().zip(B::scale_columns_grads(dy, x, scale)) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

#[derive(Debug)]
struct GainedBackward;

impl<B: FusedGradients> Backward<B, 2> for GainedBackward {
    /// The result and the gains, where these have a gradient.
    type State = Option<(FloatTensor<B>, FloatTensor<B>)>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [y_parent, gain_parent] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        if let (Some(parent), Some((y, gain))) = (gain_parent, ops.state) {
            grads.register::<B>(parent.id, B::gain_gradient(dy.clone(), y, gain));
        }
        if let Some(parent) = y_parent {
            grads.register::<B>(parent.id, dy);
        }
    }
}

#[derive(Debug)]
struct CrossEntropyBackward;

impl<B: FusedGradients> Backward<B, 1> for CrossEntropyBackward {
    /// The logits, which become their gradient, the targets, and each row's log-sum-exp.
    type State = (FloatTensor<B>, IntTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let ([parent], (logits, targets, log_sum_exp)) = (ops.parents, ops.state);
        let dloss = grads.consume::<B>(&ops.node);
        if let Some(parent) = parent {
            grads.register::<B>(parent.id, B::logit_grads(dloss, logits, targets, log_sum_exp));
        }
    }
}

impl<B: FusedGradients, C: CheckpointStrategy> FusedOps for Autodiff<B, C> {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, norm: Norm) -> FloatTensor<Self> {
        let nodes = [x.node(), weight.node()];
        let ((x, _x_guard), (weight, _weight_guard)) = (x.into_parts(), weight.into_parts());
        match RmsNormBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x.clone(), weight.clone(), norm), B::rms_norm(x, weight, norm)),
            OpsKind::UnTracked(prep) => prep.finish(B::rms_norm(x, weight, norm)),
        }
    }

    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        let nodes = [gate.node(), up.node()];
        let ((gate, _gate_guard), (up, _up_guard)) = (gate.into_parts(), up.into_parts());
        match GatedBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                prep.finish((gate.clone(), up.clone(), activation), B::gated(gate, up, activation))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::gated(gate, up, activation)),
        }
    }

    fn rotate(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        rotation: Rotation,
    ) -> FloatTensor<Self> {
        let nodes = [x.node()];
        let ((x, _x_guard), (cos, _cos_guard), (sin, _sin_guard)) =
            (x.into_parts(), cos.into_parts(), sin.into_parts());
        match RotateBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                prep.finish((cos.clone(), sin.clone(), rotation), B::rotate(x, cos, sin, rotation))
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rotate(x, cos, sin, rotation)),
        }
    }

    fn causal_conv(x: FloatTensor<Self>, weight: FloatTensor<Self>, conv: Conv) -> FloatTensor<Self> {
        let nodes = [x.node()];
        let ((x, _x_guard), (weight, _weight_guard)) = (x.into_parts(), weight.into_parts());
        match CausalConvBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let y = B::causal_conv(x.clone(), weight.clone(), conv.clone());
                prep.finish((x, weight, conv), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::causal_conv(x, weight, conv)),
        }
    }

    fn reorder_columns(x: FloatTensor<Self>, order: IntTensor<Self>, inverse: IntTensor<Self>) -> FloatTensor<Self> {
        let nodes = [x.node()];
        let (x, _x_guard) = x.into_parts();
        match ReorderColumnsBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let y = B::reorder_columns(x, order.clone(), inverse.clone());
                prep.finish((order, inverse), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::reorder_columns(x, order, inverse)),
        }
    }

    fn scale_columns(x: FloatTensor<Self>, scale: FloatTensor<Self>, out: FloatDType) -> FloatTensor<Self> {
        let nodes = [x.node(), scale.node()];
        let ((x, _x_guard), (scale, _scale_guard)) = (x.into_parts(), scale.into_parts());
        match ScaleColumnsBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((x.clone(), scale.clone()), B::scale_columns(x, scale, out)),
            OpsKind::UnTracked(prep) => prep.finish(B::scale_columns(x, scale, out)),
        }
    }

    fn gained(y: FloatTensor<Self>, gain: FloatTensor<Self>) -> FloatTensor<Self> {
        let (nodes, tracked) = ([y.node(), gain.node()], gain.is_tracked());
        let ((y, _y_guard), (gain, _gain_guard)) = (y.into_parts(), gain.into_parts());
        match GainedBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish(tracked.then(|| (y.clone(), gain)), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }

    fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        let nodes = [logits.node()];
        let (logits, _logits_guard) = logits.into_parts();
        match CrossEntropyBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let [losses, log_sum_exp] = B::losses(logits.clone(), targets.clone());
                prep.finish((logits, targets, log_sum_exp), losses)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::cross_entropy(logits, targets)),
        }
    }
}
