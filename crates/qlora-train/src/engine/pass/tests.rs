//! Packed rows beside the same rows one by one and side by side: loss, gradients and evaluation.

use super::super::gradients::{Computed, Local, Step};
use super::super::*;
use burn::tensor::{Device, FloatDType};
use nf4_quant::QuantConfig;
use qlora_data::{Example, MASKED_LABEL};
use qlora_layers::{ActivationCheckpointing, LoraConfig, trainable};
use qlora_models::LoadOptions;
use std::path::Path;
use test_support::{devices, noise};

/// Shorter than a convolution, longer than windows and than a chunk of linear attention.
const LENS: [usize; 5] = [7, 2, 70, 19, 33];
/// Fewer, where each length is other kernels to compile.
const FEW: [usize; 3] = [7, 2, 70];
/// The same sums in another order: some f32 roundings. Losses, norms, and each parameter's gradient as a whole are within this part.
const BAR: f32 = 1e-5;
/// And each element within this part of the largest one of its parameter, since one element may have the roundings of all blocks.
const ELEMENT: f32 = 4e-5;
/// A parameter whose gradient is less than this part of all is what large terms leave that cancel, and has their roundings: decays of linear
/// attention.
const LEFT: f64 = 0.01;

/// With adapters that change the result.
pub(in super::super) fn engine(arch: &str, device: &Device, policy: ActivationCheckpointing) -> Engine {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference").join(arch);
    let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype: FloatDType::F32 };
    let mut model = Decoder::load(&dir, options, device, &mut |_| ()).unwrap();
    model.attach_lora(&LoraConfig { rank: 2, alpha: 2.0, ..Default::default() }, 3).unwrap();
    for (i, (_, adapter)) in model.adapters_mut().enumerate() {
        let shape = adapter.lora_b.dims();
        let values = noise(i as u64, shape[0] * shape[1]).into_iter().map(|value| 0.2 * value).collect::<Vec<f32>>();
        adapter.lora_b = trainable(Tensor::<1>::from_data(values.as_slice(), device).reshape(shape));
    }
    Engine::new(model, OptimizerConfig::default(), Budget::Unlimited, 1.0, policy).unwrap()
}

/// Rows of these lengths, of whose tokens every fifth is not learned.
pub(in super::super) fn rows(lens: &[usize], words: usize) -> Vec<Example> {
    let row = |(row, len): (usize, &usize)| {
        let id = |i: usize| ((7 * i + i * i / 3 + 11 * row + 3) % (words - 4)) as u32;
        let label = |i: usize| if i % 5 == 4 { MASKED_LABEL } else { id(i).into() };
        Example { input_ids: (0..*len).map(id).collect(), labels: (0..*len).map(label).collect(), line: row + 1 }
    };
    lens.iter().enumerate().map(row).collect()
}

/// Loss, norm and the gradients of all parameters, by name.
pub(in super::super) type Numbers = ([f32; 2], Vec<(String, Vec<f32>)>);

pub(in super::super) fn computed(engine: &Engine, micro_batches: &[Batch]) -> Numbers {
    let labelled: Vec<LabelledTokens> =
        micro_batches.iter().map(|batch| LabelledTokens::of(batch, engine.preferences())).collect();
    let label_tokens = labelled.iter().map(LabelledTokens::len).sum();
    let mut step = Step { micro_batches, labelled: &labelled, label_tokens, seed: 1, scope: None };
    step.scope = engine.scope(&step).unwrap();
    let Local::Whole(computed) = engine.local(&step, None).unwrap() else { panic!("there are no ranks") };
    let Computed { numbers, grads, .. } = *computed;
    let numbers = numbers.wait().unwrap();
    let names = engine.model.parameters().into_iter().map(|(name, _)| name);
    let values = |grad: Tensor<2>| grad.try_into_vec_as::<f32>().unwrap();
    ([numbers[0], numbers[1]], names.zip(grads.into_iter().map(values)).collect())
}

pub(in super::super) fn assert_near(what: &str, (numbers, grads): &Numbers, expected: &Numbers) {
    for (found, expected) in numbers.iter().zip(&expected.0) {
        assert!((found / expected - 1.0).abs() <= BAR, "{what}: {found} against {expected}");
    }
    assert!(!grads.is_empty() && grads.len() == expected.1.len());
    let norm = |values: &[f32]| values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
    let largest = |values: &[f32]| values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
    let of_all = LEFT * f64::from(expected.0[1]);
    let most_of_all = LEFT as f32 * expected.1.iter().map(|(_, values)| largest(values)).fold(0.0, f32::max);
    for ((name, found), (_, expected)) in grads.iter().zip(&expected.1) {
        let differences: Vec<f32> = found.iter().zip(expected).map(|(found, expected)| found - expected).collect();
        let (far, whole) = (norm(&differences), norm(expected).max(of_all));
        assert!(far <= f64::from(BAR) * whole, "{what}, {name}: {far} of {whole}");
        let (far, most) = (largest(&differences), largest(expected).max(most_of_all));
        assert!(far <= ELEMENT * most, "{what}, {name}: an element {far} of {most}");
    }
}

fn check(what: &str, engine: &Engine, lens: &[usize]) -> Numbers {
    let rows = rows(lens, engine.model.config().vocab_size);
    let packed = [Batch::end_to_end(&rows)];
    let one_by_one: Vec<Batch> = rows.iter().map(|row| Batch::new([row], 0)).collect();
    let found = computed(engine, &packed);
    assert_near(&format!("{what}, one by one"), &found, &computed(engine, &one_by_one));

    let [packed, padded] = [&packed[..], &one_by_one].map(|batches| engine.evaluate(batches).unwrap());
    assert_eq!((packed.tokens, packed.accuracy), (padded.tokens, padded.accuracy), "{what}");
    assert!((packed.loss / padded.loss - 1.0).abs() <= f64::from(BAR), "{what}: {packed:?} {padded:?}");
    found
}

/// Other ways through the same rows.
fn check_divisions(what: &str, engine: &Engine, lens: &[usize], found: &Numbers) {
    let rows = rows(lens, engine.model.config().vocab_size);
    assert_near(&format!("{what}, side by side"), found, &computed(engine, &[Batch::new(&rows, 0)]));
    // Two sequences in two micro-batches.
    let (first, second) = rows.split_at(2);
    let halves = [Batch::end_to_end(first), Batch::end_to_end(second)];
    assert_near(&format!("{what}, in two micro-batches"), found, &computed(engine, &halves));
}

/// Dense, with sliding windows, with experts, with linear attention and experts, with short convolutions.
const MODELS: [&str; 6] =
    ["archs/llama3", "archs/gemma3", "archs/qwen3_moe", "archs/qwen3_next", "archs/qwen3_5", "archs/lfm2"];

#[test]
fn packed_rows_give_the_loss_and_the_gradients_of_the_same_rows_alone() {
    for arch in MODELS {
        let engine = engine(arch, &Device::flex(), ActivationCheckpointing::None);
        let found = check(arch, &engine, &LENS);
        check_divisions(arch, &engine, &LENS, &found);
    }
    check("full", &engine("archs/gemma3", &Device::flex(), ActivationCheckpointing::Full), &LENS);
}

/// Where attention, linear attention and experts are other code.
#[test]
fn packed_rows_give_the_same_on_every_device() {
    for (name, device) in devices().into_iter().filter(|(name, _)| *name != "flex") {
        for arch in ["archs/gemma3", "archs/qwen3_next"] {
            let engine = engine(arch, &device, ActivationCheckpointing::Selective);
            check(&format!("{arch} on {name}"), &engine, &FEW);
        }
    }
}
