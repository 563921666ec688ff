//! Errors of this crate. Each names the file, line or key at fault and what to do.

use std::path::PathBuf;

use chat_text::ChatError;
use model_hub::HubError;

use crate::place::Place;

/// What can go wrong between a file of rows and batches of tokens.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The tokenizer or the chat template.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// A data set of the hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// A source has no files, or it is not clear which.
    #[error("{}: {problem}", path.display())]
    Source {
        /// The source, as it is given.
        path: PathBuf,
        /// What was found and what to do.
        problem: String,
    },
    /// A value in `[data]` is out of range.
    #[error("data.{key} {problem}")]
    Config {
        /// The key in `[data]`.
        key: &'static str,
        /// What is wrong with its value and what is allowed.
        problem: String,
    },
    /// A data file can't be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A data file holds no rows that can be read.
    #[error("{}: {problem}", path.display())]
    FileKind {
        /// The file.
        path: PathBuf,
        /// What it is and what to do.
        problem: String,
    },
    /// A data file holds no rows.
    #[error("{}: no rows; expected JSON lines, a JSON array, CSV, TSV or Parquet", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A row is not what its format asks for.
    #[error("{place}: {problem}; expected {expected}")]
    Line {
        /// Where.
        place: Place,
        /// What was found.
        problem: String,
        /// What the format asks for.
        expected: String,
    },
    /// A row can't be turned into tokens and labels.
    #[error("{place}: {problem}")]
    Row {
        /// Where.
        place: Place,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A row has a token that the model has no embedding for.
    #[error(
        "{place}: the token {token:?} has the id {id}, and the model's embedding has {embedding_rows} rows: set \
         model.resize_embeddings = true, which adds rows for new tokens and trains them, or give the tokenizer that the model was \
         trained with"
    )]
    OutsideEmbedding {
        /// The first row that has the token.
        place: Place,
        /// The token's text.
        token: String,
        /// Its id.
        id: u32,
        /// Rows of the embedding.
        embedding_rows: usize,
    },
    /// With `data.strict`, what would be a warning.
    #[error("{place}: {problem} (data.strict = false makes this a warning)")]
    Strict {
        /// The first such row.
        place: Place,
        /// What would be told and what to do.
        problem: String,
    },
    /// The caller asked to stop while rows were read.
    #[error("stopped while {} was read", path.display())]
    Interrupted {
        /// The file.
        path: PathBuf,
    },
    /// The loss would count no token of any row.
    #[error("{sources}: no row has a token to learn from: {reasons}")]
    AllMasked {
        /// The sources.
        sources: String,
        /// How many rows for which reason, and what to do.
        reasons: String,
    },
}
