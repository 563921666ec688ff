//! The gated MLPs of all experts, forward and backward.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use fused_kernels::gated::Activation;
use nf4_quant::matmul::Direction;

use super::{DownBias, ExpertFactors, ExpertParts, ExpertProjection, GatedBiases, RoutedRows};
use crate::ops::{LoraDropout, LoraFactor, float_dtype};

/// The MLPs, and how their rows are routed.
#[derive(Clone, Debug)]
pub(super) struct Experts<B: Backend> {
    pub routed: RoutedRows<B>,
    /// Gate, up, down.
    pub projections: [ExpertProjection<B>; 3],
    pub activation: Activation,
}

/// What the rows had inside.
#[derive(Clone, Debug)]
pub(super) struct Inner<B: Backend> {
    pub gate: FloatTensor<B>,
    pub up: FloatTensor<B>,
    /// `u` of each projection's adapters.
    pub u: [Option<FloatTensor<B>>; 3],
}

fn dropped<B: ExpertParts>(x: FloatTensor<B>, dropout: Option<LoraDropout>) -> FloatTensor<B> {
    match dropout {
        Some(LoraDropout { seed, p }) => B::seeded_dropout(x, seed, p),
        None => x,
    }
}

impl<B: ExpertParts> ExpertProjection<B> {
    /// `s·dropout(x) Aᵀ`.
    fn u(&self, x: &FloatTensor<B>, routed: &RoutedRows<B>) -> Option<FloatTensor<B>> {
        let ExpertFactors::LowRank { lora_a, terms, .. } = &self.factors else { return None };
        let x = dropped::<B>(x.clone(), terms.dropout);
        Some(B::expert_project(x, lora_a.clone(), LoraFactor::A, terms.scaling, routed))
    }

    /// `x Wᵀ + u Bᵀ`.
    fn forward(&self, x: FloatTensor<B>, u: Option<&FloatTensor<B>>, routed: &RoutedRows<B>) -> FloatTensor<B> {
        let low_rank = match &self.factors {
            ExpertFactors::LowRank { lora_b, .. } => u.map(|u| (u.clone(), lora_b.clone())),
            ExpertFactors::Missing => None,
        };
        B::expert_product(x, &self.weight, Direction::Forward, low_rank, routed)
    }

    /// `v = s·dy B`.
    fn v(&self, dy: &FloatTensor<B>, routed: &RoutedRows<B>) -> Option<FloatTensor<B>> {
        let ExpertFactors::LowRank { lora_b, terms, .. } = &self.factors else { return None };
        Some(B::expert_project(dy.clone(), lora_b.clone(), LoraFactor::B, terms.scaling, routed))
    }

    /// `dy W + dropout(v A)`.
    fn through(&self, dy: FloatTensor<B>, v: Option<&FloatTensor<B>>, routed: &RoutedRows<B>) -> FloatTensor<B> {
        let product = |low_rank| B::expert_product(dy, &self.weight, Direction::InputGradient, low_rank, routed);
        match (&self.factors, v.cloned()) {
            (ExpertFactors::LowRank { lora_a, terms, .. }, Some(v)) => match terms.dropout {
                None => product(Some((v, lora_a.clone()))),
                Some(LoraDropout { seed, p }) => {
                    let update = B::seeded_dropout(B::expert_expand(v, lora_a.clone(), routed), seed, p);
                    B::float_add(product(None), update)
                }
            },
            _ => product(None),
        }
    }

    /// `dA = vᵀ dropout(x)` and `dB = dyᵀ u`, those of which the operands are there.
    fn gradients(
        &self,
        for_a: Option<(&FloatTensor<B>, FloatTensor<B>)>,
        for_b: Option<(&FloatTensor<B>, FloatTensor<B>)>,
        weights: Option<&FloatTensor<B>>,
        routed: &RoutedRows<B>,
    ) -> [Option<FloatTensor<B>>; 2] {
        let dropout = match &self.factors {
            ExpertFactors::LowRank { terms, .. } => terms.dropout,
            ExpertFactors::Missing => None,
        };
        let of = |x, product, which| B::factor_gradient(x, product, weights.cloned(), which, routed);
        let a = for_a.map(|(x, v)| of(dropped::<B>(x.clone(), dropout), v, LoraFactor::A));
        let b = for_b.map(|(dy, u)| of(dy.clone(), u, LoraFactor::B));
        [a, b]
    }
}

/// The biases of gate, up and down in the dtype of rows, if projections have some.
fn biases_of<B: ExpertParts>(experts: &Experts<B>, rows: &FloatTensor<B>) -> Option<[FloatTensor<B>; 3]> {
    let dtype = float_dtype(rows.dtype());
    let of = |i: usize| experts.projections[i].bias.get().map(|bias| B::float_cast(bias.clone(), dtype));
    Some([of(0)?, of(1)?, of(2)?])
}

/// Gate and up projection of all rows, and the input of the down projection.
pub(super) fn enter<B: ExpertParts>(x: FloatTensor<B>, experts: &Experts<B>) -> (Inner<B>, FloatTensor<B>) {
    let Experts { routed, projections: [gate, up, down], activation } = experts;
    let rows = B::gather(x, routed);
    let [u_gate, u_up] = [gate, up].map(|projection| projection.u(&rows, routed));
    let gate = gate.forward(rows.clone(), u_gate.as_ref(), routed);
    let up = up.forward(rows, u_up.as_ref(), routed);
    let h = match biases_of(experts, &gate) {
        Some([of_gate, of_up, _]) => {
            B::gated_with_biases(gate.clone(), up.clone(), [of_gate, of_up], routed, *activation)
        }
        None => B::gated(gate.clone(), up.clone(), *activation),
    };
    let u_down = down.u(&h, routed);
    (Inner { gate, up, u: [u_gate, u_up, u_down] }, h)
}

/// The down projection of all rows, and each token's sum.
pub(super) fn leave<B: ExpertParts>(
    h: FloatTensor<B>,
    u: Option<&FloatTensor<B>>,
    weights: FloatTensor<B>,
    experts: &Experts<B>,
) -> FloatTensor<B> {
    let rows = experts.projections[2].forward(h, u, &experts.routed);
    let bias = biases_of(experts, &rows).map(|[_, _, down]| down);
    B::combine(rows, None, bias, Some(weights), &experts.routed)
}

/// The whole forward pass, of which nothing is kept.
pub(super) fn forward<B: ExpertParts>(
    x: FloatTensor<B>,
    weights: FloatTensor<B>,
    experts: &Experts<B>,
) -> FloatTensor<B> {
    let (inner, h) = enter::<B>(x, experts);
    let [_, _, u] = inner.u;
    leave::<B>(h, u.as_ref(), weights, experts)
}

/// What gradients are wanted of.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub x: bool,
    pub weights: bool,
    /// Of `lora_a` and `lora_b` of each projection.
    pub factors: [[bool; 2]; 3],
}

/// The gradients that were wanted.
pub(super) struct Gradients<B: Backend> {
    pub x: Option<FloatTensor<B>>,
    pub weights: Option<FloatTensor<B>>,
    pub factors: [[Option<FloatTensor<B>>; 2]; 3],
}

/// The backward pass of [`enter`] and [`leave`]; see the module above. `x` is needed for the gradients of `lora_a` of gate
/// and up alone.
pub(super) fn backward<B: ExpertParts>(
    dy: FloatTensor<B>,
    x: Option<FloatTensor<B>>,
    weights: FloatTensor<B>,
    inner: Inner<B>,
    experts: &Experts<B>,
    wanted: Wanted,
) -> Gradients<B> {
    let Experts { routed, projections: [gate, up, down], activation } = experts;
    let Inner { gate: gate_rows, up: up_rows, u: [u_gate, u_up, u_down] } = inner;

    // The rows' weights come in behind the down projection: the gradients of its factors are sums over weighted rows.
    let dy_rows = B::gather(dy, routed);
    let v = down.v(&dy_rows, routed);
    let g = down.through(dy_rows.clone(), v.as_ref(), routed);
    let biases = biases_of(experts, &gate_rows).map(|[of_gate, of_up, bias]| GatedBiases {
        inner: [of_gate, of_up],
        down: DownBias { bias, dy: dy_rows.clone() },
    });
    let [dgate, dup, h, dweights] =
        B::gated_backward(g, gate_rows, up_rows, biases, weights.clone(), routed, *activation);
    let [wants_a, wants_b] = wanted.factors[2];
    let for_a = v.filter(|_| wants_a).map(|v| (&h, v));
    let for_b = u_down.filter(|_| wants_b).map(|u| (&dy_rows, u));
    let of_down = down.gradients(for_a, for_b, Some(&weights), routed);
    drop((dy_rows, h));
    let weights = wanted.weights.then_some(dweights);

    let needs_x = wanted.factors[0][0] || wanted.factors[1][0];
    let rows = x.filter(|_| needs_x).map(|x| B::gather(x, routed));
    let of = |projection: &ExpertProjection<B>, [wants_a, wants_b]: [bool; 2], dy: FloatTensor<B>, u| {
        let v = if wants_a || wanted.x { projection.v(&dy, routed) } else { None };
        let for_a = rows.as_ref().zip(v.clone()).filter(|_| wants_a);
        let for_b = Option::<FloatTensor<B>>::filter(u, |_| wants_b).map(|u| (&dy, u));
        let factors = projection.gradients(for_a, for_b, None, routed);
        (factors, wanted.x.then(|| projection.through(dy, v.as_ref(), routed)))
    };
    let (of_gate, through_gate) = of(gate, wanted.factors[0], dgate, u_gate);
    let (of_up, through_up) = of(up, wanted.factors[1], dup, u_up);
    let x = through_gate.map(|first| B::combine(first, through_up, None, None, routed));
    Gradients { x, weights, factors: [of_gate, of_up, of_down] }
}

/// The output of rows that are not computed.
pub(super) fn uninitialised<B: ExpertParts>(x: &FloatTensor<B>) -> FloatTensor<B> {
    B::float_empty(x.shape(), &x.device(), float_dtype(x.dtype()))
}
