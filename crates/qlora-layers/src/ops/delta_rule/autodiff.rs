//! The delta rule's backward pass.

use super::{DeltaRows, DeltaRuleOps, DeltaRulePasses, Operands};
use crate::ops::float_dtype;
use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, TensorMetadata};

#[derive(Debug)]
struct DeltaRuleBackward;

impl<B: DeltaRulePasses> Backward<B, 5> for DeltaRuleBackward {
    type State = (Operands<FloatTensor<B>>, DeltaRows);

    fn backward(self, ops: Ops<Self::State, 5>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_out = grads.consume::<B>(&ops.node);
        if ops.parents.iter().all(Option::is_none) {
            return;
        }
        let (operands, rows) = ops.state;
        let d_out = B::float_cast(d_out, float_dtype(operands.v.dtype()));
        let gradients = B::delta_rule_backward(operands, d_out, &rows);
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(parent) = parent {
                grads.register::<B>(parent.id, gradient);
            }
        }
    }
}

impl<B: DeltaRulePasses, C: CheckpointStrategy> DeltaRuleOps for Autodiff<B, C> {
    fn delta_rule(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        g: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        rows: DeltaRows,
    ) -> FloatTensor<Self> {
        let nodes = [q.node(), k.node(), v.node(), g.node(), beta.node()];
        let ((q, _q_guard), (k, _k_guard), (v, _v_guard)) = (q.into_parts(), k.into_parts(), v.into_parts());
        let ((g, _g_guard), (beta, _beta_guard)) = (g.into_parts(), beta.into_parts());
        let operands = Operands { q, k, v, g, beta };
        match DeltaRuleBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let o = B::delta_rule_forward(operands.clone(), &rows);
                prep.finish((operands, rows), o)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::delta_rule_forward(operands, &rows)),
        }
    }

    fn delta_rule_after(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        g: FloatTensor<Self>,
        beta: FloatTensor<Self>,
        state: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let [(q, _), (k, _), (v, _), (g, _), (beta, _), (state, _)] =
            [q, k, v, g, beta, state].map(|tensor| tensor.into_parts());
        let (o, state) = B::delta_rule_forward_after(Operands { q, k, v, g, beta }, state);
        (Self::from_inner(o), Self::from_inner(state))
    }
}
