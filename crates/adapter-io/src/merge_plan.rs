//! Where each tensor of a merged checkpoint comes from, decided and checked before anything is written.

use std::collections::{BTreeMap, BTreeSet};

use nf4_quant::QuantConfig;
use safetensors::Dtype;

use crate::adapter::Adapter;
use crate::checkpoint::Checkpoint;
use crate::convert::{dtype_of, quantized_module};
use crate::error::{FormatError, nearest_names};
use crate::header::TensorSpec;
use crate::host_tensor::HostTensor;
use crate::lora_module::LoraModule;
use crate::token_rows::TokenRows;

const HEAD: &str = "lm_head.weight";
/// What the head is called beside a language model inside a larger one, before transformers 4.52.
const OLD_HEAD: &str = "language_model.lm_head.weight";

/// What the adapter is merged into.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum MergeBase {
    /// The checkpoint's own weights, which must not be quantized.
    #[default]
    FullPrecision,
    /// The weights after quantization to 4 bits and back. Of a checkpoint that bitsandbytes quantized these
    /// are its weights, and the fields are not used.
    Dequantized {
        /// How the linear layers are quantized.
        config: QuantConfig,
        /// The modules that are not, beside the output head.
        skip_modules: Vec<String>,
    },
}

/// One tensor of the output.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    pub spec: TensorSpec,
    /// The tensor of the base.
    pub source: String,
    /// The 4-bit module of the base that the tensor is decoded from.
    pub quantized: Option<String>,
    /// Quantize and decode the base's values first.
    pub requantize: Option<QuantConfig>,
    /// Takes the place of the base's values.
    pub replacement: Option<&'a HostTensor>,
    /// Rows of single tokens that take the place of the base's, or of the replacement's.
    pub token_rows: Option<TokenRows<'a>>,
    /// The output has more rows than the base.
    pub grown: bool,
    /// The module whose weight this is.
    pub weight_of: Option<usize>,
    /// The module whose bias this is.
    pub bias_of: Option<usize>,
}

/// The whole output.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub jobs: Vec<Job<'a>>,
    pub modules: Vec<LoraModule<'a>>,
    /// The output head and the embedding were one tensor and are two now.
    pub untied: bool,
    /// The rows of embedding and output head, where they are more than the base's.
    pub vocabulary: Option<usize>,
}

/// Decides where everything comes from. `tied` is what the model's configuration says: a head in the file is not
/// looked at then, the embedding is the head.
pub(crate) fn plan<'a>(
    base: &Checkpoint,
    adapter: &'a Adapter,
    mode: &MergeBase,
    tied: bool,
) -> Result<Plan<'a>, FormatError> {
    refuse_unsupported(adapter)?;
    let quantized: BTreeSet<String> = base.quantized_modules().into_iter().map(str::to_string).collect();
    if let (MergeBase::FullPrecision, Some(module)) = (mode, quantized.first()) {
        return Err(FormatError::QuantState {
            file: base.dir().to_path_buf(),
            tensor: format!("{module}.weight"),
            reason: "merging belongs on the full-precision checkpoint; give that one as the base, or ask for a merge into the dequantized 4-bit base".into(),
        });
    }
    let mut jobs = Vec::new();
    for name in base.names_in_file_order() {
        if let Some(job) = base_job(base, name, &quantized, mode)? {
            jobs.push(job);
        }
    }
    let modules = adapter.lora_modules()?;
    let mut token_rows = adapter.token_rows()?;
    if tied || ![HEAD, OLD_HEAD].into_iter().any(|head| base.contains(head)) {
        // PEFT may write a tied head's rows along, which are the embedding's.
        let of_embedding = token_rows.iter().find(|rows| !is_head(&rows.module)).cloned();
        let is_copy = |rows: &TokenRows<'_>| {
            of_embedding.as_ref().is_some_and(|other| other.tokens == rows.tokens && other.rows == rows.rows)
        };
        token_rows.retain(|rows| !is_head(&rows.module) || !is_copy(rows));
    }
    refuse_two_ways(adapter, &modules, &token_rows)?;
    let untied = untie(base, adapter, &modules, &token_rows, &mut jobs, tied);
    let by_name: BTreeMap<String, usize> = jobs.iter().enumerate().map(|(i, j)| (j.spec.name.clone(), i)).collect();
    let head = [HEAD, OLD_HEAD].into_iter().find_map(|head| by_name.get(head).copied());
    let find = |name: &str| {
        let is_head = name.strip_suffix(".weight").is_some_and(is_head);
        by_name.get(name).copied().or_else(|| is_head.then(|| head.or_else(|| embedding(&by_name))).flatten())
    };
    for (i, module) in modules.iter().enumerate() {
        let name = format!("{}.weight", module.path);
        let at = find(&name).ok_or_else(|| missing(base, &name, by_name.keys()))?;
        let expected = module.weight_shape();
        if jobs[at].spec.shape != expected {
            return Err(module.misfit(&format!("weight `{name}`"), &jobs[at].spec.shape));
        }
        if jobs[at].weight_of.is_none() || jobs[at].spec.name == name {
            jobs[at].weight_of = Some(i);
        }
        if let Some(base_weight) = adapter.saved_base(&module.path) {
            replace(&mut jobs[at], &name, base_weight)?;
        }
        if module.bias.is_some() {
            let bias = format!("{}.bias", module.path);
            let at = find(&bias).ok_or_else(|| module.fail(format!(
                "the adapter has a bias (lora_bias), but the base has no `{bias}` to merge it into, and its architecture no place for one; keep the adapter beside the base"
            )))?;
            jobs[at].bias_of = Some(i);
        }
    }
    let is_matrix = |at: &usize| jobs[*at].spec.shape.len() == 2;
    let tables: Vec<usize> = embedding(&by_name).into_iter().chain(head).filter(is_matrix).collect();
    let mut vocabulary = 0;
    for (name, tensor) in adapter.saved_tensors() {
        let at = find(&name).ok_or_else(|| missing(base, &name, by_name.keys()))?;
        if tables.contains(&at) && is_larger(&jobs[at].spec.shape, &tensor.shape) {
            vocabulary = vocabulary.max(tensor.shape[0]);
            jobs[at].replacement = Some(tensor);
            continue;
        }
        replace(&mut jobs[at], &name, tensor)?;
    }
    for rows in token_rows {
        let name = format!("{}.weight", rows.module);
        let at = find(&name).ok_or_else(|| missing(base, &name, by_name.keys()))?;
        let (shape, width) = (&jobs[at].spec.shape, rows.rows.shape[1]);
        if shape.len() != 2 || shape[1] != width {
            let reason = format!(
                "the rows of its tokens are {width} wide, and the base's `{name}` has the shape {shape:?}; the adapter belongs to another base"
            );
            return Err(FormatError::Factors { module: rows.module, reason });
        }
        vocabulary = vocabulary.max(rows.table_rows(shape[0])?);
        jobs[at].replacement = rows.table.or(jobs[at].replacement);
        jobs[at].token_rows = Some(rows);
    }
    for at in &tables {
        let job = &mut jobs[*at];
        job.grown = job.spec.shape[0] < vocabulary;
        job.spec.shape[0] = vocabulary.max(job.spec.shape[0]);
    }
    let grown = tables.iter().any(|at| jobs[*at].grown);
    Ok(Plan { jobs, modules, untied, vocabulary: grown.then_some(vocabulary) })
}

fn is_head(module: &str) -> bool {
    [HEAD, OLD_HEAD].into_iter().any(|head| head.strip_suffix(".weight") == Some(module))
}

/// Whether a table is another one of the same width with more rows, and at most twice as many.
fn is_larger(old: &[usize], new: &[usize]) -> bool {
    matches!((old, new), (&[rows, width], &[more, same]) if same == width && more > rows && more <= 2 * rows)
}

/// Refuses tables whose rows are trained and that are adapted or replaced besides: PEFT has no such layer.
fn refuse_two_ways(
    adapter: &Adapter,
    modules: &[LoraModule<'_>],
    token_rows: &[TokenRows<'_>],
) -> Result<(), FormatError> {
    let adapted = |module: &str| {
        let weight = format!("{module}.weight");
        modules.iter().any(|m| m.path == module) || adapter.saved_tensors().any(|(name, _)| name == weight)
    };
    match token_rows.iter().find(|rows| adapted(&rows.module)) {
        None => Ok(()),
        Some(rows) => Err(FormatError::Factors {
            module: rows.module.clone(),
            reason: "it has rows for single tokens (trainable_token_indices), and is adapted or replaced besides; only one of both can be".into(),
        }),
    }
}

/// The output's tensor for one of the base; `None` for the parts of a 4-bit weight beside its codes.
fn base_job<'a>(
    base: &Checkpoint,
    name: &str,
    quantized: &BTreeSet<String>,
    mode: &MergeBase,
) -> Result<Option<Job<'a>>, FormatError> {
    let mut job = Job {
        spec: TensorSpec::new(name, Dtype::F32, &[]),
        source: name.to_string(),
        quantized: None,
        requantize: None,
        replacement: None,
        token_rows: None,
        grown: false,
        weight_of: None,
        bias_of: None,
    };
    if let Some((module, part)) = name.split_once(".weight")
        && quantized.contains(module)
    {
        if !part.is_empty() {
            return Ok(None);
        }
        // Reads the statistics too, and so checks them before anything is written.
        if let Some(weight) = base.quantized(module)? {
            job.spec.dtype = dtype_of(weight.state.dtype);
            job.spec.shape = weight.state.shape;
            job.quantized = Some(module.to_string());
        }
        return Ok(Some(job));
    }
    let tensor = base.dense(name)?;
    job.spec.dtype = tensor.dtype;
    job.spec.shape = tensor.shape;
    if let MergeBase::Dequantized { config, skip_modules } = mode
        && quantized.is_empty()
        && quantized_module(name, &job.spec.shape, skip_modules).is_some()
    {
        job.requantize = Some(*config);
    }
    Ok(Some(job))
}

/// Gives a tied output head a tensor of its own when the adapter changes only one side, so that the merged
/// model computes what base and adapter computed. Where the two stay one and the adapter changes it, a copy of the
/// head in the file is left out: it would be the old one.
fn untie<'a>(
    base: &Checkpoint,
    adapter: &'a Adapter,
    modules: &[LoraModule<'a>],
    token_rows: &[TokenRows<'a>],
    jobs: &mut Vec<Job<'a>>,
    tied: bool,
) -> bool {
    let by_name: BTreeMap<String, usize> = jobs.iter().enumerate().map(|(i, j)| (j.spec.name.clone(), i)).collect();
    let in_file = [HEAD, OLD_HEAD].into_iter().find(|head| base.contains(head));
    let Some(at) = embedding(&by_name).filter(|_| in_file.is_none() || tied) else { return false };
    let embed = jobs[at].spec.name.clone();
    let saved: BTreeMap<String, &HostTensor> = adapter.saved_tensors().collect();
    let adapted = |name: &str| modules.iter().any(|m| format!("{}.weight", m.path) == name);
    let has_rows = |name: &str| token_rows.iter().any(|rows| format!("{}.weight", rows.module) == name);
    let saved_head = || saved.get(HEAD).or_else(|| saved.get(OLD_HEAD));
    // A head without rows of its own has the embedding's.
    let head_touched = [HEAD, OLD_HEAD].into_iter().any(|head| adapted(head) || has_rows(head));
    let touched =
        head_touched || adapted(&embed) || has_rows(&embed) || saved_head().is_some() || saved.contains_key(&embed);
    let same = !head_touched && !adapted(&embed) && saved_head() == saved.get(embed.as_str());
    if !touched {
        return false;
    }
    jobs.retain(|job| Some(job.spec.name.as_str()) != in_file);
    if same || adapter.config.ensure_weight_tying {
        return false;
    }
    let Some(at) = jobs.iter().position(|job| job.spec.name == embed) else { return false };
    let source = jobs[at].source.clone();
    let name = if embed.starts_with("language_model.") { OLD_HEAD } else { HEAD };
    let spec = TensorSpec { name: name.into(), ..jobs[at].spec.clone() };
    jobs.push(Job {
        spec,
        source,
        quantized: None,
        requantize: None,
        replacement: None,
        token_rows: None,
        grown: false,
        weight_of: None,
        bias_of: None,
    });
    true
}

fn embedding(by_name: &BTreeMap<String, usize>) -> Option<usize> {
    by_name.iter().find(|(name, _)| name.ends_with("embed_tokens.weight")).map(|(_, i)| *i)
}

fn replace<'a>(job: &mut Job<'a>, name: &str, tensor: &'a HostTensor) -> Result<(), FormatError> {
    if job.spec.shape == tensor.shape {
        job.replacement = Some(tensor);
        return Ok(());
    }
    Err(FormatError::Factors {
        module: name.to_string(),
        reason: format!(
            "the adapter replaces this tensor by one of shape {:?}, in the base it has {:?}; the adapter belongs to another base",
            tensor.shape, job.spec.shape
        ),
    })
}

fn missing<'n>(base: &Checkpoint, name: &str, names: impl Iterator<Item = &'n String>) -> FormatError {
    let nearest = nearest_names(name, names.map(String::as_str));
    FormatError::MissingTensor { path: base.dir().to_path_buf(), tensor: name.to_string(), nearest }
}

/// Refuses what would change the output and is not merged here.
fn refuse_unsupported(adapter: &Adapter) -> Result<(), FormatError> {
    const MERGED: [&str; 5] = ["bias", "lora_bias", "modules_to_save", "trainable_token_indices", "use_dora"];
    adapter.config.refuse_changed_base()?;
    let unsupported = adapter.config.beyond_plain_lora().into_iter().find(|key| !MERGED.contains(key));
    match unsupported {
        None => Ok(()),
        Some("fan_in_fan_out") => Err(FormatError::Field {
            path: crate::adapter_config::CONFIG_FILE.into(),
            field: "fan_in_fan_out".into(),
            reason: "the base stores its weights transposed (Conv1D); merging into such layers is not supported, merge with PEFT".into(),
        }),
        Some(key) => Err(FormatError::Field {
            path: crate::adapter_config::CONFIG_FILE.into(),
            field: key.into(),
            reason: "adapters that use it cannot be merged here; merge with PEFT, or train without it".into(),
        }),
    }
}
