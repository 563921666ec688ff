//! Whether a merged checkpoint computes what base and adapter compute.
//!
//! Merging rounds each changed weight once, into its own type. So the logits of a few tokens lie close together, as far as that
//! rounding allows, unless a factor was transposed, a scale taken twice, or a module left out.

use crate::decoder::Decoder;
use crate::loader::LoadOptions;
use crate::{ModelConfig, ModelError, host_memory};
use adapter_io::{Adapter, Checkpoint, Dtype};
use burn::tensor::{Device, FloatDType};
use nf4_quant::QuantConfig;
use qlora_layers::Pass;
use std::path::Path;

/// How far apart logits may be, as a part of the largest, where weights were rounded to the 8 bits of bf16.
const BAR_OF_BF16: f32 = 1e-2;
/// Tokens that are looked at.
const TOKENS: usize = 16;

/// Logits of a merged checkpoint beside those of base and adapter, in f32 on the CPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MergeProbe {
    /// Mean of how far a logit is from the other.
    pub apart: f32,
    /// Mean of how far the adapter moves a logit of the base.
    pub effect: f32,
    /// The largest logit, without its sign.
    pub largest: f32,
    /// How far logits may be apart, as a part of the largest: what rounding of the weights' type explains.
    pub bar: f32,
}

impl MergeProbe {
    /// Whether rounding explains the distance.
    pub fn agrees(&self) -> bool {
        self.apart <= self.bar * self.largest
    }
}

/// What a probe found.
#[derive(Clone, Debug, PartialEq)]
pub enum Probed {
    /// Both were computed.
    Compared(MergeProbe),
    /// The base can't be computed here, for this reason.
    NotCompared(String),
}

/// Computes the logits of a few tokens with base and adapter, and with the merged checkpoint. `quantization` is what the base was
/// rounded to before the adapter was added, if it was.
///
/// # Errors
/// The merged checkpoint can't be loaded although the base can, or its logits are no numbers.
pub fn probe_merge(
    base: &Path,
    adapter: &Adapter,
    merged: &Path,
    quantization: Option<QuantConfig>,
) -> Result<Probed, ModelError> {
    let (reference, before, quantized) = match unmerged(base, adapter, quantization) {
        Ok(found) => found,
        Err(why) => return Ok(Probed::NotCompared(why)),
    };
    // Codes of 4 bits are decoded to 16 bits where they are merged.
    let bar = if quantized { BAR_OF_BF16 } else { bar(&Checkpoint::open(merged)?) };
    let found = logits(&load(merged, None)?)?;
    if found.len() != reference.len() {
        let problem = "has another vocabulary than base and adapter".into();
        return Err(ModelError::Field { path: merged.join("config.json"), field: "vocab_size".into(), problem });
    }
    let largest = reference.iter().fold(0f32, |most, x| most.max(x.abs()));
    let (apart, effect) = (mean_distance(&found, &reference), mean_distance(&before, &reference));
    Ok(Probed::Compared(MergeProbe { apart, effect, largest, bar }))
}

/// How far logits of a checkpoint may be from what its weights were before they were rounded to their types: 8, 11 or 24 bits. Some tens of
/// roundings meet in a logit, most of which cancel.
fn bar(merged: &Checkpoint) -> f32 {
    let matrices = merged.names().filter_map(|name| merged.get(name)).filter(|tensor| tensor.shape.len() > 1);
    let bars = matrices.map(|tensor| match tensor.dtype {
        Dtype::F32 => 1e-4,
        Dtype::F16 => 2e-3,
        _ => BAR_OF_BF16,
    });
    bars.fold(1e-4, f32::max)
}

/// The logits of base and adapter, and of the base alone, and whether the base is in 4 bits.
fn unmerged(
    base: &Path,
    adapter: &Adapter,
    quantization: Option<QuantConfig>,
) -> Result<(Vec<f32>, Vec<f32>, bool), String> {
    let text = |e: ModelError| e.to_string();
    let shape = ModelConfig::from_dir(base).map_err(text)?;
    let quantization = quantization.or_else(|| shape.bnb.as_ref().map(|_| QuantConfig::default()));
    let linears = shape.linear_specs().iter().map(|spec| spec.shape.iter().product::<usize>()).sum::<usize>();
    let needed = 4 * (linears + shape.vocab_size * shape.hidden_size) as u64;
    if let Some(free) = host_memory().filter(|free| *free < needed + needed / 4) {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        return Err(format!("it takes {:.1} GiB of memory, and {:.1} are free", gib(needed), gib(free)));
    }
    let mut model = load(base, quantization).map_err(text)?;
    let before = logits(&model).map_err(text)?;
    model.load_adapter(adapter).map_err(text)?;
    let after = logits(&model).map_err(text)?;
    // An adapter may have brought rows for more tokens.
    let rows = before.len() / TOKENS;
    let more = after.len() / TOKENS;
    let same = after
        .chunks(more)
        .zip(before.chunks(rows))
        .flat_map(|(after, before)| before.iter().copied().chain(after[rows.min(more)..].iter().copied()).take(more));
    let before = same.collect();
    Ok((after, before, quantization.is_some()))
}

fn load(dir: &Path, quantization: Option<QuantConfig>) -> Result<Decoder, ModelError> {
    let options = LoadOptions { quantization, dtype: FloatDType::F32 };
    Decoder::load(dir, options, &Device::flex(), &mut |_| ())
}

/// Of some tokens from all over the vocabulary.
fn logits(model: &Decoder) -> Result<Vec<f32>, ModelError> {
    let words = model.config().vocab_size.max(1) as u64;
    let ids: Vec<u32> = (0..TOKENS as u64).map(|i| (i * 7919 + 13) % words).map(|id| id as u32).collect();
    let logits: Vec<f32> = model.forward(&ids, 1, Pass::INFERENCE).into_data().iter::<f32>().collect();
    match logits.iter().all(|x| x.is_finite()) {
        true => Ok(logits),
        false => Err(ModelError::NotANumber),
    }
}

fn mean_distance(a: &[f32], b: &[f32]) -> f32 {
    let sum: f64 = a.iter().zip(b).map(|(a, b)| f64::from((a - b).abs())).sum();
    (sum / a.len().max(1) as f64) as f32
}
