//! Everything that the program prints. Results go to stdout, what happens meanwhile to stderr.
//!
//! No output ends a command's work: a reader that went away, a closed terminal and a full disk under a log end the output alone.
//! `println!` and `eprintln!` would panic there, so nothing uses them.

use std::fmt;
use std::io::{IsTerminal, Write};

use anyhow::Result;
use burn_qlora::adapter_io::printable::{printable, printable_lines, shortened};
use console::measure_text_width;

use crate::bars;

/// The characters of a table's cell at most: names come from files, and may have any length.
const WIDEST: usize = 120;

/// Says something on stderr, as `eprintln!` does, above the bar.
macro_rules! say {
    ($($text:tt)*) => { $crate::bars::line(format_args!($($text)*)) };
}
pub(crate) use say;

/// Says something on stderr. Lines that are longer than a terminal is wide are broken between words, and go on `indent` columns to the right.
pub fn say_wrapped(indent: usize, text: &str) {
    match bars::columns() {
        Some(columns) => say!("{}", wrapped(indent, text, columns)),
        None => say!("{text}"),
    }
}

/// A text for stdout, whose lines are broken as those of [`say_wrapped`] where it is a terminal.
pub fn wrapped_for_stdout(text: &str) -> String {
    let out = console::Term::stdout();
    match out.size_checked().filter(|_| std::io::stdout().is_terminal()) {
        Some((_, columns)) => wrapped(0, text, columns.into()),
        None => text.to_owned(),
    }
}

/// Breaks a line between words. A word that is longer than a line stays whole: paths are there to be copied.
fn wrapped(indent: usize, text: &str, columns: usize) -> String {
    // A line that fills the last column moves the cursor on some terminals.
    let (room, indent) = (columns.saturating_sub(1), indent.min(columns / 3));
    let (mut lines, mut line, mut is_begun) = (Vec::new(), String::new(), false);
    for word in text.split_inclusive([' ', '\n']) {
        if is_begun && measure_text_width(&line) + measure_text_width(word.trim_end()) > room {
            lines.push(line.trim_end().to_owned());
            (line, is_begun) = (" ".repeat(indent), false);
            if word.trim_end().is_empty() {
                continue;
            }
        }
        line += word.trim_end_matches('\n');
        is_begun |= !word.trim().is_empty();
        if word.ends_with('\n') {
            lines.push(line.trim_end().to_owned());
            (line, is_begun) = (String::new(), false);
        }
    }
    lines.push(line.trim_end().to_owned());
    lines.join("\n")
}

/// Whether a stream shows colours (<https://no-color.org>).
pub fn is_colored(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Of the 256 colours that terminals have beside the sixteen that they let themselves be painted over: seen on black and on white.
const GREEN: u8 = 28;
const ORANGE: u8 = 166;

/// Colours of words on stderr, where it shows any. Nothing hangs on a colour alone.
#[derive(Clone, Copy, Debug)]
pub struct Paint(bool);

impl Paint {
    /// What stderr shows.
    pub fn of_stderr() -> Self {
        Self(is_colored(&std::io::stderr()))
    }

    /// Of what is good.
    pub fn good(self, text: &str) -> String {
        self.with(GREEN, text)
    }

    /// Of what should be looked at.
    pub fn warning(self, text: &str) -> String {
        self.with(ORANGE, text)
    }

    fn with(self, color: u8, text: &str) -> String {
        if self.0 { format!("\u{1b}[1;38;5;{color}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}

/// Writes to stdout what is of use only while somebody reads it: the work that it tells of is done and kept either way.
pub fn tell(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Writes a result to stdout. A reader that has seen enough (`| head`) is no error; a result that is lost is one.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// Writes a model's words to stdout. A terminal gets what it would obey, such as escape sequences, written out.
pub fn show(text: &str) -> Result<()> {
    match std::io::stdout().is_terminal() {
        true => print(&harmless(text)),
        false => print(text),
    }
}

/// A text of several lines, in which nothing is left that a terminal obeys but line feeds and tabs.
fn harmless(text: &str) -> String {
    let parts: Vec<_> = text.split('\t').map(printable_lines).collect();
    parts.join("\t")
}

/// Rows under headings; the first column is text, the others are aligned to the right.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new<'a>(headings: impl IntoIterator<Item = &'a str>) -> Self {
        let mut table = Self { rows: Vec::new() };
        table.row(headings.into_iter().map(str::to_string));
        table
    }

    /// Adds a row. What a terminal would obey is written out, and the middle of long cells left out.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| shortened(&printable(&cell), WIDEST).into_owned()).collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                match column {
                    0 => line += &format!("{cell:<width$}"),
                    _ => line += &format!("  {cell:>width$}"),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{GREEN, ORANGE, Paint, Table, harmless, wrapped};

    #[test]
    fn a_model_moves_no_cursor() {
        assert_eq!(harmless("a\tb\n\u{1b}[2Jü\r\u{7}"), "a\tb\n\\u{1b}[2Jü\\r\\u{7}");
    }

    #[test]
    fn lines_are_broken_between_words() {
        let line = "Data     rows.jsonl: 12 rows, 169 k tokens, 60 rows for evaluation";
        assert_eq!(wrapped(9, line, 80), line);
        let broken = "Data     rows.jsonl: 12 rows, 169 k\n         tokens, 60 rows for\n         evaluation";
        assert_eq!(wrapped(9, line, 37), broken);
        // What does not fit into a line stays whole, colours take no room, and lines stay lines.
        assert_eq!(wrapped(2, "saved /a/path/that/is/long and more", 16), "saved\n  /a/path/that/is/long\n  and more");
        let painted = format!("{} it is", Paint(true).good("saved"));
        assert_eq!(wrapped(2, &painted, 12), painted);
        assert_eq!(wrapped(2, "first\n  second and third", 16), "first\n  second and\n  third");
    }

    #[test]
    fn cells_of_any_content_are_fit_to_be_shown() {
        let mut table = Table::new(["name", "n"]);
        table.row(["n".repeat(65_536), "1".into()]);
        table.row(["\u{1b}[2J\n".into(), "2".into()]);
        let text = table.to_string();
        assert!(text.lines().count() == 3 && text.lines().all(|line| line.chars().count() <= 130), "{text}");
        assert!(text.contains(r"\u{1b}[2J\n") && !text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn colours_are_only_added() {
        assert_eq!(Paint(false).warning("warning:"), "warning:");
        assert_eq!(Paint(true).good("saved"), "\u{1b}[1;38;5;28msaved\u{1b}[0m");
    }

    /// WCAG's contrast of a colour with white and black.
    fn contrasts(color: u8) -> [f64; 2] {
        // The cube of 6 x 6 x 6 begins at 16.
        let level = |part: u8| if part == 0 { 0.0 } else { f64::from(55 + 40 * part) / 255.0 };
        let light = |part: u8| match level(part) {
            low if low <= 0.04045 => low / 12.92,
            high => ((high + 0.055) / 1.055).powf(2.4),
        };
        let cube = color - 16;
        let light = 0.2126 * light(cube / 36) + 0.7152 * light(cube / 6 % 6) + 0.0722 * light(cube % 6);
        [1.05 / (light + 0.05), (light + 0.05) / 0.05]
    }

    #[test]
    fn colours_are_read_on_black_and_on_white() {
        for color in [GREEN, ORANGE] {
            // 3 is asked for bold text and for what is drawn.
            assert!(contrasts(color).iter().all(|contrast| *contrast > 3.0), "{color}: {:?}", contrasts(color));
        }
        // The yellow of xterm is not.
        assert!(contrasts(184)[0] < 2.0);
    }

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(["name", "count"]);
        table.row(["a".into(), "1".into()]);
        table.row(["longer".into(), "1234567".into()]);
        assert_eq!(table.to_string(), "name      count\na             1\nlonger  1234567\n");
    }
}
