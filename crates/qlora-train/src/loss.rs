//! Cross-entropy of next-token prediction over the tokens that count.

use crate::data::{Batch, MASKED_LABEL};
use burn::tensor::{DType, Device, Gradients, IndexingUpdateOp, Int, Tensor, TensorData};
use qlora_layers::Pass;
use qlora_layers::ops::fused::cross_entropy;
use qlora_models::Decoder;
use std::ops::Range;

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

/// Logits that exist at a time: 128 MiB in 16 bits. Enough rows for a product that fills a GPU (2,048 with a vocabulary of
/// 32 thousand, 512 with 128 thousand), and little beside a block's activations.
pub(crate) const MAX_LOGITS: usize = 1 << 26;

impl LabelledTokens {
    /// Ranges of tokens whose logits exist at once.
    fn chunks(&self, vocab: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let (count, chunk) = (self.len(), (MAX_LOGITS / vocab.max(1)).max(1));
        // Whole tiles of the products, where there are any.
        let chunk = if chunk > 128 { chunk / 128 * 128 } else { chunk };
        (0..count).step_by(chunk).map(move |start| start..(start + chunk).min(count))
    }
}

fn indices(values: &[i32], device: &Device) -> Tensor<1, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), (device, DType::I32))
}

impl LabelledTokens {
    /// The hidden states of some of the tokens.
    fn chosen(&self, x: &Tensor<2>, chunk: &Range<usize>) -> Tensor<2> {
        x.clone().select(0, indices(&self.positions[chunk.clone()], &x.device()))
    }

    /// The losses of some of the tokens, from their hidden states.
    fn losses(&self, model: &Decoder, chosen: Tensor<2>, chunk: Range<usize>, pass: Pass) -> Tensor<1> {
        let _span = tracing::trace_span!("head_and_loss").entered();
        let logits = model.logits(chosen, pass);
        cross_entropy(logits, indices(&self.targets[chunk], model.device()))
    }
}

/// The sum of `-log softmax(logits)[target]` over the labelled tokens, in f32.
///
/// Only labelled positions go through the output head: masked ones cost nothing there. Without a graph their logits
/// exist for some tokens at a time; for training, see [`loss_and_gradient`].
///
/// # Shapes
/// `x` is the last block's output, `[tokens, hidden]`; the result has one element.
pub fn loss_sum(model: &Decoder, x: Tensor<2>, labelled: &LabelledTokens, pass: Pass) -> Tensor<1> {
    let each = labelled.chunks(model.config().vocab_size);
    let sums = each.map(|chunk| labelled.losses(model, labelled.chosen(&x, &chunk), chunk, pass).sum());
    Tensor::cat(sums.collect(), 0).sum()
}

/// `scale` times [`loss_sum`], and its gradient in `x`. Each chunk's logits are differentiated, in place, before the next
/// chunk's are computed.
///
/// `collect` takes the head's gradients out of the container, once per chunk.
///
/// # Shapes
/// `x` is the last block's output, `[tokens, hidden]`, without autodiff; so is the gradient, in the same dtype.
pub fn loss_and_gradient(
    model: &Decoder,
    x: Tensor<2>,
    labelled: &LabelledTokens,
    scale: f32,
    pass: Pass,
    mut collect: impl FnMut(&mut Gradients),
) -> (Tensor<1>, Tensor<2>) {
    let (mut sums, mut grads) = (Vec::new(), Vec::new());
    for chunk in labelled.chunks(model.config().vocab_size) {
        let chosen = labelled.chosen(&x, &chunk).autodiff().require_grad();
        let loss = labelled.losses(model, chosen.clone(), chunk, pass).sum().mul_scalar(scale);
        let mut from = tracing::trace_span!("head_backward").in_scope(|| loss.backward());
        grads.extend(chosen.grad_remove(&mut from));
        collect(&mut from);
        sums.push(loss.without_autodiff());
    }
    let positions = indices(&labelled.positions, model.device());
    let grad = x.zeros_like().select_assign(0, positions, Tensor::cat(grads, 0), IndexingUpdateOp::Add);
    (Tensor::cat(sums, 0).sum(), grad)
}
