//! Tool calls in what a model writes.
//!
//! | format | models | a call |
//! |---|---|---|
//! | [`Tagged`](ToolFormat::Tagged) | Hermes 2 and 3, Qwen 2.5 and 3 | `<tool_call>{"name": .., "arguments": {..}}</tool_call>` |
//! | [`Bare`](ToolFormat::Bare) | Llama 3.1 and later | `{"name": .., "parameters": {..}}`, perhaps behind `<\|python_tag\|>` |
//! | [`Listed`](ToolFormat::Listed) | Mistral | `[TOOL_CALLS][{"name": .., "arguments": {..}}]` or `[TOOL_CALLS]name[ARGS]{..}` |
//!
//! The text comes in pieces, and where it is cut makes no difference: a parser decides only what no further text can
//! change. A call is given out when it is complete. What looks like a call and is none is content, as it was written.

mod bare;
mod buffer;
mod listed;
mod tagged;

use serde_json::Value as Json;

use buffer::Buffer;

/// How a model writes calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// JSON between `<tool_call>` and `</tool_call>`.
    Tagged,
    /// JSON with `parameters` and nothing around it.
    Bare,
    /// Behind `[TOOL_CALLS]`.
    Listed,
}

impl ToolFormat {
    /// The format that a chat template asks for; `None` where it does not write tools.
    pub fn of_template(source: &str) -> Option<Self> {
        // Calls as XML are read by nothing here, though they stand between the same tags.
        if !source.contains("tools") || source.contains("<function=") {
            None
        } else if source.contains(tagged::OPEN) {
            Some(Self::Tagged)
        } else if source.contains(listed::TAG) {
            Some(Self::Listed)
        } else if source.contains(bare::TAG) || source.contains(r#""parameters":"#) {
            Some(Self::Bare)
        } else {
            None
        }
    }

    /// Tags that may be special tokens, which a decoder would leave out of the text.
    pub fn tags(self) -> &'static [&'static str] {
        match self {
            Self::Tagged => &[tagged::OPEN, tagged::CLOSE],
            Self::Bare => &[bare::TAG],
            Self::Listed => &[listed::TAG, listed::ARGS, listed::CALL_ID],
        }
    }

    /// What stands before, between and behind the calls of an answer that is nothing but calls.
    pub(super) fn around(self) -> Around {
        match self {
            Self::Tagged => Around {
                before: [Some(tagged::OPEN), None],
                opening: "\n{\"name\": ",
                arguments: ", \"arguments\": ",
                behind: ["}\n", tagged::CLOSE],
                between: "\n",
            },
            Self::Bare => Around {
                before: [None, None],
                opening: "{\"name\": ",
                arguments: ", \"parameters\": ",
                behind: ["}", ""],
                between: "; ",
            },
            Self::Listed => Around {
                before: [None, Some(listed::TAG)],
                opening: "{\"name\": ",
                arguments: ", \"arguments\": ",
                behind: ["}", ""],
                between: ", ",
            },
        }
    }
}

/// The fixed text of an answer that is nothing but calls.
#[derive(Clone, Copy, Debug)]
pub(super) struct Around {
    /// A tag before each call, and one before a list of all of them.
    pub before: [Option<&'static str>; 2],
    /// From there to the name.
    pub opening: &'static str,
    /// From the name to the arguments.
    pub arguments: &'static str,
    /// Behind the arguments: text, then a tag.
    pub behind: [&'static str; 2],
    /// Between calls.
    pub between: &'static str,
}

/// A call that a model wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The function.
    pub name: String,
    /// Its arguments as JSON.
    pub arguments: String,
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Text.
    Content(String),
    /// A call.
    Call(Call),
}

/// What a format's parser did with the text at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Something was decided; there may be more.
    Again,
    /// More text is needed.
    Wait,
}

#[derive(Clone, Debug)]
enum Format {
    Tagged(tagged::Tagged),
    Bare(bare::Bare),
    Listed(listed::Listed),
}

/// Finds calls in a text that comes in pieces.
#[derive(Clone, Debug)]
pub struct ToolParser {
    format: Format,
    buffer: Buffer,
}

impl ToolParser {
    /// A parser for answers to a request with tools of these names.
    pub fn new(format: ToolFormat, names: Vec<String>) -> Self {
        let format = match format {
            ToolFormat::Tagged => Format::Tagged(tagged::Tagged::default()),
            ToolFormat::Bare => Format::Bare(bare::Bare::new(names)),
            ToolFormat::Listed => Format::Listed(listed::Listed::default()),
        };
        Self { format, buffer: Buffer::default() }
    }

    /// Takes a piece of text and returns what is decided with it.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.buffer.text.push_str(text);
        self.run(false)
    }

    /// What is still undecided, at the end of the text.
    pub fn finish(&mut self) -> Vec<Piece> {
        self.run(true)
    }

    fn run(&mut self, end: bool) -> Vec<Piece> {
        let mut out = Vec::new();
        loop {
            let step = match &mut self.format {
                Format::Tagged(parser) => parser.step(&mut self.buffer, end, &mut out),
                Format::Bare(parser) => parser.step(&mut self.buffer, end, &mut out),
                Format::Listed(parser) => parser.step(&mut self.buffer, end, &mut out),
            };
            if step == Step::Wait {
                return out;
            }
        }
    }
}

/// A call in JSON, with its arguments under one of these names; `None` where it is something else.
fn call(json: &Json, keys: &[&str]) -> Option<Call> {
    let name = json.get("name")?.as_str().filter(|name| !name.is_empty())?;
    let arguments = match keys.iter().find_map(|key| json.get(key)) {
        Some(object @ Json::Object(_)) => object.to_string(),
        // Some models write the JSON into a string.
        Some(Json::String(text)) if matches!(serde_json::from_str(text), Ok(Json::Object(_))) => text.clone(),
        Some(Json::Null) | None => "{}".into(),
        Some(_) => return None,
    };
    Some(Call { name: name.into(), arguments })
}

fn content(out: &mut Vec<Piece>, text: String) {
    match out.last_mut() {
        _ if text.is_empty() => {}
        Some(Piece::Content(before)) => before.push_str(&text),
        _ => out.push(Piece::Content(text)),
    }
}

#[cfg(test)]
mod tests;
