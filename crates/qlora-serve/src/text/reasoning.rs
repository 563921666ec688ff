//! The reasoning of an answer apart from its content: `<think>..</think>`.
//!
//! An answer has a reasoning where it begins with the opening tag, or where the prompt ended with it. White space around
//! the reasoning and before the content is left out.

use super::stops::overlap;

/// Begins a reasoning.
pub const OPEN: &str = "<think>";
/// Ends it.
pub const CLOSE: &str = "</think>";

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Of the reasoning.
    Reasoning(String),
    /// Of what follows it.
    Content(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing but white space and the beginning of a tag came.
    Start,
    /// In the reasoning; whether any of it was given out.
    Inside(bool),
    /// Behind the closing tag, before the content.
    After,
    /// In the content.
    Content,
}

/// Splits an answer that comes in pieces.
#[derive(Clone, Debug)]
pub struct ReasoningSplit {
    state: State,
    held: String,
}

impl ReasoningSplit {
    /// For an answer to a prompt that ended with the opening tag, or did not.
    pub fn new(opened: bool) -> Self {
        Self { state: if opened { State::Inside(false) } else { State::Start }, held: String::new() }
    }

    /// For text that has no reasoning: all of it is content.
    pub fn none() -> Self {
        Self { state: State::Content, held: String::new() }
    }

    /// Takes a piece and returns what is decided with it.
    pub fn push(&mut self, piece: &str) -> Vec<Part> {
        self.held.push_str(piece);
        let mut parts = Vec::new();
        while self.step(&mut parts) {}
        parts
    }

    /// What is held back, at the end of the answer.
    pub fn finish(&mut self) -> Vec<Part> {
        let held = std::mem::take(&mut self.held);
        let part = match self.state {
            State::Inside(begun) => {
                let text = if begun { held.trim_end() } else { held.trim() };
                Part::Reasoning(text.into())
            }
            State::After => Part::Content(held.trim_start().into()),
            State::Start | State::Content => Part::Content(held),
        };
        let (Part::Reasoning(text) | Part::Content(text)) = &part;
        if text.is_empty() { Vec::new() } else { vec![part] }
    }

    /// Whether another step may follow.
    fn step(&mut self, parts: &mut Vec<Part>) -> bool {
        match self.state {
            State::Start => {
                let text = self.held.trim_start();
                if let Some(rest) = text.strip_prefix(OPEN) {
                    self.held = rest.into();
                    self.state = State::Inside(false);
                } else if OPEN.starts_with(text) {
                    return false;
                } else {
                    self.state = State::Content;
                }
            }
            State::Inside(begun) => {
                if !begun {
                    let blank = self.held.len() - self.held.trim_start().len();
                    self.held.drain(..blank);
                }
                let (end, closed) = match self.held.find(CLOSE) {
                    Some(at) => (at, true),
                    None => (self.held.len() - overlap(&self.held, CLOSE), false),
                };
                let given = self.held[..end].trim_end().len();
                if given > 0 {
                    parts.push(Part::Reasoning(self.held[..given].into()));
                    self.state = State::Inside(true);
                }
                self.held.drain(..if closed { end + CLOSE.len() } else { given });
                if !closed {
                    return false;
                }
                self.state = State::After;
            }
            State::After => {
                let text = self.held.trim_start();
                if text.is_empty() {
                    self.held.clear();
                    return false;
                }
                self.held = text.into();
                self.state = State::Content;
            }
            State::Content => {
                if !self.held.is_empty() {
                    parts.push(Part::Content(std::mem::take(&mut self.held)));
                }
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Part, ReasoningSplit};

    fn run(opened: bool, pieces: &[&str]) -> (String, String) {
        let mut split = ReasoningSplit::new(opened);
        let mut parts: Vec<Part> = pieces.iter().flat_map(|piece| split.push(piece)).collect();
        parts.extend(split.finish());
        let (mut reasoning, mut content) = (String::new(), String::new());
        for part in parts {
            match part {
                Part::Reasoning(text) => reasoning += &text,
                Part::Content(text) => content += &text,
            }
        }
        (reasoning, content)
    }

    #[test]
    fn the_parts_of_an_answer() {
        let cases = [
            (false, "plain", "", "plain"),
            (false, "  <thin", "", "  <thin"),
            (false, "<think>\na b\n</think>\n\nyes", "a b", "yes"),
            (false, "\n<think></think>yes ", "", "yes "),
            (false, "so <think>no</think>", "", "so <think>no</think>"),
            (true, "\na</b\n\n</think>yes</think>", "a</b", "yes</think>"),
            (true, "cut off </th", "cut off </th", ""),
        ];
        for (opened, text, reasoning, content) in cases {
            assert_eq!(run(opened, &[text]), (reasoning.into(), content.into()), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            opened: bool,
            pieces in prop::collection::vec(r"(<think>|</think>|</th|<thi|nk>|[ab \n]){0,3}", 0..8),
        ) {
            let whole = pieces.concat();
            let characters: Vec<String> = whole.chars().map(String::from).collect();
            let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            prop_assert_eq!(run(opened, &pieces), run(opened, &[&whole]));
            prop_assert_eq!(run(opened, &characters), run(opened, &[&whole]));
        }
    }
}
