//! What was read, cut and left out, in words.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};

use crate::config::Format;
use crate::example::Example;
use crate::notice::{self, Notice, NoticeFacts};
use crate::words::{count, grouped, name_rows};

/// A row that was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TruncatedRow {
    /// Line of the file, from 1.
    pub line: usize,
    /// Tokens beyond `max_length`.
    pub dropped: usize,
    /// Whether there are more than that: of a row that is much longer only a beginning is made tokens.
    pub at_least: bool,
}

/// A row that was left out because the loss would count none of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MaskedRow {
    /// Line of the file, from 1.
    pub line: usize,
    /// Why.
    pub reason: MaskReason,
}

/// Why the loss counts no token of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MaskReason {
    /// The conversation has no assistant turn.
    NoAssistantTurn,
    /// The row says of each of its answers that it is not to be learned.
    NotToBeLearned,
    /// What the model should write is empty.
    EmptyAnswer,
    /// The answer begins after `max_length`.
    Truncated,
}

impl MaskReason {
    const ALL: [Self; 4] = [Self::NoAssistantTurn, Self::NotToBeLearned, Self::EmptyAnswer, Self::Truncated];

    /// What to do about it.
    pub(crate) fn cure(self) -> &'static str {
        match self {
            Self::NoAssistantTurn => "Answers must have the role `assistant`, or set data.loss_on = \"all\"",
            Self::NotToBeLearned => "One answer at least must not have `weight` 0 or `train` false",
            Self::EmptyAnswer => "Fill in the answers",
            Self::Truncated => "Raise data.max_length",
        }
    }

    pub(crate) fn describe(self, max_length: usize) -> String {
        match self {
            Self::NoAssistantTurn => "no assistant turn".into(),
            Self::NotToBeLearned => "answers that are not to be learned".into(),
            Self::EmptyAnswer => "an empty answer".into(),
            Self::Truncated => format!("the answer beyond max_length = {max_length}"),
        }
    }
}

/// What was read, cut and left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DataReport {
    /// The file.
    pub path: PathBuf,
    /// How its rows were read.
    pub format: Format,
    /// The length rows were cut to.
    pub max_length: usize,
    /// Rows to learn from.
    pub rows: usize,
    /// Their tokens.
    pub tokens: u64,
    /// Those of them that the loss counts.
    pub label_tokens: u64,
    /// Tokens of the longest row.
    pub longest: usize,
    /// Rows that were cut, in the file's order; some may be among `masked`.
    pub truncated: Vec<TruncatedRow>,
    /// Rows that were left out, in the file's order.
    pub masked: Vec<MaskedRow>,
    /// What is to be known of rows that are there all the same, by kind.
    pub notices: Vec<Notice>,
    /// What their words need.
    pub facts: NoticeFacts,
}

impl DataReport {
    pub(crate) fn new(path: &Path, format: Format, max_length: usize) -> Self {
        Self { path: path.to_owned(), format, max_length, ..Self::default() }
    }

    pub(crate) fn count(&mut self, examples: &[Example]) {
        let lengths = || examples.iter().map(|example| example.input_ids.len());
        self.rows = examples.len();
        self.tokens = lengths().map(|n| n as u64).sum();
        self.label_tokens = examples.iter().map(|e| e.label_tokens() as u64).sum();
        self.longest = lengths().max().unwrap_or(0);
    }

    /// Reports of two parts of the rows; rows left out and notices stay with the first.
    pub(crate) fn split(self, first: &[Example], second: &[Example]) -> (Self, Self) {
        let lines: HashSet<usize> = second.iter().map(|example| example.line).collect();
        let (theirs, ours) = (self.truncated.iter()).partition(|row| lines.contains(&row.line));
        let mut other = Self::new(&self.path, self.format, self.max_length);
        other.truncated = theirs;
        other.count(second);
        let mut this = Self { truncated: ours, ..self };
        this.count(first);
        (this, other)
    }

    /// Tokens that were cut off, as far as they were counted.
    pub fn dropped_tokens(&self) -> u64 {
        self.truncated.iter().map(|row| row.dropped as u64).sum()
    }

    /// What a user should know before training: rows that were cut or left out, what of others is not read or
    /// learned, and what of them the model was not made for. One line each.
    pub fn warnings(&self) -> Vec<String> {
        let sentences = self.notice_sentences().into_iter();
        let mut warnings: Vec<_> = sentences.map(|sentence| format!("{}: {sentence}", self.path.display())).collect();
        if !self.truncated.is_empty() {
            let lines = self.truncated.iter().map(|row| row.line);
            let at_least = if self.truncated.iter().any(|row| row.at_least) { "at least " } else { "" };
            warnings.push(format!(
                "{}: {} cut to data.max_length = {}, {at_least}{} dropped ({})",
                self.path.display(),
                count(self.truncated.len() as u64, "row was", "rows were"),
                self.max_length,
                count(self.dropped_tokens(), "token", "tokens"),
                name_rows(lines, self.truncated.len(), self.facts.unit),
            ));
        }
        if !self.masked.is_empty() {
            warnings.push(format!(
                "{}: {} left out, with nothing to learn from: {}",
                self.path.display(),
                count(self.masked.len() as u64, "row was", "rows were"),
                self.masked_by_reason().join("; "),
            ));
        }
        warnings
    }

    /// What is to be known of rows that are there all the same: a sentence for each kind.
    pub fn notice_sentences(&self) -> Vec<String> {
        notice::sentences(&self.notices, &self.facts)
    }

    /// Why every row was left out, and what to do.
    pub(crate) fn masked_reasons(&self) -> String {
        let reasons: BTreeSet<_> = self.masked.iter().map(|row| row.reason).collect();
        let cures: Vec<_> = reasons.into_iter().map(MaskReason::cure).collect();
        format!("{}. {}", self.masked_by_reason().join("; "), cures.join(". "))
    }

    /// How many rows were left out, by reason, each with its first lines.
    pub fn masked_by_reason(&self) -> Vec<String> {
        let with = |reason| self.masked.iter().filter(move |row| row.reason == reason);
        MaskReason::ALL
            .into_iter()
            .filter(|reason| with(*reason).next().is_some())
            .map(|reason| {
                format!(
                    "{} with {} ({})",
                    with(reason).count(),
                    reason.describe(self.max_length),
                    name_rows(with(reason).map(|row| row.line), with(reason).count(), self.facts.unit),
                )
            })
            .collect()
    }
}

/// The report in words, warnings included, one line each.
impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} ({}), {}, {} of them counted by the loss; the longest row has {}",
            self.path.display(),
            count(self.rows as u64, "row", "rows"),
            self.format,
            count(self.tokens, "token", "tokens"),
            grouped(self.label_tokens),
            grouped(self.longest as u64),
        )?;
        for warning in self.warnings() {
            write!(f, "\n{warning}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_reads_as_a_sentence() {
        let report = DataReport {
            path: "a.jsonl".into(),
            format: Format::Chat,
            max_length: 64,
            rows: 1234,
            tokens: 1_234_567,
            label_tokens: 1000,
            longest: 999,
            truncated: vec![TruncatedRow { line: 3, dropped: 1, at_least: false }],
            masked: (1..=12)
                .map(|line| MaskedRow {
                    line,
                    reason: match line {
                        1 => MaskReason::NoAssistantTurn,
                        _ => MaskReason::Truncated,
                    },
                })
                .collect(),
            ..DataReport::default()
        };
        assert_eq!(
            report.to_string(),
            "a.jsonl: 1,234 rows (chat), 1,234,567 tokens, 1,000 of them counted by the loss; \
             the longest row has 999\n\
             a.jsonl: 1 row was cut to data.max_length = 64, 1 token dropped (line 3)\n\
             a.jsonl: 12 rows were left out, with nothing to learn from: \
             1 with no assistant turn (line 1); \
             11 with the answer beyond max_length = 64 (lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 1 more)"
        );
    }
}
