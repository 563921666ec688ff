//! The end of a pass: logits of models that may have heads and words of their own.

use super::{MixedPass, norm};
use crate::decoder::Decoder;
use crate::norm::RmsNorm;
use burn::tensor::Tensor;
use qlora_layers::Pass;

impl<'a> MixedPass<'a> {
    /// Final norm and output head.
    pub fn logits(&self, x: Tensor<2>) -> Tensor<2> {
        let model = self.models[0].1;
        let x = model.before_head(norm(&self.each(|model| &model.norm.module), x, RmsNorm::forward));
        let vocab = model.vocab_size();
        // Adapters that touch a tied head give their model a head of its own; some have more tokens than the base.
        let differ = |model: &Decoder| model.has_trained_tokens() || model.vocab_size() != vocab;
        let heads = self.each_some(|model| model.lm_head.as_ref());
        let logits = match heads {
            _ if self.models.iter().any(|(_, model)| differ(model)) => self.padded_logits(x),
            _ if self.models.iter().all(|(_, model)| model.narrow_head().is_some()) => model.head(x, Pass::INFERENCE),
            Some(heads) => {
                let head = |model: &'a Decoder| vec![model.lm_head.as_ref().unwrap_or(heads[0].1)];
                self.linears(x, head).remove(0)
            }
            None if self.models.iter().all(|(_, model)| model.lm_head.is_none()) => model.head(x, Pass::INFERENCE),
            None => self.by_part(x, |model, x| model.head(x, Pass::INFERENCE)),
        };
        model.capped(logits)
    }

    /// Logits of models with different numbers of tokens: those that a model does not have can't come.
    fn padded_logits(&self, x: Tensor<2>) -> Tensor<2> {
        let most = self.models.iter().map(|(_, model)| model.vocab_size()).max().unwrap_or(0);
        self.by_part(x, |model, x| {
            let logits = model.head(x, Pass::INFERENCE);
            let [rows, vocab] = logits.dims();
            let place = (&logits.device(), logits.dtype());
            match most - vocab {
                0 => logits,
                missing => Tensor::cat(vec![logits, Tensor::full([rows, missing], f32::NEG_INFINITY, place)], 1),
            }
        })
    }
}
