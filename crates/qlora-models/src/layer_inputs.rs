//! Inputs of each block beside the block before it: a vector that is looked up by token, and what a projection makes of the token's
//! embedding, as Gemma 3n and Gemma 4 have them ("per-layer embeddings").

use crate::decoder::Decoder;
use crate::named::Named;
use crate::norm::RmsNorm;
use burn::module::Param;
use burn::tensor::{FloatDType, Int, Tensor};
use qlora_layers::ops::fused::{Activation, gated};
use qlora_layers::{LoraLinear, Pass};
use std::f64::consts::FRAC_1_SQRT_2;

/// What makes the inputs of all blocks.
#[derive(Clone, Debug)]
pub(crate) struct LayerInputs {
    /// `[words, blocks * width]`.
    pub table: Param<Tensor<2>>,
    /// What rows of the table are multiplied by.
    pub scale: f64,
    /// From the embedding to the inputs of all blocks.
    pub projection: Named<LoraLinear>,
    /// What the projection's output is multiplied by.
    pub projected_scale: f64,
    /// Of each block's part of the projection.
    pub norm: Named<RmsNorm>,
}

impl LayerInputs {
    /// What is looked up and what was projected, one of each block beside the other.
    ///
    /// # Shapes
    /// `[tokens]` ids and `[tokens, blocks * width]` to the latter.
    pub fn joined(&self, index: Tensor<1, Int>, projected: Tensor<2>) -> Tensor<2> {
        let looked_up = self.table.val().select(0, index).mul_scalar(self.scale);
        (projected + looked_up).mul_scalar(FRAC_1_SQRT_2)
    }

    /// The inputs of all blocks.
    ///
    /// # Shapes
    /// `[tokens]` ids and `[tokens, hidden]` to `[tokens, blocks * width]`.
    pub fn forward(&self, index: Tensor<1, Int>, embedded: Tensor<2>, pass: Pass) -> Tensor<2> {
        let projected = self.projection.module.forward_in(embedded, pass).mul_scalar(self.projected_scale);
        self.joined(index, self.norm.module.forward_heads(projected, pass))
    }
}

/// What a block makes of its input: `norm(projection(activation(gate(x)) · input))`, which is added to `x`.
#[derive(Clone, Debug)]
pub(crate) struct LayerInput {
    pub gate: Named<LoraLinear>,
    pub projection: Named<LoraLinear>,
    pub activation: Activation,
}

impl LayerInput {
    /// Without the norm.
    ///
    /// # Shapes
    /// `[tokens, hidden]` and `[tokens, width]` to `[tokens, hidden]`.
    pub fn forward(&self, x: Tensor<2>, input: Tensor<2>, pass: Pass) -> Tensor<2> {
        let gate = self.gate.module.forward_in(x, pass);
        self.projection.module.forward_in(gated(gate, input, self.activation), pass)
    }

    pub fn linears(&self) -> impl Iterator<Item = &Named<LoraLinear>> {
        [&self.gate, &self.projection].into_iter()
    }

    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Named<LoraLinear>> {
        [&mut self.gate, &mut self.projection].into_iter()
    }
}

impl Decoder {
    /// The table of what is looked up for each block, in values; none where blocks have no inputs of their own.
    pub(crate) fn layer_table_values(&self) -> usize {
        self.layer_inputs.as_ref().map_or(0, |inputs| inputs.table.shape().num_elements())
    }
}

/// A factor as a dtype holds it.
pub(crate) fn rounded(number: f64, dtype: FloatDType) -> f64 {
    match dtype {
        FloatDType::BF16 => half::bf16::from_f64(number).to_f64(),
        FloatDType::F16 => half::f16::from_f64(number).to_f64(),
        _ => f64::from(number as f32),
    }
}
