//! A row as tokens, and the question in it.

use chat_text::{ChatError, Tokenizer};

/// A row: its tokens, and which of them the loss counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The tokens.
    pub ids: Vec<u32>,
    /// For each token whether it was to be learned. The first one's counts for nothing: nothing predicts it.
    pub learned: Vec<bool>,
}

/// What of a row is asked, and what should be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The row's first tokens, of which this many are asked.
    pub prompt_len: usize,
    /// The learned tokens behind them as text, without those that end an answer, special ones, and white space at the ends.
    pub reference: String,
}

impl Row {
    /// The row's last answer: the last stretch of learned tokens that says something, and what is learned behind it. `None`
    /// where nothing learned says anything, or where it begins the row, as in plain text: then nothing can be asked.
    /// `stop_ids` are the tokens that end an answer.
    ///
    /// # Errors
    /// The tokenizer fails on the tokens.
    pub fn question(&self, tokenizer: &Tokenizer, stop_ids: &[u32]) -> Result<Option<Question>, ChatError> {
        let is_learned = |at: usize| self.learned.get(at).copied().unwrap_or(false);
        let mut end = self.ids.len();
        loop {
            let Some(last) = (0..end).rev().find(|&at| is_learned(at)) else { return Ok(None) };
            let start = (0..last).rev().find(|&at| !is_learned(at)).map_or(0, |at| at + 1);
            let learned = (start..self.ids.len()).filter(|&at| is_learned(at)).map(|at| self.ids[at]);
            let said: Vec<u32> = learned.filter(|id| !stop_ids.contains(id)).collect();
            let text = tokenizer.decode(&said, true)?;
            if start == 0 {
                return Ok(None);
            }
            if !text.trim().is_empty() {
                return Ok(Some(Question { prompt_len: start, reference: text.trim().to_string() }));
            }
            end = start;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_last_answer_that_says_something_is_asked_for() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/reference/tiny-llama");
        let tokenizer = Tokenizer::from_dir(dir).unwrap();
        let end = tokenizer.eos_token_id().unwrap();
        let encode = |text: &str| tokenizer.encode(text, false).unwrap().ids;
        let mut row = Row { ids: Vec::new(), learned: Vec::new() };
        let mut push = |ids: &[u32], learned: bool| {
            row.ids.extend(ids);
            row.learned.extend(ids.iter().map(|_| learned));
            row.clone()
        };
        push(&encode("One and one?"), false);
        push(&encode("Two"), true);
        push(&[end], true);
        let asked = push(&encode("And four?"), false).ids.len();
        push(&encode(" Six "), true);
        let question = push(&[end], true).question(&tokenizer, &[end]).unwrap();
        let expected = Question { prompt_len: asked, reference: "Six".into() };
        assert_eq!(question.as_ref(), Some(&expected));
        // A stretch that says nothing belongs to the answer before it.
        push(&encode("\n"), false);
        assert_eq!(push(&[end], true).question(&tokenizer, &[end]).unwrap(), Some(expected));

        let ids = encode("Plain text");
        let learned = vec![true; ids.len()];
        assert_eq!(Row { ids: ids.clone(), learned }.question(&tokenizer, &[end]).unwrap(), None);
        let learned = vec![false; ids.len()];
        assert_eq!(Row { ids, learned }.question(&tokenizer, &[end]).unwrap(), None);
    }
}
