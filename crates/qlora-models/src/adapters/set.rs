//! Several adapters on one base: loaded, named, switched, weighted, combined and unloaded, while the base stays.

use crate::ModelError;
use crate::decoder::Decoder;
use adapter_io::{Adapter, Combination, combine};
use std::path::Path;

/// A named adapter with a weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdapterSource<'a> {
    /// Its name in the set.
    pub name: &'a str,
    /// Factor of its update.
    pub weight: f64,
}

/// Adapters by name, in host memory; any one of them, or a combination, can be put on a [`Decoder`].
#[derive(Clone, Debug, Default)]
pub struct AdapterSet {
    adapters: Vec<(String, Adapter)>,
}

impl AdapterSet {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads an adapter's folder and adds it.
    ///
    /// # Errors
    /// Those of [`Adapter::load`] and [`insert`](Self::insert).
    pub fn load(&mut self, name: &str, dir: &Path) -> Result<(), ModelError> {
        self.insert(name, Adapter::load(dir)?)
    }

    /// Adds an adapter.
    ///
    /// # Errors
    /// [`ModelError::AdapterName`] when the name is empty or taken.
    pub fn insert(&mut self, name: &str, adapter: Adapter) -> Result<(), ModelError> {
        let problem = match name {
            "" => "a name can't be empty",
            _ if self.get(name).is_ok() => "this name is taken: remove that adapter first, or choose another name",
            _ => {
                self.adapters.push((name.to_string(), adapter));
                return Ok(());
            }
        };
        Err(ModelError::AdapterName { name: name.into(), problem: problem.into() })
    }

    /// Takes an adapter out of the set; a model that carries it keeps it until it is switched or unloaded.
    ///
    /// # Errors
    /// [`ModelError::AdapterName`] when there is none of this name.
    pub fn remove(&mut self, name: &str) -> Result<Adapter, ModelError> {
        let position = self.adapters.iter().position(|(known, _)| known == name);
        position.map(|i| self.adapters.remove(i).1).ok_or_else(|| self.unknown(name))
    }

    /// An adapter by name.
    ///
    /// # Errors
    /// [`ModelError::AdapterName`] when there is none of this name.
    pub fn get(&self, name: &str) -> Result<&Adapter, ModelError> {
        let found = self.adapters.iter().find(|(known, _)| known == name);
        found.map(|(_, adapter)| adapter).ok_or_else(|| self.unknown(name))
    }

    /// The names, in the order in which they came.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.adapters.iter().map(|(name, _)| name.as_str())
    }

    /// Adds the combination of some adapters under a name of its own.
    ///
    /// # Errors
    /// [`ModelError::AdapterName`], and those of [`combine()`]: adapters with DoRA can't be combined.
    pub fn combine(
        &mut self,
        name: &str,
        sources: &[AdapterSource<'_>],
        combination: Combination,
    ) -> Result<(), ModelError> {
        let combined = self.combination(sources, combination)?;
        self.insert(name, combined)
    }

    /// Puts an adapter on the model, in place of any that is there.
    ///
    /// # Errors
    /// [`ModelError::AdapterName`], and those of [`Decoder::load_adapter`].
    pub fn activate(&self, model: &mut Decoder, name: &str) -> Result<(), ModelError> {
        model.load_adapter(self.get(name)?)
    }

    /// Puts several adapters on the model at once, each update with its weight; the sum is exact. One adapter keeps
    /// its kind (DoRA scales its update before the magnitudes, as PEFT's `set_scale` does).
    ///
    /// # Errors
    /// As [`combine`](Self::combine) and [`Decoder::load_adapter`].
    pub fn activate_weighted(&self, model: &mut Decoder, sources: &[AdapterSource<'_>]) -> Result<(), ModelError> {
        match sources {
            [AdapterSource { name, weight }] if weight.is_finite() => {
                self.activate(model, name)?;
                model.scale_adapter(*weight as f32);
                Ok(())
            }
            _ => model.load_adapter(&self.combination(sources, Combination::Cat)?),
        }
    }

    fn combination(&self, sources: &[AdapterSource<'_>], combination: Combination) -> Result<Adapter, ModelError> {
        let adapters = sources.iter().map(|source| Ok((self.get(source.name)?, source.weight)));
        Ok(combine(&adapters.collect::<Result<Vec<_>, ModelError>>()?, combination)?)
    }

    fn unknown(&self, name: &str) -> ModelError {
        let names: Vec<&str> = self.names().collect();
        let problem = match names.is_empty() {
            true => "no adapter is loaded".to_string(),
            false => format!("no adapter has this name; loaded are {}", names.join(", ")),
        };
        ModelError::AdapterName { name: name.into(), problem }
    }
}

impl Decoder {
    /// Multiplies the scaling of every update that is on.
    pub(crate) fn scale_adapter(&mut self, weight: f32) {
        if weight == 1.0 {
            return;
        }
        self.part_experts();
        for (_, linear) in self.linears_mut() {
            if let Some(adapter) = &mut linear.adapter {
                adapter.scaling *= weight;
            }
        }
        if let Some(lora) = &mut self.embedding.lora {
            lora.scaling *= weight;
        }
        self.keep_scales();
    }
}
