//! From a configuration to a run that is ready to go.

use super::reference::{Before, Known};
use super::rows::Rows;
use super::start::{Resumed, Start};
use super::{Trainer, compute_dtype, engine, packing_note, parameter_names, together, warn_of};
use crate::answers::Asked;
use crate::checkpoint::{self, Evaluations};
use crate::checkpointing::Room;
use crate::config::TrainConfig;
use crate::error::TrainError;
use crate::events::TrainEvents;
use crate::metrics::{METRICS_FILE, MetricsWriter};
use crate::objective::Preferences;
use crate::plan::{Plan, RowSizes};
use crate::ranks::Ranks;
use crate::resize::{Resized, resize};
use crate::run_folder::RunFolder;
use crate::trackers::{Beginning, Trackers};
use adapter_io::checksum;
use burn::tensor::FloatDType;
use chat_text::Tokenizer;
use model_hub::Hub;
use qlora_data::Position;
use qlora_dist::Group;
use qlora_models::{Decoder, LoadOptions, select_device};
use std::sync::Arc;
use std::time::Instant;

impl<'e> Trainer<'e> {
    /// Checks the configuration, takes the output folder, reads the data, loads the model and puts the adapters in place.
    /// `events` is told of this and of all that follows.
    ///
    /// # Errors
    /// [`TrainError`], before anything in the output folder is changed: bad configuration, data or model, a checkpoint that can't be
    /// resumed, a folder that holds another run or in which one is under way; [`TrainError::Stopped`] when the events ask to stop.
    pub fn new(
        config: TrainConfig,
        start: impl Into<Start>,
        events: &'e mut dyn TrainEvents,
    ) -> Result<Self, TrainError> {
        Self::build(config, start.into(), None, events)
    }

    /// As [`Trainer::new`], as one of several ranks, each of which is given the same configuration but for its device and for where its
    /// files lie. A step has `gradient_accumulation_steps` micro-batches of each rank. Rank 0's `start` counts, and rank 0 alone
    /// takes the output folder and writes; a checkpoint must be readable for all.
    ///
    /// # Errors
    /// As [`Trainer::new`], on every rank; [`TrainError::Ranks`] where another rank is the cause, or where ranks differ.
    pub fn in_group(
        config: TrainConfig,
        start: impl Into<Start>,
        group: Group,
        events: &'e mut dyn TrainEvents,
    ) -> Result<Self, TrainError> {
        if group.world_size() == 1 {
            return Self::new(config, start, events);
        }
        let ranks = Ranks::over_hosts(group);
        ranks.tell(Self::build(config, start.into(), Some(ranks.clone()), events))
    }

    fn build(
        config: TrainConfig,
        start: Start,
        ranks: Option<Ranks>,
        events: &'e mut dyn TrainEvents,
    ) -> Result<Self, TrainError> {
        config.validate()?;
        let config = together::configuration(config, ranks.as_ref())?;
        let folder = match &ranks {
            Some(ranks) if ranks.rank() > 0 => None,
            _ => Some(RunFolder::take(&config.train.output_dir)?),
        };
        if let Some(folder) = folder.as_ref().filter(|folder| folder.is_unprotected()) {
            let path = folder.path().display();
            events.on_warning(&format!("{path}: its file system has no locks: nothing keeps a second run out of it"));
        }
        let found = folder.as_ref().map(|folder| Resumed::find(folder, &start)).transpose()?.flatten();
        if let Some(Resumed { checkpoint, .. }) = &found {
            let changes = checkpoint.config_changes(&config)?;
            warn_of(checkpoint.judge(changes, start.accept_changes)?, events);
        }
        let resumed = together::resumed(found, ranks.as_ref())?;
        let device = select_device(&config.device)?;
        let (ranks, note) = match ranks.map(|ranks| ranks.connect(&device, config.distributed.transport)).transpose()? {
            Some((ranks, note)) => (Some(ranks), note),
            None => (None, None),
        };
        note.iter().for_each(|note| events.on_notice(note));
        let dtype = compute_dtype(config.quantization.compute_dtype, &device)?;
        if dtype == FloatDType::F16 && !config.train.loss_scale.is_on(dtype) {
            events.on_warning(
                "train.loss_scale = \"off\" in f16: gradients below 6e-8 become 0; \"auto\" scales the loss against that",
            );
        }
        let hub = Hub { progress: events.download_progress(), ..Hub::from_env() };
        let model_dir = together::one_of_each_host_first(ranks.as_ref(), || {
            Ok(hub.resolve(&config.model.path, config.model.revision.as_deref())?)
        })?;
        let tokenizer = Tokenizer::from_dir(&model_dir)?;
        let base = config.quantization.base_config(&model_dir, &config.model.config_options())?;
        let Resized { config: resized, model: shape, notice } = resize(&config, base.clone(), &tokenizer)?;
        notice.iter().for_each(|notice| events.on_notice(notice));
        let rows = Rows::load(&config, &tokenizer, &shape, events)?;
        let total_steps = config.train.total_steps(rows.order.sequences());
        packing_note(&config.data, &config.train, &rows.order).iter().for_each(|note| events.on_notice(note));
        warn_of(config.train.warnings(total_steps), events);
        let prompts = rows.prompts(&config, &tokenizer)?;
        let asked = match config.eval.prompts.is_empty() || folder.is_none() {
            true => None,
            false => Some(Asked::new(&config.eval, &prompts, tokenizer, shape.max_position_embeddings)?),
        };
        let before = Before::load(&config)?;
        let basis = rows.basis(checksum::fingerprint(&model_dir)?, prompts.template(), before.fingerprint());
        if let Some(Resumed { checkpoint, .. }) = &resumed {
            if folder.is_some() {
                let changes = checkpoint.basis_changes(&basis, &config);
                warn_of(checkpoint.judge(changes, start.accept_changes)?, events);
            }
            checkpoint.check_trained_tokens(&resized.lora)?;
        }
        together::compare_basis(ranks.as_ref(), &basis, resumed.as_ref())?;

        let (count, of_host) = ranks.as_ref().map_or((1, 1), |ranks| (ranks.count(), ranks.of_host().len()));
        let room = Room::of_rank(&device, config.train.memory_budget, count, of_host);
        let room = together::room_of_host(room, ranks.as_ref())?;
        let sizes = RowSizes::new(&rows.order, &rows.train.examples);
        let Plan { policies, lighter, weights, .. } = Plan::new(&config, &shape, dtype, &room, &sizes)?;
        tracing::info!(kept = %policies, "what blocks keep for the backward pass");
        let options = LoadOptions { quantization: config.quantization.quant_config(), dtype };
        let (streams, note) = weights.streams(&device, ranks.as_ref())?;
        note.iter().for_each(|note| events.on_notice(note));
        let mut model =
            Decoder::load_as(base, &model_dir, options, streams, &device, &mut |progress| events.on_load(progress))?;
        model.config().notes.iter().for_each(|note| events.on_notice(note));
        model.resize_embeddings(shape.vocab_size)?;
        let preferences = (!config.train.objective.is_supervised())
            .then(|| Preferences { objective: config.train.objective.clone(), settings: config.preference.clone() });
        let mut reference = match &preferences {
            Some(preferences) if preferences.has_reference() => Some(before.reference(model.clone(), &config)?),
            _ => None,
        };
        let mut known = None;
        if let (Some(preferences), true) = (&preferences, config.preference.precompute_reference)
            && let Some(reference) = reference.take()
        {
            let shared = (ranks.as_ref(), weights.shared_by > 1);
            known = Some(Known::compute(&reference, &rows, (&config, &basis), preferences, shared, events)?);
        }
        let lora = &resized.lora;
        match &resumed {
            Some(Resumed { checkpoint, .. }) => {
                model.resume_lora(lora, config.train.seed, &checkpoint.adapter)?;
            }
            None => match &before.start {
                Some(start) => start.begin(&mut model, &config)?,
                None => {
                    model.attach_lora_to(lora, config.train.seed, &rows.calibration(&config))?;
                }
            },
        }
        drop(before);
        let mut engine = engine(model, &config.train, policies)?.with_lighter(lighter).with_ranks(ranks.clone());
        if let Some(preferences) = preferences {
            engine = engine.with_preferences(preferences, reference);
        }
        warn_of(config.train.without_effect(&engine.model().parameter_kinds()), events);
        if weights.shared_by > 1 {
            engine = engine.with_shared_base();
        }
        match &resumed {
            Some(Resumed { checkpoint, .. }) => {
                let moments = checkpoint.moments(&parameter_names(engine.model()), config.train.optimizer)?;
                checkpoint.state.loss_scaler.into_iter().for_each(|state| engine.loss_scaler_mut().restore(state));
                engine
                    .optimizer_mut()
                    .restore(checkpoint.state.updates(), &moments)
                    .map_err(|source| TrainError::Optimizer { path: checkpoint.path.clone(), source })?;
            }
            None => engine.share_parameters()?,
        }
        if together::any(ranks.as_ref(), events.should_stop())? {
            return Err(TrainError::Stopped);
        }

        let (step, position, evaluations) = match &resumed {
            Some(Resumed { checkpoint: found, .. }) => {
                (found.state.step, found.state.batch_position(), found.state.evaluations)
            }
            None => (0, Position::default(), Evaluations::default()),
        };
        let metrics = match &folder {
            // From here on the folder is this run's.
            Some(folder) => begin_log(folder, resumed.as_ref(), total_steps, events)?,
            None => MetricsWriter::in_memory(),
        };
        let trackers = match &folder {
            Some(folder) => {
                let settings = checkpoint::settings(&config)?;
                let beginning = Beginning { folder: folder.path(), settings: &settings, step };
                let (trackers, warnings) = Trackers::open(&config.train.log_to, beginning);
                warn_of(warnings, events);
                trackers
            }
            None => Trackers::default(),
        };
        Ok(Self {
            config,
            engine,
            rows: Arc::new(rows),
            known,
            metrics,
            events,
            basis,
            prompts,
            asked,
            trackers,
            evaluations,
            total_steps,
            step,
            start_step: step,
            position,
            saved: resumed.filter(|resumed| resumed.same_run).map(|resumed| resumed.checkpoint.path),
            dtype,
            peak_memory: 0,
            started: Instant::now(),
            ranks,
            own_seconds: 0.0,
            slowest_rank: None,
            folder,
        })
    }
}

/// Has what lies in the folder give way, and opens the log.
fn begin_log(
    folder: &RunFolder,
    resumed: Option<&Resumed>,
    total_steps: usize,
    events: &mut dyn TrainEvents,
) -> Result<MetricsWriter, TrainError> {
    let log = folder.path().join(METRICS_FILE);
    let Some(Resumed { checkpoint, same_run }) = resumed else {
        folder.clear()?;
        return MetricsWriter::create(&log);
    };
    let step = checkpoint.state.step;
    if !same_run {
        folder.clear()?;
        let before = checkpoint.path.parent().map(|run| run.join(METRICS_FILE));
        MetricsWriter::copy(before.as_deref(), &log)?;
    } else if step < total_steps {
        warn_of(folder.go_on_after(step)?, events);
    }
    MetricsWriter::resume(&log, step)
}
