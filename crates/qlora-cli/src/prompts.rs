//! How prompts are written, as far as flags say it; the rest lies beside an adapter.

use std::path::Path;

use anyhow::Result;
use burn_qlora::ChatTemplate;
use burn_qlora::chat_text::{PromptLayout, Prompting};

use crate::adapters::NamedAdapter;
use crate::args::WritingArgs;
use crate::exit::UsageError;

/// Puts the template and its variables into a way of prompting.
pub fn apply(flags: &WritingArgs, prompting: &mut Prompting) -> Result<()> {
    if let Some(setting) = &flags.chat_template {
        prompting.template = Some(ChatTemplate::from_setting(setting)?);
        prompting.settings.layout = PromptLayout::Chat;
    }
    for text in &flags.template_kwarg {
        let (name, value) = text.split_once('=').ok_or_else(|| {
            UsageError(format!("--template-kwarg {text}: write NAME=VALUE, e.g. enable_thinking=true"))
        })?;
        let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
        prompting.settings.template_kwargs.insert(name.to_string(), value);
    }
    Ok(())
}

/// Says so when a flag would change nothing where prompts are written like this.
pub fn out_of_place(flags: &WritingArgs, layout: PromptLayout) -> Option<UsageError> {
    let flag = match layout {
        PromptLayout::Chat => None,
        _ if !flags.template_kwarg.is_empty() => Some("--template-kwarg"),
        PromptLayout::Plain if flags.system.is_some() => Some("--system"),
        _ => None,
    }?;
    let text = format!("{flag} has no place where the prompt is no conversation; --chat-template makes it one");
    Some(UsageError(text))
}

/// What the base is called among adapters.
pub const BASE: &str = "base";

/// The base or an adapter, and how it is prompted.
pub struct Voice {
    /// What it is called.
    pub name: String,
    /// The adapter's name in the engine; `None` is the base.
    pub adapter: Option<String>,
    /// As the flags say, else as its rows were written.
    pub prompting: Prompting,
}

/// The base, and the adapters behind it. A flag must have a place with one of them.
pub fn voices(flags: &WritingArgs, adapters: &[NamedAdapter], model: &Path) -> Result<Vec<Voice>> {
    let voice = |name: &str, adapter: Option<&str>, dir: &Path| {
        let mut prompting = Prompting::of_adapter(dir)?.unwrap_or_default();
        apply(flags, &mut prompting)?;
        anyhow::Ok(Voice { name: name.to_string(), adapter: adapter.map(str::to_string), prompting })
    };
    let others = adapters.iter().map(|NamedAdapter { name, dir }| voice(name, Some(name), dir));
    let voices = std::iter::once(voice(BASE, None, model)).chain(others).collect::<Result<Vec<_>>>()?;
    let asked = if adapters.is_empty() { &voices[..] } else { &voices[1..] };
    let mut refused: Vec<_> =
        asked.iter().filter_map(|voice| out_of_place(flags, voice.prompting.settings.layout)).collect();
    match refused.pop() {
        Some(error) if refused.len() + 1 == asked.len() => Err(error.into()),
        _ => Ok(voices),
    }
}
