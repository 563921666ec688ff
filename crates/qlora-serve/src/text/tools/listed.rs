//! `[TOOL_CALLS][{"name": .., "arguments": {..}}, ..]`, or `[TOOL_CALLS]name[ARGS]{..}` for each call (tokenizers from
//! version 11 on, some with `[CALL_ID]..` before the arguments).

use serde_json::Value as Json;

use super::buffer::{Buffer, Sought};
use super::{Call, Piece, Step, call, content};

pub(super) const TAG: &str = "[TOOL_CALLS]";
pub(super) const ARGS: &str = "[ARGS]";
pub(super) const CALL_ID: &str = "[CALL_ID]";

/// A function's name is shorter.
const LONGEST_NAME: usize = 256;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum State {
    /// In content.
    #[default]
    Content,
    /// Behind the tag.
    Open,
    /// In JSON that holds whole calls.
    Calls,
    /// In a name.
    Name,
    /// Behind this function's name and [`CALL_ID`].
    Id(String),
    /// Behind this function's name and [`ARGS`].
    Arguments(String),
    /// Behind a call.
    Between,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Listed {
    state: State,
    /// What was taken since the tag, in case that no call comes of it.
    taken: String,
}

impl Listed {
    pub fn step(&mut self, buffer: &mut Buffer, end: bool, out: &mut Vec<Piece>) -> Step {
        match std::mem::take(&mut self.state) {
            state @ (State::Content | State::Between) => {
                if state == State::Between {
                    buffer.skip(&[]);
                    self.state = state;
                }
                match buffer.seek(TAG, end, out) {
                    Sought::Tag(text) => {
                        self.taken = text;
                        self.state = State::Open;
                        return Step::Again;
                    }
                    Sought::Content => self.state = State::Content,
                    Sought::Nothing => {}
                }
                Step::Wait
            }
            State::Open => {
                match buffer.first() {
                    (blank, Some(first)) => {
                        self.taken += &buffer.take(blank);
                        self.state = if first == '[' || first == '{' { State::Calls } else { State::Name };
                    }
                    (_, None) if !end => return self.wait(State::Open),
                    (_, None) => self.no_call(out),
                }
                Step::Again
            }
            State::Calls => {
                match buffer.take_json() {
                    None if !end => return self.wait(State::Calls),
                    None => self.no_call(out),
                    Some(text) => match calls(&text) {
                        Some(calls) => {
                            out.extend(calls.into_iter().map(Piece::Call));
                            self.state = State::Between;
                        }
                        None => {
                            self.taken += &text;
                            self.no_call(out);
                        }
                    },
                }
                Step::Again
            }
            State::Name => self.name(buffer, end, out),
            State::Id(name) => {
                match buffer.text.find(ARGS) {
                    Some(at) => {
                        self.taken += &buffer.take(at + ARGS.len());
                        self.state = State::Arguments(name);
                    }
                    None if end || buffer.text.len() > LONGEST_NAME + ARGS.len() => self.no_call(out),
                    None => return self.wait(State::Id(name)),
                }
                Step::Again
            }
            State::Arguments(name) => {
                let (blank, first) = buffer.first();
                if blank > 0 {
                    self.taken += &buffer.take(blank);
                }
                match first {
                    Some('{') => match buffer.take_json() {
                        Some(text) => match serde_json::from_str::<Json>(&text) {
                            Ok(arguments) => {
                                out.push(Piece::Call(Call { name, arguments: arguments.to_string() }));
                                self.state = State::Between;
                            }
                            Err(_) => {
                                self.taken += &text;
                                self.no_call(out);
                            }
                        },
                        None if !end => return self.wait(State::Arguments(name)),
                        None => self.no_call(out),
                    },
                    None if !end => return self.wait(State::Arguments(name)),
                    _ => self.no_call(out),
                }
                Step::Again
            }
        }
    }

    fn name(&mut self, buffer: &mut Buffer, end: bool, out: &mut Vec<Piece>) -> Step {
        let Some(at) = buffer.text.find(['[', '{']) else {
            if end || buffer.text.len() > LONGEST_NAME {
                self.no_call(out);
                return Step::Again;
            }
            return self.wait(State::Name);
        };
        let rest = &buffer.text[at..];
        let tag = match rest {
            _ if at > LONGEST_NAME => None,
            _ if rest.starts_with('{') => Some(""),
            _ if rest.starts_with(ARGS) => Some(ARGS),
            _ if rest.starts_with(CALL_ID) => Some(CALL_ID),
            _ if !end && (ARGS.starts_with(rest) || CALL_ID.starts_with(rest)) => return self.wait(State::Name),
            _ => None,
        };
        match tag {
            Some(tag) => {
                let text = buffer.take(at + tag.len());
                let name = text[..at].trim().to_owned();
                self.taken += &text;
                self.state = if tag == CALL_ID { State::Id(name) } else { State::Arguments(name) };
            }
            None => self.no_call(out),
        }
        Step::Again
    }

    fn wait(&mut self, state: State) -> Step {
        self.state = state;
        Step::Wait
    }

    fn no_call(&mut self, out: &mut Vec<Piece>) {
        content(out, std::mem::take(&mut self.taken));
        self.state = State::Content;
    }
}

/// The calls of a list, or one that is no list.
fn calls(text: &str) -> Option<Vec<Call>> {
    let json: Json = serde_json::from_str(text).ok()?;
    let list = json.as_array().map_or(std::slice::from_ref(&json), Vec::as_slice);
    let calls: Option<Vec<Call>> = list.iter().map(|json| call(json, &["arguments", "parameters"])).collect();
    calls.filter(|calls| !calls.is_empty())
}
