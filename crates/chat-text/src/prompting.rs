//! How an adapter is prompted: as the rows that it learned from were written.
//!
//! What rows were written with lies beside an adapter:
//!
//! | file | content |
//! |---|---|
//! | `prompt_settings.json` | [`PromptSettings`] |
//! | `chat_template.jinja` | the chat template, where rows were conversations |
//!
//! Generation, serving, merging and conversion take both from there, and fall back to the base model's template for adapters that were
//! made elsewhere.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::ChatError;
use crate::message::Message;
use crate::template::{ChatInput, ChatTemplate};
use crate::tokenizer::Tokenizer;

/// The settings' file.
pub const PROMPT_SETTINGS_FILE: &str = "prompt_settings.json";
/// The template's file, as transformers names it.
pub const CHAT_TEMPLATE_FILE: &str = "chat_template.jinja";

/// What introduces an instruction in the Alpaca data set, without and with an input.
const ALPACA: &str = "Below is an instruction that describes a task. \
    Write a response that appropriately completes the request.";
const ALPACA_WITH_INPUT: &str = "Below is an instruction that describes a task, paired with an \
    input that provides further context. Write a response that appropriately completes the request.";

/// How a prompt is written as text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptLayout {
    /// As a conversation, by the chat template.
    #[default]
    Chat,
    /// As it is.
    Plain,
    /// As an instruction of the Alpaca data set.
    Alpaca,
}

/// How rows were written as text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PromptSettings {
    /// How a prompt is written.
    pub layout: PromptLayout,
    /// The system message of conversations that have none; for Alpaca, the sentence before the instruction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_prompt: Option<String>,
    /// Further variables of the template.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub template_kwargs: serde_json::Map<String, serde_json::Value>,
    /// The text of the token that ends an answer, where the template writes none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_token: Option<String>,
    /// Whether rows were cut where answers begin and end, so that no token reaches over: where only answers were
    /// learned. Prompts are then cut at the answers that they hold. Otherwise, and for what was trained elsewhere, a
    /// prompt is tokenized as one text.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub cut_at_answers: bool,
}

/// A prompt, ready to be answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// As a text.
    pub text: String,
    /// As tokens.
    pub ids: Vec<u32>,
}

/// Turns prompts into tokens in one way.
#[derive(Clone, Debug, Default)]
pub struct Prompting {
    /// The way.
    pub settings: PromptSettings,
    /// The template in place of the tokenizer's own.
    pub template: Option<ChatTemplate>,
}

impl Prompting {
    /// The way that lies beside an adapter; `None` where nothing does.
    ///
    /// # Errors
    /// A file is there and can't be read, or holds something else.
    pub fn of_adapter(dir: &Path) -> Result<Option<Self>, ChatError> {
        let template = match read(&dir.join(CHAT_TEMPLATE_FILE))? {
            Some(text) => Some(ChatTemplate::new(text)?),
            None => None,
        };
        let path = dir.join(PROMPT_SETTINGS_FILE);
        let settings = match read(&path)? {
            Some(text) => Some(serde_json::from_str(&text).map_err(|source| ChatError::Json { path, source })?),
            None => None,
        };
        Ok(match (settings, template) {
            (None, None) => None,
            (settings, template) => Some(Self { settings: settings.unwrap_or_default(), template }),
        })
    }

    /// The tokens of a prompt, ready to be answered. `system` takes the place of the settings' system prompt.
    ///
    /// # Errors
    /// There is no template, the template refuses the conversation, or the text can't be encoded.
    pub fn prompt(&self, tokenizer: &Tokenizer, system: Option<&str>, prompt: &str) -> Result<Vec<u32>, ChatError> {
        let system = system.or(self.settings.system_prompt.as_deref());
        let messages: Vec<Message> = system.into_iter().map(Message::system).chain([Message::user(prompt)]).collect();
        match self.settings.layout {
            PromptLayout::Plain => Ok(tokenizer.encode(prompt, true)?.ids),
            PromptLayout::Alpaca => Ok(self.instructions(tokenizer, &messages)?.ids),
            PromptLayout::Chat => {
                let input = ChatInput {
                    messages: &messages,
                    tools: None,
                    add_generation_prompt: true,
                    special_tokens: tokenizer.special_tokens(),
                    template_kwargs: Some(&self.settings.template_kwargs),
                };
                Ok(self.conversation(tokenizer, &input)?.ids)
            }
        }
    }

    /// The template that writes conversations: the adapter's, or the tokenizer's.
    ///
    /// # Errors
    /// There is none, or it does not compile.
    pub fn template<'a>(&'a self, tokenizer: &'a Tokenizer) -> Result<&'a ChatTemplate, ChatError> {
        self.template.as_ref().map_or_else(|| tokenizer.require_chat_template(), Ok)
    }

    /// A conversation by the template, cut at the answers in it as its rows were. Where the template writes them so
    /// that they can't be found, which no row may be, it is one text.
    ///
    /// # Errors
    /// There is no template, the template refuses the conversation, or the text can't be encoded.
    pub fn conversation(&self, tokenizer: &Tokenizer, input: &ChatInput) -> Result<Prompt, ChatError> {
        let template = self.template(tokenizer)?;
        let (text, answers) = match self.settings.cut_at_answers {
            true => template.render_prompt(input)?,
            false => (template.render_input(input)?, Vec::new()),
        };
        // The template writes what begins a text itself.
        let ids = tokenizer.encode_labelled(&text, &answers, false)?.ids;
        Ok(Prompt { text, ids })
    }

    /// A conversation as instructions of the Alpaca data set, the introduction replaced by a system message. An answer
    /// that something follows is ended, as those of a row's `history` are.
    ///
    /// # Errors
    /// The text can't be encoded.
    pub fn instructions(&self, tokenizer: &Tokenizer, messages: &[Message]) -> Result<Prompt, ChatError> {
        let is_system = |message: &&Message| message.role == "system" || message.role == "developer";
        let system = messages.iter().find(is_system).map(|message| message.content.as_str());
        let system = system.or(self.settings.system_prompt.as_deref());
        let end = self.stop_ids(tokenizer).first().and_then(|id| tokenizer.id_to_token(*id)).unwrap_or_default();
        let (mut text, mut answers) = (String::new(), Vec::new());
        let mut said = messages.iter().filter(|message| !is_system(message)).peekable();
        while let Some(Message { role, content, .. }) = said.next() {
            match role.as_str() {
                "assistant" => {
                    let start = text.len();
                    text.push_str(content);
                    if said.peek().is_some() {
                        text.push_str(&end);
                    }
                    if self.settings.cut_at_answers && !content.trim().is_empty() {
                        answers.push(start..text.len());
                    }
                }
                _ if text.is_empty() => text = alpaca_prompt(content, "", system),
                _ => text += &format!("\n\n{}", alpaca_turn(content, "")),
            }
        }
        let ids = tokenizer.encode_labelled(&text, &answers, true)?.ids;
        Ok(Prompt { text, ids })
    }

    /// The tokens that end an answer: the settings', and the tokenizer's.
    pub fn stop_ids(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let own = self.settings.end_token.as_deref().and_then(|token| tokenizer.token_to_id(token));
        let others = tokenizer.eos_token_ids().iter().copied().filter(|id| Some(*id) != own);
        own.into_iter().chain(others).collect()
    }
}

/// An instruction as the Stanford Alpaca data set writes it (tatsu-lab/stanford_alpaca, `train.py`), up to where the answer begins.
/// `system` takes the place of the sentence before it.
pub fn alpaca_prompt(instruction: &str, input: &str, system: Option<&str>) -> String {
    let introduction = system.unwrap_or(if input.is_empty() { ALPACA } else { ALPACA_WITH_INPUT });
    format!("{introduction}\n\n{}", alpaca_turn(instruction, input))
}

/// [`alpaca_prompt`] without the sentence before it, as in a later turn.
pub fn alpaca_turn(instruction: &str, input: &str) -> String {
    let input = if input.is_empty() { String::new() } else { format!("### Input:\n{input}\n\n") };
    format!("### Instruction:\n{instruction}\n\n{input}### Response:\n")
}

fn read(path: &Path) -> Result<Option<String>, ChatError> {
    match crate::files::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ChatError::Read { path: path.to_owned(), source }),
    }
}
