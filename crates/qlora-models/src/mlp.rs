//! The gated MLP: `down(activation(gate(x)) · up(x))` (Shazeer, 2020, arXiv 2002.05202).

use crate::block::Named;
use burn::tensor::activation::{gelu, gelu_approximate, relu, silu};
use burn::tensor::{FloatDType, Tensor};
use qlora_layers::{LoraLinear, Pass};

/// An activation function, under the names of transformers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x · sigmoid(x)`: "silu", "swish".
    Silu,
    /// `x · Φ(x)`: "gelu".
    Gelu,
    /// Its approximation by tanh: "gelu_pytorch_tanh", "gelu_new".
    GeluTanh,
    /// `max(x, 0)`: "relu".
    Relu,
}

const NAMES: &[(&str, Activation)] = &[
    ("silu", Activation::Silu),
    ("swish", Activation::Silu),
    ("gelu", Activation::Gelu),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_new", Activation::GeluTanh),
    ("relu", Activation::Relu),
];

impl Activation {
    /// The activation of a name.
    pub fn find(name: &str) -> Option<Self> {
        NAMES.iter().find(|(known, _)| *known == name).map(|(_, activation)| *activation)
    }

    /// The supported names, for messages.
    pub fn supported() -> String {
        NAMES.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
    }

    /// `activation(gate) · up`, computed in f32 and rounded once.
    ///
    /// # Shapes
    /// All `[tokens, width]`, one dtype.
    fn gated(self, gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
        let dtype = gate.dtype();
        let gate = gate.cast(FloatDType::F32);
        let gate = match self {
            Self::Silu => silu(gate),
            Self::Gelu => gelu(gate),
            Self::GeluTanh => gelu_approximate(gate),
            Self::Relu => relu(gate),
        };
        (gate * up.cast(FloatDType::F32)).cast(dtype)
    }
}

/// A gated MLP of a block or of an expert.
#[derive(Clone, Debug)]
pub(crate) struct Mlp {
    /// Gate and input projection, or one projection whose output holds both in this order.
    pub gate_up: Vec<Named<LoraLinear>>,
    pub down: Named<LoraLinear>,
    pub activation: Activation,
}

impl Mlp {
    /// # Shapes
    /// `[tokens, hidden]` in and out.
    pub fn forward(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        let [gate, up] = match &self.gate_up[..] {
            [gate, up] => [gate.module.forward(x.clone(), pass), up.module.forward(x, pass)],
            fused => {
                let both = fused[0].module.forward(x, pass);
                let width = both.dims()[1] / 2;
                [both.clone().narrow(1, 0, width), both.narrow(1, width, width)]
            }
        };
        self.down.module.forward(self.activation.gated(gate, up), pass)
    }

    pub fn linears(&self) -> impl Iterator<Item = &Named<LoraLinear>> {
        self.gate_up.iter().chain([&self.down])
    }

    pub fn linears_mut(&mut self) -> impl Iterator<Item = &mut Named<LoraLinear>> {
        self.gate_up.iter_mut().chain([&mut self.down])
    }
}
