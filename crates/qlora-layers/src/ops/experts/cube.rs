//! The GPU implementation, for every CubeCL runtime: [`fused_kernels::experts`], and on CUDA `nf4_quant::matmul::grouped`.

use super::mlp::{self, Experts};
use super::{
    DownBias, ExpertMlpTerms, ExpertOps, ExpertParts, ExpertProjection, GatedBiases, RoutedRows, Stacked4bit, composed,
};
use crate::ops::cube_tensors::{device_weight, empty};
use crate::ops::{LoraFactor, Packed4bit, format_of};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::{cast, into_contiguous};
use burn_cubecl::tensor::CubeTensor;
use fused_kernels::KernelError;
use fused_kernels::experts::{
    self as kernels, Biased, Combine, FactorGradient, Gated, GatedBackward, Routing, WeightGradient,
};
use fused_kernels::gated::Activation;
use fused_kernels::low_rank::FactorLayout;
use nf4_quant::FloatFormat;
use nf4_quant::matmul::grouped::{GroupedOperands, Groups, grouped, nested_blocks_fit, path};
use nf4_quant::matmul::{Direction, LowRank, Problem, Weight};

fn launched(result: Result<(), KernelError>) {
    result.unwrap_or_else(|e| panic!("tensors that Burn holds were refused: {e}"));
}

fn width(x: &CubeTensor) -> usize {
    x.meta.shape()[1]
}

fn matrix(like: &CubeTensor, rows: usize, width: usize, dtype: DType) -> CubeTensor {
    empty(&like.client, &like.device, Shape::new([rows, width]), dtype)
}

/// The problem of one expert, over the rows of all.
fn problem(
    x: &CubeTensor,
    features: [usize; 2],
    direction: Direction,
    rank: usize,
    blocksize: Option<usize>,
) -> Problem {
    let [out_features, in_features] = features;
    let format = format_of(x.dtype);
    Problem { tokens: x.meta.shape()[0], out_features, in_features, direction, rank, format, out: format, blocksize }
}

/// The product, on tensor cores; `None` where no kernel takes the problem.
fn product(
    x: &CubeTensor,
    problem: &Problem,
    weight: impl FnOnce() -> Operand,
    low_rank: Option<&(CubeTensor, CubeTensor)>,
    scale: f32,
    routed: &RoutedRows<CubeBackend>,
) -> Option<CubeTensor> {
    let routing = &routed.host.routing;
    let path = path(&x.client, problem, routing.experts(), routing.tile_rows())?;
    let (x, weight) = (into_contiguous(x.clone()), weight());
    let low_rank = low_rank.map(|(u, factor)| (into_contiguous(u.clone()), into_contiguous(factor.clone())));
    let words = into_contiguous(routed.words.clone());
    let tiles = words.handle.clone().offset_start(4 * routing.tiles().start as u64);
    let groups = Groups {
        count: routing.experts(),
        tiles: &tiles,
        tile_count: routing.tile_count(),
        tile_rows: routing.tile_rows(),
    };
    let operands = GroupedOperands {
        x: &x.handle,
        weight: match &weight {
            Operand::FourBit(weight) => Weight::FourBit(weight),
            Operand::Dense(weight) => Weight::Dense(&weight.handle),
        },
        low_rank: low_rank.as_ref().map(|(u, factor)| LowRank {
            product: &u.handle,
            factor: &factor.handle,
            mask: None,
        }),
        scale,
    };
    let out = matrix(&x, problem.tokens, problem.features(), x.dtype);
    grouped(&x.client, path, problem, &groups, &operands, &out.handle)
        .unwrap_or_else(|e| panic!("operands that fitted when the kernel was chosen were refused: {e}"));
    Some(out)
}

/// The weight of a product.
#[expect(clippy::large_enum_variant, reason = "one at a time, for a launch")]
enum Operand {
    FourBit(nf4_quant::kernels::DeviceWeight),
    Dense(CubeTensor),
}

/// Low-rank factors of all experts in the place of weights, in the dtype of `x`.
fn factors(factor: &CubeTensor, x: &CubeTensor) -> Operand {
    Operand::Dense(into_contiguous(cast(factor.clone(), x.dtype)))
}

impl ExpertParts for CubeBackend {
    fn route(scores: FloatTensor<Self>, routing: &Routing) -> IntTensor<Self> {
        let scores = into_contiguous(scores);
        let words = empty(&scores.client, &scores.device, Shape::new([routing.words()]), DType::I32);
        launched(kernels::route(&scores.client, &scores.handle, &words.handle, routing));
        words
    }

    fn read_words(words: &IntTensor<Self>) -> Option<Vec<u32>> {
        let words = into_contiguous(words.clone());
        let bytes = words.client.read_one(words.handle).ok()?;
        Some(bytemuck::pod_collect_to_vec(&bytes))
    }

    fn route_weights(scores: FloatTensor<Self>, routed: &RoutedRows<Self>, normalise: bool) -> FloatTensor<Self> {
        let (scores, words) = (into_contiguous(scores), into_contiguous(routed.words.clone()));
        let routing = &routed.host.routing;
        let out = matrix(&scores, routing.tokens(), routing.per_token(), DType::F32);
        let (scores_, words, out_) = (&scores.handle, &words.handle, &out.handle);
        launched(kernels::weights(&scores.client, scores_, words, out_, routing, normalise));
        out
    }

    fn route_weight_grads(
        dweights: FloatTensor<Self>,
        weights: FloatTensor<Self>,
        scores: FloatTensor<Self>,
        routed: &RoutedRows<Self>,
        normalise: bool,
    ) -> FloatTensor<Self> {
        let [dweights, weights, scores] = [dweights, weights, scores].map(into_contiguous);
        let words = into_contiguous(routed.words.clone());
        let routing = &routed.host.routing;
        let dscores = matrix(&scores, routing.tokens(), routing.experts(), DType::F32);
        let buffers = WeightGradient {
            dweights: &dweights.handle,
            weights: &weights.handle,
            scores: &scores.handle,
            dscores: &dscores.handle,
        };
        launched(kernels::weight_gradient(&scores.client, buffers, &words.handle, routing, normalise));
        dscores
    }

    fn gather(x: FloatTensor<Self>, routed: &RoutedRows<Self>) -> FloatTensor<Self> {
        let (x, words, routing) = (into_contiguous(x), into_contiguous(routed.words.clone()), &routed.host.routing);
        let out = matrix(&x, routing.rows(), width(&x), x.dtype);
        let format = format_of(x.dtype).into();
        launched(kernels::gather(&x.client, &x.handle, &words.handle, &out.handle, routing, width(&x), format));
        out
    }

    fn gated_with_biases(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        biases: [FloatTensor<Self>; 2],
        routed: &RoutedRows<Self>,
        activation: Activation,
    ) -> FloatTensor<Self> {
        let ([gate, up], biases) = ([gate, up].map(into_contiguous), biases.map(into_contiguous));
        let (words, routing) = (into_contiguous(routed.words.clone()), &routed.host.routing);
        let out = matrix(&gate, routing.rows(), width(&gate), gate.dtype);
        let buffers = Gated {
            gate: &gate.handle,
            up: &up.handle,
            biases: biases.each_ref().map(|bias| &bias.handle),
            out: &out.handle,
        };
        let (width, format) = (width(&gate), format_of(gate.dtype).into());
        launched(kernels::gated(&gate.client, buffers, &words.handle, routing, width, activation, format));
        out
    }

    fn combine(
        rows: FloatTensor<Self>,
        more: Option<FloatTensor<Self>>,
        bias: Option<FloatTensor<Self>>,
        weights: Option<FloatTensor<Self>>,
        routed: &RoutedRows<Self>,
    ) -> FloatTensor<Self> {
        let (rows, more, weights) = (into_contiguous(rows), more.map(into_contiguous), weights.map(into_contiguous));
        let bias = bias.map(into_contiguous);
        let (words, routing) = (into_contiguous(routed.words.clone()), &routed.host.routing);
        let out = matrix(&rows, routing.tokens(), width(&rows), rows.dtype);
        let buffers = Combine {
            rows: &rows.handle,
            more: more.as_ref().map(|more| &more.handle),
            bias: bias.as_ref().map(|bias| &bias.handle),
            weights: weights.as_ref().map(|weights| &weights.handle),
            out: &out.handle,
        };
        let format = format_of(rows.dtype).into();
        launched(kernels::combine(&rows.client, buffers, &words.handle, routing, width(&rows), format));
        out
    }

    fn gated_backward(
        dy: FloatTensor<Self>,
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        biases: Option<GatedBiases<Self>>,
        weights: FloatTensor<Self>,
        routed: &RoutedRows<Self>,
        activation: Activation,
    ) -> [FloatTensor<Self>; 4] {
        let [dy, gate, up, weights] = [dy, gate, up, weights].map(into_contiguous);
        let biases = biases.map(|GatedBiases { inner: [of_gate, of_up], down: DownBias { bias, dy } }| {
            [of_gate, of_up, bias, dy].map(into_contiguous)
        });
        let biased = biases.as_ref().map(|[of_gate, of_up, down, dy]| Biased {
            inner: [&of_gate.handle, &of_up.handle],
            down: &down.handle,
            dy: &dy.handle,
            hidden: width(down),
        });
        let (words, routing) = (into_contiguous(routed.words.clone()), &routed.host.routing);
        let [dgate, dup, result] = [(); 3].map(|()| matrix(&gate, routing.rows(), width(&gate), gate.dtype));
        let dweights = matrix(&gate, routing.tokens(), routing.per_token(), DType::F32);
        let buffers = GatedBackward {
            dy: &dy.handle,
            gate: &gate.handle,
            up: &up.handle,
            biased,
            weights: &weights.handle,
            dgate: &dgate.handle,
            dup: &dup.handle,
            result: &result.handle,
            dweights: &dweights.handle,
        };
        let (width, format) = (width(&gate), format_of(gate.dtype).into());
        launched(kernels::gated_backward(&gate.client, buffers, &words.handle, routing, width, activation, format));
        [dgate, dup, result, dweights]
    }

    fn factor_gradient(
        x: FloatTensor<Self>,
        product: FloatTensor<Self>,
        weights: Option<FloatTensor<Self>>,
        which: LoraFactor,
        routed: &RoutedRows<Self>,
    ) -> FloatTensor<Self> {
        let (x, product, weights) = (into_contiguous(x), into_contiguous(product), weights.map(into_contiguous));
        let (words, routing) = (into_contiguous(routed.words.clone()), &routed.host.routing);
        let (features, rank, experts) = (width(&x), width(&product), routing.experts());
        let (shape, layout) = match which {
            LoraFactor::A => ([experts * rank, features], FactorLayout::RankFirst),
            LoraFactor::B => ([experts * features, rank], FactorLayout::FeaturesFirst),
        };
        let out = matrix(&x, shape[0], shape[1], DType::F32);
        let operands = FactorGradient {
            x: &x.handle,
            product: &product.handle,
            weights: weights.as_ref().map(|weights| &weights.handle),
            out: &out.handle,
            features,
            rank,
            layout,
        };
        launched(kernels::gradient(&x.client, operands, &words.handle, routing, format_of(x.dtype).into()));
        out
    }

    fn expert_project(
        x: FloatTensor<Self>,
        factor: FloatTensor<Self>,
        which: LoraFactor,
        scaling: f32,
        routed: &RoutedRows<Self>,
    ) -> FloatTensor<Self> {
        let [rows, columns]: [usize; 2] = factor.meta.shape().dims();
        let (features, direction) = (
            [rows / routed.host.routing.experts(), columns],
            match which {
                LoraFactor::A => Direction::Forward,
                LoraFactor::B => Direction::InputGradient,
            },
        );
        let problem = problem(&x, features, direction, 0, None);
        product(&x, &problem, || factors(&factor, &x), None, scaling, routed)
            .unwrap_or_else(|| composed::project::<Self>(&x, &factor, which, scaling, routed))
    }

    fn expert_product(
        x: FloatTensor<Self>,
        weight: &Stacked4bit<Self>,
        direction: Direction,
        low_rank: Option<(FloatTensor<Self>, FloatTensor<Self>)>,
        routed: &RoutedRows<Self>,
    ) -> FloatTensor<Self> {
        let layout = weight.layout;
        let rank = low_rank.as_ref().map_or(0, |(u, _)| width(u));
        let problem = problem(&x, [layout.out_features, layout.in_features], direction, rank, Some(layout.blocksize));
        // The gradient rounds to the dtype of the quantization state first, which a fused product does not.
        let rounds_once = direction == Direction::Forward || [FloatFormat::F32, problem.format].contains(&layout.dtype);
        let nested = layout.nested_blocksize;
        let apart = nested.is_none_or(|nested| nested_blocks_fit(layout.num_elements(), layout.blocksize, nested));
        let fused = (rounds_once && apart)
            .then(|| product(&x, &problem, || Operand::FourBit(of_all(weight)), low_rank.as_ref(), 1.0, routed));
        fused.flatten().unwrap_or_else(|| composed::product::<Self>(&x, weight, direction, low_rank, routed))
    }

    fn expert_expand(v: FloatTensor<Self>, lora_a: FloatTensor<Self>, routed: &RoutedRows<Self>) -> FloatTensor<Self> {
        let problem = problem(&v, [width(&v), width(&lora_a)], Direction::InputGradient, 0, None);
        product(&v, &problem, || factors(&lora_a, &v), None, 1.0, routed)
            .unwrap_or_else(|| composed::expand::<Self>(&v, &lora_a, routed))
    }
}

/// All weights as one, as the products of groups take them.
fn of_all(weight: &Stacked4bit<CubeBackend>) -> nf4_quant::kernels::DeviceWeight {
    let Stacked4bit { codes, absmax, nested_absmax, layout, experts } = weight.clone();
    let weight = device_weight(&Packed4bit { codes, absmax, nested_absmax, layout });
    nf4_quant::kernels::DeviceWeight { num_elements: experts * layout.num_elements(), ..weight }
}

impl ExpertOps for CubeBackend {
    fn expert_route(scores: FloatTensor<Self>, routing: Routing) -> IntTensor<Self> {
        Self::route(scores, &routing)
    }

    fn expert_weights(scores: FloatTensor<Self>, routed: RoutedRows<Self>, normalise: bool) -> FloatTensor<Self> {
        Self::route_weights(scores, &routed, normalise)
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
        let experts = Experts { routed, projections: [gate, up, down], activation: terms.activation };
        mlp::forward::<Self>(x, weights, &experts)
    }
}
