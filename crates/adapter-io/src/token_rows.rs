//! Rows of an embedding table, or of an output head, that an adapter replaces: PEFT's `trainable_token_indices`.
//!
//! PEFT keeps the rows themselves, not what was added to them, although it calls them
//! `<module>.token_adapter.trainable_tokens_delta`, `[tokens, width]`, in the order in which the configuration lists
//! the tokens. A head that is the embedding's tensor follows the embedding and has no rows of its own in the file.
//!
//! Where the vocabulary grew before the training, PEFT writes both whole tables along
//! (`save_embedding_layers = "auto"`): `….token_adapter.base_layer.weight`, with a tied head's copies of it and of the
//! rows, and `<module>.weight` for a table without trained rows. The model's tables must have grown before PEFT loads
//! the adapter, with them or without.
//!
//! Source: `tuners/trainable_tokens/layer.py`, `TrainableTokensWrapper` in `utils/other.py` and
//! `get_peft_model_state_dict` in `utils/save_and_load.py` of PEFT 0.21.

use std::collections::{BTreeMap, HashSet};

use crate::adapter::{Adapter, KEY_PREFIX};
use crate::adapter_config::TokenIndices;
use crate::adapter_names::ends_with;
use crate::error::FormatError;
use crate::host_tensor::HostTensor;

/// What stands between a module's path and the parts that PEFT keeps for its trained rows.
pub(crate) const WRAPPER: &str = ".token_adapter.";
/// The trained rows.
const ROWS: &str = ".token_adapter.trainable_tokens_delta";
/// The table that they belong to.
const TABLE: &str = ".token_adapter.base_layer.weight";
/// A head's own name, which tells its copy of the embedding's rows from the embedding's.
const HEAD: &str = "lm_head";

/// The rows of one table that an adapter replaces.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenRows<'a> {
    /// The table's module, e.g. `model.embed_tokens`.
    pub module: String,
    /// The tokens, each once.
    pub tokens: &'a [u32],
    /// Their rows, `[tokens, width]`.
    pub rows: &'a HostTensor,
    /// The whole table, `[vocabulary, width]`, where the file holds it.
    pub table: Option<&'a HostTensor>,
}

impl TokenRows<'_> {
    /// The rows that a table of `rows` rows must have for these tokens.
    ///
    /// # Errors
    /// [`FormatError::Factors`] when it would be more than twice as large: the adapter belongs to another base then.
    pub fn table_rows(&self, rows: usize) -> Result<usize, FormatError> {
        let last = self.tokens.iter().max().map_or(0, |token| *token as usize + 1);
        let needed = self.table.and_then(|table| table.shape.first().copied()).unwrap_or(0).max(last).max(rows);
        match needed <= rows.saturating_mul(2) {
            true => Ok(needed),
            false => Err(fail(
                &self.module,
                format!(
                    "it has a row for token {}, and the base's table has {rows} rows; the adapter belongs to another base",
                    needed - 1
                ),
            )),
        }
    }
}

fn fail(module: &str, reason: String) -> FormatError {
    FormatError::Factors { module: module.to_string(), reason }
}

impl Adapter {
    /// The key of a module's trained rows.
    pub fn token_rows_key(module: &str) -> String {
        format!("{KEY_PREFIX}{module}{ROWS}")
    }

    /// The key of the table that a module's trained rows belong to.
    pub fn token_table_key(module: &str) -> String {
        format!("{KEY_PREFIX}{module}{TABLE}")
    }

    /// The rows that the adapter replaces, by table. A tied head's copy of the embedding's rows is left out.
    ///
    /// # Errors
    /// [`FormatError::Factors`] when rows and configuration do not fit each other: another number of rows than of
    /// tokens, a token twice, rows without tokens, or tokens without rows.
    pub fn token_rows(&self) -> Result<Vec<TokenRows<'_>>, FormatError> {
        let path = |key: &str| Some(key.strip_prefix(KEY_PREFIX)?.strip_suffix(ROWS)?.to_string());
        let mut held: BTreeMap<String, &HostTensor> =
            self.tensors.iter().filter_map(|(key, rows)| Some((path(key)?, rows))).collect();
        let mut found = Vec::new();
        let mut take = |held: &mut BTreeMap<String, &'_ HostTensor>, module: String, tokens| match held.remove(&module)
        {
            Some(_) => self.one_table(module, tokens).map(|rows| found.push(rows)),
            None => Ok(()),
        };
        match self.config.trainable_token_indices.as_ref().filter(|tokens| !tokens.is_empty()) {
            None => {}
            Some(TokenIndices::Embedding(tokens)) => {
                let embedding = held.keys().find(|path| !ends_with(path, HEAD)).or_else(|| held.keys().next());
                let module = embedding.cloned().ok_or_else(|| no_rows("the embedding"))?;
                take(&mut held, module, tokens)?;
            }
            Some(TokenIndices::ByModule(modules)) => {
                let mut without = Vec::new();
                for (name, tokens) in modules.iter().filter(|(_, tokens)| !tokens.is_empty()) {
                    match held.keys().find(|path| ends_with(path, name)).cloned() {
                        Some(module) => take(&mut held, module, tokens)?,
                        None => without.push((name, tokens)),
                    }
                }
                // A tied head that is named beside the embedding follows it.
                if let Some((name, _)) =
                    without.into_iter().find(|(_, tokens)| found.iter().all(|f| f.tokens != **tokens))
                {
                    return Err(no_rows(name));
                }
            }
        }
        if let Some((module, _)) = held.into_iter().find(|(_, rows)| found.iter().all(|f| f.rows != *rows)) {
            let reason = "it has rows for tokens, and trainable_token_indices in adapter_config.json names none for it";
            return Err(fail(&module, reason.into()));
        }
        Ok(found)
    }

    fn one_table<'a>(&'a self, module: String, tokens: &'a [u32]) -> Result<TokenRows<'a>, FormatError> {
        let rows = self.module_tensor(&module, ROWS).ok_or_else(|| no_rows(&module))?;
        let table = self.module_tensor(&module, TABLE);
        let &[count, width] = rows.shape.as_slice() else {
            return Err(fail(
                &module,
                format!("the rows of its tokens have the shape {:?}, not two dimensions", rows.shape),
            ));
        };
        if count != tokens.len() {
            let named = tokens.len();
            return Err(fail(
                &module,
                format!("it has {count} rows, and trainable_token_indices names {named} tokens"),
            ));
        }
        let mut seen = HashSet::new();
        if let Some(twice) = tokens.iter().find(|token| !seen.insert(**token)) {
            return Err(fail(&module, format!("trainable_token_indices names token {twice} twice")));
        }
        let last = tokens.iter().max().map_or(0, |token| *token as usize + 1);
        match table.map(|table| table.shape.as_slice()) {
            None => {}
            Some([rows, same]) if *same == width && *rows >= last => {}
            Some(shape) => {
                let reason = format!(
                    "its table has the shape {shape:?}, and its rows are {width} wide and go up to token {}",
                    last.saturating_sub(1)
                );
                return Err(fail(&module, reason));
            }
        }
        Ok(TokenRows { module, tokens, rows, table })
    }
}

fn no_rows(name: &str) -> FormatError {
    fail(name, "trainable_token_indices names tokens, and the file has no rows for them; it is incomplete".into())
}
