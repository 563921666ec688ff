//! `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before).

use super::fields::Fields;
use crate::ModelError;
use crate::family::{Family, Local};
use crate::rope::{Pairs, QueryGrowth, Rope, RopeScaling};
use serde_json::Value;

/// The names that blocks without and with a window have in `rope_parameters`.
const KINDS: [&str; 2] = ["full_attention", "sliding_attention"];

/// What scalings refer to beyond their own keys.
pub(super) struct Sizes {
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub pairs: Pairs,
}

/// The rotary embeddings of blocks without and with a window.
pub(super) fn read(fields: &Fields, family: &Family, sizes: &Sizes) -> Result<[Rope; 2], ModelError> {
    // transformers prefers the older key where both are there.
    let scaling = fields.object("rope_scaling")?;
    let parameters = fields.object("rope_parameters")?;
    let theta = fields.number("rope_theta")?;
    let partial = fields.number("partial_rotary_factor")?;
    let outer = Outer { fields, family, sizes, partial: partial.or(family.rotary.partial) };
    let Some(local) = family.rotary.local else {
        let inner = scaling.or(parameters);
        let rope = outer.rope(inner.as_ref(), theta.unwrap_or(family.rotary.theta))?;
        return Ok([rope.clone(), rope]);
    };
    let theta = theta.unwrap_or(family.rotary.theta);
    let local_theta = match local {
        Local::Theta(key, default) => fields.number(key)?.unwrap_or(default),
        Local::SameTheta => theta,
    };
    if let Some(inner) = parameters {
        if scaling.is_some() {
            return Err(
                fields.error("rope_scaling", "stands beside rope_parameters, which replaced it; remove one of them")
            );
        }
        if let Some(key) = inner.keys().find(|key| !KINDS.contains(key)) {
            return Err(
                inner.error(key, format!("is not known; there has to be one object each for {}", KINDS.join(" and ")))
            );
        }
        let [global, local] = [inner.object(KINDS[0])?, inner.object(KINDS[1])?];
        return Ok([outer.rope(global.as_ref(), theta)?, outer.rope(local.as_ref(), local_theta)?]);
    }
    Ok([outer.rope(scaling.as_ref(), theta)?, outer.rope(None, local_theta)?])
}

struct Outer<'a> {
    fields: &'a Fields<'a>,
    family: &'a Family,
    sizes: &'a Sizes,
    partial: Option<f64>,
}

impl Outer<'_> {
    fn rope(&self, inner: Option<&Fields>, theta: f64) -> Result<Rope, ModelError> {
        let rope = |theta, dim, scaling, query_growth| {
            let pairs = self.sizes.pairs;
            let turned = if pairs == Pairs::Adjacent { self.sizes.head_dim } else { dim };
            Rope { theta, dim, turned, scaling, pairs, query_growth }
        };
        let Some(inner) = inner else {
            if self.family.rotary.needs_scaling {
                return Err(self.fields.error("rope_parameters", "is missing: it has to say how positions are scaled"));
            }
            self.growth(None)?;
            return Ok(rope(theta, self.dim(self.partial, self.fields)?, RopeScaling::Default, None));
        };
        let theta = inner.number("rope_theta")?.unwrap_or(theta);
        let dim = match inner.number("partial_rotary_factor")? {
            Some(factor) => self.dim(Some(factor), inner)?,
            None => self.dim(self.partial, self.fields)?,
        };
        let kinds = [inner.text("rope_type")?, inner.text("type")?];
        let kind = kinds.into_iter().flatten().next().unwrap_or("default");
        let (alpha, mut theta) = (self.alpha(inner, kind)?, theta);
        let scaling = match kind {
            "default" => RopeScaling::Default,
            // The earlier name of "default" where a token has several positions.
            "mrope" if self.family.rotary.harmless.contains(&"mrope_section") => RopeScaling::Default,
            "dynamic" if alpha.is_some() => {
                let dim = dim as f64;
                theta *= alpha.unwrap_or(1.0).powf(dim / (dim - 2.0));
                RopeScaling::Default
            }
            "linear" => RopeScaling::Linear { factor: inner.need("factor")? },
            "dynamic" => RopeScaling::Dynamic {
                factor: inner.need("factor")?,
                max_position_embeddings: self.sizes.max_position_embeddings,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: inner.need("factor")?,
                low_freq_factor: inner.need("low_freq_factor")?,
                high_freq_factor: inner.need("high_freq_factor")?,
                original_max_position_embeddings: self.original(inner)?,
            },
            "longrope" => self.long(inner, dim)?,
            "su" | "yarn" if self.family.rotary.long_aliases => self.long(inner, dim)?,
            "yarn" => self.yarn(inner)?,
            other => {
                return Err(inner.error(
                    "rope_type",
                    format!("is \"{other}\"; supported: default, linear, dynamic, llama3, yarn, longrope"),
                ));
            }
        };
        let growth = self.growth(Some(inner))?;
        inner.nothing_left(self.family.rotary.harmless)?;
        Ok(rope(theta, dim, scaling, growth))
    }

    /// A fixed factor of theta, where a family gives one to "dynamic", with keys that mean nothing beside it.
    fn alpha(&self, inner: &Fields, kind: &str) -> Result<Option<f64>, ModelError> {
        if !self.family.rotary.alpha || kind != "dynamic" {
            return Ok(None);
        }
        let alpha = inner.number("alpha")?;
        if alpha.is_some() {
            inner.take_note_of(&["factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"]);
        }
        Ok(alpha)
    }

    /// The growth of queries, which a family that knows it has to say.
    fn growth(&self, inner: Option<&Fields>) -> Result<Option<QueryGrowth>, ModelError> {
        if !self.family.rotary.query_growth {
            return Ok(None);
        }
        const KEY: &str = "llama_4_scaling_beta";
        let missing =
            |fields: &Fields, key| fields.error(key, "is missing: rope_parameters has to say how queries grow");
        let inner = inner.ok_or_else(|| missing(self.fields, KEY))?;
        let beta = inner.get(KEY).ok_or_else(|| missing(inner, KEY))?;
        let beta = beta.as_f64().filter(|beta| beta.is_finite() && *beta >= 0.0);
        let beta = beta.ok_or_else(|| inner.error(KEY, "is no number from 0 on"))?;
        let original_max_position_embeddings = self.original(inner)?;
        Ok((beta > 0.0).then_some(QueryGrowth { beta, original_max_position_embeddings }))
    }

    /// Dimensions of a head that are rotated.
    fn dim(&self, factor: Option<f64>, fields: &Fields) -> Result<usize, ModelError> {
        let factor = factor.unwrap_or(1.0);
        if factor != 1.0 && self.family.rotary.partial.is_none() {
            let problem = format!("is {factor}; only 1 is supported for {}", self.family.model_type);
            return Err(fields.error("partial_rotary_factor", problem));
        }
        let dim = (self.sizes.head_dim as f64 * factor) as usize;
        match dim.is_multiple_of(2) && (1..=self.sizes.head_dim).contains(&dim) {
            true => Ok(dim),
            false if factor == 1.0 => {
                Err(self.fields.error("head_dim", format!("is {dim}; rotary embeddings need an even one")))
            }
            false => Err(fields.error(
                "partial_rotary_factor",
                format!(
                    "is {factor}, {dim} of {} dimensions; it has to be an even number of them",
                    self.sizes.head_dim
                ),
            )),
        }
    }

    /// The context length before an extension. A key of the whole file goes before that of the scaling.
    fn original(&self, inner: &Fields) -> Result<f64, ModelError> {
        let outer = self.fields.number("original_max_position_embeddings")?;
        let outer = outer.or(self.family.rotary.original_context.map(|size| size as f64));
        let inner = inner.number("original_max_position_embeddings")?;
        let original = outer.or(inner).unwrap_or(self.sizes.max_position_embeddings as f64);
        match original > 1.0 {
            true => Ok(original),
            false => {
                Err(self.fields.error("original_max_position_embeddings", format!("is {original}; it is a length")))
            }
        }
    }

    fn factor(&self, inner: &Fields, original: f64) -> Result<f64, ModelError> {
        Ok(inner.number("factor")?.unwrap_or(self.sizes.max_position_embeddings as f64 / original))
    }

    fn yarn(&self, inner: &Fields) -> Result<RopeScaling, ModelError> {
        let original = self.original(inner)?;
        let factor = self.factor(inner, original)?;
        let magnitude = |scale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 };
        // A 0 stands for an absent one.
        let scale_of = |key: &str| match inner.get(key).and_then(Value::as_f64) {
            Some(0.0) => Ok(None),
            _ => inner.number(key),
        };
        let (scale, all) = (scale_of("mscale")?, scale_of("mscale_all_dim")?);
        let attention_factor = match (inner.number("attention_factor")?, scale, all) {
            (Some(factor), ..) => factor,
            (None, Some(scale), Some(all)) => magnitude(scale) / magnitude(all),
            _ => magnitude(1.0),
        };
        Ok(RopeScaling::Yarn {
            factor,
            attention_factor,
            beta_fast: inner.number("beta_fast")?.unwrap_or(32.0),
            beta_slow: inner.number("beta_slow")?.unwrap_or(1.0),
            original_max_position_embeddings: original,
            truncate: inner.flag("truncate")?.unwrap_or(true),
        })
    }

    fn long(&self, inner: &Fields, dim: usize) -> Result<RopeScaling, ModelError> {
        let factors = |key: &str| {
            let positive = |value: &Value| value.as_f64().filter(|number| *number > 0.0 && number.is_finite());
            let list = inner.list(key, "positive numbers", positive)?.ok_or_else(|| inner.error(key, "is missing"))?;
            match list.len() == dim / 2 {
                true => Ok(list),
                false => Err(inner.error(
                    key,
                    format!("has {} numbers; there are {} pairs of dimensions to rotate", list.len(), dim / 2),
                )),
            }
        };
        let original = self.original(inner)?;
        let factor = self.factor(inner, original)?;
        let attention_factor = match inner.number("attention_factor")? {
            Some(factor) => factor,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / original.ln()).sqrt(),
        };
        Ok(RopeScaling::Long {
            short: factors("short_factor")?,
            long: factors("long_factor")?,
            attention_factor,
            original_max_position_embeddings: original,
        })
    }
}
