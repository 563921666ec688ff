//! Why a request or an adapter is refused.

use std::path::PathBuf;

use chat_text::ChatError;
use host_copies::DeviceError;
use qlora_models::ModelError;

/// A count with its noun.
pub(crate) fn count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

/// Why the engine refuses or fails.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Nothing to continue.
    #[error("the prompt is empty: generation needs at least one token")]
    EmptyPrompt,
    /// A token without an embedding.
    #[error(
        "token {token} of the prompt is beyond the model's vocabulary of {vocab_size} (vocab_size): the tokenizer was extended and the model was not; take the tokenizer that belongs to the model, or the adapter that was trained with model.resize_embeddings = true"
    )]
    BeyondVocabulary {
        /// The token.
        token: u32,
        /// Ids below this are known.
        vocab_size: usize,
    },
    /// A prompt that leaves no room for an answer.
    #[error("the prompt has {tokens} tokens; prompt and answer together may have {max_tokens}")]
    TooLong {
        /// Of the prompt.
        tokens: usize,
        /// Of prompt and answer.
        max_tokens: usize,
    },
    /// Nothing is served under this name.
    #[error("no adapter is called {name:?}")]
    UnknownAdapter {
        /// The name.
        name: String,
    },
    /// The name of an adapter that is there.
    #[error("an adapter called {name:?} is loaded already: unload it first, or choose another name")]
    NameTaken {
        /// The name.
        name: String,
    },
    /// As many adapters as may be.
    #[error("{} loaded, as many as the server takes: unload one first", count(*max_adapters, "adapter is", "adapters are"))]
    TooManyAdapters {
        /// The bound.
        max_adapters: usize,
    },
    /// An adapter that can't be read or does not fit.
    #[error("the adapter in {} can't be served", dir.display())]
    Adapter {
        /// Its folder.
        dir: PathBuf,
        /// Why.
        #[source]
        source: Box<ModelError>,
    },
    /// What an adapter is prompted with can't be read, or is none.
    #[error("what the adapter in {} is prompted with can't be used", dir.display())]
    Prompting {
        /// The adapter's folder.
        dir: PathBuf,
        /// Why.
        #[source]
        source: Box<ChatError>,
    },
    /// Something that may have no end, or is no file.
    #[error("{} is not a regular file", file.display())]
    NotAFile {
        /// Its path.
        file: PathBuf,
    },
    /// A configuration that is of other weights.
    #[error(
        "the adapter in {} has weights for none of its target_modules ({names}): correct them in its adapter_config.json",
        dir.display()
    )]
    NoTargets {
        /// Its folder.
        dir: PathBuf,
        /// The names.
        names: String,
    },
    /// The queue is full.
    #[error("{} already: try again later", count(*waiting, "request waits", "requests wait"))]
    Busy {
        /// How many.
        waiting: usize,
    },
    /// Nothing more is taken.
    #[error("the engine is closing and takes no more requests")]
    Closed,
    /// Nothing more is answered.
    #[error("the engine failed and answers nothing more; the server's log says why")]
    EngineFailed,
    /// The budget holds too little.
    #[error(
        "the cache budget of {budget} bytes holds {} of {block_tokens} tokens: one answer needs 2 or more",
        count(*blocks, "block", "blocks")
    )]
    CacheTooSmall {
        /// Bytes that were allowed.
        budget: u64,
        /// Blocks that fit.
        blocks: usize,
        /// Tokens of a block.
        block_tokens: usize,
    },
    /// An answer broke off.
    #[error("{0}")]
    Failed(String),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}
