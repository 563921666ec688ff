//! The adapters of a cache's passes, stacked layer by layer: a pass over tokens of different adapters then has as many launches
//! as one over tokens of one, and one recording serves whatever adapters its rows have.
//!
//! Adapters that are low-rank updates of linear layers alone can be stacked. With any other (magnitudes, biases, weights, norms or
//! tokens trained in full) a pass runs part by part, as [`crate::paged`] has it.

use crate::block::FeedForward;
use crate::decoder::Decoder;
use burn::module::ParamId;
use qlora_layers::{AdapterSpan, AdapterStack, LoraLinear, SPANS, can_stack};
use std::collections::HashMap;

/// Slots at most, where nobody says otherwise.
const MOST_SLOTS: usize = 16;

/// What a model's adapter is to a stack.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// The model has none.
    Bare,
    Stackable,
    Other,
}

/// Stacks by the weights of their layers.
pub(crate) type Layers = HashMap<ParamId, AdapterStack>;

/// The stacks of a cache.
#[derive(Debug)]
pub(crate) struct Stacks {
    layers: Layers,
    slots: Vec<Slot>,
    most_slots: usize,
    kinds: HashMap<u64, Kind>,
    /// The frozen weights that all models share.
    weights: Vec<ParamId>,
    clock: u64,
    /// Whether it was said that adapters can't be stacked.
    is_noted: bool,
}

#[derive(Debug)]
struct Slot {
    /// Whose adapter it holds, if any.
    number: Option<u64>,
    last_used: u64,
}

/// Where the adapters of a pass are.
#[derive(Debug)]
pub(crate) struct Placed {
    /// The slot of each part, none for the bare model.
    pub slots: Vec<Option<usize>>,
    /// Whether a slot has changed: what was recorded over the stacks is out of date.
    pub changed: bool,
}

impl Placed {
    /// Which tokens have which slot, for the parts' numbers of tokens.
    pub fn spans(&self, tokens: impl IntoIterator<Item = usize>) -> Vec<AdapterSpan> {
        let mut end = 0;
        let spans = self.slots.iter().zip(tokens).filter_map(|(slot, tokens)| {
            let first = end;
            end += tokens;
            let slot = slot.filter(|_| tokens > 0)?;
            Some(AdapterSpan { first, end, slot })
        });
        spans.collect()
    }
}

impl Default for Stacks {
    fn default() -> Self {
        let (layers, slots, kinds, weights) = Default::default();
        Self { layers, slots, most_slots: MOST_SLOTS, kinds, weights, clock: 0, is_noted: false }
    }
}

impl Stacks {
    /// The stacks.
    pub fn layers(&self) -> &Layers {
        &self.layers
    }

    /// At most `most` slots from now on.
    pub fn limit(&mut self, most: usize) {
        self.most_slots = most.clamp(1, SPANS);
    }

    /// An adapter is gone for good: its slot is free.
    pub fn forget(&mut self, number: u64) {
        self.kinds.remove(&number);
        for slot in &mut self.slots {
            if slot.number == Some(number) {
                slot.number = None;
            }
        }
    }

    /// Brings the adapters of `parts` into slots. The numbers tell adapters apart. `None` where they can't be stacked.
    pub fn place(&mut self, parts: &[(u64, &Decoder)]) -> Option<Placed> {
        for (number, model) in parts {
            if self.weights.is_empty() {
                self.weights = model.linears().map(|(_, layer)| layer.base.id()).collect();
            }
            self.kinds.entry(*number).or_insert_with(|| kind(model, &self.weights));
        }
        let kind_of = |number: &u64| self.kinds.get(number).unwrap_or(&Kind::Other);
        let wanted: Vec<u64> = parts.iter().map(|(number, _)| *number).filter(|n| kind_of(n) != &Kind::Bare).collect();
        let others = wanted.iter().filter(|number| kind_of(number) == &Kind::Other).count();
        if wanted.len() > self.most_slots || others > 0 {
            let (adapters, slots) = (wanted.len(), self.most_slots);
            if adapters > 1 && !std::mem::replace(&mut self.is_noted, true) {
                tracing::info!(adapters, others, slots, "adapters of a pass that can't share products run one by one");
            }
            return None;
        }
        self.clock += 1;
        let mut placed = Placed { slots: Vec::new(), changed: false };
        for (number, model) in parts {
            if !wanted.contains(number) {
                placed.slots.push(None);
                continue;
            }
            let held = self.slots.iter().position(|slot| slot.number == Some(*number));
            let slot = held.unwrap_or_else(|| {
                placed.changed = true;
                let slot = self.free_slot(&wanted);
                self.fill(slot, model);
                slot
            });
            self.slots[slot] = Slot { number: Some(*number), last_used: self.clock };
            placed.slots.push(Some(slot));
        }
        Some(placed)
    }

    /// A slot that holds none of `wanted`: a free one, a new one, or that which was used longest ago.
    fn free_slot(&mut self, wanted: &[u64]) -> usize {
        if let Some(free) = self.slots.iter().position(|slot| slot.number.is_none()) {
            return free;
        }
        let others = self.slots.iter().enumerate().filter(|(_, slot)| slot.number.is_none_or(|n| !wanted.contains(&n)));
        let oldest = others.min_by_key(|(_, slot)| slot.last_used).map(|(slot, _)| slot);
        oldest.filter(|_| self.slots.len() >= self.most_slots).unwrap_or_else(|| {
            self.slots.push(Slot { number: None, last_used: 0 });
            self.slots.len() - 1
        })
    }

    /// Puts a model's adapter into a slot of every layer.
    fn fill(&mut self, slot: usize, model: &Decoder) {
        for (_, layer) in model.linears() {
            let rank = layer.adapter.as_ref().map_or(0, qlora_layers::LoraAdapter::rank);
            let id = layer.base.id();
            if rank == 0 && !self.layers.contains_key(&id) {
                continue;
            }
            let slots = self.slots.len();
            let stack = self
                .layers
                .entry(id)
                .or_insert_with(|| AdapterStack::new(layer, slots, rank, model.dtype, &model.device));
            stack.make_room(slots, rank);
            stack.set(slot, layer.adapter.as_ref());
        }
    }
}

/// What `model` is, whose frozen weights should be `weights`.
fn kind(model: &Decoder, weights: &[ParamId]) -> Kind {
    let plain = |layer: &LoraLinear| {
        layer.whole.is_none()
            && layer.original.is_none()
            && layer.adapter.as_ref().is_none_or(|adapter| {
                adapter.dora.is_none() && adapter.bias.is_none() && can_stack(layer, model.dtype, &model.device)
            })
    };
    let norms = model.blocks.iter().flat_map(|block| block.norms.as_ref().into_iter()).chain([&model.norm]);
    let has_experts = model.blocks.iter().any(|block| matches!(block.feed_forward, FeedForward::Experts(_)));
    let stackable = model.linears().map(|(_, layer)| layer.base.id()).eq(weights.iter().copied())
        && model.linears().all(|(_, layer)| plain(layer))
        && norms.into_iter().all(|norm| norm.module.trained.is_none())
        && !has_experts
        // Its products over a cache take each model's own layers.
        && model.config.latent.is_none()
        && !model.embedding.is_changed()
        && !model.has_trained_tokens();
    match stackable {
        false => Kind::Other,
        true if model.linears().all(|(_, layer)| layer.is_bare()) => Kind::Bare,
        true => Kind::Stackable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_those_of_parts_with_tokens_and_an_adapter() {
        let placed = Placed { slots: vec![None, Some(3), Some(0), Some(1)], changed: false };
        let span = |first, end, slot| AdapterSpan { first, end, slot };
        assert_eq!(placed.spans([2, 5, 0, 1]), [span(2, 7, 3), span(7, 8, 1)]);
    }
}
