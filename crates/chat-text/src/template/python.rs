//! What the engine lacks of Python: `str(x)` of numbers and containers, methods of strings, and what
//! Jinja's tests say of `none` and of strings.

use minijinja::formatting::FormatStyle;
use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

use super::filters;

/// Nesting that is certainly a cycle or an attack.
pub const MAX_DEPTH: usize = 64;

/// A value as Python's `str` writes it.
///
/// The engine's own text differs in floats. It also takes its fuel for a text after it is written,
/// while a list that holds a list twice, many levels deep, is small in memory and huge as text.
pub fn to_text(state: &State, value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None if value.is_undefined() => Ok(String::new()),
        None => {
            let mut out = Repr { state, out: String::new(), paid: 0 };
            out.value(value, 0)?;
            Ok(out.out)
        }
    }
}

/// Writes `repr(x)`.
struct Repr<'a, 'b, 'c> {
    state: &'a State<'b, 'c>,
    out: String,
    /// Bytes of `out` that fuel was taken for.
    paid: usize,
}

impl Repr<'_, '_, '_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.state.consume_fuel(1 + (self.out.len() - self.paid) as u64 / 64)?;
        self.paid = self.out.len();
        if depth > MAX_DEPTH {
            let message = "the value is nested too deeply to be written";
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
        match value.kind() {
            ValueKind::Undefined => self.out.push_str("Undefined"),
            ValueKind::Number => self.out.push_str(&number(value)?),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map => {
                self.out.push('{');
                for (index, key) in value.try_iter()?.enumerate() {
                    self.separate(index);
                    self.value(&key, depth + 1)?;
                    self.out.push_str(": ");
                    self.value(&value.get_item(&key)?, depth + 1)?;
                }
                self.out.push('}');
            }
            // Something that has no length is not listed: Python shows such an object by its type.
            ValueKind::Seq | ValueKind::Iterable if value.len().is_some() => {
                let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
                self.out.push(open);
                for (index, item) in value.try_iter()?.enumerate() {
                    self.separate(index);
                    self.value(&item, depth + 1)?;
                }
                if value.is_tuple() && value.len() == Some(1) {
                    self.out.push(',');
                }
                self.out.push(close);
            }
            _ => self.out.push_str(&value.to_string()),
        }
        Ok(())
    }

    fn separate(&mut self, index: usize) {
        if index > 0 {
            self.out.push_str(", ");
        }
    }

    /// Single quotes, unless that would take escapes and double quotes would not.
    fn string(&mut self, text: &str) {
        let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
        self.out.push(quote);
        for c in text.chars() {
            match c {
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                c if c == quote => self.out.extend(['\\', c]),
                c if c.is_control() => self.out.push_str(&format!("\\x{:02x}", u32::from(c))),
                c => self.out.push(c),
            }
        }
        self.out.push(quote);
    }
}

/// A number as Python's `repr` writes it.
pub fn number(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    let x = f64::try_from(value.clone())?;
    if !x.is_finite() {
        return Ok(if x.is_nan() {
            "nan"
        } else if x > 0.0 {
            "inf"
        } else {
            "-inf"
        }
        .into());
    }
    // Both languages write the shortest digits that read back the same, and switch to an exponent
    // below 1e-4 and from 1e16; Python gives it a sign and two digits.
    let text = format!("{x:?}");
    let Some((digits, exponent)) = text.split_once('e') else {
        return Ok(text);
    };
    let (sign, exponent) = match exponent.strip_prefix('-') {
        Some(exponent) => ('-', exponent),
        None => ('+', exponent),
    };
    let digits = digits.strip_suffix(".0").unwrap_or(digits);
    Ok(format!("{digits}e{sign}{exponent:0>2}"))
}

/// Jinja's `iterable`: what Python's `iter` takes, which `none` is not.
pub fn is_iterable(value: &Value) -> bool {
    value.kind() != ValueKind::None && value.try_iter().is_ok()
}

/// Jinja's `sequence`: what has a length and items, strings and dicts among it.
pub fn is_sequence(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Undefined | ValueKind::String | ValueKind::Map)
        || (matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) && value.len().is_some())
}

/// Where padding goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Left,
    Right,
    Both,
}

/// A text filled up to a width in characters.
pub fn pad(state: &State, text: &str, width: i64, fill: char, side: Side) -> Result<String, Error> {
    let length = text.chars().count();
    let missing = usize::try_from(width).unwrap_or(0).saturating_sub(length);
    state.consume_fuel(missing as u64 / 16)?;
    let left = match side {
        Side::Left => missing,
        Side::Right => 0,
        // Python puts the odd blank to the left where the width is odd.
        Side::Both => missing / 2 + (missing & usize::try_from(width).unwrap_or(0) & 1),
    };
    let filling = |count: usize| std::iter::repeat_n(fill, count);
    Ok(filling(left).chain(text.chars()).chain(filling(missing - left)).collect())
}

/// `str.splitlines()`.
pub fn lines(text: &str) -> Vec<&str> {
    let breaks = ['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}'];
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(breaks) {
        lines.push(&rest[..at]);
        let length =
            if rest[at..].starts_with("\r\n") { 2 } else { rest[at..].chars().next().map_or(1, char::len_utf8) };
        rest = &rest[at + length..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// `repr(x)`, which is what `pprint` writes of what fits a line.
pub fn to_repr(state: &State, value: &Value) -> Result<String, Error> {
    let mut out = Repr { state, out: String::new(), paid: 0 };
    out.value(value, 0)?;
    Ok(out.out)
}

/// Answers method calls that the engine does not know itself.
pub fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let known = match value.kind() {
        ValueKind::String => value.as_str().map(|text| string_method(state, text, name, args)),
        ValueKind::Map if name == "copy" && args.is_empty() => Some(Ok(Some(value.clone()))),
        ValueKind::Seq if name == "copy" && args.is_empty() => Some(Ok(Some(value.clone()))),
        ValueKind::Seq if name == "index" => {
            let (wanted,): (Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|item| item == wanted);
            Some(at.map(|at| Some(Value::from(at))).ok_or_else(|| not_found("the value is not in the list")))
        }
        _ => None,
    };
    match known.transpose()?.flatten() {
        Some(answer) => Ok(answer),
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn not_found(problem: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, problem.to_owned())
}

fn string_method(state: &State, text: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let (split, missing) = match name {
                "partition" => (text.split_once(separator), [text, "", ""]),
                _ => (text.rsplit_once(separator), ["", "", text]),
            };
            let parts = split.map_or(missing, |(head, tail)| [head, separator, tail]);
            Value::from(Tuple::from(parts.map(Value::from).to_vec()))
        }
        "split" | "rsplit" => {
            let (separator, limit, kwargs): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
            let separator = separator.map_or_else(|| kwargs.get::<Option<&str>>("sep"), |s| Ok(Some(s)))?;
            let limit = limit.map_or_else(|| kwargs.get::<Option<i64>>("maxsplit"), |n| Ok(Some(n)))?;
            kwargs.assert_all_used()?;
            if separator == Some("") {
                return Err(not_found("split: empty separator"));
            }
            if name == "split" { split(text, separator, limit) } else { rsplit(text, separator, limit) }
        }
        "splitlines" if args.is_empty() => lines(text).into_iter().map(Value::from).collect(),
        "index" | "rindex" => {
            let (wanted,): (&str,) = from_args(args)?;
            let at = if name == "index" { text.find(wanted) } else { text.rfind(wanted) };
            let at = at.ok_or_else(|| not_found("substring not found"))?;
            Value::from(text[..at].chars().count())
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (i64, Option<char>) = from_args(args)?;
            let side = match name {
                "ljust" => Side::Right,
                "rjust" => Side::Left,
                _ => Side::Both,
            };
            Value::from(pad(state, text, width, fill.unwrap_or(' '), side)?)
        }
        "zfill" => {
            let (width,): (i64,) = from_args(args)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['-', '+'])));
            let width = width.saturating_sub(sign.len() as i64);
            Value::from(format!("{sign}{}", pad(state, digits, width, '0', Side::Left)?))
        }
        "casefold" => Value::from(text.to_lowercase()),
        "swapcase" => text
            .chars()
            .flat_map(|c| match c.is_uppercase() {
                true => c.to_lowercase().collect::<Vec<_>>(),
                false => c.to_uppercase().collect(),
            })
            .collect::<String>()
            .into(),
        "format" => Value::from(filters::formatted(state, FormatStyle::StrFormat, text, args)?),
        _ => return Ok(None),
    }))
}

/// `str.split`: at most `limit` cuts from the left; whitespace runs without a separator.
fn split(text: &str, separator: Option<&str>, limit: Option<i64>) -> Value {
    let limit = limit.and_then(|n| usize::try_from(n).ok());
    let parts: Vec<&str> = match (separator, limit) {
        (Some(separator), Some(limit)) => text.splitn(limit.saturating_add(1), separator).collect(),
        (Some(separator), None) => text.split(separator).collect(),
        (None, None) => text.split_whitespace().collect(),
        (None, Some(limit)) => {
            let mut parts = Vec::new();
            let mut rest = text.trim_start();
            while !rest.is_empty() && parts.len() < limit {
                let cut = rest.find(char::is_whitespace).unwrap_or(rest.len());
                parts.push(&rest[..cut]);
                rest = rest[cut..].trim_start();
            }
            if !rest.is_empty() {
                parts.push(rest);
            }
            parts
        }
    };
    parts.into_iter().map(Value::from).collect()
}

/// `str.rsplit`: at most `limit` cuts from the right; whitespace runs without a separator.
fn rsplit(text: &str, separator: Option<&str>, limit: Option<i64>) -> Value {
    let limit = limit.and_then(|n| usize::try_from(n).ok());
    let mut parts: Vec<&str> = match (separator, limit) {
        (Some(separator), Some(limit)) => text.rsplitn(limit.saturating_add(1), separator).collect(),
        (Some(separator), None) => text.rsplit(separator).collect(),
        (None, None) => text.split_whitespace().rev().collect(),
        (None, Some(limit)) => {
            let mut parts = Vec::new();
            let mut rest = text.trim_end();
            while !rest.is_empty() && parts.len() < limit {
                let cut = rest.rfind(char::is_whitespace);
                let start = cut.map_or(0, |i| i + rest[i..].chars().next().map_or(0, char::len_utf8));
                parts.push(&rest[start..]);
                rest = rest[..start].trim_end();
            }
            if !rest.is_empty() {
                parts.push(rest);
            }
            parts
        }
    };
    parts.reverse();
    parts.into_iter().map(Value::from).collect()
}
