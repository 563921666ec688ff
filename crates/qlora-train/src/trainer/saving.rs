//! Checkpoints of a run, and the adapter that it leaves.

use super::{Trainer, parameter_names, warn_of};
use crate::checkpoint::{self, TrainingState};
use crate::config::FinalAdapter;
use crate::error::TrainError;
use paged_optim::Moments;

impl Trainer<'_> {
    /// The adapter that the configuration asks for, and the step that it is of.
    pub(super) fn final_adapter(&mut self) -> Result<(adapter_io::Adapter, usize), TrainError> {
        let best = match (self.config.train.final_adapter, self.evaluations.best) {
            (FinalAdapter::Best, Some((step, _))) if step != self.step => Some(step),
            _ => None,
        };
        let Some(step) = best else { return Ok((self.export()?, self.step)) };
        let path = checkpoint::path_of(&self.config.train.output_dir, step);
        match path.is_dir() {
            true => Ok((checkpoint::load(&path)?.adapter, step)),
            false => {
                self.events.on_warning(&format!(
                    "{}: the best checkpoint is not there any more; the adapter is that of the last step, {}",
                    path.display(),
                    self.step
                ));
                Ok((self.export()?, self.step))
            }
        }
    }

    /// The adapter as it is.
    pub(super) fn export(&self) -> Result<adapter_io::Adapter, TrainError> {
        let model = &self.config.model;
        Ok(self.engine.model().export_adapter(&model.path, model.revision.as_deref())?)
    }

    /// Saves a checkpoint of this step, and removes the oldest beyond the limit. Ranks that don't write leave it to rank 0.
    ///
    /// # Errors
    /// Parameters or moments are not finite; a file can't be written.
    pub(super) fn save(&mut self) -> Result<(), TrainError> {
        if !self.is_first() {
            return Ok(());
        }
        let _span = tracing::trace_span!("save").entered();
        // The log must not lag behind the checkpoint: a resumed run cuts it at the checkpoint's step.
        self.metrics.sync()?;
        let report = &self.rows.train.report;
        let of_rows = (report.rows, report.tokens);
        let state = TrainingState {
            loss_scaler: self.engine.loss_scaler().state(),
            ..TrainingState::new(&self.config, self.step, self.position, of_rows, self.basis.clone(), self.evaluations)?
        };
        let trained = self.trained()?;
        let contents = trained.contents(self);
        if let Some(error) = self.spoilt_in(&contents) {
            return Err(error);
        }
        let options = &self.config.train;
        let path = checkpoint::save(&options.output_dir, &state, &contents)?;
        let stay = checkpoint::prune(&options.output_dir, options.save_limit, self.best_step())?;
        self.events.on_save(&path);
        warn_of(stay, self.events);
        self.saved = Some(path);
        Ok(())
    }

    /// The step whose checkpoint is kept as the best.
    pub(super) fn best_step(&self) -> Option<usize> {
        self.evaluations.best.map(|(step, _)| step).filter(|_| self.config.train.keep_best.is_on())
    }

    /// The error to end with if parameters or optimizer state are not finite.
    pub(super) fn spoilt(&mut self) -> Result<Option<TrainError>, TrainError> {
        let trained = self.trained()?;
        Ok(self.spoilt_in(&trained.contents(self)))
    }

    fn spoilt_in(&self, contents: &checkpoint::Contents<'_>) -> Option<TrainError> {
        let what = contents.not_finite();
        let learning_rate = self.config.train.learning_rate_at(self.step.saturating_sub(1), self.total_steps);
        let (step, saved) = (self.step, self.saved.clone());
        (!what.is_empty()).then_some(TrainError::Spoilt { step, what, learning_rate, saved })
    }

    /// Reads what is trained from the device.
    fn trained(&mut self) -> Result<Trained, TrainError> {
        Ok(Trained {
            parameters: parameter_names(self.engine.model()),
            adapter: self.export()?,
            moments: self.engine.optimizer_mut().state()?,
        })
    }

    /// Saves what the steps so far led to, unless a checkpoint has it already.
    pub(super) fn save_steps_so_far(&mut self) {
        let is_saved = self.saved.as_ref() == Some(&checkpoint::path_of(&self.config.train.output_dir, self.step));
        if !self.is_first() || self.step == self.start_step || is_saved {
            return;
        }
        if let Err(error) = self.save() {
            self.events.on_warning(&format!("the {} steps so far could not be saved: {error}", self.step));
        }
    }

    /// Saves what the steps so far led to if another rank has failed: this one has nothing to go on with.
    pub(super) fn keep_if_ranks_failed<T>(&mut self, result: Result<T, TrainError>) -> Result<T, TrainError> {
        let result = match (&self.ranks, result) {
            (Some(ranks), Err(error)) => Err(ranks.named(error)),
            (_, result) => result,
        };
        if matches!(result, Err(TrainError::Ranks(_))) {
            self.save_steps_so_far();
        }
        result
    }
}

/// What is trained, in host memory.
struct Trained {
    parameters: Vec<String>,
    adapter: adapter_io::Adapter,
    moments: Vec<Moments>,
}

impl Trained {
    /// As a checkpoint of a run holds it.
    fn contents<'a>(&'a self, run: &'a Trainer<'_>) -> checkpoint::Contents<'a> {
        checkpoint::Contents {
            adapter: &self.adapter,
            prompts: &run.prompts,
            parameters: &self.parameters,
            optimizer: run.config.train.optimizer,
            moments: &self.moments,
        }
    }
}
