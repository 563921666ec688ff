//! Which linear layers an adapter goes on, by PEFT's rules.
//!
//! - A list: a module matches when its path equals an entry or ends with `.` and the entry.
//! - A string: a regular expression that must match the whole path.
//! - `"all-linear"` in any case: every linear layer but the output head and routers.
//!
//! `rank_pattern` and `alpha_pattern` keys match as the regular expression `(.*\.)?(key)$` from the
//! start of the path; the first key that matches counts. `layers_to_transform` keeps the modules
//! whose path has one of those numbers as its layer, in a list named by `layers_pattern` if that is
//! set; a module that `target_modules` names by its whole path is kept anyway. A module that
//! `modules_to_save` names, or one inside it, gets no adapter: it is trained in full.

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
    /// Numerator of its scaling.
    pub alpha: f32,
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

    fn matches(&self, module: &AdaptableModule) -> bool {
        match self {
            Self::AllLinear => module.role == ModuleRole::Linear,
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

/// What an adaptable module is in its model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModuleRole {
    /// A linear layer of a block.
    Linear,
    /// A linear layer that chooses experts.
    Router,
    /// The linear layer that computes the logits.
    OutputHead,
    /// The embedding table.
    Embedding,
}

/// A module that can have an adapter, as seen by [`resolve`].
#[derive(Clone, Debug)]
pub struct AdaptableModule {
    /// Path of the module, as in the checkpoint.
    pub path: String,
    /// What it is.
    pub role: ModuleRole,
}

/// The adapters that `config` asks for, in the order of `modules`.
///
/// # Errors
/// [`LayerError::Config`] or [`LayerError::Pattern`] for a bad setting, [`LayerError::NoTarget`] with the names
/// to choose from when nothing matches.
pub fn resolve(config: &LoraConfig, modules: &[AdaptableModule]) -> Result<Vec<Target>, LayerError> {
    config.validate()?;
    let targets = Matcher::new(&config.target_modules, "target_modules")?;
    let excluded = config.exclude_modules.as_ref().map(|m| Matcher::new(m, "exclude_modules")).transpose()?;
    let whole = config
        .modules_to_save
        .iter()
        .map(|name| regex(&format!(r"^(?:|.*\.)(?:{name})(?:$|\..*)"), name, "modules_to_save"))
        .collect::<Result<Vec<_>, _>>()?;
    let layers = Layers::new(config)?;
    let ranks = compile(&config.rank_pattern, "rank_pattern")?;
    let alphas = compile(&config.alpha_pattern, "alpha_pattern")?;
    let mut found = Vec::new();
    for module in modules {
        let path = &module.path;
        let left_out = excluded.as_ref().is_some_and(|e| e.matches(module))
            || whole.iter().any(|name| name.is_match(path).unwrap_or(false));
        let by_whole_path = matches!(&config.target_modules, TargetModules::Names(names) if names.contains(path));
        if left_out || !targets.matches(module) || !(by_whole_path || layers.hold(path)) {
            continue;
        }
        let rank = first_match(&ranks, path).unwrap_or(config.rank);
        let alpha = first_match(&alphas, path).unwrap_or(config.alpha);
        found.push(Target { path: path.clone(), rank, alpha, scaling: config.scaling(rank, alpha) });
    }
    match found.is_empty() {
        true => Err(LayerError::NoTarget { given: config.target_modules.to_string(), candidates: candidates(modules) }),
        false => Ok(found),
    }
}

/// The modules that `modules_to_save` means, in the order of `paths`: those whose path, or that of a module around
/// them, ends with an entry. (PEFT compares plain text, so `norm` means `input_layernorm` too.)
///
/// # Errors
/// [`LayerError::NoSavedModule`] for an entry that means none.
pub fn resolve_saved(names: &[String], paths: &[String]) -> Result<Vec<String>, LayerError> {
    let within = |path: &str, name: &str| {
        let ends = path.match_indices('.').map(|(dot, _)| dot).chain([path.len()]);
        ends.into_iter().any(|end| path[..end].ends_with(name))
    };
    if let Some(name) = names.iter().find(|name| !paths.iter().any(|path| within(path, name))) {
        let mut known: Vec<&str> = Vec::new();
        for path in paths {
            let last = path.rsplit('.').next().unwrap_or(path);
            if !known.contains(&last) {
                known.push(last);
            }
        }
        return Err(LayerError::NoSavedModule { given: name.clone(), candidates: known.join(", ") });
    }
    Ok(paths.iter().filter(|path| names.iter().any(|name| within(path, name))).cloned().collect())
}

/// `layers_to_transform` and `layers_pattern`.
struct Layers<'a> {
    wanted: Option<&'a [usize]>,
    lists: Vec<Regex>,
}

impl<'a> Layers<'a> {
    fn new(config: &'a LoraConfig) -> Result<Self, LayerError> {
        let lists = config.layers_pattern.iter().flatten();
        let lists = lists
            .map(|name| regex(&format!(r"^(?:|.*?\.)(?:{name})\.(\d+)\."), name, "layers_pattern"))
            .collect::<Result<_, _>>()?;
        // An empty list means all layers, as in PEFT.
        Ok(Self { wanted: config.layers_to_transform.as_deref().filter(|layers| !layers.is_empty()), lists })
    }

    fn hold(&self, path: &str) -> bool {
        let Some(wanted) = self.wanted else { return true };
        let index = match self.lists.is_empty() {
            true => layer_index(path),
            false => self.lists.iter().find_map(|list| {
                let captures = list.captures(path).ok().flatten()?;
                captures.get(1)?.as_str().parse().ok()
            }),
        };
        index.is_some_and(|index| wanted.contains(&index))
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
fn candidates(modules: &[AdaptableModule]) -> String {
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

    fn model() -> Vec<AdaptableModule> {
        let mut modules: Vec<AdaptableModule> = (0..12)
            .flat_map(|i| {
                ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj"].map(|m| format!("model.layers.{i}.{m}"))
            })
            .map(|path| AdaptableModule { path, role: ModuleRole::Linear })
            .collect();
        modules.push(AdaptableModule { path: "lm_head".into(), role: ModuleRole::OutputHead });
        modules.push(AdaptableModule { path: "model.embed_tokens".into(), role: ModuleRole::Embedding });
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
    fn a_layers_pattern_names_the_list_and_a_whole_path_is_kept() {
        let names = |names: &[&str]| TargetModules::Names(names.iter().map(ToString::to_string).collect());
        let config = LoraConfig {
            layers_to_transform: Some(vec![2]),
            layers_pattern: Some(vec!["layers".into()]),
            target_modules: names(&["q_proj", "lm_head", "model.layers.5.mlp.gate_proj"]),
            ..Default::default()
        };
        let kept = ["model.layers.2.self_attn.q_proj", "model.layers.5.mlp.gate_proj", "lm_head"];
        assert_eq!(paths(&config), kept);
        let other = LoraConfig { layers_pattern: Some(vec!["h".into()]), target_modules: names(&["q_proj"]), ..config };
        assert!(matches!(resolve(&other, &model()), Err(LayerError::NoTarget { .. })));
    }

    #[test]
    fn what_is_saved_whole_gets_no_adapter() {
        let config = LoraConfig {
            target_modules: TargetModules::Names(vec!["gate_proj".into(), "lm_head".into(), "embed_tokens".into()]),
            modules_to_save: vec!["mlp".into(), "lm_head".into()],
            ..Default::default()
        };
        assert_eq!(paths(&config), ["model.embed_tokens"]);
    }

    #[test]
    fn saved_modules_match_the_ends_of_paths_as_text() {
        let paths: Vec<String> =
            ["model.layers.0.mlp.gate_proj", "model.layers.0.input_layernorm", "model.norm", "lm_head"]
                .map(String::from)
                .into();
        let saved = |name: &str| resolve_saved(&[name.to_string()], &paths);
        assert_eq!(saved("norm").expect("found"), paths[1..3]);
        assert_eq!(saved("mlp").expect("found"), paths[..1]);
        assert_eq!(saved("head").expect("found"), paths[3..]);
        let message = saved("wte").expect_err("no such module").to_string();
        assert!(message.contains("wte") && message.contains("lm_head"), "{message}");
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
        assert!(message.contains("q_proj, v_proj, gate_proj, lm_head, embed_tokens"), "{message}");
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
