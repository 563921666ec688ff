//! `train.activation_checkpointing = "auto"`: for each block the policy that makes a step fastest within the memory there is.
//!
//! All policies give the same bits, so the choice is one of time and memory alone. [`Activations`] says what a micro-batch of
//! the largest size takes under given policies; [`choose`] tries the mixtures that can be best, and takes the one with the
//! least work:
//!
//! - The last blocks keep everything. The backward pass starts with them, so what they hold is gone before the blocks below
//!   run again, and need room to do so.
//! - The blocks before them keep both branches, as far as memory goes, and the first ones as much as is left for them.
//!
//! Work is counted in operations of the products that run a second time. Attention counts more than its operations, because
//! it runs at a lower rate; what goes to the host's memory and back is charged with a part of a block's work, less in large
//! batches, where copies hide behind products (on an H100, `offload_selective` costs 1.5 % beside `selective` with 8,192
//! tokens, and 5 to 6 % with 2,048).

use burn::tensor::{Device, FloatDType};
use paged_optim::{Budget, free_memory};
use qlora_layers::ActivationCheckpointing;
use qlora_models::{LinearRole, ModelConfig, host_memory};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

use ActivationCheckpointing::{Full, None as Everything, Offload, OffloadSelective, Selective};

/// Tokens that go through a block's second branch at a time.
pub(crate) const PART: u64 = 8192;
/// What an operation of attention counts beside one of a product.
const ATTENTION: f64 = 1.7;

/// Bytes and work of a micro-batch, by what its blocks keep. Blocks are alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Activations {
    /// Blocks of the model.
    pub blocks: u64,
    /// Tokens of the micro-batch.
    pub tokens: u64,
    on_cpu: bool,
    /// Kept of a block that keeps everything, both branches, its input.
    recorded: u64,
    branches: u64,
    input: u64,
    /// A block that runs again as a whole, or branch by branch.
    working: u64,
    working_by_branch: u64,
    /// The gradients of a block that was recorded.
    working_recorded: u64,
    logits: u64,
    /// All that is trained, in f32: a part for each block.
    gradients: u64,
    /// Operations of a block's forward pass, and of those that run again after each kind of keeping.
    forward: f64,
    again: f64,
    again_by_branch: f64,
}

impl Activations {
    /// Of `rows` rows of `len` tokens. `scores` are bytes of attention scores that exist at a time, where attention is no
    /// fused kernel; `trained` bytes of what is trained.
    pub(crate) fn new(
        model: &ModelConfig,
        dtype: FloatDType,
        on_cpu: bool,
        [rows, len]: [u64; 2],
        [scores, logits, trained]: [u64; 3],
    ) -> Self {
        let width: u64 = if dtype == FloatDType::F32 { 4 } else { 2 };
        let (hidden, tokens) = (model.hidden_size as u64, rows * len);
        let [q, k, v] = model.qkv_widths().map(|features| features as u64);
        let (attention, qkv) = ((model.num_attention_heads * model.head_dim) as u64, q + k + v);
        // Each of a token's experts reads its own row and gives one back.
        let intermediate = model.intermediate_size as u64;
        let gated = |values: u64| {
            model.experts.map_or(values * intermediate, |experts| {
                let routed = experts.per_token as u64 * (values * experts.intermediate_size as u64 + 3 * hidden);
                (routed + values * experts.shared_size as u64).max(values * intermediate)
            })
        };
        // Linear attention: projections, what the convolution makes of them, normalised queries and keys, and outputs before and behind
        // norm and gate; then the gradients, states of every 64 tokens and corrections that its backward pass holds.
        // Short convolutions: what one projection gives, its products and the convolution between them.
        let of_conv = model.short_conv.map_or((0, 0), |_| (6 * hidden, 4 * hidden));
        let (linear, linear_back) = model.linear.map_or(of_conv, |linear| {
            let (channels, [_, _, values]) = (linear.channels() as u64, linear.widths().map(|width| width as u64));
            let states = (linear.value_heads * linear.key_dim * linear.value_dim) as u64 / 64;
            (3 * channels + 4 * values, 3 * channels + 2 * states + 5 * values)
        });
        // Latent attention: what its projections give before heads are put together, and what is cut off them behind attention.
        let heads = model.num_attention_heads as u64;
        let (projected, cut) = model.latent.map_or((0, 0), |latent| {
            let features = latent.query_dim() + latent.plain_dim + latent.value_dim;
            (heads * features as u64, heads * latent.value_dim as u64)
        });
        let mixer = (qkv + attention + cut).max(linear);
        let bytes = |features: u64| tokens * features * width;
        let of_part = |features: u64| tokens.min(PART) * features * width;
        // Inputs, norms, projections and attention; then the second branch with its gradients, and those that flow through.
        let first = 2 * hidden + mixer + projected;
        let second = 2 * hidden + gated(4);
        let (recorded, working, working_by_branch, working_recorded) = match on_cpu {
            true => {
                let block = bytes(6 * hidden + (4 * attention).max(linear + linear_back) + gated(5)) + scores;
                (block, block, block, 0)
            }
            false => {
                // Attention's gradient of its queries is summed in f32.
                let attention_back = bytes(2 * hidden) + (tokens * q * 4).max(bytes(linear_back));
                let whole = bytes(first) + attention_back + of_part(second) + scores;
                let by_branch = (bytes(2 * hidden) + of_part(second)).max(bytes(first) + attention_back) + scores;
                let recorded = bytes(4 * hidden + mixer + gated(3)) + scores;
                (recorded, whole, by_branch, attention_back + bytes(gated(3)))
            }
        };
        let per_token = |wanted: fn(LinearRole) -> bool| {
            let specs = model.linear_specs().into_iter().filter(|spec| wanted(spec.role));
            specs.map(|spec| spec.shape.iter().product::<usize>() as f64).sum::<f64>()
        };
        let blocks = model.num_hidden_layers as u64;
        let of_experts = model.experts.map_or(0.0, |experts| experts.per_token as f64 / experts.count.max(1) as f64);
        let products = (per_token(|role| matches!(role, LinearRole::Projection | LinearRole::Dense))
            + of_experts * per_token(|role| role == LinearRole::Expert))
            / blocks.max(1) as f64;
        // The last product of each branch need not run again.
        let output = (hidden * if cut > 0 { cut } else { attention }) as f64;
        let down = gated(1) as f64 * hidden as f64;
        let work = |weights: f64| 2.0 * weights.max(0.0) * tokens as f64;
        let scores_work = ATTENTION * 2.0 * len as f64 * q as f64 * tokens as f64;
        Self {
            blocks,
            tokens,
            on_cpu,
            recorded,
            branches: bytes(2 * hidden + attention),
            input: bytes(hidden),
            working,
            working_by_branch,
            working_recorded,
            logits,
            gradients: trained,
            forward: work(products) + scores_work,
            again: work(products - down) + scores_work,
            again_by_branch: work(products - down - output),
        }
    }

    /// Bytes that a block of a policy keeps on the device.
    fn kept(&self, policy: ActivationCheckpointing) -> u64 {
        match policy {
            Everything => self.recorded,
            Selective => self.branches,
            Full => self.input,
            // What is offloaded stays in the same memory.
            OffloadSelective if self.on_cpu => self.branches,
            Offload if self.on_cpu => self.input,
            OffloadSelective | Offload => 0,
        }
    }

    /// The policy of each block. Blocks beyond the policies have the last one.
    pub(crate) fn of_blocks(&self, policies: &[ActivationCheckpointing]) -> Vec<ActivationCheckpointing> {
        let of = |index: u64| policies.get(index as usize).or(policies.last()).copied().unwrap_or_default();
        (0..self.blocks).map(of).collect()
    }

    /// The most bytes at a time, gradients of what is trained among them. Blocks beyond the policies have the last one.
    pub fn peak(&self, policies: &[ActivationCheckpointing]) -> u64 {
        let all = self.of_blocks(policies);
        let kept: u64 = all.iter().map(|policy| self.kept(*policy)).sum();
        // What is offloaded is on the device for two blocks at a time.
        let passing = match all.iter().find(|policy| policy.offloads()) {
            Some(OffloadSelective) if !self.on_cpu => 2 * self.branches,
            Some(_) if !self.on_cpu => 2 * self.input,
            _ => 0,
        };
        let head = if self.on_cpu { 5 * self.logits / 2 } else { 2 * self.logits };
        if self.on_cpu {
            // Most of what was kept is freed by the time its logits' memory would be needed again.
            let keeps_everything = all.iter().all(|policy| policy.keeps_everything());
            let most = if keeps_everything { kept.max(head) } else { kept + self.working.max(head) };
            return most + self.gradients;
        }
        let mut most = kept + head;
        let mut left = kept;
        for (index, policy) in all.iter().enumerate().rev() {
            let working = match policy {
                Everything => self.working_recorded,
                Selective | OffloadSelective => self.working_by_branch,
                Full | Offload => self.working,
            };
            let done = self.blocks - index as u64;
            most = most.max(left + working + self.gradients * done / self.blocks);
            left -= self.kept(*policy);
        }
        most + passing
    }

    /// Bytes that wait in the host's memory. Blocks beyond the policies have the last one.
    pub fn on_host(&self, policies: &[ActivationCheckpointing]) -> u64 {
        let of_block = |policy: &ActivationCheckpointing| match policy {
            OffloadSelective => self.branches,
            Offload => self.input,
            _ => 0,
        };
        self.of_blocks(policies).iter().map(of_block).sum()
    }

    /// Operations of all blocks' forward pass.
    pub(crate) fn forward_operations(&self) -> f64 {
        self.blocks as f64 * self.forward
    }

    /// Operations of all blocks in a step of the micro-batch: forward, backward, and what runs again.
    pub(crate) fn operations(&self, policies: &[ActivationCheckpointing]) -> f64 {
        // Weights have no gradient of their own, so backward does as much as forward.
        2.0 * self.blocks as f64 * self.forward
            + self.of_blocks(policies).into_iter().map(|policy| self.cost(policy)).sum::<f64>()
    }

    /// What a block of a policy costs beyond one that keeps everything, in operations.
    fn cost(&self, policy: ActivationCheckpointing) -> f64 {
        let (selective, all) = if self.tokens >= PART { (0.015, 0.005) } else { (0.06, 0.03) };
        // Forward, and backward twice that.
        let block = 3.0 * self.forward;
        match policy {
            Everything => 0.0,
            Selective => self.again_by_branch,
            Full => self.again,
            OffloadSelective => self.again_by_branch + selective * block,
            Offload => self.again + all * block,
        }
    }
}

/// `train.activation_checkpointing`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checkpointing {
    /// What [`choose`] chooses.
    #[default]
    Auto,
    /// One policy for all blocks.
    Fixed(ActivationCheckpointing),
}

impl Checkpointing {
    /// The policy that it names.
    pub fn fixed(self) -> Option<ActivationCheckpointing> {
        match self {
            Self::Auto => None,
            Self::Fixed(policy) => Some(policy),
        }
    }

    /// Its name in configurations.
    pub fn name(self) -> &'static str {
        self.fixed().map_or("auto", ActivationCheckpointing::name)
    }
}

impl From<ActivationCheckpointing> for Checkpointing {
    fn from(policy: ActivationCheckpointing) -> Self {
        Self::Fixed(policy)
    }
}

impl Serialize for Checkpointing {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

impl<'de> Deserialize<'de> for Checkpointing {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let all = || std::iter::once(Self::Auto).chain(ActivationCheckpointing::ALL.map(Self::Fixed));
        all().find(|choice| choice.name() == name).ok_or_else(|| {
            let known: Vec<String> = all().map(|choice| format!("`{}`", choice.name())).collect();
            D::Error::custom(format!("unknown variant `{name}`, expected one of {}", known.join(", ")))
        })
    }
}

/// Policies of the blocks, first to last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policies(pub Vec<ActivationCheckpointing>);

impl Policies {
    /// The one that takes most of the device's memory.
    pub fn heaviest(&self) -> ActivationCheckpointing {
        let order = [Everything, Selective, Full, OffloadSelective, Offload];
        order.into_iter().find(|policy| self.0.contains(policy)).unwrap_or_default()
    }
}

impl From<ActivationCheckpointing> for Policies {
    /// The same for every block.
    fn from(policy: ActivationCheckpointing) -> Self {
        Self(vec![policy])
    }
}

impl fmt::Display for Policies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = 0;
        for run in self.0.chunk_by(|a, b| a == b) {
            let last = first + run.len() - 1;
            let separator = if first == 0 { "" } else { ", " };
            let name = run[0].name();
            match (run.len() == self.0.len(), first == last) {
                (true, _) => write!(f, "{name}")?,
                (_, true) => write!(f, "{separator}{name} for block {first}")?,
                _ => write!(f, "{separator}{name} for blocks {first} to {last}")?,
            }
            first = last + 1;
        }
        Ok(())
    }
}

/// The memory that a run may take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Whether activations lie in the host's memory.
    pub on_cpu: bool,
    /// Bytes of tensors that there is room for, weights and all; `None` where nobody says.
    pub device: Option<u64>,
    /// Bytes that may wait in the host's memory, of all ranks of this host together.
    pub host: u64,
    /// Ranks that train together, each with such a device; 0 and 1 are a process that is alone.
    pub ranks: usize,
    /// Those of them that are on this host; 0 and 1 are one that has it alone.
    pub of_host: usize,
}

impl Room {
    /// What is free on `device`, before anything is loaded, or what `budget` leaves of it, of a process that is alone.
    pub fn of(device: &Device, budget: Budget) -> Self {
        Self::of_rank(device, budget, 1, 1)
    }

    /// The same of one of several `ranks`, as many as `of_host` of which are on this host and see the same free memory there.
    ///
    /// On CUDA the allocator's pages took 8 to 23 % more than the tensors in them in the steps that were measured, and the
    /// programs' own code and buffers some 300 MiB beyond what is there when a device is opened. The optimizer leaves a
    /// thirty-second of the device free, and would send its state to the host for it. On the CPU an eighth of what is free is
    /// left to others, and ranks have a part each.
    pub fn of_rank(device: &Device, budget: Budget, ranks: usize, of_host: usize) -> Self {
        let available = host_memory();
        let host = available.unwrap_or(0) / 2;
        let on_cpu = *device == Device::flex();
        let free = match on_cpu {
            true => available.map(|bytes| bytes / 8 * 7 / of_host.max(1) as u64),
            false => free_memory(device).map(|(free, total)| free.saturating_sub(total / 32)),
        };
        let bytes = match budget {
            Budget::Bytes(bytes) => Some(free.map_or(bytes, |free| free.min(bytes))),
            Budget::Auto => free,
            Budget::Unlimited => Some(u64::MAX),
        };
        let tensors = |bytes: u64| bytes.saturating_sub(300 << 20) / 6 * 5;
        let device = bytes.map(|bytes| if on_cpu { bytes } else { tensors(bytes) });
        Self { on_cpu, device, host, ranks, of_host }
    }
}

/// Policies that can be the best in some memory, with what they take and cost.
struct Mixture {
    work: f64,
    peak: u64,
    policies: Policies,
}

/// Every mixture that keeps within `host` bytes of the host's memory.
fn mixtures(activations: &Activations, host: u64) -> Vec<Mixture> {
    let blocks = activations.blocks as usize;
    let rests: &[ActivationCheckpointing] =
        if activations.on_cpu { &[Full] } else { &[Full, OffloadSelective, Offload] };
    let mut mixtures = Vec::new();
    for rest in rests {
        for everything in 0..=blocks {
            for branches in 0..=blocks - everything {
                let counts = [(*rest, blocks - everything - branches), (Selective, branches), (Everything, everything)];
                let policies: Vec<ActivationCheckpointing> =
                    counts.into_iter().flat_map(|(policy, count)| std::iter::repeat_n(policy, count)).collect();
                if activations.on_host(&policies) > host {
                    continue;
                }
                let work = counts.iter().map(|(policy, count)| *count as f64 * activations.cost(*policy)).sum();
                mixtures.push(Mixture { work, peak: activations.peak(&policies), policies: Policies(policies) });
            }
        }
    }
    mixtures
}

/// The mixture with the least work of those that fit into `room`; where none does, that which takes least.
fn best(mixtures: &[Mixture], room: u64) -> Option<&Mixture> {
    let by_work = |a: &&Mixture, b: &&Mixture| a.work.total_cmp(&b.work).then(a.peak.cmp(&b.peak));
    let fitting = mixtures.iter().filter(|mixture| mixture.peak <= room).min_by(by_work);
    fitting.or_else(|| mixtures.iter().min_by_key(|mixture| mixture.peak))
}

/// The policies with the least work of those that fit into `room` bytes on the device and `host` in the host's memory, and those to
/// fall back on, each the best within nine tenths of what the one before takes. Where none fits, that which takes least;
/// where nobody says what room there is, `full`.
pub fn choose(activations: &Activations, room: Option<u64>, host: u64) -> (Policies, Vec<Policies>) {
    let mixtures = mixtures(activations, host);
    let first = match room {
        Some(room) => best(&mixtures, room),
        None => mixtures.iter().find(|mixture| mixture.policies.heaviest() == Full),
    };
    let lighter = |last: &&Mixture| best(&mixtures, last.peak / 10 * 9).filter(|next| next.peak < last.peak);
    let mut chosen = std::iter::successors(first, lighter).map(|mixture| mixture.policies.clone());
    // `full` for all blocks is among them always: it offloads nothing.
    (chosen.next().unwrap_or_else(|| Full.into()), chosen.collect())
}

#[cfg(test)]
mod tests;
