//! Rows whose answers are judged: one, or two of which one is preferred.
//!
//! An answer is never cut. Where a row is longer than `max_length`, the beginning of its prompt goes, behind the token that begins a text;
//! of a pair as much of both rows, so that both answers follow the same prompt.

use super::prefix::Kept;
use super::{Draft, EncodedRow, RowEncoder};
use crate::error::DataError;
use crate::example::Example;
use crate::formats::Row;
use crate::judged::{Judged, answer_at};
use crate::notice::NoticeKind;
use crate::report::{MaskReason, TruncatedRow};

impl RowEncoder<'_> {
    /// A row with one answer that is `wanted` or not, or with two of which the first is preferred.
    pub(super) fn judged(
        &self,
        rows: Vec<Row>,
        wanted: bool,
        line: usize,
        mut notices: Vec<(NoticeKind, String)>,
    ) -> Result<EncodedRow, DataError> {
        let mut sides = Vec::new();
        for row in rows {
            match self.draft(row, line, Kept::End)? {
                Err(reason) => return Ok(EncodedRow::left_out(line, reason)),
                Ok(Draft { notices: of_side, .. })
                    if of_side.iter().any(|(kind, _)| *kind == NoticeKind::EmptyAnswer) =>
                {
                    return Ok(EncodedRow::left_out(line, MaskReason::EmptyAnswer));
                }
                Ok(Draft { tokens, notices: of_side }) => {
                    of_side.into_iter().for_each(|notice| {
                        if !notices.contains(&notice) {
                            notices.push(notice);
                        }
                    });
                    sides.push(Example { input_ids: tokens.ids, labels: tokens.labels, line });
                }
            }
        }
        if sides.iter().any(|side| side.label_tokens() == 0) {
            return Ok(EncodedRow::left_out(line, MaskReason::EmptyAnswer));
        }
        if matches!(&sides[..], [chosen, rejected] if chosen == rejected) {
            return Ok(EncodedRow::left_out(line, MaskReason::EqualAnswers));
        }
        let longest = sides.iter().map(|side| side.input_ids.len()).max().unwrap_or(0);
        let dropped = longest.saturating_sub(self.config.max_length);
        let truncated = (dropped > 0).then_some(TruncatedRow { line, dropped, at_least: false });
        if dropped > 0 {
            let begin = self.tokenizer.bos_token_id().map(|bos| sides.iter().all(|side| side.input_ids[0] == bos));
            let first = usize::from(begin == Some(true));
            // Something has to stand before an answer, which would not be predicted otherwise.
            if sides.iter().any(|side| first + dropped >= answer_at(side)) {
                return Ok(EncodedRow { truncated, ..EncodedRow::left_out(line, MaskReason::LongAnswer) });
            }
            for side in &mut sides {
                side.input_ids.drain(first..first + dropped);
                side.labels.drain(first..first + dropped);
            }
        }
        if sides.iter().any(|side| self.is_too_long(side.input_ids.len())) {
            notices.push((NoticeKind::LongerThanModel, String::new()));
        }
        let judged = match (&sides[..], wanted) {
            ([chosen, _], _) => Judged::Pair { rejected_at: chosen.input_ids.len() },
            (_, true) => Judged::Desirable,
            (_, false) => Judged::Undesirable,
        };
        let example = Example {
            input_ids: sides.iter().flat_map(|side| &side.input_ids).copied().collect(),
            labels: sides.iter().flat_map(|side| &side.labels).copied().collect(),
            line,
        };
        self.check_ids(&example)?;
        Ok(EncodedRow { line, example: Ok(example), judged: Some(judged), truncated, notices })
    }
}
