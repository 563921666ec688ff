//! Root mean square normalisation (Zhang and Sennrich, 2019, arXiv 1910.07467), computed in f32 and rounded once.

use burn::module::Param;
use burn::tensor::Tensor;
use qlora_layers::ops::fused::{self, Norm, rms_norm};
use qlora_layers::{Pass, by_part};

/// `x / sqrt(mean(x²) + eps) · (weight + offset)`.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// `[width]`, f32, as checkpoints hold it.
    pub weight: Tensor<1>,
    /// `[1, width]`, f32: takes the weight's place while an adapter that trained the norm in full is on.
    pub(crate) trained: Option<Param<Tensor<2>>>,
    pub(crate) eps: f64,
    /// Families that store the weight's distance from 1 add it here.
    pub(crate) offset: f64,
}

impl RmsNorm {
    /// # Shapes
    /// `[rows, width]` in and out, dtype kept.
    pub(crate) fn forward(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        rms_norm(x, self.weight_in(pass), self.constants())
    }

    /// `x + delta` and [`forward`](Self::forward) of it, in a pass without a graph.
    pub(crate) fn add_forward(&self, x: Tensor<2>, delta: Tensor<2>) -> [Tensor<2>; 2] {
        fused::add_norm(x, delta, self.weight_in(Pass::INFERENCE), self.constants())
    }

    /// `[width]`, f32.
    fn weight_in(&self, pass: Pass) -> Tensor<1> {
        let weight = match &self.trained {
            Some(trained) if pass.tracked => trained.val(),
            Some(trained) => trained.val().without_autodiff(),
            None => return self.weight.clone(),
        };
        let width = weight.dims()[1];
        weight.reshape([width])
    }

    fn constants(&self) -> Norm {
        Norm { eps: self.eps as f32, offset: self.offset as f32 }
    }

    /// Normalises each head separately.
    ///
    /// # Shapes
    /// `[tokens, heads * width]` in and out, dtype kept.
    pub(crate) fn forward_heads(&self, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        let [tokens, features] = x.dims();
        let width = self.weight.dims()[0];
        self.forward(x.reshape([tokens * features / width, width]), pass).reshape([tokens, features])
    }
}

/// The norms of each part's model, with the part's number of tokens.
pub(crate) type Norms<'a> = Vec<(usize, &'a RmsNorm)>;

/// `x + delta` and, where there are norms, its norm.
pub(crate) fn add_norm(parts: Option<Norms<'_>>, x: Tensor<2>, delta: Tensor<2>) -> [Tensor<2>; 2] {
    match parts {
        Some(parts) if parts.iter().all(|(_, norm)| norm.trained.is_none()) => parts[0].1.add_forward(x, delta),
        parts => {
            let sum = x + delta;
            [sum.clone(), normalised(parts, sum, RmsNorm::forward)]
        }
    }
}

/// The norm of each part, or `x` where there are no norms.
pub(crate) fn normalised(
    parts: Option<Norms<'_>>,
    x: Tensor<2>,
    forward: impl Fn(&RmsNorm, Tensor<2>, Pass) -> Tensor<2>,
) -> Tensor<2> {
    match parts {
        Some(parts) => norm(&parts, x, forward),
        None => x,
    }
}

/// The norms differ only where an adapter trained one in full.
pub(crate) fn norm(
    parts: &[(usize, &RmsNorm)],
    x: Tensor<2>,
    forward: impl Fn(&RmsNorm, Tensor<2>, Pass) -> Tensor<2>,
) -> Tensor<2> {
    match parts.iter().all(|(_, norm)| norm.trained.is_none()) {
        true => forward(parts[0].1, x, Pass::INFERENCE),
        false => by_part(parts, x, |norm, x| forward(norm, x, Pass::INFERENCE)),
    }
}
