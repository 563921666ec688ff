//! A checkpoint's tokenizer: `tokenizer.json` and the settings beside it.
//!
//! The text rules live in `tokenizer.json` and are run by the `tokenizers` crate. Which tokens
//! begin, end and pad a text, and how a conversation is written, is spread over
//! `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`, `config.json` and
//! the chat template files; [`Tokenizer::from_dir`] gathers it from the layouts of transformers 4
//! and 5.

mod bytes;
mod check;
mod settings;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use crate::error::ChatError;
use crate::message::Message;
use crate::template::{ChatInput, ChatTemplate, SpecialTokens};

use settings::Settings;

/// A text as tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoding {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Where each token lies in the text, in bytes. Tokens that have no text of their own, such as
    /// an added `bos`, have an empty range.
    pub offsets: Vec<(usize, usize)>,
}

/// A tokenizer with its special tokens and chat template.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
    special_tokens: SpecialTokens,
    bos: Option<u32>,
    eos: Vec<u32>,
    pad: Option<u32>,
    /// Tokens that texts are split at before anything else.
    added: BTreeSet<u32>,
    model_max_length: Option<usize>,
    template: Option<Template>,
}

/// A template that doesn't compile is reported when it is needed, not when it is loaded.
#[derive(Clone, Debug)]
enum Template {
    Ready(Box<ChatTemplate>),
    Broken(String),
}

impl Tokenizer {
    /// Reads the tokenizer of a checkpoint folder.
    ///
    /// # Errors
    /// There is no `tokenizer.json`, or one of the files can't be read or has a field of the wrong
    /// type. A missing or broken chat template is no error yet: see
    /// [`Tokenizer::require_chat_template`].
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self, ChatError> {
        let dir = dir.as_ref();
        let path = dir.join("tokenizer.json");
        if !path.exists() {
            return Err(ChatError::NoTokenizer { dir: dir.to_owned(), hint: missing_hint(dir) });
        }
        let bytes = crate::files::read(&path).map_err(|source| ChatError::Read { path: path.clone(), source })?;
        let fail = |problem: String| ChatError::Tokenizer { path: path.clone(), problem };
        check::check(&bytes).map_err(fail)?;
        let read = || tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| e.to_string());
        let mut inner = guarded(read).map_err(fail)?;
        // Lengths are decided by the caller, whatever the file was saved with.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| fail(e.to_string()))?;
        keep_whitespace_in_offsets(&mut inner).map_err(|e| fail(e.to_string()))?;

        let settings = Settings::from_dir(dir)?;
        let template = settings.chat_template.map(|source| match source {
            Ok(source) => match ChatTemplate::new(source) {
                Ok(template) => Template::Ready(Box::new(template)),
                Err(e) => Template::Broken(e.to_string()),
            },
            Err(problem) => Template::Broken(problem),
        });
        let mut special_tokens = settings.special_tokens;
        let vocab_size = inner.get_vocab_size(true) as u64;
        let mut named = |name: &str, ids: &[u64]| -> Vec<u32> {
            let ids = ids.iter().filter(|id| **id < vocab_size);
            let mut ids: Vec<u32> = ids.map(|id| *id as u32).collect();
            match special_tokens.get(name).and_then(|t| inner.token_to_id(t)) {
                Some(id) => {
                    ids.retain(|other| *other != id);
                    ids.insert(0, id);
                }
                // Only the model's configuration knows it: templates may still ask for the text.
                None => {
                    if let Some(text) = ids.first().and_then(|id| inner.id_to_token(*id)) {
                        special_tokens.insert_if_missing(name, text);
                    }
                }
            }
            ids
        };
        let bos = named("bos_token", &settings.bos_ids);
        let eos = named("eos_token", &settings.eos_ids);
        let pad = named("pad_token", &settings.pad_ids);
        Ok(Self {
            path,
            special_tokens,
            bos: bos.first().copied(),
            eos,
            pad: pad.first().copied(),
            added: inner.get_added_tokens_decoder().into_keys().collect(),
            model_max_length: settings.model_max_length,
            template,
            inner,
        })
    }

    /// Turns a text into tokens. Special tokens written in the text are recognised either way;
    /// `add_special_tokens` adds those the tokenizer puts around a text, such as `bos`, but no second `bos` to a
    /// text that begins with it.
    ///
    /// # Errors
    /// [`ChatError::Tokenizer`] if the text can't be encoded, e.g. a word unknown to a
    /// vocabulary that has no unknown token.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Encoding, ChatError> {
        let encode = || self.inner.encode(text, add_special_tokens).map_err(|e| e.to_string());
        let encoding = guarded(encode).map_err(|problem| self.fail(problem))?;
        let (ids, offsets) = (encoding.get_ids(), encoding.get_offsets());
        let mut at = 0;
        let offsets = offsets.iter().map(|&(start, end)| {
            // What the tokenizer adds has the range 0..0, also at the end of a text.
            let (start, end) = if start < end { (start, end) } else { (at, at) };
            at = at.max(end);
            (start, end)
        });
        let mut encoding = Encoding { ids: ids.to_vec(), offsets: offsets.collect() };
        let twice = matches!(encoding.ids[..], [first, second, ..] if first == second && self.bos == Some(first));
        if twice && encoding.offsets[0].1 == 0 && encoding.offsets[1].1 > 0 {
            encoding.ids.remove(0);
            encoding.offsets.remove(0);
        }
        Ok(encoding)
    }

    /// Whether texts are split at this token before anything else.
    pub(crate) fn is_added(&self, id: u32) -> bool {
        self.added.contains(&id)
    }

    /// Turns tokens into text. Bytes that are not UTF-8 come out as U+FFFD.
    ///
    /// # Errors
    /// [`ChatError::Tokenizer`] if the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, ChatError> {
        let decode = || self.inner.decode(ids, skip_special_tokens).map_err(|e| e.to_string());
        guarded(decode).map_err(|problem| self.fail(problem))
    }

    /// The token that begins a text, if the checkpoint names one.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos
    }

    /// The tokens that end a text: the tokenizer's first, then what else the checkpoint's
    /// generation settings stop at.
    pub fn eos_token_ids(&self) -> &[u32] {
        &self.eos
    }

    /// The token that ends a text in training data.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos.first().copied()
    }

    /// The padding token, if the checkpoint names one.
    pub fn pad_token_id(&self) -> Option<u32> {
        self.pad
    }

    /// A token to fill rows with: `pad`, else `unk`, else `eos`, else 0. Padding is masked in
    /// attention and loss, so any token will do.
    pub fn padding_id(&self) -> u32 {
        let unk = || self.token_to_id(self.special_tokens.get("unk_token")?);
        self.pad.or_else(unk).or(self.eos_token_id()).unwrap_or_default()
    }

    /// The id of a token given by its text.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The text of a token.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Number of tokens, added ones included. A model's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The highest id of a token, and one: the rows that an embedding needs to have one for every token.
    pub fn id_limit(&self) -> usize {
        self.inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1)
    }

    /// `model_max_length` of `tokenizer_config.json`, unless it stands for "no limit".
    pub fn model_max_length(&self) -> Option<usize> {
        self.model_max_length
    }

    /// The special tokens by name, as templates see them.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special_tokens
    }

    /// The folder this tokenizer was read from.
    pub fn dir(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("."))
    }

    /// The chat template, if there is one that compiles.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        match &self.template {
            Some(Template::Ready(template)) => Some(template),
            _ => None,
        }
    }

    /// The chat template.
    ///
    /// # Errors
    /// [`ChatError::NoChatTemplate`] says what to do instead; [`ChatError::TemplateSyntax`] why
    /// the checkpoint's template can't be used.
    pub fn require_chat_template(&self) -> Result<&ChatTemplate, ChatError> {
        match &self.template {
            Some(Template::Ready(template)) => Ok(template),
            Some(Template::Broken(problem)) => {
                Err(ChatError::TemplateSyntax { problem: format!("{}: {problem}", self.dir().display()) })
            }
            None => Err(ChatError::NoChatTemplate { dir: self.dir().to_owned() }),
        }
    }

    /// Writes a conversation with the chat template.
    ///
    /// # Errors
    /// As [`Tokenizer::require_chat_template`] and [`ChatTemplate::render`].
    pub fn render_chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ChatError> {
        self.require_chat_template()?.render_input(&ChatInput {
            messages,
            tools: None,
            add_generation_prompt,
            special_tokens: &self.special_tokens,
            template_kwargs: None,
        })
    }

    fn fail(&self, problem: String) -> ChatError {
        ChatError::Tokenizer { path: self.path.clone(), problem }
    }
}

/// Runs what the `tokenizers` crate does with a file that may be broken in a way that [`check`] does not know: a panic
/// becomes an error that names the file.
fn guarded<T>(work: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
    result.unwrap_or_else(|_| Err("the tokenizers library fails on this file: is it whole?".into()))
}

/// What a folder without `tokenizer.json` has instead.
fn missing_hint(dir: &Path) -> &'static str {
    if dir.join("tokenizer.model").exists() || dir.join("spiece.model").exists() {
        "; it has a SentencePiece model only, which transformers converts: \
         AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    } else if dir.join("vocab.json").exists() {
        "; it has vocab.json and merges.txt only, which transformers converts: \
         AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
    } else if !dir.is_dir() {
        "; the folder does not exist"
    } else {
        "; copy it from the model that this checkpoint was made from"
    }
}

/// Byte-level post-processors can move a token's offsets past its leading space. Masks are drawn
/// by offsets, so they have to cover the token's own text; ids are not affected.
fn keep_whitespace_in_offsets(tokenizer: &mut tokenizers::Tokenizer) -> serde_json::Result<()> {
    fn walk(value: &mut serde_json::Value) -> bool {
        let mut changed = false;
        if let Some(trim) = value.get_mut("trim_offsets") {
            changed = *trim == true;
            *trim = false.into();
        }
        if let Some(processors) = value.get_mut("processors").and_then(|p| p.as_array_mut()) {
            for processor in processors {
                changed |= walk(processor);
            }
        }
        changed
    }
    if let Some(processor) = tokenizer.get_post_processor() {
        let mut json = serde_json::to_value(processor)?;
        if walk(&mut json) {
            let processor: tokenizers::PostProcessorWrapper = serde_json::from_value(json)?;
            tokenizer.with_post_processor(Some(processor));
        }
    }
    Ok(())
}
