//! What the blocks of a model differ in: their window, and whether they have linear attention or experts.

use super::fields::Fields;
use crate::ModelError;
use crate::family::{Experts, Family, Linear, MlpWidth, Scores, SharedWidth, ShortConvNames, Windowed};
use crate::rope::Rope;
use qlora_layers::ops::fused::MAX_TAPS;

/// How blocks of a kind attend.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionKind {
    /// The number of tokens that a token sees, itself included; `None` for all before it.
    pub window: Option<usize>,
    /// Rotary embeddings of queries and keys.
    pub rope: Rope,
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertsConfig {
    /// Experts in a block.
    pub count: usize,
    /// Experts that a token is sent to.
    pub per_token: usize,
    /// Width of an expert.
    pub intermediate_size: usize,
    /// Whether the weights of a token's experts are divided by their sum.
    pub normalise: bool,
    /// Width of the MLP that all tokens go through beside their experts; 0 where there is none.
    pub shared_size: usize,
    /// Where scores are sigmoids; their softmax otherwise.
    pub sigmoid: Option<GroupedScores>,
}

/// Scores of experts in groups: sigmoids, to which a correction is added for the choice.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupedScores {
    /// Groups that experts lie in, of one size.
    pub groups: usize,
    /// Groups that a token's experts come from: those whose two best sum up to most.
    pub groups_per_token: usize,
    /// What weights are multiplied by.
    pub factor: f64,
}

/// Linear attention with the gated delta rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearAttentionConfig {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values; a multiple of those of keys.
    pub value_heads: usize,
    /// Width of a query or key.
    pub key_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
    /// Tokens that the short convolution looks at.
    pub taps: usize,
}

impl LinearAttentionConfig {
    /// Widths of all queries, keys and values.
    pub fn widths(&self) -> [usize; 3] {
        let keys = self.key_heads * self.key_dim;
        [keys, keys, self.value_heads * self.value_dim]
    }

    /// What the short convolution goes over.
    pub fn channels(&self) -> usize {
        self.widths().iter().sum()
    }
}

/// A block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LayerConfig {
    /// Index into [`ModelConfig::attention_kinds`](super::ModelConfig::attention_kinds).
    pub kind: usize,
    /// Whether it has experts in the place of the MLP.
    pub sparse: bool,
    /// Whether it has linear attention or a short convolution in the place of attention.
    pub recurrent: bool,
}

const WINDOW: &str = "sliding_window";
const LAYER_TYPES: &str = "layer_types";
const VALUE_HEADS: &str = "linear_num_value_heads";
const TAPS: &str = "linear_conv_kernel_dim";

/// The kinds of attention, and which of them each block has.
pub(super) fn attention_kinds(
    fields: &Fields,
    family: &Family,
    layers: usize,
    [global_rope, local_rope]: [Rope; 2],
    head_dim: usize,
) -> Result<(Vec<AttentionKind>, Vec<usize>), ModelError> {
    let window = &family.window;
    let enabled = window.switch.map(|key| fields.flag(key)).transpose()?.is_none_or(|on| on.unwrap_or(false));
    let width = match window.blocks {
        Windowed::None => None,
        _ if fields.is_null(WINDOW) => None,
        _ => fields.size(WINDOW)?.or(window.width).filter(|_| enabled),
    };
    let rotated = rotated(fields, family, layers)?;
    let local: Vec<bool> = match window.blocks {
        Windowed::None => vec![false; layers],
        Windowed::All => vec![width.is_some(); layers],
        Windowed::From(key, default) => {
            let first = count(fields, key)?.unwrap_or(default);
            let otherwise = || (0..layers).map(|index| width.is_some() && index >= first).collect();
            layer_types(fields, layers, "sliding_attention")?.unwrap_or_else(otherwise)
        }
        Windowed::AllButEvery(key, default) => {
            let every = key.map(|key| fields.size(key)).transpose()?.flatten().unwrap_or(default);
            layer_types(fields, layers, "sliding_attention")?
                .unwrap_or_else(|| (1..=layers).map(|n| n % every != 0).collect())
        }
        Windowed::Unrotated => {
            let otherwise = || rotated.iter().map(|rotated| width.is_some() && !rotated).collect();
            layer_types(fields, layers, "sliding_attention")?.unwrap_or_else(otherwise)
        }
    };
    if local.contains(&true) && width.is_none() {
        return Err(fields.error(WINDOW, "is missing, and some layers have a window"));
    }
    let still = |rope: &Rope| Rope { dim: 0, turned: head_dim, ..rope.clone() };
    // Of the four that there can be, those that some block has.
    let all = [(false, true), (true, true), (false, false), (true, false)];
    let used =
        all.into_iter().filter(|kind| local.iter().copied().zip(rotated.iter().copied()).any(|each| each == *kind));
    let used: Vec<(bool, bool)> = used.collect();
    let kind = |&(local, rotated): &(bool, bool)| {
        let rope = if local { &local_rope } else { &global_rope };
        let rope = if rotated { rope.clone() } else { still(rope) };
        AttentionKind { window: width.filter(|_| local), rope }
    };
    let kinds = local.into_iter().zip(rotated).map(|each| used.iter().position(|kind| *kind == each).unwrap_or(0));
    Ok((used.iter().map(kind).collect(), kinds.collect()))
}

/// Whether each block has rotary embeddings.
fn rotated(fields: &Fields, family: &Family, layers: usize) -> Result<Vec<bool>, ModelError> {
    let Some((list, interval, default)) = family.rotary.unrotated else { return Ok(vec![true; layers]) };
    let every = fields.size(interval)?.unwrap_or(default);
    let read = |value: &serde_json::Value| match (value.as_u64(), value.as_bool()) {
        (Some(0), _) | (_, Some(false)) => Some(false),
        (Some(1), _) | (_, Some(true)) => Some(true),
        _ => None,
    };
    match fields.list(list, "1 (rotated) and 0 (not rotated)", read)? {
        Some(found) if found.len() < layers => {
            Err(fields.error(list, format!("has {} entries; there are {layers} layers", found.len())))
        }
        Some(found) => Ok(found[..layers].to_vec()),
        None => Ok((1..=layers).map(|n| n % every != 0).collect()),
    }
}

/// Sizes of linear attention, and which blocks have it.
pub(super) fn linear(
    fields: &Fields,
    names: &Linear,
    layers: usize,
) -> Result<(LinearAttentionConfig, Vec<bool>), ModelError> {
    let size = |key, default| fields.required(key, Some(default));
    let config = LinearAttentionConfig {
        key_heads: size("linear_num_key_heads", 16)?,
        value_heads: size(VALUE_HEADS, 32)?,
        key_dim: size("linear_key_head_dim", 128)?,
        value_dim: size("linear_value_head_dim", 128)?,
        taps: fields.bounded(TAPS, size(TAPS, 4)?, MAX_TAPS)?,
    };
    let LinearAttentionConfig { key_heads, value_heads, .. } = config;
    if !value_heads.is_multiple_of(key_heads) {
        let problem = format!("is {value_heads}, no multiple of the {key_heads} heads of keys");
        return Err(fields.error(VALUE_HEADS, problem));
    }
    let (key, default) = names.all_but_every;
    let every = fields.size(key)?.unwrap_or(default);
    let otherwise = || (1..=layers).map(|n| n % every != 0).collect();
    Ok((config, layer_types(fields, layers, "linear_attention")?.unwrap_or_else(otherwise)))
}

/// The tokens that short convolutions look at, and which blocks have one.
pub(super) fn short_conv(
    fields: &Fields,
    names: &ShortConvNames,
    layers: usize,
) -> Result<(usize, Vec<bool>), ModelError> {
    let (key, default) = names.taps;
    let taps = fields.bounded(key, fields.required(key, Some(default))?, MAX_TAPS)?;
    let index = |value: &serde_json::Value| value.as_u64().and_then(|index| usize::try_from(index).ok());
    let attention = fields.list(names.attention_blocks, "layer numbers", index)?;
    let otherwise = || (0..layers).map(|index| attention.as_ref().is_some_and(|list| !list.contains(&index))).collect();
    Ok((taps, layer_types(fields, layers, names.kind)?.unwrap_or_else(otherwise)))
}

/// Whether each block is of a kind that is not full attention, as `layer_types` says.
fn layer_types(fields: &Fields, layers: usize, other: &str) -> Result<Option<Vec<bool>>, ModelError> {
    let read = |value: &serde_json::Value| match value.as_str() {
        Some("full_attention") => Some(false),
        Some(kind) if kind == other => Some(true),
        _ => None,
    };
    let types = fields.list(LAYER_TYPES, &format!("\"full_attention\" and \"{other}\""), read)?;
    match types {
        Some(types) if types.len() != layers => {
            Err(fields.error(LAYER_TYPES, format!("has {} entries; there are {layers} layers", types.len())))
        }
        types => Ok(types),
    }
}

/// A number that may be 0.
fn count(fields: &Fields, key: &str) -> Result<Option<usize>, ModelError> {
    let read = |value: &serde_json::Value| {
        let number = value.as_u64().and_then(|number| usize::try_from(number).ok());
        number.ok_or_else(|| fields.error(key, format!("is {value}; expected a number from 0 on")))
    };
    fields.get(key).map(read).transpose()
}

/// The keys with the number of blocks that predict tokens beyond the next one.
const MULTI_TOKEN: [&str; 3] = ["num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_layers"];

/// How many blocks predict tokens beyond the next one.
pub(super) fn multi_token_layers(fields: &Fields) -> Result<usize, ModelError> {
    let counts = MULTI_TOKEN.iter().map(|key| count(fields, key)).collect::<Result<Vec<_>, _>>()?;
    Ok(counts.into_iter().flatten().max().unwrap_or(0).min(1000))
}

/// All experts of a model.
const MOST_EXPERTS: usize = 100_000;

/// The sizes of a mixture of experts.
pub(super) fn experts(fields: &Fields, names: &Experts, layers: usize) -> Result<ExpertsConfig, ModelError> {
    let (count_keys, default_count) = names.count;
    let counts = count_keys.iter().map(|key| fields.size(key)).collect::<Result<Vec<_>, _>>()?;
    let count = counts.into_iter().flatten().next().unwrap_or(default_count);
    fields.bounded(count_keys[0], count, MOST_EXPERTS / layers)?;
    let (per_token_key, default_per_token) = names.per_token;
    let per_token = fields.required(per_token_key, Some(default_per_token))?;
    if per_token > count {
        return Err(fields.error(per_token_key, format!("is {per_token}; there are only {count} experts")));
    }
    let (width_key, default_width) = names.width;
    let intermediate_size = fields.required(width_key, default_width)?;
    let shared_size = match names.shared.map(|shared| shared.width) {
        None => 0,
        Some(SharedWidth::Key(key, default)) => fields.required(key, Some(default))?,
        Some(SharedWidth::Experts(key, default)) => {
            let shared = self::count(fields, key)?.unwrap_or(default);
            intermediate_size * fields.bounded(key, shared, MOST_EXPERTS)?
        }
    };
    Ok(ExpertsConfig {
        count,
        per_token,
        intermediate_size,
        normalise: fields.switch(names.normalise)?,
        shared_size,
        sigmoid: grouped(fields, names, count, per_token)?,
    })
}

/// Scores in groups, if they are.
fn grouped(
    fields: &Fields,
    names: &Experts,
    count: usize,
    per_token: usize,
) -> Result<Option<GroupedScores>, ModelError> {
    let Scores::Sigmoid { groups, groups_per_token, factor, .. } = names.scores else { return Ok(None) };
    let size = |(key, default)| fields.required(key, Some(default));
    let scores = GroupedScores {
        groups: size(groups)?,
        groups_per_token: size(groups_per_token)?,
        factor: fields.number(factor.0)?.unwrap_or(factor.1),
    };
    let GroupedScores { groups: number, groups_per_token: chosen, .. } = scores;
    // Of a group the two best are looked at, where there is a choice.
    if !count.is_multiple_of(number) || (chosen < number && count / number < 2) {
        let problem = format!("is {number}, which does not divide {count} experts into groups of two and more");
        return Err(fields.error(groups.0, problem));
    }
    if chosen > number || chosen * (count / number) < per_token {
        let problem = format!("is {chosen}: {per_token} experts of a token don't come from so many of {number} groups");
        return Err(fields.error(groups_per_token.0, problem));
    }
    Ok(Some(scores))
}

impl MlpWidth {
    /// The width that keys stand for.
    pub(super) fn read(&self, fields: &Fields, default: Option<usize>) -> Result<usize, ModelError> {
        let width = match fields.size(self.key)? {
            Some(width) => width,
            None => fields.required("intermediate_size", default)?,
        };
        fields.take_note_of(&["intermediate_size"]);
        let (factor, multiple) = (fields.number(self.factor.0)?, fields.size(self.multiple.0)?);
        if !fields.flag(self.switch)?.unwrap_or(true) {
            return Ok(width);
        }
        let two_thirds = 2 * width / 3;
        let width = match factor.or(Some(self.factor.1).filter(|_| !fields.is_null(self.factor.0))) {
            None => two_thirds,
            Some(factor) => {
                // No product of it overflows.
                let width = (factor * two_thirds as f64).min(f64::from(u32::MAX)) as usize;
                width.next_multiple_of(multiple.unwrap_or(self.multiple.1))
            }
        };
        match width {
            1.. if width <= u32::MAX as usize => Ok(width),
            _ => Err(fields.error(self.key, format!("stands for an MLP of width {width}"))),
        }
    }
}

/// Which blocks have experts.
pub(super) fn sparse(fields: &Fields, names: Option<&Experts>, layers: usize) -> Result<Vec<bool>, ModelError> {
    let Some(names) = names else { return Ok(vec![false; layers]) };
    let every = names.every.map(|key| fields.size(key)).transpose()?.flatten().unwrap_or(1);
    let index = |value: &serde_json::Value| value.as_u64().and_then(|index| usize::try_from(index).ok());
    let dense = match names.dense_blocks {
        Some(key) => fields.list(key, "layer numbers", index)?.unwrap_or_default(),
        None => Vec::new(),
    };
    let first = match names.dense_first {
        Some((key, default)) => count(fields, key)?.unwrap_or(default),
        None => 0,
    };
    if let Some(key) = names.block_types {
        let read = |value: &serde_json::Value| match value.as_str() {
            Some("sparse") => Some(true),
            Some("dense") => Some(false),
            _ => None,
        };
        match fields.list(key, "\"dense\" and \"sparse\"", read)? {
            Some(types) if types.len() != layers => {
                return Err(fields.error(key, format!("has {} entries; there are {layers} layers", types.len())));
            }
            Some(types) => return Ok(types),
            None => {}
        }
    }
    let sparse = |index: usize| index >= first && !dense.contains(&index) && (index + 1).is_multiple_of(every);
    Ok((0..layers).map(sparse).collect())
}
