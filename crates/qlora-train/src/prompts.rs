//! What of a run's text is saved with its adapter, so that whatever prompts the adapter later does it as its rows were written: the
//! files of [`chat_text::Prompting`], and the base tokenizer's settings.

use std::path::{Path, PathBuf};

use adapter_io::{FormatError, atomic};
use chat_text::{
    CHAT_TEMPLATE_FILE, ChatTemplate, PROMPT_SETTINGS_FILE, PromptLayout, PromptSettings, Prompting, Tokenizer,
};
use qlora_data::{DataConfig, Format, LossOn};

use crate::error::TrainError;

/// Files of the tokenizer that come along.
const TOKENIZER_FILES: [&str; 2] = ["tokenizer_config.json", "special_tokens_map.json"];

/// Every file that [`Prompts::save`] writes.
pub(crate) const FILES: [&str; 4] = [CHAT_TEMPLATE_FILE, PROMPT_SETTINGS_FILE, TOKENIZER_FILES[0], TOKENIZER_FILES[1]];

/// How a run writes its rows as text.
#[derive(Clone, Debug, Default)]
pub(crate) struct Prompts {
    settings: PromptSettings,
    template: Option<String>,
    /// The tokenizer's folder.
    tokenizer: PathBuf,
}

impl Prompts {
    /// How rows of `format` are written under a configuration; `template` is the one that writes conversations.
    pub(crate) fn new(
        config: &DataConfig,
        format: Format,
        template: Option<&ChatTemplate>,
        tokenizer: &Tokenizer,
    ) -> Self {
        let layout = match format {
            Format::Auto | Format::Chat => PromptLayout::Chat,
            Format::Alpaca => PromptLayout::Alpaca,
            Format::PromptCompletion | Format::Text => PromptLayout::Plain,
        };
        Self {
            settings: PromptSettings {
                layout,
                system_prompt: config.system_prompt.clone(),
                template_kwargs: config.template_kwargs.clone(),
                end_token: config.end_token.clone(),
                cut_at_answers: config.loss_on == LossOn::Assistant,
            },
            template: template.filter(|_| layout == PromptLayout::Chat).map(|template| template.source().to_owned()),
            tokenizer: tokenizer.dir().to_owned(),
        }
    }

    /// The template's text, where rows are written with one.
    pub(crate) fn template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// How a prompt is written as the rows are.
    ///
    /// # Errors
    /// The chat template can't be used.
    pub(crate) fn prompting(&self) -> Result<Prompting, TrainError> {
        let template = self.template.clone().map(ChatTemplate::new).transpose()?;
        Ok(Prompting { settings: self.settings.clone(), template })
    }

    /// Writes the files into an adapter's folder.
    ///
    /// # Errors
    /// A file can't be read or written.
    pub(crate) fn save(&self, dir: &Path) -> Result<(), TrainError> {
        if let Some(template) = &self.template {
            atomic::write_bytes(&dir.join(CHAT_TEMPLATE_FILE), template.as_bytes())?;
        }
        for name in TOKENIZER_FILES {
            let path = self.tokenizer.join(name);
            match std::fs::read(&path) {
                Ok(bytes) => atomic::write_bytes(&dir.join(name), &bytes)?,
                Err(source) if source.kind() == std::io::ErrorKind::NotFound => {}
                Err(source) => return Err(FormatError::Read { path, source }.into()),
            }
        }
        let path = dir.join(PROMPT_SETTINGS_FILE);
        let json = serde_json::to_vec_pretty(&self.settings)
            .map_err(|e| TrainError::Report { path: path.clone(), problem: e.to_string() })?;
        Ok(atomic::write_bytes(&path, &json)?)
    }
}
