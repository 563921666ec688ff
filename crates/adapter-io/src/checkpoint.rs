//! A Hugging Face checkpoint: `model.safetensors`, or shards listed in `model.safetensors.index.json`.
//!
//! All files are mapped and their headers checked when the checkpoint is opened; tensors are then
//! views into the page cache. What a loader holds at any time is the tensor it is working on.
//!
//! Names are those of a dense model, whatever the files hold for its weights ([`crate::sources`]).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::error::{FormatError, nearest_names};
use crate::header::TensorInfo;
use crate::json;
use crate::mapped::{MappedFile, TensorView};
use crate::paths::resolve_inside;
use crate::sources::{Coded, DenseTensor, Found, find};

/// The file of a checkpoint that is not sharded.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// The index of one that is.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// An opened checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<MappedFile>,
    /// Name to file and position in the file's header.
    tensors: BTreeMap<String, (usize, usize)>,
    /// Weights in other storages, and the tensors that are their parts.
    found: Found,
    /// The names of a dense model's tensors, sorted.
    names: Vec<String>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens the checkpoint in `dir`: `model.safetensors` if there, else the shards of the index.
    ///
    /// # Errors
    /// [`FormatError::NoCheckpoint`], [`FormatError::MissingShard`], [`FormatError::Truncated`],
    /// [`FormatError::Header`], [`FormatError::UnsafePath`], or [`FormatError::MissingTensor`] when a
    /// shard lacks a tensor that the index places there; [`FormatError::Coded`] and [`FormatError::Field`] for weights in a
    /// storage that is not decoded.
    pub fn open(dir: &Path) -> Result<Self, FormatError> {
        let stored = match resolve_inside(dir, SINGLE_FILE, dir)? {
            Some(path) => Self::from_file(dir, &path)?,
            None => match resolve_inside(dir, INDEX_FILE, dir)? {
                Some(index) => Self::open_sharded(dir, &index)?,
                None => return Err(FormatError::NoCheckpoint { dir: dir.to_path_buf(), hint: what_is_there(dir) }),
            },
        };
        stored.with_sources()
    }

    /// Finds the weights that are to be decoded.
    fn with_sources(mut self) -> Result<Self, FormatError> {
        self.found = find(&self)?;
        if !self.found.coded.is_empty() {
            let Found { coded, parts } = &self.found;
            let mut names: Vec<String> = self.tensors.keys().filter(|name| !parts.contains(*name)).cloned().collect();
            names.extend(coded.keys().cloned());
            names.sort();
            self.names = names;
        }
        Ok(self)
    }

    /// Opens one safetensors file of any name; [`Self::dir`] is then the file.
    ///
    /// # Errors
    /// [`FormatError::Read`], [`FormatError::Truncated`], [`FormatError::Header`].
    pub fn open_file(path: &Path) -> Result<Self, FormatError> {
        Self::from_file(path, path)
    }

    fn from_file(dir: &Path, path: &Path) -> Result<Self, FormatError> {
        let file = MappedFile::open(path)?;
        let tensors = file.tensors().iter().enumerate().map(|(i, t)| (t.name.clone(), (0, i))).collect();
        Ok(Self::new(dir, vec![file], tensors))
    }

    fn open_sharded(dir: &Path, index_path: &Path) -> Result<Self, FormatError> {
        let index: Index = json::read(index_path)?;
        let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in &index.weight_map {
            shards.entry(shard).or_default().push(tensor);
        }
        let mut files = Vec::with_capacity(shards.len());
        let mut tensors = BTreeMap::new();
        for (shard, names) in shards {
            let path = resolve_inside(dir, shard, index_path)?.ok_or_else(|| FormatError::MissingShard {
                index: index_path.to_path_buf(),
                shard: dir.join(shard),
                tensors: names.len(),
                first: names.first().map_or_else(String::new, ToString::to_string),
            })?;
            let file = MappedFile::open(&path)?;
            for name in names {
                let position = file.position(name).ok_or_else(|| file.missing(name))?;
                tensors.insert(name.to_string(), (files.len(), position));
            }
            files.push(file);
        }
        Ok(Self::new(dir, files, tensors))
    }

    fn new(dir: &Path, files: Vec<MappedFile>, tensors: BTreeMap<String, (usize, usize)>) -> Self {
        let names = tensors.keys().cloned().collect();
        Self { dir: dir.to_path_buf(), files, tensors, found: Found::default(), names }
    }

    /// What the checkpoint was opened from: its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The files it is made of, in the order of their names.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(MappedFile::path)
    }

    /// Each file, and where in it the middles of its tensors lie.
    pub(crate) fn file_layouts(&self) -> impl Iterator<Item = (&Path, Vec<u64>)> {
        let middle = |t: &TensorInfo| (t.range.start + t.range.len() / 2) as u64;
        self.files.iter().map(move |file| (file.path(), file.tensors().iter().map(middle).collect()))
    }

    /// The names of all tensors of the dense model, sorted: of one that is stored in codes, that of the weight they are of.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// The names of all tensors in the order in which they lie in the files: reading along this order
    /// reads a disk forward.
    pub fn names_in_file_order(&self) -> Vec<&str> {
        let start = |name: &&str| {
            let stored = self.found.coded.get(*name).map_or(*name, Coded::codes);
            self.tensors.get(stored).map(|(f, i)| (*f, self.files[*f].tensors()[*i].range.start))
        };
        let mut names: Vec<&str> = self.names().collect();
        names.sort_by_key(start);
        names
    }

    /// Whether the dense model has a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.names.binary_search_by(|known| known.as_str().cmp(name)).is_ok()
    }

    /// The tensor of this name as a dense model has it.
    ///
    /// # Errors
    /// [`FormatError::MissingTensor`], which lists the nearest names.
    pub fn dense(&self, name: &str) -> Result<DenseTensor<'_>, FormatError> {
        let Some((name, coded)) = self.found.coded.get_key_value(name) else {
            return self.tensor(name).map(|view| DenseTensor::stored(view, self));
        };
        let codes = self.tensor(coded.codes())?;
        Ok(DenseTensor::coded(name, codes.file, coded, self))
    }

    /// The storage of a weight that is decoded, and the bytes of all that it is made of.
    pub(crate) fn coded(&self, name: &str) -> Option<(&'static str, u64)> {
        let coded = self.found.coded.get(name)?;
        let bytes = coded.parts().filter_map(|part| self.get(part)).map(|view| view.data.len() as u64).sum();
        Some((coded.kind, bytes))
    }

    /// The storages of weights that are decoded, each once; none for a checkpoint of plain floats.
    pub fn storages(&self) -> Vec<&'static str> {
        let mut kinds: Vec<_> = self.found.coded.values().map(|coded| coded.kind).collect();
        kinds.sort_unstable();
        kinds.dedup();
        kinds
    }

    /// The tensor of this name as it lies in a file: of a weight in another storage its codes, where they have its name.
    ///
    /// # Errors
    /// [`FormatError::MissingTensor`], which lists the nearest names.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, FormatError> {
        self.get(name).ok_or_else(|| FormatError::MissingTensor {
            path: if let [file] = &self.files[..] { file.path().to_path_buf() } else { self.dir.clone() },
            tensor: name.to_string(),
            nearest: nearest_names(name, self.names()),
        })
    }

    /// The tensor of this name as it lies in a file, if there is one.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.tensors.get(name).map(|&(file, position)| self.files[file].view(position))
    }

    /// Copies the bytes of `view` from `start` on, as many as `to` has, into memory of the caller's. The pages of a view of this
    /// checkpoint are not mapped for it. Threads may read at once.
    ///
    /// # Errors
    /// [`FormatError::Read`]: the file can't be read, or the view ends before.
    pub fn read(&self, view: &TensorView, start: usize, to: &mut [u8]) -> Result<(), FormatError> {
        let end = || FormatError::Read { path: view.file.into(), source: std::io::ErrorKind::UnexpectedEof.into() };
        let part = view.data.get(start..).and_then(|rest| rest.get(..to.len())).ok_or_else(end)?;
        let file = self.tensors.get(view.name).map(|&(file, _)| &self.files[file]);
        file.and_then(|file| file.read(part, to)).unwrap_or_else(|| {
            to.copy_from_slice(part);
            Ok(())
        })
    }

    /// Lets go of a tensor's part of the mapped file, once it has been read: a conversion then holds a few tensors,
    /// however large the checkpoint is. It can be read again.
    pub fn release(&self, name: &str) {
        let parts = self.found.coded.get(name).into_iter().flat_map(Coded::parts);
        for name in parts.chain([name]) {
            if let Some(&(file, position)) = self.tensors.get(name) {
                self.files[file].release(position);
            }
        }
    }

    /// The bytes of all tensors together as a dense model has them: what is read in all.
    pub fn dense_bytes(&self) -> u64 {
        let bytes = |name| self.dense(name).map_or(0, |tensor| tensor.num_bytes() as u64);
        self.names().map(bytes).sum()
    }

    /// The bytes of all tensors together, as they lie in the files.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|&(file, i)| self.files[file].tensors()[i].range.len() as u64).sum()
    }
}

/// Refuses a folder that is a PEFT adapter and no model, for who is about to look for a model's files in it.
///
/// # Errors
/// [`FormatError::NoCheckpoint`].
pub fn refuse_adapter(dir: &Path) -> Result<(), FormatError> {
    let has = |name: &str| dir.join(name).is_file();
    // Trainers save the base's config.json beside an adapter: only weights make it a model.
    if !has(crate::adapter_config::CONFIG_FILE) || has(SINGLE_FILE) || has(INDEX_FILE) {
        return Ok(());
    }
    Err(FormatError::NoCheckpoint { dir: dir.to_path_buf(), hint: what_is_there(dir) })
}

/// For the message that there is no checkpoint: what was probably meant.
fn what_is_there(dir: &Path) -> String {
    if !dir.is_dir() {
        return "; there is no such folder".into();
    }
    let names: Vec<String> = std::fs::read_dir(dir)
        .map(|entries| entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    let ends = |suffix: &str| names.iter().find(|n| n.ends_with(suffix));
    let is_weights = |name: &str| name.ends_with(".safetensors") || name == INDEX_FILE;
    if names.iter().any(|n| n == "adapter_config.json") {
        "; it is an adapter, give its base model and pass this folder as the adapter (--adapter)".into()
    } else if let Some(name) = names.iter().find(|n| is_weights(n) && !dir.join(n).exists()) {
        format!(
            "; {name} is a link to a file that is missing, as a download that broke off leaves it: download the model again"
        )
    } else if let Some(name) = ends(".gguf") {
        format!("; GGUF files such as {name} cannot be loaded, use the original checkpoint")
    } else if let Some(name) = ends(".bin").or_else(|| ends(".pth")).or_else(|| ends(".pt")) {
        format!(
            "; pickled weights such as {name} are not read, because loading them can run code; convert them to safetensors"
        )
    } else if let Some(name) = ends(".safetensors") {
        format!(
            "; it does hold {name}: rename it to {SINGLE_FILE} if it is the whole model, or download the missing {INDEX_FILE}"
        )
    } else {
        String::new()
    }
}
