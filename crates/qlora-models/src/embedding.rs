//! What an adapter put on the embedding table.

use burn::module::Param;
use burn::tensor::{Int, Tensor};
use qlora_layers::{EmbeddingAdapter, Pass};

/// The embedding table's part of an adapter; the table itself is the decoder's.
#[derive(Clone, Debug, Default)]
pub(crate) struct Embedding {
    /// A low-rank update of the table.
    pub(crate) lora: Option<EmbeddingAdapter>,
    /// A table trained in full, `[vocabulary, hidden]`, f32.
    pub(crate) whole: Option<Param<Tensor<2>>>,
    /// Modules whose weight the adapter's file holds too: PEFT writes it along for adapted embeddings and heads.
    pub(crate) brought: Vec<String>,
    /// The table before an adapter brought another.
    pub(crate) original: Option<Tensor<2>>,
}

impl Embedding {
    /// The rows of `ids`, in the dtype of the table.
    pub(crate) fn forward(&self, table: &Tensor<2>, ids: Tensor<1, Int>, pass: Pass) -> Tensor<2> {
        match (&self.whole, &self.lora) {
            (Some(whole), _) => {
                let whole = if pass.tracked { whole.val() } else { whole.val().without_autodiff() };
                whole.select(0, ids).cast(table.dtype())
            }
            (None, Some(lora)) => lora.forward(table, ids, pass),
            (None, None) => table.clone().select(0, ids),
        }
    }
}
