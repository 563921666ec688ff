//! The sizes of multi-head latent attention.

use super::fields::Fields;
use crate::ModelError;
use crate::family::Latent;

/// What attention over a cache takes of a token.
const WIDEST: usize = 1024;

/// Multi-head latent attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentConfig {
    /// Rank of queries; `None` where one projection makes them.
    pub query_rank: Option<usize>,
    /// Width of the vector that a token's keys and values are made of.
    pub rank: usize,
    /// Dimensions of a query or key that are not rotated.
    pub plain_dim: usize,
    /// Dimensions of a query that are rotated, and of the key that all heads share.
    pub rotary_dim: usize,
    /// Width of a value.
    pub value_dim: usize,
    /// Whether neighbours are rotated as pairs.
    pub interleaved: bool,
}

impl LatentConfig {
    /// Width of a query or key.
    pub fn query_dim(&self) -> usize {
        self.plain_dim + self.rotary_dim
    }

    /// Numbers of a token that a cache holds: the vector, and what is rotated of keys.
    pub fn cached_dim(&self) -> usize {
        self.rank + self.rotary_dim
    }

    /// Width of a head as attention computes it: keys or values are filled up with zeros where they are narrower.
    pub fn head_dim(&self) -> usize {
        self.query_dim().max(self.value_dim)
    }
}

/// Reads the sizes.
pub(super) fn read(fields: &Fields, names: &Latent) -> Result<LatentConfig, ModelError> {
    const QUERY_RANK: &str = "q_lora_rank";
    let [query_rank, rank, plain, rotary, value] = names.sizes;
    let size = |key, default| fields.required(key, Some(default));
    let latent = LatentConfig {
        // Null turns off what would be on when the key is absent.
        query_rank: match fields.is_null(QUERY_RANK) {
            true => fields.size(QUERY_RANK)?,
            false => Some(size(QUERY_RANK, query_rank)?),
        },
        rank: size("kv_lora_rank", rank)?,
        plain_dim: size("qk_nope_head_dim", plain)?,
        rotary_dim: size("qk_rope_head_dim", rotary)?,
        value_dim: size("v_head_dim", value)?,
        interleaved: fields.flag("rope_interleave")?.unwrap_or(true),
    };
    match latent.cached_dim() <= WIDEST {
        true => Ok(latent),
        false => {
            let LatentConfig { rank, rotary_dim, .. } = latent;
            let problem = format!(
                "is {rank}, with {rotary_dim} dimensions that are rotated: up to {WIDEST} of both are supported"
            );
            Err(fields.error("kv_lora_rank", problem))
        }
    }
}

/// The factor of scores: that of YaRN's longer contexts goes into it, where `mscale_all_dim` says so.
pub(super) fn score_scale(fields: &Fields, latent: &LatentConfig) -> Result<f64, ModelError> {
    let scale = 1.0 / (latent.query_dim() as f64).sqrt();
    let scaling = match fields.object("rope_scaling")? {
        Some(scaling) => Some(scaling),
        None => fields.object("rope_parameters")?,
    };
    let Some(scaling) = scaling else { return Ok(scale) };
    // A 0 stands for an absent one.
    let all = scaling.get("mscale_all_dim").and_then(serde_json::Value::as_f64).filter(|all| *all != 0.0);
    let Some(all) = all else { return Ok(scale) };
    let factor = scaling.need("factor")?;
    let magnitude = if factor <= 1.0 { 1.0 } else { 0.1 * all * factor.ln() + 1.0 };
    Ok(scale * magnitude * magnitude)
}
