//! What was read, cut and left out, in words.

mod parts;

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::Format;
use crate::examples::Examples;
use crate::notice::{self, Notice, NoticeFacts};
use crate::place::Place;
use crate::words::{count, grouped, name_rows};
pub(crate) use parts::Counts;
use parts::{Parts, parts};

/// A row that was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TruncatedRow {
    /// Line of the file, from 1.
    pub line: usize,
    /// Tokens beyond `max_length`.
    pub dropped: usize,
    /// Whether there are more than that: of a row that is much longer only a beginning is made tokens.
    pub at_least: bool,
}

/// A row that was left out because the loss would count none of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MaskedRow {
    /// Line of the file, from 1.
    pub line: usize,
    /// Why.
    pub reason: MaskReason,
}

/// Why the loss counts no token of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum MaskReason {
    /// The conversation has no assistant turn.
    NoAssistantTurn,
    /// The row says of each of its answers that it is not to be learned.
    NotToBeLearned,
    /// What the model should write is empty.
    EmptyAnswer,
    /// The answer begins after `max_length`.
    Truncated,
    /// The two answers are one and the same.
    EqualAnswers,
    /// An answer that is judged leaves no room for a token of its prompt.
    LongAnswer,
}

impl MaskReason {
    const ALL: [Self; 6] = [
        Self::NoAssistantTurn,
        Self::NotToBeLearned,
        Self::EmptyAnswer,
        Self::Truncated,
        Self::EqualAnswers,
        Self::LongAnswer,
    ];

    /// What to do about it.
    pub(crate) fn cure(self) -> &'static str {
        match self {
            Self::NoAssistantTurn => "Answers must have the role `assistant`, or set data.loss_on = \"all\"",
            Self::NotToBeLearned => "One answer at least must not have `weight` 0 or `train` false",
            Self::EmptyAnswer => "Fill in the answers",
            Self::Truncated | Self::LongAnswer => "Raise data.max_length",
            Self::EqualAnswers => "`chosen` and `rejected` must differ",
        }
    }

    pub(crate) fn describe(self, max_length: usize) -> String {
        match self {
            Self::NoAssistantTurn => "no assistant turn".into(),
            Self::NotToBeLearned => "answers that are not to be learned".into(),
            Self::EmptyAnswer => "an empty answer".into(),
            Self::Truncated => format!("the answer beyond max_length = {max_length}"),
            Self::EqualAnswers => "two equal answers".into(),
            Self::LongAnswer => format!("an answer that fills max_length = {max_length} by itself"),
        }
    }
}

/// What was read of a file, cut and left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileReport {
    /// The file.
    pub path: PathBuf,
    /// The number of its source in the list of sources, from 0.
    pub source: usize,
    /// How its rows were read.
    pub format: Format,
    /// The length rows were cut to.
    pub max_length: usize,
    /// Rows to learn from.
    pub rows: usize,
    /// Rows that were cut, in the file's order; some may be among `masked`.
    pub truncated: Vec<TruncatedRow>,
    /// Rows that were left out, in the file's order.
    pub masked: Vec<MaskedRow>,
    /// What is to be known of rows that are there all the same, by kind.
    pub notices: Vec<Notice>,
    /// What their words need.
    pub facts: NoticeFacts,
}

impl FileReport {
    /// Tokens that were cut off, as far as they were counted.
    pub fn dropped_tokens(&self) -> u64 {
        self.truncated.iter().map(|row| row.dropped as u64).sum()
    }

    /// What a user should know before training: rows that were cut or left out, what of others is not read or
    /// learned, and what of them the model was not made for. One line each.
    pub fn warnings(&self) -> Vec<String> {
        self.warnings_by_class().into_iter().map(|(_, warning)| warning).collect()
    }

    /// The same, with what each is about, which is alike for all files.
    fn warnings_by_class(&self) -> Vec<(String, String)> {
        let path = self.path.display();
        let sentences = notice::sentences(&self.notices, &self.facts).into_iter();
        let mut warnings: Vec<_> =
            sentences.map(|sentence| (class_of(&sentence), format!("{path}: {sentence}"))).collect();
        if !self.truncated.is_empty() {
            let lines = self.truncated.iter().map(|row| row.line);
            let at_least = if self.truncated.iter().any(|row| row.at_least) { "at least " } else { "" };
            let warning = format!(
                "{path}: {} cut to data.max_length = {}, {at_least}{} dropped ({})",
                count(self.truncated.len() as u64, "row was", "rows were"),
                self.max_length,
                count(self.dropped_tokens(), "token", "tokens"),
                name_rows(lines, self.truncated.len(), self.facts.unit),
            );
            warnings.push(("rows that were cut".into(), warning));
        }
        if !self.masked.is_empty() {
            let warning = format!(
                "{path}: {} left out, with nothing to learn from: {}",
                count(self.masked.len() as u64, "row was", "rows were"),
                self.masked_by_reason().join("; "),
            );
            warnings.push(("rows that were left out".into(), warning));
        }
        warnings
    }

    /// What is to be known of rows that are there all the same: a sentence for each kind.
    pub fn notice_sentences(&self) -> Vec<String> {
        notice::sentences(&self.notices, &self.facts)
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

/// What was read, cut and left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataReport {
    /// The sources, as they are given.
    pub sources: String,
    /// How rows were read: of files of several layouts, the one that whatever prompts the adapter follows.
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
    /// What was read of each file, in the order of the rows.
    pub files: Vec<FileReport>,
    /// What is to be known of sources, one line each.
    pub notes: Vec<String>,
}

impl DataReport {
    pub(crate) fn new(sources: String, max_length: usize) -> Self {
        Self { sources, max_length, ..Self::default() }
    }

    /// Takes up what was read of a file, whose rows were counted.
    pub(crate) fn add(&mut self, file: FileReport, counts: Counts) {
        self.rows += counts.rows;
        self.tokens += counts.tokens;
        self.label_tokens += counts.label_tokens;
        self.longest = self.longest.max(counts.longest);
        // A conversation's template is the adapter's, whatever else was learned beside it.
        let rank = |format: Format| match format {
            Format::Chat => 2,
            Format::Alpaca => 1,
            _ => 0,
        };
        if self.files.is_empty() || rank(file.format) > rank(self.format) {
            self.format = file.format;
        }
        self.files.push(FileReport { rows: counts.rows, ..file });
    }

    /// Reports of two parts of the rows; `taken` says of each whether it is in the second. Rows left out and notices stay with the first.
    pub(crate) fn split(self, examples: &Examples, taken: &[bool]) -> (Self, Self) {
        let (mut first, mut second) =
            (Self::new(self.sources.clone(), self.max_length), Self::new(self.sources, self.max_length));
        first.notes = self.notes;
        let parts = parts(&self.files, examples, taken);
        for (file, Parts { counts, taken }) in self.files.into_iter().zip(parts) {
            let is_taken = |row: &TruncatedRow| taken.binary_search(&row.line).is_ok();
            let (theirs, ours) = file.truncated.iter().partition(|row| is_taken(row));
            let other = FileReport {
                path: file.path.clone(),
                truncated: theirs,
                masked: Vec::new(),
                notices: Vec::new(),
                facts: NoticeFacts { unit: file.facts.unit, ..NoticeFacts::default() },
                ..file
            };
            first.add(FileReport { truncated: ours, ..file }, counts[0]);
            second.add(other, counts[1]);
        }
        (first, second)
    }

    /// Where a row stands, by its number among the rows to learn from and its line.
    pub fn place(&self, row: usize, line: usize) -> Option<Place> {
        let mut end = 0;
        let file = self.files.iter().find(|file| {
            end += file.rows;
            row < end
        })?;
        Some(file.facts.unit.at(&file.path, line))
    }

    /// Rows that were cut, of all files; some may be among those left out.
    pub fn truncated(&self) -> impl Iterator<Item = &TruncatedRow> {
        self.files.iter().flat_map(|file| &file.truncated)
    }

    /// Rows that were left out, of all files.
    pub fn masked(&self) -> impl Iterator<Item = &MaskedRow> {
        self.files.iter().flat_map(|file| &file.masked)
    }

    /// What a user should know before training: rows that were cut or left out, what of others is not read or
    /// learned, and what of them the model was not made for. One line each; of what is alike in many files, the first ones.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = self.notes.clone();
        warnings.extend(first_files(self.files.iter().flat_map(FileReport::warnings_by_class)));
        warnings.extend(self.several_layouts());
        warnings
    }

    /// What is to be known of rows that are there all the same: a sentence for each kind, of several files with their names.
    pub fn notice_sentences(&self) -> Vec<String> {
        let several = self.files.len() > 1;
        let sentences = self.files.iter().flat_map(|file| {
            let of_file = file.notice_sentences().into_iter();
            of_file.map(move |sentence| {
                let told = if several { format!("{}: {sentence}", file.path.display()) } else { sentence.clone() };
                (class_of(&sentence), told)
            })
        });
        first_files(sentences)
    }

    /// What is to be known of rows of several layouts.
    fn several_layouts(&self) -> Option<String> {
        let other = self.files.iter().find(|file| file.format != self.format)?;
        let first = self.files.iter().find(|file| file.format == self.format)?;
        Some(format!(
            "rows are of several layouts, such as {} ({}) and {} ({}); the adapter is prompted as its {} rows are written",
            first.path.display(),
            first.format,
            other.path.display(),
            other.format,
            self.format
        ))
    }

    /// Why every row was left out, and what to do.
    pub(crate) fn masked_reasons(&self) -> String {
        let reasons: BTreeSet<_> = self.masked().map(|row| row.reason).collect();
        let cures: Vec<_> = reasons.into_iter().map(MaskReason::cure).collect();
        format!("{}. {}", self.masked_by_reason().join("; "), cures.join(". "))
    }

    /// How many rows were left out, by reason, each with its first lines; of several files with their names.
    pub fn masked_by_reason(&self) -> Vec<String> {
        let several = self.files.len() > 1;
        let of = |file: &FileReport| -> Vec<String> {
            let reasons = file.masked_by_reason().into_iter();
            reasons.map(|reason| if several { format!("{}: {reason}", file.path.display()) } else { reason }).collect()
        };
        let mut reasons: Vec<_> = self.files.iter().flat_map(of).collect();
        let more = reasons.len().saturating_sub(MaskReason::ALL.len() * FILES_SHOWN);
        if more > 0 {
            reasons.truncate(MaskReason::ALL.len() * FILES_SHOWN);
            reasons.push(format!("and {more} more"));
        }
        reasons
    }
}

/// Files of which the same thing is said before it says how many more there are.
const FILES_SHOWN: usize = 4;

/// What a sentence is about, which is alike for all files.
fn class_of(sentence: &str) -> String {
    sentence.split(": ").next().unwrap_or_default().to_owned()
}

/// Sentences by what they are about, of each the first ones and how many files there are more.
fn first_files(sentences: impl Iterator<Item = (String, String)>) -> Vec<String> {
    let mut classes: Vec<(String, Vec<String>)> = Vec::new();
    for (class, sentence) in sentences {
        match classes.iter_mut().find(|(known, _)| *known == class) {
            Some((_, of_class)) => of_class.push(sentence),
            None => classes.push((class, vec![sentence])),
        }
    }
    let mut shown = Vec::new();
    for (class, of_class) in classes {
        let more = of_class.len().saturating_sub(FILES_SHOWN);
        shown.extend(of_class.into_iter().take(FILES_SHOWN));
        if more > 0 {
            shown.push(format!("{class}: and so in {}", count(more as u64, "more file", "more files")));
        }
    }
    shown
}

/// The report in words, warnings included, one line each.
impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} ({}), {}, {} of them counted by the loss; the longest row has {}",
            self.sources,
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
        let file = FileReport {
            path: "a.jsonl".into(),
            format: Format::Chat,
            max_length: 64,
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
            ..FileReport::default()
        };
        let report = DataReport {
            sources: "a.jsonl".into(),
            format: Format::Chat,
            rows: 1234,
            tokens: 1_234_567,
            label_tokens: 1000,
            longest: 999,
            files: vec![file],
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

    #[test]
    fn what_is_alike_in_many_files_is_said_of_the_first() {
        let file = |number: usize| FileReport {
            path: format!("{number}.jsonl").into(),
            truncated: vec![TruncatedRow { line: 1, dropped: 1, at_least: false }],
            format: if number == 7 { Format::Text } else { Format::Chat },
            ..FileReport::default()
        };
        let mut report = DataReport::new("*.jsonl".into(), 64);
        (0..8).for_each(|number| report.add(file(number), Counts::default()));
        let warnings = report.warnings();
        assert_eq!(warnings.len(), FILES_SHOWN + 2, "{warnings:?}");
        assert!(warnings[0].starts_with("0.jsonl: 1 row was cut"), "{warnings:?}");
        assert_eq!(warnings[FILES_SHOWN], "rows that were cut: and so in 4 more files");
        assert!(warnings[FILES_SHOWN + 1].contains("such as 0.jsonl (chat) and 7.jsonl (text)"), "{warnings:?}");
    }
}
