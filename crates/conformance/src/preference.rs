//! Section `preference`: what TRL's preference trainers compute, step by step (`preference/`).
//!
//! Each recorded run begins with the same adapter over tiny-llama in 4 bits, and has the same rows of random tokens; two pairs are a step, or four
//! judged answers. Compared are each step's loss and gradient norm (relative), rewards, margins and the KL estimate (absolute), and the accuracy of pairs.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use burn::tensor::{Device, FloatDType};
use burn_qlora::adapter_io::Adapter;
use burn_qlora::nf4_quant::QuantConfig;
use burn_qlora::paged_optim::{Budget, OptimizerConfig};
use burn_qlora::qlora_data::{Batch, Example, JudgedRows, MASKED_LABEL, Side};
use burn_qlora::qlora_layers::ActivationCheckpointing;
use burn_qlora::qlora_models::{Decoder, LoadOptions};
use burn_qlora::qlora_train::config::{Objective, PreferenceConfig, Term};
use burn_qlora::qlora_train::objective::{PreferenceFigures, Preferences};
use burn_qlora::qlora_train::{Engine, StepOutput};
use serde::Deserialize;
use serde_json::Value;

use crate::compare::relative;
use crate::{Reference, Report};

/// A row of `preference/rows.json`.
#[derive(Deserialize)]
struct Row {
    prompt: Vec<u32>,
    chosen: Vec<u32>,
    rejected: Vec<u32>,
    label: bool,
}

/// `preference/runs.json`.
#[derive(Deserialize)]
struct Recorded {
    base: String,
    adapter: String,
    optimizer: Optimizer,
    runs: Vec<Run>,
}

#[derive(Deserialize)]
struct Optimizer {
    learning_rate: f64,
    adam_beta1: f32,
    adam_beta2: f32,
    adam_epsilon: f32,
    weight_decay: f64,
    max_grad_norm: f32,
}

#[derive(Deserialize)]
struct Run {
    name: String,
    trainer: String,
    reference: Option<String>,
    settings: BTreeMap<String, Value>,
    rows_per_microbatch: usize,
    accumulation: usize,
    #[serde(default)]
    kl_answer_of_row: Vec<usize>,
    metrics: BTreeMap<String, Vec<Option<f64>>>,
}

/// How far a run may be from the recorded one.
struct Bars {
    loss: f64,
    grad_norm: Option<f64>,
    rewards: Option<f64>,
}

/// Repeats the recorded runs and compares them.
///
/// # Errors
/// A file can't be read, the base can't be loaded, or training fails.
pub fn cases(reference: &Reference, device: &Device, report: &mut Report) -> Result<()> {
    if reference.find("preference/runs.json").is_none() {
        report.skip("preference", "no preference/runs.json");
        return Ok(());
    }
    let recorded: Recorded = reference.json("preference/runs.json")?;
    let rows: Vec<Row> = reference.json("preference/rows.json")?;
    let adapter = Adapter::load(&reference.path(&recorded.adapter))?;
    // f32: the same arithmetic in another order, through twenty updates. bf16: the first steps' losses only, before
    // roundings of 8 bits have made it another run; they are of differences of sums over tokens, each of which is rounded, where a supervised
    // loss is a mean.
    let f32_bars = Bars { loss: 1e-3, grad_norm: Some(1e-2), rewards: Some(1e-3) };
    let bf16_bars = Bars { loss: 3e-2, grad_norm: None, rewards: None };
    for (label, dtype, bars, steps) in
        [("f32", FloatDType::F32, f32_bars, usize::MAX), ("bf16", FloatDType::BF16, bf16_bars, 1)]
    {
        if !device.supports_dtype(dtype) {
            report.skip(format!("preference {label}"), format!("the device has no {dtype:?}"));
            continue;
        }
        let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype };
        let base = Decoder::load(&reference.path(&recorded.base), options, device, &mut |_| ())?;
        for run in &recorded.runs {
            let name = format!("preference {label} {}", run.name);
            let Some((objective, settings)) = run.objective()? else {
                report.skip(name, "TRL averages tokens and the KL estimate of each micro-batch by itself, and this workspace those of a step");
                continue;
            };
            let mut model = base.clone();
            model.load_adapter(&adapter)?;
            let mut other = base.clone();
            if run.reference.as_deref() == Some("adapter") {
                other.load_adapter(&adapter)?;
            }
            let preferences = Preferences { objective, settings };
            let other = preferences.has_reference().then_some(other);
            let Optimizer { adam_beta1, adam_beta2, adam_epsilon, weight_decay, max_grad_norm, learning_rate } =
                recorded.optimizer;
            let optimizer = OptimizerConfig {
                betas: (adam_beta1.into(), adam_beta2.into()),
                eps: adam_epsilon.into(),
                weight_decay,
                ..Default::default()
            };
            let engine =
                Engine::new(model, optimizer, Budget::Unlimited, max_grad_norm, ActivationCheckpointing::Selective)?;
            let mut engine = engine.with_preferences(preferences, other);
            for (index, step) in run.steps(&rows).into_iter().take(steps).enumerate() {
                let output = engine.step(&step, learning_rate, 0).with_context(|| name.clone())?;
                run.compare(&format!("{name} step {}", index + 1), index, output, &bars, report)?;
            }
        }
    }
    Ok(())
}

impl Run {
    /// What it learns; `None` where this workspace averages otherwise.
    fn objective(&self) -> Result<Option<(Objective, PreferenceConfig)>> {
        let number = |key: &str| self.settings.get(key).and_then(Value::as_f64);
        let mut settings = PreferenceConfig { beta: number("beta"), ..PreferenceConfig::default() };
        let weights: Vec<f64> = match self.settings.get("loss_weights") {
            Some(weights) => serde_json::from_value(weights.clone())?,
            None => vec![1.0],
        };
        let types: Vec<String> = match self.settings.get("loss_type") {
            Some(Value::Array(types)) => serde_json::from_value(types.clone().into())?,
            Some(Value::String(one)) => vec![one.clone()],
            _ => vec![self.name.split(' ').next().unwrap_or_default().to_string()],
        };
        let mut terms = BTreeMap::new();
        for (name, weight) in types.iter().zip(weights) {
            let term = match name.as_str() {
                // Its negative smoothing is the plain loss with a positive one.
                "robust" if number("label_smoothing").is_some_and(|smoothing| smoothing < 0.0) => Term::Dpo,
                "sigmoid" if self.trainer == "CPOTrainer" => Term::Cpo,
                "sigmoid" => Term::Dpo,
                name => Term::ALL
                    .into_iter()
                    .find(|term| term.name() == name)
                    .with_context(|| format!("{name:?} is no objective"))?,
            };
            terms.insert(term, weight);
        }
        if let Some(smoothing) = number("label_smoothing") {
            // e from -e / (1 - 2 e).
            settings.label_smoothing = if smoothing < 0.0 { smoothing / (2.0 * smoothing - 1.0) } else { smoothing };
        }
        settings.simpo_gamma = number("simpo_gamma").unwrap_or(settings.simpo_gamma);
        settings.cpo_alpha = number("cpo_alpha");
        settings.desirable_weight = number("desirable_weight").unwrap_or(1.0);
        settings.undesirable_weight = number("undesirable_weight").unwrap_or(1.0);
        if self.accumulation > 1 && (terms.contains_key(&Term::Sft) || terms.contains_key(&Term::Kto)) {
            return Ok(None);
        }
        Ok(Some((Objective::Sum(terms), settings)))
    }

    /// The micro-batches of each step.
    fn steps(&self, rows: &[Row]) -> Vec<Vec<Batch>> {
        let judged = !self.kl_answer_of_row.is_empty();
        let numbers: Vec<usize> = (0..rows.len()).collect();
        let batches: Vec<Batch> = numbers
            .chunks(self.rows_per_microbatch)
            .map(|numbers| if judged { self.judged(rows, numbers) } else { pairs(rows, numbers) })
            .collect();
        batches.chunks(self.accumulation).map(<[Batch]>::to_vec).collect()
    }

    fn judged(&self, rows: &[Row], numbers: &[usize]) -> Batch {
        let answer = |row: &Row| if row.label { row.chosen.clone() } else { row.rejected.clone() };
        let examples: Vec<Example> =
            numbers.iter().map(|row| example(&rows[*row].prompt, &answer(&rows[*row]))).collect();
        let side = |row: &usize| if rows[*row].label { Side::Chosen } else { Side::Rejected };
        let other = |row: &usize| example(&rows[*row].prompt, &answer(&rows[self.kl_answer_of_row[*row]]));
        let judged = JudgedRows {
            sides: numbers.iter().map(side).collect(),
            origins: numbers.iter().map(|row| (*row, 0)).collect(),
            mismatched: numbers.iter().map(other).collect(),
            ..JudgedRows::default()
        };
        Batch { judged: Some(Box::new(judged)), ..Batch::end_to_end(&examples) }
    }

    /// Compares a step with the recorded one.
    fn compare(&self, subject: &str, index: usize, output: StepOutput, bars: &Bars, report: &mut Report) -> Result<()> {
        let recorded = |key: &str| self.metrics.get(key).and_then(|values| values.get(index)).copied().flatten();
        let loss = recorded("loss").with_context(|| format!("{subject}: no loss is recorded"))?;
        let note = format!("{:.6}", output.loss);
        report.compare_noted(format!("{subject}: loss"), relative(output.loss, loss), bars.loss, note);
        if let Some(bar) = bars.grad_norm {
            let norm = recorded("grad_norm").with_context(|| format!("{subject}: no norm is recorded"))?;
            report.compare(format!("{subject}: grad_norm"), relative(output.grad_norm, norm), bar);
        }
        let (Some(bar), Some(figures)) = (bars.rewards, output.preference) else { return Ok(()) };
        let PreferenceFigures { rewards_chosen, rewards_rejected, rewards_margin, rewards_accuracy, kl, .. } = figures;
        let kl = kl.filter(|_| self.metrics.contains_key("kl"));
        // TRL counts pairs of equal rewards as wrong, and this workspace as half right.
        let is_tie = recorded("rewards/margins").is_some_and(|margin| margin.abs() < 1e-6);
        for (key, found, bar) in [
            ("rewards/chosen", rewards_chosen, bar),
            ("rewards/rejected", rewards_rejected, bar),
            ("rewards/margins", rewards_margin, bar),
            ("rewards/accuracies", rewards_accuracy, 1e-6),
            ("kl", kl, 10.0 * bar),
        ] {
            match (found, recorded(key)) {
                (Some(_), Some(_)) if is_tie && key == "rewards/accuracies" => {}
                (Some(found), Some(recorded)) => {
                    report.compare(
                        format!("{subject}: {key}"),
                        (found - recorded).abs() / recorded.abs().max(1.0),
                        bar,
                    );
                }
                (None, None) => {}
                (found, recorded) => bail!("{subject}: {key} is {found:?}, and {recorded:?} is recorded"),
            }
        }
        Ok(())
    }
}

fn example(prompt: &[u32], answer: &[u32]) -> Example {
    let masked = prompt.iter().map(|_| MASKED_LABEL);
    Example {
        input_ids: [prompt, answer].concat(),
        labels: masked.chain(answer.iter().map(|id| i64::from(*id))).collect(),
        line: 0,
    }
}

fn pairs(rows: &[Row], numbers: &[usize]) -> Batch {
    let both = |row: &usize| {
        let Row { prompt, chosen, rejected, .. } = &rows[*row];
        [example(prompt, chosen), example(prompt, rejected)]
    };
    let examples: Vec<Example> = numbers.iter().flat_map(both).collect();
    let judged = JudgedRows {
        sides: [Side::Chosen, Side::Rejected].repeat(numbers.len()),
        paired: true,
        origins: numbers.iter().flat_map(|row| [(*row, 0), (*row, 1)]).collect(),
        ..JudgedRows::default()
    };
    Batch { judged: Some(Box::new(judged)), ..Batch::end_to_end(&examples) }
}
