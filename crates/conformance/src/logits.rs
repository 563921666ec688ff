//! Section `logits`: logits and greedy continuations (`logits/<model>.safetensors`, `logits/greedy.json`).
//!
//! A variant's name says how the model is held: `[nf4|fp4]_[dq]_<f32|bf16|f16>`. Errors of logits are
//! absolute, per logit; those of continuations count the tokens that differ.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use burn::tensor::{Device, FloatDType};
use burn_qlora::Tokenizer;
use burn_qlora::adapter_io::{Checkpoint, TensorView};
use burn_qlora::nf4_quant::QuantConfig;
use burn_qlora::qlora_layers::Pass;
use burn_qlora::qlora_models::{Decoder, LoadOptions};
use burn_qlora::{Request, generate};
use serde::Deserialize;

use crate::compare::{count_different, max_abs, max_abs_diff, recorded_columns, to_vec};
use crate::reference::dims;
use crate::{Reference, Report};

/// Dense, f32: sums of a few hundred products in another order differ by 1e-5 or so.
pub(crate) const DENSE_BAR: f64 = 1e-4;
/// 4-bit weights, f32. The weights are the same bit for bit but for the offset of double quantization.
pub(crate) const QUANTIZED_BAR: f64 = 2e-3;

/// Continuations by variant and prompt; ids include the prompt's.
#[derive(Deserialize)]
struct Greedy {
    greedy: BTreeMap<String, BTreeMap<String, Vec<u32>>>,
}

/// How a variant holds the model.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Variant {
    quantization: Option<QuantConfig>,
    dtype: FloatDType,
}

impl Variant {
    fn parse(name: &str) -> Option<Self> {
        let (kind, dtype) = name.rsplit_once('_').unwrap_or(("", name));
        let dtype = match dtype {
            "f32" => FloatDType::F32,
            "bf16" => FloatDType::BF16,
            "f16" => FloatDType::F16,
            _ => return None,
        };
        let (quant_type, double_quant) = match kind.strip_suffix("_dq") {
            Some(quant_type) => (quant_type, true),
            None => (kind, false),
        };
        let quantization = match quant_type {
            "" => None,
            _ => Some(QuantConfig { quant_type: quant_type.parse().ok()?, double_quant, ..QuantConfig::default() }),
        };
        Some(Self { quantization, dtype })
    }

    /// The same weights in f32.
    fn in_f32(name: &str) -> String {
        name.rsplit_once('_').map_or_else(|| "f32".to_string(), |(kind, _)| format!("{kind}_f32"))
    }
}

/// Compares every model of `logits/`.
///
/// # Errors
/// A file cannot be read, or a model cannot be loaded.
pub fn cases(reference: &Reference, device: &Device, report: &mut Report) -> Result<()> {
    let mut files: Vec<String> = Vec::new();
    if let Some(dir) = reference.find("logits") {
        for entry in std::fs::read_dir(&dir).with_context(|| dir.display().to_string())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            files.extend(name.strip_suffix(".safetensors").map(str::to_string));
        }
    }
    files.sort();
    if files.is_empty() {
        report.skip("logits", "no logits/*.safetensors");
    }
    let greedy = match reference.find("logits/greedy.json") {
        Some(_) => reference.json::<Greedy>("logits/greedy.json")?.greedy,
        None => BTreeMap::new(),
    };
    for model in files {
        let file = reference.tensors(&format!("logits/{model}.safetensors"))?;
        let Some(base) = reference.base_model(&model)? else {
            report.skip(format!("logits {model}"), "the model is not in the folder");
            continue;
        };
        let variants: Vec<&str> = file.names().filter_map(|name| name.strip_prefix("logits.")).collect();
        for name in variants {
            let subject = format!("logits {model} {name}");
            let Some(variant) = Variant::parse(name) else {
                report.skip(subject, "unknown variant");
                continue;
            };
            let Some(decoder) = load(&base, variant, device, &subject, report)? else { continue };
            compare_variant(&decoder, &file, name, &subject, report)?;
            if let Some(prompts) = greedy.get(name).filter(|_| variant.dtype == FloatDType::F32) {
                continuations(&decoder, &Tokenizer::from_dir(&base)?, prompts, &subject, report)?;
            }
        }
        prequantized(reference, &model, &file, device, report)?;
    }
    Ok(())
}

/// Checkpoints that bitsandbytes has quantized, `<model>-...`: they are compared with the variant that
/// was quantized the same way from bf16, since their weights decode to bf16 values.
fn prequantized(
    reference: &Reference,
    model: &str,
    file: &Checkpoint,
    device: &Device,
    report: &mut Report,
) -> Result<()> {
    for (folder, quantized) in reference.models()? {
        if !quantized || !folder.starts_with(model) {
            continue;
        }
        let config = burn_qlora::qlora_models::ModelConfig::from_dir(&reference.path(&folder))?;
        let Some(bnb) = config.bnb else { continue };
        let dq = if bnb.double_quant { "_dq" } else { "" };
        let name = format!("{}{dq}_bf16", bnb.quant_type);
        if !file.contains(&format!("logits.{name}")) {
            report.skip(format!("logits {folder}"), format!("no recorded logits of {name}"));
            continue;
        }
        let quantization =
            Some(QuantConfig { quant_type: bnb.quant_type, double_quant: bnb.double_quant, ..QuantConfig::default() });
        for (dtype, label) in [(FloatDType::F32, "f32"), (FloatDType::BF16, "bf16")] {
            let subject = format!("logits {folder} computed in {label}");
            let variant = Variant { quantization, dtype };
            if let Some(decoder) = load(&reference.path(&folder), variant, device, &subject, report)? {
                compare_variant(&decoder, file, &name, &subject, report)?;
            }
        }
    }
    Ok(())
}

fn load(dir: &Path, variant: Variant, device: &Device, subject: &str, report: &mut Report) -> Result<Option<Decoder>> {
    if !device.supports_dtype(variant.dtype) {
        report.skip(subject, format!("the device has no {:?}", variant.dtype));
        return Ok(None);
    }
    let options = LoadOptions { quantization: variant.quantization, dtype: variant.dtype };
    Ok(Some(Decoder::load(dir, options, device, &mut |_| ())?))
}

fn compare_variant(decoder: &Decoder, file: &Checkpoint, name: &str, subject: &str, report: &mut Report) -> Result<()> {
    let input = file.tensor("input_ids")?;
    let [rows, _] = dims(&input)?;
    let recorded = file.tensor(&format!("logits.{name}"))?;
    let ours = logits(decoder, &input.to_i64_vec()?, rows, &recorded)?;
    let theirs = recorded.to_f32_vec()?;
    let variant = Variant::parse(name);
    let (bar, note) = match variant {
        Some(Variant { dtype: FloatDType::F32, quantization }) => {
            (if quantization.is_some() { QUANTIZED_BAR } else { DENSE_BAR }, String::new())
        }
        _ => half_bar(file, name, &theirs)?,
    };
    report.compare_noted(format!("{subject}: logits"), max_abs_diff(&ours, &theirs), bar, note);
    Ok(())
}

/// The bar for half-precision compute: twice the distance that the recorded half-precision logits
/// themselves have from the recorded f32 ones. Ours are as far from f32 as theirs, in another
/// direction, since every kernel rounds at other places.
fn half_bar(file: &Checkpoint, name: &str, theirs: &[f32]) -> Result<(f64, String)> {
    let f32_name = format!("logits.{}", Variant::in_f32(name));
    Ok(match file.get(&f32_name) {
        Some(view) => {
            let distance = max_abs_diff(theirs, &view.to_f32_vec()?);
            (2.0 * distance, format!("the recorded logits are {distance:.2e} from f32"))
        }
        // Without f32 to measure by: eight roundings of the largest logit, each up to 2^-9 of it.
        None => (8.0 / 512.0 * max_abs(theirs), "no f32 logits recorded".into()),
    })
}

/// The logits of `rows` rows of ids, row-major: those that are `recorded` of each position.
pub(crate) fn logits(decoder: &Decoder, ids: &[i64], rows: usize, recorded: &TensorView<'_>) -> Result<Vec<f32>> {
    let columns = recorded.shape.last().copied().unwrap_or(0);
    let ids: Vec<u32> = ids.iter().map(|&id| u32::try_from(id)).collect::<Result<_, _>>().context("input_ids")?;
    let logits = to_vec(decoder.forward(&ids, rows, Pass::INFERENCE))?;
    Ok(recorded_columns(logits, decoder.config().vocab_size, columns))
}

/// Greedy continuations of prompts; recorded ids begin with the prompt's.
pub(crate) fn continuations(
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    prompts: &BTreeMap<String, Vec<u32>>,
    subject: &str,
    report: &mut Report,
) -> Result<()> {
    for (index, (prompt, recorded)) in prompts.iter().enumerate() {
        let name = format!("{subject}: greedy continuation {index}");
        let ids = tokenizer.encode(prompt, true)?.ids;
        let Some(expected) = recorded.strip_prefix(&ids[..]) else {
            report.fail(name, "the prompt is tokenized differently");
            continue;
        };
        let ours = generate(decoder, Request::new(ids, expected.len()), |_| ())?.ids;
        report.compare_noted(name, count_different(&ours, expected), 0.0, format!("{} tokens", expected.len()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_qlora::nf4_quant::QuantType;

    #[test]
    fn variants_are_read_from_their_names() {
        let quantized =
            |quant_type, double_quant| Some(QuantConfig { quant_type, double_quant, ..QuantConfig::default() });
        for (name, quantization, dtype) in [
            ("f32", None, FloatDType::F32),
            ("bf16", None, FloatDType::BF16),
            ("nf4_dq_f32", quantized(QuantType::Nf4, true), FloatDType::F32),
            ("fp4_f16", quantized(QuantType::Fp4, false), FloatDType::F16),
        ] {
            assert_eq!(Variant::parse(name), Some(Variant { quantization, dtype }), "{name}");
        }
        assert_eq!(Variant::parse("int8_f32"), None);
        assert_eq!(Variant::parse("nf4_dq"), None);
        assert_eq!(Variant::in_f32("nf4_dq_bf16"), "nf4_dq_f32");
        assert_eq!(Variant::in_f32("bf16"), "f32");
    }
}
