//! A base checkpoint and an adapter become a checkpoint, tensor by tensor.
//!
//! Only the tensor at work is in memory, in its own type, and one row of the update for each thread. The
//! output is sharded as transformers shards it; `config.json`, tokenizer, chat templates, the settings of generation
//! and of processors, and a model's own code come along, `quantization_config` does not.
//!
//! **Which base.** An adapter trained on a 4-bit base has learned to correct that base's rounding. Merged
//! into the full-precision weights it meets weights it has not seen, yet those are closer to the model that
//! was to be tuned, and as a rule the result is as good or better; [`MergeBase::Dequantized`] keeps exactly
//! what was trained, with the 4-bit rounding baked in. [`TensorReport::quantization`] is the size of that
//! difference. Quantizing the merged model again loses most of an update: keep base and adapter apart for
//! that.
//!
//! **Tied embeddings.** Where the output head is the embedding's tensor, an adapter on one of them must not
//! change the other: the head gets a tensor of its own and `tie_word_embeddings` becomes false, unless the
//! adapter was trained with `ensure_weight_tying`. (PEFT merges into the shared tensor, and warns.) A head that the file holds beside the
//! embedding, and that is another tensor, is the head, whatever `tie_word_embeddings` says: transformers 5 goes by the weights, too.
//! Rows of single tokens (`trainable_token_indices`) go into both, as PEFT trains them.
//!
//! **Grown vocabularies.** Where the adapter has rows for tokens beyond the base's tables, the tables grow to hold
//! them, and `vocab_size` with them. Rows that the adapter does not have, those of a head that was not trained, are the
//! mean of the old ones.

use std::path::{Path, PathBuf};

use nf4_quant::{Element, QuantConfig, Quantized4bit};

use crate::adapter::Adapter;
use crate::atomic;
use crate::checkpoint::Checkpoint;
use crate::convert::{
    ModelConfigFile, OnProgress, Owned, Progress, copy_companions, copy_file, format_of, refuse_same_folder, with_owned,
};
use crate::error::FormatError;
use crate::experts::unstack;
use crate::lora_module::{ChangeSums, WeightChange};
use crate::merge_plan::{Job, MergeBase, Plan, plan};
use crate::shard_writer::{DEFAULT_SHARD_BYTES, ShardedWriter};
use crate::token_rows::TokenRows;

/// How to merge.
#[derive(Debug, Clone)]
pub struct MergeOptions {
    /// What to merge into.
    pub base: MergeBase,
    /// The data of one file at most; transformers' `max_shard_size`.
    pub max_shard_bytes: u64,
    /// Where to take the tokenizer and chat template from, if not from the base: an adapter's folder may
    /// hold newer ones.
    pub tokenizer_from: Option<PathBuf>,
    /// Further small files for the output, which take the place of the base's of the same names: what says how an
    /// adapter is prompted.
    pub companions: Vec<PathBuf>,
}

impl Default for MergeOptions {
    fn default() -> Self {
        Self {
            base: MergeBase::default(),
            max_shard_bytes: DEFAULT_SHARD_BYTES,
            tokenizer_from: None,
            companions: Vec::new(),
        }
    }
}

/// What happened to one tensor that the adapter changes.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorReport {
    /// The tensor.
    pub name: String,
    /// Its change against the base it was merged into.
    pub change: WeightChange,
    /// The change that quantization had made before, when the base was quantized for the merge.
    pub quantization: Option<WeightChange>,
}

/// What a merge did.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct MergeReport {
    /// Every tensor that the adapter changes, in file order.
    pub tensors: Vec<TensorReport>,
    /// Modules that the adapter's configuration names and its file has no weights for: they are the base's.
    pub missing: Vec<String>,
    /// Whether the output head got a tensor of its own.
    pub untied: bool,
    /// The vocabulary's size, where it grew.
    pub vocabulary: Option<usize>,
    /// The data of all tensors written.
    pub total_bytes: u64,
    /// The files of weights.
    pub files: Vec<String>,
}

/// The largest changes in one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerReport {
    /// `model.layers.N`, or the tensor's name outside the layers.
    pub name: String,
    /// The largest of its tensors' changes.
    pub change: WeightChange,
    /// The largest of the changes that quantization had made before.
    pub quantization: Option<WeightChange>,
}

impl MergeReport {
    /// The largest changes of each layer: tensors whose path has the same `layers.N`, or the same name.
    pub fn by_layer(&self) -> Vec<LayerReport> {
        let mut layers: Vec<LayerReport> = Vec::new();
        for tensor in &self.tensors {
            let name = layer_of(&tensor.name);
            let at = layers.iter().position(|layer| layer.name == name).unwrap_or_else(|| {
                layers.push(LayerReport { name, change: WeightChange::default(), quantization: None });
                layers.len() - 1
            });
            let layer = &mut layers[at];
            layer.change = largest(layer.change, tensor.change);
            if let Some(quantization) = tensor.quantization {
                layer.quantization = Some(largest(layer.quantization.unwrap_or_default(), quantization));
            }
        }
        layers
    }
}

fn largest(one: WeightChange, other: WeightChange) -> WeightChange {
    WeightChange { largest: one.largest.max(other.largest), relative: one.relative.max(other.relative) }
}

fn layer_of(name: &str) -> String {
    let parts: Vec<&str> = name.split('.').collect();
    let numbered = parts.iter().position(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()));
    numbered.map_or_else(|| name.to_string(), |i| parts[..=i].join("."))
}

/// Merges an adapter into the checkpoint in `base_dir` and writes the result to `out_dir`, which is replaced
/// as a whole when all is done.
///
/// # Errors
/// [`FormatError::MissingTensor`] and [`FormatError::Factors`] when the adapter does not fit the base,
/// [`FormatError::Field`] for kinds of adapters that cannot be merged, [`FormatError::QuantState`] for a
/// quantized base without [`MergeBase::Dequantized`], [`FormatError::NotFinite`], and those of reading and
/// writing. What was at `out_dir` is unchanged then.
pub fn merge_checkpoint(
    base_dir: &Path,
    adapter: &Adapter,
    out_dir: &Path,
    options: &MergeOptions,
    progress: OnProgress<'_>,
) -> Result<MergeReport, FormatError> {
    merge_checkpoint_checked(base_dir, adapter, out_dir, options, progress, |_| Ok(()))
}

/// [`merge_checkpoint`], where `check` looks at the folder of the result, which is complete, before it takes its place.
///
/// # Errors
/// As there, and what `check` says: what was at `out_dir` is unchanged then, too.
pub fn merge_checkpoint_checked<E: From<FormatError>>(
    base_dir: &Path,
    adapter: &Adapter,
    out_dir: &Path,
    options: &MergeOptions,
    progress: OnProgress<'_>,
    check: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<MergeReport, E> {
    refuse_same_folder(base_dir, out_dir)?;
    let base = Checkpoint::open(base_dir)?;
    let mut config = ModelConfigFile::read(base_dir)?;
    let modules: Vec<String> = base.names().filter_map(module_of).collect();
    let adapter = adapter.named_as(&modules)?;
    let adapter = &*unstack(&adapter, &modules)?;
    let own_head = config.is_tied() && has_own_head(&base);
    let plan = plan(&base, adapter, &options.base, config.is_tied() && !own_head)?;
    config.remove("quantization_config");
    if plan.untied || own_head {
        config.untie();
    }
    if let Some(rows) = plan.vocabulary {
        config.set_vocabulary(rows);
    }
    config.keep_code(base_dir)?;
    let matrices: Vec<String> =
        plan.jobs.iter().filter(|job| job.spec.shape.len() == 2).filter_map(|job| module_of(&job.spec.name)).collect();
    let missing = adapter.missing_modules(&matrices)?;
    let mut report =
        MergeReport { untied: plan.untied, vocabulary: plan.vocabulary, missing, ..MergeReport::default() };
    atomic::replace_dir(out_dir, |dir| -> Result<(), E> {
        config.write(dir)?;
        copy_companions(base_dir, options.tokenizer_from.as_deref(), dir)?;
        options.companions.iter().try_for_each(|path| copy_file(path, dir))?;
        let specs = plan.jobs.iter().map(|job| job.spec.clone()).collect();
        let mut writer = ShardedWriter::create(dir, specs, options.max_shard_bytes)?;
        report.total_bytes = writer.total_bytes();
        let mut done_bytes = 0;
        for job in &plan.jobs {
            let bytes = write_tensor(&base, job, &plan, &mut writer, &mut report)?;
            base.release(&job.source);
            done_bytes += bytes as u64;
            progress(&Progress { tensor: &job.spec.name, done_bytes, total_bytes: report.total_bytes });
        }
        let files = writer.finish()?;
        report.files = files.iter().filter_map(|f| Some(f.file_name()?.to_string_lossy().into_owned())).collect();
        check(dir)
    })
    .map(|()| report)
}

/// Whether the checkpoint holds an output head that is not the embedding table.
fn has_own_head(base: &Checkpoint) -> bool {
    let named = |end: &str| base.names().find(|name| name.ends_with(end)).and_then(|name| base.get(name));
    match (named("embed_tokens.weight"), named("lm_head.weight")) {
        (Some(embed), Some(head)) => {
            (embed.dtype, &embed.shape) != (head.dtype, &head.shape) || embed.data != head.data
        }
        _ => false,
    }
}

/// The module of a weight.
fn module_of(tensor: &str) -> Option<String> {
    tensor.strip_suffix(".weight").map(Into::into)
}

fn write_tensor(
    base: &Checkpoint,
    job: &Job<'_>,
    plan: &Plan<'_>,
    writer: &mut ShardedWriter,
    report: &mut MergeReport,
) -> Result<usize, FormatError> {
    let name = &job.spec.name;
    let replaced = job.replacement.is_some() || job.token_rows.is_some() || job.grown;
    let touched = job.weight_of.is_some() || job.bias_of.is_some() || replaced;
    if !touched && job.quantized.is_none() && job.requantize.is_none() {
        let tensor = base.dense(&job.source)?;
        tensor.expect_finite()?;
        writer.write_tensor(name, &tensor)?;
        return Ok(tensor.num_bytes());
    }
    let mut values = match &job.quantized {
        Some(module) => decoded(base, module)?,
        None => base.dense(&job.source)?.with_values(|view| Owned::read(view.expect_finite()?))?,
    };
    let mut quantization = None;
    if let Some(config) = &job.requantize {
        quantization = Some(with_owned!(&mut values, x => round_to_4_bits(name, x, &job.spec.shape, config))?);
    }
    let mut change = None;
    if let Some(format) = format_of(job.spec.dtype).filter(|_| replaced) {
        let mut before = values.to_f32();
        add_rows(&mut before, &job.spec.shape);
        let mut new = job.replacement.map_or_else(|| before.clone(), |tensor| tensor.data.clone());
        add_rows(&mut new, &job.spec.shape);
        if let Some(TokenRows { tokens, rows, .. }) = &job.token_rows {
            let width = rows.shape[1];
            for (token, row) in tokens.iter().zip(rows.data.chunks_exact(width)) {
                new[*token as usize * width..][..width].copy_from_slice(row);
            }
        }
        values = Owned::from_f32(&new, format);
        change = Some(difference(name, &before, &values.to_f32())?);
    }
    if let Some(module) = job.weight_of.map(|i| &plan.modules[i]) {
        change = Some(with_owned!(&mut values, x => module.merge_into(x, &job.spec.shape))?);
    }
    if let Some(module) = job.bias_of.map(|i| &plan.modules[i]) {
        change = Some(with_owned!(&mut values, x => module.merge_bias(x, &job.spec.shape))?);
    }
    writer.write(name, values.bytes())?;
    if let Some(change) = change {
        report.tensors.push(TensorReport { name: name.clone(), change, quantization });
    }
    Ok(values.bytes().len())
}

/// Adds rows to a table until it has the shape, each the mean of those that are there: about what transformers'
/// `resize_token_embeddings` draws (normal around this mean, with a billionth of the rows' covariance).
fn add_rows(table: &mut Vec<f32>, shape: &[usize]) {
    let (elements, Some(width)) = (shape.iter().product(), shape.get(1).filter(|width| **width > 0)) else { return };
    if table.len() >= elements || table.is_empty() {
        return;
    }
    let mut sums = vec![0.0_f64; *width];
    for row in table.chunks_exact(*width) {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
    }
    let rows = (table.len() / width) as f64;
    let mean: Vec<f32> = sums.into_iter().map(|sum| (sum / rows) as f32).collect();
    while table.len() < elements {
        table.extend_from_slice(&mean);
    }
}

fn decoded(base: &Checkpoint, module: &str) -> Result<Owned, FormatError> {
    use nf4_quant::FloatFormat;
    let bad = |reason: String| FormatError::QuantState {
        file: base.dir().to_path_buf(),
        tensor: format!("{module}.weight"),
        reason,
    };
    let weight = base.quantized(module)?.ok_or_else(|| bad("it is not quantized".into()))?;
    Ok(match weight.state.dtype {
        FloatFormat::F32 => Owned::F32(weight.dequantize().map_err(|e| bad(e.to_string()))?),
        FloatFormat::F16 => Owned::F16(weight.dequantize().map_err(|e| bad(e.to_string()))?),
        FloatFormat::BF16 => Owned::BF16(weight.dequantize().map_err(|e| bad(e.to_string()))?),
    })
}

fn round_to_4_bits<E: Element>(
    name: &str,
    values: &mut [E],
    shape: &[usize],
    config: &QuantConfig,
) -> Result<WeightChange, FormatError> {
    let before: Vec<f32> = values.iter().map(|x| x.to_f32()).collect();
    Quantized4bit::quantize(values, shape, config)
        .and_then(|quantized| quantized.dequantize_into(values))
        .map_err(|e| FormatError::Factors { module: name.to_string(), reason: e.to_string() })?;
    let after: Vec<f32> = values.iter().map(|x| x.to_f32()).collect();
    difference(name, &before, &after)
}

fn difference(name: &str, before: &[f32], after: &[f32]) -> Result<WeightChange, FormatError> {
    let mut sums = ChangeSums::default();
    before.iter().zip(after).for_each(|(b, a)| sums.add(*b, *a));
    sums.finish(name)
}
