//! What the names inside an adapter stand for: keys, modules that should be there, and modules whose name changed.
//!
//! **Keys.** PEFT saves `lora_A.weight` and puts the name under which an adapter is loaded inside, `default` unless
//! it is told otherwise. A key that has a name inside already is taken as it is: `lora_A.default.weight` is loaded,
//! `lora_A.other.weight` is lost without a word. (`_insert_adapter_name_into_state_dict` of PEFT 0.21.)
//!
//! **Modules.** transformers 4.52 moved the language model of larger ones from `language_model.model` to
//! `model.language_model`. Published checkpoints keep the old names, and adapters have those of their day; a
//! checkpoint that was saved from the bare model lacks `model.`. Files of Qwen 2 VL and 2.5 VL have the language model's blocks in
//! `model.layers`, as language models do that read text alone. transformers maps all of them (`_checkpoint_conversion_mapping`), and so
//! does [`Adapter::named_as`].

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use fancy_regex::Regex;

use crate::adapter::{Adapter, KEY_PREFIX};
use crate::adapter_config::{AdapterConfig, CONFIG_FILE, Pattern, TargetModules, TokenIndices, field_error};
use crate::config_field::OneOrMany;
use crate::error::FormatError;

/// The name under which PEFT loads an adapter.
const DEFAULT_NAME: &str = "default";
/// Parts of a model under two names each.
const TWO_NAMES: [(&str, &str); 10] = [
    ("model.language_model", "language_model.model"),
    ("model.language_model.layers", "model.layers"),
    ("model.language_model.embed_tokens", "model.embed_tokens"),
    ("model.language_model.norm", "model.norm"),
    ("model.vision_tower", "vision_tower"),
    ("model.multi_modal_projector", "multi_modal_projector"),
    ("model.layers", "layers"),
    ("model.embed_tokens", "embed_tokens"),
    ("model.norm", "norm"),
    (HEAD, OLD_HEAD),
];
const HEAD: &str = "lm_head";
const OLD_HEAD: &str = "language_model.lm_head";

/// The key as PEFT saves it, of one that PEFT would take; else the reason and the cure.
pub(crate) fn plain_key(key: &str) -> Result<Cow<'_, str>, String> {
    if !key.starts_with(KEY_PREFIX) {
        let near = if key.contains(".lora_") || key.ends_with(".weight") {
            format!("; rename it to `{KEY_PREFIX}{key}`")
        } else {
            String::new()
        };
        return Err(format!("PEFT's keys start with `{KEY_PREFIX}`{near}"));
    }
    if key.contains(".lora_a.") || key.contains(".lora_b.") {
        return Err("PEFT writes the factors as lora_A and lora_B, in capitals; rename it".into());
    }
    for factor in ["lora_A", "lora_B"] {
        let Some((stem, rest)) = key.split_once(&format!(".{factor}.")) else { continue };
        let Some((name, kind)) = rest.rsplit_once('.').or(Some(("", rest))).filter(|(_, k)| is_parameter(k)) else {
            return Err(format!("`.{factor}.` must be followed by `weight`"));
        };
        return named(key, name, || format!("{stem}.{factor}.{kind}"));
    }
    if let Some((stem, rest)) = key.split_once(".lora_magnitude_vector.") {
        let name = rest.strip_suffix("weight").map_or(rest, |name| name.trim_end_matches('.'));
        return named(key, name, || format!("{stem}.lora_magnitude_vector"));
    }
    for factor in ["lora_embedding_A", "lora_embedding_B"] {
        if let Some((stem, name)) = key.split_once(&format!(".{factor}.")) {
            // Here PEFT adds the name whatever there is.
            return Err(lost(name, &format!("{stem}.{factor}")));
        }
    }
    if let Some((stem, name)) = key.split_once(".trainable_tokens_delta.") {
        // PEFT asks for the key without a name, and fails where it is not there.
        return Err(lost(name, &format!("{stem}.trainable_tokens_delta")));
    }
    let inside = format!(".modules_to_save.{DEFAULT_NAME}.");
    Ok(if key.contains(&inside) { key.replacen(&inside, ".modules_to_save.", 1).into() } else { key.into() })
}

fn is_parameter(name: &str) -> bool {
    ["weight", "bias"].contains(&name)
}

/// A key with a name inside, or none.
fn named<'k>(key: &'k str, name: &str, plain: impl Fn() -> String) -> Result<Cow<'k, str>, String> {
    match name {
        "" if key == plain() => Ok(key.into()),
        "" | DEFAULT_NAME => Ok(plain().into()),
        other => Err(lost(other, &plain())),
    }
}

fn lost(name: &str, plain: &str) -> String {
    format!("it has the adapter's name `{name}` inside, and PEFT ignores such weights; rename it to `{plain}`")
}

/// `target_modules`, `exclude_modules` and `layers_to_transform`, ready to be asked.
struct Targets<'a> {
    names: Result<Vec<String>, Regex>,
    excluded: Option<Result<&'a [String], Regex>>,
    layers: &'a [usize],
    /// Of the layer's number in a path.
    numbers: Vec<Regex>,
}

impl<'a> Targets<'a> {
    /// `None` for `all-linear`, which PEFT never saves: what it stood for is not known here.
    fn new(config: &'a AdapterConfig) -> Result<Option<Self>, FormatError> {
        let regex = |field: &str, pattern: &str| {
            let bad = |e| field_error(CONFIG_FILE.as_ref(), field, format!("`{pattern}` is not a valid pattern: {e}"));
            Regex::new(pattern).map_err(bad)
        };
        let whole = |field: &str, pattern: &str| regex(field, &format!("^(?:{pattern})$"));
        let names = match config.target_modules_or_default() {
            TargetModules::Pattern(pattern) if pattern.eq_ignore_ascii_case("all-linear") => return Ok(None),
            TargetModules::Pattern(pattern) => Err(whole("target_modules", &pattern)?),
            TargetModules::List(names) => Ok(names),
        };
        let excluded = match &config.exclude_modules {
            None => None,
            Some(TargetModules::List(names)) => Some(Ok(names.as_slice())),
            Some(TargetModules::Pattern(pattern)) => Some(Err(whole("exclude_modules", pattern)?)),
        };
        let patterns = config.layers_pattern.as_ref().map_or(&[][..], OneOrMany::as_slice);
        let numbers = match patterns {
            [] => vec![regex("layers_pattern", r"^.*\.[^.]*\.(\d+)\.")?],
            patterns => {
                let number = |pattern: &String| regex("layers_pattern", &format!(r"^.*\.{pattern}\.(\d+)\."));
                patterns.iter().map(number).collect::<Result<_, _>>()?
            }
        };
        let layers = config.layers_to_transform.as_ref().map_or(&[][..], OneOrMany::as_slice);
        Ok(Some(Self { names, excluded, layers, numbers }))
    }

    /// `check_target_module_exists` of PEFT.
    fn hit(&self, path: &str) -> bool {
        let matches = |regex: &Regex| regex.is_match(path).unwrap_or(false);
        let excluded = match &self.excluded {
            None => false,
            Some(Ok(names)) => names.iter().any(|name| ends_with(path, name)),
            Some(Err(regex)) => matches(regex),
        };
        if excluded {
            return false;
        }
        match &self.names {
            Err(regex) => matches(regex),
            Ok(names) if names.iter().any(|name| name == path) => true,
            Ok(names) => names.iter().any(|name| ends_with(path, name)) && self.in_layers(path),
        }
    }

    fn in_layers(&self, path: &str) -> bool {
        let number = |regex: &Regex| regex.captures(path).ok()??.get(1)?.as_str().parse::<usize>().ok();
        self.layers.is_empty()
            || self.numbers.iter().find_map(number).is_some_and(|number| self.layers.contains(&number))
    }
}

/// A path is a name, or ends with a dot and it.
pub(crate) fn ends_with(path: &str, name: &str) -> bool {
    path.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// What comes before the first number of a path: the list of layers that it is in. Empty outside of one.
fn list_of(path: &str) -> &str {
    let mut end = 0;
    for part in path.split('.') {
        if !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) {
            return path[..end].trim_end_matches('.');
        }
        end += part.len() + 1;
    }
    ""
}

impl Adapter {
    /// The names in `target_modules` and `modules_to_save` that no weights are there for, in their order: a file that
    /// lost some, or names that the model had no modules for. PEFT warns of it and goes on, with these modules as
    /// they are in the base.
    ///
    /// Patterns say nothing without a model: see [`Self::missing_modules`].
    pub fn missing_targets(&self) -> Vec<String> {
        let mut missing = Vec::new();
        if let (TargetModules::List(names), true) =
            (self.config.target_modules_or_default(), self.config.parameters().is_empty())
        {
            let paths: Vec<String> = self.modules().into_iter().chain(self.embeddings()).collect();
            missing.extend(names.into_iter().filter(|name| !paths.iter().any(|path| ends_with(path, name))));
        }
        let saved: Vec<String> = self.saved_tensors().map(|(name, _)| name).collect();
        for name in self.config.modules_to_save.iter().flatten() {
            let inside = |tensor: &String| tensor.match_indices('.').any(|(at, _)| ends_with(&tensor[..at], name));
            if !saved.iter().any(inside) {
                missing.push(name.clone());
            }
        }
        missing
    }

    /// The modules of a model that the configuration targets and no weights are there for. `modules` are the paths
    /// of its matrices; of lists of layers, those count that the adapter has something in: a model may hold another
    /// one with the same names.
    ///
    /// # Errors
    /// [`FormatError::Field`] for a pattern that is no regular expression.
    pub fn missing_modules(&self, modules: &[String]) -> Result<Vec<String>, FormatError> {
        let Some(targets) = Targets::new(&self.config)?.filter(|_| self.config.parameters().is_empty()) else {
            return Ok(Vec::new());
        };
        let there: BTreeSet<String> = self.modules().into_iter().chain(self.embeddings()).collect();
        let lists: BTreeSet<&str> = there.iter().map(|path| list_of(path)).chain([""]).collect();
        let missing = |path: &&String| !there.contains(*path) && lists.contains(list_of(path)) && targets.hit(path);
        Ok(modules.iter().filter(missing).cloned().collect())
    }

    /// The adapter under the names that a model has for its modules, where they are known under two. `modules` are
    /// the paths of the model's modules.
    ///
    /// # Errors
    /// [`FormatError::Field`] for a pattern that is no regular expression.
    pub fn named_as(&self, modules: &[String]) -> Result<Cow<'_, Self>, FormatError> {
        let inside = |path: &str, part: &str| {
            path.strip_prefix(part).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        let paths = || self.tensors.keys().filter_map(|key| key.strip_prefix(KEY_PREFIX));
        let known = |part: &str| modules.iter().any(|module| inside(module, part));
        // A head that is tied to the embedding has no tensor to be known by.
        let taken = |from: &str, to: &str| !known(from) && (known(to) || from == OLD_HEAD);
        let both = TWO_NAMES.into_iter().flat_map(|(one, other)| [(one, other), (other, one)]);
        let renamed: Vec<(&str, &str)> =
            both.filter(|(from, to)| taken(from, to) && paths().any(|path| inside(path, from))).collect();
        if renamed.is_empty() {
            return Ok(Cow::Borrowed(self));
        }
        let rename = |path: &str| {
            let found = renamed.iter().find(|(from, _)| inside(path, from));
            found.map(|(from, to)| format!("{to}{}", &path[from.len()..]))
        };
        let mut out = Self { config: self.config.clone(), tensors: BTreeMap::new() };
        for (key, tensor) in &self.tensors {
            let new = key.strip_prefix(KEY_PREFIX).and_then(rename).map(|path| format!("{KEY_PREFIX}{path}"));
            out.tensors.insert(new.unwrap_or_else(|| key.clone()), tensor.clone());
        }
        let whole_paths = |names: &mut Vec<String>| {
            names.iter_mut().for_each(|name| *name = rename(name).unwrap_or_else(|| name.clone()));
        };
        if let Some(TargetModules::List(names)) = &mut out.config.target_modules {
            whole_paths(names);
        }
        out.config.modules_to_save.iter_mut().for_each(whole_paths);
        if let Some(TokenIndices::ByModule(modules)) = &mut out.config.trainable_token_indices {
            let old = std::mem::take(modules);
            modules.extend(old.into_iter().map(|(name, tokens)| (rename(&name).unwrap_or(name), tokens)));
        }
        // Patterns with the old names inside go on to mean these modules.
        let (old, new): (Vec<String>, Vec<String>) = self
            .modules()
            .into_iter()
            .chain(self.embeddings())
            .filter_map(|old| rename(&old).map(|new| (old, new)))
            .unzip();
        let renamed = |pattern: &Pattern, field: &str, default: f64| {
            let renamed = pattern.renamed(&old, &new, default);
            renamed.map_err(|reason| field_error(CONFIG_FILE.as_ref(), field, reason))
        };
        out.config.rank_pattern = renamed(&self.config.rank_pattern, "rank_pattern", self.config.r as f64)?;
        out.config.alpha_pattern = renamed(&self.config.alpha_pattern, "alpha_pattern", self.config.lora_alpha)?;
        Ok(Cow::Owned(out))
    }
}
