//! Which part of a conversation's text the assistant wrote.
//!
//! A template turns a list of messages into one text, and says nothing about which part of it came from which
//! message. What the assistant writes is its reasoning, its content, its tool calls and what ends its turn. Ways to
//! find it, the first that applies is taken:
//!
//! 1. `{% generation %}` tags, where the template has them.
//! 2. Prefixes. When the model is to answer turn i, it sees `render(messages[..i])` with the generation prompt, and
//!    what it should write then is what `render(messages[..=i])` has beyond that. So the span lies between the
//!    lengths of the two, as long as both are beginnings of the whole text.
//! 3. Marks. The conversation is rendered once more with marks around everything that is said (see `marks.rs`). The
//!    span begins where, behind the last thing said before the turn, the generation prompt ends, and it ends where
//!    what follows the turn's last word when the turn is the last one ends.
//!
//! Each way is verified against the text the model will be trained on: the text without marks is the same, everything
//! that the turn says lies in its span, and nothing that anybody else says does. Where none holds, the row is an
//! error: a wrong guess would train on the wrong tokens, and no loss would show it.

mod marks;
mod turns;

use std::fmt;
use std::ops::Range;

use minijinja::Value;

use crate::conversation::{message_json, values};
use crate::error::ChatError;
use crate::message::{Message, REASONING};
use crate::template::{ChatInput, ChatTemplate, Run};

use marks::{Field, Kind, Marking, Unmarked};
use turns::Turns;

/// A conversation as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Byte ranges that assistants wrote and that are to be learned, in order.
    pub spans: Vec<Range<usize>>,
    /// What of the conversation the template left out.
    pub unwritten: Vec<Unwritten>,
}

/// Something of a conversation that a template does not write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unwritten {
    /// The message's number in the conversation, from 1; 0 for the tool definitions.
    pub message: usize,
    /// What of it.
    pub part: UnwrittenPart,
}

/// What a template can leave out.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum UnwrittenPart {
    /// The content of a message.
    Content,
    /// `reasoning_content`, or the thinking at the beginning of the content.
    Reasoning,
    /// A message's tool calls.
    ToolCalls,
    /// The row's tool definitions.
    Tools,
    /// All of a message; its role.
    Message(String),
    /// A further field of a message, by its key.
    Field(String),
}

impl fmt::Display for UnwrittenPart {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Content => f.write_str("content"),
            Self::Reasoning => f.write_str("reasoning"),
            Self::ToolCalls => f.write_str("tool calls"),
            Self::Tools => f.write_str("tool definitions"),
            Self::Message(role) => write!(f, "whole text of role `{role}`"),
            Self::Field(key) => write!(f, "field `{key}`"),
        }
    }
}

impl fmt::Display for Unwritten {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.message {
            0 => write!(f, "the chat template does not write the row's {}", self.part),
            message => write!(f, "the chat template does not write the {} of message {message}", self.part),
        }
    }
}

/// A conversation with marks whose text without them is the conversation's.
struct Marked {
    messages: Vec<Value>,
    fields: Vec<Field>,
    unmarked: Unmarked,
    /// Where each field stands for the first time; `None` if it does not, or was cut up. (A tool's name may stand
    /// above its result once more.)
    first: Vec<Option<Range<usize>>>,
    /// The places of all fields with their messages, in the order of their beginnings.
    order: Vec<(Range<usize>, usize)>,
}

impl Marked {
    /// The first marking that leaves the text as it is.
    fn find(template: &ChatTemplate, input: &ChatInput, messages: &[JsonMessage], text: &str) -> Option<Self> {
        Marking::ALL.into_iter().find_map(|marking| {
            let mut messages = messages.to_vec();
            let fields = marks::mark(&mut messages, marking)?;
            let messages = values(&messages);
            let run = Run { messages: &messages, kwargs: &[], mark: template.has_generation_tags() };
            let unmarked = marks::unmark(&template.run(input, &run).ok()?)?;
            (unmarked.text == text).then(|| Self::new(messages, fields, unmarked))
        })
    }

    fn new(messages: Vec<Value>, fields: Vec<Field>, unmarked: Unmarked) -> Self {
        let mut first: Vec<Option<Range<usize>>> = vec![None; fields.len()];
        for place in &unmarked.places {
            let known = first.get_mut(place.field);
            if let Some(known) = known.filter(|known| known.as_ref().is_none_or(|at| place.range.start < at.start)) {
                *known = Some(place.range.clone());
            }
        }
        for field in &unmarked.broken {
            if let Some(known) = first.get_mut(*field) {
                *known = None;
            }
        }
        let places = unmarked.places.iter();
        let mut order: Vec<_> =
            places.filter_map(|place| Some((place.range.clone(), fields.get(place.field)?.message))).collect();
        order.sort_by_key(|(range, _)| range.start);
        Self { messages, fields, unmarked, first, order }
    }

    /// The fields of a message: their kinds, and where each stands for the first time.
    fn of(&self, message: usize) -> impl Iterator<Item = (Kind, Option<&Range<usize>>)> {
        // Fields are numbered in the order of messages.
        let from = self.fields.partition_point(|field| field.message < message);
        let to = self.fields.partition_point(|field| field.message <= message);
        (from..to).map(|field| (self.fields[field].kind, self.first[field].as_ref()))
    }

    /// Whether some of the fields of a kind are not in the text, or only in parts.
    fn lost(&self, message: usize, kinds: &[Kind]) -> bool {
        self.of(message).any(|(kind, place)| kinds.contains(&kind) && place.is_none())
    }
}

type JsonMessage = serde_json::Map<String, serde_json::Value>;

impl ChatTemplate {
    /// Writes a conversation and finds what the assistant wrote in it: reasoning, answers and tool calls, with the
    /// tokens that end their turns. Messages whose `learn` is false get no span.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; [`ChatError::NotWritten`] and [`ChatError::Untraceable`] name the
    /// assistant's message that can't be found in the text.
    pub fn render_answers(&self, input: &ChatInput) -> Result<Rendered, ChatError> {
        let (text, form) = self.render_form(input)?;
        let messages: Vec<_> = input.messages.iter().map(|message| message_json(message, form)).collect();
        let marked = Marked::find(self, input, &messages, &text);
        let unwritten = self.unwritten(input, &messages, &text, marked.as_ref());
        for lost in &unwritten {
            let Some(message) = lost.message.checked_sub(1).and_then(|index| input.messages.get(index)) else {
                continue;
            };
            // Of a turn without its content, or without the calls that are all it says, a wrong answer is learned.
            let wrong = match lost.part {
                UnwrittenPart::Content => true,
                UnwrittenPart::ToolCalls => message.content.trim().is_empty(),
                _ => false,
            };
            if message.role == ASSISTANT && message.learn && wrong {
                return Err(ChatError::NotWritten { message: lost.message, part: lost.part.clone() });
            }
        }
        let plain = values(&messages);
        let turns = Turns::new(self, input, &plain, &text, marked.as_ref());
        let spans = turns.spans()?;
        Ok(Rendered { text, spans, unwritten })
    }

    /// Writes a conversation of which everything is to be learned.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub fn render_all(&self, input: &ChatInput) -> Result<Rendered, ChatError> {
        let (text, form) = self.render_form(input)?;
        let messages: Vec<_> = input.messages.iter().map(|message| message_json(message, form)).collect();
        let marked = Marked::find(self, input, &messages, &text);
        let unwritten = self.unwritten(input, &messages, &text, marked.as_ref());
        let spans = std::iter::once(0..text.len()).collect();
        Ok(Rendered { text, spans, unwritten })
    }

    /// Writes a conversation that is to be answered, and finds the earlier answers in it as
    /// [`ChatTemplate::render_answers`] does in a row. Where that would refuse the row there are none: no adapter has
    /// learned such a conversation.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`].
    pub(crate) fn render_prompt(&self, input: &ChatInput) -> Result<(String, Vec<Range<usize>>), ChatError> {
        let (text, form) = self.render_form(input)?;
        let mut said = input.messages.to_vec();
        said.iter_mut().for_each(|message| message.learn &= message.role == ASSISTANT && message.speaks());
        if said.iter().all(|message| !message.learn) {
            return Ok((text, Vec::new()));
        }
        let input = ChatInput { messages: &said, ..*input };
        let messages: Vec<_> = said.iter().map(|message| message_json(message, form)).collect();
        let marked = Marked::find(self, &input, &messages, &text);
        let plain = values(&messages);
        match Turns::new(self, &input, &plain, &text, marked.as_ref()).spans() {
            Ok(spans) => Ok((text, spans)),
            Err(ChatError::Untraceable { .. }) => Ok((text, Vec::new())),
            Err(error) => Err(error),
        }
    }

    /// What of a conversation does not stand in its text.
    fn unwritten(
        &self,
        input: &ChatInput,
        messages: &[JsonMessage],
        text: &str,
        marked: Option<&Marked>,
    ) -> Vec<Unwritten> {
        let mut unwritten = Vec::new();
        for (index, message) in input.messages.iter().enumerate() {
            let assistant = message.role == ASSISTANT;
            let lost = |kinds: &[Kind]| marked.is_some_and(|marked| marked.lost(index, kinds));
            let mut report = |part| unwritten.push(Unwritten { message: index + 1, part });
            let content = match marked {
                Some(_) => lost(&[Kind::Content]),
                None => !text.contains(message.content.lines().next_back().unwrap_or_default().trim()),
            };
            if content {
                report(if assistant { UnwrittenPart::Content } else { UnwrittenPart::Message(message.role.clone()) });
            }
            if self.reasoning_lost(index, message, text, marked) {
                report(UnwrittenPart::Reasoning);
            }
            let calls = match marked {
                Some(marked) if marked.of(index).any(|(kind, _)| kind == Kind::CallName) => {
                    lost(&[Kind::CallName, Kind::CallArgument])
                }
                _ => crate::conversation::calls(&message.extra)
                    .any(|call| call.get("name").and_then(|n| n.as_str()).is_some_and(|name| !text.contains(name))),
            };
            if calls {
                report(UnwrittenPart::ToolCalls);
            }
        }
        self.unread(input, messages, text, &mut unwritten);
        unwritten
    }

    /// Whether a message's reasoning does not stand in the text. It is given under several names, of which one is
    /// enough.
    fn reasoning_lost(&self, index: usize, message: &Message, text: &str, marked: Option<&Marked>) -> bool {
        if let Some(marked) = marked {
            let mut given = marked.of(index).filter(|(kind, _)| *kind == Kind::Reasoning).peekable();
            return given.peek().is_some() && given.all(|(_, place)| place.is_none());
        }
        let reasoning = REASONING.iter().find_map(|key| message.extra.get(*key)).and_then(|value| value.as_str());
        let last = reasoning.and_then(|reasoning| reasoning.lines().next_back());
        last.is_some_and(|line| !text.contains(line.trim()))
    }

    /// Tool definitions and further fields without which the text is the same.
    fn unread(&self, input: &ChatInput, messages: &[JsonMessage], text: &str, unwritten: &mut Vec<Unwritten>) {
        let given =
            |value: &serde_json::Value| !value.is_null() && value.as_array().is_none_or(|list| !list.is_empty());
        let same = |messages: &[JsonMessage], input: &ChatInput| {
            let run = Run { messages: &values(messages), kwargs: &[], mark: false };
            self.run(input, &run).is_ok_and(|other| other == text)
        };
        if input.tools.is_some_and(given) && same(messages, &ChatInput { tools: None, ..*input }) {
            unwritten.push(Unwritten { message: 0, part: UnwrittenPart::Tools });
        }
        let further = |key: &str| !EXPECTED.contains(&key) && !REASONING.contains(&key);
        if !messages.iter().any(|message| message.keys().any(|key| further(key))) {
            return;
        }
        let without = |message: &JsonMessage| -> JsonMessage {
            message.iter().filter(|(key, _)| !further(key)).map(|(key, value)| (key.clone(), value.clone())).collect()
        };
        if same(&messages.iter().map(without).collect::<Vec<_>>(), input) {
            for (index, message) in messages.iter().enumerate() {
                let fields = message.keys().filter(|key| further(key)).cloned();
                unwritten.extend(fields.map(|key| Unwritten { message: index + 1, part: UnwrittenPart::Field(key) }));
            }
        }
    }
}

/// Keys of messages that are known, or of which it doesn't matter whether they are written.
const EXPECTED: [&str; 6] = ["role", "content", "tool_calls", "tool_call_id", "name", "id"];

/// The role whose messages are learned.
const ASSISTANT: &str = "assistant";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::template::SpecialTokens;

    /// The parts of the text that two answers became; user turns hold single letters.
    fn spans(template: &str, answers: [&str; 2]) -> Result<Vec<String>, ChatError> {
        let template = ChatTemplate::new(template)?;
        let [first, second] = answers.map(Message::assistant);
        let messages = [Message::user("a"), first, Message::user("b"), second];
        let special = SpecialTokens::default();
        let input = ChatInput {
            messages: &messages,
            tools: None,
            add_generation_prompt: false,
            special_tokens: &special,
            template_kwargs: None,
        };
        let Rendered { text, spans, .. } = template.render_answers(&input)?;
        Ok(spans.into_iter().map(|span| text[span].to_owned()).collect())
    }

    #[test]
    fn turns_are_found_by_prefixes() {
        let template = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
        assert_eq!(spans(template, [" x ", "y"]).expect("prefixes"), ["x</s>", "y</s>"]);
    }

    #[test]
    fn a_text_that_ends_differently_is_traced_by_marks() {
        // Phi-3's way: the end token only after the last turn.
        let template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}";
        assert_eq!(spans(template, ["x", "y"]).expect("marks"), ["x<|end|>\n", "y<|end|>\n<|endoftext|>"]);
    }

    #[test]
    fn reasoning_left_out_of_earlier_turns_is_no_obstacle() {
        // Qwen3's way: the last turn has a reasoning, empty if need be, the ones before have none.
        let template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}{% if loop.last %}<think>\n{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' }}\n</think>\n\n{% endif %}{{ parts[-1].strip() }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
        assert_eq!(
            spans(template, ["<think>\nhm\n</think>\n\nx", "<think>\nha\n</think>\n\ny"]).expect("marks"),
            ["x<|im_end|>\n", "<think>\nha\n</think>\n\ny<|im_end|>\n"]
        );
        assert_eq!(
            spans(template, ["x", "y"]).expect("marks"),
            ["x<|im_end|>\n", "<think>\n\n</think>\n\ny<|im_end|>\n"]
        );
    }

    #[test]
    fn templates_that_hide_the_answers_are_refused() {
        let hidden = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}";
        assert!(matches!(spans(hidden, ["xyz", "y"]), Err(ChatError::NotWritten { message: 2, .. })));
        let rewritten =
            "{{ messages | length }}{% for m in messages %}{{ m.content[:9] }}{{ m.content | length }}{% endfor %}";
        assert!(matches!(spans(rewritten, ["xyz", "y"]), Err(ChatError::Untraceable { message: 2, .. })));
        let reversed = "{% for m in messages | reverse %}<{{ m.role }}>{{ m.content }}{% endfor %}";
        assert!(matches!(spans(reversed, ["xyz", "y"]), Err(ChatError::Untraceable { .. })));
    }
}
