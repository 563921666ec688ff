//! The rows of a run, in the order in which it takes them.
//!
//! Batches are made when they are needed: beyond the rows themselves, a run holds one step's batches.

use chat_text::Tokenizer;
use qlora_data::{BatchOrder, Dataset, MASKED_LABEL, load_splits};
use qlora_layers::Initialization;
use qlora_models::CalibrationBatch;

use crate::checkpoint::TrainingCheckpoint;
use crate::config::TrainConfig;
use crate::error::TrainError;

/// Training and evaluation rows with their orders.
pub(super) struct Rows {
    pub train: Dataset,
    pub order: BatchOrder,
    pub eval: Dataset,
    pub eval_order: BatchOrder,
}

impl Rows {
    pub fn load(config: &TrainConfig, tokenizer: &Tokenizer) -> Result<Self, TrainError> {
        let (train, eval) = load_splits(&config.data, tokenizer, config.train.seed)?;
        let (batch_size, pad_id) = (config.train.batch_size, tokenizer.padding_id());
        Ok(Self {
            order: BatchOrder::new(&train.examples, &config.data, batch_size, config.train.seed, pad_id),
            eval_order: BatchOrder::in_file_order(&eval.examples, batch_size, pad_id),
            train,
            eval,
        })
    }

    /// The first micro-batches of the run, for an initialisation that looks at activations. As in PEFT only tokens
    /// that are learned count.
    pub fn calibration(&self, config: &TrainConfig) -> Vec<CalibrationBatch> {
        if config.lora.init != Initialization::Eva {
            return Vec::new();
        }
        let batches = self.order.epoch(&self.train.examples, 0).take(config.lora.eva_batches);
        batches
            .map(|batch| CalibrationBatch {
                counted: batch.labels.iter().map(|label| *label != MASKED_LABEL).collect(),
                rows: batch.rows,
                ids: batch.input_ids,
            })
            .collect()
    }
}
