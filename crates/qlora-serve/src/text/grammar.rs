//! Answers that must be JSON of a schema, or calls of tools: constraints of `llguidance` on a tokenizer's vocabulary.
//!
//! A schema that `llguidance` can't enforce in full is refused when the grammar is made, one that allows no first token within
//! its bounds as well. White space between JSON's tokens is a space, or a new line and what it is indented by, so that a model
//! can't go on with it until its tokens are used up.

use std::fmt;

use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value as Json, json};

use super::schema;
use super::tools::ToolFormat;
use super::vocabulary::Vocabulary;
use crate::request::Constraint;

/// White space between two tokens of JSON: indented by 4, 5 objects deep.
const WHITESPACE: &str = r"\x20|\x0A(\x20{0,20}|\x09{0,5})";

/// States of a schema's lexer at most, at 1 to 2 KB each: an answer's constraint holds no more than 100 MB.
const MOST_LEXER_STATES: usize = 50_000;

/// Tokens that a grammar is tried with when it is made.
const FIRST_TOKENS: usize = 3;

/// Makes constraints for one tokenizer.
pub struct Grammars {
    factory: ParserFactory,
    vocab_size: usize,
    eos: Vec<u32>,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").field("vocab_size", &self.vocab_size).field("eos", &self.eos).finish_non_exhaustive()
    }
}

/// A tool as far as a grammar needs it.
#[derive(Clone, Debug, PartialEq)]
pub struct ToolSchema {
    /// The function.
    pub name: String,
    /// The schema of its arguments.
    pub parameters: Json,
}

impl Grammars {
    /// For a model whose embedding has ids below `vocab_size`, and that ends answers with one of `eos`.
    ///
    /// # Errors
    /// The vocabulary is one that `llguidance` can't use.
    pub fn new(vocabulary: &Vocabulary, vocab_size: usize, eos: &[u32]) -> Result<Self, String> {
        let (env, eos) = vocabulary.token_env(vocab_size, eos);
        let mut factory = ParserFactory::new_simple(&env).map_err(|error| error.to_string())?;
        factory.quiet();
        // What a parser holds of prompt and grammar is not for those who ask.
        factory.limits_mut().verbose_errors = false;
        factory.limits_mut().max_lexer_states = MOST_LEXER_STATES;
        Ok(Self { factory, vocab_size, eos })
    }

    /// JSON of a schema.
    ///
    /// # Errors
    /// The schema is none, or has something that can't be enforced; the text says what.
    pub fn json(&self, schema: &Json) -> Result<Grammar, String> {
        self.grammar(TopLevelGrammar::from_json_schema(with_options(schema)?))
    }

    /// Calls of these tools, written in a format; one, or one and more.
    ///
    /// # Errors
    /// As [`json`](Self::json); the text names the tool.
    pub fn calls(
        &self,
        format: ToolFormat,
        vocabulary: &Vocabulary,
        token_id: impl Fn(&str) -> Option<u32>,
        tools: &[ToolSchema],
        several: bool,
    ) -> Result<Grammar, String> {
        // A special token is no text: it goes by its id.
        let tag = |tag: &str| match token_id(tag).filter(|id| vocabulary.is_special(*id)) {
            Some(id) => format!("<[{id}]>"),
            None => literal(tag),
        };
        let around = format.around();
        let [tag_each, tag_all] = around.before.map(|name| name.map_or(String::new(), tag));
        let (list_open, list_close) = if tag_all.is_empty() { ("", "") } else { ("\"[\"", "\"]\"") };
        let rest = if several { format!("({} call)*", literal(around.between)) } else { String::new() };
        let names: Vec<String> = (0..tools.len()).map(|index| format!("call_{index}")).collect();
        let mut lark = format!("start: {tag_all} {list_open} call {rest} {list_close}\ncall: {}\n", names.join(" | "));
        for (index, tool) in tools.iter().enumerate() {
            // By itself first, so that an error is about this tool.
            let schema = with_options(&tool.parameters).map_err(|error| format!("{}: {error}", tool.name))?;
            let alone = self.grammar(TopLevelGrammar::from_json_schema(schema.clone()));
            alone.map_err(|error| format!("{}: {error}", tool.name))?;
            let name = Json::from(tool.name.as_str()).to_string();
            let opening = literal(&format!("{}{name}{}", around.opening, around.arguments));
            let [behind, tag_behind] = around.behind;
            let tag_behind = if tag_behind.is_empty() { String::new() } else { tag(tag_behind) };
            lark += &format!("call_{index}: {tag_each} {opening} args_{index} {} {tag_behind}\n", literal(behind));
            lark += &format!("args_{index}: %json {schema}\n");
        }
        self.grammar(TopLevelGrammar::from_lark(lark))
    }

    fn grammar(&self, grammar: TopLevelGrammar) -> Result<Grammar, String> {
        schema::on_large_stack(|| {
            let matcher = Matcher::new(self.factory.create_parser(grammar));
            if let Some(error) = matcher.get_error() {
                return Err(error);
            }
            let (vocab_size, eos) = (self.vocab_size, self.eos.clone());
            let mut grammar = Grammar { matcher, vocab_size, stop_ids: eos.clone(), eos };
            // What takes too much mostly shows at the first tokens.
            grammar.clone().begin().map_err(|error| format!("an answer can't begin: {error}"))?;
            // The clone has a lexer of its own; this fills the one that answers start with.
            grammar.allowed()?;
            Ok(grammar)
        })
    }
}

/// A schema within the bounds, and how it is to be compiled.
fn with_options(schema: &Json) -> Result<Json, String> {
    match schema {
        Json::Object(fields) if !fields.contains_key("x-guidance") => {
            schema::check(schema)?;
            let mut fields = fields.clone();
            fields.insert("x-guidance".into(), json!({ "whitespace_pattern": WHITESPACE }));
            Ok(Json::Object(fields))
        }
        Json::Object(_) => Err("`x-guidance` is not part of JSON schema".into()),
        _ => Err("a JSON schema must be an object".into()),
    }
}

/// A text in a grammar.
fn literal(text: &str) -> String {
    Json::from(text).to_string()
}

/// What an answer must look like. Clones are independent of each other.
pub struct Grammar {
    matcher: Matcher,
    vocab_size: usize,
    /// What the matcher knows as ends.
    eos: Vec<u32>,
    /// What ends an answer.
    stop_ids: Vec<u32>,
}

impl Grammar {
    /// With these tokens as ends, in place of those that the tokenizer has.
    #[must_use]
    pub fn ending_with(self, stop_ids: Vec<u32>) -> Self {
        Self { stop_ids, ..self }
    }
}

impl Grammar {
    /// Takes the first of the tokens that may come, a few times.
    fn begin(mut self) -> Result<(), String> {
        for _ in 0..FIRST_TOKENS {
            let mask = self.matcher.compute_mask_or_eos().map_err(|error| error.to_string())?;
            let token = mask.first_bit_set().ok_or("no token may come")?;
            let token = u32::try_from(token).map_err(|error| error.to_string())?;
            if self.eos.contains(&token) {
                break;
            }
            self.matcher.consume_token(token).map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

impl Clone for Grammar {
    fn clone(&self) -> Self {
        let Self { matcher, vocab_size, eos, stop_ids } = self;
        // A plain clone would share the lexer, and wait for the others.
        Self { matcher: matcher.deep_clone(), vocab_size: *vocab_size, eos: eos.clone(), stop_ids: stop_ids.clone() }
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar").field("stopped", &self.matcher.is_stopped()).finish_non_exhaustive()
    }
}

impl Constraint for Grammar {
    fn allowed(&mut self) -> Result<Option<Vec<u32>>, String> {
        let mask = self.matcher.compute_mask_or_eos();
        let mask = mask.map_err(|error| {
            format!("the schema of the answer takes more than the server allows, or is none: {error}; make it smaller")
        })?;
        let mut bits = mask.as_slice().to_vec();
        let may_end = self.eos.iter().any(|&id| mask.is_allowed(id));
        bits.resize(self.vocab_size.div_ceil(32), 0);
        for &id in self.eos.iter().chain(&self.stop_ids) {
            if let Some(word) = bits.get_mut(id as usize / 32) {
                *word &= !(1 << (id % 32));
            }
        }
        for &id in self.stop_ids.iter().filter(|_| may_end) {
            if let Some(word) = bits.get_mut(id as usize / 32) {
                *word |= 1 << (id % 32);
            }
        }
        if let (Some(last), used @ 1..) = (bits.last_mut(), self.vocab_size % 32) {
            *last &= (1 << used) - 1;
        }
        Ok(Some(bits))
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        if self.stop_ids.contains(&token) {
            return Ok(());
        }
        self.matcher.consume_token(token).map_err(|error| error.to_string())
    }

    fn is_complete(&self) -> bool {
        self.matcher.is_stopped()
    }
}

/// A constraint that begins behind a reasoning.
#[derive(Debug)]
pub struct AfterReasoning<C> {
    inner: C,
    /// The token that ends the reasoning; `None` behind it.
    close: Option<u32>,
}

impl<C> AfterReasoning<C> {
    /// `close` is the token that ends the reasoning.
    pub fn new(inner: C, close: u32) -> Self {
        Self { inner, close: Some(close) }
    }
}

impl<C: Constraint> Constraint for AfterReasoning<C> {
    fn allowed(&mut self) -> Result<Option<Vec<u32>>, String> {
        if self.close.is_some() { Ok(None) } else { self.inner.allowed() }
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        match self.close {
            Some(close) if token == close => self.close = None,
            Some(_) => {}
            None => return self.inner.accept(token),
        }
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.close.is_none() && self.inner.is_complete()
    }
}
