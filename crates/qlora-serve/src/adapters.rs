//! The adapters that are served: all of them in the host's memory, some on the device.
//!
//! An adapter on the device is a clone of the model with the adapter put on. The clone shares the base's weights and adds
//! the adapter's own, so whatever training can write is served as it was trained.

use std::collections::HashMap;

use adapter_io::Adapter;
use qlora_models::{Decoder, ModelError};

/// Names an adapter as it was when it was loaded; the base is 0. Another adapter of the same name has another number.
pub type AdapterNumber = u64;

/// The base model.
pub const BASE: AdapterNumber = 0;

#[derive(Debug)]
struct Loaded {
    adapter: Adapter,
    on_device: Option<Decoder>,
    last_used: u64,
    /// Requests that it is to answer yet.
    users: usize,
    /// Whether it goes when its last user has gone.
    unloaded: bool,
}

/// The base and its adapters.
#[derive(Debug)]
pub struct Adapters {
    base: Decoder,
    numbers: HashMap<String, AdapterNumber>,
    loaded: HashMap<AdapterNumber, Loaded>,
    last_number: AdapterNumber,
    max_on_device: usize,
    clock: u64,
}

impl Adapters {
    /// None yet; at most `max_on_device` on the device, or as many as one pass needs.
    pub fn new(base: Decoder, max_on_device: usize) -> Self {
        Self { base, numbers: HashMap::new(), loaded: HashMap::new(), last_number: BASE, max_on_device, clock: 0 }
    }

    /// The model without an adapter.
    pub fn base(&self) -> &Decoder {
        &self.base
    }

    /// The number behind a name.
    pub fn number(&self, name: Option<&str>) -> Option<AdapterNumber> {
        name.map_or(Some(BASE), |name| self.numbers.get(name).copied())
    }

    /// How many adapters have a name.
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Adds an adapter, in place of one of the same name, after it was put on the model once. Returns how many ids have an
    /// embedding with it.
    ///
    /// # Errors
    /// The adapter does not fit the model.
    pub fn insert(&mut self, name: &str, adapter: Adapter) -> Result<usize, ModelError> {
        let mut model = self.base.clone();
        model.load_adapter(&adapter)?;
        model.join_experts();
        self.last_number += 1;
        let vocab_size = model.vocab_size();
        let loaded = Loaded { adapter, on_device: Some(model), last_used: self.clock, users: 0, unloaded: false };
        self.loaded.insert(self.last_number, loaded);
        self.numbers.insert(name.into(), self.last_number);
        self.evict(&[self.last_number]);
        Ok(vocab_size)
    }

    /// Takes a name away. The adapter itself stays until its last user has gone. `None` when there is none.
    pub fn remove(&mut self, name: &str) -> Option<AdapterNumber> {
        let number = self.numbers.remove(name)?;
        if let Some(loaded) = self.loaded.get_mut(&number) {
            loaded.unloaded = true;
        }
        self.drop_unused(number);
        Some(number)
    }

    /// Counts a request that the adapter is to answer.
    pub fn begin_use(&mut self, number: AdapterNumber) {
        if let Some(loaded) = self.loaded.get_mut(&number) {
            loaded.users += 1;
        }
    }

    /// Counts a request that is over.
    pub fn end_use(&mut self, number: AdapterNumber) {
        if let Some(loaded) = self.loaded.get_mut(&number) {
            loaded.users -= 1;
        }
        self.drop_unused(number);
    }

    fn drop_unused(&mut self, number: AdapterNumber) {
        if self.loaded.get(&number).is_some_and(|loaded| loaded.unloaded && loaded.users == 0) {
            self.loaded.remove(&number);
        }
    }

    /// Brings the adapters of a pass to the device; others may have to go.
    ///
    /// # Errors
    /// An adapter that was on the model before can't be put on it now.
    pub fn bring(&mut self, numbers: &[AdapterNumber]) -> Result<(), ModelError> {
        self.clock += 1;
        let missing = |loaded: &HashMap<AdapterNumber, Loaded>, number: &AdapterNumber| {
            loaded.get(number).is_some_and(|loaded| loaded.on_device.is_none())
        };
        if numbers.iter().any(|number| missing(&self.loaded, number)) {
            self.evict(numbers);
        }
        for number in numbers {
            let Some(loaded) = self.loaded.get_mut(number) else { continue };
            loaded.last_used = self.clock;
            if loaded.on_device.is_none() {
                let mut model = self.base.clone();
                model.load_adapter(&loaded.adapter)?;
                model.join_experts();
                loaded.on_device = Some(model);
            }
        }
        Ok(())
    }

    /// Takes the adapters that were used longest ago off the device, until those of `numbers` and the rest are few enough.
    fn evict(&mut self, numbers: &[AdapterNumber]) {
        let mut others: Vec<(u64, AdapterNumber)> = self
            .loaded
            .iter()
            .filter(|(number, loaded)| loaded.on_device.is_some() && !numbers.contains(number))
            .map(|(number, loaded)| (loaded.last_used, *number))
            .collect();
        others.sort_unstable();
        let room = self.max_on_device.saturating_sub(numbers.len());
        let excess = others.len().saturating_sub(room);
        for (_, number) in &others[..excess] {
            if let Some(loaded) = self.loaded.get_mut(number) {
                loaded.on_device = None;
            }
        }
    }

    /// The model with an adapter that was [brought](Self::bring).
    pub fn model(&self, number: AdapterNumber) -> &Decoder {
        self.loaded.get(&number).and_then(|loaded| loaded.on_device.as_ref()).unwrap_or(&self.base)
    }
}
