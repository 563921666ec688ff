//! One column measured: every row's loss, every question's answer.

use std::collections::VecDeque;
use std::sync::Arc;

use anyhow::{Result, anyhow};
use burn_qlora::Tokenizer;
use burn_qlora::qlora_serve::eval::{Estimate, Question, TokenScore, request};
use burn_qlora::qlora_serve::{Answer, Event, FinishReason, Finished, Handle, Request};

use super::rows::{EvalRow, Rows};
use super::{Asked, Column};
use crate::answers::{Answering, Asker};
use crate::args::EvalArgs;
use crate::progress::RowBar;

/// Measures columns.
pub struct Measurement<'a> {
    /// The flags.
    pub args: &'a EvalArgs,
    /// What they ask for.
    pub asked: &'a Asked,
    /// What makes text of tokens.
    pub tokenizer: &'a Arc<Tokenizer>,
    /// The engine.
    pub handle: &'a Handle,
}

/// What came of a column's rows.
pub struct Measured {
    /// One for each row.
    pub rows: Vec<Outcome>,
    /// Tokens that prompt and answer may have.
    max_tokens: usize,
    /// Rows whose answer was cut while they were read.
    cut: usize,
    /// Whether answers were asked for.
    answers: bool,
    /// Whether a pattern was.
    pattern: bool,
}

/// What came of a row.
#[derive(Default)]
pub struct Outcome {
    /// Its tokens' score; `None` where it was not asked for, or the row is too long.
    pub score: Option<TokenScore>,
    /// Its answer.
    pub answer: Option<Answered>,
    /// Whether there was no room for the row, or for an answer.
    too_long: bool,
    has_question: bool,
}

/// An answer.
pub struct Answered {
    /// Its text, without white space at the ends.
    pub text: String,
    /// How it ended.
    pub finished: Finished,
    /// Whether it is the reference.
    pub exact: bool,
    /// Whether the pattern finds the same; `None` without a pattern, or where it finds nothing in the reference.
    pub regex: Option<bool>,
}

impl Measurement<'_> {
    /// Measures a column.
    pub fn column(&self, column: &Column) -> Result<Measured> {
        let Rows { rows, cut, .. } = &*column.rows;
        let (asked, name) = (self.asked, &column.voice.name);
        let mut bar = RowBar::new(name, rows.len() * (usize::from(asked.loss) + usize::from(asked.answers())));
        let mut outcomes: Vec<Outcome> = rows.iter().map(|_| Outcome::default()).collect();
        if asked.loss {
            let scores = self.scores(column, &mut bar)?;
            for (outcome, score) in outcomes.iter_mut().zip(scores) {
                outcome.too_long |= score.is_none();
                outcome.score = score;
            }
        }
        if asked.answers() {
            let answers = self.answers(column, &mut bar)?;
            for ((outcome, answer), row) in outcomes.iter_mut().zip(answers).zip(rows) {
                outcome.has_question = row.question.is_some();
                outcome.too_long |= answer.is_none() && outcome.has_question;
                outcome.answer = answer;
            }
        }
        bar.finish();
        Ok(Measured {
            rows: outcomes,
            max_tokens: self.handle.limits().max_tokens,
            cut: *cut,
            answers: asked.answers(),
            pattern: asked.pattern.is_some(),
        })
    }

    /// Whether the engine has room for this many tokens and an answer.
    fn has_room(&self, tokens: usize) -> bool {
        tokens < self.handle.limits().max_tokens
    }

    fn scores(&self, column: &Column, bar: &mut RowBar) -> Result<Vec<Option<TokenScore>>> {
        let ask = |EvalRow { row, .. }: &EvalRow| {
            if !self.has_room(row.ids.len()) {
                return Ok(None);
            }
            let adapter = column.voice.adapter.as_deref().map(|name| self.handle.adapter(name)).transpose()?;
            let asked = Request { adapter, ..request(row) };
            Ok(Some(self.handle.submit(asked)?))
        };
        let take = |EvalRow { row, .. }: &EvalRow, answer: Option<Answer>| {
            bar.advance();
            let Some(mut answer) = answer else { return Ok(None) };
            let mut score = None;
            loop {
                match answer.next_blocking() {
                    Some(Event::Prompt(logprobs)) => score = Some(TokenScore::new(row, &logprobs)),
                    Some(Event::Started { .. } | Event::Token(_)) => {}
                    Some(Event::Finished(_)) => return Ok(score),
                    Some(Event::Failed(message)) => return Err(anyhow!(message)),
                    None => return Err(anyhow!("the engine ended before its answer")),
                }
            }
        };
        in_order(self.handle.limits().max_waiting, &column.rows.rows, ask, take)
    }

    fn answers(&self, column: &Column, bar: &mut RowBar) -> Result<Vec<Option<Answered>>> {
        let asker = Asker {
            tokenizer: self.tokenizer,
            sampling: self.args.choice.sampling()?,
            stop_ids: column.rows.stop_ids.clone(),
            stops: self.args.choice.stop.clone(),
            max_tokens: self.args.choice.max_new_tokens,
        };
        let ask = |EvalRow { row, question, .. }: &EvalRow| {
            let asked = question.as_ref().filter(|question| self.has_room(question.prompt_len));
            let ask = |Question { prompt_len, .. }: &Question| {
                asker.ask(self.handle, &row.ids[..*prompt_len], column.voice.adapter.as_deref())
            };
            asked.map(ask).transpose()
        };
        let take = |EvalRow { question, .. }: &EvalRow, answering: Option<Answering>| {
            bar.advance();
            let (Some(question), Some(answering)) = (question, answering) else { return Ok(None) };
            let mut text = String::new();
            let finished = answering.follow(|piece| {
                text += piece;
                Ok(())
            })?;
            Ok(Some(self.judge(text.trim(), finished, question)))
        };
        in_order(self.handle.limits().max_waiting, &column.rows.rows, ask, take)
    }

    fn judge(&self, text: &str, finished: Finished, Question { reference, .. }: &Question) -> Answered {
        let regex = self.asked.pattern.as_ref().and_then(|pattern| pattern.agree(text, reference));
        Answered { text: text.to_string(), finished, exact: text == reference, regex }
    }
}

/// Asks for all rows, so many ahead of the one that is taken, and takes what comes in their order.
fn in_order<R, A, T>(
    ahead: usize,
    rows: &[R],
    ask: impl Fn(&R) -> Result<A>,
    mut take: impl FnMut(&R, A) -> Result<T>,
) -> Result<Vec<T>> {
    let mut waiting = VecDeque::new();
    let mut taken = Vec::with_capacity(rows.len());
    for row in rows {
        if waiting.len() == ahead
            && let Some((row, asked)) = waiting.pop_front()
        {
            taken.push(take(row, asked)?);
        }
        waiting.push_back((row, ask(row)?));
    }
    for (row, asked) in waiting {
        taken.push(take(row, asked)?);
    }
    Ok(taken)
}

/// What is estimated over rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figure {
    /// The mean loss of learned tokens, nats.
    Loss,
    /// The part of learned tokens that were the likeliest.
    Accuracy,
    /// The part of answers that are the reference.
    Exact,
    /// The part of answers in which the pattern finds what it finds in the reference.
    Regex,
}

impl Figure {
    /// Its name in JSON.
    pub fn key(self) -> &'static str {
        match self {
            Self::Loss => "loss",
            Self::Accuracy => "token_accuracy",
            Self::Exact => "exact",
            Self::Regex => "regex",
        }
    }

    /// A row's sum, and what it counts; `None` where the row says nothing of it.
    fn of(self, Outcome { score, answer, .. }: &Outcome) -> Option<(f64, usize)> {
        let is_so = |is_so: bool| (f64::from(u8::from(is_so)), 1);
        match self {
            Self::Loss => score.map(|score| (score.loss, score.tokens)),
            Self::Accuracy => score.map(|score| (score.correct as f64, score.tokens)),
            Self::Exact => answer.as_ref().map(|answer| is_so(answer.exact)),
            Self::Regex => answer.as_ref().and_then(|answer| answer.regex).map(is_so),
        }
    }
}

impl Measured {
    /// A figure over all rows.
    pub fn estimate(&self, figure: Figure) -> Estimate {
        Estimate::of_rows(&self.rows.iter().filter_map(|row| figure.of(row)).collect::<Vec<_>>())
    }

    /// A figure less that of another column of the same rows. The error is the difference's own: what makes a row hard
    /// for both is not in it.
    pub fn difference(&self, other: &Self, figure: Figure) -> Estimate {
        let pairs = self.rows.iter().zip(&other.rows).filter_map(|(row, other)| figure.of(row).zip(figure.of(other)));
        let differences = pairs.map(|((sum, count), (other, _))| (sum - other, count));
        Estimate::of_rows(&differences.collect::<Vec<_>>())
    }

    /// The answers.
    pub fn answers(&self) -> impl Iterator<Item = &Answered> {
        self.rows.iter().filter_map(|row| row.answer.as_ref())
    }

    /// Rows that the engine had no room for.
    pub fn too_long(&self) -> usize {
        self.rows.iter().filter(|row| row.too_long).count()
    }

    /// Rows that were not asked because they have no answer behind a question, or a cut one.
    pub fn unasked(&self) -> usize {
        if self.answers { self.rows.iter().filter(|row| !row.has_question).count() } else { 0 }
    }

    /// Answers that were not at their end.
    pub fn unfinished(&self) -> usize {
        self.answers().filter(|answer| answer.finished.reason == FinishReason::Length).count()
    }

    /// Answers with a reference in which the pattern finds nothing.
    pub fn unmatched(&self) -> usize {
        if self.pattern { self.answers().filter(|answer| answer.regex.is_none()).count() } else { 0 }
    }

    /// What of the rows was not measured, and which answers were cut: a sentence for each.
    pub fn notes(&self, name: &str) -> Vec<String> {
        let cut = if self.answers { self.cut } else { 0 };
        let mut notes = Vec::new();
        let mut note = |count: usize, what: String| {
            if count > 0 {
                notes.push(format!("{name}: {count} of {} rows {what}", self.rows.len()));
            }
        };
        let max_tokens = self.max_tokens;
        note(
            self.too_long(),
            format!("are too long: prompt and answer may have {max_tokens} tokens; they are left out"),
        );
        note(cut, "were cut to --max-length, so that nothing was asked".into());
        note(self.unasked().saturating_sub(cut), "have no answer behind a question, so that nothing was asked".into());
        note(self.unmatched(), "have an answer in which --regex finds nothing; they don't count for it".into());
        note(self.unfinished(), "were answered up to --max-new-tokens, not to the answer's end".into());
        notes
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::in_order;
    use std::cell::Cell;

    #[test]
    fn rows_are_asked_ahead_and_taken_in_order() {
        let rows: Vec<usize> = (0..10).collect();
        let (under_way, most) = (Cell::new(0), Cell::new(0));
        let ask = |row: &usize| {
            under_way.set(under_way.get() + 1);
            most.set(most.get().max(under_way.get()));
            Ok(row * row)
        };
        let take = |row: &usize, square: usize| {
            under_way.set(under_way.get() - 1);
            Ok((*row, square))
        };
        let taken = in_order(3, &rows, ask, take).unwrap();
        assert_eq!(taken, (0..10).map(|row| (row, row * row)).collect::<Vec<_>>());
        assert_eq!((most.get(), under_way.get()), (3, 0));
    }
}
