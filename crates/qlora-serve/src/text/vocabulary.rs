//! The texts of single tokens: for log probabilities, and for constraints.

use std::sync::Arc;

use chat_text::Tokenizer;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};

/// What the tokens of a tokenizer stand for.
#[derive(Debug)]
pub struct Vocabulary {
    bytes: Vec<Vec<u8>>,
    special: Vec<u32>,
}

impl Vocabulary {
    /// The vocabulary of a tokenizer.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        Self { bytes: tokenizer.token_bytes(), special: tokenizer.special_token_ids() }
    }

    /// The bytes of a token; empty for an id that there is no token for.
    pub fn bytes(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], Vec::as_slice)
    }

    /// The text of a token. Where its bytes are no text by themselves, they are written as `\xe2\x82`, behind a
    /// `prefix`.
    pub fn text(&self, id: u32, prefix: &str) -> String {
        let bytes = self.bytes(id);
        match str::from_utf8(bytes) {
            Ok(text) => text.into(),
            Err(_) => bytes.iter().fold(prefix.to_owned(), |text, byte| text + &format!("\\x{byte:02x}")),
        }
    }

    /// Whether a token is special, so that decoders leave it out.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.binary_search(&id).is_ok()
    }

    /// The vocabulary as `llguidance` takes it: ids below `vocab_size`, and the tokens that end an answer. Where there
    /// are none of these, an id at `vocab_size` stands for them.
    pub(super) fn token_env(&self, vocab_size: usize, eos: &[u32]) -> (TokEnv, Vec<u32>) {
        let mut words = self.bytes.clone();
        words.resize(vocab_size, Vec::new());
        for &id in &self.special {
            // The mark of special tokens: no text matches them.
            if let Some(word) = words.get_mut(id as usize) {
                word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
            }
        }
        let mut eos: Vec<u32> = eos.iter().copied().filter(|&id| (id as usize) < vocab_size).collect();
        if eos.is_empty() {
            eos.push(words.len() as u32);
            words.push(Vec::new());
        }
        let trie = TokTrie::from(&TokRxInfo::new(words.len() as u32, eos[0]), &words).with_eos_tokens(&eos);
        (Arc::new(ApproximateTokEnv::new(trie)), eos)
    }
}
