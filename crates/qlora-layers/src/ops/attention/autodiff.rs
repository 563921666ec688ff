//! Attention's backward pass, by hand.

use super::{AttentionOps, AttentionOptions, AttentionPasses, Operands};
use crate::ops::float_dtype;
use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, TensorMetadata};

#[derive(Debug)]
struct AttentionBackward;

#[derive(Clone, Debug)]
struct State<F> {
    q: F,
    k: F,
    v: F,
    o: F,
    lse: F,
    options: AttentionOptions,
}

impl<B: AttentionPasses> Backward<B, 3> for AttentionBackward {
    type State = State<FloatTensor<B>>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_out = grads.consume::<B>(&ops.node);
        if ops.parents.iter().all(Option::is_none) {
            return;
        }
        let State { q, k, v, o, lse, options } = ops.state;
        let d_out = B::float_cast(d_out, float_dtype(q.dtype()));
        let gradients = B::attention_backward(Operands { q, k, v }, o, lse, d_out, &options);
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

/// An attention of these inputs, whose forward pass is known or not: the output, recorded, and the log-sum-exp.
fn record<B: AttentionPasses, C: CheckpointStrategy>(
    q: FloatTensor<Autodiff<B, C>>,
    k: FloatTensor<Autodiff<B, C>>,
    v: FloatTensor<Autodiff<B, C>>,
    known: Option<(FloatTensor<B>, FloatTensor<B>)>,
    options: AttentionOptions,
) -> (FloatTensor<Autodiff<B, C>>, FloatTensor<B>) {
    let nodes = [q.node(), k.node(), v.node()];
    let ((q, _q_guard), (k, _k_guard), (v, _v_guard)) = (q.into_parts(), k.into_parts(), v.into_parts());
    let compute = || B::attention_forward(Operands { q: q.clone(), k: k.clone(), v: v.clone() }, &options);
    let (o, lse) = known.unwrap_or_else(compute);
    let recorded = match AttentionBackward.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(State { q, k, v, o: o.clone(), lse: lse.clone(), options }, o),
        OpsKind::UnTracked(prep) => prep.finish(o),
    };
    (recorded, lse)
}

impl<B: AttentionPasses, C: CheckpointStrategy> AttentionOps for Autodiff<B, C> {
    fn attention_keeping(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        options: AttentionOptions,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (o, lse) = record::<B, C>(q, k, v, None, options);
        (o, Self::from_inner(lse))
    }

    fn attention_again(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        output: FloatTensor<Self>,
        log_sum_exp: FloatTensor<Self>,
        options: AttentionOptions,
    ) -> FloatTensor<Self> {
        let ((o, _o_guard), (lse, _lse_guard)) = (output.into_parts(), log_sum_exp.into_parts());
        record::<B, C>(q, k, v, Some((o, lse)), options).0
    }
}
