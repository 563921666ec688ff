//! How a batch goes through the model.

use qlora_data::Batch;
use qlora_models::{Decoder, Sequence};

#[cfg(test)]
pub(super) mod tests;

/// The pass over a batch: rows of one length, or packed ones, each of which sees itself alone.
pub(super) fn sequence(model: &Decoder, batch: &Batch) -> Sequence {
    match batch.packed {
        true => model.packed_sequence(&batch.lengths),
        false => model.sequence(batch.rows, batch.cols, 0),
    }
}
