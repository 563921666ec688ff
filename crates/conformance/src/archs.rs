//! Section `archs`: small models of each architecture (`archs/<name>/`), with the logits of a few rows.
//!
//! Of each model are compared
//! - the logits in f32, of whole sequences and of the first row token by token through the cache (absolute, per
//!   logit);
//! - the gradients of adapters on every projection, experts' included, over the model in NF4: how many adapters have
//!   none or one that is not finite, and the slope of the loss along the gradient, against finite differences
//!   (relative);
//! - one step of the training engine: its gradient norm (relative to those gradients), and how many values of the
//!   adapter come out as no number;
//! - the losses and gradient norms of a few steps over the model in f32, beside PEFT's with torch's AdamW (relative);
//! - the adapter, saved and loaded: how many tensors differ, and the logits (absolute).
//!
//! Adapters start from random factors, so that every gradient is there to be seen.

use std::path::Path;

use anyhow::{Context, Result};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use burn_qlora::adapter_io::Adapter;
use burn_qlora::nf4_quant::QuantConfig;
use burn_qlora::paged_optim::{Budget, OptimizerConfig, OptimizerKind};
use burn_qlora::qlora_data::Batch;
use burn_qlora::qlora_layers::{ActivationCheckpointing, LoraAdapter, LoraConfig, Pass, TargetModules, mix, trainable};
use burn_qlora::qlora_models::{Decoder, KvCache, LoadOptions};
use burn_qlora::qlora_train::{Engine, LabelledTokens, loss_sum};

use serde::Deserialize;

use crate::compare::{max_abs_diff, relative, to_vec};
use crate::logits::{DENSE_BAR, logits};
use crate::reference::dims;
use crate::{Reference, Report};

const SEED: u64 = 11;
/// A few thousand f32 losses of order 6 are summed: a difference of two has an error of some 1e-6, the steps change
/// the loss by 1e-3 and more.
const SLOPE_BAR: f64 = 2e-2;
/// Losses of five updates in f32, sums in another order: 4e-7 is the most that is measured.
const STEPS_BAR: f64 = 1e-5;
/// Their gradient norms, in which AdamW's division by small numbers is: 2e-5 is the most.
const STEPS_NORM_BAR: f64 = 1e-4;
/// The same gradients, one block at a time.
const NORM_BAR: f64 = 1e-3;

/// Compares every model of `archs/`.
///
/// # Errors
/// A file cannot be read. A model that cannot be loaded, or not be trained, is a failed case.
pub fn cases(reference: &Reference, device: &Device, report: &mut Report) -> Result<()> {
    let names = match reference.find("archs") {
        Some(_) => reference.folders("archs")?,
        None => Vec::new(),
    };
    if names.is_empty() {
        report.skip("archs", "no archs/*");
    }
    for name in names {
        let subject = format!("archs {name}");
        if let Err(error) = compare(reference, &name, device, &subject, report) {
            report.fail(subject, &format!("{error:#}"));
        }
    }
    Ok(())
}

fn compare(reference: &Reference, name: &str, device: &Device, subject: &str, report: &mut Report) -> Result<()> {
    let dir = reference.path(&format!("archs/{name}"));
    let file = reference.tensors(&format!("archs/{name}/reference.safetensors"))?;
    let input = file.tensor("input_ids")?;
    let [rows, len] = dims(&input)?;
    let ids = input.to_i64_vec()?;
    let recorded = file.tensor("logits")?;
    let theirs = recorded.to_f32_vec()?;

    let dense = load(&dir, None, device)?;
    let ours = logits(&dense, &ids, rows, &recorded)?;
    report.compare(format!("{subject}: logits"), max_abs_diff(&ours, &theirs), DENSE_BAR);
    let ids: Vec<u32> = ids.iter().map(|&id| u32::try_from(id)).collect::<Result<_, _>>().context("input_ids")?;
    token_by_token(&dense, &ids[..len], &theirs[..theirs.len() / rows], subject, report)?;
    let labels = ids.iter().map(|&id| i64::from(id)).collect();
    let batch =
        Batch { input_ids: ids, labels, rows, cols: len, lengths: vec![len; rows], packed: false, judged: None };
    recorded_steps(reference, name, dense, &batch, subject, report)?;
    let mut model = load(&dir, Some(QuantConfig::default()), device)?;
    let lora = LoraConfig { rank: 4, alpha: 8.0, ..LoraConfig::default() };
    model.attach_lora(&lora, SEED)?;
    randomize(&mut model, device);
    let norm = gradients(&model, &batch, subject, report)?;

    // No clipping: the norm reported is the gradients' own.
    let mut engine =
        Engine::new(model, OptimizerConfig::default(), Budget::Unlimited, f32::MAX, ActivationCheckpointing::Full)?;
    let output = engine.step(std::slice::from_ref(&batch), 1e-3, SEED)?;
    report.compare(format!("{subject}: gradient norm of a step"), relative(output.grad_norm, norm), NORM_BAR);
    let model = engine.into_model();
    let mut broken = 0;
    for (_, adapter) in model.adapters() {
        for factor in [&adapter.lora_a, &adapter.lora_b] {
            broken += to_vec(factor.val().without_autodiff())?.iter().filter(|value| !value.is_finite()).count();
        }
    }
    report.compare(format!("{subject}: values that a step made no numbers"), broken as f64, 0.0);
    round_trip(&model, &dir, &batch, subject, report)
}

fn load(dir: &Path, quantization: Option<QuantConfig>, device: &Device) -> Result<Decoder> {
    let options = LoadOptions { quantization, dtype: FloatDType::F32 };
    Ok(Decoder::load(dir, options, device, &mut |_| ())?)
}

/// What PEFT's steps were, `archs/<name>/training.json`, over a model in f32.
#[derive(Deserialize)]
struct Training {
    /// The linear layers with adapters, by the ends of their paths.
    target_modules: Vec<String>,
    rank: usize,
    alpha: f32,
    learning_rate: f64,
    /// Before each step.
    losses: Vec<f64>,
    grad_norms: Vec<f64>,
}

/// The recorded steps over the dense model, each on the same rows, from factors that both sides make of numbers.
fn recorded_steps(
    reference: &Reference,
    name: &str,
    mut model: Decoder,
    batch: &Batch,
    subject: &str,
    report: &mut Report,
) -> Result<()> {
    let file = format!("archs/{name}/training.json");
    if reference.find(&file).is_none() {
        report.skip(format!("{subject}: steps beside PEFT"), format!("no {file}"));
        return Ok(());
    }
    let Training { target_modules, rank, alpha, learning_rate, losses, grad_norms } = reference.json(&file)?;
    let target_modules = TargetModules::Names(target_modules);
    // transformers stacks experts, which PEFT adapts otherwise: the recorded steps leave them alone.
    let exclude_modules = Some(TargetModules::Pattern(r".*\.experts\..*".into()));
    model.attach_lora(&LoraConfig { rank, alpha, target_modules, exclude_modules, ..LoraConfig::default() }, SEED)?;
    let device = model.device().clone();
    let mut named: Vec<(String, &mut LoraAdapter)> = model.adapters_mut().collect();
    named.sort_by(|(a, _), (b, _)| a.cmp(b));
    let count = named.len();
    let factors = named.into_iter().flat_map(|(_, adapter)| [&mut adapter.lora_a, &mut adapter.lora_b]);
    for (number, factor) in factors.enumerate() {
        let [rows, columns] = factor.dims();
        // In steps of 2^-12, so that every value is exact in f32: make_archs.py has the same.
        let value = |i: usize| ((i * 389 + number * 97) % 1021) as f32 / 4096.0 - 0.125;
        let values: Vec<f32> = (0..rows * columns).map(value).collect();
        *factor = trainable(Tensor::from_data(TensorData::new(values, [rows, columns]), (&device, DType::F32)));
    }
    let optimizer = OptimizerConfig { kind: OptimizerKind::AdamW32bit, ..OptimizerConfig::default() };
    let mut engine = Engine::new(model, optimizer, Budget::Unlimited, f32::MAX, ActivationCheckpointing::Full)?;
    let (mut loss, mut norm) = (0f64, 0f64);
    for (theirs, their_norm) in losses.iter().zip(&grad_norms) {
        let output = engine.step(std::slice::from_ref(batch), learning_rate, SEED)?;
        loss = loss.max(relative(output.loss, *theirs));
        norm = norm.max(relative(output.grad_norm, *their_norm));
    }
    let (Some(first), Some(last)) = (losses.first(), losses.last()) else {
        report.fail(format!("{subject}: steps beside PEFT"), &format!("{file} has no losses"));
        return Ok(());
    };
    let steps = format!("{} steps, {count} adapters, {first:.3} to {last:.3}", losses.len());
    report.compare_noted(format!("{subject}: losses of steps beside PEFT"), loss, STEPS_BAR, steps);
    report.compare(format!("{subject}: gradient norms of steps beside PEFT"), norm, STEPS_NORM_BAR);
    Ok(())
}

/// The logits after each token of a row, with everything before it in the cache. Models whose rotary embeddings
/// depend on the length of the sequence have them of the whole row at its end only.
fn token_by_token(model: &Decoder, ids: &[u32], theirs: &[f32], subject: &str, report: &mut Report) -> Result<()> {
    let vocabulary = theirs.len() / ids.len();
    let depends = |len| model.rotation(len) != model.rotation(ids.len());
    let mut cache = KvCache::new();
    let mut error = 0f64;
    for (position, (id, theirs)) in ids.iter().zip(theirs.chunks(vocabulary)).enumerate() {
        let logits = model.forward_cached(&[*id], &mut cache).context("a token has logits")?;
        let ours = to_vec(logits)?;
        if !depends(position + 1) {
            error = error.max(max_abs_diff(&ours, theirs));
        }
    }
    report.compare(format!("{subject}: logits token by token"), error, DENSE_BAR);
    Ok(())
}

/// Values in ±1/8, a function of factor, position and seed.
fn randomize(model: &mut Decoder, device: &Device) {
    let mut stream = SEED;
    for adapter in adapters_mut(model) {
        for factor in [&mut adapter.lora_a, &mut adapter.lora_b] {
            stream = mix(stream);
            let [rows, columns] = factor.dims();
            let value = |i: u64| (mix(stream ^ i) >> 40) as f32 / 16_777_216.0 * 0.25 - 0.125;
            let values: Vec<f32> = (0..(rows * columns) as u64).map(value).collect();
            *factor = trainable(Tensor::from_data(TensorData::new(values, [rows, columns]), (device, DType::F32)));
        }
    }
}

/// The adapters, in the order of their numbers.
fn adapters_mut(model: &mut Decoder) -> impl Iterator<Item = &mut LoraAdapter> {
    model.linears_mut().filter_map(|(_, linear)| linear.adapter.as_mut())
}

/// The mean loss of a batch, as the engine takes it.
fn loss(model: &Decoder, batch: &Batch, pass: Pass) -> Tensor<1> {
    let labelled = LabelledTokens::new(batch);
    let sequence = model.sequence(batch.rows, batch.cols, 0);
    let run = |x, block: &_| model.run_block(block, x, &sequence, pass);
    let x = model.blocks().iter().fold(model.begin(&sequence, &batch.input_ids, pass), run);
    loss_sum(model, x, &labelled, pass).div_scalar(labelled.len() as f32)
}

/// Gradients of all adapters by a plain backward pass; returns their norm.
fn gradients(model: &Decoder, batch: &Batch, subject: &str, report: &mut Report) -> Result<f64> {
    let mut tracked = model.clone();
    tracked.track();
    let mut grads = loss(&tracked, batch, Pass::training(SEED)).backward();
    let (mut bad, mut idle, mut squares) = (0, 0, 0.0);
    let mut found: Vec<Option<[Tensor<2>; 2]>> = Vec::new();
    for (_, adapter) in tracked.adapters() {
        match [&adapter.lora_a, &adapter.lora_b].map(|factor| factor.grad_remove(&mut grads)) {
            [Some(grad_a), Some(grad_b)] => {
                let values = [to_vec(grad_a.clone())?, to_vec(grad_b.clone())?].concat();
                bad += usize::from(values.iter().any(|value| !value.is_finite()));
                squares += values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
                found.push(Some([grad_a, grad_b]));
            }
            // Experts that got no token.
            [None, None] => {
                idle += 1;
                found.push(None);
            }
            _ => {
                bad += 1;
                found.push(None);
            }
        }
    }
    let norm = squares.sqrt();
    let note = format!("{} adapters, {idle} without a token", found.len());
    report.compare_noted(format!("{subject}: adapters without a finite gradient"), bad as f64, 0.0, note);
    // The loss is smooth but where a token changes its experts; the smallest step may be too small for f32.
    let errors = [1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4].map(|step| -> Result<f64> {
        let at = |sign: f64| -> Result<f64> {
            let mut moved = model.clone();
            for (adapter, grads) in adapters_mut(&mut moved).zip(&found) {
                let Some([grad_a, grad_b]) = grads else { continue };
                for (factor, grad) in [(&mut adapter.lora_a, grad_a), (&mut adapter.lora_b, grad_b)] {
                    *factor = trainable(factor.val() + grad.clone().mul_scalar(sign * step / norm));
                }
            }
            Ok(f64::from(to_vec(loss(&moved, batch, Pass::INFERENCE))?[0]))
        };
        Ok(relative((at(1.0)? - at(-1.0)?) / (2.0 * step), norm))
    });
    let mut best = f64::INFINITY;
    for error in errors {
        best = best.min(error?);
    }
    report.compare_noted(format!("{subject}: slope of the loss"), best, SLOPE_BAR, format!("{norm:.3}"));
    Ok(norm)
}

/// The adapter, written, read and put on the base again.
fn round_trip(model: &Decoder, dir: &Path, batch: &Batch, subject: &str, report: &mut Report) -> Result<()> {
    let out = tempfile::tempdir()?;
    let saved = model.export_adapter(&dir.display().to_string(), None)?;
    saved.save(out.path())?;
    let loaded = Adapter::load(out.path())?;
    let differing = saved.tensors.iter().filter(|(key, tensor)| loaded.tensors.get(*key) != Some(tensor)).count();
    let differing = differing + saved.tensors.len().abs_diff(loaded.tensors.len());
    report.compare(format!("{subject}: tensors that differ after saving and loading"), differing as f64, 0.0);
    let mut again = load(dir, Some(QuantConfig::default()), model.device())?;
    again.load_adapter(&loaded)?;
    let logits = |model: &Decoder| to_vec(model.forward(&batch.input_ids, batch.rows, Pass::INFERENCE));
    let difference = max_abs_diff(&logits(model)?, &logits(&again)?);
    report.compare(format!("{subject}: logits after saving and loading"), difference, DENSE_BAR);
    Ok(())
}
