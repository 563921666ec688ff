//! Experts beside a block's MLP (Gemma 4): both read what attention gave, each over a norm of its own, and the norms of what they give are
//! added.

use crate::moe::Moe;
use crate::named::Named;
use crate::norm::RmsNorm;
use burn::tensor::Tensor;
use qlora_layers::Pass;

/// Experts beside an MLP, without the norms that have names of their own.
#[derive(Clone, Debug)]
pub(crate) struct Beside {
    pub moe: Moe,
    /// Of what the router reads. Its weight is the router's own factors over the square root of the width.
    pub router_norm: RmsNorm,
}

impl Beside {
    /// What MLP and experts give together.
    ///
    /// # Shapes
    /// `[tokens, hidden]`: what attention gave, and what the MLP made of it.
    pub fn joined(&self, norms: [&RmsNorm; 3], x: Tensor<2>, mlp: Tensor<2>, pass: Pass) -> Tensor<2> {
        let [of_mlp, input, output] = norms;
        let routed = self.router_norm.forward(x.clone(), Pass::INFERENCE);
        let experts = self.moe.forward_routed(routed, input.forward(x, pass), pass, false);
        of_mlp.forward(mlp, pass) + output.forward(experts, pass)
    }
}

/// The three norms of a block, without their names.
pub(crate) fn modules(norms: &[Named<RmsNorm>; 3]) -> [&RmsNorm; 3] {
    norms.each_ref().map(|norm| &norm.module)
}
