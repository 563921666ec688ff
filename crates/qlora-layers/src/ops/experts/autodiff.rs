//! Backward passes, written by hand.

use super::mlp::{self, Experts, Inner, Wanted};
use super::{
    ExpertBias, ExpertFactors, ExpertMlpTerms, ExpertOps, ExpertParts, ExpertProjection, RoutedRows, Stacked4bit,
};
use crate::ops::float_dtype;
use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, AutodiffBackend, Backend, TensorMetadata};
use burn::tensor::FloatDType;
use fused_kernels::experts::Routing;

/// Backward of the router's weights: the gradient of its scores.
#[derive(Debug)]
struct WeightsBackward;

/// Weights, scores, the routing, and whether weights are divided by their sum.
type WeightsState<B> = (FloatTensor<B>, FloatTensor<B>, RoutedRows<B>, bool);

impl<B: ExpertParts> Backward<B, 1> for WeightsBackward {
    type State = WeightsState<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let ([parent], (weights, scores, routed, normalise)) = (ops.parents, ops.state);
        let dweights = grads.consume::<B>(&ops.node);
        if let Some(parent) = parent {
            let grad = B::route_weight_grads(dweights, weights, scores, &routed, normalise);
            grads.register::<B>(parent.id, grad);
        }
    }
}

/// Backward of the experts' MLPs.
#[derive(Debug)]
struct MlpBackward;

#[derive(Clone, Debug)]
struct MlpState<B: Backend> {
    /// Kept where `lora_a` of gate or up is trained.
    x: Option<FloatTensor<B>>,
    weights: FloatTensor<B>,
    inner: Inner<B>,
    experts: Experts<B>,
    /// Dtype of `x`.
    dtype: FloatDType,
}

impl<B: ExpertParts> Backward<B, 8> for MlpBackward {
    type State = MlpState<B>;

    fn backward(self, ops: Ops<Self::State, 8>, grads: &mut Gradients, _: &mut Checkpointer) {
        let MlpState { x, weights, inner, experts, dtype } = ops.state;
        let dy = B::float_cast(grads.consume::<B>(&ops.node), dtype);
        let [x_parent, weights_parent, a, b, c, d, e, f] = ops.parents;
        // Where factors are missing, another tensor's node is in their place.
        let mut parents = [[a, b], [c, d], [e, f]];
        for (parents, projection) in parents.iter_mut().zip(&experts.projections) {
            if matches!(projection.factors, ExpertFactors::Missing) {
                *parents = [None, None];
            }
        }
        let wanted = Wanted {
            x: x_parent.is_some(),
            weights: weights_parent.is_some(),
            factors: parents.each_ref().map(|parents| parents.each_ref().map(Option::is_some)),
        };
        let found = mlp::backward::<B>(dy, x, weights, inner, &experts, wanted);
        let factors = parents.into_iter().flatten().zip(found.factors.into_iter().flatten());
        for (parent, grad) in [(x_parent, found.x), (weights_parent, found.weights)].into_iter().chain(factors) {
            if let (Some(parent), Some(grad)) = (parent, grad) {
                grads.register::<B>(parent.id, grad);
            }
        }
    }
}

/// As the backend below has it: integer tensors are the same there.
fn inner_rows<B: Backend, C: CheckpointStrategy>(routed: RoutedRows<Autodiff<B, C>>) -> RoutedRows<B> {
    RoutedRows { words: routed.words, host: routed.host }
}

/// Whether `lora_a` is trained.
fn trains_a<B: Backend, C: CheckpointStrategy>(projection: &ExpertProjection<Autodiff<B, C>>) -> bool {
    matches!(&projection.factors, ExpertFactors::LowRank { lora_a, .. } if lora_a.is_tracked())
}

impl<B: ExpertParts + ExpertOps, C: CheckpointStrategy> ExpertOps for Autodiff<B, C> {
    fn expert_route(scores: FloatTensor<Self>, routing: Routing) -> IntTensor<Self> {
        let (scores, _guard) = scores.into_parts();
        B::expert_route(scores, routing)
    }

    fn expert_weights(scores: FloatTensor<Self>, routed: RoutedRows<Self>, normalise: bool) -> FloatTensor<Self> {
        let routed = inner_rows(routed);
        let nodes = [scores.node()];
        let (scores, _guard) = scores.into_parts();
        let weights = B::route_weights(scores.clone(), &routed, normalise);
        match WeightsBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((weights.clone(), scores, routed, normalise), weights),
            OpsKind::UnTracked(prep) => prep.finish(weights),
        }
    }

    fn expert_mlp(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        routed: RoutedRows<Self>,
        gate: ExpertProjection<Self>,
        up: ExpertProjection<Self>,
        down: ExpertProjection<Self>,
        terms: ExpertMlpTerms,
    ) -> FloatTensor<Self> {
        let keeps_x = trains_a(&gate) || trains_a(&up);
        // Each as the backend below has it, its factors' nodes, and what keeps these.
        let parts = [gate, up, down].map(|ExpertProjection { weight, factors, bias }| {
            let Stacked4bit { codes, absmax, nested_absmax, layout, experts } = weight;
            let weight = Stacked4bit { codes, absmax, nested_absmax, layout, experts };
            let bias = match bias {
                ExpertBias::Missing => ExpertBias::Missing,
                ExpertBias::Frozen { bias } => ExpertBias::Frozen { bias: Self::inner(bias) },
            };
            match factors {
                ExpertFactors::Missing => {
                    (ExpertProjection { weight, factors: ExpertFactors::Missing, bias }, [x.node(), x.node()], None)
                }
                ExpertFactors::LowRank { lora_a, lora_b, terms } => {
                    let nodes = [lora_a.node(), lora_b.node()];
                    let ((lora_a, a_guard), (lora_b, b_guard)) = (lora_a.into_parts(), lora_b.into_parts());
                    let factors = ExpertFactors::LowRank { lora_a, lora_b, terms };
                    (ExpertProjection { weight, factors, bias }, nodes, Some((a_guard, b_guard)))
                }
            }
        });
        let [(gate, [a, b], _gate_guards), (up, [c, d], _up_guards), (down, [e, f], _down_guards)] = parts;
        let (nodes, projections) = ([x.node(), weights.node(), a, b, c, d, e, f], [gate, up, down]);
        let experts = Experts { routed: inner_rows(routed), projections, activation: terms.activation };
        let ((x, _x_guard), (weights, _weights_guard)) = (x.into_parts(), weights.into_parts());
        let dtype = float_dtype(x.dtype());
        match MlpBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => {
                let (inner, h) = mlp::enter::<B>(x.clone(), &experts);
                let y = match terms.gradients_only {
                    true => mlp::uninitialised::<B>(&x),
                    false => mlp::leave::<B>(h, inner.u[2].as_ref(), weights.clone(), &experts),
                };
                prep.finish(MlpState { x: keeps_x.then_some(x), weights, inner, experts, dtype }, y)
            }
            OpsKind::UnTracked(prep) => prep.finish(mlp::forward::<B>(x, weights, &experts)),
        }
    }
}
