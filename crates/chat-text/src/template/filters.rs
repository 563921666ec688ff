//! Jinja's filters where the engine has none or another behaviour: `indent`, `int`, `float`, `truncate`,
//! `wordcount`, `center`, `striptags`, `urlencode`, `escape`, `pprint`, `format`.
//!
//! Each is written after `jinja2/filters.py`. What can become long pays for it before it is made.

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::python;

/// Puts the filters into an environment.
pub fn add(env: &mut Environment<'static>) {
    env.add_filter("string", |state: &State, value: &Value| python::to_text(state, value));
    env.add_filter("pprint", python::to_repr);
    env.add_filter("indent", indent);
    env.add_filter("int", int);
    env.add_filter("float", float);
    env.add_filter("truncate", truncate);
    env.add_filter("wordcount", |state: &State, text: &Value| -> Result<usize, Error> {
        Ok(words(&python::to_text(state, text)?).count())
    });
    env.add_filter("center", |state: &State, text: &Value, width: Option<i64>| -> Result<String, Error> {
        python::pad(state, &python::to_text(state, text)?, width.unwrap_or(80), ' ', python::Side::Both)
    });
    env.add_filter("striptags", striptags);
    env.add_filter("urlencode", urlencode);
    for name in ["escape", "e", "forceescape"] {
        env.add_filter(name, |state: &State, value: &Value| -> Result<Value, Error> {
            let text = python::to_text(state, value)?;
            Ok(if value.is_safe() { value.clone() } else { Value::from_safe_string(escape(&text)) })
        });
    }
    env.add_filter("format", |state: &State, text: &str, arguments: Rest<Value>| -> Result<String, Error> {
        formatted(state, FormatStyle::Printf, text, &arguments)
    });
}

/// Both kinds of format strings, whose widths are paid for before the text is made.
pub fn formatted(state: &State, style: FormatStyle, text: &str, arguments: &[Value]) -> Result<String, Error> {
    let mut wanted = 0u64;
    let mut digits = 0u64;
    for c in text.chars().chain([' ']) {
        match c.to_digit(10) {
            Some(digit) => digits = digits.saturating_mul(10).saturating_add(u64::from(digit)),
            None => wanted = wanted.saturating_add(std::mem::take(&mut digits)),
        }
    }
    // `%*d` and `{:{}}` take their widths from the arguments.
    for argument in arguments.iter().filter(|a| a.is_integer()) {
        if text.contains(['*', '{']) {
            wanted = wanted.saturating_add(u64::try_from(argument.clone()).unwrap_or(0).min(1 << 40));
        }
    }
    state.consume_fuel(wanted / 16)?;
    format(style, text, arguments)
}

/// A value of a positional or keyword argument.
fn argument<T>(positional: &Rest<Value>, kwargs: &Kwargs, index: usize, name: &str) -> Result<Option<T>, Error>
where
    T: for<'a> minijinja::value::ArgType<'a, Output = T>,
{
    match positional.get(index) {
        Some(value) => from_args::<(T,)>(std::slice::from_ref(value)).map(|(value,)| Some(value)),
        None => kwargs.get::<Option<T>>(name),
    }
}

fn indent(state: &State, text: &Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let text = python::to_text(state, text)?;
    let width = argument::<Value>(&positional, &kwargs, 0, "width")?;
    let indention = match width.filter(|width| !width.is_undefined() && !width.is_none()) {
        None => " ".repeat(4),
        Some(width) => match width.as_str() {
            Some(text) => text.to_owned(),
            None => {
                let width = i64::try_from(width)?.max(0) as u64;
                state.consume_fuel(width / 16)?;
                " ".repeat(width as usize)
            }
        },
    };
    let first = argument::<bool>(&positional, &kwargs, 1, "first")?.unwrap_or(false);
    let blank = argument::<bool>(&positional, &kwargs, 2, "blank")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    // As Python: a line break at the end begins one more, empty line.
    let text = format!("{text}\n");
    let lines = python::lines(&text);
    state.consume_fuel((lines.len() * indention.len() + text.len()) as u64 / 16)?;
    let mut out = String::with_capacity(text.len() + lines.len() * indention.len());
    for (index, line) in lines.into_iter().enumerate() {
        if index > 0 {
            out.push('\n');
        }
        if if index == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&indention);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// `int(x)` of Python, or the default, 0, for what is no number.
fn int(value: &Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let default = argument::<Value>(&positional, &kwargs, 0, "default")?.unwrap_or(Value::from(0));
    let base = argument::<u32>(&positional, &kwargs, 1, "base")?.unwrap_or(10);
    kwargs.assert_all_used()?;
    let truncated = |x: f64| if x.is_finite() { Some(Value::from(x as i128)) } else { None };
    let converted = match value.kind() {
        ValueKind::Bool => Some(Value::from(i64::from(value.is_true()))),
        ValueKind::Number if value.is_integer() => Some(value.clone()),
        ValueKind::Number => f64::try_from(value.clone()).ok().and_then(truncated),
        ValueKind::String => value.as_str().and_then(|text| {
            let text = text.trim().replace('_', "");
            let (sign, digits) = match text.strip_prefix('-') {
                Some(digits) => (-1, digits),
                None => (1, text.strip_prefix('+').unwrap_or(&text)),
            };
            let prefix = match base {
                2 => "0b",
                8 => "0o",
                16 => "0x",
                _ => "",
            };
            let lower = digits.to_lowercase();
            let digits = lower.strip_prefix(prefix).unwrap_or(&lower);
            let plain = (2..=36).contains(&base) && digits.starts_with(|c: char| c.is_alphanumeric());
            let number = if plain { i128::from_str_radix(digits, base).ok() } else { None };
            number.map(|n| Value::from(sign * n)).or_else(|| text.parse().ok().and_then(truncated))
        }),
        _ => None,
    };
    Ok(converted.unwrap_or(default))
}

fn float(value: &Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let default = argument::<Value>(&positional, &kwargs, 0, "default")?.unwrap_or(Value::from(0.0));
    kwargs.assert_all_used()?;
    let converted = match value.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        ValueKind::String => value.as_str().and_then(|text| text.trim().replace('_', "").parse().ok()),
        _ => None,
    };
    Ok(converted.map_or(default, Value::from))
}

fn truncate(state: &State, text: &Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let text = python::to_text(state, text)?;
    let length = argument::<usize>(&positional, &kwargs, 0, "length")?.unwrap_or(255);
    let killwords = argument::<bool>(&positional, &kwargs, 1, "killwords")?.unwrap_or(false);
    let end = argument::<String>(&positional, &kwargs, 2, "end")?.unwrap_or_else(|| "...".to_owned());
    let leeway = argument::<usize>(&positional, &kwargs, 3, "leeway")?.unwrap_or(5);
    kwargs.assert_all_used()?;
    let chars = end.chars().count();
    if length < chars {
        let problem = format!("truncate: length {length} is less than that of the end, {chars}");
        return Err(Error::new(ErrorKind::InvalidOperation, problem));
    }
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text);
    }
    let kept: String = text.chars().take(length - chars).collect();
    let kept = if killwords { &kept } else { kept.rsplit_once(' ').map_or(kept.as_str(), |(head, _)| head) };
    Ok(format!("{kept}{end}"))
}

/// Python's `\w+`.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty())
}

/// Without comments and tags, runs of whitespace as one blank.
fn striptags(state: &State, text: &Value) -> Result<String, Error> {
    let text = python::to_text(state, text)?;
    let mut out = String::with_capacity(text.len());
    let mut rest = text.as_str();
    while let Some(open) = rest.find('<') {
        let (comment, close) = if rest[open..].starts_with("<!--") { (true, "-->") } else { (false, ">") };
        let Some(end) = rest[open..].find(close) else { break };
        out.push_str(&rest[..open]);
        rest = &rest[open + end + if comment { 3 } else { 1 }..];
    }
    out.push_str(rest);
    let unescaped = [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#39;", "'"), ("&#34;", "\""), ("&amp;", "&")];
    let text = out.split_whitespace().collect::<Vec<_>>().join(" ");
    Ok(unescaped.iter().fold(text, |text, (entity, plain)| text.replace(entity, plain)))
}

/// `urllib.parse.quote` of a text, or a query string of a dict.
fn urlencode(state: &State, value: &Value) -> Result<String, Error> {
    fn quote(text: &str, safe: &str) -> String {
        let mut out = String::with_capacity(text.len());
        for byte in text.bytes() {
            match char::from(byte) {
                c if c.is_ascii_alphanumeric() || "_.-~".contains(c) || safe.contains(c) => out.push(c),
                _ => out.push_str(&format!("%{byte:02X}")),
            }
        }
        out
    }
    if value.kind() != ValueKind::Map {
        return Ok(quote(&python::to_text(state, value)?, "/"));
    }
    let mut pairs = Vec::new();
    for key in value.try_iter()? {
        let item = value.get_item(&key)?;
        let part = |value: &Value| -> Result<String, Error> {
            Ok(quote(&python::to_text(state, value)?, "").replace("%20", "+"))
        };
        pairs.push(format!("{}={}", part(&key)?, part(&item)?));
    }
    Ok(pairs.join("&"))
}

/// Markupsafe's entities.
fn escape(text: &str) -> String {
    let entities = [('&', "&amp;"), ('<', "&lt;"), ('>', "&gt;"), ('"', "&#34;"), ('\'', "&#39;")];
    entities.iter().fold(text.to_owned(), |text, (c, entity)| text.replace(*c, entity))
}
