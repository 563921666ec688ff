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
    /// The loss would count no token of any row.
    #[error("{}: no row has a token to learn from: {reasons}", path.display())]
    AllMasked {
        /// The file.
        path: PathBuf,
        /// How many rows for which reason, and what to do.
        reasons: String,
    },
}
