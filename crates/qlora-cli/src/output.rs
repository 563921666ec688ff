//! Everything that the program prints. Results go to stdout, what happens meanwhile to stderr.
//!
//! No output ends a command's work: a reader that went away, a closed terminal and a full disk under a log end the output alone.
//! `println!` and `eprintln!` would panic there, so nothing uses them.

use std::fmt;
use std::io::{IsTerminal, Write};

use anyhow::Result;
use burn_qlora::adapter_io::printable::{printable, printable_lines, shortened};

/// The characters of a table's cell at most: names come from files, and may have any length.
const WIDEST: usize = 120;

/// Says something on stderr, as `eprintln!` does.
macro_rules! say {
    ($($text:tt)*) => { $crate::output::line_to_stderr(format_args!($($text)*)) };
}
pub(crate) use say;

/// Whether a stream shows colours (<https://no-color.org>).
pub fn is_colored(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Colours of words on stderr, where it shows any. Nothing hangs on a colour alone.
#[derive(Clone, Copy, Debug)]
pub struct Paint(bool);

impl Paint {
    /// What stderr shows.
    pub fn of_stderr() -> Self {
        Self(is_colored(&std::io::stderr()))
    }

    /// Of what is good.
    pub fn green(self, text: &str) -> String {
        self.with("32", text)
    }

    /// Of what should be looked at.
    pub fn yellow(self, text: &str) -> String {
        self.with("1;33", text)
    }

    fn with(self, code: &str, text: &str) -> String {
        if self.0 { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() }
    }
}

/// Writes a line to stderr, or gives up quietly: there is nowhere left to say why.
pub fn line_to_stderr(text: fmt::Arguments<'_>) {
    let _ = writeln!(std::io::stderr().lock(), "{text}");
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
    use super::{Paint, Table, harmless};

    #[test]
    fn a_model_moves_no_cursor() {
        assert_eq!(harmless("a\tb\n\u{1b}[2Jü\r\u{7}"), "a\tb\n\\u{1b}[2Jü\\r\\u{7}");
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
        assert_eq!(Paint(false).yellow("warning:"), "warning:");
        assert_eq!(Paint(true).green("saved"), "\u{1b}[32msaved\u{1b}[0m");
    }

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new(["name", "count"]);
        table.row(["a".into(), "1".into()]);
        table.row(["longer".into(), "1234567".into()]);
        assert_eq!(table.to_string(), "name      count\na             1\nlonger  1234567\n");
    }
}
