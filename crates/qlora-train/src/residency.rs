//! `model.residency`: which blocks' frozen weights stay on the device, and which wait in the host's memory.
//!
//! Streamed blocks are spread evenly among the others ([`Placement::evenly`]), and pass through [`SLOTS`] places of the largest
//! one's size. No choice changes a bit of any result, so it is one of time and memory alone. `auto` streams nothing where a run
//! fits without. Where it doesn't, more streamed blocks than it takes leave memory in which more can be kept for the backward pass; what is
//! quickest is found by trying.

use std::fmt;

use burn::tensor::{DType, Device};
use paged_optim::{Budget, free_memory};
use qlora_layers::streamed::{HostStore, SLOTS};
use qlora_models::{LinearRole, LoadOptions, ModelConfig, Placement, Streams};
use serde::{Deserialize, Serialize};

use crate::config::BaseModelConfig;
use crate::error::TrainError;
use crate::ranks::Ranks;
use nf4_quant::QuantConfig;

/// Where frozen weights are while the device does not compute with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Residency {
    /// On the device, as far as there is room; the others in the host's memory.
    #[default]
    Auto,
    /// On the device.
    Device,
    /// In the host's memory, but for the blocks that `model.device_budget` has room for.
    Host,
}

impl fmt::Display for Residency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => "auto",
            Self::Device => "device",
            Self::Host => "host",
        })
    }
}

/// Bytes of a model's frozen weights.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WeightBytes {
    /// Those of each block that can be streamed.
    blocks: Vec<u64>,
    /// Embeddings, output head, norms, routers, biases: what stays on the device.
    other: u64,
}

impl WeightBytes {
    /// Of a model whose linear layers are held as `quant` says, or dense with `width` bytes an element.
    pub fn new(model: &ModelConfig, quant: Option<QuantConfig>, width: u64) -> Self {
        let mut blocks = vec![0; model.num_hidden_layers];
        let mut other = model.table_values() as u64 * width;
        for spec in model.linear_specs() {
            let elements = spec.shape.iter().product::<usize>() as u64;
            other += if spec.bias { spec.shape[0] as u64 * width } else { 0 };
            let block = block_of(&spec.path).and_then(|index| blocks.get_mut(index));
            match (spec.role, block) {
                (LinearRole::Projection | LinearRole::Expert, Some(block)) => *block += linear(elements, quant, width),
                // In front of the blocks.
                (LinearRole::Projection | LinearRole::Expert, None) => other += linear(elements, quant, width),
                _ => other += elements * width,
            }
        }
        // Norms, and what linear attention and routers have beside projections, are held in f32.
        let norms = model.norms().iter().map(|(_, features)| *features as u64).sum::<u64>();
        other += 4 * (norms + model.further_values() as u64);
        Self { blocks, other }
    }

    /// What stays on the device whatever is streamed.
    pub fn other(&self) -> u64 {
        self.other
    }

    /// The placement with so many streamed blocks.
    pub fn placed(&self, streamed: usize) -> Placed {
        let placement = Placement::evenly(self.blocks.len(), streamed);
        let of = |wanted: bool| {
            let blocks = self.blocks.iter().enumerate();
            blocks
                .filter(|(index, _)| placement.is_streamed(*index) == wanted)
                .map(|(_, bytes)| *bytes)
                .collect::<Vec<_>>()
        };
        let (resident, streamed) = (of(false).iter().sum(), of(true));
        let slots = SLOTS.min(streamed.len());
        let all: u64 = streamed.iter().sum();
        // What is in the slots at a turn stays for the way back, and for the next step's way forward.
        let at_turns = streamed.iter().take(slots).chain(streamed.iter().rev().take(slots)).sum::<u64>();
        Placed {
            placement,
            resident_bytes: resident,
            slot_bytes: slots as u64 * streamed.iter().copied().max().unwrap_or(0),
            host_bytes: all,
            bus_bytes: (2 * all).saturating_sub(at_turns),
            shared_by: 1,
        }
    }

    /// The placement where so many ranks hold a part each of every block: all blocks are streamed, from the other devices.
    pub fn shared(&self, ranks: usize) -> Placed {
        let all: u64 = self.blocks.iter().sum();
        let part = all.div_ceil(ranks.max(1) as u64);
        Placed { resident_bytes: part, host_bytes: 0, bus_bytes: 0, shared_by: ranks, ..self.placed(self.blocks.len()) }
    }

    /// The fewest streamed blocks for which `fits`, all of them where it never does.
    pub fn fewest(&self, fits: impl Fn(&Placed) -> bool) -> Placed {
        let (mut low, mut high) = (0, self.blocks.len());
        while low < high {
            let middle = low.midpoint(high);
            match fits(&self.placed(middle)) {
                true => high = middle,
                false => low = middle + 1,
            }
        }
        self.placed(low)
    }

    /// Of `fewest` and some placements with more streamed blocks within `host` bytes the one that takes least by `cost`.
    pub fn quickest(&self, fewest: Placed, host: u64, cost: impl Fn(&Placed) -> f64) -> Placed {
        /// More say little more, and each is a search of its own.
        const TRIED: usize = 8;
        let (least, most) = (fewest.placement.streamed(), self.blocks.len());
        if least == 0 || least == most {
            return fewest;
        }
        let more = (1..=TRIED).map(|i| self.placed(least + (most - least) * i / TRIED));
        let mut best = (cost(&fewest), fewest);
        for placed in more.filter(|placed| placed.host_bytes <= host) {
            let cost = cost(&placed);
            if cost < best.0 {
                best = (cost, placed);
            }
        }
        best.1
    }

    /// What `model.residency` and `model.device_budget` say, where they say it by themselves; `None` for `auto`.
    pub fn said(&self, config: &BaseModelConfig) -> Option<Placed> {
        match (config.residency, config.device_budget) {
            (Residency::Device, _) | (Residency::Host, Budget::Unlimited) => Some(self.placed(0)),
            (Residency::Host, Budget::Auto) => Some(self.placed(self.blocks.len())),
            (Residency::Host, Budget::Bytes(budget)) => {
                Some(self.fewest(|placed| self.other + placed.on_device() <= budget))
            }
            (Residency::Auto, _) => None,
        }
    }
}

/// The block that a module belongs to: the first number in its path.
fn block_of(path: &str) -> Option<usize> {
    path.split('.').find_map(|part| part.parse().ok())
}

/// Bytes of a linear layer.
fn linear(elements: u64, quant: Option<QuantConfig>, width: u64) -> u64 {
    let Some(quant) = quant else { return elements * width };
    let blocks = elements.div_ceil(quant.blocksize as u64);
    let absmax = if quant.double_quant { blocks + 4 * blocks.div_ceil(256) } else { 4 * blocks };
    elements.div_ceil(2) + absmax
}

/// Where the weights of a model's blocks are, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placed {
    /// The streamed blocks.
    pub placement: Placement,
    /// Bytes of the blocks, or of the parts of them, that stay on the device.
    pub resident_bytes: u64,
    /// Bytes of the places on the device that the others pass through.
    pub slot_bytes: u64,
    /// Bytes of the host's memory, pinned on CUDA.
    pub host_bytes: u64,
    /// Bytes over the bus in the forward and backward pass of a micro-batch.
    pub bus_bytes: u64,
    /// Ranks that hold a part each of the streamed blocks; 1 where these wait in the host's memory.
    pub shared_by: usize,
}

/// Of a device's free memory, what frozen weights take at most when nothing is said and the model is to answer: the rest is for the
/// cache of past tokens and a pass's activations.
const ANSWERING_SHARE: f64 = 0.85;

impl Placed {
    /// Of a model that is to answer on `device`, as the configuration says or, with `auto`, as far as there is room.
    pub fn to_answer(config: &BaseModelConfig, model: &ModelConfig, options: &LoadOptions, device: &Device) -> Self {
        let width = DType::from(options.dtype).size() as u64;
        let bytes = WeightBytes::new(model, options.quantization, width);
        bytes.said(config).unwrap_or_else(|| {
            let free = free_memory(device).map(|(free, _)| (free as f64 * ANSWERING_SHARE) as u64);
            let budget = match config.device_budget {
                Budget::Bytes(budget) => Some(budget),
                Budget::Auto | Budget::Unlimited => free.filter(|_| config.device_budget == Budget::Auto),
            };
            let fits = |placed: &Self| budget.is_none_or(|budget| bytes.other() + placed.on_device() <= budget);
            match options.quantization.is_some() && *device != Device::flex() {
                true => bytes.fewest(fits),
                false => bytes.placed(0),
            }
        })
    }

    /// Bytes on the device.
    pub fn on_device(&self) -> u64 {
        self.resident_bytes + self.slot_bytes
    }

    /// What a loader is told of it; nothing where all stays on the device. And what there is to say of it. `ranks` are those that train
    /// together, all of which have to come here.
    ///
    /// # Errors
    /// The ranks' cards don't meet, or another rank failed.
    pub fn streams(
        &self,
        device: &Device,
        ranks: Option<&Ranks>,
    ) -> Result<(Option<Streams>, Option<String>), TrainError> {
        let (placement, streamed) = (self.placement.clone(), self.placement.streamed());
        if let Some(ranks) = ranks.filter(|_| self.shared_by > 1) {
            let note = format!(
                "each of {} ranks holds a part of the frozen weights of every block (distributed.shard_base)",
                self.shared_by
            );
            return Ok((Some(Streams { placement, store: Box::new(ranks.shard_store(device)?) }), Some(note)));
        }
        let sharers = ranks.map_or(Ok(Ok(None)), |ranks| ranks.sharers(&placement, device))?;
        if streamed == 0 {
            return Ok((None, None));
        }
        let (store, copies) = match sharers {
            Ok(Some(sharers)) => {
                let copies = format!(", in one copy for {} ranks", sharers.count);
                (HostStore::shared(device, sharers), copies)
            }
            Ok(None) => (HostStore::new(device), String::new()),
            Err(problem) => (HostStore::new(device), format!(", in a copy for each rank: {problem}")),
        };
        let blocks = placement.len();
        let note = format!(
            "the frozen weights of {streamed} of {blocks} blocks wait in the host's memory (model.residency){copies}"
        );
        Ok((Some(Streams { placement, store: Box::new(store) }), Some(note)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

    use super::*;
    use crate::{Plan, Room, RowSizes, TrainConfig};
    use burn::tensor::FloatDType;
    use std::path::Path;

    fn shape(name: &str, file: &str) -> ModelConfig {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(file);
        let config = serde_json::from_slice::<serde_json::Value>(&std::fs::read(path).unwrap()).unwrap()[name].take();
        ModelConfig::from_json(&config, Path::new(name)).unwrap()
    }

    #[test]
    fn a_70b_takes_34_gib_of_which_two_blocks_are_on_the_device() {
        let bytes = WeightBytes::new(&shape("llama-2-70b", "llama_shapes.json"), Some(QuantConfig::default()), 2);
        let (none, all) = (bytes.placed(0), bytes.placed(80));
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        assert!((32.8..33.2).contains(&gib(none.resident_bytes)), "{}", gib(none.resident_bytes));
        assert_eq!((none.slot_bytes, none.host_bytes, none.bus_bytes), (0, 0, 0));
        assert_eq!((all.resident_bytes, all.host_bytes), (0, none.resident_bytes));
        assert_eq!(all.slot_bytes, all.host_bytes / 40);
        // Of each way two blocks are there already.
        assert_eq!(all.bus_bytes, 2 * all.host_bytes / 80 * 78);
        let half = bytes.placed(40);
        assert_eq!((half.resident_bytes, half.host_bytes), (none.resident_bytes / 2, none.resident_bytes / 2));
    }

    #[test]
    fn ranks_that_share_a_70b_have_half_of_it_each() {
        let bytes = WeightBytes::new(&shape("llama-2-70b", "llama_shapes.json"), Some(QuantConfig::default()), 2);
        let (whole, shared) = (bytes.placed(0), bytes.shared(2));
        assert_eq!(shared.resident_bytes, whole.resident_bytes / 2);
        assert_eq!((shared.placement.streamed(), shared.host_bytes), (80, 0));
        assert_eq!(shared.slot_bytes, whole.resident_bytes / 40);
        // On two cards of 24 GB, whose 22.3 GiB hold it with embeddings and head in bf16, and leave some 4 for a step.
        let gib = (shared.on_device() + bytes.other()) as f64 / f64::from(1 << 30);
        assert!((18.0..18.6).contains(&gib), "{gib}");
    }

    #[test]
    fn a_budget_says_how_many_blocks_stay() {
        let bytes = WeightBytes::new(&shape("llama-2-7b", "llama_shapes.json"), Some(QuantConfig::default()), 2);
        let block = bytes.blocks[0];
        let said = |residency, device_budget| {
            let config = BaseModelConfig { residency, device_budget, ..Default::default() };
            bytes.said(&config).map(|placed| placed.placement.streamed())
        };
        assert_eq!(said(Residency::Device, Budget::Auto), Some(0));
        assert_eq!(said(Residency::Host, Budget::Auto), Some(32));
        assert_eq!(said(Residency::Host, Budget::Unlimited), Some(0));
        assert_eq!(said(Residency::Host, Budget::Bytes(bytes.other + 12 * block)), Some(22));
        assert_eq!(said(Residency::Host, Budget::Bytes(bytes.other + 12 * block - 1)), Some(23));
        assert_eq!(said(Residency::Host, Budget::Bytes(0)), Some(32));
        assert_eq!(said(Residency::Auto, Budget::Bytes(0)), None);
    }

    fn of(shape: &ModelConfig, room: u64, set: &[(&str, &str)]) -> Plan {
        let mut config = TrainConfig::default();
        for (key, value) in [("lora.rank", "16"), ("train.batch_size", "1")].iter().chain(set) {
            config.set(key, value).unwrap();
        }
        let room = Room { on_cpu: false, device: Some(room), host: 128 << 30, ranks: 1, of_host: 1 };
        Plan::new(&config, shape, FloatDType::BF16, &room, &RowSizes::of_longest(2048)).unwrap()
    }

    #[test]
    fn auto_streams_nothing_that_fits_and_else_what_is_quickest() {
        let shape = shape("llama-2-70b", "llama_shapes.json");
        let mut last: Option<f64> = None;
        for gib in [80_u64, 36, 30, 24, 16, 10] {
            let plan = of(&shape, gib << 30, &[]);
            assert!(plan.memory.total() <= gib << 30, "{gib}: {:?}", plan.memory);
            let streamed = plan.weights.placement.streamed();
            assert_eq!(streamed == 0, gib == 80, "{gib}: {streamed}");
            // No plan in less room is quicker.
            let work = plan.work.with_waiting();
            assert!(last.is_none_or(|last| last <= work), "{gib}: {work} after {last:?}");
            assert_eq!(plan.host.weights.bytes, plan.weights.host_bytes);
            // Four micro-batches a step.
            assert_eq!(plan.host.weights.moved, 4 * plan.weights.bus_bytes);
            if streamed > 0 && streamed < 80 {
                let budget = format!("{}B", plan.memory.linear_weights + plan.memory.other_weights);
                let said = of(&shape, 80 << 30, &[("model.residency", "host"), ("model.device_budget", &budget)]);
                assert_eq!(said.weights, plan.weights, "a budget of as much says the same");
            }
            last = Some(work);
        }
        // What stays on the device is told, and what would help.
        let stays = of(&shape, 24 << 30, &[("model.residency", "device")]);
        assert!(stays.memory.total() > 24 << 30 && stays.host.weights.bytes == 0);
        // Without room in the host's memory nothing can wait there.
        let room = Room { on_cpu: false, device: Some(24 << 30), host: 1 << 30, ranks: 1, of_host: 1 };
        let config = TrainConfig::default();
        let plan = Plan::new(&config, &shape, FloatDType::BF16, &room, &RowSizes::default()).unwrap();
        assert_eq!(plan.weights.placement.streamed(), 0);
    }

    #[test]
    fn ranks_of_a_host_share_what_may_wait_there() {
        let shape = shape("llama-2-7b", "llama_shapes.json");
        let plan = |device: u64, host: u64, of_host: usize| {
            let mut config = TrainConfig::default();
            config.set("model.residency", "device").unwrap();
            let room = Room { on_cpu: false, device: Some(device << 30), host: host << 30, ranks: of_host, of_host };
            Plan::new(&config, &shape, FloatDType::BF16, &room, &RowSizes::of_longest(2048)).unwrap()
        };
        let mut offloads = false;
        for device in 6..24 {
            let (alone, of_four) = (plan(device, 2, 1), plan(device, 8, 4));
            assert_eq!(alone.policies, of_four.policies, "{device}");
            assert!(of_four.host.activations.bytes <= 2 << 30, "{device}");
            offloads |= plan(device, 8, 1).host.activations.bytes > 2 << 30;
        }
        assert!(offloads, "no plan here has more wait on the host than a rank's part");
    }

    #[test]
    fn experts_are_streamed_and_routers_are_not() {
        let model = shape("qwen3-30b-a3b", "moe_shapes.json");
        let bytes = WeightBytes::new(&model, Some(QuantConfig::default()), 2);
        let routers: u64 = model
            .linear_specs()
            .iter()
            .filter(|spec| spec.role == LinearRole::Router)
            .map(|spec| 2 * spec.shape.iter().product::<usize>() as u64)
            .sum();
        assert!(routers > 0 && bytes.other > routers);
        assert!(bytes.blocks.iter().all(|block| *block == bytes.blocks[0] && *block > 100 << 20));
    }
}
