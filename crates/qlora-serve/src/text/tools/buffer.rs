//! The text that a parser has not decided on yet.

use super::super::stops::overlap;
use super::{Piece, content};

/// Undecided text, and how far it was looked at for the end of a JSON value.
#[derive(Clone, Debug, Default)]
pub(super) struct Buffer {
    pub text: String,
    scanned: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

/// What begins a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begins {
    /// The tag does.
    Yes,
    /// Something else does.
    No,
    /// More text is needed to tell.
    Unknown,
}

/// What became of looking for a tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Sought {
    /// It is there: the tag, with white space before it, was taken.
    Tag(String),
    /// Not yet, and there was content.
    Content,
    /// Not yet, and nothing is decided; or the text ended.
    Nothing,
}

impl Buffer {
    /// Takes bytes from the front.
    pub fn take(&mut self, length: usize) -> String {
        let rest = self.text.split_off(length);
        (self.scanned, self.depth, self.in_string, self.escaped) = (0, 0, false, false);
        std::mem::replace(&mut self.text, rest)
    }

    /// Drops white space and these characters from the front.
    pub fn skip(&mut self, separators: &[char]) {
        let rest = self.text.trim_start_matches(|c: char| c.is_whitespace() || separators.contains(&c)).len();
        if rest < self.text.len() {
            self.take(self.text.len() - rest);
        }
    }

    /// Whether the text begins with a tag.
    pub fn begins(&self, tag: &str, end: bool) -> Begins {
        if self.text.starts_with(tag) {
            Begins::Yes
        } else if !end && tag.starts_with(self.text.as_str()) {
            Begins::Unknown
        } else {
            Begins::No
        }
    }

    /// The bytes before a tag; where it is not there, those that can't be part of it, nor white space before it.
    fn before(&self, tag: &str) -> Result<usize, usize> {
        let undecided = || self.text[..self.text.len() - overlap(&self.text, tag)].trim_end().len();
        self.text.find(tag).ok_or_else(undecided)
    }

    /// Looks for a tag. What can't be part of it is content, at the end all that is left.
    pub fn seek(&mut self, tag: &str, end: bool, out: &mut Vec<Piece>) -> Sought {
        match self.before(tag) {
            Ok(at) => Sought::Tag(self.take_tag(at, tag, out)),
            Err(_) if end => {
                content(out, self.take(self.text.len()));
                Sought::Nothing
            }
            Err(0) => Sought::Nothing,
            Err(decided) => {
                content(out, self.take(decided));
                Sought::Content
            }
        }
    }

    /// The bytes of white space that the text begins with, and what comes behind them.
    pub fn first(&self) -> (usize, Option<char>) {
        let rest = self.text.trim_start();
        (self.text.len() - rest.len(), rest.chars().next())
    }

    /// Takes what is before a tag as content, and returns the tag with white space before it: that belongs to neither
    /// content nor call, unless no call follows.
    fn take_tag(&mut self, at: usize, tag: &str, out: &mut Vec<Piece>) -> String {
        let before = self.text[..at].trim_end().len();
        content(out, self.take(before));
        self.take(at - before + tag.len())
    }

    /// Takes the JSON object or list that the text begins with, once all of it is there. Brackets are counted; whether
    /// it is JSON shows when it is read.
    pub fn take_json(&mut self) -> Option<String> {
        for (at, byte) in self.text.bytes().enumerate().skip(self.scanned) {
            self.scanned = at + 1;
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(self.take(at + 1));
                    }
                }
                _ => {}
            }
        }
        None
    }
}
