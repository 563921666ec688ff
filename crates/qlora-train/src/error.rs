//! Errors of this crate. Each names the file, line, key or tensor at fault and what to do.

use std::path::PathBuf;

use adapter_io::FormatError;
use chat_text::ChatError;
use device_collectives::CollectiveError;
use host_copies::DeviceError;
use model_hub::HubError;
use qlora_data::DataError;
use qlora_dist::DistError;
use qlora_layers::{ActivationCheckpointing, LayerError};
use qlora_models::ModelError;

/// What can go wrong between a configuration file and a trained adapter.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The model is not found, or can't be downloaded.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// A row, or a key in `[data]`.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A checkpoint or adapter file.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A setting of the adapters, or a layer's tensors.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// The ranks of a run: another one failed, or they do not fit together.
    #[error(transparent)]
    Ranks(#[from] DistError),
    /// Gradients do not come from card to card any more.
    #[error(transparent)]
    Collectives(CollectiveError),
    /// They can't, and the configuration asks for that; or they turned out not to.
    #[error(
        "gradients can't go from card to card: {problem}. With distributed.transport = \"tcp\" they go through the memory of the hosts"
    )]
    Transport {
        /// On which rank, and why.
        problem: String,
    },
    /// The metrics log can't be written.
    #[error("can't write the metrics to {}: {source}", path.display())]
    MetricsWrite {
        /// The log.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The metrics log can't be read.
    #[error("{}:{line}: {problem}; move the file away to resume without it", path.display())]
    MetricsRead {
        /// The log.
        path: PathBuf,
        /// The line, from 1; 0: the file as a whole.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// The report can't be drawn up.
    #[error("{}: {problem}", path.display())]
    Report {
        /// The file of the report.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// The configuration file can't be read.
    #[error("can't read the configuration {}: {source}; `qlora init` writes one", path.display())]
    ConfigRead {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The configuration is another trainer's.
    #[error(
        "{}: this is {what}, and a configuration here is TOML: `qlora init --from {} qlora.toml` writes one that says the same, as \
         far as it can be said",
        path.display(), path.display()
    )]
    ConfigForeign {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The configuration isn't TOML, or a value has the wrong type.
    #[error("{place}: {message}")]
    ConfigSyntax {
        /// File and line, or the override.
        place: String,
        /// What is wrong there.
        message: String,
    },
    /// The configuration has a key that doesn't exist.
    #[error("{place}: unknown key `{key}`; {hint}")]
    UnknownKey {
        /// File and line, or the override.
        place: String,
        /// The key, as `section.key`.
        key: String,
        /// The nearest known name.
        hint: String,
    },
    /// A key that must be set isn't.
    #[error("{key} is not set: {hint}")]
    ConfigMissing {
        /// The key, as `section.key`.
        key: String,
        /// What to write there.
        hint: String,
    },
    /// A value is out of its range.
    #[error("{key} = {value}: {allowed}")]
    ConfigRange {
        /// The key, as `section.key`.
        key: String,
        /// Its value.
        value: String,
        /// What it must be.
        allowed: String,
    },
    /// The configuration can't be written as TOML.
    #[error("can't write the configuration as TOML: {message}")]
    ConfigWrite {
        /// Which value, and why.
        message: String,
    },
    /// The model has no adapter, or no gradient reached one.
    #[error("no adapter to train: attach one, or check that lora.target_modules names layers in use")]
    NothingToTrain,
    /// A batch without any token that counts.
    #[error("no token of the batch has a label: there is nothing to learn from")]
    NoLabels,
    /// Rows of another kind than the objective learns from.
    #[error("{sources}: rows have {found}, and train.objective = {objective} learns from {wanted}; {cure}")]
    Rows {
        /// The sources.
        sources: String,
        /// What their rows have.
        found: &'static str,
        /// What is learned.
        objective: String,
        /// What it takes.
        wanted: &'static str,
        /// What to do.
        cure: &'static str,
    },
    /// A batch says nothing of its answers, which are to be compared.
    #[error("the objective compares answers, and a batch has none to compare: make batches with BatchOrder::judged")]
    NotJudged,
    /// Answers are to be compared with a reference that is not there.
    #[error("the objective has a reference: give the engine one, or batches its log-probabilities of every row")]
    NoReference,
    /// An adapter that a run begins with, or compares with, can't be used.
    #[error("{key} = {}: {problem}", path.display())]
    StartAdapter {
        /// The key of the configuration.
        key: &'static str,
        /// The folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The loss or the gradients are NaN or infinite.
    #[error(
        "training diverged: loss {loss}, gradient norm {grad_norm} at learning rate {learning_rate:e}; the adapter was left as it was \
         before this step. Lower train.learning_rate or set train.max_grad_norm, use bf16 or f32 instead of f16, and resume from the last \
         checkpoint with --resume --accept-changes"
    )]
    NotFinite {
        /// Loss of the step.
        loss: f32,
        /// Gradient norm of the step.
        grad_norm: f32,
        /// Learning rate of the step.
        learning_rate: f64,
    },
    /// The loss scale fell to its end, and the gradients still overflow.
    #[error(
        "the gradients are infinite or not a number even at a loss scale of {scale} (loss {loss}, gradient norm {grad_norm}, learning rate \
         {learning_rate:e}), and {skipped_steps} steps of the run were skipped for it: the model's activations do not fit f16, or training \
         diverged; the adapter was left as it was before the last of these steps. Set quantization.compute_dtype = \"bf16\" (CUDA: compute \
         capability 8.0 and above) or \"f32\", or lower train.learning_rate, and resume from the last checkpoint with --resume \
         --accept-changes"
    )]
    LossScale {
        /// The scale.
        scale: f64,
        /// Loss of the step.
        loss: f32,
        /// Gradient norm of the step.
        grad_norm: f32,
        /// Learning rate of the step.
        learning_rate: f64,
        /// Steps that were skipped before.
        skipped_steps: u64,
    },
    /// The device has too little memory for a step, even without the optimizer's state.
    #[error(
        "out of device memory: a micro-batch of {rows} rows of {cols} tokens is too large; the adapter was left as it was before this \
         step. {} a smaller train.batch_size or data.max_length", advice(.checkpointing)
    )]
    OutOfMemory {
        /// Rows of the step's largest micro-batch.
        rows: usize,
        /// Tokens of its longest row.
        cols: usize,
        /// How activations were kept.
        checkpointing: ActivationCheckpointing,
    },
    /// Work on the device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The optimizer was given something that it can't work with.
    #[error("the optimizer's step failed: {0}")]
    Update(paged_optim::OptimError),
    /// Optimizer state that does not fit.
    #[error("{}: {source}", path.display())]
    Optimizer {
        /// The checkpoint.
        path: PathBuf,
        /// What does not fit.
        source: paged_optim::OptimError,
    },
    /// Another process trains into the output folder.
    #[error("{}: {holder} trains here: wait for it, or choose another train.output_dir", path.display())]
    Held {
        /// The folder.
        path: PathBuf,
        /// Who holds it, as it says itself.
        holder: String,
    },
    /// The output folder holds a run that nobody asked to go on with or to replace.
    #[error(
        "{}: holds {holds}: {}replace it with --overwrite, or choose another train.output_dir", path.display(),
        if *.resumable { "go on with --resume, " } else { "" }
    )]
    Occupied {
        /// The folder.
        path: PathBuf,
        /// What of a run it holds.
        holds: String,
        /// Whether a checkpoint is there to go on from.
        resumable: bool,
    },
    /// There is no checkpoint to resume.
    #[error(
        "{}: there is no checkpoint to resume ({holds}): leave --resume out to start; a launcher that can't know says \
         --resume auto-or-start", path.display()
    )]
    NothingToResume {
        /// The folder.
        path: PathBuf,
        /// What of a run it holds.
        holds: String,
    },
    /// The run was stopped before its first step.
    #[error("stopped before the first step; nothing was written")]
    Stopped,
    /// Updates made parameters or optimizer state infinite or not a number.
    #[error(
        "training diverged: after step {step} {} not finite: {}. They are not saved; {}. Lower \
         train.learning_rate ({learning_rate:e} in the last step) or train.max_grad_norm",
        if what.len() == 1 { "one tensor is".into() } else { format!("{} tensors are", what.len()) }, first_of(what),
        go_on_from(saved.as_deref())
    )]
    Spoilt {
        /// Steps done.
        step: usize,
        /// Names of the tensors.
        what: Vec<String>,
        /// Learning rate of the last step.
        learning_rate: f64,
        /// The newest checkpoint.
        saved: Option<PathBuf>,
    },
    /// A training checkpoint can't be used.
    #[error("{}: {problem}", path.display())]
    Checkpoint {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
}

impl From<CollectiveError> for TrainError {
    fn from(error: CollectiveError) -> Self {
        match error {
            CollectiveError::Device(error) => Self::Device(error),
            other => Self::Collectives(other),
        }
    }
}

impl From<paged_optim::OptimError> for TrainError {
    fn from(error: paged_optim::OptimError) -> Self {
        match error {
            paged_optim::OptimError::Device(error) => Self::Device(error),
            other => Self::Update(other),
        }
    }
}

/// The first few of many names.
pub(crate) fn first_of(names: &[String]) -> String {
    const SHOWN: usize = 3;
    let shown: Vec<&str> = names.iter().take(SHOWN).map(String::as_str).collect();
    let more = names.len().saturating_sub(SHOWN);
    shown.join(", ") + &if more == 0 { String::new() } else { format!(" and {more} more") }
}

fn go_on_from(saved: Option<&std::path::Path>) -> String {
    match saved {
        Some(path) => format!("{} is whole: resume it with --resume --accept-changes", path.display()),
        None => "no checkpoint was saved before: start again".into(),
    }
}

/// What to do when memory was short with this way of keeping activations.
fn advice(checkpointing: &ActivationCheckpointing) -> String {
    let smaller: Vec<String> = checkpointing.smaller().iter().map(|policy| format!("\"{}\"", policy.name())).collect();
    if smaller.is_empty() {
        return "Start afresh with".into();
    }
    let smaller = smaller.join(" or ");
    format!(
        "Resume with train.activation_checkpointing = {smaller}, which gives the same results in less memory, or start \
         afresh with"
    )
}
