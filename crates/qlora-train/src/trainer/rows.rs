//! The rows of a run, in the order in which it takes them.
//!
//! Batches are made when they are needed: beyond the rows themselves, which may lie in a file, a run holds one step's batches.

use std::sync::atomic::Ordering;

use chat_text::{ChatTemplate, Tokenizer};
use model_hub::Hub;
use qlora_data::{
    BatchOrder, DataConfig, DataError, Dataset, LoadOptions, LoadProgress, MASKED_LABEL, Packing, load_splits_with,
    padding_id,
};
use qlora_layers::Initialization;
use qlora_models::{CalibrationBatch, ModelConfig};
use sha2::{Digest as _, Sha256};

use crate::checkpoint::Basis;
use crate::config::{Objective, RunConfig, Term, TrainConfig};
use crate::error::TrainError;
use crate::events::TrainEvents;
use crate::prompts::Prompts;

/// Reads the training and the evaluation rows of a configuration; `model` says which tokens there are and how long its rows may be. The
/// events are told what a user should know of them.
///
/// # Errors
/// As [`load_splits_with`]; [`TrainError::Rows`] where rows are of another kind than the objective learns from;
/// [`TrainError::Stopped`] when the events ask to stop meanwhile.
pub fn load_rows(
    config: &TrainConfig,
    tokenizer: &Tokenizer,
    model: &ModelConfig,
    events: &mut dyn TrainEvents,
) -> Result<(Dataset, Dataset), TrainError> {
    let flag = events.stop_flag();
    let should_stop = || flag.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed));
    let hub = Hub { progress: events.download_progress(), ..Hub::from_env() };
    let told = events.rows_progress();
    let progress = |progress: LoadProgress<'_>| {
        if let Some(told) = &told {
            told(progress);
        }
    };
    let options = LoadOptions {
        hub: Some(&hub),
        progress: &progress,
        max_positions: Some(model.max_position_embeddings),
        embedding_rows: Some(model.vocab_size),
        should_stop: &should_stop,
        ..LoadOptions::default()
    };
    let (train, eval) = match load_splits_with(&config.data, tokenizer, config.train.seed, &options) {
        Err(DataError::Interrupted { .. }) => return Err(TrainError::Stopped),
        loaded => loaded?,
    };
    for rows in [&train, &eval].into_iter().filter(|rows| !rows.examples.is_empty()) {
        check_kind(rows, &config.train.objective)?.iter().for_each(|warning| events.on_warning(warning));
    }
    let of_train = train.report.warnings();
    // Of rows that were held out, the training rows' report tells too.
    let of_eval = eval.report.warnings().into_iter().filter(|warning| !of_train.contains(warning));
    of_train.iter().cloned().chain(of_eval).for_each(|warning| events.on_warning(&warning));
    Ok((train, eval))
}

/// The order in which a configuration's run takes training rows.
///
/// # Errors
/// Rows are packed, and a source's weight is no whole number.
pub fn training_order(config: &TrainConfig, rows: &Dataset, pad_id: u32) -> Result<BatchOrder, TrainError> {
    let order = BatchOrder::new(&rows.examples, &config.data, config.train.batch_size, config.train.seed, pad_id);
    Ok(with_answers(order, config, rows).weighted(&rows.weights)?)
}

/// An order of rows whose answers are compared, where the objective compares some.
fn with_answers(order: BatchOrder, config: &TrainConfig, rows: &Dataset) -> BatchOrder {
    match config.train.objective.is_supervised() {
        true => order,
        false => order.judged(&rows.judged, &config.data, config.train.objective.has(Term::Kto)),
    }
}

/// What packing does to a run over rows in this order, where the configuration asks for it: what a step holds, and how many an epoch has.
/// `train` has the micro-batches of all ranks.
pub fn packing_note(data: &DataConfig, train: &RunConfig, order: &BatchOrder) -> Option<String> {
    let (rows, max_length) = (order.rows_per_epoch(), data.max_length);
    if data.packing == Packing::Off {
        return None;
    }
    let steps =
        |count: usize| count.div_ceil(train.batch_size.saturating_mul(train.gradient_accumulation_steps).max(1));
    Some(match order.packed() {
        Some(packed) => format!(
            "data.packing = \"auto\": {rows} rows lie end to end in {} sequences of up to {max_length} tokens, which are {:.1} % full; \
             train.batch_size counts sequences, of {:.1} rows each, so that steps of an epoch are {} instead of {}",
            packed.sequences,
            100.0 * packed.fill(),
            rows as f64 / packed.sequences as f64,
            steps(packed.sequences),
            steps(rows),
        ),
        None => format!(
            "data.packing = \"auto\": no two of the {rows} rows fit into data.max_length = {max_length}, so that they are padded as with \
             \"off\""
        ),
    })
}

/// Training and evaluation rows with their orders.
pub(super) struct Rows {
    pub train: Dataset,
    pub order: BatchOrder,
    pub eval: Dataset,
    pub eval_order: BatchOrder,
}

/// Checks that rows are of the kind that the objective learns from; returns what is to be known of them all the same.
fn check_kind(rows: &Dataset, objective: &Objective) -> Result<Option<String>, TrainError> {
    const ONE: &str = "one answer each";
    const PAIRS: &str = "two answers, `chosen` and `rejected`";
    const JUDGED: &str = "an answer with a `label` that says whether it is wanted";
    let found = match rows.are_pairs() {
        None => ONE,
        Some(true) => PAIRS,
        Some(false) => JUDGED,
    };
    let sources = rows.report.sources.clone();
    let fail = |wanted, cure| {
        Err(TrainError::Rows { sources: sources.clone(), found, objective: format!("\"{objective}\""), wanted, cure })
    };
    if objective.takes_pairs().is_some() && found != PAIRS {
        return fail(PAIRS, "give such rows, or \"sft\" for rows with one answer and \"kto\" for those with labels");
    }
    if objective.has(Term::Kto) && found == ONE {
        return fail(JUDGED, "give such rows, or pairs, or train.objective = \"sft\"");
    }
    if objective.has(Term::Kto) && rows.examples.len() < 2 {
        return fail("two rows at least", "kto compares each prompt with another row's answer: give more rows");
    }
    if objective.is_supervised() && found == PAIRS {
        return fail(
            ONE,
            "set train.objective = \"dpo\" or another that compares answers, or data.columns = { completion = \"chosen\" } to learn the preferred \
             ones alone",
        );
    }
    let ignored = format!(
        "{sources}: rows say by `label` which answers are wanted, and train.objective = \"sft\" learns all of them; \"kto\" heeds it"
    );
    Ok((objective.is_supervised() && found == JUDGED).then_some(ignored))
}

impl Rows {
    /// Reads the rows as [`load_rows`] does.
    pub fn load(
        config: &TrainConfig,
        tokenizer: &Tokenizer,
        model: &ModelConfig,
        events: &mut dyn TrainEvents,
    ) -> Result<Self, TrainError> {
        let (train, eval) = load_rows(config, tokenizer, model, events)?;
        let (batch_size, pad_id) = (config.train.batch_size, padding_id(tokenizer, model.vocab_size));
        let eval_order = BatchOrder::for_evaluation(&eval.examples, &config.data, batch_size, pad_id);
        Ok(Self {
            order: training_order(config, &train, pad_id)?,
            eval_order: with_answers(eval_order, config, &eval),
            train,
            eval,
        })
    }

    /// How the rows are written as text.
    ///
    /// # Errors
    /// The chat template can't be used.
    pub fn prompts(&self, config: &TrainConfig, tokenizer: &Tokenizer) -> Result<Prompts, TrainError> {
        let format = self.train.report.format;
        let given = config.data.chat_template.as_deref().map(ChatTemplate::from_setting).transpose()?;
        let template = given.as_ref().or(tokenizer.chat_template());
        Ok(Prompts::new(&config.data, format, template, tokenizer))
    }

    /// What a run over these rows stands on.
    pub fn basis(&self, base: String, template: Option<&str>, adapters: Option<String>) -> Basis {
        let sha256 = |text: &str| Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect();
        Basis {
            program: env!("CARGO_PKG_VERSION").into(),
            base,
            train_rows: self.train.fingerprint(),
            eval_rows: self.eval.fingerprint(),
            template: template.map(sha256),
            adapters,
        }
    }

    /// The first micro-batches of the run, for an initialisation that looks at activations. As in PEFT only tokens
    /// that are learned count.
    pub fn calibration(&self, config: &TrainConfig) -> Vec<CalibrationBatch> {
        if config.lora.init != Initialization::Eva {
            return Vec::new();
        }
        let batches = self.order.rows(0).take(config.lora.eva_batches);
        // Packed rows are looked at side by side, no more of them at a time than a batch has sequences.
        let side_by_side = batches.flat_map(|rows| {
            let batches = rows.chunks(config.train.batch_size.max(1)).map(|rows| {
                let batch = self.order.padded(&self.train.examples, rows);
                CalibrationBatch {
                    counted: batch.labels.iter().map(|label| *label != MASKED_LABEL).collect(),
                    rows: batch.rows,
                    ids: batch.input_ids,
                }
            });
            batches.collect::<Vec<_>>()
        });
        side_by_side.collect()
    }
}
