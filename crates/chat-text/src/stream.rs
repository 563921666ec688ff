//! Text from tokens that arrive one by one.
//!
//! A token may hold part of a character only, and what it decodes to may depend on its neighbours
//! (SentencePiece drops the space of a first token). So a few tokens before the new one are
//! decoded with it, and text is released when it no longer ends in the middle of a character. The
//! scheme is that of Hugging Face's text-generation-inference.

use std::borrow::Borrow;

use crate::error::ChatError;
use crate::tokenizer::Tokenizer;

/// A UTF-8 character has at most four bytes. Tokens beyond that which still end in U+FFFD are not
/// waiting for the rest of one: the model wrote bytes that are no text.
const MAX_PENDING: usize = 4;

/// Tokens of a prompt that are kept as context.
const CONTEXT: usize = 8;

/// Turns tokens into text piece by piece; the pieces joined are the text. `T` is a tokenizer: a reference or an `Arc`.
#[derive(Clone, Debug)]
pub struct StreamDecoder<T> {
    tokenizer: T,
    skip_special_tokens: bool,
    /// Context that was released already, then tokens that are still held back.
    ids: Vec<u32>,
    /// How many of `ids` are context.
    released: usize,
}

impl Tokenizer {
    /// A decoder for tokens that arrive one by one and continue `prompt`, whose own text is not
    /// given out. The prompt decides whether a first word keeps its space.
    pub fn stream_decoder(&self, prompt: &[u32], skip_special_tokens: bool) -> StreamDecoder<&Self> {
        StreamDecoder::new(self, prompt, skip_special_tokens)
    }
}

impl<T: Borrow<Tokenizer>> StreamDecoder<T> {
    /// As [`Tokenizer::stream_decoder`], with a tokenizer that is owned.
    pub fn new(tokenizer: T, prompt: &[u32], skip_special_tokens: bool) -> Self {
        let context = &prompt[prompt.len().saturating_sub(CONTEXT)..];
        Self { tokenizer, skip_special_tokens, ids: context.to_vec(), released: context.len() }
    }

    /// Takes a token and returns the text that is complete with it; empty while a character is
    /// still in parts.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String, ChatError> {
        self.ids.push(id);
        let pending = self.ids.len() - self.released;
        self.release(pending > MAX_PENDING)
    }

    /// Returns what is still held back.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String, ChatError> {
        self.release(true)
    }

    fn release(&mut self, force: bool) -> Result<String, ChatError> {
        let decode = |ids: &[u32]| self.tokenizer.borrow().decode(ids, self.skip_special_tokens);
        let before = decode(&self.ids[..self.released])?;
        let after = decode(&self.ids)?;
        if after.ends_with('\u{FFFD}') && !force {
            return Ok(String::new());
        }
        // A decoder may rewrite what it wrote (an incomplete character at the end of the
        // context): then keep what both have in common.
        let common = after
            .char_indices()
            .zip(before.chars())
            .find(|((_, a), b)| a != b)
            .map_or(before.len().min(after.len()), |((at, _), _)| at);
        let text = after[common..].to_owned();
        if !text.is_empty() || force {
            self.ids.drain(..self.released);
            self.released = self.ids.len();
        }
        Ok(text)
    }
}
