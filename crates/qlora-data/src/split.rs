//! A split of a data set, or a part of one: `train`, `train[:5%]`, `[100:200]`.
//!
//! What is in brackets means what it means in Hugging Face `datasets`: rows from the first number to before the second one, either of
//! which may be left out, be a percentage, or count from the end; percentages are rounded to the nearest row.

use std::ops::Range;
use std::str::FromStr;

use crate::words::grouped;

/// A split, or a part of one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Split {
    /// Its name, if it is named.
    pub name: Option<String>,
    from: Option<Bound>,
    to: Option<Bound>,
}

/// Where a part begins or ends; below 0 counted from the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bound {
    Rows(i64),
    Percent(i64),
}

impl Bound {
    fn of(self, rows: usize) -> usize {
        let rows = rows as i64;
        let at = match self {
            Self::Rows(at) => at,
            Self::Percent(percent) => (percent as f64 * rows as f64 / 100.0).round_ties_even() as i64,
        };
        let at = if at < 0 { rows + at } else { at };
        at.clamp(0, rows) as usize
    }
}

impl FromStr for Bound {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (digits, is_percent) = text.strip_suffix('%').map_or((text, false), |digits| (digits, true));
        let number: i64 = digits.parse().map_err(drop)?;
        match is_percent {
            true if number.abs() <= 100 => Ok(Self::Percent(number)),
            true => Err(()),
            false => Ok(Self::Rows(number)),
        }
    }
}

impl FromStr for Split {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "is {text:?}; write a name, a part, or both: \"train\", \"train[:5%]\", \"train[100:200]\", \"[-10%:]\"{}",
                if text.contains('+') { " (several are several sources)" } else { "" }
            )
        };
        let (name, part) = match text.split_once('[') {
            Some((name, part)) => (name, Some(part.strip_suffix(']').ok_or_else(wrong)?)),
            None => (text, None),
        };
        let is_name = |c: char| c.is_alphanumeric() || "._-".contains(c);
        if !name.chars().all(is_name) || text.is_empty() {
            return Err(wrong());
        }
        let mut split = Self { name: (!name.is_empty()).then(|| name.to_owned()), ..Self::default() };
        if let Some(part) = part {
            let (from, to) = part.split_once(':').ok_or_else(wrong)?;
            let bound = |text: &str| match text.trim() {
                "" => Ok(None),
                text => text.parse().map(Some).map_err(|()| wrong()),
            };
            (split.from, split.to) = (bound(from)?, bound(to)?);
        }
        Ok(split)
    }
}

impl Split {
    /// The rows that it has where it does not matter how many there are.
    pub fn fixed(&self) -> Option<Range<usize>> {
        let at = |bound: Option<Bound>, open: usize| match bound {
            None => Some(open),
            Some(Bound::Rows(at)) => usize::try_from(at).ok(),
            Some(Bound::Percent(_)) => None,
        };
        Some(at(self.from, 0)?..at(self.to, usize::MAX)?)
    }

    /// The rows that it has of so many.
    ///
    /// # Errors
    /// It has none.
    pub fn of(&self, rows: usize) -> Result<Range<usize>, String> {
        let from = self.from.map_or(0, |from| from.of(rows));
        let to = self.to.map_or(rows, |to| to.of(rows));
        match from < to {
            true => Ok(from..to),
            false => Err(format!("the split has none of its {} rows", grouped(rows as u64))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_those_of_datasets() {
        // `datasets.ReadInstruction.from_spec(..).to_absolute({"train": rows})` of datasets 4.
        for (text, rows, expected) in [
            ("train", 10, 0..10),
            ("train[:5%]", 1000, 0..50),
            ("train[:50%]", 7, 0..4),
            ("train[:50%]", 5, 0..2),
            ("train[10%:20%]", 1000, 100..200),
            ("train[-10%:]", 1000, 900..1000),
            ("train[:-10%]", 1000, 0..900),
            ("[3:5]", 10, 3..5),
            ("[-3:]", 10, 7..10),
            ("[-30:]", 10, 0..10),
            ("[5:100]", 10, 5..10),
        ] {
            let split: Split = text.parse().unwrap();
            assert_eq!(split.of(rows), Ok(expected.clone()), "{text} of {rows}");
            if let Some(fixed) = split.fixed() {
                assert_eq!(fixed.start..fixed.end.min(rows), expected, "{text}");
            }
        }
        assert!("[20:]".parse::<Split>().unwrap().of(10).unwrap_err().contains("none of its 10 rows"));
    }

    #[test]
    fn what_is_no_split_is_refused() {
        for text in ["", "train[", "train[5]", "train[:5%", "train[a:]", "train[:101%]", "train+test", "train test"] {
            assert!(text.parse::<Split>().unwrap_err().contains("train[:5%]"), "{text}");
        }
        assert!("train+test".parse::<Split>().unwrap_err().contains("several sources"));
    }
}
