//! Writing a checkpoint as transformers lays it out: `model.safetensors`, or
//! `model-00001-of-0000N.safetensors` with `model.safetensors.index.json`.
//!
//! The names, types and shapes of all tensors are given first; the headers follow from them, so every
//! tensor's bytes go straight to their place and nothing is held in memory. Shards are filled in the
//! given order and split as `huggingface_hub.split_torch_state_dict_into_shards` does; inside a shard
//! the layout is that of PyTorch's writer. Nothing appears under its final name before
//! [`ShardedWriter::finish`].

use std::collections::HashMap;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tempfile::NamedTempFile;

use crate::atomic;
use crate::checkpoint::{INDEX_FILE, SINGLE_FILE};
use crate::error::FormatError;
use crate::header::{self, TensorSpec};
use crate::json;
use crate::sources::DenseTensor;

/// The largest shard that transformers 4 wrote by default: 5 GB.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;

/// Writes a checkpoint tensor by tensor, in any order.
#[derive(Debug)]
pub struct ShardedWriter {
    dir: PathBuf,
    shards: Vec<Shard>,
    places: HashMap<String, Place>,
    total_bytes: u64,
    total_parameters: u64,
}

#[derive(Debug)]
struct Shard {
    file: NamedTempFile,
    path: PathBuf,
    /// Tensors still to come.
    missing: usize,
}

#[derive(Debug)]
struct Place {
    shard: usize,
    offset: u64,
    bytes: usize,
    written: bool,
}

impl ShardedWriter {
    /// Plans the shards, at most `max_shard_bytes` of data each unless one tensor alone is larger, and
    /// opens them under temporary names in `dir`, which must exist.
    ///
    /// Write into a fresh folder ([`atomic::replace_dir`]) rather than over a checkpoint with another
    /// number of shards, whose files would stay.
    ///
    /// # Errors
    /// [`FormatError::Plan`] for a name that comes twice or a size that cannot be,
    /// [`FormatError::Write`].
    pub fn create(dir: &Path, tensors: Vec<TensorSpec>, max_shard_bytes: u64) -> Result<Self, FormatError> {
        let plan = |spec: &TensorSpec, reason: String| FormatError::Plan {
            path: dir.to_path_buf(),
            tensor: spec.name.clone(),
            reason,
        };
        let total_parameters = tensors.iter().map(|t| t.shape.iter().map(|&d| d as u64).product::<u64>()).sum();
        let shards = split(tensors, max_shard_bytes)
            .map_err(|spec| plan(&spec, format!("shape {:?} of {} has no valid size", spec.shape, spec.dtype)))?;
        let count = shards.len();
        let mut writer = Self {
            dir: dir.to_path_buf(),
            shards: Vec::with_capacity(count),
            places: HashMap::new(),
            total_bytes: 0,
            total_parameters,
        };
        for (i, mut specs) in shards.into_iter().enumerate() {
            header::sort_for_file(&mut specs);
            let name =
                if count == 1 { SINGLE_FILE.into() } else { format!("model-{:05}-of-{count:05}.safetensors", i + 1) };
            let path = dir.join(name);
            let (head, offsets) = header::encode(&specs).ok_or_else(|| FormatError::Header {
                file: path.clone(),
                reason: "the tensors are too large for one file".into(),
            })?;
            let write = |source| FormatError::Write { path: path.clone(), source };
            let mut file = atomic::temporary_beside(&path).map_err(write)?;
            // So that nobody takes it for a leftover. Where there are no locks, nobody does.
            let _ = file.as_file().try_lock();
            file.write_all(&head).map_err(write)?;
            for (spec, offset) in specs.iter().zip(offsets) {
                let bytes = spec.num_bytes().unwrap_or(0);
                writer.total_bytes += bytes as u64;
                let place = Place { shard: i, offset: offset as u64, bytes, written: false };
                if writer.places.insert(spec.name.clone(), place).is_some() {
                    return Err(plan(spec, "it was announced twice".into()));
                }
            }
            writer.shards.push(Shard { file, path, missing: specs.len() });
        }
        Ok(writer)
    }

    /// Writes one tensor's bytes, row-major and little-endian.
    ///
    /// # Errors
    /// [`FormatError::Plan`] for a tensor that was not announced, came before, or has another size;
    /// [`FormatError::Write`].
    pub fn write(&mut self, name: &str, data: &[u8]) -> Result<(), FormatError> {
        self.write_with(name, data.len(), |file, failed| file.write_all(data).map_err(failed))
    }

    /// Writes one tensor as a dense model has it, in pieces where it is decoded.
    ///
    /// # Errors
    /// As [`Self::write`] and [`DenseTensor::read`].
    pub fn write_tensor(&mut self, name: &str, tensor: &DenseTensor<'_>) -> Result<(), FormatError> {
        self.write_with(name, tensor.num_bytes(), |file, failed| {
            tensor.for_each_piece(|piece| file.write_all(piece).map_err(failed))
        })
    }

    fn write_with(
        &mut self,
        name: &str,
        bytes: usize,
        write_all: impl FnOnce(&mut NamedTempFile, &dyn Fn(std::io::Error) -> FormatError) -> Result<(), FormatError>,
    ) -> Result<(), FormatError> {
        let plan = |reason: String| FormatError::Plan { path: self.dir.clone(), tensor: name.to_string(), reason };
        let place = self.places.get_mut(name).ok_or_else(|| plan("it was not announced".into()))?;
        if place.written {
            return Err(plan("it was written before".into()));
        }
        if place.bytes != bytes {
            return Err(plan(format!("{bytes} bytes came, {} were announced", place.bytes)));
        }
        let shard = &mut self.shards[place.shard];
        let path = shard.path.clone();
        let write = |source| FormatError::Write { path: path.clone(), source };
        shard.file.seek(SeekFrom::Start(place.offset)).map_err(write)?;
        write_all(&mut shard.file, &write)?;
        place.written = true;
        shard.missing -= 1;
        if shard.missing == 0 {
            shard.file.as_file().sync_all().map_err(write)?;
        }
        Ok(())
    }

    /// The data of all tensors together, in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Gives the files their names, the index last, and returns their paths.
    ///
    /// # Errors
    /// [`FormatError::Plan`] when an announced tensor never came; [`FormatError::Write`].
    pub fn finish(self) -> Result<Vec<PathBuf>, FormatError> {
        let Self { dir, shards, places, total_bytes, total_parameters } = self;
        if let Some((name, _)) = places.iter().filter(|(_, p)| !p.written).min_by_key(|(name, _)| *name) {
            return Err(FormatError::Plan {
                path: dir,
                tensor: name.clone(),
                reason: "it was announced but never written".into(),
            });
        }
        let mut paths = Vec::with_capacity(shards.len() + 1);
        for shard in shards {
            shard
                .file
                .as_file()
                .sync_all()
                .map_err(|source| FormatError::Write { path: shard.path.clone(), source })?;
            shard
                .file
                .persist(&shard.path)
                .map_err(|e| FormatError::Write { path: shard.path.clone(), source: e.error })?;
            paths.push(shard.path);
        }
        if paths.len() > 1 {
            let file_name = |p: &Path| p.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let names: Vec<String> = paths.iter().map(|p| file_name(p)).collect();
            let map: Map<String, Value> =
                places.into_iter().map(|(name, p)| (name, names[p.shard].as_str().into())).collect();
            let index = json!({
                "metadata": {"total_parameters": total_parameters, "total_size": total_bytes},
                "weight_map": map,
            });
            let path = dir.join(INDEX_FILE);
            atomic::write_bytes(&path, (json::to_python(&index) + "\n").as_bytes())?;
            paths.push(path);
        }
        atomic::sync_dir(&dir).map_err(|source| FormatError::Write { path: dir, source })?;
        Ok(paths)
    }
}

/// Fills shards in order: a tensor that would exceed the limit opens the next one, and a tensor beyond
/// the limit by itself gets a shard of its own without closing the current one.
fn split(tensors: Vec<TensorSpec>, limit: u64) -> Result<Vec<Vec<TensorSpec>>, TensorSpec> {
    let mut shards = Vec::new();
    let (mut current, mut size) = (Vec::new(), 0u64);
    for spec in tensors {
        let Some(bytes) = spec.num_bytes() else { return Err(spec) };
        let bytes = bytes as u64;
        if bytes > limit {
            shards.push(vec![spec]);
            continue;
        }
        if size + bytes > limit && !current.is_empty() {
            shards.push(std::mem::take(&mut current));
            size = 0;
        }
        size += bytes;
        current.push(spec);
    }
    if !current.is_empty() || shards.is_empty() {
        shards.push(current);
    }
    Ok(shards)
}
