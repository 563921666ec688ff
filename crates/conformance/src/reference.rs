//! The reference folder: where things are, without knowing what they are called.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use burn_qlora::adapter_io::{Checkpoint, TensorView};
use serde::de::DeserializeOwned;
use serde_json::Value;

/// A folder in the layout of `make_reference.py`.
#[derive(Debug, Clone)]
pub struct Reference {
    root: PathBuf,
}

impl Reference {
    /// The folder at `root`.
    ///
    /// # Errors
    /// There is no such folder.
    pub fn open(root: &Path) -> Result<Self> {
        if !root.is_dir() {
            bail!("{}: no such folder", root.display());
        }
        Ok(Self { root: root.to_path_buf() })
    }

    /// A path inside it.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    /// The path of a file or folder, if it is there.
    pub fn find(&self, relative: &str) -> Option<PathBuf> {
        Some(self.path(relative)).filter(|path| path.exists())
    }

    /// A parsed JSON file.
    pub(crate) fn json<T: DeserializeOwned>(&self, relative: &str) -> Result<T> {
        let path = self.path(relative);
        let text = fs::read(&path).with_context(|| path.display().to_string())?;
        serde_json::from_slice(&text).with_context(|| path.display().to_string())
    }

    /// A file of tensors.
    pub(crate) fn tensors(&self, relative: &str) -> Result<Checkpoint> {
        Ok(Checkpoint::open_file(&self.path(relative))?)
    }

    /// The names of the folders inside `relative`, sorted.
    pub(crate) fn folders(&self, relative: &str) -> Result<Vec<String>> {
        let path = self.path(relative);
        let mut names = Vec::new();
        for entry in fs::read_dir(&path).with_context(|| path.display().to_string())? {
            let entry = entry?;
            if entry.path().is_dir() {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// The folders of models at the top, sorted, and whether bitsandbytes has quantized them.
    pub(crate) fn models(&self) -> Result<Vec<(String, bool)>> {
        let mut models = Vec::new();
        for name in self.folders("")? {
            if self.find(&format!("{name}/config.json")).is_some() {
                let config: Value = self.json(&format!("{name}/config.json"))?;
                models.push((name, config.get("quantization_config").is_some_and(|q| !q.is_null())));
            }
        }
        Ok(models)
    }

    /// The unquantized model that a name recorded in the files stands for: the folder of that name, or
    /// the only unquantized model there is (the files may have been made with a model from elsewhere).
    pub(crate) fn base_model(&self, recorded: &str) -> Result<Option<PathBuf>> {
        let name = recorded.trim_end_matches('/').rsplit('/').next().unwrap_or(recorded);
        let models: Vec<String> =
            self.models()?.into_iter().filter(|(_, quantized)| !quantized).map(|(name, _)| name).collect();
        Ok(match &models[..] {
            _ if models.iter().any(|model| model == name) => Some(self.path(name)),
            [only] => Some(self.path(only)),
            _ => None,
        })
    }

    /// The first unquantized model that has a tokenizer.
    pub(crate) fn tokenizer(&self) -> Result<Option<PathBuf>> {
        let has_tokenizer = |name: &String| self.find(&format!("{name}/tokenizer.json")).is_some();
        let mut names = self.models()?.into_iter().filter(|(_, quantized)| !quantized).map(|(name, _)| name);
        Ok(names.find(has_tokenizer).map(|name| self.path(&name)))
    }
}

/// A tensor with a fixed number of dimensions.
pub(crate) fn dims<const D: usize>(view: &TensorView) -> Result<[usize; D]> {
    match view.shape.as_slice().try_into() {
        Ok(dims) => Ok(dims),
        Err(_) => {
            bail!("{}: tensor `{}` has shape {:?}, expected {D} dimensions", view.file.display(), view.name, view.shape)
        }
    }
}
