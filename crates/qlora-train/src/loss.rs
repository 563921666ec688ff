//! Cross-entropy of next-token prediction over the tokens that count.

use crate::objective::{AnswerTokens, Preferences};
use burn::tensor::{DType, Device, FloatDType, Gradients, Int, IntDType, Tensor, TensorData};
use qlora_data::{Batch, MASKED_LABEL};
use qlora_layers::Pass;
use qlora_layers::ops::fused::cross_entropy;
use qlora_models::Decoder;
use std::ops::Range;

/// Logits that exist at a time: 128 MiB in 16 bits. Enough rows for a product that fills a GPU (2,048 with a vocabulary of
/// 32 thousand, 512 with 128 thousand), and little beside a block's activations.
pub(crate) const MAX_LOGITS: usize = 1 << 26;

/// Tokens whose logits exist at a time.
pub(crate) fn chunk_len(vocab: usize) -> usize {
    let chunk = (MAX_LOGITS / vocab.max(1)).max(1);
    // Whole tiles of the products, where there are any.
    if chunk > 128 { chunk / 128 * 128 } else { chunk }
}

/// The positions of a batch whose next token counts, and those next tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabelledTokens {
    positions: Vec<i32>,
    targets: Vec<i32>,
    /// Which of them belong to which answer, where answers are compared.
    pub(crate) answers: AnswerTokens,
}

impl LabelledTokens {
    /// Applies the causal shift: the hidden state of token t is judged by the label of token t + 1.
    pub fn new(batch: &Batch) -> Self {
        let mut found = Self { positions: Vec::new(), targets: Vec::new(), answers: AnswerTokens::default() };
        for row in batch.spans() {
            // The first token of a row is predicted by none of it.
            for at in row.skip(1) {
                let label = batch.labels[at];
                if label != MASKED_LABEL {
                    found.positions.push((at - 1) as i32);
                    found.targets.push(label as i32);
                }
            }
        }
        found
    }

    /// The same for an objective that compares answers, which may count tokens of prompts, too.
    pub(crate) fn of(batch: &Batch, preferences: Option<&Preferences>) -> Self {
        match preferences {
            None => Self::new(batch),
            Some(preferences) => {
                let (positions, targets, answers) = AnswerTokens::of(batch, preferences.learns_prompts());
                Self { positions, targets, answers }
            }
        }
    }

    /// Number of tokens that count.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether no token counts.
    pub fn is_empty(&self) -> bool {
        self.positions.is_empty()
    }

    /// Ranges of tokens whose logits exist at once.
    fn chunks(&self, vocab: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let (count, chunk) = (self.len(), chunk_len(vocab));
        (0..count).step_by(chunk).map(move |start| start..(start + chunk).min(count))
    }

    /// The hidden states of some of the tokens.
    fn chosen(&self, x: &Tensor<2>, chunk: &Range<usize>) -> Tensor<2> {
        x.clone().select(0, indices(&self.positions[chunk.clone()], &x.device()))
    }

    /// For each of `tokens` its row index among the labelled ones, or `len()` for one without a label.
    fn rows(&self, tokens: usize) -> Vec<i32> {
        let mut rows = vec![self.len() as i32; tokens];
        for (row, &position) in self.positions.iter().enumerate() {
            rows[position as usize] = row as i32;
        }
        rows
    }

    /// The losses of some of the tokens, from their hidden states.
    fn losses(&self, model: &Decoder, chosen: Tensor<2>, chunk: Range<usize>, pass: Pass) -> Tensor<1> {
        let _span = tracing::trace_span!("head_and_loss").entered();
        let logits = model.logits(chosen, pass);
        cross_entropy(logits, indices(&self.targets[chunk], model.device()))
    }
}

fn indices(values: &[i32], device: &Device) -> Tensor<1, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), (device, DType::I32))
}

/// The sum of `-log softmax(logits)[target]` over the labelled tokens, in f32.
///
/// Only labelled positions go through the output head: masked ones cost nothing there. Without a graph their logits
/// exist for some tokens at a time; for training, see `loss_and_gradient`.
///
/// # Shapes
/// `x` is the last block's output, `[tokens, hidden]`; the result has one element.
pub fn loss_sum(model: &Decoder, x: Tensor<2>, labelled: &LabelledTokens, pass: Pass) -> Tensor<1> {
    let each = labelled.chunks(model.config().vocab_size);
    let sums = each.map(|chunk| labelled.losses(model, labelled.chosen(&x, &chunk), chunk, pass).sum());
    Tensor::cat(sums.collect(), 0).sum()
}

/// The log-probabilities of the labelled tokens, `[tokens]`, f32, without a graph.
///
/// # Shapes
/// `x` is the last block's output, `[tokens, hidden]`.
pub(crate) fn log_probabilities(model: &Decoder, x: &Tensor<2>, labelled: &LabelledTokens, pass: Pass) -> Tensor<1> {
    let each = labelled.chunks(model.config().vocab_size);
    let losses = each.map(|chunk| labelled.losses(model, labelled.chosen(x, &chunk), chunk, pass.untracked()));
    Tensor::cat(losses.collect(), 0).neg()
}

/// [`loss_sum`], and of how many of the labelled tokens the model thinks that they are the likeliest: `[2]`, f32.
///
/// # Shapes
/// `x` is the last block's output, `[tokens, hidden]`.
pub(crate) fn loss_and_correct(model: &Decoder, x: Tensor<2>, labelled: &LabelledTokens) -> Tensor<1> {
    let (mut losses, mut correct) = (Vec::new(), Vec::new());
    for chunk in labelled.chunks(model.config().vocab_size) {
        let logits = model.logits(labelled.chosen(&x, &chunk), Pass::INFERENCE);
        let targets = indices(&labelled.targets[chunk], model.device());
        let likeliest = logits.clone().argmax(1).squeeze_dim::<1>(1).cast(IntDType::I32);
        correct.push(likeliest.equal(targets.clone()).float().cast(FloatDType::F32).sum());
        losses.push(cross_entropy(logits, targets).sum());
    }
    Tensor::cat(vec![Tensor::cat(losses, 0).sum(), Tensor::cat(correct, 0).sum()], 0)
}

/// What the loss of each labelled token counts.
pub(crate) enum Weights {
    /// The same for all.
    All(f32),
    /// For each of them, `[tokens]`, f32, without autodiff.
    Each(Box<Tensor<1>>),
}

impl Weights {
    /// The weighted sum of the losses of a chunk.
    fn sum(&self, losses: Tensor<1>, chunk: &Range<usize>) -> Tensor<1> {
        match self {
            Self::All(scale) => losses.sum().mul_scalar(*scale),
            Self::Each(weights) => (losses * (**weights).clone().slice(chunk.clone()).autodiff()).sum(),
        }
    }
}

/// The weighted sum of the labelled tokens' losses, and its gradient in `x`. Each chunk's logits are differentiated, in place, before the next
/// chunk's are computed.
///
/// `collect` takes the head's gradients out of the container, once per chunk.
///
/// # Shapes
/// `x` is the last block's output, `[tokens, hidden]`, without autodiff; so is the gradient, in the same dtype.
pub(crate) fn loss_and_gradient(
    model: &Decoder,
    x: Tensor<2>,
    labelled: &LabelledTokens,
    weights: &Weights,
    pass: Pass,
    mut collect: impl FnMut(&mut Gradients),
) -> (Tensor<1>, Tensor<2>) {
    let (mut sums, mut grads) = (Vec::new(), Vec::new());
    for chunk in labelled.chunks(model.config().vocab_size) {
        let chosen = labelled.chosen(&x, &chunk).autodiff().require_grad();
        let loss = weights.sum(labelled.losses(model, chosen.clone(), chunk.clone(), pass), &chunk);
        let mut from = tracing::trace_span!("head_backward").in_scope(|| loss.backward());
        grads.extend(chosen.grad_remove(&mut from));
        collect(&mut from);
        sums.push(loss.without_autodiff());
    }
    // Every token selects its row of the gradients; those without a label select this row of zeros.
    grads.push(x.clone().narrow(0, 0, 1).zeros_like());
    let grad = Tensor::cat(grads, 0).select(0, indices(&labelled.rows(x.dims()[0]), model.device()));
    (Tensor::cat(sums, 0).sum(), grad)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

    use super::*;
    use burn::tensor::FloatDType;
    use burn::tensor::activation::log_softmax;
    use qlora_models::{LoadOptions, ModelConfig};

    #[test]
    fn chunks_are_all_tokens_in_order() {
        let labelled = |count: usize| LabelledTokens {
            positions: vec![0; count],
            targets: vec![0; count],
            answers: AnswerTokens::default(),
        };
        for (count, vocab, lens) in [
            (5000, 32_000, vec![2048, 2048, 904]),
            (600, 128_256, vec![512, 88]),
            (3, 1 << 25, vec![2, 1]),
            (2, 1 << 27, vec![1, 1]),
            (7, 10, vec![7]),
            (0, 10, vec![]),
        ] {
            let chunks: Vec<_> = labelled(count).chunks(vocab).collect();
            assert_eq!(chunks.iter().map(Range::len).collect::<Vec<_>>(), lens, "{count} of {vocab}");
            assert!(chunks.windows(2).all(|pair| pair[0].end == pair[1].start));
        }
    }

    /// A vocabulary so large that two chunks of logits are needed, beside all logits at once.
    #[test]
    fn chunks_give_the_loss_and_the_gradient_of_the_whole() {
        const VOCAB: usize = 1 << 20;
        let shape = serde_json::json!({"model_type": "llama", "vocab_size": VOCAB, "hidden_size": 8,
            "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5});
        let shape = ModelConfig::from_json(&shape, "config.json".as_ref()).unwrap();
        let options = LoadOptions { quantization: None, dtype: FloatDType::F32 };
        let model = Decoder::random(shape, options, 1, &Device::flex(), &mut |_| {}).unwrap();
        let (rows, cols) = (2, 40);
        let input_ids: Vec<u32> = (0..rows * cols).map(|i| (i * 7919 % VOCAB) as u32).collect();
        // Every ninth token is masked.
        let label = |(i, id): (usize, &u32)| if i % 9 == 4 { MASKED_LABEL } else { i64::from(*id) };
        let labels = input_ids.iter().enumerate().map(label).collect();
        let labelled = LabelledTokens::new(&Batch {
            input_ids,
            labels,
            rows,
            cols,
            lengths: vec![cols; rows],
            packed: false,
            judged: None,
        });
        assert_eq!(labelled.chunks(VOCAB).count(), 2);

        let values: Vec<f32> = (0..rows * cols * 8).map(|i| (i as f32 * 0.37).sin()).collect();
        let x = Tensor::<2>::from_data(TensorData::new(values, [rows * cols, 8]), (model.device(), DType::F32));
        let pass = Pass::training(0);
        let (loss, grad) = loss_and_gradient(&model, x.clone(), &labelled, &Weights::All(0.5), pass, |_| {});

        let leaf = x.clone().autodiff().require_grad();
        let chosen = leaf.clone().select(0, indices(&labelled.positions, model.device()));
        let targets = indices(&labelled.targets, model.device()).reshape([labelled.len(), 1]);
        let whole = log_softmax(model.logits(chosen, pass), 1).gather(1, targets).sum().mul_scalar(-0.5);
        let expected = leaf.grad_remove(&mut whole.backward()).unwrap();
        let values = |tensor: Tensor<2>| tensor.into_data().iter::<f32>().collect::<Vec<f32>>();
        let [found, expected] = [grad, expected].map(values);
        // Sums over a million words, in two orders.
        let scale = expected.iter().fold(0.0_f32, |max, v| max.max(v.abs()));
        assert!(found.iter().zip(&expected).all(|(f, e)| (f - e).abs() <= 1e-4 * scale), "{found:?}\n{expected:?}");
        let [loss, whole, sum] =
            [loss, whole.without_autodiff(), loss_sum(&model, x, &labelled, Pass::INFERENCE) * 0.5]
                .map(|loss| loss.into_data().iter::<f32>().next().unwrap());
        assert!((loss / whole - 1.0).abs() < 1e-5 && (sum / whole - 1.0).abs() < 1e-5, "{loss} {sum} {whole}");
    }
}
