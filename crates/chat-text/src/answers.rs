//! Which part of a conversation's text the assistant wrote.
//!
//! A template turns a list of messages into one text, and says nothing about which part of it came
//! from which message. Three ways to find out, the first that applies to a turn is taken:
//!
//! 1. Prefixes. When the model is to answer turn i, it sees `render(messages[..i])` with the
//!    generation prompt, and what it should write then is what `render(messages[..=i])` has beyond
//!    that: the answer and the tokens that end a turn. So the span lies between the lengths of the
//!    two, as long as both are beginnings of the whole text.
//! 2. `{% generation %}` tags, where a template breaks 1, e.g. by leaving the reasoning out of all
//!    but the last answer, and has them.
//! 3. Marks around the answers. The conversation is rendered once more with two code points, which
//!    no text should hold, around each answer. If the output without them is the same text, the
//!    answers lie where they stood. What follows an answer up to the end of its turn is what
//!    `render(messages[..=i])` has there too.
//!
//! Each way is verified against the text the model will be trained on. Where none holds, the row is
//! an error: a wrong guess would train on the wrong tokens, and no loss would show it.

use std::fmt;
use std::ops::Range;

use crate::error::ChatError;
use crate::message::Message;
use crate::template::{ChatInput, ChatTemplate};

/// Marks of the third way; Unicode reserves them for a program's own use.
const OPEN: char = '\u{FDD2}';
const CLOSE: char = '\u{FDD3}';

/// Ends the reasoning that some models write before their answer.
const END_OF_REASONING: &str = "</think>";

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

impl ChatTemplate {
    /// Writes a conversation and finds what the assistant wrote in it: answers with the tokens that
    /// end their turns.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; [`ChatError::NotWritten`] and [`ChatError::Untraceable`] name the
    /// assistant's message that can't be found in the text.
    pub fn render_answers(&self, input: &ChatInput) -> Result<Rendered, ChatError> {
        let untraceable = |message: usize| ChatError::Untraceable { message: message + 1 };
        let text = self.render_input(input)?;
        let turns = || (0..input.messages.len()).filter(|i| input.messages[*i].role == "assistant");
        for message in turns() {
            let answer = answer(&input.messages[message].content);
            if !text.contains(answer.lines().next_back().unwrap_or_default().trim()) {
                return Err(ChatError::NotWritten { message: message + 1, part: UnwrittenPart::Content });
            }
        }
        let mut spans = Vec::new();
        let mut answers = None;
        for message in turns() {
            let finder = Turn { template: self, input, text: &text, message };
            let (start, end) = (finder.start_by_prefix(), finder.end_by_prefix());
            if !input.messages[message].learn {
                continue;
            }
            if let (Some(start), Some(end)) = (start, end)
                && start <= end
            {
                spans.push(start..end);
                continue;
            }
            if self.has_generation_tags() {
                let (text, spans) = self.render_marked(input)?;
                return Ok(Rendered { text, spans, unwritten: Vec::new() });
            }
            let answers = answers.get_or_insert_with(|| marked_answers(self, input, &text));
            let Some(answer) = answers.as_ref().and_then(|answers| answers[message].clone()) else {
                return Err(untraceable(message));
            };
            let start = start.filter(|start| *start <= answer.start).unwrap_or(answer.start);
            let end = end.filter(|end| *end >= answer.end);
            let end = end.or_else(|| finder.end_after(&answer)).ok_or_else(|| untraceable(message))?;
            spans.push(start..end);
        }
        // Spans that run into each other would come from a template that reorders its messages.
        match spans.windows(2).position(|pair| pair[0].end > pair[1].start) {
            None => Ok(Rendered { text, spans, unwritten: Vec::new() }),
            Some(turn) => Err(untraceable(turns().nth(turn).unwrap_or_default())),
        }
    }
}

impl ChatTemplate {
    /// Writes a conversation of which everything is to be learned.
    ///
    /// # Errors
    /// As [`ChatTemplate::render_answers`], but for answers that can't be found.
    pub fn render_all(&self, input: &ChatInput) -> Result<Rendered, ChatError> {
        let text = self.render_input(input)?;
        let spans = std::iter::once(0..text.len()).collect();
        Ok(Rendered { text, spans, unwritten: Vec::new() })
    }
}

/// One assistant's turn of a conversation.
struct Turn<'a> {
    template: &'a ChatTemplate,
    input: &'a ChatInput<'a>,
    text: &'a str,
    message: usize,
}

impl Turn<'_> {
    fn start_by_prefix(&self) -> Option<usize> {
        self.prefix(&self.input.messages[..self.message], true)
    }

    fn end_by_prefix(&self) -> Option<usize> {
        self.prefix(&self.input.messages[..=self.message], false)
    }

    /// Length of what a part of the conversation becomes, if the whole text begins with it. A
    /// template that refuses the part has no such beginning.
    fn prefix(&self, messages: &[Message], add_generation_prompt: bool) -> Option<usize> {
        let part = ChatInput { messages, add_generation_prompt, ..*self.input };
        let part = self.template.render_input(&part).ok()?;
        self.text.starts_with(&part).then_some(part.len())
    }

    /// Where the turn ends whose answer lies at `answer`: after what follows the answer both in
    /// the whole text and when this turn is the last one. They may part in the middle of the next
    /// turn's header (`<|user|>` and `<|endoftext|>`): then the end is after the last complete tag
    /// or line.
    fn end_after(&self, answer: &Range<usize>) -> Option<usize> {
        let mut messages = self.input.messages[..=self.message].to_vec();
        let last = messages.last_mut()?;
        last.content = mark(&last.content)?;
        let part = ChatInput { messages: &messages, ..*self.input };
        let part = self.template.render_input(&part).ok()?;
        let (_, tail) = part.split_once(CLOSE)?;
        let rest = &self.text[answer.end..];
        let common: usize = tail.chars().zip(rest.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum();
        let whole = common == tail.len();
        let common = &rest[..common];
        let length = if whole { common.len() } else { common.rfind(['>', ']', '\n']).map_or(0, |at| at + 1) };
        Some(answer.end + length)
    }
}

/// Where each assistant's answer stands in the text, by message; `None` if the marks change it.
fn marked_answers(template: &ChatTemplate, input: &ChatInput, text: &str) -> Option<Vec<Option<Range<usize>>>> {
    let mut messages = input.messages.to_vec();
    let mut marked = Vec::new();
    for (index, message) in messages.iter_mut().enumerate() {
        if message.role == "assistant"
            && let Some(content) = mark(&message.content)
        {
            message.content = content;
            marked.push(index);
        }
    }
    let with_marks = template.render_input(&ChatInput { messages: &messages, ..*input }).ok()?;
    let mut answers = vec![None; messages.len()];
    let mut plain = String::with_capacity(text.len());
    let mut marked = marked.into_iter();
    let mut open = None;
    for c in with_marks.chars() {
        match (c, open) {
            (OPEN, None) => open = Some((marked.next()?, plain.len())),
            (CLOSE, Some((index, start))) => {
                // A template that reorders its messages would give one turn's answer to another.
                if plain[start..] != *answer(&input.messages[index].content) {
                    return None;
                }
                answers[index] = Some(start..plain.len());
                open = None;
            }
            (OPEN | CLOSE, _) => return None,
            _ => plain.push(c),
        }
    }
    (open.is_none() && marked.next().is_none() && plain == text).then_some(answers)
}

/// What of a content is the answer: without surrounding whitespace, which templates trim, and
/// without the reasoning, which they may leave out.
fn answer(content: &str) -> &str {
    content.rsplit_once(END_OF_REASONING).map_or(content, |(_, answer)| answer).trim()
}

/// The content with its answer marked; `None` if there is nothing to mark.
fn mark(content: &str) -> Option<String> {
    let answer = answer(content);
    if answer.is_empty() || content.contains([OPEN, CLOSE]) {
        return None;
    }
    let end = content.trim_end().len();
    let start = end - answer.len();
    Some(format!("{}{OPEN}{answer}{CLOSE}{}", &content[..start], &content[end..]))
}

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
        assert!(matches!(spans(rewritten, ["xyz", "y"]), Err(ChatError::Untraceable { message: 2 })));
        let reversed = "{% for m in messages | reverse %}<{{ m.role }}>{{ m.content }}{% endfor %}";
        assert!(matches!(spans(reversed, ["xyz", "y"]), Err(ChatError::Untraceable { .. })));
    }
}
