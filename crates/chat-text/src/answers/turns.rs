//! Where the turns of assistants begin and end in a text.

use std::cell::{OnceCell, RefCell};
use std::ops::Range;

use minijinja::Value;

use super::marks::{Kind, unmark};
use super::{ASSISTANT, Marked};
use crate::conversation::{Arguments, Form, message_json, values};
use crate::error::{ChatError, Untraceable};
use crate::message::Message;
use crate::template::{ChatInput, ChatTemplate, Run};

/// Variables by which templates decide on the reasoning in their generation prompt.
const THINKING: [&str; 2] = ["enable_thinking", "thinking"];

/// What finds the turns of one conversation.
pub(super) struct Turns<'a> {
    template: &'a ChatTemplate,
    input: &'a ChatInput<'a>,
    /// The messages without marks.
    plain: &'a [Value],
    text: &'a str,
    marked: Option<&'a Marked>,
    /// Variables for generation prompts: none, then those that turn reasoning on and off.
    prompts: Vec<Vec<(&'static str, Value)>>,
    ends_turns: OnceCell<bool>,
    /// What stands between the last word of a message and the beginning or end of a turn.
    known: RefCell<Vec<(Beside<'a>, &'a str)>>,
}

/// What a text stands beside, by the role of the message on the other side of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Beside<'a> {
    Before(Option<&'a str>),
    Behind(Option<&'a str>),
}

impl<'a> Turns<'a> {
    pub fn new(
        template: &'a ChatTemplate,
        input: &'a ChatInput<'a>,
        plain: &'a [Value],
        text: &'a str,
        marked: Option<&'a Marked>,
    ) -> Self {
        let known = THINKING.into_iter().filter(|name| template.source().contains(name));
        let thinking = known.flat_map(|name| [true, false].map(|on| vec![(name, Value::from(on))]));
        let prompts = std::iter::once(Vec::new()).chain(thinking).collect();
        Self { template, input, plain, text, marked, prompts, ends_turns: OnceCell::new(), known: RefCell::default() }
    }

    /// The spans of all messages that are to be learned, in order.
    pub fn spans(&self) -> Result<Vec<Range<usize>>, ChatError> {
        if let Some(spans) = self.generated() {
            return Ok(spans);
        }
        let mut spans = Vec::new();
        for (message, turn) in self.input.messages.iter().enumerate() {
            if turn.role == ASSISTANT && turn.learn {
                spans.push((message, self.turn(message)?));
            }
        }
        spans.sort_by_key(|(_, span)| span.start);
        // Spans that run into each other would come from a template that reorders its messages.
        match spans.windows(2).find(|pair| pair[0].1.end > pair[1].1.start) {
            None => Ok(spans.into_iter().map(|(_, span)| span).collect()),
            Some(pair) => Err(ChatError::Untraceable { message: pair[0].0 + 1, reason: Untraceable::Outside }),
        }
    }

    /// What the template's own tags enclose, if there are any and every turn that is in the text is in them.
    fn generated(&self) -> Option<Vec<Range<usize>>> {
        let Some(marked) = self.marked else { return self.generated_alone() };
        let spans = &marked.unmarked.generated;
        let is = |message: usize, wanted: fn(&Message) -> bool| self.input.messages.get(message).is_some_and(wanted);
        let assistant = |message: usize| is(message, |m| m.role == ASSISTANT);
        let mut wanted = Vec::new();
        for span in spans.iter().filter(|span| !span.is_empty()) {
            let from = marked.order.partition_point(|(range, _)| range.start < span.start);
            let inside = marked.order[from..].iter().take_while(|(range, _)| range.end <= span.end);
            let message = inside.map(|(_, message)| *message).find(|message| assistant(*message));
            if message.is_none_or(|message| is(message, |m| m.learn)) {
                wanted.push(span.clone());
            }
        }
        let covered = |place: &Range<usize>| {
            let at = spans.partition_point(|span| span.end < place.end);
            spans.get(at).is_some_and(|span| span.start <= place.start)
        };
        let turns = (0..self.input.messages.len()).filter(|message| assistant(*message));
        let all = turns.flat_map(|message| marked.of(message)).all(|(_, place)| place.is_none_or(covered));
        (!spans.is_empty() && all).then_some(wanted)
    }

    /// As [`Turns::generated`] where the text changes with marks around what is said, as in a template that counts
    /// letters: one pair of tags for each of the assistant's messages, in order.
    fn generated_alone(&self) -> Option<Vec<Range<usize>>> {
        if !self.template.has_generation_tags() {
            return None;
        }
        let (text, spans) = self.template.render_marked(self.input).ok()?;
        let turns: Vec<_> = self.input.messages.iter().filter(|message| message.role == ASSISTANT).collect();
        if text != self.text || spans.len() != turns.len() {
            return None;
        }
        let wanted = spans.into_iter().zip(turns).filter(|(span, turn)| turn.learn && !span.is_empty());
        Some(wanted.map(|(span, _)| span).collect())
    }

    /// What a message of an assistant became.
    fn turn(&self, message: usize) -> Result<Range<usize>, ChatError> {
        let untraceable = |reason| ChatError::Untraceable { message: message + 1, reason };
        let missing = |reason| untraceable(if self.marked.is_some() { reason } else { Untraceable::Changed });
        let own = || self.marked.into_iter().flat_map(|marked| marked.of(message)).filter_map(|(_, place)| place);
        let first = own().map(|place| place.start).min();
        let last = own().map(|place| place.end).max();
        let before = first.and_then(|first| self.before(message, first));
        let after = last.map(|last| (Beside::Behind(self.role(message + 1)), last));
        let start = match self.known(before, first) {
            Some(start) => start,
            None => self.start(message, first)?.ok_or_else(|| missing(Untraceable::NoStart))?,
        };
        let until = last.and_then(|last| self.next(message, last)).filter(|_| message + 1 < self.plain.len());
        let end = match self.known(after.filter(|_| until.is_some()), until) {
            Some(end) => end,
            None => self.end(message, last)?.filter(|end| start <= *end).ok_or_else(|| missing(Untraceable::NoEnd))?,
        };
        self.remember(before, start);
        self.remember(after.filter(|_| until.is_some()), end);
        if self.from(start).take_while(|(range, _)| range.start < end).any(|(_, other)| *other != message) {
            return Err(untraceable(Untraceable::Interrupted));
        }
        match first.is_none_or(|first| start <= first) && last.is_none_or(|last| last <= end) {
            true => Ok(start..end),
            false => Err(untraceable(Untraceable::Outside)),
        }
    }

    fn role(&self, message: usize) -> Option<&'a str> {
        self.input.messages.get(message).map(|message| message.role.as_str())
    }

    /// Where the last word of the message before this one ends.
    fn before(&self, message: usize, first: usize) -> Option<(Beside<'a>, usize)> {
        // The last turn may have a reasoning that the others have not: it is looked at by itself.
        let last = message + 1 == self.plain.len();
        let order = &self.marked?.order;
        let (range, other) = order[..order.partition_point(|(range, _)| range.start < first)].last()?;
        (!last && *other + 1 == message).then(|| (Beside::Before(self.role(*other)), range.end))
    }

    /// Where a turn begins or ends, if the text there is what it was beside an earlier turn: most of a long
    /// conversation needs no rendering of its parts.
    fn known(&self, beside: Option<(Beside, usize)>, until: Option<usize>) -> Option<usize> {
        let (beside, at) = beside?;
        let texts = self.known.borrow();
        let between = &self.text[at..until?];
        let same = texts.iter().filter(|(key, text)| *key == beside && between.starts_with(text));
        same.map(|(_, text)| at + text.len()).max()
    }

    fn remember(&self, beside: Option<(Beside<'a>, usize)>, to: usize) {
        if let Some((beside, at)) = beside
            && let Some(text) = self.text.get(at..to).filter(|text| !text.trim().is_empty())
            && self.known.borrow().iter().all(|known| *known != (beside, text))
        {
            self.known.borrow_mut().push((beside, text));
        }
    }

    /// The places of all fields that end behind this one, in order, with their messages.
    fn from(&self, at: usize) -> impl Iterator<Item = &'a (Range<usize>, usize)> {
        let order = self.marked.map(|marked| &marked.order[..]).unwrap_or_default();
        order[order.partition_point(|(range, _)| range.end <= at)..].iter()
    }

    /// Where something that another message says begins, behind this place.
    fn next(&self, message: usize, at: usize) -> Option<usize> {
        self.from(at).find(|(range, other)| *other != message && at <= range.start).map(|(range, _)| range.start)
    }

    /// Renders the first messages.
    fn render(&self, messages: &[Value], prompt: bool, kwargs: &[(&str, Value)]) -> Result<Option<String>, ChatError> {
        let input = ChatInput { add_generation_prompt: prompt, ..*self.input };
        match self.template.run(&input, &Run { messages, kwargs, mark: false }) {
            Ok(text) => Ok(Some(text)),
            Err(ChatError::TemplateEndless) => Err(ChatError::TemplateEndless),
            // A template may refuse a part of a conversation.
            Err(_) => Ok(None),
        }
    }

    /// Where the model begins to write, before `first`.
    fn start(&self, message: usize, first: Option<usize>) -> Result<Option<usize>, ChatError> {
        let before = |at: usize| first.is_none_or(|first| at <= first);
        let mut common = None;
        for kwargs in &self.prompts {
            if let Some(prompt) = self.render(&self.plain[..message], true, kwargs)?
                && self.text.starts_with(&prompt)
                && before(prompt.len())
            {
                return Ok(Some(prompt.len()));
            }
            let Some(marked) = self.marked else { continue };
            let Some(prompt) = self.render(&marked.messages[..message], true, kwargs)? else { continue };
            let Some(prompt) = unmark(&prompt) else { continue };
            let Some(last) = prompt.places.iter().max_by_key(|place| place.range.end) else { continue };
            let places = marked.unmarked.places.iter();
            let same = places.filter(|place| place.field == last.field && before(place.range.end));
            let Some(here) = same.max_by_key(|place| place.range.end) else { continue };
            let (tail, rest) = (&prompt.text[last.range.end..], &self.text[here.range.end..]);
            if rest.starts_with(tail) && before(here.range.end + tail.len()) {
                return Ok(Some(here.range.end + tail.len()));
            }
            // What ends the turn before may be written differently when more follows; the header is what the
            // prompt adds.
            let header = self.header(message, kwargs)?;
            let between = first.map_or(rest, |first| &self.text[here.range.end..first]);
            if let Some(at) = header
                .filter(|header| !header.trim().is_empty())
                .and_then(|header| between.rfind(&header).map(|at| at + header.len()))
            {
                return Ok(Some(here.range.end + at));
            }
            let shared = here.range.end + common_tags(tail, rest);
            if before(shared) {
                common = common.max(Some(shared));
            }
        }
        Ok(common)
    }

    /// What the generation prompt adds to the messages before one.
    fn header(&self, message: usize, kwargs: &[(&str, Value)]) -> Result<Option<String>, ChatError> {
        let before = &self.plain[..message];
        let (Some(with), Some(without)) = (self.render(before, true, kwargs)?, self.render(before, false, kwargs)?)
        else {
            return Ok(None);
        };
        Ok(with.strip_prefix(&without).map(str::to_owned))
    }

    /// Where the turn ends, behind `last`.
    fn end(&self, message: usize, last: Option<usize>) -> Result<Option<usize>, ChatError> {
        let Some(end) = self.end_of_last(message, last)? else { return Ok(None) };
        if end == self.text.len() || self.ends_turns()? {
            return Ok(Some(end));
        }
        // The last turn is not ended, but this one may be: by a tag that is not the next message's own.
        let next = self.next(message, end);
        Ok(Some(end + next.map_or(0, |next| first_tag(&self.text[end..next]))))
    }

    /// What of the text behind the turn's last word is there as well when this turn is the last one.
    fn end_of_last(&self, message: usize, last: Option<usize>) -> Result<Option<usize>, ChatError> {
        if let Some(part) = self.render(&self.plain[..=message], false, &[])?
            && self.text.starts_with(&part)
            && last.is_none_or(|last| last <= part.len())
        {
            return Ok(Some(part.len()));
        }
        let (Some(marked), Some(last)) = (self.marked, last) else { return Ok(None) };
        let Some(part) = self.render(&marked.messages[..=message], false, &[])? else { return Ok(None) };
        let Some(part) = unmark(&part) else { return Ok(None) };
        let own = part.places.iter().filter(|place| marked.fields[place.field].message == message);
        let Some(tail) = own.map(|place| place.range.end).max() else { return Ok(None) };
        let tail = &part.text[tail..];
        let next = self.next(message, last);
        let rest = &self.text[last..next.unwrap_or(self.text.len())];
        let common = common_tags(tail, rest);
        if common == tail.len() {
            return Ok(Some(last + common));
        }
        // What closes a call may differ, e.g. by an id, when its result follows; what ends the turn does not.
        let ends = tail.match_indices(['<', '[']).map(|(at, _)| &tail[at..]);
        let end = ends.filter_map(|end| rest.find(end).map(|at| at + end.len())).find(|end| *end >= common);
        let spoken = part.places.iter().filter(|place| marked.fields[place.field].message == message);
        let call = spoken.max_by_key(|place| place.range.end).map(|place| marked.fields[place.field].kind);
        let cut = matches!(call, Some(Kind::CallName | Kind::CallArgument));
        Ok(match end {
            Some(end) => Some(last + end),
            // A call without what closes it is none.
            None if common == 0 && cut => None,
            None => Some(last + common),
        })
    }

    /// Whether the template writes something behind the last answer.
    fn ends_turns(&self) -> Result<bool, ChatError> {
        if let Some(known) = self.ends_turns.get() {
            return Ok(*known);
        }
        let messages = [Message::user("1 + 1"), Message::assistant("2 = 1 + 1")];
        let form = Form { arguments: Arguments::Object, empty_content: true, parts: false };
        let messages = messages.map(|message| message_json(&message, form));
        let text = self.render(&values(&messages), false, &[])?;
        let tail = text.as_deref().and_then(|text| text.rsplit_once("2 = 1 + 1"));
        let ends = tail.is_none_or(|(_, tail)| !tail.trim().is_empty());
        Ok(*self.ends_turns.get_or_init(|| ends))
    }
}

/// Length of the first of several tags with the whitespace before it, 0 if there are fewer than two.
fn first_tag(text: &str) -> usize {
    let tag = |text: &str| -> Option<usize> {
        let open = text.find(['<', '['])?;
        let close = if text[open..].starts_with('<') { '>' } else { ']' };
        text[open..].find(close).map(|length| open + length + 1)
    };
    let blank = text.len() - text.trim_start().len();
    match tag(text) {
        Some(end) if text[blank..].starts_with(['<', '[']) && tag(&text[end..]).is_some() => end,
        _ => 0,
    }
}

/// Length of what two texts begin with. They may part in the middle of a tag (`<|user|>` and `<|endoftext|>`): then
/// it ends after the last complete tag or line.
fn common_tags(tail: &str, rest: &str) -> usize {
    let common: usize = tail.chars().zip(rest.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum();
    if common == tail.len() { common } else { tail[..common].rfind(['>', ']', '\n']).map_or(0, |at| at + 1) }
}
