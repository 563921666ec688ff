//! Rows of single tokens, trained in place of a frozen table's: PEFT's `trainable_token_indices`.
//!
//! With the table W `[vocabulary, width]`, tokens t₁ … tₙ and rows R `[n, width]`, everything is computed with W whose
//! row tᵢ is Rᵢ: looked-up rows as well as the logits of an output head, `x Wᵀ`, whose column tᵢ is `x Rᵢᵀ`. W itself
//! is neither copied nor changed. As in PEFT the rows are the values and no update of them, and are rounded to the
//! table's dtype where they are used; a head that is the embedding's table shares the embedding's rows, and their
//! gradients add up.

use crate::ops::matmul;
use crate::params::{constant, in_pass, track, trainable};
use crate::{LayerError, Pass};
use burn::module::Param;
use burn::tensor::{DType, Device, FloatDType, IndexingUpdateOp, Int, Tensor, TensorData};
use std::collections::HashMap;

/// Rows whose sum is taken at a time: 128 MiB in f32 at a width of 4,096.
const CHUNK: usize = 8192;

/// Trained rows of a table that somebody else holds.
#[derive(Clone, Debug)]
pub struct TokenRows {
    /// `[tokens, width]`, f32; PEFT's `trainable_tokens_delta`.
    pub rows: Param<Tensor<2>>,
    tokens: Vec<u32>,
    /// The tokens on the device.
    index: Tensor<1, Int>,
    row_of: HashMap<u32, i32>,
}

impl TokenRows {
    /// The rows that `table` has for `tokens`, to be trained: they change nothing yet. The tokens are below the
    /// table's rows, and each is there once.
    pub fn of_table(table: &Tensor<2>, tokens: Vec<u32>) -> Self {
        let index = indices(tokens.iter().map(|token| *token as i32), &table.device());
        let rows = table.clone().without_autodiff().select(0, index).cast(FloatDType::F32);
        Self::from_rows(rows, tokens)
    }

    /// Given rows `[tokens, width]`, f32; each token is there once.
    pub fn from_rows(rows: Tensor<2>, tokens: Vec<u32>) -> Self {
        let index = indices(tokens.iter().map(|token| *token as i32), &rows.device());
        let row_of = tokens.iter().copied().zip(0..).collect();
        Self { rows: trainable(rows), tokens, index, row_of }
    }

    /// The tokens, in the order of their rows.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Puts the rows in place of those that were looked up.
    ///
    /// # Shapes
    /// `x` `[tokens, width]`, the table's rows of `ids`; so is the output, in the same dtype.
    pub fn in_embeddings(&self, x: Tensor<2>, ids: &[u32], pass: Pass) -> Tensor<2> {
        let here = ids.iter().zip(0..).filter_map(|(id, position)| Some((position, *self.row_of.get(id)?)));
        let (positions, rows): (Vec<i32>, Vec<i32>) = here.unzip();
        if positions.is_empty() {
            return x;
        }
        let device = x.device();
        let rows = in_pass(&self.rows, pass).select(0, indices(rows, &device)).cast(x.dtype());
        x.select_assign(0, indices(positions, &device), rows, IndexingUpdateOp::Assign)
    }

    /// Puts the products with the rows in place of those with the table's.
    ///
    /// # Shapes
    /// `x` `[tokens, width]` and `logits` `[tokens, vocabulary]`, its products with the table; so is the output.
    pub fn in_logits(&self, logits: Tensor<2>, x: Tensor<2>, pass: Pass) -> Tensor<2> {
        let rows = in_pass(&self.rows, pass).cast(x.dtype());
        let own = matmul(x, rows.transpose()).cast(logits.dtype());
        logits.select_assign(1, self.index.clone(), own, IndexingUpdateOp::Assign)
    }

    /// The table with these rows in it, in its dtype.
    pub fn merged(&self, table: Tensor<2>) -> Tensor<2> {
        let rows = constant(&self.rows).cast(table.dtype());
        table.without_autodiff().select_assign(0, self.index.clone(), rows, IndexingUpdateOp::Assign)
    }

    /// Starts recording: the rows become a leaf of the autodiff graph.
    pub fn track(&mut self) {
        track(&mut self.rows);
    }
}

fn indices(values: impl IntoIterator<Item = i32>, device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.into_iter().collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), (device, DType::I32))
}

/// A table with rows added until it has `rows`, each the mean of the old ones in the table's dtype: about what
/// transformers' `resize_token_embeddings` draws (normal around this mean, with a billionth of the rows' covariance).
/// One that is as long already stays as it is.
pub fn with_mean_rows(table: Tensor<2>, rows: usize) -> Tensor<2> {
    let ([old, width], dtype) = (table.dims(), table.dtype());
    if rows <= old || old == 0 {
        return table;
    }
    let sum = |start: usize| table.clone().narrow(0, start, CHUNK.min(old - start)).cast(FloatDType::F32).sum_dim(0);
    let total = (CHUNK..old).step_by(CHUNK).fold(sum(0), |total, start| total + sum(start));
    let mean = total.div_scalar(old as f32).cast(dtype);
    let added = mean.expand([rows - old, width]);
    Tensor::cat(vec![table, added], 0)
}

/// Refuses trained rows where nothing would train them.
pub(crate) fn refuse(config: &crate::LoraConfig) -> Result<(), LayerError> {
    match &config.trainable_token_indices {
        Some(tokens) if !tokens.is_empty() => Err(LayerError::Config {
            field: "trainable_token_indices",
            value: format!("{tokens:?}"),
            reason: "rows of single tokens are trained in decoders only, not in a Burn module",
        }),
        _ => Ok(()),
    }
}
