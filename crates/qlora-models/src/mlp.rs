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
    /// With `gradients_only` the result may be uninitialised; see [`LoraLinear::record`].
    ///
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    pub fn forward(&self, x: Tensor<2>, pass: Pass, gradients_only: bool) -> Tensor<2> {
        let [gate, up] = match &self.gate_up[..] {
            [gate, up] => [gate.module.forward_in(x.clone(), pass), up.module.forward_in(x, pass)],
            fused => halves(fused[0].module.forward_in(x, pass)),
        };
        let mixed = gated(gate, up, self.activation);
        match gradients_only {
            true => self.down.module.record(mixed, pass),
            false => self.down.module.forward_in(mixed, pass),
        }
    }

    pub fn linears(&self) -> impl Iterator<Item = &Named<LoraLinear>> {
        self.gate_up.iter().chain([&self.down])
    }

    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Named<LoraLinear>> {
        self.gate_up.iter_mut().chain([&mut self.down])
    }
}

/// The two halves of each row.
pub(crate) fn halves(both: Tensor<2>) -> [Tensor<2>; 2] {
    let width = both.dims()[1] / 2;
    [both.clone().narrow(1, 0, width), both.narrow(1, width, width)]
}
