//! A mixture of experts (Shazeer et al., 2017, arXiv 1701.06538) as a few operations, whatever the number of experts.
//!
//! [`route`] sends each token to the experts of its highest scores, and sorts the rows by expert; [`expert_weights`] are the
//! router's weights of them; [`expert_mlp`] runs the gated MLPs of all experts, with their adapters, and adds each token's
//! rows. On CubeCL devices nothing of this is read back to the host, and each projection of all experts is one launch
//! where the device has tensor cores (`nf4_quant::matmul::grouped`). Where it has none, or no kernel takes the shape, products
//! run expert by expert, which takes the rows' numbers to the host once.
//!
//! # What is kept for the backward pass
//!
//! The input of the tokens, and of the rows what gate and up projection gave, and `u = s·dropout(x) Aᵀ` of each adapter. With
//! `h` the gated activation, `g = dy W_down` and the row's weight `w`, the gradient of `h` is `w g` and that of `w` is `g · h`:
//! what the down projection gave is not needed, nor is the row's weight in the product.
//!
//! # Biases
//!
//! Projections have biases, all three or none, which are frozen: `[experts, out_features]`. They come in where rows are read next, so
//! that what gate and up projection gave is kept without them, and the gradient of `w` has `dy · b_down` beside `g · h`.
//!
//! # Dropout
//!
//! A projection's mask is drawn over the rows of all experts, with the seed of its first adapter.

mod autodiff;
mod composed;
mod cube;
mod flex;
mod mlp;
mod stack;

use std::sync::{Arc, OnceLock};

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, ExtensionType, TensorMetadata, backend_extension};
use burn::tensor::{DType, Int, Tensor};
use fused_kernels::experts::Routing;
use fused_kernels::gated::Activation;
use nf4_quant::matmul::Direction;

use super::fused::FusedOps;
use super::{LoraDropout, LoraFactor, QloraOps};
pub use stack::Stacked4bit;
pub(crate) use stack::words_of_one;

/// How rows are routed, as backends have it.
#[derive(Clone, Debug, ExtensionType)]
pub struct RoutedRows<B: Backend> {
    /// i32: the words of [`Routing`].
    pub words: IntTensor<B>,
    /// What the host knows.
    pub host: Arc<RoutedHost>,
}

/// What the host knows of a routing.
#[derive(Debug)]
pub struct RoutedHost {
    routing: Routing,
    /// Each expert's first row, and the number of rows, where something asked for it.
    offsets: OnceLock<Vec<usize>>,
}

/// How the rows of a batch are routed to experts.
#[derive(Clone, Debug)]
pub struct ExpertRouting {
    words: Tensor<1, Int>,
    host: Arc<RoutedHost>,
}

impl ExpertRouting {
    fn operand(&self) -> RoutedRows<Dispatch> {
        RoutedRows { words: self.words.clone().into_dispatch(), host: self.host.clone() }
    }

    /// The experts of each token, the likeliest first.
    ///
    /// # Shapes
    /// `[tokens, per_token]`
    pub fn chosen(&self) -> Tensor<2, Int> {
        let routing = &self.host.routing;
        self.words.clone().narrow(0, 0, routing.rows()).reshape([routing.tokens(), routing.per_token()])
    }
}

/// How the adapters of a projection run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertTerms {
    /// Factor of the update.
    pub scaling: f32,
    /// Dropout of the update's input.
    pub dropout: Option<LoraDropout>,
}

/// The adapters of a projection of all experts.
#[derive(Clone, Debug, ExtensionType)]
pub enum ExpertFactors<B: Backend> {
    /// There are none.
    Missing,
    /// One for each expert.
    LowRank {
        /// f32 `[experts * rank, in_features]`.
        lora_a: FloatTensor<B>,
        /// f32 `[experts * out_features, rank]`.
        lora_b: FloatTensor<B>,
        /// Scaling and dropout.
        terms: ExpertTerms,
    },
}

/// The biases of a projection.
#[derive(Clone, Debug, ExtensionType)]
pub enum ExpertBias<B: Backend> {
    /// There are none.
    Missing,
    /// `[experts, out_features]`, frozen.
    Frozen {
        /// The values.
        bias: FloatTensor<B>,
    },
}

impl<B: Backend> ExpertBias<B> {
    fn get(&self) -> Option<&FloatTensor<B>> {
        match self {
            Self::Missing => None,
            Self::Frozen { bias } => Some(bias),
        }
    }
}

/// A projection of all experts: frozen weights, adapters and biases.
#[derive(Clone, Debug, ExtensionType)]
pub struct ExpertProjection<B: Backend> {
    /// The weights.
    #[extension_type]
    pub weight: Stacked4bit<B>,
    /// The adapters, if there are any.
    #[extension_type]
    pub factors: ExpertFactors<B>,
    /// The biases, if there are any.
    #[extension_type]
    pub bias: ExpertBias<B>,
}

impl ExpertProjection<Dispatch> {
    /// The same with frozen biases, `[experts, out_features]`, if there are any.
    pub fn with_bias(self, bias: Option<Tensor<2>>) -> Self {
        let frozen = |bias: Tensor<2>| ExpertBias::Frozen { bias: bias.without_autodiff().into_dispatch() };
        Self { bias: bias.map_or(ExpertBias::Missing, frozen), ..self }
    }
}

/// What the down projection's bias needs for the gradient of rows' weights.
pub struct DownBias<B: Backend> {
    /// `[experts, hidden]`.
    pub bias: FloatTensor<B>,
    /// `[rows, hidden]`: the gradient of what the down projection gave, without the weights.
    pub dy: FloatTensor<B>,
}

/// Biases as the gradients of gated activations need them.
pub struct GatedBiases<B: Backend> {
    /// Of gate and up, `[experts, width]`.
    pub inner: [FloatTensor<B>; 2],
    /// Of the down projection.
    pub down: DownBias<B>,
}

/// How [`ExpertOps::expert_mlp`] runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertMlpTerms {
    /// The function of the gate.
    pub activation: Activation,
    /// Only gradients are needed; see [`super::LoraTerms::gradients_only`].
    pub gradients_only: bool,
}

/// Experts' operations; the functions of this module say what they compute.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait ExpertOps: Backend {
    /// See [`route`].
    fn expert_route(scores: FloatTensor<Self>, routing: Routing) -> IntTensor<Self>;

    /// See [`expert_weights`].
    fn expert_weights(
        scores: FloatTensor<Self>,
        #[extension_type] routed: RoutedRows<Self>,
        normalise: bool,
    ) -> FloatTensor<Self>;

    /// See [`expert_mlp`].
    fn expert_mlp(
        x: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        #[extension_type] routed: RoutedRows<Self>,
        #[extension_type] gate: ExpertProjection<Self>,
        #[extension_type] up: ExpertProjection<Self>,
        #[extension_type] down: ExpertProjection<Self>,
        terms: ExpertMlpTerms,
    ) -> FloatTensor<Self>;
}

/// What the operations and their gradients are made of, on backends without autodiff. Rows are sorted by expert.
pub trait ExpertParts: QloraOps + FusedOps {
    /// The words of a routing by the highest scores.
    fn route(scores: FloatTensor<Self>, routing: &Routing) -> IntTensor<Self>;

    /// The words on the host.
    fn read_words(words: &IntTensor<Self>) -> Option<Vec<u32>>;

    /// The weights of each token's experts.
    fn route_weights(scores: FloatTensor<Self>, routed: &RoutedRows<Self>, normalise: bool) -> FloatTensor<Self>;

    /// The gradient of the scores.
    fn route_weight_grads(
        dweights: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        scores: FloatTensor<Self>,
        routed: &RoutedRows<Self>,
        normalise: bool,
    ) -> FloatTensor<Self>;

    /// A row for each of a token's experts.
    fn gather(x: FloatTensor<Self>, routed: &RoutedRows<Self>) -> FloatTensor<Self>;

    /// The gated activation of rows whose gate and up lack their biases, `[experts, width]`.
    fn gated_with_biases(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        biases: [FloatTensor<Self>; 2],
        routed: &RoutedRows<Self>,
        activation: Activation,
    ) -> FloatTensor<Self>;

    /// The sum of each token's rows, of further ones, and of the rows' biases, with the weights as factors where they are given.
    fn combine(
        rows: FloatTensor<Self>,
        more: Option<FloatTensor<Self>>,
        bias: Option<FloatTensor<Self>>,
        weights: Option<FloatTensor<Self>>,
        routed: &RoutedRows<Self>,
    ) -> FloatTensor<Self>;

    /// Gradients of gate and up, the activation's result, and the gradient of the weights; `dy` is without them.
    fn gated_backward(
        dy: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        biases: Option<GatedBiases<Self>>,
        weights: FloatTensor<Self>,
        routed: &RoutedRows<Self>,
        activation: Activation,
    ) -> [FloatTensor<Self>; 4];

    /// The gradients of a factor of all experts, f32, `[experts * rank, features]` for A and `[experts * features, rank]` for
    /// B: those of [`QloraOps::low_rank_gradient`], with the weights as factors of the rows where they are given.
    fn factor_gradient(
        x: FloatTensor<Self>,
        product: FloatTensor<Self>,
        weights: Option<FloatTensor<Self>>,
        which: LoraFactor,
        routed: &RoutedRows<Self>,
    ) -> FloatTensor<Self>;

    /// [`QloraOps::low_rank_project`] of each expert's rows with its factor, without dropout.
    fn expert_project(
        x: FloatTensor<Self>,
        factor: FloatTensor<Self>,
        which: LoraFactor,
        scaling: f32,
        routed: &RoutedRows<Self>,
    ) -> FloatTensor<Self> {
        composed::project::<Self>(&x, &factor, which, scaling, routed)
    }

    /// The product of each expert's rows with its weight, and the low-rank part with its factor: f32 `lora_b` forward,
    /// `lora_a` for the gradient.
    fn expert_product(
        x: FloatTensor<Self>,
        weight: &Stacked4bit<Self>,
        direction: Direction,
        low_rank: Option<(FloatTensor<Self>, FloatTensor<Self>)>,
        routed: &RoutedRows<Self>,
    ) -> FloatTensor<Self> {
        composed::product::<Self>(&x, weight, direction, low_rank, routed)
    }

    /// `v A` of each expert's rows with its f32 `lora_a`, in the dtype of `v`.
    fn expert_expand(v: FloatTensor<Self>, lora_a: FloatTensor<Self>, routed: &RoutedRows<Self>) -> FloatTensor<Self> {
        composed::expand::<Self>(&v, &lora_a, routed)
    }
}

/// Sends each token to the `per_token` experts of its highest scores; of equal ones, to the first.
///
/// # Shapes
/// `scores`: f32 `[tokens, experts]`
///
/// # Panics
/// When a token has no expert or more than there are, or scores are not f32.
pub fn route(scores: Tensor<2>, per_token: usize) -> ExpertRouting {
    assert_eq!(scores.dtype(), DType::F32, "route: scores are f32");
    let [tokens, experts] = scores.dims();
    let tile_rows = nf4_quant::matmul::grouped::tile_rows(tokens * per_token, experts);
    let routing = Routing::new(tokens, experts, per_token, tile_rows).unwrap_or_else(|e| panic!("route: {e}"));
    let words = <Dispatch as ExpertOps>::expert_route(scores.into_dispatch(), routing);
    let host = Arc::new(RoutedHost { routing, offsets: OnceLock::new() });
    ExpertRouting { words: Tensor::from_dispatch(words), host }
}

/// The softmax of the scores at the chosen experts, with `normalise` divided by its sum over them. The choice itself has no
/// gradient.
///
/// # Shapes
/// - `scores`: f32 `[tokens, experts]`, those that were [routed](route)
/// - output: f32 `[tokens, per_token]`, the likeliest expert first
///
/// # Panics
/// When scores have another shape or are not f32.
pub fn expert_weights(scores: Tensor<2>, routing: &ExpertRouting, normalise: bool) -> Tensor<2> {
    let expected = [routing.host.routing.tokens(), routing.host.routing.experts()];
    assert_eq!(scores.dims(), expected, "expert_weights: other scores than those that were routed");
    assert_eq!(scores.dtype(), DType::F32, "expert_weights: scores are f32");
    Tensor::from_dispatch(<Dispatch as ExpertOps>::expert_weights(scores.into_dispatch(), routing.operand(), normalise))
}

/// `Σ weight · down(activation(gate(x)) · up(x))` over each token's experts, each projection with its biases.
///
/// # Shapes
/// - `x`: `[tokens, hidden]`, f32, bf16 or f16
/// - `weights`: f32 `[tokens, per_token]`
/// - `projections`: gate, up and down of all experts
/// - output: `[tokens, hidden]`, dtype of `x`; with `gradients_only` it may be uninitialised where it is recorded
///
/// # Panics
/// When shapes don't fit one another, or factors are not f32.
pub fn expert_mlp(
    x: Tensor<2>,
    weights: Tensor<2>,
    routing: &ExpertRouting,
    projections: [ExpertProjection<Dispatch>; 3],
    activation: Activation,
    gradients_only: bool,
) -> Tensor<2> {
    check(&x, &weights, &routing.host.routing, &projections);
    let (x, weights, [gate, up, down]) = (x.into_dispatch(), weights.into_dispatch(), projections);
    let terms = ExpertMlpTerms { activation, gradients_only };
    let routed = routing.operand();
    Tensor::from_dispatch(<Dispatch as ExpertOps>::expert_mlp(x, weights, routed, gate, up, down, terms))
}

fn check(x: &Tensor<2>, weights: &Tensor<2>, routing: &Routing, projections: &[ExpertProjection<Dispatch>; 3]) {
    let [tokens, hidden] = x.dims();
    assert_eq!(tokens, routing.tokens(), "expert_mlp: x of {tokens} tokens");
    assert_eq!(weights.dims(), [tokens, routing.per_token()], "expert_mlp: weights {:?}", weights.dims());
    assert_eq!(weights.dtype(), DType::F32, "expert_mlp: weights are f32");
    let inner = projections[0].weight.layout.out_features;
    let biased = projections.iter().filter(|projection| projection.bias.get().is_some()).count();
    assert!(biased == 0 || biased == 3, "expert_mlp: {biased} of the three projections have biases");
    for (projection, shape) in projections.iter().zip([[inner, hidden], [inner, hidden], [hidden, inner]]) {
        let (experts, layout) = (projection.weight.experts, projection.weight.layout);
        let found = [layout.out_features, layout.in_features];
        assert!(
            (experts, found) == (routing.experts(), shape),
            "expert_mlp: {experts} weights of {found:?} where {} of {shape:?} are needed",
            routing.experts()
        );
        if let Some(bias) = projection.bias.get() {
            let found: [usize; 2] = bias.shape().dims();
            assert_eq!(found, [experts, shape[0]], "expert_mlp: biases {found:?} of {experts} experts of {shape:?}");
        }
        let ExpertFactors::LowRank { lora_a, lora_b, .. } = &projection.factors else { continue };
        let (a, b): ([usize; 2], [usize; 2]) = (lora_a.shape().dims(), lora_b.shape().dims());
        assert!(
            a == [experts * b[1], shape[1]] && b[0] == experts * shape[0],
            "expert_mlp: factors {a:?} and {b:?} of {experts} experts of {shape:?}"
        );
        assert!(lora_a.dtype() == DType::F32 && lora_b.dtype() == DType::F32, "expert_mlp: factors are f32");
    }
}
