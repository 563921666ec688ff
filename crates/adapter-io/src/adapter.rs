//! PEFT's `adapter_model.safetensors` with its `adapter_config.json`.
//!
//! Keys are `base_model.model.<module path>.lora_A.weight` [r, in] and `.lora_B.weight` [out, r], with
//! no adapter name inside: PEFT silently ignores keys that have one other than `default` and then runs the bare base
//! model, so such a file is an error here. Beside them: `.lora_embedding_A` [r, vocabulary] and
//! `.lora_embedding_B` [width, r] of an embedding, DoRA's `.lora_magnitude_vector`, `.lora_B.bias` with
//! `lora_bias`, rows of single tokens (see [`crate::token_rows`]), and whole tensors `base_model.model.<name>` of
//! modules that were trained in full.
//! Tensors of kinds that are not interpreted here are kept, and survive a load and save.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;

use safetensors::Dtype;

use crate::adapter_config::AdapterConfig;
use crate::adapter_names::plain_key;
use crate::atomic;
use crate::error::FormatError;
use crate::header::{self, TensorSpec};
use crate::host_tensor::HostTensor;
use crate::lora_module::{LoraModule, ModuleKind};
use crate::mapped::MappedFile;
use crate::paths::resolve_inside;
use crate::token_rows::WRAPPER;

/// The weights' file name.
pub(crate) const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// What every key starts with: the wrappers PEFT puts around a model.
pub const KEY_PREFIX: &str = "base_model.model.";
pub(crate) const A: &str = ".lora_A.weight";
pub(crate) const B: &str = ".lora_B.weight";
const EMBEDDING_A: &str = ".lora_embedding_A";
const EMBEDDING_B: &str = ".lora_embedding_B";
const MAGNITUDE: &str = ".lora_magnitude_vector";
const BIAS: &str = ".lora_B.bias";
const BASE_LAYER: &str = ".base_layer.weight";

/// A PEFT adapter: its configuration and its tensors by their PEFT keys.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Adapter {
    /// `adapter_config.json`.
    pub config: AdapterConfig,
    /// `adapter_model.safetensors`, in 32-bit floats.
    pub tensors: BTreeMap<String, HostTensor>,
}

impl Adapter {
    /// An adapter without tensors.
    pub fn new(config: AdapterConfig) -> Self {
        Self { config, tensors: BTreeMap::new() }
    }

    /// Reads an adapter's folder. Weights in F16, BF16 or F64 are converted to 32-bit floats.
    ///
    /// # Errors
    /// [`FormatError::NotAnAdapter`] when a file is missing or holds no tensors, [`FormatError::NotFinite`],
    /// [`FormatError::AdapterKey`] for keys that PEFT would ignore or that lack their counterpart, [`FormatError::Factors`] when `lora_a`,
    /// `lora_b` and the configured rank disagree, or tokens and their rows, and the errors of [`AdapterConfig::load`].
    pub fn load(dir: &Path) -> Result<Self, FormatError> {
        let config = AdapterConfig::load(dir)?;
        let path = resolve_inside(dir, WEIGHTS_FILE, dir)?.ok_or_else(|| {
            let pickled = dir.join("adapter_model.bin").exists();
            let cure =
                if pickled { "; convert adapter_model.bin to safetensors, pickled weights are not read" } else { "" };
            FormatError::NotAnAdapter { dir: dir.to_path_buf(), reason: format!("it has no {WEIGHTS_FILE}{cure}") }
        })?;
        let file = MappedFile::open(&path)?;
        let mut tensors = BTreeMap::new();
        for index in 0..file.tensors().len() {
            let view = file.view(index);
            let bad_key = |reason| FormatError::AdapterKey { file: path.clone(), key: view.name.to_string(), reason };
            let key = plain_key(view.name).map_err(bad_key)?.into_owned();
            view.expect_finite()?;
            let tensor = HostTensor { shape: view.shape.clone(), data: view.to_f32_vec()? };
            if tensors.insert(key, tensor).is_some() {
                return Err(bad_key(
                    "it is there twice, with the adapter's name inside and without; remove one".into(),
                ));
            }
        }
        if tensors.is_empty() {
            return Err(FormatError::NotAnAdapter {
                dir: dir.to_path_buf(),
                reason: format!(
                    "{WEIGHTS_FILE} holds no tensors, as a save that got the wrong state leaves it (one process of a sharded run, say); save the adapter again from its training checkpoint"
                ),
            });
        }
        let adapter = Self { config, tensors };
        adapter.check_pairs(&path)?;
        adapter.lora_modules()?;
        adapter.token_rows()?;
        Ok(adapter)
    }

    /// Writes both files into `dir`, which is made if it is not there.
    ///
    /// Each file replaces its predecessor as a whole. To replace a whole adapter at once, save into the
    /// folder that [`atomic::replace_dir`] hands out.
    ///
    /// # Errors
    /// [`FormatError::Write`], [`FormatError::Factors`], [`FormatError::Field`].
    pub fn save(&self, dir: &Path) -> Result<(), FormatError> {
        self.lora_modules()?;
        self.token_rows()?;
        let path = dir.join(WEIGHTS_FILE);
        std::fs::create_dir_all(dir).map_err(|source| FormatError::Write { path: dir.to_path_buf(), source })?;
        let mut specs: Vec<_> = self.tensors.iter().map(|(k, t)| TensorSpec::new(k, Dtype::F32, &t.shape)).collect();
        header::sort_for_file(&mut specs);
        let (head, _) = header::encode(&specs)
            .ok_or_else(|| FormatError::Header { file: path.clone(), reason: "the tensors are too large".into() })?;
        atomic::write_file(&path, |out| {
            out.write_all(&head)?;
            for tensor in specs.iter().filter_map(|s| self.tensors.get(&s.name)) {
                out.write_all(bytemuck::cast_slice(&tensor.data))?;
            }
            Ok(())
        })?;
        self.config.save(dir)
    }

    /// The paths of the linear modules with LoRA factors, sorted; e.g. `model.layers.0.self_attn.q_proj`.
    pub fn modules(&self) -> Vec<String> {
        self.with_suffix(A)
    }

    /// The paths of the embeddings with LoRA factors, sorted; e.g. `model.embed_tokens`.
    pub fn embeddings(&self) -> Vec<String> {
        self.with_suffix(EMBEDDING_A)
    }

    fn with_suffix(&self, suffix: &str) -> Vec<String> {
        let strip = |key: &String| Some(key.strip_prefix(KEY_PREFIX)?.strip_suffix(suffix)?.to_string());
        self.tensors.keys().filter_map(strip).collect()
    }

    /// The tensors of the base model that were trained in full (`modules_to_save`, and biases with `bias`
    /// other than `none`), by the name they have there.
    pub fn saved_tensors(&self) -> impl Iterator<Item = (String, &HostTensor)> {
        let factor = |key: &str| {
            [A, B, EMBEDDING_A, EMBEDDING_B, MAGNITUDE, BIAS].iter().any(|suffix| key.ends_with(suffix))
                || key.ends_with(BASE_LAYER)
                || key.contains(WRAPPER)
        };
        self.tensors.iter().filter(move |(key, _)| !factor(key)).filter_map(|(key, tensor)| {
            // PEFT 0.4 and before left the wrapper's name inside.
            Some((key.strip_prefix(KEY_PREFIX)?.replace(".modules_to_save.", "."), tensor))
        })
    }

    /// The base weight of an adapted embedding, which PEFT saves along with its factors.
    pub fn saved_base(&self, module: &str) -> Option<&HostTensor> {
        self.module_tensor(module, BASE_LAYER)
    }

    /// Everything the adapter holds for one module, checked against the configuration; `None` for a module
    /// without factors.
    ///
    /// # Errors
    /// [`FormatError::Factors`] when the parts do not fit each other or the configuration.
    pub fn lora_module(&self, path: &str) -> Result<Option<LoraModule<'_>>, FormatError> {
        Ok(self.of_paths(vec![path.to_string()])?.pop())
    }

    /// [`Self::lora_module`] of every module and embedding.
    ///
    /// # Errors
    /// As [`Self::lora_module`].
    pub fn lora_modules(&self) -> Result<Vec<LoraModule<'_>>, FormatError> {
        self.of_paths(self.modules().into_iter().chain(self.embeddings()).collect())
    }

    fn of_paths(&self, paths: Vec<String>) -> Result<Vec<LoraModule<'_>>, FormatError> {
        let configured = self.config.scalings(&paths)?;
        let mut modules = Vec::with_capacity(paths.len());
        for (path, configured) in paths.into_iter().zip(configured) {
            let (kind, lora_a, lora_b) = match (self.lora(&path), self.embedding(&path)) {
                (Some((a, b)), _) => (ModuleKind::Linear, a, b),
                (None, Some((a, b))) => (ModuleKind::Embedding, a, b),
                (None, None) => continue,
            };
            let (bias, magnitude) = (self.module_tensor(&path, BIAS), self.module_tensor(&path, MAGNITUDE));
            let scaling = configured.scaling as f32;
            let module = LoraModule { path, kind, lora_a, lora_b, bias, magnitude, scaling };
            module.check(&self.config, configured.rank)?;
            modules.push(module);
        }
        Ok(modules)
    }

    /// `lora_embedding_A` [r, vocabulary] and `lora_embedding_B` [width, r] of an embedding.
    pub fn embedding(&self, module: &str) -> Option<(&HostTensor, &HostTensor)> {
        Some((self.module_tensor(module, EMBEDDING_A)?, self.module_tensor(module, EMBEDDING_B)?))
    }

    /// `lora_a` [r, in] and `lora_b` [out, r] of a module.
    pub fn lora(&self, module: &str) -> Option<(&HostTensor, &HostTensor)> {
        Some((self.module_tensor(module, A)?, self.module_tensor(module, B)?))
    }

    /// Any other tensor of a module by the end of its key, e.g. `.lora_magnitude_vector`.
    pub fn module_tensor(&self, module: &str, suffix: &str) -> Option<&HostTensor> {
        self.tensors.get(&format!("{KEY_PREFIX}{module}{suffix}"))
    }

    /// The keys that belong to no pair of LoRA factors: DoRA, embeddings, biases, saved modules.
    pub fn other_keys(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str).filter(|k| !k.ends_with(A) && !k.ends_with(B))
    }

    fn check_pairs(&self, file: &Path) -> Result<(), FormatError> {
        for (first, second) in [(A, B), (EMBEDDING_A, EMBEDDING_B)] {
            let stems = |suffix: &'static str| -> BTreeSet<&str> {
                self.tensors.keys().filter_map(move |k| k.strip_suffix(suffix)).collect()
            };
            let (a, b) = (stems(first), stems(second));
            if let Some(stem) = a.symmetric_difference(&b).next() {
                let (has, lacks) = if a.contains(stem) { (first, second) } else { (second, first) };
                return Err(FormatError::AdapterKey {
                    file: file.to_path_buf(),
                    key: format!("{stem}{has}"),
                    reason: format!("its counterpart `{stem}{lacks}` is missing; the file is incomplete"),
                });
            }
        }
        let has_factors = |suffix: &str, stem: &str| {
            suffix == MAGNITUDE && self.tensors.contains_key(&format!("{stem}{EMBEDDING_A}"))
                || self.tensors.contains_key(&format!("{stem}{A}"))
        };
        for suffix in [MAGNITUDE, BIAS] {
            let lost =
                self.tensors.keys().find(|k| k.strip_suffix(suffix).is_some_and(|stem| !has_factors(suffix, stem)));
            if let Some(key) = lost {
                return Err(FormatError::AdapterKey {
                    file: file.to_path_buf(),
                    key: key.clone(),
                    reason: "its module has no LoRA factors; the file is incomplete".into(),
                });
            }
        }
        Ok(())
    }
}
