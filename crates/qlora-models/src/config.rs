//! `config.json` of a decoder-only model, as transformers 4 and 5 write it.
//!
//! Which keys there are, what they mean and what holds when they are absent is the family's table entry. A key
//! that the entry does not know, and that is in no list of harmless ones, is an error: it may change what the
//! model computes.

mod activation;
mod blocks;
mod fields;
mod keys;
mod latent;
mod modules;
mod options;
mod rope;
mod tied;

use crate::ModelError;
use crate::family::{EmbeddingScale, Family, Root, SECTION, ScoreScale, Wrapper};
use crate::rope::{Pairs, RopeScaling};
use adapter_io::{BnbConfig, Checkpoint};
use blocks::LayerConfig;
pub use blocks::{AttentionKind, ExpertsConfig, GroupedScores, LinearAttentionConfig};
use fields::Fields;
pub use latent::LatentConfig;
pub(crate) use modules::{BlockNorms, ExpertsSpecs};
pub use modules::{LinearRole, LinearSpec};
pub use options::ConfigOptions;
use qlora_layers::ops::fused::Activation;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// What a model computes, and its sizes.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// The family's table entry.
    pub(crate) family: &'static Family,
    /// Where the language model lies; see [`Family::roots`].
    pub(crate) roots: &'static [Root],
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head: of queries, keys and values, or of latent attention the widest of the three.
    pub head_dim: usize,
    /// The MLP's activation.
    pub activation: Activation,
    /// Epsilon of RMSNorm.
    pub rms_norm_eps: f64,
    /// Factor of embeddings, where it is not 1.
    pub embedding_scale: Option<f64>,
    /// Factor of what attention and MLP add to the residual stream, where it is not 1.
    pub residual_scale: Option<f64>,
    /// Factor of attention scores.
    pub score_scale: f64,
    /// Attention scores are bounded by it, smoothly.
    pub score_softcap: Option<f64>,
    /// Logits are bounded by it, smoothly.
    pub logit_softcap: Option<f64>,
    /// Logits are divided by it, where it is not 1.
    pub logit_divisor: Option<f64>,
    /// What kinds of attention there are among the blocks: one, or a few.
    pub attention_kinds: Vec<AttentionKind>,
    /// Linear attention, if some blocks have it in the place of attention.
    pub linear: Option<LinearAttentionConfig>,
    /// Tokens that short convolutions in the place of attention look at, if some blocks have one.
    pub short_conv: Option<usize>,
    /// Mixture of experts, if there is one.
    pub experts: Option<ExpertsConfig>,
    /// Latent attention, if blocks have it in the place of attention.
    pub latent: Option<LatentConfig>,
    /// Whether the output head is the embedding table.
    pub tie_word_embeddings: bool,
    /// The longest context the model was made for.
    pub max_position_embeddings: usize,
    /// How bitsandbytes quantized the checkpoint, if it did.
    pub bnb: Option<BnbConfig>,
    /// What a user should know of keys that were passed over.
    pub notes: Vec<String>,
    /// Blocks that predict tokens beyond the next one.
    pub(crate) multi_token_layers: usize,
    layers: Vec<LayerConfig>,
    /// Parts of the paths of linear layers that are left dense.
    dense: Vec<String>,
    qk_normed: bool,
    qkv_bias: bool,
    output_bias: bool,
    mlp_bias: bool,
    path: PathBuf,
}

impl ModelConfig {
    /// Reads `dir/config.json`. Where the checkpoint beside it has an output head that is not the embedding table, the two are not
    /// tied, whatever the file says.
    ///
    /// # Errors
    /// The file is missing or no JSON, the model type is unknown, or a field is missing, has a
    /// wrong type, or asks for arithmetic that the family's table does not cover.
    pub fn from_dir(dir: &Path) -> Result<Self, ModelError> {
        Self::from_dir_with(dir, &ConfigOptions::default())
    }

    /// [`from_dir`](Self::from_dir), as `options` say.
    ///
    /// # Errors
    /// As there.
    pub fn from_dir_with(dir: &Path, options: &ConfigOptions) -> Result<Self, ModelError> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|source| ModelError::Read { path: path.clone(), source })?;
        let value: Value =
            serde_json::from_str(&text).map_err(|source| ModelError::Json { path: path.clone(), source })?;
        let mut config = Self::from_json_with(&value, &path, options)?;
        // Who loads the weights is told what is wrong with them.
        if let Ok(checkpoint) = Checkpoint::open(dir) {
            config.untie_by_weights(&checkpoint);
        }
        Ok(config)
    }

    /// Reads a parsed `config.json`; `path` names it in errors.
    ///
    /// # Errors
    /// As [`from_dir`](Self::from_dir).
    pub fn from_json(value: &Value, path: &Path) -> Result<Self, ModelError> {
        Self::from_json_with(value, path, &ConfigOptions::default())
    }

    /// [`from_json`](Self::from_json), as `options` say.
    ///
    /// # Errors
    /// As [`from_dir`](Self::from_dir).
    pub fn from_json_with(value: &Value, path: &Path, options: &ConfigOptions) -> Result<Self, ModelError> {
        let not_an_object =
            || ModelError::Field { path: path.into(), field: "config".into(), problem: "is not a JSON object".into() };
        let file = Fields::new(path, value.as_object().ok_or_else(not_an_object)?, options);
        let model_type = file.text("model_type")?.ok_or_else(|| file.error("model_type", "is missing"))?;
        let file_tied = file.flag("tie_word_embeddings")?;
        let unknown = |fields: &Fields, model_type: &str| {
            let problem = format!("is \"{model_type}\", which is not supported; supported: {}", Family::supported());
            fields.error("model_type", problem)
        };
        // A type that reads more than text has the language model in a section; that of a family is the whole file.
        let whole = Family::find(model_type);
        let section = match whole {
            Some(_) => None,
            None => file.object(SECTION)?,
        };
        let flat = Wrapper::find(model_type).flat && whole.is_none() && section.is_none();
        let wrapper = (flat || section.is_some()).then(|| Wrapper::find(model_type));
        if let Some(why) = wrapper.and_then(|wrapper| wrapper.refused) {
            return Err(file.error("model_type", format!("is \"{model_type}\", which is not supported: {why}")));
        }
        let family = match (whole, &section, wrapper) {
            (None, Some(section), Some(wrapper)) => {
                let text = section.text("model_type")?.or(wrapper.text);
                let text = text.ok_or_else(|| section.error("model_type", "is missing"))?;
                Family::find(text).ok_or_else(|| unknown(section, text))?
            }
            (None, None, Some(Wrapper { text: Some(text), .. })) => {
                Family::find(text).ok_or_else(|| unknown(&file, model_type))?
            }
            (whole, ..) => whole.ok_or_else(|| unknown(&file, model_type))?,
        };
        let fields = section.as_ref().unwrap_or(&file);
        let tied = fields.flag("tie_word_embeddings")?;
        let own_tied = family.tie_key.map(|key| fields.flag(key)).transpose()?.flatten();

        fields.fixed(family.fixed)?;
        fields.fixed(wrapper.map_or(&[], |wrapper| wrapper.fixed))?;
        // Sections leave out what equals the defaults, files do not.
        let sizes = if section.is_some() { family.sizes } else { family.sizes.of_a_file() };
        let hidden_size = fields.required("hidden_size", sizes.hidden_size)?;
        let num_hidden_layers = fields.required("num_hidden_layers", sizes.num_hidden_layers)?;
        fields.bounded("num_hidden_layers", num_hidden_layers, 10_000)?;
        let num_attention_heads = fields.required("num_attention_heads", sizes.num_attention_heads)?;
        let num_key_value_heads = match fields.is_null("num_key_value_heads") {
            true => None,
            false => fields.size("num_key_value_heads")?.or(sizes.num_key_value_heads),
        }
        .unwrap_or(num_attention_heads);
        if !num_attention_heads.is_multiple_of(num_key_value_heads) {
            return Err(fields.error(
                "num_key_value_heads",
                format!("is {num_key_value_heads}, which does not divide the {num_attention_heads} attention heads"),
            ));
        }
        let own_head_dim = fields.size("head_dim")?;
        let latent = family.latent.map(|names| latent::read(fields, &names)).transpose()?;
        if latent.is_some() && num_key_value_heads != num_attention_heads {
            let problem = format!(
                "is {num_key_value_heads}; latent attention has as many as the {num_attention_heads} of queries"
            );
            return Err(fields.error("num_key_value_heads", problem));
        }
        let head_dim = match latent.map(|latent| latent.head_dim()).or(own_head_dim).or(sizes.head_dim) {
            Some(head_dim) => head_dim,
            None if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            None => {
                return Err(
                    fields.error("head_dim", "is missing, and hidden_size is no multiple of num_attention_heads")
                );
            }
        };
        let max_position_embeddings =
            fields.required("max_position_embeddings", Some(sizes.max_position_embeddings))?;
        let rotated_dim = latent.map_or(head_dim, |latent| latent.rotary_dim);
        let pairs = match latent {
            Some(latent) if !latent.interleaved => Pairs::Halves,
            _ => family.rotary.pairs,
        };
        let ropes = rope::read(fields, family, &rope::Sizes { head_dim: rotated_dim, max_position_embeddings, pairs })?;
        let (attention_kinds, kinds) = blocks::attention_kinds(fields, family, num_hidden_layers, ropes, head_dim)?;
        let experts = family.experts.map(|names| blocks::experts(fields, &names, num_hidden_layers)).transpose()?;
        let sparse = blocks::sparse(fields, family.experts.as_ref(), num_hidden_layers)?;
        let (linear, short_conv, is_recurrent) = match (&family.linear, &family.short_conv) {
            (Some(names), _) => {
                blocks::linear(fields, names, num_hidden_layers).map(|(config, is)| (Some(config), None, is))?
            }
            (None, Some(names)) => {
                blocks::short_conv(fields, names, num_hidden_layers).map(|(taps, is)| (None, Some(taps), is))?
            }
            (None, None) => (None, None, vec![false; num_hidden_layers]),
        };
        let factor = |key: Option<&str>| -> Result<Option<f64>, ModelError> {
            Ok(key.map(|key| fields.number(key)).transpose()?.flatten().filter(|factor| *factor != 1.0))
        };
        let embedding_scale = match family.embedding_scale {
            EmbeddingScale::One => None,
            EmbeddingScale::SqrtWidth => Some((hidden_size as f64).sqrt()),
            EmbeddingScale::Key(key) => factor(Some(key))?,
        };
        let score_scale = match family.score_scale {
            ScoreScale::HeadDim => match latent {
                Some(latent) => latent::score_scale(fields, &latent)?,
                None => 1.0 / (head_dim as f64).sqrt(),
            },
            ScoreScale::Scalar(key, default) => 1.0 / fields.number(key)?.unwrap_or(default).sqrt(),
            ScoreScale::Factor(key) => fields.number(key)?.unwrap_or(1.0),
        };
        // Where all blocks have experts, none has an MLP of a width of its own.
        let of_experts = experts.filter(|_| !sparse.contains(&false)).map(|experts| experts.intermediate_size);
        let uncapped = wrapper.is_some_and(|wrapper| wrapper.uncapped);
        let mut config = Self {
            family,
            roots: wrapper.map_or(family.roots, |wrapper| wrapper.roots),
            vocab_size: fields.required("vocab_size", sizes.vocab_size)?,
            hidden_size,
            intermediate_size: match family.mlp_width {
                Some(names) => names.read(fields, sizes.intermediate_size)?,
                None => fields.required("intermediate_size", of_experts.or(sizes.intermediate_size))?,
            },
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            activation: activation::activation(fields, family.activation)?,
            rms_norm_eps: fields.number(family.norm_eps_key)?.unwrap_or(family.rms_norm_eps),
            embedding_scale,
            residual_scale: factor(family.residual_scale)?,
            score_scale,
            score_softcap: softcap(fields, family.score_softcap)?,
            logit_softcap: softcap(fields, family.logit_softcap.filter(|_| !uncapped))?,
            logit_divisor: factor(family.logit_divisor)?,
            attention_kinds,
            linear,
            short_conv,
            experts,
            latent,
            tie_word_embeddings: own_tied.or(file_tied).or(tied).unwrap_or(family.tied),
            max_position_embeddings,
            bnb: BnbConfig::from_config(value, path)?,
            notes: Vec::new(),
            multi_token_layers: blocks::multi_token_layers(fields)?,
            layers: kinds
                .into_iter()
                .zip(sparse)
                .zip(is_recurrent)
                .map(|((kind, sparse), recurrent)| LayerConfig { kind, sparse, recurrent })
                .collect(),
            dense: Vec::new(),
            qk_normed: fields.switch(family.qk_normed)?,
            qkv_bias: fields.switch(family.qkv_bias)?,
            output_bias: fields.switch(family.output_bias)?,
            mlp_bias: fields.switch(family.mlp_bias)?,
            path: path.into(),
        };
        fields.nothing_left(family.harmless)?;
        config.notes = fields.notes();
        if config.linear.is_some() && config.activation != Activation::Silu {
            return Err(fields.error(family.activation.0, "is not silu, which linear attention has here"));
        }
        Ok(config)
    }

    /// Blocks with keys and values, which a token adds to; blocks with linear attention or a short convolution have a state of one
    /// size.
    pub fn attention_blocks(&self) -> usize {
        self.layers.iter().filter(|layer| !layer.recurrent).count()
    }

    /// Whether some blocks have a state in the place of keys and values, which no later token leaves as it was.
    pub fn has_states(&self) -> bool {
        self.linear.is_some() || self.short_conv.is_some()
    }

    /// How many blocks have experts.
    pub(crate) fn sparse_blocks(&self) -> usize {
        self.layers.iter().filter(|layer| layer.sparse).count()
    }

    /// What blocks have beside projections and norms, all of it held in f32: what linear attention and short convolutions have, sinks,
    /// and the corrections of routers.
    pub fn further_values(&self) -> usize {
        let of_linear = self.linear.map_or(0, |linear| linear.taps * linear.channels() + 2 * linear.value_heads);
        let of_block = of_linear + self.short_conv.map_or(0, |taps| taps * self.hidden_size);
        let sinks = self.family.sinks.map_or(0, |_| self.num_attention_heads);
        let sigmoid = self.experts.filter(|experts| experts.sigmoid.is_some()).map_or(0, |experts| experts.count);
        let corrections = self.sparse_blocks() * sigmoid;
        (self.num_hidden_layers - self.attention_blocks()) * of_block + self.attention_blocks() * sinks + corrections
    }

    /// The longest sequence that positions are made for: dynamic scaling goes beyond
    /// [`max_position_embeddings`](Self::max_position_embeddings), by its factor.
    pub fn max_tokens(&self) -> usize {
        let factor = self.attention_kinds.iter().map(|kind| match kind.rope.scaling {
            RopeScaling::Dynamic { factor, .. } => factor,
            _ => 1.0,
        });
        (self.max_position_embeddings as f64 * factor.fold(f64::INFINITY, f64::min).max(1.0)) as usize
    }

    /// Where the configuration was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// A soft cap; `null` turns off what would be on when the key is absent.
fn softcap(fields: &Fields, key: Option<(&str, Option<f64>)>) -> Result<Option<f64>, ModelError> {
    let Some((key, default)) = key else { return Ok(None) };
    Ok(if fields.is_null(key) { None } else { fields.number(key)?.or(default) })
}
