//! Section `qlora`: one recorded QLoRA run (`qlora/`), and what its adapter computes on each base.
//!
//! From the recorded initial adapter and batches, the run is repeated with this workspace's training
//! engine. Compared are each step's loss and gradient norm (relative), the distance of the final
//! adapter (relative Frobenius norm over all factors together), and the logits of the recorded final
//! adapter on the 4-bit base, on the f32 base, and merged into it (absolute, per logit).
//!
//! The layout fixes what the files do not say: the base is held in NF4, blocksize 64, with double
//! quantization, and the adapters in f32.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use burn::tensor::{Device, FloatDType};
use burn_qlora::adapter_io::{Adapter, Checkpoint};
use burn_qlora::nf4_quant::QuantConfig;
use burn_qlora::paged_optim::AdamWConfig;
use burn_qlora::qlora_layers::{ActivationCheckpointing, LoraConfig};
use burn_qlora::qlora_models::tokenizer::Tokenizer;
use burn_qlora::qlora_models::{Decoder, LoadOptions};
use burn_qlora::qlora_train::Engine;
use burn_qlora::qlora_train::data::Batch;
use serde::Deserialize;

use crate::compare::{max_abs_diff, relative};
use crate::logits::{QUANTIZED_BAR, continuations, logits};
use crate::reference::dims;
use crate::{Reference, Report};

/// `qlora/hyper.json`.
#[derive(Deserialize)]
struct Hyper {
    lr: f64,
    warmup: f64,
    max_grad_norm: f32,
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
    pad_id: i64,
}

/// One entry of `qlora/log_*.json`.
#[derive(Deserialize)]
struct Step {
    loss: f64,
    grad_norm: f64,
}

/// How far a run may be from the recorded one.
struct Bars {
    loss: f64,
    grad_norm: Option<f64>,
    adapter: Option<f64>,
}

/// Repeats the recorded runs and compares them.
///
/// # Errors
/// A file cannot be read, the base cannot be loaded, or training fails.
pub fn cases(reference: &Reference, device: &Device, report: &mut Report) -> Result<()> {
    if reference.find("qlora/batches.safetensors").is_none() {
        report.skip("qlora", "no qlora/batches.safetensors");
        return Ok(());
    }
    // f32: the same arithmetic in another order, through twenty updates. bf16: losses only; every
    // product is rounded to 8 bits, and where autocast rounds is PyTorch's own choice.
    let f32_bars = Bars { loss: 1e-3, grad_norm: Some(1e-2), adapter: Some(2e-2) };
    let bf16_bars = Bars { loss: 1e-2, grad_norm: None, adapter: None };
    for (label, dtype, bars) in [("f32", FloatDType::F32, f32_bars), ("bf16", FloatDType::BF16, bf16_bars)] {
        if device.supports_dtype(dtype) {
            training(reference, label, dtype, &bars, device, report)?;
        } else {
            report.skip(format!("qlora {label}"), format!("the device has no {dtype:?}"));
        }
        final_logits(reference, label, dtype, device, report)?;
    }
    Ok(())
}

/// The recorded steps, one by one.
fn training(
    reference: &Reference,
    label: &str,
    dtype: FloatDType,
    bars: &Bars,
    device: &Device,
    report: &mut Report,
) -> Result<()> {
    let log_name = format!("qlora/log_{label}.json");
    if reference.find(&log_name).is_none() {
        report.skip(format!("qlora {label}"), format!("no {log_name}"));
        return Ok(());
    }
    let log: Vec<Step> = reference.json(&log_name)?;
    let hyper: Hyper = reference.json("qlora/hyper.json")?;
    let initial = Adapter::load(&reference.path("qlora/initial_adapter"))?;
    let batches = batches(&reference.tensors("qlora/batches.safetensors")?, hyper.pad_id)?;
    if batches.len() != log.len() {
        bail!("{log_name} has {} steps, qlora/batches.safetensors {}", log.len(), batches.len());
    }
    let mut model = base(reference, &initial, Some(QuantConfig::default()), dtype, device)?;
    model.load_adapter(&initial)?;
    let optimizer = AdamWConfig { betas: hyper.betas, eps: hyper.eps, weight_decay: hyper.weight_decay };
    let mut engine = Engine::new(model, optimizer, hyper.max_grad_norm, ActivationCheckpointing::Full)?;
    for (index, (batch, recorded)) in batches.into_iter().zip(&log).enumerate() {
        let learning_rate = hyper.lr * (((index + 1) as f64) / hyper.warmup.max(1.0)).min(1.0);
        let output = engine.step(&[batch], learning_rate, 0)?;
        let subject = format!("qlora {label} step {}", index + 1);
        report.compare_noted(
            format!("{subject}: loss"),
            relative(output.loss, recorded.loss),
            bars.loss,
            format!("{:.4}", output.loss),
        );
        if let Some(bar) = bars.grad_norm {
            report.compare(format!("{subject}: grad_norm"), relative(output.grad_norm, recorded.grad_norm), bar);
        }
    }
    if let (Some(bar), Some(path)) = (bars.adapter, reference.find(&format!("qlora/final_adapter_{label}"))) {
        let theirs = Adapter::load(&path)?;
        let ours = engine.into_model().export_adapter(
            &LoraConfig { rank: theirs.config.r, ..LoraConfig::default() },
            "",
            None,
        )?;
        report.compare(format!("qlora {label}: distance of the final adapter"), distance(&ours, &theirs)?, bar);
    }
    Ok(())
}

/// The relative Frobenius distance over all tensors together.
fn distance(ours: &Adapter, theirs: &Adapter) -> Result<f64> {
    let (mut difference, mut norm) = (0.0, 0.0);
    if ours.tensors.len() != theirs.tensors.len() {
        bail!("the adapters have {} and {} tensors", ours.tensors.len(), theirs.tensors.len());
    }
    for (key, theirs) in &theirs.tensors {
        let ours = ours
            .tensors
            .get(key)
            .filter(|t| t.shape == theirs.shape)
            .with_context(|| format!("`{key}` is missing or has another shape"))?;
        for (a, b) in ours.data.iter().zip(&theirs.data) {
            difference += f64::from(a - b).powi(2);
            norm += f64::from(*b).powi(2);
        }
    }
    Ok((difference / norm).sqrt())
}

/// The recorded batches, [steps, rows, length].
fn batches(file: &Checkpoint, pad_id: i64) -> Result<Vec<Batch>> {
    let (input, labels) = (file.tensor("input_ids")?, file.tensor("labels")?);
    let [_, rows, cols] = dims(&input)?;
    labels.expect_shape(&input.shape)?;
    let (input, labels) = (input.to_i64_vec()?, labels.to_i64_vec()?);
    let batch = |(ids, labels): (&[i64], &[i64])| -> Result<Batch> {
        let length = |row: &[i64]| row.iter().rposition(|&id| id != pad_id).map_or(0, |last| last + 1);
        Ok(Batch {
            input_ids: ids.iter().map(|&id| u32::try_from(id)).collect::<Result<_, _>>().context("input_ids")?,
            labels: labels.to_vec(),
            rows,
            cols,
            lengths: ids.chunks(cols).map(length).collect(),
        })
    };
    input.chunks(rows * cols).zip(labels.chunks(rows * cols)).map(batch).collect()
}

/// What the recorded final adapter computes on each base.
fn final_logits(
    reference: &Reference,
    label: &str,
    dtype: FloatDType,
    device: &Device,
    report: &mut Report,
) -> Result<()> {
    let file_name = format!("qlora/logits_{label}.safetensors");
    let (Some(adapter_dir), Some(_)) =
        (reference.find(&format!("qlora/final_adapter_{label}")), reference.find(&file_name))
    else {
        report.skip(format!("qlora {label}: logits"), format!("no {file_name} or no final adapter"));
        return Ok(());
    };
    let adapter = Adapter::load(&adapter_dir)?;
    let file = reference.tensors(&file_name)?;
    if dtype == FloatDType::F32 {
        let mut model = base(reference, &adapter, Some(QuantConfig::default()), dtype, device)?;
        model.load_adapter(&adapter)?;
        compare(&model, &file, "4bit", label, report)?;
    } else {
        // There is nothing recorded that says what half precision explains here, as there is in `logits`.
        report.skip(
            format!("qlora {label} 4bit: logits"),
            "half precision is judged by the losses and by section logits",
        );
    }
    let mut model = base(reference, &adapter, None, FloatDType::F32, device)?;
    model.load_adapter(&adapter)?;
    compare(&model, &file, "adapter_on_f32", label, report)?;
    model.merge_adapters()?;
    compare(&model, &file, "merged_f32", label, report)?;
    // merged_greedy.json was made with the f32 run's adapter.
    if label == "f32" && reference.find("qlora/merged_greedy.json").is_some() {
        let prompts: BTreeMap<String, Vec<u32>> = reference.json("qlora/merged_greedy.json")?;
        let tokenizer = Tokenizer::from_dir(&base_dir(reference, &adapter)?)?;
        continuations(&model, &tokenizer, &prompts, "qlora f32 merged_f32", report)?;
    }
    Ok(())
}

/// The logits recorded under `name`; they may be of the first rows of `input_ids` only.
fn compare(model: &Decoder, file: &Checkpoint, name: &str, label: &str, report: &mut Report) -> Result<()> {
    let subject = format!("qlora {label} {name}: logits");
    let Some(view) = file.get(&format!("logits.{name}")) else {
        report.skip(subject, "not recorded");
        return Ok(());
    };
    let [rows, cols, _] = dims(&view)?;
    let input = file.tensor("input_ids")?;
    let [_, length] = dims(&input)?;
    if length != cols {
        bail!("logits.{name} has {cols} positions, input_ids {length}");
    }
    let ids = input.to_i64_vec()?;
    let ids = ids.get(..rows * cols).context("input_ids has fewer rows than the logits")?;
    report.compare(subject, max_abs_diff(&logits(model, ids, rows)?, &view.to_f32_vec()?), QUANTIZED_BAR);
    Ok(())
}

fn base_dir(reference: &Reference, adapter: &Adapter) -> Result<std::path::PathBuf> {
    reference.base_model(adapter.config.base_model_name_or_path.as_deref().unwrap_or_default())
}

fn base(
    reference: &Reference,
    adapter: &Adapter,
    quantization: Option<QuantConfig>,
    dtype: FloatDType,
    device: &Device,
) -> Result<Decoder> {
    let options = LoadOptions { quantization, dtype };
    Ok(Decoder::load(&base_dir(reference, adapter)?, options, device, &mut |_| ())?)
}
