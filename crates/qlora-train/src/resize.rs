//! Tokens that a tokenizer has and its model has no rows for: `model.resize_embeddings`.

use adapter_io::TokenIndices;
use chat_text::Tokenizer;
use qlora_models::{ModelConfig, ModelError};

use crate::config::TrainConfig;
use crate::error::TrainError;

/// Names of tables, as PEFT's configurations have them.
const TABLES: [&str; 2] = ["embed_tokens", "lm_head"];
/// Tokens that a notice names; of more it tells the number.
const NAMED: usize = 8;

/// A configuration and a model that has a row for every token of its tokenizer.
#[derive(Clone, Debug)]
pub struct Resized {
    /// The configuration, which trains the new rows as well.
    pub config: TrainConfig,
    /// The model, with the new rows in its vocabulary.
    pub model: ModelConfig,
    /// What the user should know of it.
    pub notice: Option<String>,
}

/// What `model.resize_embeddings` makes of a configuration and a model; without it both stay as they are. The model's
/// weights are made to fit by [`Decoder::resize_embeddings`](qlora_models::Decoder::resize_embeddings).
///
/// # Errors
/// [`ModelError::TrainedTokens`] when the tables would become more than twice as large: the tokenizer is another
/// model's then.
pub fn resize(config: &TrainConfig, model: ModelConfig, tokenizer: &Tokenizer) -> Result<Resized, TrainError> {
    let (mut config, mut model) = (config.clone(), model);
    if !config.model.resize_embeddings {
        return Ok(Resized { config, model, notice: None });
    }
    let (rows, needed) = (model.vocab_size, tokenizer.id_limit());
    if needed <= rows {
        let notice = format!(
            "model.resize_embeddings: every token of the tokenizer has one of the model's {rows} rows; none were added"
        );
        return Ok(Resized { config, model, notice: Some(notice) });
    }
    if needed > rows.saturating_mul(2) {
        let problem = format!(
            "model.resize_embeddings would add {} rows to the model's {rows}: the tokenizer in {} is another model's",
            needed - rows,
            tokenizer.dir().display()
        );
        return Err(ModelError::TrainedTokens { problem }.into());
    }
    let new: Vec<u32> = (rows as u32..needed as u32).collect();
    let tables = if model.tie_word_embeddings { "the embedding" } else { "embedding and output head" };
    let names: Vec<String> = new.iter().take(NAMED).map(|id| named(tokenizer, *id)).collect();
    let more = match new.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let notice = format!(
        "model.resize_embeddings: added {} rows to {tables}, {needed} instead of {rows}, at the mean of the old ones, for \
         {}{more}; these rows are trained and saved with the adapter",
        new.len(),
        names.join(", ")
    );
    let given = config.lora.trainable_token_indices.take();
    config.lora.trainable_token_indices = Some(with_new(given, &new, model.tie_word_embeddings));
    model.vocab_size = needed;
    Ok(Resized { config, model, notice: Some(notice) })
}

/// A token as a notice shows it.
fn named(tokenizer: &Tokenizer, id: u32) -> String {
    match tokenizer.id_to_token(id) {
        Some(text) => format!("{text:?} ({id})"),
        None => format!("{id}, which has no text"),
    }
}

/// The tokens that a configuration names already, and the new ones in every table.
fn with_new(given: Option<TokenIndices>, new: &[u32], tied: bool) -> TokenIndices {
    let extended = |mut tokens: Vec<u32>| {
        let added: Vec<u32> = new.iter().copied().filter(|token| !tokens.contains(token)).collect();
        tokens.extend(added);
        tokens
    };
    let mut modules = match given {
        None => return with_new(Some(TokenIndices::Embedding(Vec::new())), new, tied),
        Some(TokenIndices::Embedding(tokens)) if tied => return TokenIndices::Embedding(extended(tokens)),
        Some(TokenIndices::Embedding(tokens)) => [(TABLES[0].to_string(), tokens)].into(),
        Some(TokenIndices::ByModule(modules)) => modules,
    };
    let named = |modules: &std::collections::BTreeMap<String, Vec<u32>>, table: &str| {
        modules.keys().any(|name| name.rsplit('.').next() == Some(table))
    };
    for table in TABLES.into_iter().take(if tied { 1 } else { 2 }) {
        if !named(&modules, table) {
            modules.insert(table.into(), Vec::new());
        }
    }
    TokenIndices::ByModule(modules.into_iter().map(|(name, tokens)| (name, extended(tokens))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_module(tables: &[(&str, &[u32])]) -> TokenIndices {
        TokenIndices::ByModule(tables.iter().map(|(name, tokens)| (name.to_string(), tokens.to_vec())).collect())
    }

    #[test]
    fn new_tokens_join_those_that_are_named() {
        let list = |tokens: &[u32]| TokenIndices::Embedding(tokens.to_vec());
        for (given, tied, expected) in [
            (None, true, list(&[8, 9])),
            (None, false, by_module(&[("embed_tokens", &[8, 9]), ("lm_head", &[8, 9])])),
            (Some(list(&[3, 9])), true, list(&[3, 9, 8])),
            (Some(list(&[3])), false, by_module(&[("embed_tokens", &[3, 8, 9]), ("lm_head", &[8, 9])])),
            (
                Some(by_module(&[("lm_head", &[1])])),
                false,
                by_module(&[("embed_tokens", &[8, 9]), ("lm_head", &[1, 8, 9])]),
            ),
            (Some(by_module(&[("model.embed_tokens", &[1])])), true, by_module(&[("model.embed_tokens", &[1, 8, 9])])),
        ] {
            assert_eq!(with_new(given.clone(), &[8, 9], tied), expected, "{given:?}, tied: {tied}");
        }
    }
}
