//! Errors of this crate. Each names the file, line or key at fault and what to do.

use std::path::PathBuf;

use chat_text::ChatError;

/// What can go wrong between a file of rows and batches of tokens.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The tokenizer or the chat template.
    #[error(transparent)]
    Chat(#[from] ChatError),
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
    /// A data file is no JSONL.
    #[error("{}: {problem}", path.display())]
    FileKind {
        /// The file.
        path: PathBuf,
        /// What it is and what to do.
        problem: String,
    },
    /// A data file holds no rows.
    #[error("{}: no rows; expected JSON lines, one object a line", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// A line is not what its format asks for.
    #[error("{}:{line}: {problem}; expected {expected}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What was found.
        problem: String,
        /// What the format asks for.
        expected: String,
    },
    /// A row can't be turned into tokens and labels.
    #[error("{}:{line}: {problem}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong and what to do.
        problem: String,
    },
    /// A row has a token that the model has no embedding for.
    #[error(
        "{}:{line}: the token {token:?} has the id {id}, and the model's embedding has {embedding_rows} rows: set \
         model.resize_embeddings = true, which adds rows for new tokens and trains them, or give the tokenizer that the model was \
         trained with",
        path.display()
    )]
    OutsideEmbedding {
        /// The file.
        path: PathBuf,
        /// The first line that has the token, from 1.
        line: usize,
        /// The token's text.
        token: String,
        /// Its id.
        id: u32,
        /// Rows of the embedding.
        embedding_rows: usize,
    },
    /// With `data.strict`, what would be a warning.
    #[error("{}:{line}: {problem} (data.strict = false makes this a warning)", path.display())]
    Strict {
        /// The file.
        path: PathBuf,
        /// The first such line, from 1.
        line: usize,
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
    #[error("{}: no row has a token to learn from: {reasons}", path.display())]
    AllMasked {
        /// The file.
        path: PathBuf,
        /// How many rows for which reason, and what to do.
        reasons: String,
    },
}
