//! Answers to a few fixed prompts, at each evaluation: what a run has learned, as a person reads it.
//!
//! Prompts are written as the training rows are, and answered greedily, so that two evaluations differ by what was learned between
//! them. Rank 0 alone answers. Where ranks share the base, the others [`attend`]: each of its passes needs their parts of the weights.

use chat_text::Tokenizer;
use host_copies::DeviceError;
use qlora_models::{Decoder, KvCache};
use serde::{Deserialize, Serialize};

use crate::config::EvalConfig;
use crate::error::TrainError;
use crate::prompts::Prompts;
use crate::ranks::Ranks;

/// A prompt with what the model says to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// What was asked.
    pub prompt: String,
    /// The answer, without special tokens.
    pub answer: String,
    /// Its tokens, the one that ends it included.
    pub tokens: usize,
    /// Whether the model ended it, rather than `eval.max_new_tokens`.
    pub ended: bool,
}

impl Answer {
    /// Prompt and answer as Markdown.
    pub(crate) fn to_markdown(&self) -> String {
        format!("{}\n\n{}", fenced(&self.prompt), fenced(&self.answer))
    }
}

/// A text as it is, between fences that it does not hold.
fn fenced(text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    format!("{fence}text\n{text}\n{fence}")
}

/// Prompts that are ready to be answered.
#[derive(Debug)]
pub(crate) struct Asked {
    prompts: Vec<(String, Vec<u32>)>,
    stop: Vec<u32>,
    max_new_tokens: usize,
    tokenizer: Tokenizer,
}

impl Asked {
    /// The prompts of a configuration as tokens, of which a model takes `max_positions`.
    ///
    /// # Errors
    /// A prompt can't be written or encoded, or is too long.
    pub(crate) fn new(
        config: &EvalConfig,
        prompts: &Prompts,
        tokenizer: Tokenizer,
        max_positions: usize,
    ) -> Result<Self, TrainError> {
        let prompting = prompts.prompting()?;
        let encoded = config.prompts.iter().map(|prompt| {
            let ids = prompting.prompt(&tokenizer, None, prompt)?;
            let longest = max_positions.saturating_sub(config.max_new_tokens);
            if ids.is_empty() || ids.len() > longest {
                return Err(TrainError::ConfigRange {
                    key: "eval.prompts".into(),
                    value: format!("{:?}", prompt.chars().take(40).collect::<String>()),
                    allowed: format!("has {} tokens, where there is room for 1 to {longest}", ids.len()),
                });
            }
            Ok((prompt.clone(), ids))
        });
        let prompts = encoded.collect::<Result<_, TrainError>>()?;
        let stop = prompting.stop_ids(&tokenizer);
        Ok(Self { prompts, stop, max_new_tokens: config.max_new_tokens, tokenizer })
    }

    /// What a model says to each. `tell` hears how many are answered; `sharers` are the ranks that share the base, if any do.
    ///
    /// # Errors
    /// The device fails, what came out can't be written as text, or another rank fails.
    pub(crate) fn answers(
        &self,
        model: &Decoder,
        sharers: Option<&Ranks>,
        tell: &mut dyn FnMut(usize, usize),
    ) -> Result<Vec<Answer>, TrainError> {
        let (mut answers, total) = (Vec::new(), self.prompts.len());
        for (prompt, ids) in &self.prompts {
            tell(answers.len(), total);
            answers.push(self.answer(model, sharers, prompt, ids)?);
        }
        sharers.map(|ranks| ranks.agree(false)).transpose()?;
        Ok(answers)
    }

    fn answer(
        &self,
        model: &Decoder,
        sharers: Option<&Ranks>,
        prompt: &str,
        ids: &[u32],
    ) -> Result<Answer, TrainError> {
        let (mut cache, mut answer, mut ended) = (KvCache::new(), Vec::new(), false);
        let mut next = ids.to_vec();
        while answer.len() < self.max_new_tokens && !ended {
            sharers.map(|ranks| ranks.agree(true)).transpose()?;
            let Some(logits) = model.forward_cached(&next, &mut cache) else {
                // The others do the pass that was announced.
                sharers.map(|_| model.pass_idly(false)).transpose()?;
                break;
            };
            let likeliest = logits.argmax(1).try_into_vec_as::<i32>().map_err(DeviceError::from)?;
            let id = likeliest.first().map_or(0, |id| id.unsigned_abs());
            ended = self.stop.contains(&id);
            answer.push(id);
            next = vec![id];
        }
        let text = self.tokenizer.decode(&answer, true)?;
        Ok(Answer { prompt: prompt.to_owned(), answer: text, tokens: answer.len(), ended })
    }
}

/// Does the passes of rank 0's [`Asked::answers`] along with it, without computing anything.
///
/// # Errors
/// The weights did not come, or another rank fails.
pub(crate) fn attend(model: &Decoder, sharers: &Ranks) -> Result<(), TrainError> {
    while sharers.agree(false)? {
        model.pass_idly(false)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fences_are_longer_than_what_they_hold() {
        let answer = Answer { prompt: "p".into(), answer: "a ````b```` c".into(), tokens: 3, ended: false };
        assert_eq!(answer.to_markdown(), "```text\np\n```\n\n`````text\na ````b```` c\n`````");
    }
}
