//! Fine-tuning: configuration, loss, training loop, checkpoints and reports.
//!
//! - [`config`]: the TOML configuration, every key of it.
//! - [`Engine`]: one optimizer step; [`Trainer`]: a whole run, with evaluation, checkpoints and resume.
//! - [`ranks`]: several processes that share each step.
//! - [`calibrate`]: GPTQ on data.
//! - [`metrics`], [`report`]: what a run tells while it goes, and what it leaves behind.
//! - [`objective`]: losses that compare answers.
//! - [`profile`]: where the time of its steps goes.
//!
//! Nothing here prints: a run tells its caller what happens through [`TrainEvents`].

mod answers;
pub mod calibrate;
pub mod checkpoint;
pub mod checkpointing;
pub mod config;
mod engine;
mod error;
mod events;
pub mod fits;
mod loss;
pub mod loss_scale;
pub mod metrics;
pub mod objective;
mod plan;
pub mod profile;
mod prompts;
pub mod ranks;
pub mod rates;
pub mod report;
mod residency;
mod resize;
mod run_folder;
mod trackers;
mod trainer;

pub use answers::Answer;
pub use checkpointing::{Checkpointing, Policies, Room};
pub use config::TrainConfig;
pub use engine::{Engine, Evaluation, ReferenceLogProbs, StepOutput};
pub use error::TrainError;
pub use events::{EvalPart, OnRows, TrainEvents};
pub use host_copies::DeviceError;
pub use loss::{LabelledTokens, loss_sum};
pub use plan::{HostEstimate, MemoryEstimate, Plan, RowSizes, Waiting};
pub use residency::{Placed, Residency};
pub use resize::{Resized, resize};
pub use run_folder::{run_holder, run_in};
pub use trackers::Tracker;
pub use trainer::{Resume, Start, Trainer, compute_dtype, engine, load_rows, packing_note, training_order};
