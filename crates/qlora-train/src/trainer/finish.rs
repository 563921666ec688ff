//! The end of a run: the adapter, the report, and what both say of the run.

use super::{Trainer, together, warn_of};
use crate::checkpoint;
use crate::error::TrainError;
use crate::metrics::{PackingInfo, RunInfo};
use crate::ranks::Ranks;
use crate::report::{Outcome, Summary, device_name};
use crate::run_folder::ADAPTER_DIR;
use qlora_models::peak_memory;

impl Trainer<'_> {
    /// Writes the adapter, unless the run was interrupted, and the report.
    pub(super) fn finish(mut self, info: RunInfo, outcome: Outcome) -> Result<Summary, TrainError> {
        let output_dir = self.config.train.output_dir.clone();
        let (adapter, adapter_step) = match outcome {
            Outcome::Finished | Outcome::StoppedEarly => (output_dir.join(ADAPTER_DIR), self.save_adapter()?),
            Outcome::Interrupted => (self.saved.clone().unwrap_or_else(|| output_dir.clone()), self.step),
        };
        let history = self.metrics.history();
        let mut summary = Summary::new(info, history, outcome, adapter);
        summary.adapter_step = adapter_step;
        // Saving takes memory too.
        let peak = peak_memory(self.engine.model().device()).unwrap_or(0);
        summary.peak_memory_bytes = summary.peak_memory_bytes.max(peak);
        if self.is_first() {
            self.metrics.sync()?;
            // What could not be removed before may go now; of what still can't, the user has been told.
            checkpoint::prune(&output_dir, self.config.train.save_limit, self.best_step())?;
            let history = self.metrics.history();
            if let Some(warning) = summary.nothing_learned(history, self.engine.model().config().vocab_size) {
                self.events.on_warning(&warning);
            }
            summary.write(&output_dir, history)?;
        }
        warn_of(self.trackers.finish(outcome), self.events);
        // No rank is done before everything is written.
        together::any(self.ranks.as_ref(), false)?;
        self.events.on_end(&summary);
        Ok(summary)
    }

    /// Writes the adapter, on rank 0, and returns the step that it is of.
    fn save_adapter(&mut self) -> Result<usize, TrainError> {
        if !self.is_first() {
            return Ok(self.step);
        }
        let (adapter, step) = self.final_adapter()?;
        adapter_io::atomic::replace_dir(
            &self.config.train.output_dir.join(ADAPTER_DIR),
            |tmp| -> Result<(), TrainError> {
                adapter.save(tmp)?;
                self.prompts.save(tmp)
            },
        )?;
        Ok(step)
    }

    /// What is about to be trained.
    pub(super) fn info(&self) -> RunInfo {
        let model = self.engine.model();
        let options = &self.config.train;
        let report = &self.rows.train.report;
        let held = model.held_weights();
        RunInfo {
            model: self.config.model.path.clone(),
            device: device_name(model.device()),
            compute_dtype: format!("{:?}", self.dtype).to_lowercase(),
            quantization: held.format(),
            held: held.to_string(),
            base_parameters: model.num_params() as u64,
            trainable_parameters: model.num_trainable() as u64,
            adapted_modules: model.adapted_modules().len(),
            rank: self.config.lora.rank,
            objective: self.engine.preferences().map(ToString::to_string),
            train_data: self.config.data.train.to_string(),
            train_rows: report.rows,
            train_tokens: report.tokens,
            eval_rows: self.rows.eval.examples.len(),
            total_steps: self.total_steps,
            start_step: self.start_step,
            ranks: self.ranks.as_ref().map_or(1, Ranks::count),
            rows_per_step: options.batch_size * options.gradient_accumulation_steps,
            packing: self.rows.order.packed().map(|packed| PackingInfo::new(packed, self.rows.order.rows_per_epoch())),
            activation_checkpointing: self.engine.policies().to_string(),
            output_dir: options.output_dir.clone(),
        }
    }
}
