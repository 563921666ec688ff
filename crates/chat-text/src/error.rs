//! Errors of this crate. Each names the file, field or message at fault and what to do.

use std::path::PathBuf;

use crate::answers::UnwrittenPart;

/// Why the text of an assistant's message can't be told from that of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Untraceable {
    /// The text changes with marks in it.
    #[error("the chat template does something with the texts of messages, or they hold code points U+FDD0 to U+FDEF")]
    Changed,
    /// Nothing says where the turn begins.
    #[error("the chat template writes what stands before it differently once more turns follow")]
    NoStart,
    /// Nothing says where the turn ends.
    #[error("the chat template writes what stands behind it differently once more turns follow")]
    NoEnd,
    /// Part of the message stands outside of its turn.
    #[error("the chat template writes part of it outside of its turn")]
    Outside,
    /// Something that somebody else says stands in the middle of it.
    #[error("the chat template writes a tool's result or another message in the middle of it")]
    Interrupted,
}

/// What can go wrong while a tokenizer or a chat template is read or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// A file can't be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not valid JSON.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A field of a JSON file has a value that can't be used.
    #[error("{}: `{field}` {problem}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// What is wrong with it and what is expected.
        problem: String,
    },
    /// A folder has no `tokenizer.json`.
    #[error("{}: no tokenizer.json{hint}", dir.display())]
    NoTokenizer {
        /// The folder.
        dir: PathBuf,
        /// What else is there and what to do, beginning with its own separator.
        hint: &'static str,
    },
    /// `tokenizer.json` can't be loaded, or a text can't be encoded or decoded with it.
    #[error("{}: {problem}", path.display())]
    Tokenizer {
        /// The tokenizer file.
        path: PathBuf,
        /// What the tokenizer library said.
        problem: String,
    },
    /// A conversation has to be written and there is no template for it.
    #[error(
        "{}: the tokenizer has no chat template; give `chat_template` in the `[data]` section, \
         or use rows with `prompt` and `completion`",
        dir.display()
    )]
    NoChatTemplate {
        /// The tokenizer's folder.
        dir: PathBuf,
    },
    /// A chat template doesn't compile.
    #[error("chat template: {problem}")]
    TemplateSyntax {
        /// What the template engine said, with the line.
        problem: String,
    },
    /// A chat template failed on a conversation.
    #[error("chat template: {problem}")]
    TemplateRender {
        /// What the template engine said, with the line.
        problem: String,
    },
    /// A chat template refused a conversation with `raise_exception`.
    #[error("the chat template refuses this conversation: {message}")]
    TemplateRefused {
        /// The template's message.
        message: String,
    },
    /// What an assistant's message became can't be found in the rendered text.
    #[error(
        "it can't be told which tokens message {message} became: {reason}; give a `chat_template` with \
         {{% generation %}} tags around what the assistant writes, set `loss_on = \"all\"`, or keep one assistant \
         turn, the last, in each row"
    )]
    Untraceable {
        /// The message's number in the conversation, from 1.
        message: usize,
        /// Why.
        reason: Untraceable,
    },
    /// A chat template leaves out what an assistant's message is to teach.
    #[error(
        "the chat template does not write the {part} of message {message}: give another `chat_template`, or rows \
         without it"
    )]
    NotWritten {
        /// The message's number in the conversation, from 1.
        message: usize,
        /// What is missing in the text.
        part: UnwrittenPart,
    },
    /// A chat template used up what one rendering may cost. It will do so on every row that is like this one.
    #[error("chat template: it takes too long or writes too much: does it end?")]
    TemplateEndless,
    /// A setting that should be a chat template is neither its text nor a file.
    #[error(
        "{setting:?} is no chat template: names are not known; give the path of a .jinja file or the \
         template's text"
    )]
    NotATemplate {
        /// What was given, shortened.
        setting: String,
    },
    /// A further variable for the template has a name that is taken.
    #[error("template_kwargs: `{name}` is given to the template already; it can't be set")]
    ReservedVariable {
        /// The name.
        name: String,
    },
}
