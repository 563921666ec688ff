//! The loss of a row's learned tokens.

use super::row::Row;
use crate::request::{Request, TokenLogprobs};

/// What a model makes of a row's learned tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenScore {
    /// The sum of `-log p` over them, in nats.
    pub loss: f64,
    /// Those that the model thinks the likeliest.
    pub correct: usize,
    /// Them.
    pub tokens: usize,
}

/// The request whose [`Event::Prompt`](crate::Event::Prompt) scores a row; it generates nothing.
pub fn request(row: &Row) -> Request {
    Request { logprobs: Some(1), prompt_logprobs: true, ..Request::new(row.ids.clone(), 0) }
}

impl TokenScore {
    /// Scores a row by the log probabilities of its tokens, as [`request`] gets them.
    pub fn new(row: &Row, logprobs: &[Option<TokenLogprobs>]) -> Self {
        let mut score = Self::default();
        for ((id, learned), logprobs) in row.ids.iter().zip(&row.learned).zip(logprobs) {
            if let (true, Some(logprobs)) = (learned, logprobs) {
                score.loss -= f64::from(logprobs.logprob);
                score.correct += usize::from(logprobs.top.first().is_some_and(|(likeliest, _)| likeliest == id));
                score.tokens += 1;
            }
        }
        score
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn learned_tokens_but_the_first_count() {
        let row = Row { ids: vec![1, 2, 3, 4], learned: vec![true, false, true, true] };
        let of = |logprob: f32, likeliest: u32| Some(TokenLogprobs { logprob, top: vec![(likeliest, -0.25)] });
        let score = TokenScore::new(&row, &[None, of(-9.0, 2), of(-0.25, 3), of(-1.5, 7)]);
        assert_eq!(score, TokenScore { loss: 1.75, correct: 1, tokens: 2 });
    }
}
