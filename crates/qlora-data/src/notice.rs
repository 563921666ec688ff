//! What a user should know of rows that are trained on all the same: one notice for each thing, with
//! its count and first lines.

use std::borrow::Cow;
use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::place::Unit;
use crate::words::{LINES_SHOWN, count, name_rows};

/// Different things of one kind that are named; a file with more of them has keys of no meaning.
const SUBJECTS_NAMED: usize = 20;

/// What kind of thing a notice tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum NoticeKind {
    /// A row has a key that is not read; the subject is the key.
    UnreadKey,
    /// The chat template leaves something of a row out; the subject says what.
    Unwritten,
    /// A conversation has an empty answer among others.
    EmptyAnswer,
    /// No token at which generation stops is learned after the last answer; the subject is the special token that
    /// the template writes instead, if it writes one.
    NoEndToken,
    /// A row is longer than what the model was made for.
    LongerThanModel,
}

/// Something to know of some rows that are trained on all the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notice {
    /// What kind of thing it is.
    pub kind: NoticeKind,
    /// What of the row, where the kind does not say it all; in words.
    pub subject: String,
    /// Rows that have it.
    pub rows: usize,
    /// Lines of the first ten of them.
    pub first_lines: Vec<usize>,
}

/// What the words of a notice need to know beside its rows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NoticeFacts {
    /// Texts of the tokens at which generation stops; the first would be appended.
    pub end_tokens: Vec<String>,
    /// The length that the model was made for, and where it is written.
    pub positions: Option<(usize, Cow<'static, str>)>,
    /// What the file counts its rows in.
    pub unit: Unit,
}

impl NoticeKind {
    /// What it is, for rows that are named after it, and what to do.
    pub(crate) fn words(self, facts: &NoticeFacts) -> (String, String) {
        match self {
            Self::UnreadKey => (
                "keys of rows that are not read".into(),
                "rename them to what data.format knows, or leave them out".into(),
            ),
            Self::Unwritten => (
                "the chat template does not write".into(),
                "give a data.chat_template that does, or rows without it".into(),
            ),
            Self::EmptyAnswer => (
                "empty answers among others".into(),
                "only data.loss_on = \"all\" learns them: fill them in, or leave the turns out".into(),
            ),
            Self::NoEndToken => {
                let (stops, cure) = match facts.end_tokens.as_slice() {
                    [] => {
                        ("the tokenizer names none".into(), "data.end_token = \"TOKEN\" names and appends one".into())
                    }
                    [first, ..] => (
                        facts.end_tokens.join(" or "),
                        format!(
                            "data.end_token = {first:?} appends one, and may name another that the template writes"
                        ),
                    ),
                };
                (format!("no end token ({stops}) after the last answer, so the model does not learn to stop"), cure)
            }
            Self::LongerThanModel => {
                let (positions, source) = facts.positions.clone().unwrap_or_default();
                (
                    format!("longer than the {positions} tokens that the model was made for ({source})"),
                    format!("set data.max_length = {positions}"),
                )
            }
        }
    }
}

/// The notices of a file while it is read, in the order in which they were met.
#[derive(Debug, Default)]
pub(crate) struct Notices {
    notices: Vec<Notice>,
    /// Where each is, and the last line that has it.
    at: HashMap<(NoticeKind, String), (usize, usize)>,
    subjects: HashMap<NoticeKind, usize>,
}

impl Notices {
    /// Takes note of a row.
    pub fn add(&mut self, kind: NoticeKind, subject: String, line: usize) {
        let mut key = (kind, subject);
        if !self.at.contains_key(&key) {
            let subjects = self.subjects.entry(kind).or_default();
            if *subjects == SUBJECTS_NAMED {
                key.1 = "others".into();
            } else {
                *subjects += 1;
            }
        }
        let (index, last_line) = self.at.entry(key.clone()).or_insert_with(|| {
            self.notices.push(Notice { kind, subject: key.1, rows: 0, first_lines: Vec::new() });
            (self.notices.len() - 1, 0)
        });
        // A row may have the same thing twice.
        if *last_line == line {
            return;
        }
        *last_line = line;
        let notice = &mut self.notices[*index];
        notice.rows += 1;
        if notice.first_lines.len() < LINES_SHOWN {
            notice.first_lines.push(line);
        }
    }

    /// All of them, by kind.
    pub fn finish(mut self) -> Vec<Notice> {
        self.notices.sort_by_key(|notice| notice.kind);
        self.notices
    }
}

/// One sentence for each kind.
pub(crate) fn sentences(notices: &[Notice], facts: &NoticeFacts) -> Vec<String> {
    let of_one_kind = notices.chunk_by(|a, b| a.kind == b.kind);
    let sentence = |notices: &[Notice]| {
        let (what, cure) = notices[0].kind.words(facts);
        let rows = |notice: &Notice| {
            let lines = name_rows(notice.first_lines.iter().copied(), notice.rows, facts.unit);
            format!("{}{} ({lines})", notice.subject_before(), count(notice.rows as u64, "row", "rows"))
        };
        let rows: Vec<_> = notices.iter().map(rows).collect();
        format!("{what}: {}; {cure}", rows.join(", "))
    };
    of_one_kind.map(sentence).collect()
}

impl Notice {
    fn subject_before(&self) -> String {
        match self.subject.as_str() {
            "" => String::new(),
            subject => format!("{subject} in "),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_one_sentence() {
        let mut notices = Notices::default();
        for line in 1..=12 {
            notices.add(NoticeKind::NoEndToken, String::new(), line);
            notices.add(NoticeKind::UnreadKey, "`id`".into(), line);
            notices.add(NoticeKind::UnreadKey, "`id`".into(), line);
        }
        notices.add(NoticeKind::UnreadKey, "`source`".into(), 3);
        let facts = NoticeFacts { end_tokens: vec!["</s>".into()], positions: None, ..NoticeFacts::default() };
        assert_eq!(
            sentences(&notices.finish(), &facts),
            [
                "keys of rows that are not read: `id` in 12 rows (lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more), \
                 `source` in 1 row (line 3); rename them to what data.format knows, or leave them out",
                "no end token (</s>) after the last answer, so the model does not learn to stop: 12 rows \
                 (lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 2 more); data.end_token = \"</s>\" appends one, and \
                 may name another that the template writes",
            ]
        );
    }

    #[test]
    fn the_number_of_subjects_is_bounded() {
        let mut notices = Notices::default();
        for line in 1..=1000 {
            notices.add(NoticeKind::UnreadKey, format!("`{line}`"), line);
        }
        let notices = notices.finish();
        assert_eq!(notices.len(), SUBJECTS_NAMED + 1);
        assert_eq!((notices[SUBJECTS_NAMED].subject.as_str(), notices[SUBJECTS_NAMED].rows), ("others", 980));
    }
}
