//! Numbers in words.

use crate::place::Unit;

/// Numbers of rows named in a message before it says how many more there are.
pub(crate) const LINES_SHOWN: usize = 10;

/// A count with its noun.
pub(crate) fn count(n: u64, one: &str, many: &str) -> String {
    format!("{} {}", grouped(n), if n == 1 { one } else { many })
}

/// Digits in groups of three.
pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The first numbers of `rows` rows, and how many more there are.
pub(crate) fn name_rows(first: impl Iterator<Item = usize>, rows: usize, unit: Unit) -> String {
    let shown: Vec<_> = first.take(LINES_SHOWN).map(|line| line.to_string()).collect();
    let word = unit.name(rows);
    let more = match rows.saturating_sub(shown.len()) {
        0 => String::new(),
        n => format!(" and {} more", grouped(n as u64)),
    };
    format!("{word} {}{more}", shown.join(", "))
}

/// Names, the first of many, in words.
pub(crate) fn list(names: &[String]) -> String {
    const SHOWN: usize = 4;
    match names {
        [] => "none".into(),
        [one] => one.clone(),
        names if names.len() > SHOWN => {
            format!("{} and {} more", names[..SHOWN].join(", "), grouped((names.len() - SHOWN) as u64))
        }
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}
