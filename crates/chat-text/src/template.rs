//! Chat templates: the Jinja text of a checkpoint that turns messages into one prompt.
//!
//! The environment is the one that transformers builds (`utils/chat_template_utils.py`):
//! `trim_blocks`, `lstrip_blocks`, loop controls, Python's string and dict methods, `tojson` as
//! `json.dumps` writes it, `raise_exception`, `strftime_now`, and the `{% generation %}` tag that
//! marks what an assistant writes.
//!
//! A template comes from a downloaded file, so it gets a budget: the number of executed
//! instructions and the data it may create are bounded (see `FUEL`), and so is recursion. A
//! template that loops ends in an error, not in a hang. Two holes are the engine's and remain:
//! joining a list that holds itself many times over to a string with `~` is paid for after it is
//! written, and freeing a list nested tens of thousands deep recurses. No template that means to
//! write a prompt does either.

mod filters;
mod generation;
mod json;
mod python;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, ErrorKind, Value};

use crate::conversation::{Form, has_python_dict, message_json, says_nothing, values};
use crate::error::ChatError;
use crate::message::Message;

pub(crate) use generation::{END as GENERATION_END, START as GENERATION_START};

/// What one rendering may cost: one unit for each instruction and each 64 bytes created, so that 256 MiB are never
/// held for a conversation of usual size. A conversation of a few dozen turns takes a hundredth of it; spending all
/// of it takes a few tenths of a second.
const FUEL: u64 = 2_000_000;

/// What a conversation may cost beyond that: the text is copied by each step that a template puts it through, and
/// some templates look at every message for each message.
const FUEL_PER_BYTE_OF_TEXT: f64 = 0.5;
const FUEL_PER_PAIR_OF_MESSAGES: u64 = 16;

/// Conversations whose size adds less than this are rendered with [`FUEL`].
const SMALL: u64 = FUEL / 16;

/// Most that a number of messages adds.
const MOST_BY_MESSAGES: u64 = 30_000_000;

/// Depth of nested calls, blocks and includes: half of what the engine allows, as rendering runs
/// on threads with small stacks.
const RECURSION_LIMIT: usize = 250;

const NAME: &str = "chat_template";

/// What is said of a template that the engine panics on.
const ENGINE_FAILED: &str =
    "the template engine fails on it; it can't do `continue` and `break` inside `with` or `generation`";

/// Variables that `template_kwargs` can't set.
const RESERVED: [&str; 4] = ["messages", "tools", "add_generation_prompt", generation::SWITCH];

/// The special tokens a template can name: `bos_token`, `eos_token`, `pad_token`, `unk_token`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens(BTreeMap<String, String>);

impl SpecialTokens {
    /// The text of a special token, by its name in `tokenizer_config.json`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// Adds a token under a name that has none yet.
    pub fn insert_if_missing(&mut self, name: &str, text: String) {
        self.0.entry(name.to_owned()).or_insert(text);
    }
}

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for SpecialTokens {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        let pairs = pairs.into_iter().map(|(k, v)| (k.into(), v.into()));
        Self(pairs.collect())
    }
}

/// What a template is rendered with.
#[derive(Clone, Copy, Debug)]
pub struct ChatInput<'a> {
    /// The conversation.
    pub messages: &'a [Message],
    /// Descriptions of the tools the assistant may call.
    pub tools: Option<&'a serde_json::Value>,
    /// Whether the prompt ends with the header of an assistant's turn.
    pub add_generation_prompt: bool,
    /// The tokenizer's special tokens.
    pub special_tokens: &'a SpecialTokens,
    /// Further variables of the template, e.g. `enable_thinking`, as the keyword arguments of
    /// transformers' `apply_chat_template`. They come before special tokens of the same name.
    pub template_kwargs: Option<&'a serde_json::Map<String, serde_json::Value>>,
}

/// A compiled chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    env: Environment<'static>,
    has_generation_tags: bool,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// [`ChatError::TemplateSyntax`] with the engine's message and line.
    pub fn new(source: impl Into<String>) -> Result<Self, ChatError> {
        let source = source.into();
        let fail = |problem: String| ChatError::TemplateSyntax { problem };
        if source.len() > MAX_TEMPLATE {
            return Err(fail(format!("longer than {MAX_TEMPLATE} bytes")));
        }
        // As Jinja's lexer does, in text and in string literals alike.
        let lines = source.replace("\r\n", "\n").replace('\r', "\n");
        let rewritten = generation::rewrite(&lines);
        if rewritten.longest_tag > MAX_TAG {
            return Err(fail(format!("a tag is longer than {MAX_TAG} bytes")));
        }
        let has_generation_tags = rewritten.has_generation_tags;
        let env = compile(rewritten.source).map_err(fail)?;
        Ok(Self { source, env, has_generation_tags })
    }

    /// A template as a configuration gives it: the path of a `.jinja`, `.j2` or `.txt` file, or the text itself.
    ///
    /// # Errors
    /// [`ChatError::Read`] if it is a path that can't be read, [`ChatError::NotATemplate`] if it is neither a path
    /// nor a text with a Jinja tag, and as [`ChatTemplate::new`].
    pub fn from_setting(setting: &str) -> Result<Self, ChatError> {
        if setting.contains("{{") || setting.contains("{%") {
            return Self::new(setting);
        }
        let path = Path::new(setting);
        let named = path.extension().is_some_and(|e| e == "jinja" || e == "jinja2" || e == "j2" || e == "txt");
        let one_line = !setting.contains('\n');
        if one_line && (named || path.is_file()) {
            let read = crate::files::read_to_string(path);
            let source = read.map_err(|source| ChatError::Read { path: path.to_owned(), source })?;
            return Self::new(source);
        }
        Err(ChatError::NotATemplate { setting: setting.chars().take(60).collect() })
    }

    /// The template's text.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template marks what an assistant writes with `{% generation %}`.
    pub fn has_generation_tags(&self) -> bool {
        self.has_generation_tags
    }

    /// Writes a conversation as one text.
    ///
    /// # Errors
    /// [`ChatError::TemplateRefused`] if the template calls `raise_exception`,
    /// [`ChatError::TemplateRender`] for anything else that goes wrong.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        special_tokens: &SpecialTokens,
    ) -> Result<String, ChatError> {
        self.render_input(&ChatInput {
            messages,
            tools: None,
            add_generation_prompt,
            special_tokens,
            template_kwargs: None,
        })
    }

    /// As [`ChatTemplate::render`], with everything a template can be given.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`]; [`ChatError::ReservedVariable`] names a `template_kwargs` that is taken.
    pub fn render_input(&self, input: &ChatInput) -> Result<String, ChatError> {
        self.render_form(input).map(|(text, _)| text)
    }

    /// Renders a conversation in the first form that the template takes.
    pub(crate) fn render_form(&self, input: &ChatInput) -> Result<(String, Form), ChatError> {
        let mut first = None;
        let mut second = None;
        for form in Form::of(input.messages) {
            let messages: Vec<_> = input.messages.iter().map(|message| message_json(message, form)).collect();
            let run = Run { messages: &values(&messages), kwargs: &[], mark: false };
            match self.run(input, &run) {
                Ok(text) if has_python_dict(&text, input.messages) || says_nothing(&text, input.messages) => {
                    second.get_or_insert((text, form));
                }
                Ok(text) => return Ok((text, form)),
                Err(error @ (ChatError::TemplateEndless | ChatError::ReservedVariable { .. })) => return Err(error),
                Err(error) => {
                    first.get_or_insert(error);
                }
            }
        }
        // There is always one form.
        second.ok_or_else(|| first.unwrap_or(ChatError::TemplateEndless))
    }

    /// Writes a conversation and gives the byte ranges of the text that lie between
    /// `{% generation %}` and `{% endgeneration %}`, in order.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`], and if the marks can't be followed through the template
    /// because it cuts up or rewrites the marked text.
    pub fn render_marked(&self, input: &ChatInput) -> Result<(String, Vec<Range<usize>>), ChatError> {
        let (text, form) = self.render_form(input)?;
        let messages: Vec<_> = input.messages.iter().map(|message| message_json(message, form)).collect();
        let marked = self.run(input, &Run { messages: &values(&messages), kwargs: &[], mark: true })?;
        let (stripped, spans) =
            generation::take_marks(&marked).map_err(|problem| ChatError::TemplateRender { problem })?;
        if stripped != text {
            return Err(ChatError::TemplateRender {
                problem: "the text between its `generation` tags can't be followed to the output".into(),
            });
        }
        Ok((text, spans))
    }

    /// Renders messages that are ready, with what else the input holds.
    pub(crate) fn run(&self, input: &ChatInput, run: &Run) -> Result<String, ChatError> {
        let kwargs = input.template_kwargs.into_iter().flatten();
        if let Some((name, _)) = kwargs.clone().find(|(name, _)| RESERVED.contains(&name.as_str())) {
            return Err(ChatError::ReservedVariable { name: name.clone() });
        }
        let special = input.special_tokens.0.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str())));
        let kwargs = kwargs.map(|(name, value)| (name.as_str(), Value::from(Serde(value))));
        let further = run.kwargs.iter().map(|(name, value)| (*name, value.clone()));
        let context = std::iter::once(("documents", Value::from(()))).chain(special).chain(kwargs).chain(further);
        let context = context.chain([
            ("messages", Value::from(run.messages.to_vec())),
            ("tools", Value::from(Serde(input.tools))),
            ("add_generation_prompt", Value::from(input.add_generation_prompt)),
            (generation::SWITCH, Value::from(run.mark)),
        ]);
        let context = Value::from_pairs(context);
        // The engine panics where a loop is left or gone on with from inside a `with` of its own.
        let render = |env: &Environment| {
            let rendered = catch_unwind(AssertUnwindSafe(|| env.get_template(NAME)?.render(&context)));
            let failed = |_| minijinja::Error::new(ErrorKind::InvalidOperation, ENGINE_FAILED);
            rendered.unwrap_or_else(|panic| Err(failed(panic)))
        };
        match further_fuel(input) {
            further if further < SMALL => render(&self.env),
            further => {
                let mut env = self.env.clone();
                env.set_fuel(Some(FUEL + further));
                render(&env)
            }
        }
        .map_err(describe)
    }
}

/// What a conversation's size adds to [`FUEL`].
fn further_fuel(input: &ChatInput) -> u64 {
    let size = |value: &serde_json::Value| serde_json::to_string(value).map_or(0, |text| text.len());
    let further = |message: &Message| message.extra.values().map(size).sum::<usize>();
    let bytes: usize = input.messages.iter().map(|message| message.content.len() + further(message)).sum();
    let bytes = bytes + input.tools.map_or(0, size);
    let messages = input.messages.len() as u64;
    let pairs = messages.saturating_mul(messages).saturating_mul(FUEL_PER_PAIR_OF_MESSAGES);
    (bytes as f64 * FUEL_PER_BYTE_OF_TEXT) as u64 + pairs.min(MOST_BY_MESSAGES)
}

/// Messages for one rendering.
pub(crate) struct Run<'a> {
    pub messages: &'a [Value],
    /// Variables that override the input's.
    pub kwargs: &'a [(&'a str, Value)],
    /// Whether `generation` tags write their marks.
    pub mark: bool,
}

/// The engine's parser recurses along chains of operators and `elif`s, so the length of a template
/// bounds the stack it takes; about a kilobyte for each of 32,768 signs.
const COMPILE_STACK: usize = 128 << 20;
const MAX_TAG: usize = 32 << 10;
const MAX_TEMPLATE: usize = 256 << 10;

/// Compiles on its own thread, whose stack is large enough for any template in the bounds.
fn compile(source: String) -> Result<Environment<'static>, String> {
    let run = || {
        let mut env = environment();
        env.add_template_owned(NAME, source).map_err(|e| e.to_string())?;
        Ok(env)
    };
    std::thread::Builder::new()
        .stack_size(COMPILE_STACK)
        .spawn(run)
        .map_err(|e| format!("can't start a thread to compile it: {e}"))?
        .join()
        .map_err(|_| "the template engine failed on it".to_owned())?
}

/// What `raise_exception` was called with, found again in the error's chain of sources.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

fn describe(error: minijinja::Error) -> ChatError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(current) = source {
        if let Some(Refusal(message)) = current.downcast_ref() {
            return ChatError::TemplateRefused { message: message.clone() };
        }
        source = current.source();
    }
    match error.kind() {
        ErrorKind::OutOfFuel => ChatError::TemplateEndless,
        _ => ChatError::TemplateRender { problem: error.to_string() },
    }
}

/// The environment of transformers' `_cached_compile_jinja_template`.
fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    // Building fails on delimiters that clash; these are Jinja's own.
    if let Ok(syntax) = syntax.build() {
        env.set_syntax(syntax);
    }
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_debug(false);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(RECURSION_LIMIT);
    env.set_unknown_method_callback(python::method);
    env.set_formatter(|out, state, value| {
        match value.as_str() {
            Some(text) => out.write_str(text)?,
            None => out.write_str(&python::to_text(state, value)?)?,
        }
        Ok(())
    });
    filters::add(&mut env);
    env.add_test("iterable", python::is_iterable);
    env.add_test("sequence", python::is_sequence);
    env.add_filter("tojson", json::tojson);
    env.add_function("raise_exception", |message: String| -> Result<Value, _> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Refusal(message)))
    });
    env.add_function("strftime_now", |format: String| {
        let mut text = String::new();
        // chrono reports an unknown field through the formatter.
        write!(text, "{}", chrono::Local::now().format(&format)).map_err(|_| {
            minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: unknown field in {format:?}"))
        })?;
        Ok::<_, minijinja::Error>(text)
    });
    env
}
