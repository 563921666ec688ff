//! Entries from a terminal or a pipe, each of one or several lines.

use std::io::{BufRead, IsTerminal, StdinLock};

use anyhow::{Context, Result};
use rustyline::error::ReadlineError;
use rustyline::history::MemHistory;
use rustyline::{Config, Editor};

use crate::exit::{InputError, UsageError};

/// Begins and ends an entry of several lines.
const QUOTES: &str = "\"\"\"";

/// Where entries come from.
pub enum Input {
    /// A person, who edits lines and finds earlier ones again.
    Terminal(Box<Editor<(), MemHistory>>),
    /// Lines, and how many were read.
    Lines(StdinLock<'static>, usize),
}

/// An entry.
#[derive(Debug, PartialEq, Eq)]
pub struct Entered {
    /// Its text.
    pub text: String,
    /// Whether it was quoted: then it is no command.
    pub quoted: bool,
}

impl Input {
    /// The standard input.
    pub fn new() -> Result<Self> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self::Lines(stdin.lock(), 0));
        }
        let config = Config::builder().auto_add_history(false).build();
        let editor = Editor::with_history(config.clone(), MemHistory::with_config(&config));
        Ok(Self::Terminal(Box::new(editor.context("can't read from the terminal")?)))
    }

    /// Whether a person types.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// Where the last line was, for messages; a terminal's are in sight.
    pub fn place(&self) -> Option<String> {
        match self {
            Self::Terminal(_) => None,
            Self::Lines(_, line) => Some(format!("line {line} of the standard input")),
        }
    }

    /// The next entry; `None` at the end.
    pub fn next(&mut self) -> Result<Option<Entered>> {
        let mut entry = Lines::default();
        let entered = loop {
            match self.line(if entry.is_begun() { "… " } else { "> " })? {
                Read::Line(line) => {
                    if let Some(entered) = entry.push(line) {
                        break entered;
                    }
                }
                Read::Interrupted if entry.is_begun() => entry = Lines::default(),
                Read::Interrupted => return Ok(None),
                // On a terminal the end is meant, whatever was begun.
                Read::End if self.is_terminal() => return Ok(None),
                Read::End => return entry.end().map(|()| None).map_err(Into::into),
            }
        };
        if let Self::Terminal(editor) = self {
            let quote = if entered.quoted { QUOTES } else { "" };
            // A history that takes no more lines is no reason to end.
            editor.add_history_entry(format!("{quote}{}{quote}", entered.text)).ok();
        }
        Ok(Some(entered))
    }

    fn line(&mut self, prompt: &str) -> Result<Read> {
        match self {
            Self::Terminal(editor) => match editor.readline(prompt) {
                Ok(line) => Ok(Read::Line(line)),
                Err(ReadlineError::Eof) => Ok(Read::End),
                Err(ReadlineError::Interrupted) => Ok(Read::Interrupted),
                Err(error) => Err(error).context("can't read from the terminal"),
            },
            Self::Lines(lines, number) => {
                let mut line = String::new();
                *number += 1;
                let read = lines.read_line(&mut line);
                match read {
                    Ok(0) => Ok(Read::End),
                    Ok(_) => {
                        let whole = line.strip_suffix('\n').map(|line| line.strip_suffix('\r').unwrap_or(line));
                        Ok(Read::Line(whole.unwrap_or(&line).to_string()))
                    }
                    Err(e) => Err(InputError(format!("can't read line {number} of the standard input: {e}")).into()),
                }
            }
        }
    }
}

/// What reading a line gives.
enum Read {
    Line(String),
    /// Ctrl-C.
    Interrupted,
    End,
}

/// Lines that become an entry.
#[derive(Debug, Default)]
struct Lines {
    text: String,
    /// Whether the entry is quoted, and not yet to its end.
    quoted: bool,
    begun: bool,
}

impl Lines {
    fn is_begun(&self) -> bool {
        self.begun
    }

    /// Takes a line, or several that were pasted; returns the entry where it ends here.
    fn push(&mut self, line: String) -> Option<Entered> {
        let mut rest = line.as_str();
        if !self.begun
            && let Some(quoted) = line.trim_start().strip_prefix(QUOTES)
        {
            (self.quoted, rest) = (true, quoted);
        }
        let first = !std::mem::replace(&mut self.begun, true);
        if !first && (!self.quoted || !self.text.is_empty()) {
            self.text.push('\n');
        }
        if self.quoted {
            return match rest.trim_end().strip_suffix(QUOTES) {
                Some(last) => {
                    self.text += last;
                    self.finish()
                }
                None => {
                    self.text += rest;
                    None
                }
            };
        }
        match rest.strip_suffix('\\') {
            Some(more) => {
                self.text += more;
                None
            }
            None => {
                self.text += rest;
                self.finish()
            }
        }
    }

    /// Takes the end of the input.
    ///
    /// # Errors
    /// An entry was begun: what it would have been is not known.
    fn end(&self) -> Result<(), UsageError> {
        let problem = match (self.begun, self.quoted) {
            (false, _) => return Ok(()),
            (true, true) => "between two of \"\"\": a line with \"\"\" ends the prompt",
            (true, false) => "behind a line that ends with a backslash, which goes on in the next one",
        };
        Err(UsageError(format!("the standard input ends {problem}")))
    }

    /// What there is, if anything was begun.
    fn finish(&mut self) -> Option<Entered> {
        let Self { text, quoted, begun } = std::mem::take(self);
        let text = if quoted { text.strip_suffix('\n').map(str::to_string).unwrap_or(text) } else { text };
        begun.then_some(Entered { text, quoted })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The entries of a text, with whether they are quoted.
    fn entries(text: &str) -> Vec<(String, bool)> {
        let mut lines = Lines::default();
        let found: Vec<Entered> = text.lines().filter_map(|line| lines.push(line.to_string())).collect();
        assert!(lines.end().is_ok(), "{text}");
        found.into_iter().map(|Entered { text, quoted }| (text, quoted)).collect()
    }

    #[test]
    fn lines_go_on() {
        let entry = |text: &str| (text.to_string(), false);
        assert_eq!(entries("one\ntwo\n"), [entry("one"), entry("two")]);
        assert_eq!(entries("one\\\n  two\\\n\nthree\n"), [entry("one\n  two\n"), entry("three")]);
        assert_eq!(entries("\n"), [entry("")]);
    }

    #[test]
    fn quotes_hold_lines_together() {
        let entry = |text: &str| (text.to_string(), true);
        assert_eq!(entries("\"\"\"\none\\\n\n/quit\n\"\"\"\n"), [entry("one\\\n\n/quit")]);
        assert_eq!(entries("\"\"\"one\ntwo\"\"\"\n"), [entry("one\ntwo")]);
        assert_eq!(entries("\"\"\"one\"\"\"\n"), [entry("one")]);
    }

    #[test]
    fn an_entry_that_does_not_end_is_a_mistake() {
        for (text, word) in [("one\ntwo\\\n", "backslash"), ("\"\"\"one\ntwo\n", "between two of")] {
            let mut lines = Lines::default();
            text.lines().for_each(|line| drop(lines.push(line.to_string())));
            assert!(lines.end().is_err_and(|error| error.0.contains(word)), "{text}");
        }
    }
}
