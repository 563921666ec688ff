//! What the engine lacks of Python: `str(x)` of numbers and containers, methods of strings, and what
//! Jinja's tests say of `none` and of strings.

use minijinja::value::{ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

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

/// Answers method calls that the engine does not know itself.
pub fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if value.kind() == ValueKind::String
        && let Some(text) = value.as_str()
    {
        match name {
            "removeprefix" => {
                let (prefix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)));
            }
            "removesuffix" => {
                let (suffix,): (&str,) = from_args(args)?;
                return Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)));
            }
            "partition" | "rpartition" => {
                let (separator,): (&str,) = from_args(args)?;
                let (split, missing) = match name {
                    "partition" => (text.split_once(separator), [text, "", ""]),
                    _ => (text.rsplit_once(separator), ["", "", text]),
                };
                let parts = split.map_or(missing, |(head, tail)| [head, separator, tail]);
                return Ok(Value::from(parts.map(Value::from).to_vec()));
            }
            "rsplit" => {
                let (separator, limit): (Option<&str>, Option<i64>) = from_args(args)?;
                return Ok(rsplit(text, separator, limit));
            }
            _ => {}
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
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
