//! Section `qlora`: one recorded QLoRA run (`qlora/`), and what its adapter computes on each base.
//!
//! From the recorded initial adapter and batches, the run is repeated with this workspace's training
//! engine, under every policy of activation checkpointing, with the optimizer's state on the device and in
//! pages that come and go, and with 8-bit state. Compared are each step's loss and gradient norm (relative), the distance of the final
//! adapter (relative Frobenius norm over all factors together), and the logits of the recorded final
//! adapter on the 4-bit base, on the f32 base, and merged into it (absolute, per logit).
//!
//! The layout fixes what the files do not say: the base is held in NF4, blocksize 64, with double
//! quantization, and the adapters in f32.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use burn::tensor::{Device, FloatDType};
use burn_qlora::Tokenizer;
use burn_qlora::adapter_io::{Adapter, Checkpoint};
use burn_qlora::nf4_quant::QuantConfig;
use burn_qlora::paged_optim::{Budget, OptimizerConfig, OptimizerKind};
use burn_qlora::qlora_data::Batch;
use burn_qlora::qlora_layers::ActivationCheckpointing;
use burn_qlora::qlora_models::{Decoder, LoadOptions};
use burn_qlora::qlora_train::Engine;
use serde::Deserialize;

use crate::compare::{max_abs_diff, relative, to_vec};
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

/// How a run keeps activations and the optimizer's state.
#[derive(Clone, Copy)]
struct Ways {
    checkpointing: ActivationCheckpointing,
    optimizer: OptimizerKind,
    budget: Budget,
}

impl Ways {
    const PLAIN: Self = Self {
        checkpointing: ActivationCheckpointing::Full,
        optimizer: OptimizerKind::AdamW32bit,
        budget: Budget::Unlimited,
    };
}

impl fmt::Display for Ways {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let checkpointing = self.checkpointing.name();
        write!(f, "{checkpointing} {}", self.optimizer)?;
        if self.budget != Budget::Unlimited { write!(f, " paged") } else { Ok(()) }
    }
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
    let initial = Adapter::load(&reference.path("qlora/initial_adapter"))?;
    let name = initial.config.base_model_name_or_path.clone().unwrap_or_default();
    let Some(base_dir) = reference.base_model(&name)? else {
        report.skip("qlora", format!("the base `{name}` is not in the folder"));
        return Ok(());
    };
    let run = Run { reference, initial, base_dir, device };
    // f32: the same arithmetic in another order, through twenty updates. bf16: losses only; every
    // product is rounded to 8 bits, and where autocast rounds is PyTorch's own choice.
    let f32_bars = Bars { loss: 1e-3, grad_norm: Some(1e-2), adapter: Some(2e-2) };
    let bf16_bars = Bars { loss: 1e-2, grad_norm: None, adapter: None };
    for (label, dtype, bars) in [("f32", FloatDType::F32, f32_bars), ("bf16", FloatDType::BF16, bf16_bars)] {
        if device.supports_dtype(dtype) {
            // Policies agree to the last bit; in half precision two of them will do.
            let policies = ActivationCheckpointing::ALL.into_iter().skip(if dtype == FloatDType::F32 { 0 } else { 2 });
            for checkpointing in policies {
                run.training(label, dtype, &bars, Ways { checkpointing, ..Ways::PLAIN }, report)?;
            }
            // No page stays on the device.
            let paged = Ways { budget: Budget::Bytes(0), ..Ways::PLAIN };
            run.training(label, dtype, &bars, paged, report)?;
            // The recorded run kept 32 bits: 8-bit state takes other steps, to nearly the same losses.
            let narrow = Ways { optimizer: OptimizerKind::AdamW8bit, ..Ways::PLAIN };
            let bars = Bars { loss: 1e-2, grad_norm: None, adapter: None };
            run.training(label, dtype, &bars, narrow, report)?;
        } else {
            report.skip(format!("qlora {label}"), format!("the device has no {dtype:?}"));
        }
        run.final_logits(label, dtype, report)?;
    }
    Ok(())
}

/// What the runs have in common.
struct Run<'a> {
    reference: &'a Reference,
    initial: Adapter,
    base_dir: PathBuf,
    device: &'a Device,
}

impl Run<'_> {
    /// The base, held as asked, with an adapter on it.
    fn model(&self, adapter: &Adapter, quantization: Option<QuantConfig>, dtype: FloatDType) -> Result<Decoder> {
        let options = LoadOptions { quantization, dtype };
        let mut model = Decoder::load(&self.base_dir, options, self.device, &mut |_| ())?;
        model.load_adapter(adapter)?;
        Ok(model)
    }

    /// The recorded steps, one by one.
    fn training(&self, label: &str, dtype: FloatDType, bars: &Bars, ways: Ways, report: &mut Report) -> Result<()> {
        let log_name = format!("qlora/log_{label}.json");
        if self.reference.find(&log_name).is_none() {
            report.skip(format!("qlora {label}"), format!("no {log_name}"));
            return Ok(());
        }
        let log: Vec<Step> = self.reference.json(&log_name)?;
        let hyper: Hyper = self.reference.json("qlora/hyper.json")?;
        let batches = batches(&self.reference.tensors("qlora/batches.safetensors")?, hyper.pad_id)?;
        if batches.len() != log.len() {
            bail!("{log_name} has {} steps, qlora/batches.safetensors {}", log.len(), batches.len());
        }
        let model = self.model(&self.initial, Some(QuantConfig::default()), dtype)?;
        let optimizer = OptimizerConfig {
            kind: ways.optimizer,
            betas: hyper.betas,
            eps: hyper.eps,
            weight_decay: hyper.weight_decay,
            ..Default::default()
        };
        let mut engine = Engine::new(model, optimizer, ways.budget, hyper.max_grad_norm, ways.checkpointing)?;
        for (index, (batch, recorded)) in batches.into_iter().zip(&log).enumerate() {
            let learning_rate = hyper.lr * (((index + 1) as f64) / hyper.warmup.max(1.0)).min(1.0);
            let output = engine.step(&[batch], learning_rate, 0)?;
            let subject = format!("qlora {label} {ways} step {}", index + 1);
            let (loss, note) = (relative(output.loss, recorded.loss), format!("{:.4}", output.loss));
            report.compare_noted(format!("{subject}: loss"), loss, bars.loss, note);
            if let Some(bar) = bars.grad_norm {
                report.compare(format!("{subject}: grad_norm"), relative(output.grad_norm, recorded.grad_norm), bar);
            }
        }
        let recorded = self.reference.find(&format!("qlora/final_adapter_{label}"));
        if let (Some(bar), Some(path)) = (bars.adapter, recorded) {
            let distance = distance(engine.model(), &Adapter::load(&path)?)?;
            report.compare(format!("qlora {label} {ways}: distance of the final adapter"), distance, bar);
        }
        Ok(())
    }

    /// What the recorded final adapter computes on each base.
    fn final_logits(&self, label: &str, dtype: FloatDType, report: &mut Report) -> Result<()> {
        let file_name = format!("qlora/logits_{label}.safetensors");
        let adapter_dir = self.reference.find(&format!("qlora/final_adapter_{label}"));
        let (Some(adapter_dir), Some(_)) = (adapter_dir, self.reference.find(&file_name)) else {
            report.skip(format!("qlora {label}: logits"), format!("no {file_name} or no final adapter"));
            return Ok(());
        };
        let adapter = Adapter::load(&adapter_dir)?;
        let file = self.reference.tensors(&file_name)?;
        if dtype == FloatDType::F32 {
            let model = self.model(&adapter, Some(QuantConfig::default()), dtype)?;
            compare(&model, &file, "4bit", label, report)?;
        } else {
            // There is nothing recorded that says what half precision explains here, as there is in `logits`.
            let reason = "half precision is judged by the losses and by section logits";
            report.skip(format!("qlora {label} 4bit: logits"), reason);
        }
        let mut model = self.model(&adapter, None, FloatDType::F32)?;
        compare(&model, &file, "adapter_on_f32", label, report)?;
        model.merge_adapters()?;
        compare(&model, &file, "merged_f32", label, report)?;
        // merged_greedy.json was made with the f32 run's adapter.
        if label == "f32" && self.reference.find("qlora/merged_greedy.json").is_some() {
            let prompts: BTreeMap<String, Vec<u32>> = self.reference.json("qlora/merged_greedy.json")?;
            let tokenizer = Tokenizer::from_dir(&self.base_dir)?;
            continuations(&model, &tokenizer, &prompts, "qlora f32 merged_f32", report)?;
        }
        Ok(())
    }
}

/// The relative Frobenius distance of all factors together.
fn distance(model: &Decoder, theirs: &Adapter) -> Result<f64> {
    let (mut difference, mut norm) = (0.0, 0.0);
    let ours: Vec<_> = model.adapters().collect();
    if ours.len() != theirs.modules().len() {
        bail!("{} modules are adapted, {} in the recorded adapter", ours.len(), theirs.modules().len());
    }
    for (path, ours) in ours {
        let (lora_a, lora_b) =
            theirs.lora(&path).with_context(|| format!("`{path}` is not in the recorded adapter"))?;
        for (ours, theirs) in [(&ours.lora_a, lora_a), (&ours.lora_b, lora_b)] {
            if ours.dims()[..] != theirs.shape[..] {
                bail!("`{path}`: a factor has shape {:?}, recorded {:?}", ours.dims(), theirs.shape);
            }
            let values = to_vec(ours.val().without_autodiff())?;
            for (a, b) in values.iter().zip(&theirs.data) {
                difference += (f64::from(*a) - f64::from(*b)).powi(2);
                norm += f64::from(*b).powi(2);
            }
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
            packed: false,
            judged: None,
        })
    };
    input.chunks(rows * cols).zip(labels.chunks(rows * cols)).map(batch).collect()
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
    report.compare(subject, max_abs_diff(&logits(model, ids, rows, &view)?, &view.to_f32_vec()?), QUANTIZED_BAR);
    Ok(())
}
