//! What blocks have beside attention and MLP, in a pass of models that may have adapters of their own: inputs of the blocks' own, and
//! experts beside the MLP.

use super::{MixedPass, joined};
use crate::beside;
use crate::decoder::Decoder;
use crate::norm::{RmsNorm, normalised};
use burn::tensor::Tensor;
use qlora_layers::ops::fused::gated;
use qlora_layers::{LoraLinear, Pass};

impl<'a> MixedPass<'a> {
    /// The inputs of all blocks, `[tokens, blocks * width]`, if they have any.
    pub(super) fn layer_inputs(&self, embedded: Tensor<2>) -> Option<Tensor<2>> {
        let inputs = self.models[0].1.layer_inputs.as_ref()?;
        let projection = |model: &'a Decoder| -> Vec<&'a LoraLinear> {
            model.layer_inputs.iter().map(|inputs| &inputs.projection.module).collect()
        };
        let projected = self.linears(embedded, projection).remove(0).mul_scalar(inputs.projected_scale);
        let norms = self.norms(|model| Some(&model.layer_inputs.as_ref()?.norm));
        let projected = normalised(norms, projected, RmsNorm::forward_heads);
        Some(inputs.joined(self.inputs.index.clone(), projected))
    }

    /// What a block's MLP gives, with what the experts beside it make of `m`.
    pub(super) fn with_experts_beside(&self, index: usize, m: &Tensor<2>, mlp: Tensor<2>) -> Tensor<2> {
        let block = |model: &'a Decoder| &model.blocks[index];
        if block(self.models[0].1).beside.is_none() {
            return mlp;
        }
        let mut start = 0;
        let part = |&(tokens, model): &(usize, &'a Decoder)| {
            let of_part = |x: &Tensor<2>| x.clone().narrow(0, start, tokens);
            let (m, mlp) = (of_part(m), of_part(&mlp));
            start += tokens;
            match (&block(model).beside, &block(model).norms.beside) {
                (Some(beside), Some(norms)) => beside.joined(beside::modules(norms), m, mlp, Pass::INFERENCE),
                _ => mlp,
            }
        };
        joined(self.models.iter().map(part).collect())
    }

    /// What a block gives for the sum of its branches and its own input.
    pub(super) fn with_layer_input(&self, index: usize, sum: Tensor<2>, inputs: Option<&Tensor<2>>) -> Tensor<2> {
        let block = |model: &'a Decoder| &model.blocks[index];
        let (Some(inputs), Some(own)) = (inputs, &block(self.models[0].1).layer_input) else { return sum };
        let layer = |which: usize| {
            move |model: &'a Decoder| -> Vec<&'a LoraLinear> {
                block(model).layer_input.iter().filter_map(|own| Some(&own.linears().nth(which)?.module)).collect()
            }
        };
        let width = own.gate.module.base.shape()[0];
        let input = inputs.clone().narrow(1, index * width, width);
        let gate = self.linears(sum.clone(), layer(0)).remove(0);
        let made = self.linears(gated(gate, input, own.activation), layer(1)).remove(0);
        let norms = self.norms(|model| block(model).norms.layer_input.as_ref());
        sum + normalised(norms, made, RmsNorm::forward)
    }
}
