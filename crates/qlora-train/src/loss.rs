//! Cross-entropy of next-token prediction over the tokens that count.

use crate::data::{Batch, MASKED_LABEL};
use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, FloatDType, Int, Tensor, TensorData};
use qlora_layers::Pass;
use qlora_models::Decoder;

/// The positions of a batch whose next token counts, and those next tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelledTokens {
    positions: Vec<i32>,
    targets: Vec<i32>,
}

impl LabelledTokens {
    /// Applies the causal shift: the hidden state of token t is judged by the label of token t + 1.
    pub fn new(batch: &Batch) -> Self {
        let mut found = Self { positions: Vec::new(), targets: Vec::new() };
        for (row, labels) in batch.labels.chunks(batch.cols).enumerate() {
            for (col, &label) in labels.iter().enumerate().skip(1) {
                if label != MASKED_LABEL {
                    found.positions.push((row * batch.cols + col - 1) as i32);
                    found.targets.push(label as i32);
                }
            }
        }
        found
    }

    /// Number of tokens that count.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether no token counts.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }
}

/// The sum of `-log softmax(logits)[target]` over the labelled tokens, in f32.
///
/// Only labelled positions go through the output head: masked ones cost nothing there.
///
/// # Shapes
/// `x` is the last block's output, `[tokens, hidden]`; the result has one element.
pub fn loss_sum(model: &Decoder, x: Tensor<2>, labelled: &LabelledTokens, pass: Pass) -> Tensor<1> {
    let _span = tracing::trace_span!("head_and_loss").entered();
    let count = labelled.len();
    let indices = |values: &[i32]| {
        Tensor::<1, Int>::from_data(TensorData::new(values.to_vec(), [count]), (model.device(), DType::I32))
    };
    let logits = model.logits(x.select(0, indices(&labelled.positions)), pass);
    let log_probs = log_softmax(logits.cast(FloatDType::F32), 1);
    log_probs.gather(1, indices(&labelled.targets).reshape([count, 1])).sum().neg()
}
