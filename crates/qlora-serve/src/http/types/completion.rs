//! `POST /v1/completions`.

use serde::Deserialize;

use super::{PromptField, request};

request! {
    /// Texts or tokens to be continued.
    CompletionRequest {
        prompt: PromptField,
        max_tokens: Option<usize>,
        /// Log probabilities of the tokens, and of this many of the likeliest.
        logprobs: Option<usize>,
        echo: Option<bool>,
        best_of: Option<usize>,
        /// Whether the tokenizer adds what begins a text.
        add_special_tokens: Option<bool>,
    }
}
