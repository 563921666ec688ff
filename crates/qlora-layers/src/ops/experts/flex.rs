//! The CPU implementation: the same sorting on the host, loops over rows on all threads, and products expert by expert.

use super::mlp::{self, Experts};
use super::{DownBias, ExpertMlpTerms, ExpertOps, ExpertParts, ExpertProjection, GatedBiases, RoutedRows, composed};
use crate::ops::{LoraFactor, QloraOps};
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Flex, TensorMetadata};
use burn::tensor::{DType, Element as BurnElement, FloatDType, Shape, Slice, TensorData};
use burn_flex::FlexTensor;
use fused_kernels::experts::{Routing, oracle};
use fused_kernels::gated::Activation;
use half::{bf16, f16};
use nf4_quant::Element;
use rayon::prelude::*;

/// An element of rows.
trait Number: Element + BurnElement + bytemuck::Pod {}

impl<T: Element + BurnElement + bytemuck::Pod> Number for T {}

/// Calls the generic function for the dtype of a tensor.
macro_rules! by_dtype {
    ($x:expr, $function:ident($($argument:expr),*)) => {
        match FloatDType::from($x.dtype()) {
            FloatDType::BF16 => $function::<bf16>($($argument),*),
            FloatDType::F16 => $function::<f16>($($argument),*),
            _ => $function::<f32>($($argument),*),
        }
    };
}

fn values<T: Number>(x: &FlexTensor) -> Vec<T> {
    x.to_contiguous().storage::<T>().to_vec()
}

fn matrix<T: BurnElement>(values: Vec<T>, rows: usize, width: usize) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(values, [rows, width]))
}

fn words_of(words: &FlexTensor) -> Vec<u32> {
    bytemuck::pod_collect_to_vec(words.to_contiguous().storage::<i32>())
}

fn gather<T: Number>(x: &FlexTensor, words: &[u32], routing: &Routing) -> FlexTensor {
    let (width, x) = (x.shape()[1], values::<T>(x));
    let mut out = vec![T::from_f32(0.0); routing.rows() * width];
    out.par_chunks_mut(width.max(1)).zip(&words[routing.entries()]).for_each(|(row, entry)| {
        row.copy_from_slice(&x[*entry as usize / routing.per_token() * width..][..width]);
    });
    matrix(out, routing.rows(), width)
}

fn combine<T: Number>(
    rows: &FlexTensor,
    [more, bias]: [Option<&FlexTensor>; 2],
    weights: Option<&FlexTensor>,
    words: &[u32],
    routing: &Routing,
) -> FlexTensor {
    let (width, rows, more) = (rows.shape()[1], values::<T>(rows), more.map(values::<T>));
    let (bias, weights) = (bias.map(values::<T>), weights.map(values::<f32>));
    let slots = &words[routing.slots()];
    let mut out = vec![T::from_f32(0.0); routing.tokens() * width];
    out.par_chunks_mut(width.max(1)).enumerate().for_each(|(token, out)| {
        let mut sums = vec![0.0_f32; width];
        for entry in token * routing.per_token()..(token + 1) * routing.per_token() {
            let at = slots[entry] as usize * width;
            let weight = weights.as_ref().map_or(1.0, |weights| weights[entry]);
            let of_expert = words[entry] as usize * width;
            for (i, sum) in sums.iter_mut().enumerate() {
                let more = more.as_ref().map_or(0.0, |more| more[at + i].to_f32());
                let bias = bias.as_ref().map_or(0.0, |bias| bias[of_expert + i].to_f32());
                *sum += weight * (rows[at + i].to_f32() + more + bias);
            }
        }
        out.iter_mut().zip(sums).for_each(|(y, sum)| *y = T::from_f32(sum));
    });
    matrix(out, routing.tokens(), width)
}

/// The biases of all rows, f32, out of those of all experts.
fn of_rows<T: Number>(bias: &FlexTensor, words: &[u32], routing: &Routing) -> Vec<f32> {
    let (width, bias) = (bias.shape()[1], values::<T>(bias));
    let of_entry = |entry: &u32| words[*entry as usize] as usize * width;
    let rows = words[routing.entries()].iter().map(|entry| &bias[of_entry(entry)..][..width]);
    rows.flatten().map(|value| value.to_f32()).collect()
}

fn gated_with_biases<T: Number>(
    [gate, up]: [&FlexTensor; 2],
    [of_gate, of_up]: [&FlexTensor; 2],
    words: &[u32],
    routing: &Routing,
    activation: Activation,
) -> FlexTensor {
    let (width, gate, up) = (gate.shape()[1], values::<T>(gate), values::<T>(up));
    let [of_gate, of_up] = [of_gate, of_up].map(|bias| of_rows::<T>(bias, words, routing));
    let mut out = vec![T::from_f32(0.0); gate.len()];
    out.par_iter_mut().enumerate().for_each(|(i, y)| {
        let (g, u) = (gate[i].to_f32() + of_gate[i], up[i].to_f32() + of_up[i]);
        *y = T::from_f32(activation.value(g) * activation.factor(u));
    });
    matrix(out, routing.rows(), width)
}

fn gated_backward<T: Number>(
    [dy, gate, up]: [&FlexTensor; 3],
    biases: Option<&GatedBiases<Flex>>,
    weights: &FlexTensor,
    words: &[u32],
    routing: &Routing,
    activation: Activation,
) -> [FlexTensor; 4] {
    let (width, [dy, gate, up]) = (gate.shape()[1], [dy, gate, up].map(values::<T>));
    let (weights, entries) = (values::<f32>(weights), &words[routing.entries()]);
    let inner = biases.map(|biases| biases.inner.each_ref().map(|bias| of_rows::<T>(bias, words, routing)));
    let down = biases.map(|GatedBiases { down: DownBias { bias, dy }, .. }| {
        (bias.shape()[1], of_rows::<T>(bias, words, routing), values::<T>(dy))
    });
    let [mut dgate, mut dup, mut result] = [(); 3].map(|()| vec![T::from_f32(0.0); gate.len()]);
    let chunk = width.max(1);
    let of_rows = dgate.par_chunks_mut(chunk).zip(dup.par_chunks_mut(chunk)).zip(result.par_chunks_mut(chunk));
    let products: Vec<f32> = of_rows
        .enumerate()
        .map(|(row, ((dgate, dup), result))| {
            let (first, weight) = (row * width, weights[entries[row] as usize]);
            let mut product = 0.0;
            for i in 0..width {
                let (d, mut x, mut u) = (dy[first + i].to_f32(), gate[first + i].to_f32(), up[first + i].to_f32());
                if let Some([of_gate, of_up]) = &inner {
                    (x, u) = (x + of_gate[first + i], u + of_up[first + i]);
                }
                let (active, by) = (activation.value(x), activation.factor(u));
                result[i] = T::from_f32(active * by);
                product += d * result[i].to_f32();
                dgate[i] = T::from_f32(weight * d * by * activation.slope(x));
                dup[i] = T::from_f32(weight * d * active * activation.factor_slope(u));
            }
            if let Some((hidden, bias, dy)) = &down {
                let range = row * hidden..(row + 1) * hidden;
                product += dy[range.clone()].iter().zip(&bias[range]).map(|(d, b)| d.to_f32() * b).sum::<f32>();
            }
            product
        })
        .collect();
    let mut dweights = vec![0.0; routing.rows()];
    entries.iter().zip(products).for_each(|(entry, product)| dweights[*entry as usize] = product);
    let [dgate, dup, result] = [dgate, dup, result].map(|values| matrix(values, routing.rows(), width));
    [dgate, dup, result, matrix(dweights, routing.tokens(), routing.per_token())]
}

/// Rows times their weights.
fn weighted<T: Number>(x: &FlexTensor, weights: &FlexTensor, words: &[u32], routing: &Routing) -> FlexTensor {
    let (width, mut x, weights) = (x.shape()[1], values::<T>(x), values::<f32>(weights));
    x.par_chunks_mut(width.max(1)).zip(&words[routing.entries()]).for_each(|(row, entry)| {
        let weight = weights[*entry as usize];
        row.iter_mut().for_each(|value| *value = T::from_f32(value.to_f32() * weight));
    });
    matrix(x, routing.rows(), width)
}

/// Scores or weights as the oracle takes them.
fn wide(x: &FlexTensor) -> Vec<f64> {
    values::<f32>(x).into_iter().map(f64::from).collect()
}

fn narrowed(values: Vec<f64>, rows: usize, width: usize) -> FlexTensor {
    matrix(values.into_iter().map(|value| value as f32).collect(), rows, width)
}

impl ExpertParts for Flex {
    fn route(scores: FloatTensor<Self>, routing: &Routing) -> IntTensor<Self> {
        let words = oracle::route(&values::<f32>(&scores), routing);
        let len = words.len();
        FlexTensor::from_data(TensorData::new(bytemuck::pod_collect_to_vec::<u32, i32>(&words), [len]))
    }

    fn read_words(words: &IntTensor<Self>) -> Option<Vec<u32>> {
        Some(words_of(words))
    }

    fn route_weights(scores: FloatTensor<Self>, routed: &RoutedRows<Self>, normalise: bool) -> FloatTensor<Self> {
        let routing = &routed.host.routing;
        let weights = oracle::weights(&wide(&scores), &words_of(&routed.words), routing, normalise);
        narrowed(weights, routing.tokens(), routing.per_token())
    }

    fn route_weight_grads(
        dweights: FloatTensor<Self>,
        _weights: FloatTensor<Self>,
        scores: FloatTensor<Self>,
        routed: &RoutedRows<Self>,
        normalise: bool,
    ) -> FloatTensor<Self> {
        let (routing, words) = (&routed.host.routing, words_of(&routed.words));
        let grads = oracle::weight_gradient(&wide(&dweights), &wide(&scores), &words, routing, normalise);
        narrowed(grads, routing.tokens(), routing.experts())
    }

    fn gather(x: FloatTensor<Self>, routed: &RoutedRows<Self>) -> FloatTensor<Self> {
        let (routing, words) = (&routed.host.routing, words_of(&routed.words));
        by_dtype!(x, gather(&x, &words, routing))
    }

    fn gated_with_biases(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        biases: [FloatTensor<Self>; 2],
        routed: &RoutedRows<Self>,
        activation: Activation,
    ) -> FloatTensor<Self> {
        let (routing, words) = (&routed.host.routing, words_of(&routed.words));
        by_dtype!(gate, gated_with_biases([&gate, &up], biases.each_ref(), &words, routing, activation))
    }

    fn combine(
        rows: FloatTensor<Self>,
        more: Option<FloatTensor<Self>>,
        bias: Option<FloatTensor<Self>>,
        weights: Option<FloatTensor<Self>>,
        routed: &RoutedRows<Self>,
    ) -> FloatTensor<Self> {
        let (routing, words) = (&routed.host.routing, words_of(&routed.words));
        by_dtype!(rows, combine(&rows, [more.as_ref(), bias.as_ref()], weights.as_ref(), &words, routing))
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
        let (routing, words) = (&routed.host.routing, words_of(&routed.words));
        by_dtype!(gate, gated_backward([&dy, &gate, &up], biases.as_ref(), &weights, &words, routing, activation))
    }

    fn factor_gradient(
        x: FloatTensor<Self>,
        product: FloatTensor<Self>,
        weights: Option<FloatTensor<Self>>,
        which: LoraFactor,
        routed: &RoutedRows<Self>,
    ) -> FloatTensor<Self> {
        let (routing, words) = (&routed.host.routing, words_of(&routed.words));
        let product = match &weights {
            Some(weights) => by_dtype!(product, weighted(&product, weights, &words, routing)),
            None => product,
        };
        let (features, rank) = (x.shape()[1], product.shape()[1]);
        let (rows, columns) = match which {
            LoraFactor::A => (rank, features),
            LoraFactor::B => (features, rank),
        };
        let mut grads =
            Self::float_zeros(Shape::new([routing.experts() * rows, columns]), &x.device(), FloatDType::F32);
        let offsets = &words[routing.offsets()];
        for (expert, pair) in offsets.windows(2).enumerate().filter(|(_, pair)| pair[0] < pair[1]) {
            let range = pair[0] as usize..pair[1] as usize;
            let of = |x: &FlexTensor| composed::rows_of::<Self>(x, range.clone());
            let grad = Self::low_rank_gradient(of(&x), of(&product), which, None);
            let place = [Slice::from(expert * rows..(expert + 1) * rows), Slice::from(0..columns)];
            grads = Self::float_slice_assign(grads, &place, grad);
        }
        debug_assert_eq!(grads.dtype(), DType::F32, "gradients of factors are f32");
        grads
    }
}

impl ExpertOps for Flex {
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
