//! What the paths of a Burn module's parameters say about its layers.

use crate::target_modules::{AdaptableModule, ModuleRole};
use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;
use std::collections::HashSet;

/// What Burn's paths call the type of a linear layer.
const LINEAR: &str = "Struct:Linear";
/// What they call its weight.
pub(crate) const WEIGHT: &str = "weight";
/// What they call an adapted layer that is attached to such a weight.
pub(crate) const LORA_LINEAR: &str = "lora_linear";

/// What [`part`] calls the factor of an update, which has no tensor in PEFT's files.
pub(crate) const SCALING: &str = ".scaling";

/// What a parameter is in PEFT's terms, if it is part of an adapter: its module and the end of its key. `path` are the names and
/// the containers that Burn's traversals tell.
pub(crate) fn part(path: &[(String, String)]) -> Option<(String, &'static str)> {
    let (last, container) = path.last()?;
    let (depth, suffix) = match (container.as_str(), last.as_str()) {
        ("Struct:LoraAdapter", "lora_a") => (2, ".lora_A.weight"),
        ("Struct:LoraAdapter", "lora_b") => (2, ".lora_B.weight"),
        ("Struct:LoraAdapter", "bias") => (2, ".lora_B.bias"),
        ("Struct:EmbeddingAdapter", "lora_a") => (2, ".lora_embedding_A"),
        ("Struct:EmbeddingAdapter", "lora_b") => (2, ".lora_embedding_B"),
        ("Struct:LoraAdapter" | "Struct:EmbeddingAdapter", "scaling") => (2, SCALING),
        ("Struct:Dora", "magnitude") => (3, ".lora_magnitude_vector"),
        _ => return None,
    };
    let mut names: Vec<&str> = path[..path.len().checked_sub(depth)?].iter().map(|(name, _)| name.as_str()).collect();
    if names.ends_with(&[WEIGHT, LORA_LINEAR]) {
        names.truncate(names.len() - 2);
    }
    Some((names.join("."), suffix))
}

/// The name of a parameter outside of adapters in PyTorch's terms, and whether PyTorch keeps it transposed.
pub(crate) fn plain_name(path: &[(String, String)]) -> Option<(String, bool)> {
    let (last, container) = path.last()?;
    let names: Vec<&str> = path[..path.len() - 1].iter().map(|(name, _)| name.as_str()).collect();
    let name = match last.as_str() {
        "gamma" => "weight",
        "beta" => "bias",
        other => other,
    };
    Some((format!("{}.{name}", names.join(".")), container == LINEAR && last == WEIGHT))
}

pub(crate) fn inside(path: &str, module: &str) -> bool {
    path.strip_prefix(module).is_some_and(|rest| rest.starts_with('.'))
}

/// What a module has for adapters to go on.
#[derive(Default)]
pub(crate) struct Found {
    path: Vec<(String, String)>,
    /// Paths of burn-nn linear layers without an adapter, in the module's order.
    pub(crate) linears: Vec<String>,
    /// Paths of layers with an adapter, linear or embedding.
    pub(crate) adapted: HashSet<String>,
    /// Paths of all modules that hold parameters, adapters' own left out.
    pub(crate) modules: Vec<String>,
}

impl Found {
    pub(crate) fn of(module: &impl Module) -> Self {
        let mut found = Self::default();
        module.visit(&mut found);
        let adapted = std::mem::take(&mut found.adapted);
        found.linears.retain(|path| !adapted.contains(path));
        found.modules.retain(|path| !adapted.iter().any(|layer| path == layer || inside(path, layer)));
        found.adapted = adapted;
        found
    }
}

/// Linear layers as target matching takes them: one that is called `lm_head` is the output head.
pub(crate) fn adaptable(paths: &[String]) -> Vec<AdaptableModule> {
    let role = |path: &str| match path.rsplit('.').next() {
        Some("lm_head") => ModuleRole::OutputHead,
        _ => ModuleRole::Linear,
    };
    paths.iter().map(|path| AdaptableModule { path: path.clone(), role: role(path) }).collect()
}

impl ModuleVisitor for Found {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.push((name.into(), container_type.into()));
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {
        let names: Vec<&str> = self.path.iter().map(|(name, _)| name.as_str()).collect();
        let Some((last, names)) = names.split_last() else { return };
        let module = names.join(".");
        if let Some((layer, _)) = part(&self.path) {
            self.adapted.insert(layer);
        } else if D == 2 && *last == WEIGHT && self.path.last().is_some_and(|(_, container)| container == LINEAR) {
            self.linears.push(module.clone());
        }
        if self.modules.last() != Some(&module) {
            self.modules.push(module);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_below_a_module_are_inside() {
        assert!(inside("a.b.weight", "a.b"));
        assert!(!inside("a.bc.weight", "a.b"));
        assert!(!inside("a.b", "a.b"));
    }
}
