//! What the engine lacks of Python: methods of its strings, and a bound on `str(x)`.

use std::fmt;

use minijinja::value::{ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

/// Nesting that is certainly a cycle or an attack.
pub const MAX_DEPTH: usize = 64;

/// A value as Python's `str` writes it, which the engine does too. A list that holds a list twice,
/// many levels deep, is small in memory and huge as text; the engine takes fuel for a text when it
/// is written, so here the writing stops when the fuel would not pay for it.
pub fn to_text(state: &State, value: &Value) -> Result<String, Error> {
    struct Bounded {
        text: String,
        limit: usize,
    }
    impl fmt::Write for Bounded {
        fn write_str(&mut self, s: &str) -> fmt::Result {
            if self.text.len() + s.len() > self.limit {
                return Err(fmt::Error);
            }
            self.text.push_str(s);
            Ok(())
        }
    }
    check_depth(state, value, 0)?;
    // One unit of fuel pays for 64 bytes of text; most of it is spent on what is formatted.
    let limit = state
        .fuel_levels()
        .map_or(usize::MAX, |(_, left)| usize::try_from(left).map_or(usize::MAX, |left| left.saturating_mul(2)));
    let mut out = Bounded { text: String::new(), limit };
    match fmt::Write::write_fmt(&mut out, format_args!("{value}")) {
        Ok(()) => Ok(out.text),
        Err(fmt::Error) => Err(Error::from(ErrorKind::OutOfFuel)),
    }
}

/// Formatting recurses into lists and maps: refuse what would not fit on the stack.
fn check_depth(state: &State, value: &Value, depth: usize) -> Result<(), Error> {
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Map) {
        return Ok(());
    }
    if depth > MAX_DEPTH {
        let message = "the value is nested too deeply to be written";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    state.consume_fuel(1)?;
    for item in value.try_iter()? {
        match value.kind() {
            ValueKind::Map => check_depth(state, &value.get_item(&item)?, depth + 1)?,
            _ => check_depth(state, &item, depth + 1)?,
        }
    }
    Ok(())
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
