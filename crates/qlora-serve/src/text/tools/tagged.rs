//! `<tool_call>{"name": .., "arguments": {..}}</tool_call>`.

use super::buffer::{Begins, Buffer, Sought};
use super::{Piece, Step, call, content};

pub(super) const OPEN: &str = "<tool_call>";
pub(super) const CLOSE: &str = "</tool_call>";

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// In content.
    #[default]
    Content,
    /// Behind the opening tag.
    Open,
    /// In a call's JSON.
    Json,
    /// Behind a call's JSON.
    Called,
    /// Behind a call.
    Between,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Tagged {
    state: State,
    /// What was taken since the opening tag, in case that no call comes of it.
    taken: String,
}

impl Tagged {
    pub fn step(&mut self, buffer: &mut Buffer, end: bool, out: &mut Vec<Piece>) -> Step {
        match self.state {
            State::Content | State::Between => {
                if self.state == State::Between {
                    buffer.skip(&[]);
                }
                match buffer.seek(OPEN, end, out) {
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
                    (blank, Some('{')) => {
                        self.taken += &buffer.take(blank);
                        self.state = State::Json;
                    }
                    (_, None) if !end => return Step::Wait,
                    _ => self.no_call(out),
                }
                Step::Again
            }
            State::Json => {
                match buffer.take_json() {
                    None if !end => return Step::Wait,
                    None => self.no_call(out),
                    Some(text) => {
                        let json = serde_json::from_str(&text).ok();
                        match json.and_then(|json| call(&json, &["arguments", "parameters"])) {
                            Some(call) => {
                                out.push(Piece::Call(call));
                                self.state = State::Called;
                            }
                            None => {
                                self.taken += &text;
                                self.no_call(out);
                            }
                        }
                    }
                }
                Step::Again
            }
            State::Called => {
                buffer.skip(&[]);
                match buffer.begins(CLOSE, end) {
                    Begins::Unknown => return Step::Wait,
                    Begins::Yes => drop(buffer.take(CLOSE.len())),
                    Begins::No => {}
                }
                self.state = State::Between;
                Step::Again
            }
        }
    }

    fn no_call(&mut self, out: &mut Vec<Piece>) {
        content(out, std::mem::take(&mut self.taken));
        self.state = State::Content;
    }
}
