//! Rows while they are made: to a file, or to memory where there is none.

use std::io;
use std::sync::Arc;

use super::{End, Examples, LEARNED, Stored, Unfinished, Word};
use crate::error::DataError;
use crate::example::Example;

/// Words that are written at a time: 1 MiB.
const PIECE: usize = 256 << 10;

/// Rows that can be told apart.
const MAX_ROWS: usize = u32::MAX as usize;

/// Appends a row's words.
pub(super) fn append(words: &mut Vec<Word>, row: &Example) {
    let line = row.line as u64;
    words.extend([line as u32, (line >> 32) as u32].map(u32::to_le_bytes));
    words.extend(row.input_ids.iter().zip(&row.labels).map(|(id, label)| {
        debug_assert!(*id < LEARNED && [i64::from(*id), chat_text::MASKED_LABEL].contains(label), "a row of {row:?}");
        let learned = if *label == chat_text::MASKED_LABEL { 0 } else { LEARNED };
        (id | learned).to_le_bytes()
    }));
}

/// Rows that are being made.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    /// Words that are in no file.
    words: Vec<Word>,
    ends: Vec<End>,
    /// Words of all rows.
    end: u64,
    file: Option<Unfinished>,
    /// Why rows are in memory that should be in a file.
    problem: Option<String>,
}

impl Writer {
    /// Rows go to the file, or to memory; the error says why to the latter.
    pub fn new(file: Option<Result<Unfinished, String>>) -> Self {
        let (file, problem) = match file {
            None => (None, None),
            Some(Ok(file)) => (Some(file), None),
            Some(Err(problem)) => (None, Some(problem)),
        };
        Self { file, problem, ..Self::default() }
    }

    /// Rows so far.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Adds a row.
    ///
    /// # Errors
    /// There are more than can be told apart, or a file that can't be written any more can't be read back.
    pub fn push(&mut self, row: &Example) -> Result<(), DataError> {
        if self.ends.len() == MAX_ROWS {
            let problem = format!("has more than {MAX_ROWS} rows, which is all that a run can tell apart");
            return Err(DataError::Config { key: "train", problem });
        }
        let before = self.words.len();
        append(&mut self.words, row);
        self.end += (self.words.len() - before) as u64;
        self.ends.push(self.end.to_le_bytes());
        match self.words.len() >= PIECE {
            true => self.flush(),
            false => Ok(()),
        }
    }

    fn flush(&mut self) -> Result<(), DataError> {
        let Some(file) = &mut self.file else { return Ok(()) };
        match file.append(self.words.as_flattened()) {
            Ok(()) => {
                self.words.clear();
                Ok(())
            }
            Err(error) => self.take_back(&error),
        }
    }

    /// Goes on in memory, with what the file has.
    fn take_back(&mut self, error: &io::Error) -> Result<(), DataError> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        self.problem = Some(crate::cache::not_kept(file.entry(), error));
        let mut words = file.words().map_err(|source| DataError::Read { path: file.entry().to_owned(), source })?;
        // Words may have been written before what failed.
        words.truncate((self.end - self.words.len() as u64) as usize);
        words.append(&mut self.words);
        self.words = words;
        Ok(())
    }

    /// The rows, and why they are in memory where they should be in a file. The file has the header, too.
    ///
    /// # Errors
    /// As [`Self::push`].
    pub fn finish(mut self, header: &[u8]) -> Result<(Examples, Option<String>), DataError> {
        self.flush()?;
        if let Some(file) = &mut self.file {
            match file.finish(self.end, &self.ends, header) {
                Ok(mapped) => return Ok((Stored::Mapped(mapped).into(), None)),
                Err(error) => self.take_back(&error)?,
            }
        }
        self.words.shrink_to_fit();
        let Self { words, ends, problem, .. } = self;
        Ok((Stored::Held { words, ends }.into(), problem))
    }
}

impl From<Stored> for Examples {
    fn from(stored: Stored) -> Self {
        Self { stored: Arc::new(stored), chosen: None }
    }
}
