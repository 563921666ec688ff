//! What an adapter put on the embedding table.

use burn::module::Param;
use burn::tensor::{Int, Tensor};
use qlora_layers::{EmbeddingAdapter, Pass, TokenRows};

/// The embedding table's part of an adapter; the table itself is the decoder's.
#[derive(Clone, Debug, Default)]
pub(crate) struct Embedding {
    /// A low-rank update of the table.
    pub(crate) lora: Option<EmbeddingAdapter>,
    /// A table trained in full, `[vocabulary, hidden]`, f32.
    pub(crate) whole: Option<Param<Tensor<2>>>,
    /// Rows of single tokens that are trained; a head that is the table has them too.
    pub(crate) tokens: Option<TokenRows>,
    /// Modules whose frozen weight the adapter's file holds too, and what it is called behind their paths: PEFT writes it
    /// along for adapted embeddings and heads, and where the vocabulary grew.
    pub(crate) brought: Vec<(String, &'static str)>,
    /// The table before an adapter brought another.
    pub(crate) original: Option<Param<Tensor<2>>>,
}

impl Embedding {
    /// Whether rows are other than those of the base's table.
    pub(crate) fn is_changed(&self) -> bool {
        self.lora.is_some() || self.whole.is_some() || self.tokens.is_some() || self.original.is_some()
    }

    /// The rows of `ids`, in the dtype of the table; `index` is the ids on the device.
    pub(crate) fn forward(&self, table: &Tensor<2>, ids: &[u32], index: Tensor<1, Int>, pass: Pass) -> Tensor<2> {
        let rows = match (&self.whole, &self.lora) {
            (Some(whole), _) => {
                let whole = if pass.tracked { whole.val() } else { whole.val().without_autodiff() };
                whole.select(0, index).cast(table.dtype())
            }
            (None, Some(lora)) => lora.forward(table, index, pass),
            (None, None) => table.clone().select(0, index),
        };
        match &self.tokens {
            Some(tokens) => tokens.in_embeddings(rows, ids, pass),
            None => rows,
        }
    }
}
