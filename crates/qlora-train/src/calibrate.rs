//! GPTQ with real calibration: the model runs over rows of data block by block, and each layer is rounded so that
//! its outputs on those rows change least.
//!
//! For one block after the other: its rows' activations run through it while every linear layer adds up its
//! inputs' X^T X (f32, on the device); its layers are quantized with that ([`adapter_io::gptq`]) and replaced by
//! what they have become; and the activations run through it once more, so that later blocks are calibrated on
//! what they will really see. (Frantar et al., arXiv 2210.17323, section 4. The layers of one block are taken
//! together: `true_sequential` is false.)
//!
//! The model is held dense in the compute dtype, with the activations of all calibration rows and the Hessians of
//! one block beside it. Rows run one by one: padding would count as input.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use adapter_io::{GptqCheckpoint, GptqOptions, GptqReport, GptqWeight, OnProgress, gptq_checkpoint};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use host_copies::DeviceError;
use qlora_layers::ops::matmul;
use qlora_layers::{FrozenLinear, InputObserver, LoraLinear, Pass};
use qlora_models::{Decoder, LoadOptions, LoadProgress, Sequence};

use crate::error::TrainError;
use crate::loss::{LabelledTokens, loss_sum};
use qlora_data::{Batch, Example};

/// What to quantize, and on what.
#[derive(Debug, Clone, Copy)]
pub struct Calibration<'a> {
    /// The full-precision checkpoint.
    pub base: &'a Path,
    /// Where the quantized one goes.
    pub out: &'a Path,
    /// Group size, order and damping.
    pub options: GptqOptions,
    /// Modules that stay as they are, beside the output head.
    pub skip_modules: &'a [String],
    /// The data of one file at most.
    pub max_shard_bytes: u64,
    /// Where to run.
    pub device: &'a Device,
    /// The compute dtype.
    pub dtype: FloatDType,
    /// The rows to calibrate on.
    pub rows: &'a [Example],
    /// Rows that are not among them, to measure the loss on; may be empty.
    pub held_out: &'a [Example],
}

/// How well it went.
#[derive(Debug, Clone, PartialEq)]
pub struct CalibrationReport {
    /// The output error of each layer, beside that of rounding to the nearest.
    pub modules: Vec<GptqReport>,
    /// The mean loss on the held-out rows.
    pub losses: Option<Losses>,
    /// Tokens that were calibrated on.
    pub tokens: usize,
}

/// The mean loss over the unmasked tokens of the held-out rows, in nats.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Losses {
    /// Of the model as it was.
    pub full: f64,
    /// Of the quantized model.
    pub gptq: f64,
    /// Of the model with every weight rounded to the nearest.
    pub nearest: f64,
}

/// Quantizes a checkpoint by GPTQ.
///
/// # Errors
/// [`TrainError::NoLabels`] when there are no rows, those of loading the model, of the device, and of
/// [`gptq_checkpoint()`]. What was at `out` is unchanged then.
pub fn gptq(
    job: &Calibration<'_>,
    on_load: &mut dyn FnMut(LoadProgress<'_>),
    on_progress: OnProgress<'_>,
) -> Result<CalibrationReport, TrainError> {
    let rows: Vec<&[u32]> = job.rows.iter().map(|row| &row.input_ids[..]).filter(|ids| !ids.is_empty()).collect();
    if rows.is_empty() {
        return Err(TrainError::NoLabels);
    }
    let options = LoadOptions { quantization: None, dtype: job.dtype };
    let mut model = Decoder::load(job.base, options, job.device, on_load)?;
    let full = loss(&model, job.held_out)?;
    let (mut gptq, mut nearest) = (None, None);
    let calibrate = |checkpoint: &mut GptqCheckpoint<'_>| -> Result<(), TrainError> {
        let modules: Vec<String> = checkpoint.modules().map(|(module, _)| module.to_string()).collect();
        run_blocks(&mut model, &rows, &modules, checkpoint)?;
        if full.is_none() {
            return Ok(());
        }
        gptq = loss(&model, job.held_out)?;
        for (module, linear) in model.linears_mut().filter(|(module, _)| modules.contains(module)) {
            replace(linear, &checkpoint.rounded_to_nearest(&module)?, job);
        }
        nearest = loss(&model, job.held_out)?;
        Ok(())
    };
    let modules = gptq_checkpoint(
        job.base,
        job.out,
        &job.options,
        job.skip_modules,
        job.max_shard_bytes,
        calibrate,
        on_progress,
    )?;
    let losses = match (full, gptq, nearest) {
        (Some(full), Some(gptq), Some(nearest)) => Some(Losses { full, gptq, nearest }),
        _ => None,
    };
    Ok(CalibrationReport { modules, losses, tokens: rows.iter().map(|ids| ids.len()).sum() })
}

/// Sum of X^T X over what a layer was given, `[in, in]` in f32.
type Gram = Arc<Mutex<Option<Tensor<2>>>>;

fn run_blocks(
    model: &mut Decoder,
    rows: &[&[u32]],
    modules: &[String],
    checkpoint: &mut GptqCheckpoint<'_>,
) -> Result<(), TrainError> {
    let (device, dtype) = (model.device().clone(), model.dtype());
    // Blocks may read more of a row than what the block before them gave.
    let sequences: Vec<Sequence> = rows.iter().map(|ids| model.sequence(1, ids.len(), 0)).collect();
    let begin = |(ids, sequence): (&&[u32], &Sequence)| model.begin(sequence, ids, Pass::INFERENCE);
    let mut states: Vec<Tensor<2>> = rows.iter().zip(&sequences).map(begin).collect();
    for index in 0..model.blocks().len() {
        let names: Vec<String> =
            model.blocks()[index].linears().map(|(name, _)| name).filter(|name| modules.contains(name)).collect();
        let grams: Vec<Gram> = names.iter().map(|_| Gram::default()).collect();
        for (name, linear) in model.linears_mut() {
            if let Some(at) = names.iter().position(|n| *n == name) {
                linear.observer = Some(observer(grams[at].clone()));
            }
        }
        // What comes out is of no use: the layers are about to change.
        run(model, index, &sequences, states.iter().cloned());
        for (name, gram) in names.iter().zip(&grams) {
            let gram = gram.lock().unwrap_or_else(PoisonError::into_inner).take();
            let hessian = gram.map(|gram| gram.try_into_vec_as::<f32>().map_err(DeviceError::from)).transpose()?;
            // An expert that no token went to has none.
            let weight = checkpoint.quantize(name, hessian.as_deref())?;
            if let Some((_, linear)) = model.linears_mut().find(|(n, _)| n == name) {
                linear.observer = None;
                linear.base = dense(&weight, &device, dtype);
            }
        }
        states = run(model, index, &sequences, states.into_iter());
    }
    Ok(())
}

fn run(
    model: &Decoder,
    index: usize,
    sequences: &[Sequence],
    states: impl Iterator<Item = Tensor<2>>,
) -> Vec<Tensor<2>> {
    let block = &model.blocks()[index];
    let pass = |(sequence, x): (&Sequence, Tensor<2>)| model.run_block(block, x, sequence, Pass::INFERENCE);
    sequences.iter().zip(states).map(pass).collect()
}

fn observer(gram: Gram) -> InputObserver {
    InputObserver::new(move |x: &Tensor<2>| {
        let x = x.clone().cast(FloatDType::F32);
        let product = matmul(x.clone().transpose(), x);
        let mut sum = gram.lock().unwrap_or_else(PoisonError::into_inner);
        *sum = Some(match sum.take() {
            Some(sum) => sum + product,
            None => product,
        });
    })
}

fn replace(linear: &mut LoraLinear, weight: &GptqWeight, job: &Calibration<'_>) {
    linear.base = dense(weight, job.device, job.dtype);
}

/// The weight that engines compute with.
fn dense(weight: &GptqWeight, device: &Device, dtype: FloatDType) -> FrozenLinear {
    let data = TensorData::new(weight.dequantize(), weight.shape);
    FrozenLinear::dense(Tensor::<2>::from_data(data, (device, DType::F32)).cast(dtype))
}

/// The mean loss over the unmasked tokens; `None` without rows.
fn loss(model: &Decoder, rows: &[Example]) -> Result<Option<f64>, TrainError> {
    let (mut sum, mut tokens) = (0.0, 0);
    for row in rows {
        let batch = Batch::new([row], 0);
        let labelled = LabelledTokens::new(&batch);
        if labelled.is_empty() {
            continue;
        }
        let sequence = model.sequence(1, batch.cols, 0);
        let x = model.begin(&sequence, &batch.input_ids, Pass::INFERENCE);
        let x = model.blocks().iter().fold(x, |x, block| model.run_block(block, x, &sequence, Pass::INFERENCE));
        let loss = loss_sum(model, x, &labelled, Pass::INFERENCE);
        sum += f64::from(loss.try_into_vec_as::<f32>().map_err(DeviceError::from)?[0]);
        tokens += labelled.len();
    }
    Ok((tokens > 0).then(|| sum / tokens as f64))
}
