//! Adapters of a decoder: attach fresh ones, load and export PEFT's, switch and combine several, merge.
//!
//! An adapter is everything that PEFT keeps in one folder: LoRA factors of linear layers, of the embedding table and
//! of the output head, biases of `lora_b`, DoRA's magnitudes, and modules that were trained in full. One adapter is on
//! a decoder at a time; [`AdapterSet`] holds several by name, and combinations of them, and puts them on in turn.
//!
//! A tied output head has no weight of its own. When an adapter touches the head it gets one, which shares the
//! table's memory; when an adapter touches the embedding alone, the head stays what it was, as in PEFT. Rows of single
//! tokens belong to both.
//!
//! Not read: adapters that use aLoRA, Arrow, KaSA, MonteCLoRA, QALoRA, BdLoRA, VeLoRA, Megatron's layers, replicated
//! layers, or `target_parameters` other than experts and routers; each is refused by its key.

mod export;
mod kinds;
mod load;
mod parameters;
mod set;
mod start;
mod tokens;

pub use kinds::ParameterKind;
pub use set::{AdapterSet, AdapterSource};
pub use start::CalibrationBatch;
pub use tokens::TrainedTokens;

use crate::ModelError;
use crate::decoder::Decoder;
use crate::embedding::Embedding;
use burn::module::Param;
use burn::tensor::FloatDType;
use qlora_layers::peft::peft_config;
use qlora_layers::target_modules::{Target, resolve};
use qlora_layers::{
    EmbeddingAdapter, FrozenLinear, Initialization, LoraAdapter, LoraConfig, LoraLinear, frozen, trainable,
};
use start::{Start, Starter};
use std::collections::{HashMap, HashSet};

impl Decoder {
    /// The paths of the linear layers, as checkpoints name them.
    fn linear_paths(&self) -> Vec<String> {
        self.linears().map(|(path, _)| path).collect()
    }

    /// The adapters that `config` asks for on this model.
    ///
    /// # Errors
    /// A setting is out of range, or nothing matches (the message lists the candidates).
    pub fn lora_targets(&self, config: &LoraConfig) -> Result<Vec<Target>, ModelError> {
        Ok(resolve(config, &self.config.adaptable_modules())?)
    }

    /// Puts fresh adapters on the modules that `config` names, in place of any that are there. Their initial
    /// values depend on `seed`, their number and the weights alone. Returns how many.
    ///
    /// # Errors
    /// As [`lora_targets`](Self::lora_targets); `modules_to_save` names no module, or one that has an adapter; an
    /// initialisation does not fit the model, or needs activations (see [`attach_lora_to`](Self::attach_lora_to)). The
    /// model is unchanged then.
    pub fn attach_lora(&mut self, config: &LoraConfig, seed: u64) -> Result<usize, ModelError> {
        self.attach_lora_to(config, seed, &[])
    }

    /// [`attach_lora`](Self::attach_lora) with batches whose activations [`Initialization::Eva`] looks at.
    ///
    /// # Errors
    /// As [`attach_lora`](Self::attach_lora).
    pub fn attach_lora_to(
        &mut self,
        config: &LoraConfig,
        seed: u64,
        calibration: &[CalibrationBatch],
    ) -> Result<usize, ModelError> {
        let mut model = self.clone();
        model.unload_adapter()?;
        let mut targets = model.lora_targets(config)?;
        let saved: HashSet<String> = model.config.saved_modules(config)?.into_iter().map(|(path, _)| path).collect();
        if let Some(both) = targets.iter().find(|target| saved.contains(&target.path)) {
            return Err(ModelError::AdapterClash { module: both.path.clone() });
        }
        let tokens = model.config.trained_tokens(config)?;
        let (embed, head) = (model.config.embed_path(), model.head_path());
        if targets.iter().any(|target| target.path == head) || saved.contains(head) {
            model.own_head();
        }
        let components = match config.init {
            Initialization::Eva => Some(start::explain(&model, config, &mut targets, calibration)?),
            _ => None,
        };
        let starter = Starter::new(&model, config, seed, components)?;
        let by_path: HashMap<&str, &Target> = targets.iter().map(|target| (target.path.as_str(), target)).collect();
        let mut index = 0;
        for (path, linear) in model.linears_mut() {
            if let Some(target) = by_path.get(path.as_str()) {
                let Start { adapter, base } = starter.linear(linear, target, index)?;
                if let Some(base) = base {
                    linear.base.become_equal(base)?;
                }
                linear.adapter = Some(finish(adapter, config, &linear.base));
                index += 1;
            }
            if saved.contains(&path) {
                linear.train_whole();
            }
        }
        let table = model.embed_tokens.val();
        if let Some(target) = by_path.get(embed.as_str()) {
            let lora = EmbeddingAdapter::new(&table, target.rank, target.scaling, seed);
            model.embedding.lora = Some(if config.use_dora { lora.with_dora(&table, None) } else { lora });
        }
        if saved.contains(&embed) {
            model.embedding.whole = Some(trainable(table.cast(FloatDType::F32)));
        }
        for (path, norm) in model.norms_mut() {
            if saved.contains(&path) {
                norm.trained = Some(trainable(norm.weight.clone().unsqueeze()));
            }
        }
        model.train_tokens(tokens);
        model.adapter_config = Some(peft_config(config, &targets));
        *self = model;
        Ok(targets.len())
    }

    /// Takes the adapter off: the base model remains, without being loaded again.
    ///
    /// # Errors
    /// [`ModelError::BaseChanged`] when the adapter's initialisation took its start out of the weights.
    pub fn unload_adapter(&mut self) -> Result<(), ModelError> {
        self.part_experts();
        let changed = |linear: &LoraLinear| {
            linear.original.is_none() && linear.adapter.as_ref().is_some_and(|adapter| adapter.initial.is_some())
        };
        if let Some((module, _)) = self.linears().find(|(_, linear)| changed(linear)) {
            return Err(ModelError::BaseChanged { module });
        }
        self.linears_mut().for_each(|(_, linear)| linear.unload());
        self.norms_mut().for_each(|(_, norm)| norm.trained = None);
        let Embedding { original, .. } = std::mem::take(&mut self.embedding);
        if let Some(table) = original {
            self.embed_tokens = table;
        }
        self.head_tokens = None;
        if self.config.tie_word_embeddings {
            self.lm_head = None;
        }
        self.shrink();
        self.adapter_config = None;
        Ok(())
    }

    /// Path of the output head.
    pub(crate) fn head_path(&self) -> &'static str {
        self.config.root().head
    }

    /// Gives a tied head a layer of its own, over the table's memory.
    fn own_head(&mut self) {
        let table = &self.embed_tokens;
        self.lm_head.get_or_insert_with(|| LoraLinear::frozen(FrozenLinear::dense(table.val()), None));
    }

    /// The adapters of linear layers with their paths, in the order of their numbers; without those of experts that
    /// [run as one](Self::join_experts).
    pub fn adapters(&self) -> impl Iterator<Item = (String, &LoraAdapter)> {
        self.linears().filter_map(|(path, linear)| Some((path, linear.adapter.as_ref()?)))
    }

    /// The adapters of linear layers with their paths, in the order of their numbers; without those of experts that
    /// [run as one](Self::join_experts).
    pub fn adapters_mut(&mut self) -> impl Iterator<Item = (String, &mut LoraAdapter)> {
        self.linears_mut().filter_map(|(path, linear)| Some((path, linear.adapter.as_mut()?)))
    }

    /// Paths of the modules that are adapted or trained in full, the embedding first.
    pub fn adapted_modules(&self) -> Vec<String> {
        let model = self.parted();
        let Embedding { lora, whole, tokens, .. } = &self.embedding;
        let embedding = (lora.is_some() || whole.is_some() || tokens.is_some()).then(|| self.config.embed_path());
        let has_rows = |path: &str| self.head_tokens.is_some() && path == self.head_path();
        let linears = model
            .linears()
            .filter(move |(path, linear)| linear.adapter.is_some() || linear.whole.is_some() || has_rows(path));
        let norms = self.norms().filter(|(_, norm)| norm.trained.is_some()).map(|(path, _)| path);
        embedding.into_iter().chain(linears.map(|(path, _)| path)).chain(norms).collect()
    }

    /// Makes the adapter part of the dense weights, `W + scaling * lora_b lora_a` in f32 and whatever else it holds, and
    /// removes it. A tied head stays what it is when only the embedding changes, but for rows of single tokens, which
    /// are the head's too; tables that grew for the adapter stay so.
    ///
    /// # Errors
    /// An adapted base is quantized: rounding the sum to 4 bits again would change what the adapter does, so merging
    /// belongs on the full-precision base. The model is unchanged then.
    pub fn merge_adapters(&mut self) -> Result<(), ModelError> {
        self.part_experts();
        let quantized = self
            .linears()
            .find(|(_, linear)| linear.adapter.is_some() && matches!(linear.base, FrozenLinear::Quantized(_)));
        if let Some((module, _)) = quantized {
            return Err(ModelError::MergeQuantized { module });
        }
        if self.embedding.lora.is_some() || self.embedding.whole.is_some() {
            self.own_head();
        }
        // A head that has become its own stays so.
        if self.lm_head.is_some() {
            self.config.tie_word_embeddings = false;
        }
        let dtype = self.dtype;
        for (_, linear) in self.linears_mut() {
            linear.merge(dtype);
            linear.original = None;
        }
        for (_, norm) in self.norms_mut() {
            if let Some(trained) = norm.trained.take() {
                norm.weight = trained.into_value().without_autodiff().squeeze_dim::<1>(0);
            }
        }
        if let (Some(tokens), Some(head)) = (self.head_tokens.take(), &mut self.lm_head) {
            head.base = FrozenLinear::dense(tokens.merged(head.base.to_dense(dtype)));
        }
        let Embedding { lora, whole, tokens, .. } = std::mem::take(&mut self.embedding);
        if let Some(tokens) = tokens {
            self.embed_tokens = frozen(tokens.merged(self.embed_tokens.val()));
        }
        self.rows_before = None;
        let whole = whole.map(Param::into_value);
        if let Some(table) = whole.or_else(|| Some(lora?.merged(&self.embed_tokens))) {
            self.embed_tokens = frozen(table.without_autodiff().cast(dtype));
        }
        self.adapter_config = None;
        Ok(())
    }
}

/// The parts that `config` adds to an adapter's factors.
fn finish(adapter: LoraAdapter, config: &LoraConfig, base: &FrozenLinear) -> LoraAdapter {
    let adapter = if config.lora_bias { adapter.with_bias() } else { adapter };
    if config.use_dora { adapter.with_dora(base, None) } else { adapter }
}
