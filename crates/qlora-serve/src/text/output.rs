//! One answer from tokens to what a client gets: text, stop strings, reasoning, tool calls, in this order.

use std::sync::Arc;

use chat_text::{ChatError, StreamDecoder, Tokenizer};

use super::reasoning::{self, Part, ReasoningSplit};
use super::stops::StopStrings;
use super::tools::{Call, Piece, ToolFormat, ToolParser};

/// How an answer is read.
#[derive(Clone, Debug, Default)]
pub struct OutputOptions {
    /// Texts that end the answer and are no part of it.
    pub stops: Vec<String>,
    /// Whether a reasoning is split off, and whether the prompt opened it.
    pub reasoning: Option<bool>,
    /// The format of tool calls, and the tools' names.
    pub tools: Option<(ToolFormat, Vec<String>)>,
    /// Whether the answer ends at its first call.
    pub one_call: bool,
    /// Whether special tokens are written.
    pub special_tokens: bool,
}

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delta {
    /// Of the reasoning.
    Reasoning(String),
    /// Of the content.
    Content(String),
    /// A call of a tool.
    Call(Call),
}

/// Reads one answer.
#[derive(Debug)]
pub struct Output {
    decoder: StreamDecoder<Arc<Tokenizer>>,
    /// Special tokens that are read for: they are text, whatever becomes of others.
    tags: Vec<(u32, &'static str)>,
    stops: StopStrings,
    reasoning: ReasoningSplit,
    tools: Option<ToolParser>,
    one_call: bool,
    calls: usize,
    decoded: usize,
    decoded_chars: usize,
    passed: usize,
}

impl Output {
    /// For an answer that continues `prompt`.
    pub fn new(tokenizer: &Arc<Tokenizer>, prompt: &[u32], options: &OutputOptions) -> Self {
        let mut tags = Vec::new();
        if !options.special_tokens {
            let split = options.reasoning.map_or(&[][..], |_| &[reasoning::OPEN, reasoning::CLOSE]);
            let tools = options.tools.as_ref().map_or(&[][..], |(format, _)| format.tags());
            let id = |&tag: &&'static str| Some((tokenizer.token_to_id(tag)?, tag));
            tags.extend(split.iter().chain(tools).filter_map(id));
        }
        Self {
            decoder: StreamDecoder::new(tokenizer.clone(), prompt, !options.special_tokens),
            tags,
            stops: StopStrings::new(options.stops.clone()),
            reasoning: options.reasoning.map_or_else(ReasoningSplit::none, ReasoningSplit::new),
            tools: options.tools.clone().map(|(format, names)| ToolParser::new(format, names)),
            one_call: options.one_call,
            calls: 0,
            decoded: 0,
            decoded_chars: 0,
            passed: 0,
        }
    }

    /// Takes a token.
    ///
    /// # Errors
    /// The tokenizer fails on it.
    pub fn push(&mut self, id: u32) -> Result<Vec<Delta>, ChatError> {
        let tag = self.tags.iter().find(|(tag, _)| *tag == id).map(|(_, text)| *text);
        let text = match tag {
            None => self.decoder.push(id)?,
            Some(tag) => {
                // What the decoder makes of it, nothing or the tag, is left out.
                let mut text = self.decoder.finish()?;
                self.decoder.push(id)?;
                text += tag;
                text
            }
        };
        Ok(self.text(&text, false))
    }

    /// Ends the answer.
    ///
    /// # Errors
    /// The tokenizer fails on what is left.
    pub fn finish(&mut self) -> Result<Vec<Delta>, ChatError> {
        let text = self.decoder.finish()?;
        Ok(self.text(&text, true))
    }

    /// Whether the answer is over before its tokens: a stop string came, or the only call.
    pub fn stopped(&self) -> bool {
        self.stops.found() || self.called_once()
    }

    /// The calls that came.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Bytes of text that came out of tokens, including what is held back or left out.
    pub fn decoded(&self) -> usize {
        self.decoded
    }

    /// [`decoded`](Self::decoded) in characters.
    pub fn decoded_chars(&self) -> usize {
        self.decoded_chars
    }

    /// Bytes of text that can no longer become a stop string.
    pub fn passed(&self) -> usize {
        self.passed
    }

    fn called_once(&self) -> bool {
        self.one_call && self.calls > 0
    }

    fn text(&mut self, text: &str, end: bool) -> Vec<Delta> {
        self.decoded += text.len();
        self.decoded_chars += text.chars().count();
        let mut passed = self.stops.push(text);
        if end {
            passed += &self.stops.finish();
        }
        self.passed += passed.len();
        let mut parts = self.reasoning.push(&passed);
        if end {
            parts.extend(self.reasoning.finish());
        }
        let mut deltas = Vec::new();
        for part in parts {
            match part {
                Part::Reasoning(text) => deltas.push(Delta::Reasoning(text)),
                Part::Content(text) => match &mut self.tools {
                    None => deltas.push(Delta::Content(text)),
                    Some(parser) => {
                        let pieces = parser.push(&text);
                        self.pieces(pieces, &mut deltas);
                    }
                },
            }
        }
        if end && let Some(parser) = &mut self.tools {
            let pieces = parser.finish();
            self.pieces(pieces, &mut deltas);
        }
        deltas
    }

    fn pieces(&mut self, pieces: Vec<Piece>, deltas: &mut Vec<Delta>) {
        for piece in pieces {
            if self.called_once() {
                return;
            }
            deltas.push(match piece {
                Piece::Content(text) => Delta::Content(text),
                Piece::Call(call) => {
                    self.calls += 1;
                    Delta::Call(call)
                }
            });
        }
    }
}
