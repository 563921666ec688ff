//! Rows of single tokens that are trained, and tables that grow to hold them.
//!
//! A head that is the embedding's table has the embedding's rows, as in PEFT; one of its own has rows where the
//! configuration names it. An adapter with rows for tokens beyond the tables makes both tables grow while it is on: rows
//! that it does not have are the mean of the old ones.

use super::load::{matrix, other_base, put_base};
use crate::ModelError;
use crate::config::ModelConfig;
use crate::decoder::Decoder;
use adapter_io::{Adapter, HostTensor, TokenIndices};
use qlora_layers::{FrozenLinear, LoraConfig, TokenRows, frozen, with_mean_rows};

/// What the frozen weight of a module with trained rows is called behind its path.
const TABLE: &str = ".token_adapter.base_layer.weight";
/// What it is called where no row of it is trained.
const WEIGHT: &str = ".weight";

/// The tokens whose rows are trained, by table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrainedTokens {
    /// Of the embedding, and of a head that is the same table.
    pub embedding: Vec<u32>,
    /// Of a head of its own.
    pub head: Vec<u32>,
}

fn fail(problem: String) -> ModelError {
    ModelError::TrainedTokens { problem }
}

impl ModelConfig {
    /// The tokens whose rows `config` trains.
    ///
    /// # Errors
    /// [`ModelError::TrainedTokens`] for a table that is not there, a token beyond the vocabulary, a head that is the
    /// embedding's table and is to have other tokens than it, or a table that is adapted or trained in full besides.
    pub fn trained_tokens(&self, config: &LoraConfig) -> Result<TrainedTokens, ModelError> {
        let (embed, head) = (self.embed_path(), self.root().head);
        let mut found = TrainedTokens::default();
        match config.trainable_token_indices.as_ref().filter(|tokens| !tokens.is_empty()) {
            None => return Ok(found),
            Some(TokenIndices::Embedding(tokens)) => found.embedding = tokens.clone(),
            Some(TokenIndices::ByModule(modules)) => {
                for (name, tokens) in modules {
                    let means = |path: &str| path == name || path.ends_with(&format!(".{name}"));
                    match (means(&embed), means(head)) {
                        (true, _) => found.embedding = tokens.clone(),
                        (_, true) => found.head = tokens.clone(),
                        _ => {
                            return Err(fail(format!(
                                "`{name}` is no table of this model; it has embed_tokens and lm_head"
                            )));
                        }
                    }
                }
            }
        }
        let rows = self.vocab_size;
        if let Some(token) = found.embedding.iter().chain(&found.head).find(|token| **token as usize >= rows) {
            return Err(fail(format!(
                "token {token} is beyond the model's tables of {rows} rows; model.resize_embeddings = true adds rows for the tokenizer's new tokens, and trains them"
            )));
        }
        if self.tie_word_embeddings && !found.head.is_empty() {
            if found.head != found.embedding {
                return Err(fail(
                    "the output head is the embedding's table, and can't have other tokens than embed_tokens".into(),
                ));
            }
            found.head.clear();
        }
        let saved = self.saved_modules(config)?.into_iter().map(|(path, _)| path);
        let adapted = qlora_layers::target_modules::resolve(config, &self.adaptable_modules())?;
        let touched: Vec<String> = adapted.into_iter().map(|target| target.path).chain(saved).collect();
        let shared = self.tie_word_embeddings && !found.embedding.is_empty();
        for (path, has_rows) in
            [(embed.as_str(), !found.embedding.is_empty()), (head, shared || !found.head.is_empty())]
        {
            if has_rows && touched.iter().any(|module| module == path) {
                return Err(fail(format!(
                    "{path} is named by lora.target_modules or lora.modules_to_save as well; it can be adapted, trained in full, or have some of its rows trained"
                )));
            }
        }
        Ok(found)
    }
}

impl Decoder {
    /// Adds rows to the embedding table, and to an output head of its own, until there are `rows`; each is the mean of
    /// the old ones in the compute dtype. Returns how many were added: none where there are as many already.
    ///
    /// # Errors
    /// [`ModelError::ResizeAdapted`] when an adapter is on.
    pub fn resize_embeddings(&mut self, rows: usize) -> Result<usize, ModelError> {
        if self.adapter_config.is_some() {
            return Err(ModelError::ResizeAdapted);
        }
        let added = rows.saturating_sub(self.config.vocab_size);
        self.grow(rows)?;
        Ok(added)
    }

    fn grow(&mut self, rows: usize) -> Result<(), ModelError> {
        if rows <= self.config.vocab_size {
            return Ok(());
        }
        if let Some(words) = self.config.layer_inputs.map(|inputs| inputs.words).filter(|words| rows > *words) {
            return Err(fail(format!(
                "{rows} tokens are more than the {words} for which this model's blocks have inputs of their own; new tokens can't have any"
            )));
        }
        self.embed_tokens = frozen(with_mean_rows(self.embed_tokens.val(), rows));
        if let Some(head) = &mut self.lm_head {
            head.base = FrozenLinear::dense(with_mean_rows(head.base.to_dense(self.dtype), rows));
        }
        self.config.vocab_size = rows;
        Ok(())
    }

    /// Takes off the rows that an adapter brought, of tables that are the base's again.
    pub(super) fn shrink(&mut self) {
        let Some(rows) = self.rows_before.take() else { return };
        self.embed_tokens = frozen(self.embed_tokens.val().narrow(0, 0, rows));
        if let Some(head) = &mut self.lm_head {
            head.base = FrozenLinear::dense(head.base.to_dense(self.dtype).narrow(0, 0, rows));
        }
        self.config.vocab_size = rows;
    }

    /// Puts rows that are to be trained on the tables.
    pub(super) fn train_tokens(&mut self, tokens: TrainedTokens) {
        let TrainedTokens { embedding, head } = tokens;
        if !embedding.is_empty() {
            self.embedding.tokens = Some(TokenRows::of_table(&self.embed_tokens, embedding));
        }
        if let Some(linear) = self.lm_head.as_ref().filter(|_| !head.is_empty()) {
            self.head_tokens = Some(TokenRows::of_table(&linear.base.to_dense(self.dtype), head));
        }
    }

    /// Makes the tables as large as an adapter needs them.
    pub(super) fn grow_for(&mut self, adapter: &Adapter) -> Result<(), ModelError> {
        let rows = self.config.vocab_size;
        let mut needed = rows;
        for of_table in adapter.token_rows()? {
            needed = needed.max(of_table.table_rows(rows)?);
        }
        for (name, tensor) in adapter.saved_tensors() {
            if let (true, &[more, _]) = (self.is_frozen_table(adapter, &name), tensor.shape.as_slice())
                && more <= 2 * rows
            {
                needed = needed.max(more);
            }
        }
        if needed > rows {
            self.grow(needed)?;
            self.rows_before = Some(rows);
        }
        Ok(())
    }

    /// Whether a tensor of an adapter's file is a whole table that nothing trains: PEFT writes both along where the
    /// vocabulary grew.
    fn is_frozen_table(&self, adapter: &Adapter, name: &str) -> bool {
        let Some(module) = name.strip_suffix(WEIGHT) else { return false };
        let trained = adapter.config.modules_to_save.iter().flatten().any(|saved| module.ends_with(saved.as_str()));
        !trained && (module == self.config.embed_path() || module == self.head_path())
    }

    /// Takes a whole table out of an adapter's file as the frozen one, if it is such a table and the vocabulary grew.
    pub(super) fn put_frozen_table(
        &mut self,
        adapter: &Adapter,
        name: &str,
        tensor: &HostTensor,
    ) -> Result<bool, ModelError> {
        if self.rows_before.is_none() || !self.is_frozen_table(adapter, name) {
            return Ok(false);
        }
        let module = name.strip_suffix(WEIGHT).unwrap_or(name).to_string();
        self.put_table(&module, tensor, WEIGHT)?;
        Ok(true)
    }

    /// Puts the rows of an adapter's file on the tables.
    pub(super) fn put_token_rows(&mut self, adapter: &Adapter) -> Result<(), ModelError> {
        let (embed, head) = (self.config.embed_path(), self.head_path());
        let found = adapter.token_rows()?;
        let of_embedding = found.iter().find(|rows| rows.module == embed);
        for rows in &found {
            let is_head = rows.module == head;
            if !is_head && rows.module != embed {
                return Err(ModelError::AdapterModule { module: rows.module.clone() });
            }
            if is_head && self.config.tie_word_embeddings {
                match of_embedding.is_some_and(|other| other.tokens == rows.tokens && other.rows == rows.rows) {
                    true => continue,
                    false => {
                        return Err(fail(format!(
                            "the output head is the embedding's table here, and the adapter has rows of its own for {head}; merge it into the base, which gives the head a table"
                        )));
                    }
                }
            }
            if rows.rows.shape[1] != self.config.hidden_size {
                return Err(ModelError::WeightShape {
                    module: format!("{}.token_adapter.trainable_tokens_delta", rows.module),
                    expected: vec![rows.tokens.len(), self.config.hidden_size],
                    found: rows.rows.shape.clone(),
                });
            }
            if let Some(table) = rows.table {
                self.put_table(&rows.module, table, TABLE)?;
            }
            let trained = TokenRows::from_rows(matrix(rows.rows, &self.device), rows.tokens.to_vec());
            match is_head {
                true => self.head_tokens = Some(trained),
                false => self.embedding.tokens = Some(trained),
            }
        }
        Ok(())
    }

    /// Puts a whole table of an adapter's file in place of the embedding's or the head's.
    fn put_table(&mut self, module: &str, table: &HostTensor, suffix: &'static str) -> Result<(), ModelError> {
        if module == self.head_path() {
            if let Some(head) = &mut self.lm_head {
                put_base(module, head, table)?;
            }
        } else {
            let expected = self.embed_tokens.dims();
            if table.shape != expected {
                return Err(ModelError::WeightShape {
                    module: format!("{module}{suffix}"),
                    expected: expected.into(),
                    found: table.shape.clone(),
                });
            }
            if let Some(own) = other_base(&self.embed_tokens, table)? {
                let before = std::mem::replace(&mut self.embed_tokens, frozen(own));
                self.embedding.original.get_or_insert(before);
            }
        }
        self.embedding.brought.push((module.to_string(), suffix));
        Ok(())
    }
}
