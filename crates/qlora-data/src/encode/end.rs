//! The token that ends a row: without one a model does not learn to stop.

use chat_text::{ChatError, MASKED_LABEL, Tokenizer};

use super::prefix::Tokens;
use crate::config::DataConfig;
use crate::error::DataError;

/// Tokens from the end of what is learned among which a template's own end token is looked for: it has a line break
/// or two behind it at most.
const NEAR_THE_END: usize = 4;

/// The tokens at which generation stops.
#[derive(Clone, Debug, Default)]
pub(crate) struct EndTokens {
    /// Id and text of each; the one that is appended comes first.
    stops: Vec<(u32, String)>,
    /// Whether a chat template's text is ended too.
    mends_templates: bool,
}

impl EndTokens {
    /// `data.end_token`, then those that the checkpoint names.
    ///
    /// # Errors
    /// [`DataError::Config`] if `data.end_token` is not one token.
    pub fn new(config: &DataConfig, tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let mut stops = Vec::new();
        if let Some(text) = &config.end_token {
            // It is written into texts, so it has to be recognised there.
            let ids = tokenizer.encode(text, false)?.ids;
            match (tokenizer.token_to_id(text), ids.as_slice()) {
                (Some(id), [only]) if id == *only => stops.push((id, text.clone())),
                _ => {
                    let known = tokenizer.eos_token_id().and_then(|id| tokenizer.id_to_token(id));
                    let known = known.map(|text| format!(", such as {text:?}")).unwrap_or_default();
                    return Err(DataError::Config {
                        key: "end_token",
                        problem: format!(
                            "= {text:?} is not one token of {}; give the text of one of its special tokens{known}",
                            tokenizer.dir().display()
                        ),
                    });
                }
            }
        }
        for &id in tokenizer.eos_token_ids() {
            if stops.iter().all(|(stop, _)| *stop != id) {
                stops.push((id, tokenizer.id_to_token(id).unwrap_or_default()));
            }
        }
        Ok(Self { stops, mends_templates: config.end_token.is_some() })
    }

    /// Texts of the tokens, the one that is appended first.
    pub fn texts(&self) -> Vec<String> {
        self.stops.iter().map(|(_, text)| text.clone()).collect()
    }

    /// The text of the token that ends rows without a template; empty if there is none.
    pub fn text_of_appended(&self) -> &str {
        self.stops.first().map_or("", |(_, text)| text)
    }

    /// The text that is written after an answer where a chat template writes none.
    pub fn mend(&self) -> Option<&str> {
        self.stops.first().filter(|_| self.mends_templates).map(|(_, text)| text.as_str())
    }

    /// Whether a text has one of the tokens.
    pub fn is_in(&self, text: &str) -> bool {
        self.stops.iter().any(|(_, stop)| !stop.is_empty() && text.contains(stop))
    }

    /// Whether a text ends with one of the tokens, and blanks.
    pub fn ends(&self, text: &str) -> bool {
        self.stops.iter().any(|(_, stop)| !stop.is_empty() && text.trim_end().ends_with(stop))
    }

    /// Whether one of the tokens is among the last ones that are learned without a gap.
    pub(super) fn is_learned_last(&self, tokens: &Tokens) -> bool {
        let run = tokens.labels.iter().rev().skip_while(|label| **label == MASKED_LABEL);
        let mut run = run.take_while(|label| **label != MASKED_LABEL);
        run.any(|label| self.stops.iter().any(|(stop, _)| i64::from(*stop) == *label))
    }

    /// The special token that is learned last where none of these is: what a template ends turns with, and what
    /// generation does not stop at.
    pub(super) fn other_end(&self, tokens: &Tokens, tokenizer: &Tokenizer) -> Result<Option<String>, ChatError> {
        let last = tokens.labels.iter().rev().skip_while(|label| **label == MASKED_LABEL);
        for id in last.take_while(|label| **label != MASKED_LABEL).take(NEAR_THE_END) {
            let Ok(id) = u32::try_from(*id) else { continue };
            // Special tokens are those that decoding can leave out.
            if tokenizer.decode(&[id], true)?.is_empty() && !tokenizer.decode(&[id], false)?.is_empty() {
                return Ok(tokenizer.id_to_token(id));
            }
        }
        Ok(None)
    }

    /// Ends a text that no template ended. Returns whether there is a token to end it with.
    pub(super) fn append(&self, tokens: &mut Tokens, learned: bool) -> bool {
        let Some(&(end, _)) = self.stops.first() else {
            return false;
        };
        // A beginning is longer than a row already.
        if tokens.is_prefix {
            return true;
        }
        let label = if learned { i64::from(end) } else { MASKED_LABEL };
        if tokens.ids.last() == Some(&end) {
            // Written in the text, or added by the tokenizer with no place in the text.
            if let Some(last) = tokens.labels.last_mut() {
                *last = label;
            }
        } else {
            tokens.ids.push(end);
            tokens.labels.push(label);
        }
        true
    }
}
