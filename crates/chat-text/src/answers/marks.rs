//! Marks around what messages say, to find it again in a rendered text.
//!
//! A mark is a code point that Unicode reserves for a program's own use, followed by five digits of such code points:
//! the number of a field. Each field of a conversation gets one before and one behind it: contents without the
//! whitespace around them, which templates trim; the thinking at the beginning of a content apart from the answer,
//! as templates may leave it out; names and texts of tool calls. If the output without marks is the same text as
//! without, the fields lie where their marks stood.

use std::ops::Range;

use serde_json::{Map, Value as Json};

use crate::conversation::calls_mut;
use crate::message::REASONING;
use crate::template::{GENERATION_END, GENERATION_START};

const OPEN: char = '\u{FDD2}';
const CLOSE: char = '\u{FDD3}';
/// The sixteen digits.
const DIGIT: u32 = 0xFDE0;
const DIGITS: u32 = 5;

/// Ends the reasoning that some models write before their answer.
const END_OF_REASONING: &str = "</think>";

/// What a field of a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Content,
    Reasoning,
    CallName,
    CallArgument,
}

/// Something that a message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Field {
    /// The message's index.
    pub message: usize,
    pub kind: Kind,
}

/// Where a field stands in a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The field's number.
    pub field: usize,
    pub range: Range<usize>,
}

/// Which fields are marked. A template that looks at a field may do something else with a mark in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Marking {
    /// Every field.
    All,
    /// Every field but the names of tools.
    NoNames,
    /// Contents and reasoning of everybody.
    Texts,
    /// Contents and reasoning of assistants.
    Answers,
}

impl Marking {
    pub const ALL: [Self; 4] = [Self::All, Self::NoNames, Self::Texts, Self::Answers];

    fn covers(self, kind: Kind, assistant: bool) -> bool {
        match self {
            Self::All => true,
            Self::NoNames => kind != Kind::CallName,
            Self::Texts => matches!(kind, Kind::Content | Kind::Reasoning),
            Self::Answers => assistant && matches!(kind, Kind::Content | Kind::Reasoning),
        }
    }
}

/// Marks messages and gives their fields in order; `None` if a text holds marks of its own.
pub(super) fn mark(messages: &mut [Map<String, Json>], marking: Marking) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    for (index, message) in messages.iter_mut().enumerate() {
        let assistant = message.get("role").and_then(Json::as_str) == Some("assistant");
        let mut marker = Marker { marking, assistant, message: index, fields: &mut fields };
        for key in REASONING {
            if let Some(Json::String(text)) = message.get_mut(key) {
                *text = marker.mark(text, Kind::Reasoning)?;
            }
        }
        match message.get_mut("content") {
            Some(Json::String(content)) => *content = marker.mark_content(content)?,
            Some(Json::Array(parts)) => {
                for part in parts {
                    if let Some(Json::String(text)) = part.get_mut("text") {
                        *text = marker.mark_content(text)?;
                    }
                }
            }
            _ => {}
        }
        for call in calls_mut(message) {
            if let Some(Json::String(name)) = call.get_mut("name") {
                *name = marker.mark(name, Kind::CallName)?;
            }
            if let Some(arguments) = call.get_mut("arguments") {
                marker.mark_all(arguments)?;
            }
        }
    }
    Some(fields)
}

struct Marker<'a> {
    marking: Marking,
    assistant: bool,
    message: usize,
    fields: &'a mut Vec<Field>,
}

impl Marker<'_> {
    fn mark(&mut self, text: &str, kind: Kind) -> Option<String> {
        if text.contains(is_mark) {
            return None;
        }
        let said = text.trim();
        if said.is_empty() || !self.marking.covers(kind, self.assistant) {
            return Some(text.to_owned());
        }
        let number = self.fields.len() as u32;
        self.fields.push(Field { message: self.message, kind });
        let start = text.len() - text.trim_start().len();
        let (before, after) = (&text[..start], &text[start + said.len()..]);
        let digits: String =
            (0..DIGITS).rev().filter_map(|digit| char::from_u32(DIGIT + (number >> (4 * digit) & 15))).collect();
        Some(format!("{before}{OPEN}{digits}{said}{CLOSE}{digits}{after}"))
    }

    /// Marks a content, the thinking at its beginning apart.
    fn mark_content(&mut self, content: &str) -> Option<String> {
        let Some((reasoning, answer)) = content.rsplit_once(END_OF_REASONING).filter(|_| self.assistant) else {
            return self.mark(content, Kind::Content);
        };
        let (tag, reasoning) = match reasoning.split_once("<think>") {
            Some((before, reasoning)) if before.trim().is_empty() => (format!("{before}<think>"), reasoning),
            _ => (String::new(), reasoning),
        };
        let reasoning = self.mark(reasoning, Kind::Reasoning)?;
        Some(format!("{tag}{reasoning}{END_OF_REASONING}{}", self.mark(answer, Kind::Content)?))
    }

    /// Marks the texts of a call's arguments.
    fn mark_all(&mut self, value: &mut Json) -> Option<()> {
        match value {
            Json::String(text) => *text = self.mark(text, Kind::CallArgument)?,
            Json::Array(items) => items.iter_mut().try_for_each(|item| self.mark_all(item))?,
            Json::Object(map) => map.values_mut().try_for_each(|item| self.mark_all(item))?,
            _ => {}
        }
        Some(())
    }
}

/// Any code point that is a mark here or of the `generation` tags.
fn is_mark(c: char) -> bool {
    ('\u{FDD0}'..='\u{FDEF}').contains(&c)
}

/// A text with marks, taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Unmarked {
    /// The text without marks.
    pub text: String,
    /// Where fields stand, in the order of their ends.
    pub places: Vec<Place>,
    /// Fields of which one mark is missing somewhere: the template cut them up.
    pub broken: Vec<usize>,
    /// What `generation` tags enclose.
    pub generated: Vec<Range<usize>>,
}

/// Takes the marks out of a text; `None` if `generation` tags do not alternate.
pub(super) fn unmark(marked: &str) -> Option<Unmarked> {
    let mut out = Unmarked { text: String::with_capacity(marked.len()), ..Unmarked::default() };
    let mut open: Vec<(usize, usize)> = Vec::new();
    let mut generation = None;
    let mut rest = marked;
    while let Some(at) = rest.find(is_mark) {
        out.text.push_str(&rest[..at]);
        rest = &rest[at..];
        let mut chars = rest.chars();
        let mark = chars.next()?;
        rest = chars.as_str();
        match mark {
            GENERATION_START if generation.is_none() => generation = Some(out.text.len()),
            GENERATION_END => out.generated.push(generation.take()?..out.text.len()),
            OPEN | CLOSE => {
                let mut field = 0;
                for _ in 0..DIGITS {
                    let digit = chars.next().map(u32::from).filter(|c| (DIGIT..DIGIT + 16).contains(c))?;
                    field = field << 4 | (digit - DIGIT) as usize;
                }
                rest = chars.as_str();
                if mark == OPEN {
                    open.push((field, out.text.len()));
                } else if let Some(at) = open.iter().rposition(|(other, _)| *other == field) {
                    let (_, start) = open.remove(at);
                    out.places.push(Place { field, range: start..out.text.len() });
                } else {
                    out.broken.push(field);
                }
            }
            _ => return None,
        }
    }
    out.text.push_str(rest);
    out.broken.extend(open.into_iter().map(|(field, _)| field));
    generation.is_none().then_some(out)
}
