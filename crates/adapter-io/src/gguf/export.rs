//! A checkpoint as GGUF, and an adapter as LoRA GGUF.
//!
//! Tensors stream: one at a time is read (decoded, where bitsandbytes quantized it), brought into llama.cpp's
//! order and encoded. To export an adapter with its base, merge them first ([`mod@crate::merge_checkpoint`]).

use std::collections::BTreeMap;
use std::path::Path;

use rayon::prelude::*;

use super::agreement;
use super::architecture::Model;
use super::blocks::GgmlType;
use super::metadata::model_metadata;
use super::tensors::{Mapped, Op, Source, map_name, permute, plan, stack};
use super::tokenizer::tokenizer_metadata;
use super::value::Value;
use super::writer::{self, Planned};
use crate::adapter::Adapter;
use crate::checkpoint::Checkpoint;
use crate::convert::{OnProgress, Progress};
use crate::error::FormatError;
use crate::lora_module::{LoraModule, ModuleKind, transposed};

/// How to write a model.
#[derive(Debug, Clone)]
pub struct GgufOptions {
    /// The type of matrices; norms, biases and routers stay in 32-bit floats.
    pub kind: GgmlType,
    /// `general.name`; the folder's when `None`.
    pub name: Option<String>,
    /// llama.cpp's name of the pre-tokenizer, for those that are not recognised.
    pub pre_tokenizer: Option<String>,
    /// Leaves the tokenizer out, for models that have none.
    pub without_tokenizer: bool,
}

impl Default for GgufOptions {
    fn default() -> Self {
        Self { kind: GgmlType::F16, name: None, pre_tokenizer: None, without_tokenizer: false }
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ExportReport {
    /// How many tensors.
    pub tensors: usize,
    /// Their bytes.
    pub total_bytes: u64,
    /// Matrices that became F16 because their rows are no whole blocks.
    pub fallbacks: Vec<String>,
}

/// Writes the checkpoint in `base_dir` as one GGUF file.
///
/// # Errors
/// [`FormatError::Field`] for a model type, a configuration or a tokenizer that GGUF or llama.cpp has no
/// place for, and for a configuration that is not the tensors'; [`FormatError::NotFinite`], and those of reading and writing. A file that was at `out` is unchanged then.
pub fn export_gguf(
    base_dir: &Path,
    out: &Path,
    options: &GgufOptions,
    progress: OnProgress<'_>,
) -> Result<ExportReport, FormatError> {
    let model = Model::read(base_dir)?;
    let base = Checkpoint::open(base_dir)?;
    let own = model_metadata(&model, options.kind)?;
    let jobs = plan(&model, &base, options.kind, own.tensors)?;
    agreement::check(&model, &jobs)?;
    let mut metadata = general(&model, "model", Some(options.name.clone().unwrap_or_else(|| folder_name(base_dir))));
    let expert_count = own.entries.iter().find(|(k, _)| k.ends_with(".expert_count")).and_then(|(_, v)| v.as_u64());
    metadata.push(("general.size_label".into(), size_label(&jobs, expert_count).as_str().into()));
    metadata.extend(own.entries);
    metadata.push(("general.quantization_version".into(), Value::U32(2)));
    if options.without_tokenizer {
        metadata.push(("tokenizer.ggml.model".into(), "none".into()));
        let key = format!("{}.vocab_size", model.kind.architecture);
        if !metadata.iter().any(|(k, _)| *k == key) {
            // llama.cpp counts the tokens otherwise.
            metadata.push((key, Value::U32(model.needed(&["vocab_size"])?)));
        }
    } else {
        metadata.extend(tokenizer_metadata(base_dir, &model, options.pre_tokenizer.as_deref())?);
    }
    let (planned, sources): (Vec<Planned>, Vec<Source>) = jobs.into_iter().unzip();
    let fallback = |t: &&Planned| options.kind.block().0 > 1 && t.kind == GgmlType::F16;
    let mut report = ExportReport {
        tensors: planned.len(),
        total_bytes: writer::total_bytes(out, &planned)?,
        fallbacks: planned.iter().filter(fallback).map(|t| t.name.clone()).collect(),
    };
    let mut done_bytes = 0;
    writer::write(out, &metadata, &planned, |i| {
        let target = &planned[i];
        let bytes = match &sources[i] {
            Source::Values(values) => encode(out, target, values)?,
            Source::One(name, op) => {
                let values = values(&base, name)?;
                let rows = target.shape.first().copied().unwrap_or(1);
                encode(out, target, &apply(values, *op, rows))?
            }
            Source::Stack(names) => {
                let mut bytes = Vec::new();
                for name in names {
                    bytes.extend(encode(out, target, &values(&base, name)?)?);
                }
                bytes
            }
        };
        done_bytes += bytes.len() as u64;
        progress(&Progress { tensor: &target.name, done_bytes, total_bytes: report.total_bytes });
        Ok(bytes)
    })?;
    report.fallbacks.sort();
    Ok(report)
}

fn values(base: &Checkpoint, name: &str) -> Result<Vec<f32>, FormatError> {
    let module = name.strip_suffix(".weight");
    if let Some(weight) = module.map(|m| base.quantized(m)).transpose()?.flatten() {
        // Through the weight's own type, whose rounding is part of what bitsandbytes computes with.
        let bad = |e: nf4_quant::QuantError| FormatError::QuantState {
            file: base.dir().to_path_buf(),
            tensor: name.to_string(),
            reason: e.to_string(),
        };
        return Ok(match weight.state.dtype {
            nf4_quant::FloatFormat::F32 => weight.dequantize::<f32>().map_err(bad)?,
            nf4_quant::FloatFormat::F16 => {
                weight.dequantize::<half::f16>().map_err(bad)?.iter().map(|x| x.to_f32()).collect()
            }
            nf4_quant::FloatFormat::BF16 => {
                weight.dequantize::<half::bf16>().map_err(bad)?.iter().map(|x| x.to_f32()).collect()
            }
        });
    }
    let values = base.dense(name)?.to_f32_vec();
    base.release(name);
    values
}

/// The bytes of a tensor, or of an expert of it.
fn encode(out: &Path, target: &Planned, values: &[f32]) -> Result<Vec<u8>, FormatError> {
    match target.kind.beyond(values) {
        None => Ok(target.kind.encode(values)),
        Some(largest) => Err(FormatError::Plan {
            path: out.to_path_buf(),
            tensor: target.name.clone(),
            reason: format!(
                "its element {largest:e} is beyond what {} holds and would become infinite; write BF16 or F32",
                target.kind.name()
            ),
        }),
    }
}

fn apply(mut values: Vec<f32>, op: Op, rows: usize) -> Vec<f32> {
    match op {
        Op::None => values,
        Op::Permute(heads) => permute(&values, heads, rows),
        Op::Add(shift) => {
            values.par_iter_mut().for_each(|x| *x += shift);
            values
        }
    }
}

fn general(model: &Model, kind: &str, name: Option<String>) -> Vec<(String, Value)> {
    let mut entries = vec![
        ("general.architecture".to_string(), model.kind.architecture.as_str().into()),
        ("general.type".into(), kind.into()),
    ];
    entries.extend(name.map(|name| ("general.name".to_string(), name.as_str().into())));
    entries
}

fn folder_name(dir: &Path) -> String {
    let absolute = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    absolute.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned())
}

/// `6.7B`, or `8x7B` where there are experts (`size_label` of llama.cpp's Python package).
fn size_label(jobs: &[(Planned, Source)], experts: Option<u64>) -> String {
    let (mut each, mut total) = (0f64, 0f64);
    for (planned, source) in jobs {
        let size = planned.shape.iter().product::<usize>() as f64;
        total += size;
        each += if let Source::Stack(parts) = source { size / parts.len().max(1) as f64 } else { size };
    }
    let label = |n: f64| {
        let (scaled, suffix) = match n {
            n if n > 1e12 => (n * 1e-12, "T"),
            n if n > 1e9 => (n * 1e-9, "B"),
            n if n > 1e6 => (n * 1e-6, "M"),
            n => (n * 1e-3, "K"),
        };
        let digits = if scaled.round() < 1.0 { 0 } else { format!("{scaled:.0}").len() };
        format!("{scaled:.*}{suffix}", 2usize.saturating_sub(digits))
    };
    match experts {
        Some(experts) if experts > 0 => format!("{experts}x{}", label(each)),
        _ => label(total),
    }
}

/// Writes an adapter as LoRA GGUF for the base model whose `config.json` lies in `base_dir`; its weights are
/// not needed.
///
/// llama.cpp scales every product by alpha over its rank, with one alpha for all; what a module's scaling has
/// beyond that (`use_rslora`, `alpha_pattern`) is folded into its `lora_b`.
///
/// # Errors
/// [`FormatError::Field`] and [`FormatError::Factors`] for what a LoRA GGUF cannot hold (DoRA, biases, whole
/// modules, a head that is tied to the embedding): merge the adapter and export the model then.
pub fn export_lora_gguf(
    adapter: &Adapter,
    base_dir: &Path,
    out: &Path,
    kind: GgmlType,
) -> Result<ExportReport, FormatError> {
    let model = Model::read(base_dir)?;
    adapter.config.refuse_changed_base()?;
    if let Some(key) = adapter.config.beyond_plain_lora().first() {
        return Err(FormatError::Field {
            path: crate::adapter_config::CONFIG_FILE.into(),
            field: (*key).into(),
            reason: "a LoRA GGUF has no place for it; merge the adapter and write the merged model".into(),
        });
    }
    if let Some((name, _)) = adapter.saved_tensors().next() {
        return Err(FormatError::Factors {
            module: name,
            reason: "a LoRA GGUF cannot replace whole tensors; merge the adapter and write the merged model".into(),
        });
    }
    let alpha = adapter.config.lora_alpha;
    let modules = adapter.lora_modules()?;
    let mut pairs: Vec<(String, Pair)> = Vec::new();
    let mut stacks: BTreeMap<String, BTreeMap<usize, Pair>> = BTreeMap::new();
    for module in &modules {
        let (mapped, pair) = pair(&model, module, alpha)?;
        match mapped.expert {
            Some(expert) => drop(stacks.entry(mapped.name).or_default().insert(expert, pair)),
            None => pairs.push((mapped.name, pair)),
        }
    }
    for (name, parts) in stacks {
        let shapes = parts.iter().map(|(i, p)| (*i, (i.to_string(), [&p.a_shape[..], &p.b_shape].concat()))).collect();
        let (_, shape) = stack(&model, &name, shapes)?;
        let mut whole = Pair { a_shape: vec![shape[0]], b_shape: vec![shape[0]], a: Vec::new(), b: Vec::new() };
        for (i, part) in parts.into_values().enumerate() {
            if i == 0 {
                whole.a_shape.extend(&part.a_shape);
                whole.b_shape.extend(&part.b_shape);
            }
            whole.a.extend(part.a);
            whole.b.extend(part.b);
        }
        pairs.push((name, whole));
    }
    let mut metadata = general(&model, "adapter", None);
    metadata.push(("adapter.type".into(), "lora".into()));
    metadata.push(("adapter.lora.alpha".into(), Value::F32(alpha as f32)));
    metadata.push(("general.quantization_version".into(), Value::U32(2)));
    let mut planned = Vec::new();
    let mut data = Vec::new();
    for (name, pair) in pairs {
        for (suffix, shape, values) in [("lora_a", pair.a_shape, pair.a), ("lora_b", pair.b_shape, pair.b)] {
            let kind = if kind.num_bytes(&shape).is_some() { kind } else { GgmlType::F16 };
            planned.push(Planned { name: format!("{name}.{suffix}"), shape, kind });
            data.push(values);
        }
    }
    let total_bytes = writer::total_bytes(out, &planned)?;
    writer::write(out, &metadata, &planned, |i| encode(out, &planned[i], &data[i]))?;
    Ok(ExportReport { tensors: planned.len(), total_bytes, fallbacks: Vec::new() })
}

struct Pair {
    a_shape: Vec<usize>,
    b_shape: Vec<usize>,
    a: Vec<f32>,
    b: Vec<f32>,
}

fn pair(model: &Model, module: &LoraModule<'_>, alpha: f64) -> Result<(Mapped, Pair), FormatError> {
    let tensor = format!("{}.weight", module.path);
    let tied = model.config.map.get("tie_word_embeddings").and_then(serde_json::Value::as_bool).unwrap_or(false);
    let mapped = map_name(model, &tensor)?.filter(|m| !(m.name == "output.weight" && tied)).ok_or_else(|| {
        module.fail(
            "the output head is the embedding's tensor here, and a LoRA GGUF cannot adapt it alone; merge the adapter"
                .into(),
        )
    })?;
    let (rank, rows) = (module.lora_a.shape[0], module.lora_b.shape[0]);
    // Without an alpha llama.cpp does not scale at all.
    let own = if alpha == 0.0 { 1.0 } else { alpha / rank as f64 };
    let factor = (f64::from(module.scaling) / own) as f32;
    let mut b = module.lora_b.data.clone();
    if factor != 1.0 {
        b.iter_mut().for_each(|x| *x *= factor);
    }
    if let Op::Permute(heads) = mapped.op {
        if !rows.is_multiple_of(2 * heads) {
            return Err(module.misfit("number of heads", &[heads]));
        }
        b = permute(&b, heads, rows);
    }
    let (a, a_shape) = match module.kind {
        ModuleKind::Linear => (module.lora_a.data.clone(), module.lora_a.shape.clone()),
        // llama.cpp looks rows of it up.
        ModuleKind::Embedding => (transposed(module.lora_a), vec![module.lora_a.shape[1], rank]),
    };
    Ok((mapped, Pair { a_shape, b_shape: module.lora_b.shape.clone(), a, b }))
}
