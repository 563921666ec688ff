//! What of an answer is compared: the first group of a regular expression.

use std::borrow::Cow;

use regex::{Regex, RegexBuilder};

/// Bytes that a compiled expression may take: room for any that a person writes, and none for counted repetitions of
/// counted repetitions.
const SIZE_LIMIT: usize = 10 << 20;

/// An expression that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct PatternError(#[from] regex::Error);

/// Finds what is compared.
#[derive(Clone, Debug)]
pub struct Pattern(Regex);

impl Pattern {
    /// Compiles an expression, in the syntax of the `regex` crate. It runs in time linear in the text.
    ///
    /// # Errors
    /// It is none, or too large.
    pub fn new(expression: &str) -> Result<Self, PatternError> {
        Ok(Self(RegexBuilder::new(expression).size_limit(SIZE_LIMIT).build()?))
    }

    /// The first group of the first match, or the match where there are no groups.
    pub fn find<'a>(&self, text: &'a str) -> Option<&'a str> {
        let captures = self.0.captures(text)?;
        let found = match self.0.captures_len() {
            1 => captures.get(0),
            _ => captures.get(1),
        };
        found.map(|found| found.as_str().trim())
    }

    /// Whether what is found in two texts is the same. Decimal numbers are compared as numbers, whatever commas between
    /// digits, zeros and a full stop at the end do to their looks. `None` where the reference has none.
    pub fn agree(&self, answer: &str, reference: &str) -> Option<bool> {
        let expected = self.find(reference)?;
        Some(self.find(answer).is_some_and(|found| canonical(found) == canonical(expected)))
    }
}

/// A decimal number in one way of writing; other texts as they are.
fn canonical(text: &str) -> Cow<'_, str> {
    let (sign, digits) = match text.as_bytes().first() {
        Some(b'-') => ("-", &text[1..]),
        Some(b'+') => ("", &text[1..]),
        _ => ("", text),
    };
    let digits = digits.strip_suffix('.').unwrap_or(digits);
    let (whole, part) = digits.split_once('.').unwrap_or((digits, ""));
    let is_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let mut groups = whole.split(',');
    let first = groups.next().unwrap_or_default();
    let is_grouped = is_digits(first) && groups.all(|group| group.len() == 3 && is_digits(group));
    let has_digits = digits.bytes().any(|byte| byte.is_ascii_digit());
    if !has_digits || !is_grouped || whole.starts_with(',') || !is_digits(part) {
        return text.into();
    }
    let whole = whole.replace(',', "");
    let (whole, part) = (whole.trim_start_matches('0'), part.trim_end_matches('0'));
    match (whole, part) {
        ("", "") => "0".into(),
        (whole, "") => format!("{sign}{whole}").into(),
        (whole, part) => format!("{sign}{whole}.{part}").into(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_first_group_is_compared() {
        let pattern = Pattern::new(r"####\s*(-?[\d,.]+)").unwrap();
        assert_eq!(pattern.find("so 3\n#### 1,234.\n#### 5"), Some("1,234."));
        assert_eq!(pattern.agree("#### 1234", "#### 1,234"), Some(true));
        assert_eq!(pattern.agree("1234", "#### 1,234"), Some(false));
        assert_eq!(pattern.agree("#### 1", "no number"), None);
        let last = Pattern::new(r"(-?\d+)\D*$").unwrap();
        assert_eq!(last.find("3 and 12 apples."), Some("12"));
        assert_eq!(Pattern::new("yes|no").unwrap().agree("well, yes", "yes and no"), Some(true));
        // A group that takes no part in the match finds nothing.
        assert_eq!(Pattern::new("(a)|b").unwrap().find("b"), None);
    }

    #[test]
    fn numbers_are_numbers_and_other_texts_are_texts() {
        for (one, other) in
            [("1,000", "1000"), ("007", "7"), ("1.50", "1.5"), ("+3", "3"), ("3.", "3"), (".5", "0.50"), ("-0", "0")]
        {
            assert_eq!(canonical(one), canonical(other), "{one} {other}");
        }
        for (one, other) in [("1,00", "100"), ("-3", "3"), ("9007199254740993", "9007199254740992"), ("1.0.0", "1.0")] {
            assert_ne!(canonical(one), canonical(other), "{one} {other}");
        }
        for text in ["", ".", "-", ",", "ä", "1,000,00", ",100", "yes."] {
            assert_eq!(canonical(text), text);
        }
    }

    #[test]
    fn expressions_that_are_none_or_too_large_are_refused() {
        assert!(Pattern::new("(").unwrap_err().to_string().contains("unclosed group"));
        assert!(Pattern::new(r"((\w{100}){100}){100}").unwrap_err().to_string().contains("size limit"));
    }
}
