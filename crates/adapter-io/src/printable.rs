//! Text of strangers, made fit for a terminal.
//!
//! Names of tensors, metadata and configurations come from files, and a terminal obeys what is in them: escape
//! sequences move the cursor, recolour, rename the window or hide text, and bidirectional controls reorder it. Such
//! characters are shown as Rust writes them, `\u{1b}`.

use std::borrow::Cow;
use std::fmt::Write as _;

/// The text on one line, with control characters written out.
pub fn printable(text: &str) -> Cow<'_, str> {
    escaped(text, |_| false)
}

/// The same for a text of several lines: line feeds stay.
pub fn printable_lines(text: &str) -> Cow<'_, str> {
    escaped(text, |c| c == '\n')
}

/// The text, or its two ends when it has more than `most` characters.
pub fn shortened(text: &str, most: usize) -> Cow<'_, str> {
    // A character takes at most four bytes: most texts are short enough without counting.
    if text.len() <= most || text.chars().count() <= most {
        return text.into();
    }
    let kept = most.saturating_sub(1);
    let at = |characters: usize| text.char_indices().nth(characters).map_or(text.len(), |(at, _)| at);
    let from_end =
        |characters: usize| text.char_indices().rev().take(characters).last().map_or(text.len(), |(at, _)| at);
    format!("{}…{}", &text[..at(kept - kept / 2)], &text[from_end(kept / 2)..]).into()
}

fn escaped(text: &str, stays: impl Fn(char) -> bool) -> Cow<'_, str> {
    let hidden = |c: char| is_hidden(c) && !stays(c);
    if !text.contains(hidden) {
        return text.into();
    }
    let mut out = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match c {
            '\n' | '\r' | '\t' if hidden(c) => out.extend(c.escape_default()),
            // Writing to a string cannot fail.
            c if hidden(c) => drop(write!(out, "{}", c.escape_unicode())),
            c => out.push(c),
        }
    }
    out.into()
}

/// Control characters, and what changes the order or the lines of a text: the marks, embeddings, overrides and
/// isolates of the bidirectional algorithm (UAX 9), line and paragraph separator.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_written_out() {
        let name = "a\u{1b}[31mb\u{9b}2J\u{7f}\r\n\tü🙂 \u{202e}x";
        let shown = r"a\u{1b}[31mb\u{9b}2J\u{7f}\r\n\tü🙂 \u{202e}x";
        assert_eq!(printable(name), shown);
        assert!(matches!(printable("model.layers.0 ü🙂"), Cow::Borrowed(_)));
        assert_eq!(printable_lines("one\ntwo\u{7}"), "one\ntwo\\u{7}");
        assert!((0..=0x10_ffff).filter_map(char::from_u32).all(|c| !printable(&c.to_string()).contains(is_hidden)));
    }

    #[test]
    fn long_texts_keep_their_ends() {
        assert_eq!(shortened("abcdefghij", 10), "abcdefghij");
        assert_eq!(shortened("abcdefghijk", 10), "abcde…hijk");
        assert_eq!(shortened("äöüäöüäöüäöü", 5), "äö…öü");
        assert_eq!(shortened("abc", 1), "…");
        assert_eq!(shortened("ab", 0), "…");
        assert_eq!(shortened(&"n".repeat(65_536), 100).chars().count(), 100);
    }
}
