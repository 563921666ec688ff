//! Log probabilities in the two shapes of OpenAI's answers.

use serde_json::{Map, Value, json};

use super::session::TokenAt;
use crate::request::TokenLogprobs;
use crate::text::Vocabulary;

/// What stands for a probability of zero, whose logarithm JSON can't write. OpenAI's value.
const IMPOSSIBLE: f32 = -9999.0;

fn number(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { IMPOSSIBLE }
}

/// `logprobs` of a chat's choice.
pub(super) fn chat(tokens: &[TokenAt], vocabulary: &Vocabulary) -> Value {
    let entry = |id: u32, logprob: f32| {
        let mut entry = Map::new();
        entry.insert("token".into(), vocabulary.text(id, "").into());
        entry.insert("logprob".into(), json!(number(logprob)));
        entry.insert("bytes".into(), json!(vocabulary.bytes(id)));
        entry
    };
    let content = tokens.iter().map(|token| {
        let mut content = entry(token.id, token.logprobs.logprob);
        let top: Vec<_> = token.logprobs.top.iter().map(|(id, logprob)| entry(*id, *logprob)).collect();
        content.insert("top_logprobs".into(), json!(top));
        content
    });
    json!({ "content": content.collect::<Vec<_>>(), "refusal": null })
}

/// `logprobs` of a completion's choice, as it grows.
#[derive(Debug, Default)]
pub(super) struct CompletionLogprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    text_offset: Vec<usize>,
}

impl CompletionLogprobs {
    /// Adds a token. The first of a prompt has no probability.
    pub fn push(&mut self, id: u32, offset: usize, logprobs: Option<&TokenLogprobs>, vocabulary: &Vocabulary) {
        let text = |id| vocabulary.text(id, "bytes:");
        self.tokens.push(text(id));
        self.text_offset.push(offset);
        self.token_logprobs.push(logprobs.map(|logprobs| number(logprobs.logprob)));
        self.top_logprobs.push(logprobs.map(|logprobs| {
            let mut top = Map::new();
            // Of tokens with the same text the likeliest counts; the token itself is always there.
            for (id, logprob) in logprobs.top.iter().chain([&(id, logprobs.logprob)]) {
                top.entry(text(*id)).or_insert_with(|| json!(number(*logprob)));
            }
            top
        }));
    }

    /// What came since the last time.
    pub fn take(&mut self) -> Value {
        let Self { tokens, token_logprobs, top_logprobs, text_offset } = std::mem::take(self);
        json!({
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        })
    }
}
