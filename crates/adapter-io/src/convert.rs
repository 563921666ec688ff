//! What every conversion of a checkpoint shares: progress, `config.json`, and the files beside the weights.
//!
//! A conversion reads one tensor at a time from a mapped checkpoint and writes it to its place in the new
//! one, inside a temporary folder that takes the final name when all of it is on the disk
//! ([`crate::atomic::replace_dir`]): killed at any moment, the old output is still there, or none is.

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use nf4_quant::{Element, FloatFormat};
use safetensors::Dtype;
use serde_json::{Map, Value};

use crate::atomic;
use crate::error::FormatError;
use crate::json;
use crate::mapped::{Floats, TensorView};
use crate::paths::resolve_inside;

/// How far a conversion is; given to its callback after every tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress<'a> {
    /// The tensor that was just written.
    pub tensor: &'a str,
    /// Bytes of tensors written.
    pub done_bytes: u64,
    /// Bytes that will be.
    pub total_bytes: u64,
}

/// A callback for [`Progress`].
pub type OnProgress<'a> = &'a mut dyn FnMut(&Progress<'_>);

/// The configuration of a model.
pub(crate) const CONFIG_FILE: &str = "config.json";
/// Its key for a head that is the embedding.
const TIE: &str = "tie_word_embeddings";
/// Its section for the language model of a larger one.
const TEXT_SECTION: &str = "text_config";

/// The files of a tokenizer and of chat templates.
const TOKENIZER_FILES: [&str; 13] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
];
/// `tokenizer.model.v3` and its like, of Mistral's.
const TOKENIZER_VERSIONS: &str = "tokenizer.model.v";
/// How the names of a model's other files end: the settings of generation and of processors, code.
const OTHER_FILES: [&str; 6] = [".json", ".jinja", ".py", ".model", ".tiktoken", ".txt"];
/// How the names of its terms of use begin.
const TERMS: [&str; 3] = ["LICENSE", "NOTICE", "USE_POLICY"];
/// Those of these names that are of the base's weights or of a run, and not of the model.
const NOT_COPIED: [&str; 9] = [
    CONFIG_FILE,
    "quantize_config.json",
    "quant_config.json",
    "adapter_config.json",
    "trainer_state.json",
    "training_state.json",
    "all_results.json",
    "summary.json",
    crate::checksum::MANIFEST_FILE,
];
/// The bytes of such a file at most; a larger one is no setting and no code.
const LARGEST_FILE: u64 = 64 << 20;
/// A folder of more chat templates.
const MORE_TEMPLATES: &str = "additional_chat_templates";

/// A parsed `config.json` and where it lies.
#[derive(Debug, Clone)]
pub(crate) struct ModelConfigFile {
    pub path: PathBuf,
    pub map: Map<String, Value>,
    text: Vec<u8>,
    changed: bool,
}

impl ModelConfigFile {
    pub(crate) fn read(dir: &Path) -> Result<Self, FormatError> {
        let path = resolve_inside(dir, CONFIG_FILE, dir)?.ok_or_else(|| FormatError::Read {
            path: dir.join(CONFIG_FILE),
            source: std::io::Error::new(std::io::ErrorKind::NotFound, "the model's folder has none; download it again"),
        })?;
        let text = fs::read(&path).map_err(|source| FormatError::Read { path: path.clone(), source })?;
        let map = json::parse(&text, &path)?;
        Ok(Self { path, map, text, changed: false })
    }

    pub(crate) fn set(&mut self, key: &str, value: Value) {
        if self.map.get(key) != Some(&value) {
            self.map.insert(key.to_string(), value);
            self.changed = true;
        }
    }

    pub(crate) fn remove(&mut self, key: &str) {
        self.changed |= self.map.shift_remove(key).is_some();
    }

    /// Whether output head and embedding are one tensor, as far as the file says so.
    pub(crate) fn is_tied(&self) -> bool {
        let of = |map: &Map<String, Value>| map.get(TIE).and_then(Value::as_bool);
        let section = || of(self.map.get(TEXT_SECTION)?.as_object()?);
        of(&self.map).or_else(section).unwrap_or(false)
    }

    /// Says that output head and embedding are two tensors.
    pub(crate) fn untie(&mut self) {
        self.set(TIE, Value::Bool(false));
        if let Some(flag) = self.map.get_mut(TEXT_SECTION).and_then(|section| section.get_mut(TIE)) {
            *flag = Value::Bool(false);
            self.changed = true;
        }
    }

    /// Says how many tokens there are.
    pub(crate) fn set_vocabulary(&mut self, rows: usize) {
        const KEY: &str = "vocab_size";
        let of_section = self.map.get_mut(TEXT_SECTION).and_then(|section| section.get_mut(KEY));
        let in_section = of_section.map(|size| *size = Value::from(rows)).is_some();
        self.changed |= in_section;
        if !in_section || self.map.contains_key(KEY) {
            self.set(KEY, Value::from(rows));
        }
    }

    /// Takes out the entries of `auto_map` whose code is neither beside the model nor in a repository that they
    /// name: transformers would look for it in the new folder.
    ///
    /// # Errors
    /// [`FormatError::Read`].
    pub(crate) fn keep_code(&mut self, dir: &Path) -> Result<(), FormatError> {
        let Some(Value::Object(entries)) = self.map.get("auto_map") else { return Ok(()) };
        let there = names(dir)?;
        let mut kept = entries.clone();
        kept.retain(|_, value| {
            // `module.Class`, `repository--module.Class`, or a list of them for slow and fast tokenizers.
            let classes: Vec<&str> = match value {
                Value::String(class) => vec![class],
                Value::Array(list) => list.iter().filter_map(Value::as_str).collect(),
                _ => Vec::new(),
            };
            let file = |class: &str| format!("{}.py", class.split('.').next().unwrap_or_default());
            classes.iter().all(|class| class.contains("--") || there.contains(&file(class)))
        });
        match kept.is_empty() {
            true => self.remove("auto_map"),
            false => self.set("auto_map", Value::Object(kept)),
        }
        Ok(())
    }

    /// Writes the file as transformers does; unchanged ones keep their bytes.
    pub(crate) fn write(&self, dir: &Path) -> Result<(), FormatError> {
        let text = match self.changed {
            true => (json::to_python(&Value::Object(self.map.clone())) + "\n").into_bytes(),
            false => self.text.clone(),
        };
        atomic::write_bytes(&dir.join(CONFIG_FILE), &text)
    }
}

/// Copies what lies beside a model's weights and belongs to it: tokenizer, chat templates, settings, code. The
/// tokenizer's files come from another folder if given.
pub(crate) fn copy_companions(base: &Path, tokenizer_from: Option<&Path>, out: &Path) -> Result<(), FormatError> {
    let is_tokenizers = |name: &str| TOKENIZER_FILES.contains(&name) || name.starts_with(TOKENIZER_VERSIONS);
    for name in companions(base)?.iter().filter(|name| !is_tokenizers(name)) {
        copy(base, name, out)?;
    }
    let tokenizer = tokenizer_from.unwrap_or(base);
    for name in names(tokenizer)?.iter().filter(|name| is_tokenizers(name)) {
        copy(tokenizer, name, out)?;
    }
    let templates = tokenizer.join(MORE_TEMPLATES);
    let Ok(entries) = fs::read_dir(&templates) else { return Ok(()) };
    let target = out.join(MORE_TEMPLATES);
    fs::create_dir_all(&target).map_err(|source| FormatError::Write { path: target.clone(), source })?;
    for entry in entries {
        let entry = entry.map_err(|source| FormatError::Read { path: templates.clone(), source })?;
        if let Some(name) = entry.file_name().to_str().filter(|n| n.ends_with(".jinja")) {
            copy(tokenizer, &format!("{MORE_TEMPLATES}/{name}"), out)?;
        }
    }
    Ok(())
}

/// The names in a folder, sorted.
fn names(dir: &Path) -> Result<Vec<String>, FormatError> {
    let read = |source| FormatError::Read { path: dir.to_path_buf(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(read)? {
        names.extend(entry.map_err(read)?.file_name().into_string().ok());
    }
    names.sort();
    Ok(names)
}

/// The files of a model's folder that belong to the model and are no weights.
fn companions(dir: &Path) -> Result<Vec<String>, FormatError> {
    let mut names = names(dir)?;
    names.retain(|name| {
        (OTHER_FILES.iter().any(|end| name.ends_with(end)) || TERMS.iter().any(|start| name.starts_with(start)))
            && !NOT_COPIED.contains(&name.as_str())
            && !name.starts_with('.')
            && !name.ends_with(".index.json")
            && dir.join(name).metadata().is_ok_and(|meta| meta.is_file() && meta.len() <= LARGEST_FILE)
    });
    Ok(names)
}

fn copy(from: &Path, name: &str, out: &Path) -> Result<(), FormatError> {
    let Some(path) = resolve_inside(from, name, from)? else { return Ok(()) };
    let bytes = fs::read(&path).map_err(|source| FormatError::Read { path, source })?;
    atomic::write_bytes(&out.join(name), &bytes)
}

/// Copies a file into a folder, under its own name.
pub(crate) fn copy_file(path: &Path, out: &Path) -> Result<(), FormatError> {
    let bytes = fs::read(path).map_err(|source| FormatError::Read { path: path.to_path_buf(), source })?;
    atomic::write_bytes(&out.join(path.file_name().unwrap_or_default()), &bytes)
}

/// Whether `out` would overwrite what is being read.
pub(crate) fn refuse_same_folder(base: &Path, out: &Path) -> Result<(), FormatError> {
    let same = match (base.canonicalize(), out.canonicalize()) {
        (Ok(base), Ok(out)) => base.starts_with(&out) || out == base,
        _ => false,
    };
    match same {
        false => Ok(()),
        true => Err(FormatError::Write {
            path: out.to_path_buf(),
            source: std::io::Error::new(
                std::io::ErrorKind::InvalidInput,
                "it is, or holds, the checkpoint that is read; choose another folder",
            ),
        }),
    }
}

/// Owned elements of a floating-point tensor in their own type.
pub(crate) enum Owned {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
}

/// Runs the same code on whichever type the elements have.
macro_rules! with_owned {
    ($owned:expr, $x:ident => $body:expr) => {
        match $owned {
            $crate::convert::Owned::F32($x) => $body,
            $crate::convert::Owned::F16($x) => $body,
            $crate::convert::Owned::BF16($x) => $body,
        }
    };
}
pub(crate) use with_owned;

impl Owned {
    pub(crate) fn read(view: &TensorView<'_>) -> Result<Self, FormatError> {
        Ok(match view.floats()? {
            Floats::F32(x) => Self::F32(x.into_owned()),
            Floats::F16(x) => Self::F16(x.into_owned()),
            Floats::BF16(x) => Self::BF16(x.into_owned()),
        })
    }

    pub(crate) fn from_f32(x: &[f32], format: FloatFormat) -> Self {
        fn cast<E: Element>(x: &[f32]) -> Vec<E> {
            x.iter().map(|x| E::from_f32(*x)).collect()
        }
        match format {
            FloatFormat::F32 => Self::F32(x.to_vec()),
            FloatFormat::F16 => Self::F16(cast(x)),
            FloatFormat::BF16 => Self::BF16(cast(x)),
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        with_owned!(self, x => bytemuck::cast_slice(x))
    }

    pub(crate) fn to_f32(&self) -> Vec<f32> {
        with_owned!(self, x => x.iter().map(|x| Element::to_f32(*x)).collect())
    }
}

/// The safetensors name of a float format.
pub(crate) fn dtype_of(format: FloatFormat) -> Dtype {
    match format {
        FloatFormat::F32 => Dtype::F32,
        FloatFormat::F16 => Dtype::F16,
        FloatFormat::BF16 => Dtype::BF16,
    }
}

/// The float format of a safetensors type, if it is one of ours.
pub(crate) fn format_of(dtype: Dtype) -> Option<FloatFormat> {
    FloatFormat::ALL.into_iter().find(|f| dtype_of(*f) == dtype)
}

/// Whether a module's own name is that of an embedding.
fn is_embedding(name: &str) -> bool {
    let mut parts = name.split('_');
    parts.next() == Some("embed")
        || name.split('_').next_back().is_some_and(|last| ["embed", "embedding", "embeddings"].contains(&last))
}

/// The module whose weight bitsandbytes quantizes under this name, by transformers' rule: every linear
/// layer but the output head and the modules of `skip`.
///
/// A name of `skip` fits as a whole path, as its end, or as a folder of it. Embeddings are matrices too and
/// are known by their name (`embed_tokens`, `position_embedding`, `wte`); so are the routers of expert layers, which transformers 5 keeps as plain
/// parameters.
pub(crate) fn quantized_module<'a>(name: &'a str, shape: &[usize], skip: &[String]) -> Option<&'a str> {
    let module = name.strip_suffix(".weight")?;
    let last = module.rsplit('.').next()?;
    let kept = ["lm_head", "gate", "wte", "wpe", "shared", "relative_attention_bias"].contains(&last);
    let linear = shape.len() == 2 && !kept && !is_embedding(last);
    let skipped = skip.iter().any(|s| {
        module == s
            || module.strip_suffix(s.as_str()).is_some_and(|rest| rest.ends_with('.'))
            || module.strip_prefix(s.as_str()).is_some_and(|rest| rest.starts_with('.'))
            || module.contains(&format!(".{s}."))
    });
    (linear && !skipped).then_some(module)
}
