//! What a run would train and need, worked out from `config.json` and the data, without loading weights.

use crate::checkpointing::{Activations, Checkpointing, Policies, Room, choose};
use crate::config::{Reference, TrainConfig};
use crate::error::TrainError;
use crate::loss::MAX_LOGITS;
use crate::rates::Work;
use crate::residency::{Placed, WeightBytes};
use burn::tensor::FloatDType;
use paged_optim::{Budget, OptimizerConfig};
use qlora_data::{BatchOrder, Examples};
use qlora_layers::ops::{MAX_SCORES, takes_head_dim};
use qlora_layers::target_modules::{Target, resolve};
use qlora_models::ModelConfig;
use std::collections::HashMap;

/// Bytes by purpose. Weights, adapters and optimizer state are exact; activations are an estimate of
/// the largest micro-batch (see [`Plan::new`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Linear layers, 4-bit codes and their statistics, or dense: those that stay, and the places that others pass through.
    pub linear_weights: u64,
    /// Embeddings, output head and norms.
    pub other_weights: u64,
    /// What is trained, in f32: factors, magnitudes, biases, modules trained in full; and the adapter of a reference.
    pub adapters: u64,
    /// The optimizer's moments, as far as `train.optimizer_budget` lets them stay on the device.
    pub optimizer: u64,
    /// Gradients of what is trained, activations kept for backward, a block's working set, and the logits: the most at a time.
    pub activations: u64,
    /// The program itself and the rows, on the CPU, where they share the memory.
    pub program: u64,
    /// Copies of adapters and moments while a checkpoint is written, on the CPU.
    pub saving: u64,
}

impl MemoryEstimate {
    /// The most that is needed at a time: in a step, or while a checkpoint is written.
    pub fn total(&self) -> u64 {
        let resident = self.program + self.linear_weights + self.other_weights + self.adapters + self.optimizer;
        resident + self.activations.max(self.saving)
    }
}

/// What waits in the host's memory while the device does not need it, and what of it an optimizer step moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostEstimate {
    /// Frozen weights of blocks.
    pub weights: Waiting,
    /// What blocks keep for the backward pass, of a micro-batch of the largest size.
    pub activations: Waiting,
    /// The optimizer's moments beyond `train.optimizer_budget`.
    pub optimizer: Waiting,
}

/// Bytes in the host's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waiting {
    /// How many at most.
    pub bytes: u64,
    /// How many an optimizer step moves over the bus, in either direction.
    pub moved: u64,
}

impl HostEstimate {
    /// All of it.
    pub fn parts(&self) -> [Waiting; 3] {
        [self.weights, self.activations, self.optimizer]
    }
}

/// What a run would train.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The adapters, with their layers' `[out_features, in_features]`.
    pub targets: Vec<(Target, [usize; 2])>,
    /// Parameters of the base model.
    pub base_parameters: u64,
    /// Parameters that are trained.
    pub trainable_parameters: u64,
    /// Memory on the device.
    pub memory: MemoryEstimate,
    /// What each block keeps for the backward pass.
    pub policies: Policies,
    /// What it keeps instead, where the device has less memory than was thought; empty where the configuration says what is kept.
    pub lighter: Vec<Policies>,
    /// What a micro-batch of the largest size does.
    pub work: Work,
    /// Where the weights of blocks are.
    pub weights: Placed,
    /// What waits in the host's memory.
    pub host: HostEstimate,
}

/// What of a run's rows its memory depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RowSizes {
    /// Tokens of the longest row, or of the fullest sequence, where rows are packed.
    pub longest: usize,
    /// Sequences of an epoch, where rows are packed.
    pub sequences: Option<usize>,
    /// Bytes of the rows themselves in the program's memory.
    pub held_bytes: u64,
}

impl RowSizes {
    /// Those of rows that a run takes in this order.
    pub fn new(order: &BatchOrder, examples: &Examples) -> Self {
        let sequences = order.packed().map(|packed| packed.sequences);
        Self { longest: order.longest(), sequences, held_bytes: examples.held_bytes() }
    }

    /// Those of rows of which nothing but the longest is known, of so many tokens.
    pub fn of_longest(longest: usize) -> Self {
        Self { longest, ..Self::default() }
    }

    /// Rows and tokens of each of the largest micro-batch: as many of the longest row as a batch has, or of the fullest sequence.
    fn largest_batch(&self, batch_size: usize) -> [usize; 2] {
        [self.sequences.map_or(batch_size, |sequences| batch_size.min(sequences)), self.longest]
    }
}

impl Plan {
    /// Works a run out within `memory`.
    ///
    /// [`Activations`] has the formulas of what a micro-batch of the longest row takes; of packed rows it is as if a sequence were one
    /// row. The
    /// program itself takes 38 MiB on the CPU, the logits two and a half times their size: both measured, as resident
    /// memory of the process on Linux.
    ///
    /// # Errors
    /// A LoRA setting is out of range, or nothing matches.
    pub fn new(
        config: &TrainConfig,
        model: &ModelConfig,
        dtype: FloatDType,
        memory: &Room,
        sizes: &RowSizes,
    ) -> Result<Self, TrainError> {
        let on_cpu = memory.on_cpu;
        let linears = model.linear_specs();
        let shapes: HashMap<&str, [usize; 2]> = linears.iter().map(|spec| (spec.path.as_str(), spec.shape)).collect();
        let targets: Vec<(Target, [usize; 2])> = resolve(&config.lora, &model.adaptable_modules())?
            .into_iter()
            .map(|target| {
                // The head may be the embedding table, and both have this shape.
                let table = [model.vocab_size, model.hidden_size];
                let shape = shapes.get(target.path.as_str()).copied().unwrap_or(table);
                (target, shape)
            })
            .collect();
        let width: u64 = if dtype == FloatDType::F32 { 4 } else { 2 };
        let elements = |[rows, columns]: [usize; 2]| (rows * columns) as u64;
        let (mut in_blocks, mut dense) = (0, 0);
        for spec in &linears {
            match spec.role.is_quantized() {
                true => in_blocks += elements(spec.shape),
                false => dense += elements(spec.shape),
            }
            dense += if spec.bias { spec.shape[0] as u64 } else { 0 };
        }
        let quant = config.quantization.quant_config();
        let all_weights = WeightBytes::new(model, quant, width);
        let embeddings = model.table_values() as u64;
        // Held in f32, as norms are.
        let linear_attention = model.further_values() as u64;
        let norms = model.norms().iter().map(|(_, width)| *width as u64).sum::<u64>() + linear_attention;
        // A bias or a magnitude for each output feature; an embedding's features are its columns.
        let (lora, embedding) = (&config.lora, model.adaptable_modules().pop());
        let parameters = |(target, [out, input]): &(Target, [usize; 2])| {
            let is_embedding = embedding.as_ref().is_some_and(|module| module.path == target.path);
            let features = if is_embedding { *input } else { *out };
            let vectors = usize::from(lora.use_dora) + usize::from(lora.lora_bias && !is_embedding);
            let factors = [target.rank * input, target.rank * out];
            factors.into_iter().chain(std::iter::repeat_n(features, vectors))
        };
        let whole = model.saved_modules(lora)?;
        let trained = model.trained_tokens(lora)?;
        let rows = [trained.embedding, trained.head].map(|tokens| tokens.len() * model.hidden_size);
        let rows = rows.into_iter().filter(|len| *len > 0);
        let lens = || {
            let whole = whole.iter().map(|(_, values)| *values);
            targets.iter().flat_map(parameters).chain(whole).chain(rows.clone())
        };
        let trainable: u64 = lens().map(|len| len as u64).sum();
        let optimizer = OptimizerConfig { kind: config.train.optimizer, ..Default::default() };
        let state: u64 = lens().map(|len| optimizer.state_bytes(len)).sum();
        let state_on_device = match config.train.optimizer_budget {
            Budget::Bytes(budget) => state.min(budget),
            Budget::Auto | Budget::Unlimited => state,
        };

        let [rows, len] = sizes.largest_batch(config.train.batch_size).map(|count| count as u64);
        // Four f32 values for each of the scores that exist at a time, where attention is no fused kernel: GPUs have one for 16
        // bits and heads that are not too wide.
        let has_kernels = model.attended().all(|index| takes_head_dim(model.attention(index).head_dim));
        let scores = match on_cpu || (dtype != FloatDType::F32 && has_kernels) {
            true => 0,
            false => 4 * 4 * (rows * model.num_attention_heads as u64 * len * len).min(MAX_SCORES as u64),
        };
        let logits = width * (rows * len * model.vocab_size as u64).min(MAX_LOGITS as u64);
        let gradients = 4 * trainable;
        let activations = Activations::new(model, dtype, on_cpu, [rows, len], [scores, logits, gradients]);
        const PROGRAM: u64 = 38 << 20;
        let program = if on_cpu { PROGRAM + sizes.held_bytes } else { 0 };
        let other_weights = all_weights.other();
        // A reference with an adapter of its own has it beside the one that is trained.
        let compares = config.train.objective.has_reference() && !config.preference.precompute_reference;
        let reference = match &config.preference.reference {
            Reference::Start => config.train.from_adapter.is_some(),
            Reference::Base => false,
            Reference::Adapter(_) => true,
        };
        let adapters = if compares && reference { 8 * trainable } else { 4 * trainable };
        let rest = program + other_weights + adapters + state_on_device;
        let kept = |placed: &Placed| {
            let room = memory.device.map(|room| room.saturating_sub(rest + placed.on_device()));
            match config.train.activation_checkpointing {
                Checkpointing::Fixed(policy) => (policy.into(), Vec::new()),
                Checkpointing::Auto => {
                    // Weights wait there once for all ranks of the host, activations for each.
                    let host = memory.host.saturating_sub(placed.host_bytes) / memory.of_host.max(1) as u64;
                    choose(&activations, room, host)
                }
            }
        };
        let fits = |placed: &Placed| {
            let within = |room: u64| rest + placed.on_device() + activations.peak(&kept(placed).0.0) <= room;
            let budget = match config.model.device_budget {
                Budget::Bytes(budget) => budget,
                Budget::Auto | Budget::Unlimited => u64::MAX,
            };
            memory.device.is_none_or(within) && other_weights + placed.on_device() <= budget
        };
        let work_of = |placed: &Placed, policies: &Policies| {
            Work::new(model, &activations, policies, in_blocks, placed.bus_bytes)
        };
        let shared = config.distributed.shard_base && quant.is_some() && memory.ranks > 1;
        let said = if shared { Some(all_weights.shared(memory.ranks)) } else { all_weights.said(&config.model) };
        let weights = said.unwrap_or_else(|| {
            let fewest = all_weights.fewest(fits);
            // On the CPU both memories are one.
            let can_stream = quant.is_some() && !on_cpu && fewest.host_bytes <= memory.host;
            match can_stream {
                true => {
                    all_weights.quickest(fewest, memory.host, |placed| work_of(placed, &kept(placed).0).with_waiting())
                }
                false => all_weights.placed(0),
            }
        });
        let (policies, lighter) = kept(&weights);
        let work = work_of(&weights, &policies);
        let micro_batches = config.train.gradient_accumulation_steps as u64;
        let kept_on_host = if on_cpu { 0 } else { activations.on_host(&policies.0) };
        let paged = state - state_on_device;
        let host = HostEstimate {
            weights: Waiting { bytes: weights.host_bytes, moved: micro_batches * weights.bus_bytes },
            activations: Waiting { bytes: kept_on_host, moved: 2 * micro_batches * kept_on_host },
            optimizer: Waiting { bytes: paged, moved: 2 * paged },
        };
        Ok(Self {
            base_parameters: in_blocks + dense + embeddings + norms,
            trainable_parameters: trainable,
            memory: MemoryEstimate {
                linear_weights: weights.on_device(),
                other_weights,
                adapters,
                optimizer: state_on_device,
                activations: activations.peak(&policies.0),
                program,
                // The adapter once, the moments as they are and as the file's content.
                saving: if on_cpu { 4 * trainable + 2 * state } else { 0 },
            },
            targets,
            policies,
            lighter,
            work,
            weights,
            host,
        })
    }
}
