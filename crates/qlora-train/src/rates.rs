//! How long a step will take on a kind of card where steps were measured.
//!
//! Three terms describe the recorded steps of an H100 within 10 %: operations at a share of what the best dense product
//! reaches, a time for each block (norms, rotations, launches), and one for each time that a weight is dequantized, which small
//! batches feel. What comes over the bus from pinned memory comes beside that: a pass takes as long as the longer of both. Other cards
//! have no rates here until somebody measures them; nothing is extrapolated.

use crate::checkpointing::{Activations, Policies};
use qlora_models::ModelConfig;

/// What a step of one micro-batch of the largest size does, for [`seconds`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// Tokens of the micro-batch.
    pub tokens: u64,
    /// Operations of all products and of attention, forward, backward and again.
    operations: f64,
    blocks: f64,
    /// Frozen weights of blocks, once for each pass that multiplies by them.
    dequantized: f64,
    has_experts: bool,
    /// The forward pass's part of the operations.
    forward: f64,
    /// Bytes that come over the bus while the forward pass runs, and while the backward pass does.
    bus: [f64; 2],
}

impl Work {
    /// Of a micro-batch under policies. `weights` is the number of frozen weights of all blocks, `streamed` the bytes of those that
    /// come over the bus, forward and backward together.
    pub(crate) fn new(
        model: &ModelConfig,
        activations: &Activations,
        policies: &Policies,
        weights: u64,
        streamed: u64,
    ) -> Self {
        let again =
            activations.of_blocks(&policies.0).iter().filter(|policy| !policy.keeps_everything()).count() as f64;
        let blocks = activations.blocks as f64;
        // Forward, and the gradient of the input.
        let head = 4.0 * (model.vocab_size * model.hidden_size) as f64 * activations.tokens as f64;
        let operations = activations.operations(&policies.0) + head;
        let each_way = streamed as f64 / 2.0;
        Self {
            tokens: activations.tokens,
            operations,
            forward: activations.forward_operations() / operations.max(1.0),
            bus: [each_way, each_way + activations.on_host(&policies.0) as f64],
            blocks,
            dequantized: weights as f64 * (2.0 + again / blocks.max(1.0)),
            has_experts: model.experts.is_some(),
        }
    }
}

/// Operations that a card does while a byte comes over its bus: an H100's and an A100's are near this, smaller cards do fewer, so
/// that more is hidden there than this says.
const OPERATIONS_PER_BYTE: f64 = 10_600.0;

impl Work {
    /// What it takes in operations, those among them in whose time the bus is waited for: to compare plans for a card of which nothing
    /// is known.
    pub(crate) fn with_waiting(&self) -> f64 {
        let passes = [self.forward, 1.0 - self.forward].map(|part| part * self.operations);
        let waits = passes.iter().zip(self.bus).map(|(pass, bytes)| (bytes * OPERATIONS_PER_BYTE - pass).max(0.0));
        self.operations + waits.sum::<f64>()
    }
}

/// What was measured on a kind of card.
struct Rates {
    /// Operations per second that count.
    operations: f64,
    /// Seconds for each block.
    block: f64,
    /// Seconds for each weight that is dequantized.
    weight: f64,
    /// Bytes per second from pinned memory.
    bus: f64,
}

/// Part of a card's name, its rates for dense models and for models with experts.
const CARDS: [(&str, Rates, Rates); 1] = [(
    "H100 80GB HBM3",
    Rates { operations: 0.74 * 785e12, block: 1.0e-3, weight: 7.5e-13, bus: 54.8e9 },
    // From two steps of Qwen3-30B-A3B's shape, of 2,048 and 8,192 tokens.
    Rates { operations: 0.33 * 785e12, block: 2.2e-3, weight: 0.0, bus: 54.8e9 },
)];

/// What a micro-batch will take on a card, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Seconds {
    /// All of it.
    pub whole: f64,
    /// What of it is spent waiting for what comes over the bus.
    pub exposed: f64,
    /// How long that keeps the bus.
    pub bus: f64,
}

/// What a micro-batch will take on a card, by the card's name; `None` where nothing was measured on such a one.
pub fn seconds(card: &str, work: &Work) -> Option<Seconds> {
    let (_, dense, experts) = CARDS.iter().find(|(name, ..)| card.contains(name))?;
    let rates = if work.has_experts { experts } else { dense };
    let computing = work.operations / rates.operations + work.blocks * rates.block + work.dequantized * rates.weight;
    let passes = [work.forward * computing, (1.0 - work.forward) * computing];
    let exposed = passes.iter().zip(work.bus).map(|(pass, bytes)| (bytes / rates.bus - pass).max(0.0)).sum::<f64>();
    let bus = work.bus.iter().sum::<f64>() / rates.bus;
    Some(Seconds { whole: computing + exposed, exposed, bus })
}
