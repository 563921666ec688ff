//! Requests as clients send them.

mod chat;
mod completion;
mod one_or_many;

pub(crate) use chat::{ChatRequest, FormatKind, ResponseFormat, Tool, ToolChoice};
pub(crate) use completion::CompletionRequest;
pub(crate) use one_or_many::{PromptField, Stop};

use std::collections::BTreeMap;

use serde::Deserialize;

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct StreamOptions {
    #[serde(default)]
    pub include_usage: Option<bool>,
}

/// What both kinds of requests say about the choice of tokens.
#[derive(Clone, Debug, Default)]
pub(crate) struct SamplingFields {
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<i64>,
    pub min_p: Option<f64>,
    pub repetition_penalty: Option<f64>,
    pub presence_penalty: Option<f64>,
    pub frequency_penalty: Option<f64>,
    pub logit_bias: Option<BTreeMap<String, f64>>,
    pub seed: Option<i64>,
    pub n: Option<usize>,
    pub stop: Option<Stop>,
    pub stop_token_ids: Option<Vec<u32>>,
    pub ignore_eos: Option<bool>,
}

/// A request: the fields that both kinds have, and its own.
macro_rules! request {
    ($(#[$outer:meta])* $name:ident { $($(#[$inner:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$outer])*
        #[derive(Clone, Debug, Deserialize)]
        pub(crate) struct $name {
            $($(#[$inner])* pub $field: $type,)*
            pub model: Option<String>,
            pub temperature: Option<f64>,
            pub top_p: Option<f64>,
            pub top_k: Option<i64>,
            pub min_p: Option<f64>,
            pub repetition_penalty: Option<f64>,
            pub presence_penalty: Option<f64>,
            pub frequency_penalty: Option<f64>,
            pub logit_bias: Option<std::collections::BTreeMap<String, f64>>,
            pub seed: Option<i64>,
            pub n: Option<usize>,
            pub stop: Option<super::Stop>,
            pub stop_token_ids: Option<Vec<u32>>,
            pub ignore_eos: Option<bool>,
            pub skip_special_tokens: Option<bool>,
            pub response_format: Option<super::ResponseFormat>,
            pub stream: Option<bool>,
            pub stream_options: Option<super::StreamOptions>,
        }

        impl $name {
            /// What the request says about the choice of tokens.
            pub fn sampling(&mut self) -> super::SamplingFields {
                super::SamplingFields {
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k,
                    min_p: self.min_p,
                    repetition_penalty: self.repetition_penalty,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    logit_bias: self.logit_bias.take(),
                    seed: self.seed,
                    n: self.n,
                    stop: self.stop.take(),
                    stop_token_ids: self.stop_token_ids.take(),
                    ignore_eos: self.ignore_eos,
                }
            }
        }
    };
}
pub(crate) use request;
