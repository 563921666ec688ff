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
}

/// The base and its adapters. An adapter stays until it is [dropped](Self::drop_adapter), also without its name.
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

    /// Whether an adapter has this name.
    pub fn has_name(&self, name: &str) -> bool {
        self.numbers.contains_key(name)
    }

    /// Whether there is an adapter of this number, with or without a name.
    pub fn has(&self, number: AdapterNumber) -> bool {
        number == BASE || self.loaded.contains_key(&number)
    }

    /// How many adapters have a name.
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Adds an adapter, in place of one of the same name, after it was put on the model once. Returns its
    /// number, and how many ids have an embedding with it.
    ///
    /// # Errors
    /// The adapter does not fit the model.
    pub fn insert(&mut self, name: &str, adapter: Adapter) -> Result<(AdapterNumber, usize), ModelError> {
        let mut model = self.base.clone();
        model.load_adapter(&adapter)?;
        model.join_experts();
        self.last_number += 1;
        let vocab_size = model.vocab_size();
        let loaded = Loaded { adapter, on_device: Some(model), last_used: self.clock };
        self.loaded.insert(self.last_number, loaded);
        self.numbers.insert(name.into(), self.last_number);
        self.evict(&[self.last_number]);
        Ok((self.last_number, vocab_size))
    }

    /// Takes a name away. The adapter itself stays. `None` when there is none.
    pub fn remove_name(&mut self, name: &str) -> Option<AdapterNumber> {
        self.numbers.remove(name)
    }

    /// Forgets an adapter that nothing uses any more.
    pub fn drop_adapter(&mut self, number: AdapterNumber) {
        self.loaded.remove(&number);
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
