//! A training step over small models of every architecture.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use burn::tensor::{Device, FloatDType, Tensor};
use nf4_quant::QuantConfig;
use paged_optim::{Budget, Moment, OptimizerConfig};
use qlora_data::Batch;
use qlora_layers::{ActivationCheckpointing, LoraConfig, trainable};
use qlora_models::{Decoder, LoadOptions};
use qlora_train::loss_scale::{LossScale, LossScaler, LossScalerState};
use qlora_train::{Engine, Plan, Room, RowSizes, TrainConfig};
use std::path::{Path, PathBuf};

fn archs() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference/archs");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

fn arch(name: &str) -> PathBuf {
    archs().into_iter().find(|path| path.ends_with(name)).unwrap()
}

fn model(dir: &Path) -> Decoder {
    let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype: FloatDType::F32 };
    let mut model = Decoder::load(dir, options, &Device::flex(), &mut |_| ()).unwrap();
    model.attach_lora(&LoraConfig { rank: 2, dropout: 0.1, ..Default::default() }, 3).unwrap();
    model
}

fn engine(dir: &Path, checkpointing: ActivationCheckpointing) -> Engine {
    engine_of(model(dir), checkpointing)
}

fn engine_of(model: Decoder, checkpointing: ActivationCheckpointing) -> Engine {
    let optimizer = OptimizerConfig { weight_decay: 0.1, ..Default::default() };
    Engine::new(model, optimizer, Budget::Unlimited, 1.0, checkpointing).unwrap()
}

fn batch(rows: usize, len: usize) -> Batch {
    batch_of(53, rows, len)
}

/// For a vocabulary of so many tokens.
fn batch_of(vocabulary: usize, rows: usize, len: usize) -> Batch {
    let words = (vocabulary as u32 - 3).min(50);
    let input_ids: Vec<u32> = (0..(rows * len) as u32).map(|i| 3 + i * 7 % words).collect();
    let labels = input_ids.iter().map(|&id| i64::from(id)).collect();
    Batch { input_ids, labels, rows, cols: len, lengths: vec![len; rows], packed: false, judged: None }
}

fn values(tensor: &Tensor<2>) -> Vec<f32> {
    tensor.clone().without_autodiff().into_data().iter::<f32>().collect()
}

fn factors(engine: &Engine) -> Vec<Vec<f32>> {
    engine
        .model()
        .parted()
        .adapters()
        .flat_map(|(_, adapter)| [&adapter.lora_a, &adapter.lora_b])
        .map(|factor| values(factor))
        .collect()
}

#[test]
fn activation_checkpointing_changes_no_bit_in_any_family() {
    for dir in archs() {
        let adapters = ActivationCheckpointing::ALL.map(|checkpointing| {
            let mut engine = engine(&dir, checkpointing);
            // The second step starts from factors that are not zero.
            let batch = batch_of(engine.model().vocab_size(), 2, 12);
            let step = |seed| engine.step(std::slice::from_ref(&batch), 1e-2, seed).unwrap().loss;
            let losses: Vec<f64> = (0..2).map(step).collect();
            (losses, factors(&engine))
        });
        for (policy, of_policy) in ActivationCheckpointing::ALL.iter().zip(&adapters) {
            assert!(&adapters[0] == of_policy, "{policy:?}, {}", dir.display());
        }
    }
}

#[test]
fn a_plan_counts_what_is_loaded() {
    for dir in archs() {
        let engine = engine(&dir, ActivationCheckpointing::Full);
        let mut config = TrainConfig::default();
        config.lora.rank = 2;
        let plan = Plan::new(&config, engine.model().config(), FloatDType::F32, &Room::default(), &RowSizes::default())
            .unwrap();
        assert_eq!(plan.base_parameters, engine.model().num_params() as u64, "{}", dir.display());
        assert_eq!(plan.trainable_parameters, engine.model().num_trainable() as u64, "{}", dir.display());
        let planned = plan.memory.linear_weights + plan.memory.other_weights;
        let loaded = engine.model().device_bytes() as u64;
        // Each of some tens of small layers has its own last nested block, and words of four bytes.
        assert!(planned.abs_diff(loaded) < loaded / 20, "{}: {planned} and {loaded}", dir.display());
    }
}

/// The update is queued before the host knows the loss.
#[test]
fn a_step_that_is_not_finite_changes_nothing() {
    let dir = arch("gemma2");
    let mut engine = engine(&dir, ActivationCheckpointing::Full);
    engine.step(&[batch(2, 12)], 1e30, 0).unwrap();
    let all = |engine: &mut Engine| (factors(engine), engine.optimizer_mut().state().unwrap());
    let kept = all(&mut engine);
    for seed in 1..3 {
        let message = engine.step(&[batch(2, 12)], 1e-2, seed).unwrap_err().to_string();
        assert!(message.contains("training diverged: loss NaN"), "{message}");
        assert!(all(&mut engine) == kept, "after {message}");
    }
}

#[test]
fn an_expert_without_tokens_has_a_zero_gradient() {
    let dir = arch("qwen3_moe");
    let mut model = model(&dir);
    for (_, adapter) in model.adapters_mut() {
        adapter.lora_b = trainable(adapter.lora_b.val().without_autodiff() + 0.25);
    }
    let mut engine = engine_of(model, ActivationCheckpointing::Full);
    // Six experts' factors are one tensor.
    let joined = |engine: &Engine| -> Vec<(String, Vec<f32>)> {
        let parameters = engine.model().parameters().into_iter();
        parameters.map(|(name, parameter)| (name, values(parameter))).collect()
    };
    let before = joined(&engine);
    // Three tokens with three experts each: some of six get none.
    engine.step(&[batch(1, 3)], 1e-2, 0).unwrap();
    let (state, mut idle) = (engine.optimizer_mut().state().unwrap(), 0);
    let after = joined(&engine);
    for (i, (name, before)) in before.iter().enumerate().filter(|(_, (name, _))| name.contains(".experts.")) {
        let Moment::Full(mean) = &state[i][0] else { panic!("small parameters keep 32 bits") };
        let of_expert = before.len() / 6;
        for (mean, (before, after)) in
            mean.chunks(of_expert).zip(before.chunks(of_expert).zip(after[i].1.chunks(of_expert)))
        {
            if mean.iter().all(|m| *m == 0.0) {
                idle += 1;
                // Weight decay reaches it as it reaches all others.
                for (found, before) in after.iter().zip(before) {
                    let expected = before * (1.0 - 1e-2 * 0.1);
                    assert!((found - expected).abs() <= 1e-7, "{name}: {found} against {expected}");
                }
            }
        }
    }
    assert!(idle > 0, "every expert got a token");
}

/// A step that overflows leaves adapters, moments and the optimizer's count as they were, and the steps behind it have the bits
/// of an engine that never met it.
#[test]
fn an_overflowing_step_is_skipped() {
    let dir = arch("gemma2");
    let in_f16 = |scale: f64| {
        let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype: FloatDType::F16 };
        let mut model = Decoder::load(&dir, options, &Device::flex(), &mut |_| ()).unwrap();
        model.attach_lora(&LoraConfig { rank: 2, dropout: 0.1, ..Default::default() }, 3).unwrap();
        let mut scaler = LossScaler::new(LossScale::Auto, FloatDType::F16);
        scaler.restore(LossScalerState { scale, growth_tracker: 7, skipped_steps: 0 });
        engine_of(model, ActivationCheckpointing::Full).with_loss_scaler(scaler)
    };
    // Two micro-batches, so that the scale is that of both.
    let step = |engine: &mut Engine, seed| engine.step(&[batch(2, 12), batch(1, 9)], 1e-2, seed).unwrap();
    let all =
        |engine: &mut Engine| (factors(engine), engine.optimizer_mut().state().unwrap(), engine.optimizer().updates());
    let scale = 2.0_f64.powi(34);
    let mut engine = in_f16(scale);
    let start = all(&mut engine);
    let mut skipped = 0;
    let first = loop {
        let output = step(&mut engine, 1);
        if !output.is_skipped() {
            break output;
        }
        skipped += 1;
        assert!(!output.grad_norm.is_finite() && output.loss.is_finite(), "{output:?}: the backward pass overflows");
        assert!(all(&mut engine) == start, "step {skipped}");
        let state = engine.loss_scaler().state().unwrap();
        let halved = scale * 0.5_f64.powi(skipped);
        assert_eq!(state, LossScalerState { scale: halved, growth_tracker: 0, skipped_steps: skipped as u64 });
    };
    assert!(skipped > 0 && first.loss_scaling.unwrap().scale < scale);
    step(&mut engine, 2);
    let mut plain = in_f16(first.loss_scaling.unwrap().scale);
    let expected = step(&mut plain, 1);
    assert_eq!((first.loss, first.grad_norm), (expected.loss, expected.grad_norm));
    step(&mut plain, 2);
    let (found, expected) = (all(&mut engine), all(&mut plain));
    assert_eq!(found.2, 2);
    assert!(found == expected);
}

/// The norm that clipping sees, and that is reported, is that of the gradients of the loss itself.
#[test]
fn clipping_sees_gradients_without_the_scale() {
    let dir = arch("gemma2");
    let run = |choice: LossScale| {
        let mut engine = engine(&dir, ActivationCheckpointing::None);
        // A bound that the norm exceeds.
        engine = engine.with_loss_scaler(LossScaler::new(choice, FloatDType::F32));
        let outputs: Vec<(f64, f64)> = (0..3)
            .map(|seed| engine.step(&[batch(2, 12)], 1e-2, seed).unwrap())
            .map(|o| (o.loss, o.grad_norm))
            .collect();
        (outputs, factors(&engine))
    };
    let plain = run(LossScale::Off);
    assert!(plain.0.iter().any(|(_, norm)| *norm > 1.0), "{:?}", plain.0);
    assert!(run(LossScale::Dynamic) == plain);
    assert!(run(LossScale::Fixed(2.0_f64.powi(-9))) == plain);
}
