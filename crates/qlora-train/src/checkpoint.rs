//! Training checkpoints: everything that a run needs to go on as if it had never stopped.
//!
//! A checkpoint is a folder `checkpoint-<step>` that is also a PEFT adapter:
//!
//! | file | content |
//! |---|---|
//! | `adapter_config.json`, `adapter_model.safetensors` | the adapter, readable by PEFT |
//! | `optimizer.safetensors` | the optimizer's moments as they are: `<module>.<part>.<m or v>`, f32, or u8 codes with `….absmax`, f32; the optimizer's name in the metadata |
//! | `training_state.json` | step, position in the data, seed, and the run's configuration |
//!
//! No generator state is stored because none exists: shuffling, dropout masks and the evaluation split
//! are pure functions of the seed and of the positions that are stored, and the learning rate is one
//! of the step. Folders are put in place whole, so a run that is killed while saving leaves the older
//! checkpoint as it was.

use crate::config::TrainConfig;
use crate::error::TrainError;
use adapter_io::{Adapter, FormatError, atomic};
use paged_optim::{Moment, Moments, OptimizerKind};
use qlora_data::Position;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

const STATE_FILE: &str = "training_state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// Key of the optimizer's name in that file's metadata.
const OPTIMIZER_KEY: &str = "optimizer";
const PREFIX: &str = "checkpoint-";
/// To be increased when older checkpoints can no longer be resumed.
const VERSION: u32 = 1;

/// Where a run stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainingState {
    /// Version of this layout.
    pub version: u32,
    /// Optimizer steps done.
    pub step: usize,
    /// Pass over the training rows, from 0.
    pub epoch: usize,
    /// Micro-batches of this pass that are done.
    pub position: usize,
    /// Training rows, to notice that the data changed.
    pub train_rows: usize,
    /// Tokens of the training rows, to notice that the data changed.
    pub train_tokens: u64,
    /// The configuration as TOML.
    pub config: String,
}

impl TrainingState {
    /// The state of a run after `step` steps, whose next micro-batch stands at `position`.
    ///
    /// # Errors
    /// The configuration has no form in TOML.
    pub(crate) fn new(
        config: &TrainConfig,
        step: usize,
        position: Position,
        train_rows: usize,
        train_tokens: u64,
    ) -> Result<Self, TrainError> {
        let Position { epoch, batch } = position;
        let config = config.to_toml()?;
        Ok(Self { version: VERSION, step, epoch, position: batch, train_rows, train_tokens, config })
    }

    /// Where the next micro-batch stands in the training rows.
    pub(crate) fn batch_position(&self) -> Position {
        Position { epoch: self.epoch, batch: self.position }
    }
}

/// A training checkpoint read back.
#[derive(Debug)]
pub struct TrainingCheckpoint {
    /// Where it lies.
    pub path: PathBuf,
    /// Where the run stood.
    pub state: TrainingState,
    /// The adapter.
    pub adapter: Adapter,
}

/// Writes `output_dir/checkpoint-<step>`, then removes the oldest checkpoints beyond `save_limit` (0 keeps all).
///
/// `moments` are those of `kind` for `parameters`, named and ordered as the model lists them. Returns the folder.
///
/// # Errors
/// The folder can't be written; older checkpoints are untouched then.
pub(crate) fn save(
    output_dir: &Path,
    state: &TrainingState,
    adapter: &Adapter,
    parameters: &[String],
    (kind, moments): (OptimizerKind, &[Moments]),
    save_limit: usize,
) -> Result<PathBuf, TrainError> {
    let path = output_dir.join(format!("{PREFIX}{:06}", state.step));
    atomic::replace_dir(&path, |dir| -> Result<(), TrainError> {
        adapter.save(dir)?;
        let optimizer = serialize_moments(parameters, kind, moments)
            .map_err(|problem| TrainError::Checkpoint { path: dir.join(OPTIMIZER_FILE), problem })?;
        atomic::write_bytes(&dir.join(OPTIMIZER_FILE), &optimizer)?;
        let json = serde_json::to_vec_pretty(state)
            .map_err(|e| TrainError::Checkpoint { path: dir.join(STATE_FILE), problem: e.to_string() })?;
        Ok(atomic::write_bytes(&dir.join(STATE_FILE), &json)?)
    })?;
    if save_limit > 0 {
        let mut all = list(output_dir)?;
        all.truncate(all.len().saturating_sub(save_limit));
        for (_, old) in all {
            std::fs::remove_dir_all(&old).map_err(|source| FormatError::Write { path: old.clone(), source })?;
        }
    }
    Ok(path)
}

/// The checkpoints of a run by step, oldest first.
///
/// # Errors
/// The folder is there and can't be read.
pub fn list(output_dir: &Path) -> Result<Vec<(usize, PathBuf)>, TrainError> {
    let read = |source| FormatError::Read { path: output_dir.into(), source };
    let entries = match std::fs::read_dir(output_dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(read)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(read)?.path();
        let step = path.file_name().and_then(|name| name.to_str()?.strip_prefix(PREFIX)?.parse().ok());
        if let (Some(step), true) = (step, path.join(STATE_FILE).is_file()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Reads a checkpoint's state and adapter.
///
/// # Errors
/// The folder is no training checkpoint, or one of another version.
pub fn load(path: &Path) -> Result<TrainingCheckpoint, TrainError> {
    let fail = |problem: String| TrainError::Checkpoint { path: path.into(), problem };
    let text = std::fs::read(path.join(STATE_FILE))
        .map_err(|e| fail(format!("no training checkpoint: {STATE_FILE}: {e}; give a `checkpoint-<step>` folder")))?;
    let state: TrainingState = serde_json::from_slice(&text).map_err(|e| fail(format!("{STATE_FILE}: {e}")))?;
    if state.version != VERSION {
        return Err(fail(format!("version {} of the layout; this program reads version {VERSION}", state.version)));
    }
    Ok(TrainingCheckpoint { path: path.into(), state, adapter: Adapter::load(path)? })
}

impl TrainingCheckpoint {
    /// The moments of the optimizer `kind` for `parameters`.
    ///
    /// # Errors
    /// The file is missing or damaged, was saved by another optimizer, or lacks a parameter.
    pub fn moments(&self, parameters: &[String], kind: OptimizerKind) -> Result<Vec<Moments>, TrainError> {
        let path = self.path.join(OPTIMIZER_FILE);
        let fail = |problem: String| TrainError::Checkpoint { path: path.clone(), problem };
        let bytes = std::fs::read(&path).map_err(|e| fail(e.to_string()))?;
        let damaged = |e: safetensors::SafeTensorError| fail(format!("damaged: {e}"));
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(damaged)?;
        // Files from before there was a choice don't say: they are AdamW's.
        let saved = metadata.metadata().as_ref().and_then(|map| map.get(OPTIMIZER_KEY));
        let saved = saved.map_or(OptimizerKind::AdamW32bit.name(), String::as_str);
        if saved != kind.name() {
            return Err(fail(format!(
                "was saved by the optimizer {saved}, this run has train.optimizer = {kind}: restore the key, or start afresh in another train.output_dir"
            )));
        }
        let file = SafeTensors::deserialize(&bytes).map_err(damaged)?;
        let tensor = |name: &str| {
            file.tensor(name)
                .map_err(|_| fail(format!("no tensor `{name}`: the checkpoint belongs to another adapter")))
        };
        let floats = |name: &str, view: &TensorView<'_>| match view.dtype() {
            Dtype::F32 => Ok(view.data().as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()),
            dtype => Err(fail(format!("`{name}` is {dtype:?}, expected F32"))),
        };
        let moment = |name: String| -> Result<Moment, TrainError> {
            let view = tensor(&name)?;
            match view.dtype() {
                Dtype::U8 => {
                    let absmax = format!("{name}.absmax");
                    let absmax = floats(&absmax, &tensor(&absmax)?)?;
                    Ok(Moment::Block8 { codes: view.data().to_vec(), absmax })
                }
                _ => floats(&name, &view).map(Moment::Full),
            }
        };
        parameters
            .iter()
            .map(|name| kind.moments().iter().map(|part| moment(format!("{name}.{part}"))).collect())
            .collect()
    }

    /// Refuses to go on with settings that would make it another run.
    ///
    /// # Errors
    /// Names the keys that differ, with both values.
    pub(crate) fn check_config(&self, config: &TrainConfig) -> Result<(), TrainError> {
        let fail = |problem: String| TrainError::Checkpoint { path: self.path.clone(), problem };
        let table =
            |text: &str| text.parse::<toml::Table>().map_err(|e| fail(format!("its configuration is damaged: {e}")));
        let (mut saved, now) = (table(&self.state.config)?, table(&config.to_toml()?)?);
        // From before there was a choice of optimizer.
        if let Some(toml::Value::Table(train)) = saved.get_mut("train") {
            train.entry("optimizer").or_insert_with(|| OptimizerKind::AdamW32bit.name().into());
        }
        let differing: Vec<String> = differences(&saved, &now)
            .into_iter()
            .filter(|line| !FREE_KEYS.iter().any(|key| line.starts_with(&format!("{key} "))))
            .collect();
        match differing.is_empty() {
            true => Ok(()),
            false => Err(fail(format!(
                "was made with other settings, so going on would be neither run: {}; restore them, or start afresh in another train.output_dir",
                differing.join("; ")
            ))),
        }
    }
}

/// Keys that may change between stop and resume: they do not touch the arithmetic of the steps to come,
/// or are meant to be changed.
const FREE_KEYS: &[&str] = &[
    "device",
    "model.path",
    "data.eval",
    "train.output_dir",
    "train.epochs",
    "train.max_steps",
    "train.optimizer_budget",
    "train.activation_checkpointing",
    "train.eval_every",
    "train.save_every",
    "train.save_limit",
    "train.log_every",
];

/// `section.key was A, now is B` for every key that differs.
fn differences(saved: &toml::Table, now: &toml::Table) -> Vec<String> {
    fn flatten<'a>(prefix: &str, table: &'a toml::Table, into: &mut BTreeMap<String, &'a toml::Value>) {
        for (key, value) in table {
            let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
            match value {
                toml::Value::Table(table) => flatten(&key, table, into),
                value => {
                    into.insert(key, value);
                }
            }
        }
    }
    let (mut before, mut after) = (BTreeMap::new(), BTreeMap::new());
    flatten("", saved, &mut before);
    flatten("", now, &mut after);
    let show = |value: Option<&&toml::Value>| value.map_or("absent".to_string(), |value| value.to_string());
    let keys: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    keys.into_iter()
        .filter(|key| before.get(*key) != after.get(*key))
        .map(|key| format!("{key} was {}, now is {}", show(before.get(key)), show(after.get(key))))
        .collect()
}

fn serialize_moments(parameters: &[String], kind: OptimizerKind, moments: &[Moments]) -> Result<Vec<u8>, String> {
    let mut views: Vec<(String, TensorView<'_>)> = Vec::new();
    for (name, moments) in parameters.iter().zip(moments) {
        for (part, moment) in kind.moments().iter().zip(moments) {
            let name = format!("{name}.{part}");
            let mut push = |name: String, dtype, len, data| -> Result<(), String> {
                views.push((name, TensorView::new(dtype, vec![len], data).map_err(|e| e.to_string())?));
                Ok(())
            };
            match moment {
                Moment::Full(values) => push(name, Dtype::F32, values.len(), bytemuck::cast_slice(values))?,
                Moment::Block8 { codes, absmax } => {
                    push(format!("{name}.absmax"), Dtype::F32, absmax.len(), bytemuck::cast_slice(absmax))?;
                    push(name, Dtype::U8, codes.len(), codes)?;
                }
            }
        }
    }
    let metadata = HashMap::from([(OPTIMIZER_KEY.to_string(), kind.name().to_string())]);
    safetensors::serialize(views, Some(metadata)).map_err(|e| e.to_string())
}
