//! What the suites of activation checkpointing share.

use burn::tensor::Tensor;
use qlora_layers::activation_checkpointing::{Purpose, ResidualBlock};
use qlora_layers::{LoraLinear, Pass};

/// A block whose branches are one layer each, and what its output is multiplied by, if it is.
pub struct Pair<'a>(pub &'a LoraLinear, pub &'a LoraLinear, pub Option<f32>);

impl ResidualBlock for Pair<'_> {
    fn attention(&self, x: Tensor<2>, pass: Pass, purpose: Purpose<'_>) -> Tensor<2> {
        run(self.0, x, pass, purpose)
    }

    fn feed_forward(&self, x: Tensor<2>, pass: Pass, purpose: Purpose<'_>) -> Tensor<2> {
        run(self.1, x, pass, purpose)
    }

    fn has_ending(&self) -> bool {
        self.2.is_some()
    }

    fn ending(&self, x: Tensor<2>, _: usize, pass: Pass, purpose: Purpose<'_>) -> Tensor<2> {
        (x.clone() + self.feed_forward(x, pass, purpose)).mul_scalar(self.2.unwrap_or(1.0))
    }
}

fn run(layer: &LoraLinear, x: Tensor<2>, pass: Pass, purpose: Purpose<'_>) -> Tensor<2> {
    match purpose.gradients_only() {
        true => layer.record(x, pass),
        false => layer.forward_in(x, pass),
    }
}
