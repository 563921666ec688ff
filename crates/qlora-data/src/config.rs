//! `[data]` of a training configuration: which rows to learn from and how to read them.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value as Json};

use crate::cache::RowCache;
use crate::error::DataError;
use crate::mapping::Columns;
use crate::packing::Packing;
use crate::sources::Sources;
use crate::split::Split;

/// `[data]`: the rows to learn from.
///
/// Rows come from files, folders, globs and data sets of the hub, one or several ([`Sources`]). Files are JSON lines, one JSON array, tables of text (`.csv`, `.tsv`; the first line names the columns), each of them plain or packed by gzip or
/// Zstandard, or Parquet. What a file is follows from its first bytes, and of tables of text from its name. See [`Format`] for the layouts of rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataConfig {
    /// The training rows.
    pub train: Sources,
    /// The evaluation rows; overrides `eval_fraction`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval: Option<Sources>,
    /// Part of the training rows that is held out for evaluation, from 0 (none) to below 1.
    pub eval_fraction: f64,
    /// Layout of the rows: `auto`, `chat`, `prompt_completion`, `alpaca` or `text`.
    pub format: Format,
    /// What columns of the files are called, by the keys of the layout that they are read as.
    #[serde(skip_serializing_if = "Columns::is_empty")]
    pub columns: Columns,
    /// The configuration of a data set of several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subset: Option<String>,
    /// The split of the training rows, or a part of one, such as `train[:5%]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// Longer rows are cut to this many tokens, which is counted and reported.
    pub max_length: usize,
    /// Which tokens the loss counts: `assistant` (answers only) or `all`.
    pub loss_on: LossOn,
    /// Whether every epoch visits the rows in another random order.
    pub shuffle: bool,
    /// Whether rows of similar length share a batch: less padding, a less random order.
    pub group_by_length: bool,
    /// Put before conversations that have no system message; for `alpaca` rows it replaces the
    /// sentence that introduces the instruction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub system_prompt: Option<String>,
    /// A Jinja chat template to use instead of the tokenizer's: the template, or the path of a
    /// file that ends in `.jinja` or `.j2`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// Further variables for the chat template, such as `enable_thinking = true`. Those of a row's
    /// `chat_template_kwargs` go before them. A date without quotes is given as its text.
    #[serde(deserialize_with = "template_kwargs")]
    pub template_kwargs: Map<String, Json>,
    /// Text of a token that ends a row where the chat template writes none after the last answer;
    /// in rows without a template it takes the place of the tokenizer's end token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end_token: Option<String>,
    /// Whether what would be a warning is an error.
    pub strict: bool,
    /// Whether rows are laid end to end, in sequences of up to `max_length` tokens, instead of being padded: `auto` or `off`.
    #[serde(skip_serializing_if = "Packing::is_off")]
    pub packing: Packing,
    /// Where tokenized rows are kept for the next start.
    #[serde(skip_serializing_if = "RowCache::is_auto")]
    pub cache: RowCache,
}

/// A TOML table as JSON. TOML's dates, which JSON has no value for, come as a table with one key.
fn template_kwargs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Map<String, Json>, D::Error> {
    const DATE: &str = "$__toml_private_datetime";
    fn dates_as_text(value: &mut Json) {
        match value {
            Json::Object(table) => match table.get_mut(DATE) {
                Some(text) => *value = text.take(),
                None => table.values_mut().for_each(dates_as_text),
            },
            Json::Array(list) => list.iter_mut().for_each(dates_as_text),
            _ => {}
        }
    }
    let mut table = Map::deserialize(deserializer)?;
    table.values_mut().for_each(dates_as_text);
    Ok(table)
}

impl Default for DataConfig {
    fn default() -> Self {
        Self {
            train: Sources::default(),
            eval: None,
            eval_fraction: 0.0,
            format: Format::Auto,
            columns: Columns::default(),
            subset: None,
            split: None,
            max_length: 2048,
            loss_on: LossOn::Assistant,
            shuffle: true,
            group_by_length: false,
            system_prompt: None,
            chat_template: None,
            template_kwargs: Map::new(),
            end_token: None,
            strict: false,
            packing: Packing::Off,
            cache: RowCache::Auto,
        }
    }
}

impl DataConfig {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`DataError::Config`] names the key and what it allows.
    pub fn validate(&self) -> Result<(), DataError> {
        let fail = |key: &'static str, problem: String| Err(DataError::Config { key, problem });
        if self.train.is_empty() {
            return fail(
                "train",
                "is missing; give a file of rows, a folder, a glob or a hub id, or a list of them".into(),
            );
        }
        self.train.0.iter().try_for_each(|source| source.validate("train"))?;
        self.eval.iter().flat_map(|sources| &sources.0).try_for_each(|source| source.validate("eval"))?;
        self.columns.validate().or_else(|problem| fail("columns", problem))?;
        if let Some(Err(problem)) = self.split.as_deref().map(str::parse::<Split>) {
            return fail("split", problem);
        }
        if self.max_length < 2 {
            return fail("max_length", format!("= {} leaves no token to predict; give 2 or more", self.max_length));
        }
        if u32::try_from(self.max_length).is_err() {
            return fail(
                "max_length",
                format!("= {} is more than rows can have; give {} or less", self.max_length, u32::MAX),
            );
        }
        if !(0.0..1.0).contains(&self.eval_fraction) {
            return fail(
                "eval_fraction",
                format!("= {} is out of range; give a number from 0 to below 1", self.eval_fraction),
            );
        }
        if self.group_by_length && self.packing != Packing::Off {
            return fail(
                "group_by_length",
                "= true has nothing to do where rows are packed; leave it out, or data.packing".into(),
            );
        }
        Ok(())
    }
}

/// Layout of a row.
///
/// | format | keys of a row |
/// |---|---|
/// | `chat` | `messages`: a list of `{role, content}`, or `conversations`: a list of `{from, value}`; also `prompt` and `completion` as lists of messages, of which the completion is learned. Optionally `system`, `tools` and `chat_template_kwargs` |
/// | `prompt_completion` | `prompt` and `completion`, two strings |
/// | `alpaca` | `instruction` and `output`; optionally `input`, `system`, and `history`, a list of `[instruction, output]` |
/// | `text` | `text` |
///
/// In all but the last `chosen` and `rejected` may stand in the place of the answer (`completion`, `output`, or the last message), and `label`
/// beside it: true or false, as it is wanted or not. Without a `prompt` two conversations, or texts, have their common beginning as one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Taken from the keys of the first row; all rows must then have it.
    #[default]
    Auto,
    /// Conversations, written with the chat template.
    Chat,
    /// A prompt and what should follow it, written as they are.
    PromptCompletion,
    /// Instructions, written with the prompt of the Alpaca data set.
    Alpaca,
    /// Plain text; every token counts.
    Text,
}

impl Format {
    /// What a row of this format must look like, for messages.
    pub fn expected(self) -> &'static str {
        match self {
            Self::Auto => {
                "an object with `messages`, `conversations`, `prompt` and `completion`, \
                 `instruction` and `output`, or `text`; of two answers `chosen` and `rejected` stand in their place \
                 (data.columns says which columns these are)"
            }
            Self::Chat => {
                "an object with `messages`: a list of objects with `role` and `content` \
                 (or `conversations`: a list of objects with `from` and `value`)"
            }
            Self::PromptCompletion => "an object with the strings `prompt` and `completion`",
            Self::Alpaca => {
                "an object with the strings `instruction`, `output` and optionally `input` and `system`, \
                 and `history`: a list of pairs [instruction, output]"
            }
            Self::Text => "an object with the string `text`",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Chat => "chat",
            Self::PromptCompletion => "prompt_completion",
            Self::Alpaca => "alpaca",
            Self::Text => "text",
        })
    }
}

/// Which tokens the loss counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossOn {
    /// Only what the model should write: assistant turns with their end-of-turn tokens,
    /// completions, outputs. Rows of plain text count whole.
    #[default]
    Assistant,
    /// Every token.
    All,
}
