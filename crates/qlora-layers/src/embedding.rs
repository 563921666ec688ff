//! Embedding tables with an adapter.
//!
//! With the table W `[vocabulary, width]` a token's row becomes `w_t + s·(B a_t)`, where `a_t` is column `t` of
//! `lora_a` `[rank, vocabulary]` and B is `[width, rank]`: LoRA's update of `Wᵀ`. DoRA scales each of the `width`
//! features to its magnitude. As in PEFT there is no dropout here.

use crate::dora::{Dora, Factors, norms};
use crate::lora::{matrix, normal};
use crate::lora_config::{check_alpha, check_rank};
use crate::lora_linear_config::scaling;
use crate::ops::matmul;
use crate::params::{constant, frozen, in_pass, track, trainable};
use crate::{LayerError, Pass, Scaling};
use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::Embedding;
use burn::tensor::{DType, FloatDType, Int, Tensor};

/// Picks the generator's stream, beside those of the linear layers' adapters.
const STREAM: u32 = u32::MAX;

/// Settings of an adapted embedding.
#[derive(Config, Debug)]
pub struct LoraEmbeddingConfig {
    /// Rank of the update; PEFT's `r`.
    pub rank: usize,
    /// Numerator of the scaling.
    #[config(default = 16.0)]
    pub alpha: f32,
    /// Scale by `alpha / sqrt(rank)` instead of `alpha / rank`.
    #[config(default = false)]
    pub use_rslora: bool,
    /// Train each feature's magnitude beside the update.
    #[config(default = false)]
    pub use_dora: bool,
    /// Picks the initial values.
    #[config(default = 0)]
    pub seed: u64,
}

impl LoraEmbeddingConfig {
    /// An adapted embedding in place of a burn-nn one, whose table is frozen. It changes nothing yet.
    ///
    /// # Errors
    /// [`LayerError::Config`] when `rank` is 0 or `alpha` is not positive.
    pub fn from_embedding(&self, embedding: &Embedding) -> Result<LoraEmbedding, LayerError> {
        check_rank(self.rank)?;
        check_alpha(self.alpha)?;
        let table = embedding.weight.val();
        let factor = scaling(self.alpha, self.rank, self.use_rslora);
        let adapter = EmbeddingAdapter::new(&table, self.rank, factor, self.seed);
        let adapter = if self.use_dora { adapter.with_dora(&table, None) } else { adapter };
        Ok(LoraEmbedding { table: frozen(table.without_autodiff()), adapter })
    }
}

/// A frozen embedding table with a low-rank update.
#[derive(Module, Debug)]
pub struct LoraEmbedding {
    /// The frozen table, `[vocabulary, width]`.
    pub table: Param<Tensor<2>>,
    /// The trainable update.
    pub adapter: EmbeddingAdapter,
}

impl LoraEmbedding {
    /// The rows of `ids`, in the dtype of the table.
    ///
    /// # Shapes
    /// `ids` `[batch, length]` to `[batch, length, width]`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [batch, length] = ids.dims();
        let pass = Pass { tracked: self.adapter.lora_a.is_require_grad(), dropout_seed: None };
        let rows = self.adapter.forward(&constant(&self.table), ids.reshape([batch * length]), pass);
        let [_, width] = rows.dims();
        rows.reshape([batch, length, width])
    }

    /// The table with the update in it, f32.
    pub fn merged(&self) -> Tensor<2> {
        self.adapter.merged(&constant(&self.table))
    }
}

/// A low-rank update of an embedding table that somebody else holds.
#[derive(Module, Debug)]
pub struct EmbeddingAdapter {
    /// `[rank, vocabulary]`, f32; PEFT's `lora_embedding_A`.
    pub lora_a: Param<Tensor<2>>,
    /// `[width, rank]`, f32; PEFT's `lora_embedding_B`.
    pub lora_b: Param<Tensor<2>>,
    /// Magnitudes of the features.
    pub dora: Option<Dora>,
    /// Factor of the update.
    pub scaling: Scaling,
}

impl EmbeddingAdapter {
    /// A fresh adapter that changes nothing yet: `lora_a` zero, `lora_b` standard normal, as in PEFT.
    pub fn new(table: &Tensor<2>, rank: usize, scaling: f32, seed: u64) -> Self {
        let ([vocabulary, width], device) = (table.dims(), table.device());
        let lora_a = Tensor::zeros([rank, vocabulary], (&device, DType::F32));
        let lora_b = matrix(normal(seed, STREAM, width * rank).collect(), [width, rank], &device);
        Self::from_factors(lora_a, lora_b, scaling)
    }

    /// An adapter of given factors, f32: `lora_a` `[rank, vocabulary]`, `lora_b` `[width, rank]`.
    pub fn from_factors(lora_a: Tensor<2>, lora_b: Tensor<2>, scaling: f32) -> Self {
        Self { lora_a: trainable(lora_a), lora_b: trainable(lora_b), dora: None, scaling: scaling.into() }
    }

    /// Magnitudes over the table: the given ones `[1, width]`, or those that change nothing yet.
    pub fn with_dora(mut self, table: &Tensor<2>, magnitude: Option<Tensor<2>>) -> Self {
        let squares = table.clone().without_autodiff().cast(FloatDType::F32).square().sum_dim(0);
        let magnitude = magnitude.unwrap_or_else(|| {
            let a_w = project(&constant(&self.lora_a), table);
            norms(&squares, self.factors(), a_w)
        });
        self.dora = Some(Dora::new(magnitude, squares, &self.lora_a));
        self
    }

    fn factors(&self) -> Factors<'_> {
        Factors { lora_a: &self.lora_a, lora_b: &self.lora_b, scaling: self.scaling.get() }
    }

    /// The rows of `ids`, in the dtype of the table.
    ///
    /// # Shapes
    /// `ids` `[tokens]` to `[tokens, width]`.
    pub fn forward(&self, table: &Tensor<2>, ids: Tensor<1, Int>, pass: Pass) -> Tensor<2> {
        let (lora_a, lora_b) = (in_pass(&self.lora_a, pass), in_pass(&self.lora_b, pass));
        let rows = table.clone().select(0, ids.clone()).cast(FloatDType::F32);
        let update = matmul(lora_a.select(1, ids).transpose(), lora_b.transpose()).mul_scalar(self.scaling.get());
        let sum = rows + update;
        let sum = match &self.dora {
            Some(dora) => sum * self.scale(dora, table, pass),
            None => sum,
        };
        sum.cast(table.dtype())
    }

    fn scale(&self, dora: &Dora, table: &Tensor<2>, pass: Pass) -> Tensor<2> {
        dora.scale(self.factors(), pass, |lora_a| project(&lora_a, table))
    }

    /// The table with this adapter in it, f32.
    pub fn merged(&self, table: &Tensor<2>) -> Tensor<2> {
        let (lora_a, lora_b) = (constant(&self.lora_a), constant(&self.lora_b));
        let update = matmul(lora_a.transpose(), lora_b.transpose()).mul_scalar(self.scaling.get());
        let sum = table.clone().cast(FloatDType::F32) + update;
        match &self.dora {
            Some(dora) => sum * self.scale(dora, table, Pass::INFERENCE),
            None => sum,
        }
    }

    /// Everything that is trained, by name, in a fixed order.
    pub fn parameters(&self) -> Vec<(&'static str, &Tensor<2>)> {
        let mut found: Vec<(_, &Tensor<2>)> =
            vec![("lora_embedding_a", &self.lora_a), ("lora_embedding_b", &self.lora_b)];
        found.extend(self.dora.iter().map(|dora| ("lora_magnitude", &*dora.magnitude)));
        found
    }

    /// As [`parameters`](Self::parameters).
    pub fn parameters_mut(&mut self) -> Vec<(&'static str, &mut Param<Tensor<2>>)> {
        self.dora.iter_mut().for_each(Dora::forget_scale);
        let mut found = vec![("lora_embedding_a", &mut self.lora_a), ("lora_embedding_b", &mut self.lora_b)];
        found.extend(self.dora.iter_mut().map(|dora| ("lora_magnitude", &mut dora.magnitude)));
        found
    }

    /// Starts recording: everything that is trained becomes a leaf of the autodiff graph.
    pub fn track(&mut self) {
        self.parameters_mut().into_iter().for_each(|(_, parameter)| track(parameter));
    }

    /// Saves DoRA's norms for passes without a graph.
    pub fn keep_scale(&mut self, table: &Tensor<2>) {
        let factors = Factors { lora_a: &self.lora_a, lora_b: &self.lora_b, scaling: self.scaling.get() };
        if let Some(dora) = &mut self.dora {
            dora.keep_scale(factors, |lora_a| project(&lora_a, table));
        }
    }
}

/// `A W`, `[rank, width]`, in f32.
fn project(lora_a: &Tensor<2>, table: &Tensor<2>) -> Tensor<2> {
    matmul(lora_a.clone(), table.clone().without_autodiff().cast(FloatDType::F32))
}
