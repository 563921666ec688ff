//! The feed-forward branches of a pass.

use super::MixedPass;
use crate::block::{FeedForward, scaled};
use crate::decoder::Decoder;
use crate::mlp::halves;
use crate::norm::{RmsNorm, normalised};
use crate::shared_expert::{SharedExpert, times_sigmoid};
use burn::tensor::Tensor;
use qlora_layers::ops::fused::gated;
use qlora_layers::{LoraLinear, Pass};

impl<'a> MixedPass<'a> {
    /// The feed-forward branch of a block, for its normalised input.
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    pub(super) fn feed_forward(&self, index: usize, h: Tensor<2>) -> Tensor<2> {
        let block = |model: &'a Decoder| &model.blocks[index];
        let dense = self.each_some(|model| match &block(model).feed_forward {
            FeedForward::Dense(mlp) => Some(mlp),
            FeedForward::Experts(_) => None,
        });
        let output = match dense {
            Some(mlps) => {
                let mut gate_up = self.linears(h, |model| block(model).gate_up());
                let [gate, up] = match gate_up.len() {
                    2 => std::array::from_fn(|_| gate_up.remove(0)),
                    _ => halves(gate_up.remove(0)),
                };
                self.linears(gated(gate, up, mlps[0].1.activation), |model| block(model).down()).remove(0)
            }
            None => {
                let routed = |model: &'a Decoder, x| match &block(model).feed_forward {
                    FeedForward::Experts(moe) => moe.routed(x, Pass::INFERENCE, false),
                    FeedForward::Dense(mlp) => mlp.forward(x, Pass::INFERENCE, false),
                };
                let routed = self.by_part(h.clone(), routed);
                match self.shared_expert(index, h) {
                    Some(shared) => routed + shared,
                    None => routed,
                }
            }
        };
        let norms = self.norms(|model| block(model).norms.mlp_output.as_ref());
        scaled(normalised(norms, output, RmsNorm::forward), self.config)
    }

    /// The expert of all tokens, if a block has one, for its normalised input.
    fn shared_expert(&self, index: usize, h: Tensor<2>) -> Option<Tensor<2>> {
        fn of(model: &Decoder, index: usize) -> Option<&SharedExpert> {
            match &model.blocks[index].feed_forward {
                FeedForward::Experts(moe) => moe.shared.as_ref(),
                FeedForward::Dense(_) => None,
            }
        }
        let layers = |pick: fn(&'a SharedExpert) -> Vec<&'a LoraLinear>| {
            move |model: &'a Decoder| of(model, index).map(pick).unwrap_or_default()
        };
        let activation = of(self.models[0].1, index)?.mlp.activation;
        let projected = layers(|shared| shared.mlp.gate_up.iter().map(|layer| &layer.module).collect());
        let mut gate_up = self.linears(h.clone(), projected);
        let [gate, up] = match gate_up.len() {
            2 => std::array::from_fn(|_| gate_up.remove(0)),
            _ => halves(gate_up.remove(0)),
        };
        let mixed = gated(gate, up, activation);
        let output = self.linears(mixed, layers(|shared| vec![&shared.mlp.down.module])).remove(0);
        Some(match of(self.models[0].1, index)?.gate {
            Some(_) => {
                let gate = layers(|shared| shared.gate.iter().map(|layer| &layer.module).collect());
                times_sigmoid(output, self.linears(h, gate).remove(0))
            }
            None => output,
        })
    }
}
