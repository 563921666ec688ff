//! Experts as one operation against experts one by one, on every device: results, and gradients of input, scores and factors.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use burn::tensor::activation::softmax;
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use nf4_quant::{FloatFormat, QuantConfig, Quantized4bit};
use qlora_layers::ops::backward_from;
use qlora_layers::ops::experts::{expert_mlp, expert_weights, route};
use qlora_layers::ops::fused::{Activation, gated};
use qlora_layers::ops::seeded_dropout;
use qlora_layers::{ExpertAdapters, ExpertStack, FrozenLinear, Linear4bit, LoraAdapter, LoraLinear, Pass, trainable};
use test_support::{devices, noise};

/// What a case computes.
#[derive(Clone, Copy, Debug)]
struct Case {
    tokens: usize,
    experts: usize,
    per_token: usize,
    hidden: usize,
    inner: usize,
    rank: usize,
    /// Which of gate, up and down have adapters.
    adapted: [bool; 3],
    scores: Scores,
    normalise: bool,
    dropout: f32,
    double_quant: bool,
    /// Whether projections have biases.
    biased: bool,
    activation: Activation,
}

/// Where tokens go.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Scores {
    Random,
    /// Expert 1 is everybody's first, and the last one nobody's.
    Uneven,
}

const CASE: Case = Case {
    tokens: 40,
    experts: 5,
    per_token: 2,
    hidden: 256,
    inner: 128,
    rank: 8,
    adapted: [true; 3],
    scores: Scores::Random,
    normalise: true,
    dropout: 0.0,
    double_quant: true,
    biased: false,
    activation: Activation::Silu,
};

fn cases() -> Vec<Case> {
    vec![
        CASE,
        Case { scores: Scores::Uneven, normalise: false, ..CASE },
        Case { tokens: 1, adapted: [false, false, true], ..CASE },
        Case { tokens: 130, adapted: [true, false, false], scores: Scores::Uneven, ..CASE },
        Case { adapted: [false; 3], double_quant: false, ..CASE },
        // No kernel takes the rank, or keeps the blocks of such weights apart.
        Case { rank: 3, ..CASE },
        Case { hidden: 64, inner: 32, experts: 9, per_token: 9, ..CASE },
        Case { biased: true, activation: Activation::ClampedSwish, ..CASE },
        // 576 blocks of a weight, two and a quarter nested ones.
        Case { hidden: 192, inner: 192, experts: 3, ..CASE },
        Case { biased: true, normalise: false, adapted: [false; 3], scores: Scores::Uneven, ..CASE },
    ]
}

fn matrix(seed: u64, shape: [usize; 2], scale: f32, device: &Device, dtype: FloatDType) -> Tensor<2> {
    let values: Vec<f32> = noise(seed, shape[0] * shape[1]).into_iter().map(|value| value * scale).collect();
    Tensor::<2>::from_data(TensorData::new(values, shape), (device, DType::F32)).cast(dtype)
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.without_autodiff().cast(FloatDType::F32).try_into_vec_as::<f32>().unwrap()
}

const DROPOUT_SEED: u64 = 77;
const ADAPTER_SEED: u64 = 5;

/// The bias of a layer.
fn bias(seed: u64, width: usize, device: &Device, dtype: FloatDType) -> Tensor<1> {
    matrix(seed + 3000, [1, width], 1.0, device, dtype).squeeze_dim(0)
}

/// Gate, up and down of each expert.
fn layers(case: &Case, device: &Device, dtype: FloatDType) -> Vec<[LoraLinear; 3]> {
    let shapes = [[case.inner, case.hidden], [case.inner, case.hidden], [case.hidden, case.inner]];
    let config = QuantConfig { double_quant: case.double_quant, ..QuantConfig::default() };
    let expert = |expert: usize| {
        [0, 1, 2].map(|which| {
            let [out_features, in_features] = shapes[which];
            let seed = 100 + 10 * expert as u64 + which as u64;
            // Another mean for each, so that offsets of another expert would show.
            let values = noise(seed, out_features * in_features);
            let values: Vec<f32> = values.into_iter().map(|v| v * 0.05 * (1 + expert % 3) as f32).collect();
            let mut weight = Quantized4bit::quantize(&values, &shapes[which], &config).unwrap();
            weight.state.dtype = match dtype {
                FloatDType::BF16 => FloatFormat::BF16,
                FloatDType::F16 => FloatFormat::F16,
                _ => FloatFormat::F32,
            };
            let base = FrozenLinear::Quantized(Linear4bit::from_quantized(&weight, device).unwrap());
            let mut layer = LoraLinear::frozen(base, case.biased.then(|| bias(seed, out_features, device, dtype)));
            if case.adapted[which] {
                let a = matrix(seed + 1000, [case.rank, in_features], 0.1, device, FloatDType::F32);
                let b = matrix(seed + 2000, [out_features, case.rank], 0.1, device, FloatDType::F32);
                let index = (3 * expert + which) as u32;
                layer.adapter = Some(LoraAdapter::from_factors(a, b, 1.5, case.dropout, index));
            }
            layer
        })
    };
    (0..case.experts).map(expert).collect()
}

fn scores(case: &Case, device: &Device) -> Tensor<2> {
    let mut values = noise(ADAPTER_SEED, case.tokens * case.experts);
    if case.scores == Scores::Uneven {
        for row in values.chunks_mut(case.experts) {
            row[1] += 20.0;
            row[case.experts - 1] -= 20.0;
        }
    }
    Tensor::from_data(TensorData::new(values, [case.tokens, case.experts]), (device, DType::F32))
}

/// What is compared: the result, then gradients of input, scores, and the factors of each projection over all experts.
type Found = Vec<(String, Vec<f32>)>;

fn named(y: Tensor<2>, x: Vec<f32>, scores: Vec<f32>, factors: Vec<(String, Vec<f32>)>) -> Found {
    let first = [("y".into(), values(y)), ("dx".into(), x), ("dscores".into(), scores)];
    first.into_iter().chain(factors).collect()
}

/// By the operation.
fn as_one(case: &Case, device: &Device, dtype: FloatDType, gradients_only: bool) -> Found {
    let mut layers = layers(case, device, dtype);
    let mut stacks = Vec::new();
    let mut adapters: Vec<Option<ExpertAdapters>> = Vec::new();
    for which in 0..3 {
        let mut bases: Vec<&mut Linear4bit> = layers
            .iter_mut()
            .map(|layers| match &mut layers[which].base {
                FrozenLinear::Quantized(base) => base,
                FrozenLinear::Dense(_) => unreachable!(),
            })
            .collect();
        stacks.push(ExpertStack::new(&mut bases).unwrap());
        let own: Vec<&LoraAdapter> = layers.iter().filter_map(|layers| layers[which].adapter.as_ref()).collect();
        let mut joined = (!own.is_empty()).then(|| ExpertAdapters::new(&own).unwrap());
        joined.iter_mut().for_each(ExpertAdapters::track);
        adapters.push(joined);
    }
    let pass = Pass::training(DROPOUT_SEED);
    let x = matrix(1, [case.tokens, case.hidden], 1.0, device, dtype).autodiff().require_grad();
    let scores = scores(case, device).autodiff().require_grad();
    let routing = route(scores.clone(), case.per_token);
    let weights = expert_weights(scores.clone(), &routing, case.normalise);
    let bias = |which: usize| {
        let own = layers.iter().map(|layers| layers[which].bias.as_ref().map(|bias| bias.val().unsqueeze::<2>()));
        own.collect::<Option<Vec<_>>>().map(|all| Tensor::cat(all, 0))
    };
    let projections = [0, 1, 2].map(|i| stacks[i].projection(adapters[i].as_ref(), pass).with_bias(bias(i)));
    let y = expert_mlp(x.clone(), weights, &routing, projections, case.activation, gradients_only);
    let dy = matrix(2, [case.tokens, case.hidden], 1.0, device, dtype);
    let mut grads = backward_from(y.clone(), dy);
    let mut factors = Vec::new();
    for (which, adapters) in adapters.iter().enumerate() {
        for (name, parameter) in adapters.iter().flat_map(ExpertAdapters::parameters) {
            factors.push((format!("{which}.{name}"), values(parameter.grad_remove(&mut grads).unwrap())));
        }
    }
    let (dx, dscores) = (x.grad_remove(&mut grads).unwrap(), scores.grad_remove(&mut grads).unwrap());
    named(y, values(dx), values(dscores), factors)
}

fn ints(values: Vec<usize>, device: &Device) -> Tensor<1, Int> {
    let len = values.len();
    let values: Vec<i32> = values.into_iter().map(|value| value as i32).collect();
    Tensor::from_data(TensorData::new(values, [len]), (device, DType::I32))
}

/// One layer after the other, by stock operations around them.
fn one_by_one(case: &Case, device: &Device, dtype: FloatDType) -> Found {
    let mut layers = layers(case, device, dtype);
    layers.iter_mut().flatten().for_each(LoraLinear::track);
    let x = matrix(1, [case.tokens, case.hidden], 1.0, device, dtype).autodiff().require_grad();
    let scores = scores(case, device).autodiff().require_grad();
    let host = values(scores.clone());
    let mut groups = vec![Vec::new(); case.experts];
    let mut chosen = Vec::new();
    for (token, row) in host.chunks(case.experts).enumerate() {
        let mut order: Vec<usize> = (0..case.experts).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        for (place, &expert) in order[..case.per_token].iter().enumerate() {
            groups[expert].push(token * case.per_token + place);
            chosen.push(expert);
        }
    }
    let entries: Vec<usize> = groups.concat();
    let mut slots = vec![0; entries.len()];
    entries.iter().enumerate().for_each(|(row, entry)| slots[*entry] = row);

    let shape = [case.tokens, case.per_token];
    let weights = softmax(scores.clone(), 1).gather(1, ints(chosen, device).reshape(shape));
    let weights = if case.normalise { weights.clone() / weights.sum_dim(1) } else { weights };
    let rows = x.clone().select(0, ints(entries.iter().map(|entry| entry / case.per_token).collect(), device));
    // Dropout's masks go over the rows of all experts.
    let pass = Pass::training(DROPOUT_SEED);
    let project = |rows: Tensor<2>, which: usize| {
        let dropped = match &layers[0][which].adapter {
            Some(adapter) if case.dropout > 0.0 => {
                seeded_dropout(rows.clone(), pass.seed_for(adapter.index).unwrap(), case.dropout)
            }
            _ => rows.clone(),
        };
        let mut first = 0;
        let parts = groups.iter().zip(&layers).filter(|(group, _)| !group.is_empty()).map(|(group, layers)| {
            let part = |x: &Tensor<2>| x.clone().narrow(0, first, group.len());
            let (own, dropped) = (part(&rows), part(&dropped));
            first += group.len();
            match (&layers[which].adapter, case.dropout > 0.0) {
                (Some(adapter), true) => {
                    let without = Pass { dropout_seed: None, ..pass };
                    layers[which].base.forward_into(own, FloatDType::F32) + adapter.forward(dropped, without)
                }
                _ => layers[which].forward_in(own, pass),
            }
        });
        Tensor::cat(parts.collect(), 0).cast(dtype)
    };
    let h = gated(project(rows.clone(), 0), project(rows, 1), case.activation);
    let outputs = project(h, 2).select(0, ints(slots, device)).cast(FloatDType::F32);
    let outputs = outputs.reshape([case.tokens, case.per_token, case.hidden]);
    let y = (outputs * weights.unsqueeze_dim::<3>(2)).sum_dim(1).reshape([case.tokens, case.hidden]).cast(dtype);
    let dy = matrix(2, [case.tokens, case.hidden], 1.0, device, dtype);
    let mut grads = backward_from(y.clone(), dy);
    let mut factors = Vec::new();
    for which in (0..3).filter(|which| case.adapted[*which]) {
        for part in ["lora_a", "lora_b"] {
            let of = |layers: &[LoraLinear; 3], grads: &mut _| {
                let parameters = layers[which].parameters();
                let (_, parameter) = parameters.iter().find(|(name, _)| *name == part).unwrap();
                // An expert without tokens has no gradient here, and zeros there.
                let len = parameter.shape().num_elements();
                parameter.grad_remove(grads).map_or(vec![0.0; len], values)
            };
            let grads = layers.iter().flat_map(|layers| of(layers, &mut grads)).collect();
            factors.push((format!("{which}.{part}"), grads));
        }
    }
    let (dx, dscores) = (x.grad_remove(&mut grads).unwrap(), scores.grad_remove(&mut grads).unwrap());
    named(y, values(dx), values(dscores), factors)
}

/// Both are `step` of the largest value apart at most.
fn assert_equal(what: &str, found: &Found, expected: &Found, step: f32, skip: Option<&str>) {
    assert_eq!(found.len(), expected.len());
    for ((name, found), (other, expected)) in
        found.iter().zip(expected).filter(|((name, _), _)| Some(&name[..]) != skip)
    {
        assert_eq!((name, found.len()), (other, expected.len()), "{what}");
        let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        let furthest = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        // What is no number is further than anything.
        assert!(furthest <= step * largest + 1e-6, "{what}, {name}: {furthest} of {largest}");
        assert!(found.iter().all(|value| value.is_finite()), "{what}, {name}");
    }
}

/// Dtypes that a device computes in, and how far results may lie apart. In f32: sums of some hundred terms in another
/// order. In 16 bits: some roundings to eight or eleven bits between factors and sums of 128 to 256 terms, where one path
/// weighs the rows of gradients before the product and the other behind it.
fn dtypes(device: &Device) -> Vec<(FloatDType, f32)> {
    let all = [(FloatDType::F32, 2e-5), (FloatDType::BF16, 2e-2), (FloatDType::F16, 3e-3)];
    all.into_iter()
        .filter(|(dtype, _)| *device != Device::flex() || *dtype == FloatDType::F32)
        .filter(|(dtype, _)| device.supports_dtype(*dtype))
        .collect()
}

#[test]
fn all_experts_as_one_are_the_experts_one_by_one() {
    for (name, device) in devices() {
        for (dtype, step) in dtypes(&device) {
            // Without a kernel, Burn's products in 16 bits are tuned anew for each shape, for minutes.
            let tuned = |case: &Case| dtype != FloatDType::F32 && (case.rank == 3 || case.hidden == 64);
            for case in cases().into_iter().filter(|case| !tuned(case)) {
                let what = format!("{name}, {dtype:?}, {case:?}");
                let expected = one_by_one(&case, &device, dtype);
                assert_equal(&what, &as_one(&case, &device, dtype, false), &expected, step, None);
                // Without the result, the same gradients.
                assert_equal(&what, &as_one(&case, &device, dtype, true), &expected, step, Some("y"));
            }
        }
    }
}

/// Enough rows for all tiles of the kernels, and for each size of them.
#[test]
fn many_tokens() {
    for (name, device) in devices().into_iter().filter(|(name, _)| *name != "wgpu") {
        for (dtype, step) in dtypes(&device) {
            for (tokens, scores) in [(300, Scores::Uneven), (1500, Scores::Random)] {
                let case = Case { tokens, scores, experts: 12, rank: 16, hidden: 512, inner: 256, ..CASE };
                let what = format!("{name}, {dtype:?}, {case:?}");
                let found = as_one(&case, &device, dtype, false);
                // Sums over up to 300 rows as well.
                assert_equal(&what, &found, &one_by_one(&case, &device, dtype), 2.0 * step, None);
                assert!(found == as_one(&case, &device, dtype, false), "{what}: other bits the second time");
            }
        }
    }
}

#[test]
fn dropout_goes_over_the_rows_of_all_experts() {
    for (name, device) in devices() {
        for case in
            [Case { dropout: 0.3, ..CASE }, Case { dropout: 0.3, rank: 3, adapted: [true, false, true], ..CASE }]
        {
            let expected = one_by_one(&case, &device, FloatDType::F32);
            let what = format!("{name}, {case:?}");
            assert_equal(&what, &as_one(&case, &device, FloatDType::F32, false), &expected, 2e-5, None);
        }
    }
}

#[test]
fn adapters_come_back_as_they_went_in() {
    for (name, device) in devices() {
        let layers = layers(&CASE, &device, FloatDType::F32);
        let own: Vec<&LoraAdapter> = layers.iter().filter_map(|layers| layers[0].adapter.as_ref()).collect();
        let split = ExpertAdapters::new(&own).unwrap().split();
        assert_eq!(split.len(), CASE.experts);
        for (before, after) in own.iter().zip(&split) {
            assert_eq!((before.index, before.scaling.get()), (after.index, after.scaling.get()), "{name}");
            assert_eq!(values(before.lora_a.val()), values(after.lora_a.val()), "{name}");
            assert_eq!(values(before.lora_b.val()), values(after.lora_b.val()), "{name}");
        }
    }
}

#[test]
fn a_stack_is_the_weights_and_the_layers_are_its_views() {
    for (name, device) in devices() {
        for double_quant in [true, false] {
            let mut layers = layers(&Case { double_quant, ..CASE }, &device, FloatDType::F32);
            let dense = |layers: &[[LoraLinear; 3]]| -> Vec<Vec<f32>> {
                layers.iter().map(|layers| values(layers[2].base.to_dense(FloatDType::F32))).collect()
            };
            let before = dense(&layers);
            let mut bases: Vec<&mut Linear4bit> = Vec::new();
            for layers in &mut layers {
                let FrozenLinear::Quantized(base) = &mut layers[2].base else { unreachable!() };
                bases.push(base);
            }
            let stack = ExpertStack::new(&mut bases).unwrap();
            assert!(stack.holds(bases.iter().map(|base| Some(&**base))), "{name}");
            bases.swap(0, 1);
            assert!(!stack.holds(bases.iter().map(|base| Some(&**base))), "{name}: another order");
            assert!(!stack.holds([None].into_iter()), "{name}");
            assert_eq!(dense(&layers), before, "{name}");
        }
    }
}

#[test]
fn what_keeps_experts_apart_is_told() {
    let device = Device::flex();
    let layers = layers(&CASE, &device, FloatDType::F32);
    let adapter = |i: usize| layers[i][0].adapter.clone().unwrap();
    let refused = |second: LoraAdapter| ExpertAdapters::new(&[&adapter(0), &second]).unwrap_err().to_string();
    let message = refused(adapter(1).with_dora(&layers[1][0].base, None));
    assert!(message.contains("use_dora"), "{message}");
    let message = refused(adapter(1).with_bias());
    assert!(message.contains("lora_bias"), "{message}");
    let mut other = adapter(1);
    other.scaling *= 2.0;
    let message = refused(other);
    assert!(message.contains("patterns"), "{message}");
    let mut other = adapter(1);
    other.lora_a = trainable(Tensor::zeros([4, CASE.hidden], &device));
    assert!(refused(other).contains("rank"));
    let weight = |shape: [usize; 2]| {
        let config = QuantConfig { double_quant: false, ..QuantConfig::default() };
        let weight = Quantized4bit::quantize(&vec![0.5; shape[0] * shape[1]], &shape, &config).unwrap();
        Linear4bit::from_quantized(&weight, &device).unwrap()
    };
    let (mut a, mut b, mut c) = (weight([8, 64]), weight([16, 64]), weight([3, 40]));
    assert!(ExpertStack::new(&mut [&mut a, &mut b]).unwrap_err().to_string().contains("differ in shape"));
    assert!(ExpertStack::new(&mut [&mut c]).unwrap_err().to_string().contains("cross"));
}
