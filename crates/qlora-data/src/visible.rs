//! Characters of data as something to see: no terminal and no browser takes them for its own.

/// What stands for a line break, which then follows.
pub(crate) const LINE_BREAK: char = '↵';

/// Adds a character that can be seen and does nothing: control characters as their pictures (U+2400 to U+2421), other
/// characters without a shape of their own as their code point.
pub(crate) fn push(out: &mut String, c: char) {
    match c {
        '\n' => out.push(LINE_BREAK),
        '\0'..='\u{1F}' => out.extend(char::from_u32(0x2400 + u32::from(c))),
        '\u{7F}' => out.push('\u{2421}'),
        c if c.is_control() || is_format(c) => out.extend(c.escape_unicode()),
        c => out.push(c),
    }
}

/// A text in one line that does nothing.
pub(crate) fn text(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    text.chars().for_each(|c| push(&mut out, c));
    out
}

/// A text that does nothing but break its lines.
pub(crate) fn lines(text: &str) -> String {
    text.split('\n').map(self::text).collect::<Vec<_>>().join("\n")
}

/// Unicode's format characters (general category Cf), which turn the direction of writing or join what stands around
/// them, and its separators of lines and paragraphs.
fn is_format(c: char) -> bool {
    matches!(
        c,
        '\u{AD}'
            | '\u{600}'..='\u{605}'
            | '\u{61C}'
            | '\u{6DD}'
            | '\u{70F}'
            | '\u{890}'..='\u{891}'
            | '\u{8E2}'
            | '\u{180E}'
            | '\u{200B}'..='\u{200F}'
            | '\u{2028}'..='\u{202E}'
            | '\u{2060}'..='\u{206F}'
            | '\u{FEFF}'
            | '\u{FFF9}'..='\u{FFFB}'
            | '\u{110BD}'
            | '\u{110CD}'
            | '\u{13430}'..='\u{1343F}'
            | '\u{1BCA0}'..='\u{1BCA3}'
            | '\u{1D173}'..='\u{1D17A}'
            | '\u{E0000}'..='\u{E0FFF}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_text_acts() {
        assert_eq!(text("a\x1b[31mb\r\n\t\x7f"), "a␛[31mb␍↵␉␡");
        assert_eq!(text("\u{9b}31m\u{202e}\u{feff}"), "\\u{9b}31m\\u{202e}\\u{feff}");
        assert_eq!(lines("a\x1b\nb"), "a␛\nb");
        assert_eq!(text("naïve 漢字 🙂"), "naïve 漢字 🙂");
    }
}
