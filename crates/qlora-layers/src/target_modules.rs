//! Which linear layers an adapter goes on, by PEFT's rules.
//!
//! - A list: a module matches when its path equals an entry or ends with `.` and the entry.
//! - A string: a regular expression that must match the whole path.
//! - `"all-linear"` in any case: every linear layer but the output head.
//!
//! `rank_pattern` and `alpha_pattern` keys match as the regular expression `(.*\.)?(key)$` from the
//! start of the path; the first key that matches counts. `layers_to_transform` keeps the modules
//! whose path has one of those numbers as its layer.

use crate::{LayerError, LoraConfig};
use fancy_regex::Regex;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// The modules named by `target_modules` or `exclude_modules`.
#[derive(Clone, Debug, PartialEq)]
pub enum TargetModules {
    /// Every linear layer but the output head.
    AllLinear,
    /// Module names or path suffixes.
    Names(Vec<String>),
    /// A regular expression for the whole path.
    Pattern(String),
}

impl fmt::Display for TargetModules {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::AllLinear => f.write_str("\"all-linear\""),
            Self::Names(names) => write!(f, "{names:?}"),
            Self::Pattern(pattern) => write!(f, "{pattern:?}"),
        }
    }
}

impl From<String> for TargetModules {
    fn from(text: String) -> Self {
        match text.eq_ignore_ascii_case("all-linear") {
            true => Self::AllLinear,
            false => Self::Pattern(text),
        }
    }
}

impl Serialize for TargetModules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::AllLinear => serializer.serialize_str("all-linear"),
            Self::Names(names) => names.serialize(serializer),
            Self::Pattern(pattern) => serializer.serialize_str(pattern),
        }
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a list of module names, a regular expression or \"all-linear\"")]
        enum Form {
            Text(String),
            Names(Vec<String>),
        }
        Ok(match Form::deserialize(deserializer)? {
            Form::Text(text) => text.into(),
            Form::Names(names) => Self::Names(names),
        })
    }
}

/// An adapter to create.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// Path of the module, as in the checkpoint (`model.layers.0.self_attn.q_proj`).
    pub path: String,
    /// Rank of its adapter.
    pub rank: usize,
    /// Factor of its update.
    pub scaling: f32,
}

/// A compiled [`TargetModules`].
enum Matcher {
    AllLinear,
    Names(Vec<String>),
    Pattern(Regex),
}

impl Matcher {
    fn new(modules: &TargetModules, field: &'static str) -> Result<Self, LayerError> {
        Ok(match modules {
            TargetModules::AllLinear => Self::AllLinear,
            TargetModules::Names(names) => Self::Names(names.clone()),
            TargetModules::Pattern(pattern) => Self::Pattern(regex(&format!("^(?:{pattern})$"), pattern, field)?),
        })
    }

    fn matches(&self, module: &LinearModule) -> bool {
        match self {
            Self::AllLinear => !module.is_output_head,
            Self::Names(names) => names.iter().any(|name| has_suffix(&module.path, name)),
            Self::Pattern(pattern) => pattern.is_match(&module.path).unwrap_or(false),
        }
    }
}

fn has_suffix(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn regex(full: &str, given: &str, field: &'static str) -> Result<Regex, LayerError> {
    Regex::new(full).map_err(|source| LayerError::Pattern { field, pattern: given.into(), source: Box::new(source) })
}

/// A linear layer of a model, as seen by [`resolve`].
#[derive(Clone, Debug)]
pub struct LinearModule {
    /// Path of the module, as in the checkpoint.
    pub path: String,
    /// Whether it computes the logits.
    pub is_output_head: bool,
}

/// The adapters that `config` asks for, in the order of `modules`.
///
/// # Errors
/// [`LayerError::Config`] or [`LayerError::Pattern`] for a bad setting, [`LayerError::NoTarget`] with the names
/// to choose from when nothing matches.
pub fn resolve(config: &LoraConfig, modules: &[LinearModule]) -> Result<Vec<Target>, LayerError> {
    config.validate()?;
    let targets = Matcher::new(&config.target_modules, "target_modules")?;
    let excluded = config.exclude_modules.as_ref().map(|m| Matcher::new(m, "exclude_modules")).transpose()?;
    let ranks = compile(&config.rank_pattern, "rank_pattern")?;
    let alphas = compile(&config.alpha_pattern, "alpha_pattern")?;
    let mut found = Vec::new();
    for module in modules {
        let in_layers = match (&config.layers_to_transform, layer_index(&module.path)) {
            (None, _) => true,
            (Some(layers), Some(index)) => layers.contains(&index),
            (Some(_), None) => false,
        };
        if !in_layers || !targets.matches(module) || excluded.as_ref().is_some_and(|e| e.matches(module)) {
            continue;
        }
        let rank = first_match(&ranks, &module.path).unwrap_or(config.rank);
        let alpha = first_match(&alphas, &module.path).unwrap_or(config.alpha);
        found.push(Target { path: module.path.clone(), rank, scaling: config.scaling(rank, alpha) });
    }
    match found.is_empty() {
        true => Err(LayerError::NoTarget { given: config.target_modules.to_string(), candidates: candidates(modules) }),
        false => Ok(found),
    }
}

fn compile<T: Copy>(entries: &[(String, T)], field: &'static str) -> Result<Vec<(Regex, T)>, LayerError> {
    entries.iter().map(|(key, value)| Ok((regex(&format!(r"^(.*\.)?({key})$"), key, field)?, *value))).collect()
}

fn first_match<T: Copy>(entries: &[(Regex, T)], path: &str) -> Option<T> {
    entries.iter().find(|(pattern, _)| pattern.is_match(path).unwrap_or(false)).map(|(_, value)| *value)
}

/// The number in `….layers.<number>.…`: the first path segment that is one.
fn layer_index(path: &str) -> Option<usize> {
    path.split('.').find_map(|segment| segment.parse().ok())
}

/// The last path segments, each once, in order.
fn candidates(modules: &[LinearModule]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for module in modules {
        let name = module.path.rsplit('.').next().unwrap_or(&module.path);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Vec<LinearModule> {
        let mut modules: Vec<LinearModule> = (0..12)
            .flat_map(|i| {
                ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj"].map(|m| format!("model.layers.{i}.{m}"))
            })
            .map(|path| LinearModule { path, is_output_head: false })
            .collect();
        modules.push(LinearModule { path: "lm_head".into(), is_output_head: true });
        modules
    }

    fn paths(config: &LoraConfig) -> Vec<String> {
        resolve(config, &model()).expect("matches").into_iter().map(|t| t.path).collect()
    }

    #[test]
    fn all_linear_in_any_case_leaves_out_the_head() {
        for text in ["all-linear", "All-Linear"] {
            let config = LoraConfig { target_modules: text.to_string().into(), ..Default::default() };
            assert_eq!(paths(&config).len(), 36);
        }
    }

    #[test]
    fn a_name_matches_whole_segments_only() {
        let config = LoraConfig {
            target_modules: TargetModules::Names(vec!["proj".into(), "lm_head".into()]),
            ..Default::default()
        };
        assert_eq!(paths(&config), ["lm_head"]);
    }

    #[test]
    fn a_pattern_must_match_the_whole_path() {
        let with = |pattern: &str| LoraConfig { target_modules: pattern.to_string().into(), ..Default::default() };
        assert_eq!(paths(&with(r".*layers\.(0|11)\.mlp\.gate_proj")).len(), 2);
        assert!(matches!(resolve(&with("q_proj"), &model()), Err(LayerError::NoTarget { .. })));
    }

    #[test]
    fn layers_and_exclusions_narrow_the_choice() {
        let config = LoraConfig {
            layers_to_transform: Some(vec![1, 10]),
            exclude_modules: Some(TargetModules::Names(vec!["mlp.gate_proj".into()])),
            ..Default::default()
        };
        assert_eq!(
            paths(&config),
            [
                "model.layers.1.self_attn.q_proj",
                "model.layers.1.self_attn.v_proj",
                "model.layers.10.self_attn.q_proj",
                "model.layers.10.self_attn.v_proj"
            ]
        );
    }

    #[test]
    fn patterns_set_rank_and_alpha_and_the_first_wins() {
        let config = LoraConfig {
            rank: 8,
            alpha: 16.0,
            rank_pattern: vec![(r"layers.3.self_attn.q_proj".into(), 4), ("q_proj".into(), 2)],
            alpha_pattern: vec![("v_proj".into(), 4.0)],
            ..Default::default()
        };
        let targets = resolve(&config, &model()).expect("matches");
        let of = |path: &str| targets.iter().find(|t| t.path == path).map(|t| (t.rank, t.scaling));
        assert_eq!(of("model.layers.3.self_attn.q_proj"), Some((4, 4.0)));
        assert_eq!(of("model.layers.4.self_attn.q_proj"), Some((2, 8.0)));
        assert_eq!(of("model.layers.4.self_attn.v_proj"), Some((8, 0.5)));
        assert_eq!(of("model.layers.4.mlp.gate_proj"), Some((8, 2.0)));
    }

    #[test]
    fn nothing_matched_lists_the_candidates() {
        let config = LoraConfig { target_modules: TargetModules::Names(vec!["query".into()]), ..Default::default() };
        let message = resolve(&config, &model()).expect_err("no such module").to_string();
        assert!(message.contains("q_proj, v_proj, gate_proj, lm_head"), "{message}");
    }

    #[test]
    fn ranges_are_checked() {
        for (config, field) in [
            (LoraConfig { rank: 0, ..Default::default() }, "rank"),
            (LoraConfig { alpha: -1.0, ..Default::default() }, "alpha"),
            (LoraConfig { dropout: 1.0, ..Default::default() }, "dropout"),
            (LoraConfig { target_modules: TargetModules::Pattern("(".into()), ..Default::default() }, "target_modules"),
        ] {
            let message = resolve(&config, &model()).expect_err("out of range").to_string();
            assert!(message.contains(field), "{message}");
        }
    }
}
