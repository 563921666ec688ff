//! Adapters of the embedding table.
//!
//! With the table W `[vocabulary, width]` a token's row becomes `w_t + s·(B a_t)`, where `a_t` is column `t` of
//! `lora_a` `[rank, vocabulary]` and B is `[width, rank]`: LoRA's update of `Wᵀ`. DoRA scales each of the `width`
//! features to its magnitude. As in PEFT there is no dropout here.

use crate::Pass;
use crate::dora::{Dora, norms};
use crate::lora::{matrix, normal};
use crate::ops::matmul;
use crate::trained::{seen_by, track};
use burn::tensor::{DType, FloatDType, Int, Tensor};

/// Picks the generator's stream, beside those of the linear layers' adapters.
const STREAM: u32 = u32::MAX;

/// A low-rank update of an embedding table.
#[derive(Clone, Debug)]
pub struct LoraEmbedding {
    /// `[rank, vocabulary]`, f32; PEFT's `lora_embedding_A`.
    pub lora_a: Tensor<2>,
    /// `[width, rank]`, f32; PEFT's `lora_embedding_B`.
    pub lora_b: Tensor<2>,
    /// Magnitudes of the features.
    pub dora: Option<Dora>,
    /// Factor of the update.
    pub scaling: f32,
}

impl LoraEmbedding {
    /// A fresh adapter that changes nothing yet: `lora_a` zero, `lora_b` standard normal, as in PEFT.
    pub fn new(table: &Tensor<2>, rank: usize, scaling: f32, seed: u64) -> Self {
        let ([vocabulary, width], device) = (table.dims(), table.device());
        Self {
            lora_a: Tensor::zeros([rank, vocabulary], (&device, DType::F32)),
            lora_b: matrix(normal(seed, STREAM, width * rank).collect(), [width, rank], &device),
            dora: None,
            scaling,
        }
    }

    /// Magnitudes over the table: the given ones `[1, width]`, or those that change nothing yet.
    pub fn with_dora(mut self, table: &Tensor<2>, magnitude: Option<Tensor<2>>) -> Self {
        let squares = table.clone().cast(FloatDType::F32).square().sum_dim(0);
        let magnitude = magnitude.unwrap_or_else(|| {
            let a_w = project(&self.lora_a.clone().without_autodiff(), table);
            norms(&squares, self.lora_a.clone(), &self.lora_b, self.scaling, a_w)
        });
        self.dora = Some(Dora::new(magnitude, squares));
        self
    }

    /// The rows of `ids`, in the dtype of the table.
    ///
    /// # Shapes
    /// `ids` `[tokens]` to `[tokens, width]`.
    pub fn forward(&self, table: &Tensor<2>, ids: Tensor<1, Int>, pass: Pass) -> Tensor<2> {
        let (lora_a, lora_b) = (seen_by(&self.lora_a, pass), seen_by(&self.lora_b, pass));
        let rows = table.clone().select(0, ids.clone()).cast(FloatDType::F32);
        let update = matmul(lora_a.select(1, ids).transpose(), lora_b.transpose()).mul_scalar(self.scaling);
        let sum = rows + update;
        let sum = match &self.dora {
            Some(dora) => sum * self.scale(dora, table, pass),
            None => sum,
        };
        sum.cast(table.dtype())
    }

    fn scale(&self, dora: &Dora, table: &Tensor<2>, pass: Pass) -> Tensor<2> {
        dora.scale(&self.lora_a, &self.lora_b, self.scaling, pass, |lora_a| project(&lora_a, table))
    }

    /// The table with this adapter in it, f32.
    pub fn merged(&self, table: &Tensor<2>) -> Tensor<2> {
        let (lora_a, lora_b) = (self.lora_a.clone().without_autodiff(), self.lora_b.clone().without_autodiff());
        let update = matmul(lora_a.transpose(), lora_b.transpose()).mul_scalar(self.scaling);
        let sum = table.clone().cast(FloatDType::F32) + update;
        match &self.dora {
            Some(dora) => sum * self.scale(dora, table, Pass::INFERENCE),
            None => sum,
        }
    }

    /// Everything that is trained, by name, in a fixed order.
    pub fn parameters(&self) -> Vec<(&'static str, &Tensor<2>)> {
        let mut found = vec![("lora_embedding_a", &self.lora_a), ("lora_embedding_b", &self.lora_b)];
        found.extend(self.dora.iter().map(|dora| ("lora_magnitude", &dora.magnitude)));
        found
    }

    /// As [`parameters`](Self::parameters).
    pub fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Tensor<2>)> {
        let mut found = vec![("lora_embedding_a", &mut self.lora_a), ("lora_embedding_b", &mut self.lora_b)];
        found.extend(self.dora.iter_mut().map(|dora| ("lora_magnitude", &mut dora.magnitude)));
        found
    }

    /// Starts recording: everything that is trained becomes a leaf of the autodiff graph.
    pub fn track(&mut self) {
        self.parameters_mut().into_iter().for_each(|(_, parameter)| track(parameter));
        self.dora.iter_mut().for_each(Dora::unsettle);
    }

    /// Computes what stays the same while nothing is trained.
    pub fn settle(&mut self, table: &Tensor<2>) {
        let Some(dora) = self.dora.as_ref() else { return };
        let mut dora = dora.clone();
        dora.unsettle();
        let scale = self.scale(&dora, table, Pass::INFERENCE);
        dora.settle(scale);
        self.dora = Some(dora);
    }
}

/// `A W`, `[rank, width]`, in f32.
fn project(lora_a: &Tensor<2>, table: &Tensor<2>) -> Tensor<2> {
    matmul(lora_a.clone(), table.clone().cast(FloatDType::F32))
}
