//! The expert of all tokens: an MLP whose output is added to that of the experts that a token was sent to, times the sigmoid of
//! a gate where the family has one.

use crate::mlp::Mlp;
use crate::named::Named;
use burn::tensor::activation::sigmoid;
use burn::tensor::{FloatDType, Tensor};
use qlora_layers::{LoraLinear, Pass};

/// An expert of all tokens.
#[derive(Clone, Debug)]
pub(crate) struct SharedExpert {
    pub mlp: Mlp,
    /// A layer of one output.
    pub gate: Option<Named<LoraLinear>>,
}

impl SharedExpert {
    /// With `gradients_only` the result may be uninitialised; see [`LoraLinear::record`].
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    pub fn forward(&self, x: Tensor<2>, pass: Pass, gradients_only: bool) -> Tensor<2> {
        let Some(gate) = &self.gate else { return self.mlp.forward(x, pass, gradients_only) };
        let gate = gate.module.forward_in(x.clone(), pass);
        // The gate's gradient needs what it multiplies.
        times_sigmoid(self.mlp.forward(x, pass, false), gate)
    }

    pub fn linears(&self) -> impl Iterator<Item = &Named<LoraLinear>> {
        self.mlp.linears().chain(&self.gate)
    }

    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Named<LoraLinear>> {
        self.mlp.linears_mut().chain(&mut self.gate)
    }
}

/// `x` `[tokens, hidden]` times the sigmoid of a gate `[tokens, 1]`, computed in f32.
pub(crate) fn times_sigmoid(x: Tensor<2>, gate: Tensor<2>) -> Tensor<2> {
    let dtype = x.dtype();
    (x.cast(FloatDType::F32) * sigmoid(gate.cast(FloatDType::F32))).cast(dtype)
}
