//! `{"name": .., "parameters": {..}}`, the whole answer or behind `<|python_tag|>`; several are separated by `;`.
//!
//! Without the tag an answer that begins with an object may mean just that: it is a call if it names one of the
//! request's tools.

use super::buffer::{Buffer, Sought};
use super::{Piece, Step, call, content};

pub(super) const TAG: &str = "<|python_tag|>";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Where a call may begin.
    Start,
    /// Behind the tag.
    Tagged,
    /// In an object, behind the tag or not.
    Object { tagged: bool },
    /// In content: only the tag begins a call.
    Content,
    /// Behind a call.
    Called,
}

#[derive(Clone, Debug)]
pub(super) struct Bare {
    state: State,
    names: Vec<String>,
    /// What was taken since the last call or content, in case that no call comes of it.
    taken: String,
}

impl Bare {
    pub fn new(names: Vec<String>) -> Self {
        Self { state: State::Start, names, taken: String::new() }
    }

    pub fn step(&mut self, buffer: &mut Buffer, end: bool, out: &mut Vec<Piece>) -> Step {
        match self.state {
            State::Start | State::Called => {
                let called = self.state == State::Called;
                let separators: &[char] = if called { &[';', ','] } else { &[] };
                let begin = |c: char| !(c.is_whitespace() || separators.contains(&c));
                let Some(at) = buffer.text.find(begin) else {
                    if end {
                        let rest = buffer.take(buffer.text.len());
                        content(out, if called { String::new() } else { rest });
                    }
                    return Step::Wait;
                };
                let rest = &buffer.text[at..];
                if rest.starts_with('{') {
                    self.taken = buffer.take(at);
                    self.state = State::Object { tagged: false };
                } else if rest.starts_with(TAG) {
                    self.taken = buffer.take(at + TAG.len());
                    self.state = State::Tagged;
                } else if !end && TAG.starts_with(rest) {
                    return Step::Wait;
                } else {
                    self.state = State::Content;
                }
                Step::Again
            }
            State::Tagged => {
                match buffer.first() {
                    (blank, Some('{')) => {
                        self.taken += &buffer.take(blank);
                        self.state = State::Object { tagged: true };
                    }
                    (_, None) if !end => return Step::Wait,
                    // Code for an interpreter, which no function of a request is.
                    _ => self.no_call(out),
                }
                Step::Again
            }
            State::Object { tagged } => {
                let text = match buffer.take_json() {
                    None if !end => return Step::Wait,
                    text => text.unwrap_or_default(),
                };
                let json = serde_json::from_str(&text).ok();
                let called = json.and_then(|json| call(&json, &["parameters", "arguments"]));
                match called.filter(|call| tagged || self.names.contains(&call.name)) {
                    Some(call) => {
                        out.push(Piece::Call(call));
                        self.state = State::Called;
                    }
                    None => {
                        self.taken += &text;
                        self.no_call(out);
                    }
                }
                Step::Again
            }
            State::Content => match buffer.seek(TAG, end, out) {
                Sought::Tag(text) => {
                    self.taken = text;
                    self.state = State::Tagged;
                    Step::Again
                }
                Sought::Content | Sought::Nothing => Step::Wait,
            },
        }
    }

    fn no_call(&mut self, out: &mut Vec<Piece>) {
        content(out, std::mem::take(&mut self.taken));
        self.state = State::Content;
    }
}
