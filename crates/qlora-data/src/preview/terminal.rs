//! A preview for a terminal.

use unicode_width::UnicodeWidthChar;

use super::{Lengths, Preview, PreviewRow};
use crate::visible;
use crate::words::grouped;

/// Columns of a line: marks stand beneath their text, so lines are broken before a terminal breaks them.
const COLUMNS: usize = 100;

/// Columns of the longest bar.
const BAR: usize = 40;

/// What stands for a token that is a part of a character.
const PART: &str = "…";

// A green of the 256 colours, which is read on black and on white; that of the sixteen hardly is on white.
const LEARNED: &str = "\u{1b}[38;5;28m";
const LEARNED_SPECIAL: &str = "\u{1b}[1;38;5;28m";
const SPECIAL: &str = "\u{1b}[1m";
const RESET: &str = "\u{1b}[0m";

impl Preview {
    /// The preview as lines of text. With `color`, learned tokens are green and special tokens bold; without, marks
    /// stand beneath the learned ones. With `ids`, each token has a line of its own with its id.
    pub fn to_terminal(&self, color: bool, ids: bool) -> String {
        let mut text = String::new();
        for line in self.summary() {
            line_of(&mut text, &visible::text(&line));
        }
        for notice in self.report.notice_sentences() {
            line_of(&mut text, &visible::text(&notice));
        }
        text.push('\n');
        lengths(&mut text, &self.lengths);
        for row in &self.rows {
            text.push('\n');
            text.push_str(&row.to_terminal(color, ids));
        }
        text
    }
}

impl PreviewRow {
    /// The row as lines of text; see [`Preview::to_terminal`].
    pub fn to_terminal(&self, color: bool, ids: bool) -> String {
        let mut text = String::new();
        line_of(&mut text, &self.title());
        if ids {
            self.with_ids(&mut text, color);
        } else {
            self.as_text(&mut text, color);
        }
        text
    }

    fn with_ids(&self, text: &mut String, color: bool) {
        for (position, token) in self.tokens.iter().enumerate() {
            let mark = if token.learned { '^' } else { ' ' };
            let (on, off) = style(color, token.learned, token.special);
            let shown = if token.text.is_empty() { PART.into() } else { visible::text(&token.text) };
            line_of(text, format!("{position:>6} {:>8} {mark} {on}{shown}{off}", token.id).trim_end());
        }
    }

    fn as_text(&self, text: &mut String, color: bool) {
        let mut line = Line::new(color);
        for token in &self.tokens {
            for c in token.text.chars() {
                let mut shown = String::new();
                visible::push(&mut shown, c);
                line.push(text, &shown, token.learned, token.special);
                if c == '\n' {
                    line.finish(text);
                }
            }
        }
        line.finish(text);
    }
}

/// A line under way: its text, with colours or with marks beneath.
struct Line {
    color: bool,
    text: String,
    marks: String,
    columns: usize,
    style: (bool, bool),
}

impl Line {
    fn new(color: bool) -> Self {
        Self { color, text: String::new(), marks: String::new(), columns: 0, style: (false, false) }
    }

    fn push(&mut self, out: &mut String, shown: &str, learned: bool, special: bool) {
        let width: usize = shown.chars().map(|c| c.width().unwrap_or(0)).sum();
        if self.columns + width > COLUMNS {
            self.finish(out);
        }
        if self.style != (learned, special) {
            self.text.push_str(style(self.color, self.style.0, self.style.1).1);
            self.text.push_str(style(self.color, learned, special).0);
            self.style = (learned, special);
        }
        self.text.push_str(shown);
        self.marks.extend(std::iter::repeat_n(if learned { '^' } else { ' ' }, width));
        self.columns += width;
    }

    fn finish(&mut self, out: &mut String) {
        if self.columns == 0 {
            return;
        }
        let style = std::mem::take(&mut self.style);
        self.text.push_str(self::style(self.color, style.0, style.1).1);
        line_of(out, &self.text);
        let marks = self.marks.trim_end();
        if !self.color && !marks.is_empty() {
            line_of(out, marks);
        }
        *self = Self::new(self.color);
    }
}

/// What turns a style on and off.
fn style(color: bool, learned: bool, special: bool) -> (&'static str, &'static str) {
    match (color, learned, special) {
        (false, _, _) | (_, false, false) => ("", ""),
        (_, true, false) => (LEARNED, RESET),
        (_, true, true) => (LEARNED_SPECIAL, RESET),
        (_, false, true) => (SPECIAL, RESET),
    }
}

fn lengths(text: &mut String, lengths: &Lengths) {
    let name = |from: usize, to: usize| format!("{} to {}", grouped(from as u64), grouped(to as u64));
    let names: Vec<_> = lengths.bins.iter().map(|bin| name(bin.from, bin.to)).collect();
    let width = names.iter().map(String::len).max().unwrap_or(0).max("longer".len());
    let largest = lengths.largest().max(1);
    let bar = |name: &str, rows: usize, what: &str| {
        let bar = "█".repeat((rows * BAR).div_ceil(largest));
        let space = if bar.is_empty() { "" } else { " " };
        format!("  {name:>width$} {bar}{space}{}{what}", grouped(rows as u64))
    };
    line_of(text, "Lengths in tokens, and their rows:");
    for (bin, name) in lengths.bins.iter().zip(&names) {
        line_of(text, &bar(name, bin.rows, ""));
    }
    line_of(text, &format!("  {} data.max_length = {}", "-".repeat(width), grouped(lengths.max_length as u64)));
    if lengths.cut > 0 {
        line_of(text, &bar("longer", lengths.cut, ", cut"));
    }
}

fn line_of(text: &mut String, line: &str) {
    text.push_str(line);
    text.push('\n');
}
