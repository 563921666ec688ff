//! Training checkpoints: everything that a run needs to go on as if it had never stopped.
//!
//! A checkpoint is a folder `checkpoint-<step>` that is also a PEFT adapter:
//!
//! | file | content |
//! |---|---|
//! | `adapter_config.json`, `adapter_model.safetensors` | the adapter, readable by PEFT |
//! | `chat_template.jinja`, `prompt_settings.json`, the tokenizer's settings | how rows were written as text: [`chat_text::Prompting`] |
//! | `optimizer.safetensors` | the optimizer's moments as they are: `<module>.<part>.<m or v>`, f32, or u8 codes with `….absmax`, f32; the optimizer's name in the metadata |
//! | `training_state.json` | step, position in the data, the loss scale, the run's configuration, and identities of what it stands on |
//! | `checksums.json` | SHA-256 of every other file |
//!
//! No generator state is stored because none exists: shuffling, dropout masks and the evaluation split
//! are pure functions of the seed and of the positions that are stored, and the learning rate is one
//! of the step. Folders are put in place whole, so a run that is killed while saving leaves the older
//! checkpoint as it was.

mod changes;
mod moments;

use crate::config::TrainConfig;
use crate::error::TrainError;
use crate::loss_scale::LossScalerState;
use crate::prompts::{self, Prompts};
use adapter_io::checksum::{self, Manifest};
use adapter_io::{Adapter, FormatError, atomic};
use paged_optim::{Moment, Moments, OptimizerKind};
use qlora_data::Position;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

pub use changes::Basis;
pub(crate) use changes::{key_of, settings};

const STATE_FILE: &str = "training_state.json";
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
const PREFIX: &str = "checkpoint-";
/// To be increased when older checkpoints can no longer be resumed.
const VERSION: u32 = 2;

/// Files of a checkpoint, or of an adapter, that a run writes.
pub(crate) const FILES: &[&str] = &[
    "adapter_config.json",
    "adapter_model.safetensors",
    OPTIMIZER_FILE,
    STATE_FILE,
    checksum::MANIFEST_FILE,
    prompts::FILES[0],
    prompts::FILES[1],
    prompts::FILES[2],
    prompts::FILES[3],
];

/// Where a run stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TrainingState {
    /// Version of this layout.
    pub version: u32,
    /// Optimizer steps done, those that loss scaling skipped among them.
    pub step: usize,
    /// Pass over the training rows, from 0.
    pub epoch: usize,
    /// Micro-batches of this pass that are done.
    pub position: usize,
    /// Training rows.
    pub train_rows: usize,
    /// Tokens of the training rows.
    pub train_tokens: u64,
    /// What the run stands on.
    pub basis: Basis,
    /// The evaluations so far.
    pub evaluations: Evaluations,
    /// The loss scale, where the run has one or had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scaler: Option<LossScalerState>,
    /// The configuration as TOML.
    pub config: String,
}

/// What the evaluations of a run say so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluations {
    /// Step and value of the best one.
    pub best: Option<(usize, f64)>,
    /// Evaluations since the best one that early stopping counts.
    pub since_best: usize,
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
        (train_rows, train_tokens): (usize, u64),
        basis: Basis,
        evaluations: Evaluations,
    ) -> Result<Self, TrainError> {
        let Position { epoch, batch } = position;
        let config = config.to_toml()?;
        Ok(Self {
            version: VERSION,
            step,
            epoch,
            position: batch,
            train_rows,
            train_tokens,
            basis,
            evaluations,
            loss_scaler: None,
            config,
        })
    }

    /// Updates of the optimizer so far.
    pub(crate) fn updates(&self) -> u64 {
        (self.step as u64).saturating_sub(self.loss_scaler.map_or(0, |state| state.skipped_steps))
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

/// What a checkpoint holds besides the state.
pub(crate) struct Contents<'a> {
    pub adapter: &'a Adapter,
    pub prompts: &'a Prompts,
    /// Names of the parameters, in the model's order.
    pub parameters: &'a [String],
    pub optimizer: OptimizerKind,
    /// The optimizer's moments for the parameters.
    pub moments: &'a [Moments],
}

impl Contents<'_> {
    /// Names of parameters and moments that hold values which are not finite.
    pub(crate) fn not_finite(&self) -> Vec<String> {
        let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
        let tensors = self.adapter.tensors.iter().filter(|(_, tensor)| !finite(&tensor.data));
        let mut found: Vec<String> = tensors.map(|(name, _)| name.clone()).collect();
        for (name, moments) in self.parameters.iter().zip(self.moments) {
            let parts = self.optimizer.moments().iter().zip(moments).filter(|(_, moment)| match moment {
                Moment::Full(values) => !finite(values),
                Moment::Block8 { absmax, .. } => !finite(absmax),
            });
            found.extend(parts.map(|(part, _)| format!("{name}.{part} of the optimizer")));
        }
        found
    }
}

/// Writes `output_dir/checkpoint-<step>` and returns the folder.
///
/// # Errors
/// The folder can't be written; older checkpoints are untouched then.
pub(crate) fn save(output_dir: &Path, state: &TrainingState, contents: &Contents<'_>) -> Result<PathBuf, TrainError> {
    let path = path_of(output_dir, state.step);
    atomic::replace_dir(&path, |dir| -> Result<(), TrainError> {
        let fail = |file: &str, problem: String| TrainError::Checkpoint { path: dir.join(file), problem };
        contents.adapter.save(dir)?;
        contents.prompts.save(dir)?;
        let optimizer = moments::serialize(contents.parameters, contents.optimizer, contents.moments)
            .map_err(|problem| fail(OPTIMIZER_FILE, problem))?;
        atomic::write_bytes(&dir.join(OPTIMIZER_FILE), &optimizer)?;
        let json = serde_json::to_vec_pretty(state).map_err(|e| fail(STATE_FILE, e.to_string()))?;
        atomic::write_bytes(&dir.join(STATE_FILE), &json)?;
        Ok(Manifest::of(dir)?.save(dir)?)
    })?;
    Ok(path)
}

/// Removes the oldest checkpoints beyond `limit` (0 keeps all), but for the one of step `keep`. Returns what could not be removed, with
/// the reasons.
///
/// # Errors
/// The folder can't be read.
pub(crate) fn prune(output_dir: &Path, limit: usize, keep: Option<usize>) -> Result<Vec<String>, TrainError> {
    if limit == 0 {
        return Ok(Vec::new());
    }
    let mut old = list(output_dir)?;
    old.truncate(old.len().saturating_sub(limit));
    old.retain(|(step, _)| keep != Some(*step));
    let removed = old.iter().map(|(_, path)| (path, atomic::remove_dir_of(path, FILES)));
    Ok(removed
        .filter_map(|(path, removed)| {
            removed.err().map(|error| format!("the old checkpoint {} stays: {error}", path.display()))
        })
        .collect())
}

/// Where the checkpoint of a step lies.
pub(crate) fn path_of(output_dir: &Path, step: usize) -> PathBuf {
    output_dir.join(format!("{PREFIX}{step:06}"))
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

/// Reads a checkpoint's adapter and state. The optimizer's moments are read when they are asked for.
///
/// # Errors
/// The folder holds no training checkpoint, one of another version, or one with a damaged file: the message names the file and the
/// newest older checkpoint that is whole.
pub fn load(path: &Path) -> Result<TrainingCheckpoint, TrainError> {
    let fail = |problem: String| TrainError::Checkpoint { path: path.into(), problem };
    let text = std::fs::read(path.join(STATE_FILE))
        .map_err(|e| fail(format!("no training checkpoint: {STATE_FILE}: {e}; give a `checkpoint-<step>` folder")))?;
    let damaged = |error: &FormatError| {
        let older = match newest_whole_before(path) {
            Some(older) => {
                format!("the newest one before it that is whole is {}: give it to --resume", older.display())
            }
            None => "no whole checkpoint lies beside it: start afresh".into(),
        };
        fail(format!("{error}; {older}"))
    };
    // The version first: an older layout has no checksums.
    let version =
        serde_json::from_slice::<serde_json::Value>(&text).ok().and_then(|state| state.get("version")?.as_u64());
    if let Some(version) = version.filter(|version| *version != u64::from(VERSION)) {
        return Err(fail(format!("version {version} of the layout; this program reads version {VERSION}")));
    }
    check_files(path).map_err(|error| damaged(&error))?;
    let state: TrainingState = serde_json::from_slice(&text).map_err(|e| fail(format!("{STATE_FILE}: {e}")))?;
    Ok(TrainingCheckpoint { path: path.into(), state, adapter: Adapter::load(path)? })
}

/// Compares the files of a checkpoint with the sums that were saved with them.
fn check_files(path: &Path) -> Result<(), FormatError> {
    match Manifest::load(path)? {
        Some(manifest) => checksum::verify(path, &manifest),
        None => Err(FormatError::Damaged {
            file: path.join(checksum::MANIFEST_FILE),
            reason: "it is missing, so nothing says whether the other files are whole".into(),
        }),
    }
}

/// The newest checkpoint beside `path`, of an earlier step, whose files are as they were written.
fn newest_whole_before(path: &Path) -> Option<PathBuf> {
    let all = list(path.parent()?).ok()?;
    let step = all.iter().find(|(_, other)| other.file_name() == path.file_name()).map(|(step, _)| *step)?;
    let mut before = all.into_iter().filter(|(other, _)| *other < step).rev();
    before.find(|(_, path)| check_files(path).is_ok()).map(|(_, path)| path)
}
