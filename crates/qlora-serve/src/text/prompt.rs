//! Conversations and texts as prompts, in the way that an adapter learned.

use chat_text::{ChatError, ChatInput, ChatTemplate, Message, PromptLayout, Prompting, Tokenizer};
use serde_json::{Map, Value as Json};

use super::reasoning;

/// A conversation to be answered.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// The turns.
    pub messages: &'a [Message],
    /// Descriptions of tools.
    pub tools: Option<&'a Json>,
    /// Variables of the template, before those of the prompting's settings.
    pub template_kwargs: Option<&'a Map<String, Json>>,
    /// Whether the prompt ends with the header of an assistant's turn.
    pub add_generation_prompt: bool,
}

/// A prompt as tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Whether it ends with the tag that begins a reasoning.
    pub opens_reasoning: bool,
}

/// The template that writes conversations; `None` where they are not written by one.
///
/// # Errors
/// There is none, or it does not compile.
pub fn template<'a>(prompting: &'a Prompting, tokenizer: &'a Tokenizer) -> Result<Option<&'a ChatTemplate>, ChatError> {
    match prompting.settings.layout {
        PromptLayout::Plain | PromptLayout::Alpaca => Ok(None),
        PromptLayout::Chat => prompting.template(tokenizer).map(Some),
    }
}

/// Writes a conversation.
///
/// Where rows were no conversations, an Alpaca layout takes what the user says as instructions, with the system
/// message in place of the introduction; a plain layout takes the contents, with a blank line between them.
///
/// # Errors
/// There is no template, it refuses the conversation, or the text can't be encoded.
pub fn write(prompting: &Prompting, tokenizer: &Tokenizer, conversation: &Conversation) -> Result<Prompt, ChatError> {
    let Some(template) = template(prompting, tokenizer)? else {
        let tokens = match prompting.settings.layout {
            PromptLayout::Alpaca => prompting.instructions(tokenizer, conversation.messages)?.ids,
            _ => tokenizer.encode(&plain(conversation.messages), true)?.ids,
        };
        return Ok(Prompt { tokens, opens_reasoning: false });
    };
    let mut messages = conversation.messages.to_vec();
    for message in &mut messages {
        // OpenAI's newer name, which few templates know.
        if message.role == "developer" && !template.source().contains("developer") {
            message.role = "system".into();
        }
        message.extra.retain(|_, value| !value.is_null());
    }
    let has_system = messages.iter().any(|message| message.role == "system" || message.role == "developer");
    if let Some(system) = prompting.settings.system_prompt.as_deref().filter(|_| !has_system) {
        messages.insert(0, Message::system(system));
    }
    let mut kwargs = prompting.settings.template_kwargs.clone();
    kwargs.extend(conversation.template_kwargs.into_iter().flatten().map(|(key, value)| (key.clone(), value.clone())));
    let input = ChatInput {
        messages: &messages,
        tools: conversation.tools,
        add_generation_prompt: conversation.add_generation_prompt,
        special_tokens: tokenizer.special_tokens(),
        template_kwargs: Some(&kwargs),
    };
    let chat_text::Prompt { text, ids } = prompting.conversation(tokenizer, &input)?;
    Ok(Prompt { tokens: ids, opens_reasoning: text.trim_end().ends_with(reasoning::OPEN) })
}

fn plain(messages: &[Message]) -> String {
    let contents: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
    contents.join("\n\n")
}
