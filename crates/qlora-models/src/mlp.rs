//! The gated MLP: `down(activation(gate(x)) · up(x))` (Shazeer, 2020, arXiv 2002.05202).

use crate::named::Named;
use burn::tensor::Tensor;
use qlora_layers::ops::fused::{Activation, gated};
use qlora_layers::{LoraLinear, Pass};

/// A gated MLP of a block or of an expert.
#[derive(Clone, Debug)]
pub(crate) struct Mlp {
    /// Gate and input projection, or one projection whose output holds both in this order.
    pub gate_up: Vec<Named<LoraLinear>>,
    pub down: Named<LoraLinear>,
    pub activation: Activation,
}

impl Mlp {
    /// `unread` says that the result is not needed; see [`LoraLinear::forward_or_record`].
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    pub fn forward(&self, x: Tensor<2>, pass: Pass, unread: bool) -> Tensor<2> {
        let [gate, up] = match &self.gate_up[..] {
            [gate, up] => [gate.module.forward(x.clone(), pass), up.module.forward(x, pass)],
            fused => {
                let both = fused[0].module.forward(x, pass);
                let width = both.dims()[1] / 2;
                [both.clone().narrow(1, 0, width), both.narrow(1, width, width)]
            }
        };
        self.down.module.forward_or_record(gated(gate, up, self.activation), pass, unread)
    }

    pub fn linears(&self) -> impl Iterator<Item = &Named<LoraLinear>> {
        self.gate_up.iter().chain([&self.down])
    }

    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Named<LoraLinear>> {
        self.gate_up.iter_mut().chain([&mut self.down])
    }
}
