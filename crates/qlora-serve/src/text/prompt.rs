//! Conversations and texts as prompts, in the way that an adapter learned.

use chat_text::{
    ChatError, ChatInput, ChatTemplate, Message, PromptLayout, Prompting, Tokenizer, alpaca_prompt, alpaca_turn,
};
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
    Ok(match (prompting.settings.layout, &prompting.template) {
        (PromptLayout::Plain | PromptLayout::Alpaca, _) => None,
        (PromptLayout::Chat, Some(template)) => Some(template),
        (PromptLayout::Chat, None) => Some(tokenizer.require_chat_template()?),
    })
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
        let text = match prompting.settings.layout {
            PromptLayout::Alpaca => alpaca(prompting, conversation.messages),
            _ => plain(conversation.messages),
        };
        return Ok(Prompt { tokens: tokenizer.encode(&text, true)?.ids, opens_reasoning: false });
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
    let text = template.render_input(&ChatInput {
        messages: &messages,
        tools: conversation.tools,
        add_generation_prompt: conversation.add_generation_prompt,
        special_tokens: tokenizer.special_tokens(),
        template_kwargs: Some(&kwargs),
    })?;
    let opens_reasoning = text.trim_end().ends_with(reasoning::OPEN);
    // The template writes what begins a text itself.
    Ok(Prompt { tokens: tokenizer.encode(&text, false)?.ids, opens_reasoning })
}

fn plain(messages: &[Message]) -> String {
    let contents: Vec<&str> = messages.iter().map(|message| message.content.as_str()).collect();
    contents.join("\n\n")
}

fn alpaca(prompting: &Prompting, messages: &[Message]) -> String {
    let is_system = |message: &&Message| message.role == "system" || message.role == "developer";
    let system = messages.iter().find(is_system).map(|message| message.content.as_str());
    let system = system.or(prompting.settings.system_prompt.as_deref());
    let mut text = String::new();
    for message in messages.iter().filter(|message| !is_system(message)) {
        match message.role.as_str() {
            "assistant" => text += &message.content,
            _ if text.is_empty() => text = alpaca_prompt(&message.content, "", system),
            _ => text += &format!("\n\n{}", alpaca_turn(&message.content, "")),
        }
    }
    text
}
