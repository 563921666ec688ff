//! How a run wrote its rows as text, kept beside the adapter: whatever prompts the adapter later does it in the same way.
//!
//! | file | content |
//! |---|---|
//! | `chat_template.jinja` | the chat template that conversations were written with |
//! | `tokenizer_config.json`, `special_tokens_map.json` | the base tokenizer's settings |
//! | `prompt_settings.json` | layout of the rows, system prompt, template variables, end token |

use std::path::{Path, PathBuf};

use adapter_io::{FormatError, atomic};
use chat_text::{ChatTemplate, Tokenizer};
use qlora_data::{DataConfig, Format};
use serde::{Deserialize, Serialize};

use crate::error::TrainError;

/// The template's file, as transformers names it.
pub const TEMPLATE_FILE: &str = "chat_template.jinja";
/// The settings' file.
pub const SETTINGS_FILE: &str = "prompt_settings.json";
/// Files of the tokenizer that come along.
pub const TOKENIZER_FILES: [&str; 2] = ["tokenizer_config.json", "special_tokens_map.json"];

/// What `[data]` said about the text of a row.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PromptSettings {
    /// Layout of the rows: a chat template is only of use for conversations.
    pub format: Format,
    /// `data.system_prompt`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_prompt: Option<String>,
    /// `data.template_kwargs`.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub template_kwargs: serde_json::Map<String, serde_json::Value>,
    /// `data.end_token`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_token: Option<String>,
}

/// What of a run's text is saved with its adapter.
#[derive(Clone, Debug, Default)]
pub struct Prompts {
    settings: PromptSettings,
    template: Option<String>,
    /// The tokenizer's folder.
    tokenizer: PathBuf,
}

impl Prompts {
    /// How rows of `format` are written under a configuration.
    pub fn new(config: &DataConfig, format: Format, template: Option<&ChatTemplate>, tokenizer: &Tokenizer) -> Self {
        Self {
            settings: PromptSettings {
                format,
                system_prompt: config.system_prompt.clone(),
                template_kwargs: config.template_kwargs.clone(),
                end_token: config.end_token.clone(),
            },
            template: template.filter(|_| format == Format::Chat).map(|template| template.source().to_owned()),
            tokenizer: tokenizer.dir().to_owned(),
        }
    }

    /// The template's text, where rows are written with one.
    pub fn template(&self) -> Option<&str> {
        self.template.as_deref()
    }

    /// The settings.
    pub fn settings(&self) -> &PromptSettings {
        &self.settings
    }

    /// Writes the files into an adapter's folder.
    ///
    /// # Errors
    /// A file can't be read or written.
    pub fn save(&self, dir: &Path) -> Result<(), TrainError> {
        if let Some(template) = &self.template {
            atomic::write_bytes(&dir.join(TEMPLATE_FILE), template.as_bytes())?;
        }
        for name in TOKENIZER_FILES {
            let path = self.tokenizer.join(name);
            match std::fs::read(&path) {
                Ok(bytes) => atomic::write_bytes(&dir.join(name), &bytes)?,
                Err(source) if source.kind() == std::io::ErrorKind::NotFound => {}
                Err(source) => return Err(FormatError::Read { path, source }.into()),
            }
        }
        let path = dir.join(SETTINGS_FILE);
        let json = serde_json::to_vec_pretty(&self.settings)
            .map_err(|e| TrainError::Report { path: path.clone(), problem: e.to_string() })?;
        Ok(atomic::write_bytes(&path, &json)?)
    }
}

impl PromptSettings {
    /// The settings in an adapter's folder; `None` where it has none, as one that was made elsewhere.
    ///
    /// # Errors
    /// The file is there and can't be read.
    pub fn of_adapter(dir: &Path) -> Result<Option<Self>, TrainError> {
        let path = dir.join(SETTINGS_FILE);
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|e| TrainError::Checkpoint { path, problem: format!("is damaged: {e}") }),
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(FormatError::Read { path, source }.into()),
        }
    }
}
