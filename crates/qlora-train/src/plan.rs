//! What a run would train and need, worked out from `config.json` and the data, without loading weights.

use crate::config::TrainConfig;
use crate::data::Example;
use crate::error::TrainError;
use burn::tensor::FloatDType;
use paged_optim::{Budget, OptimizerConfig};
use qlora_layers::ActivationCheckpointing;
use qlora_layers::target_modules::{LinearModule, Target, resolve};
use qlora_models::ModelConfig;

/// Bytes by purpose. Weights, adapters and optimizer state are exact; activations are an estimate of
/// the largest micro-batch (see [`Plan::new`]).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryEstimate {
    /// Linear layers, 4-bit codes and their statistics, or dense.
    pub linear_weights: u64,
    /// Embeddings, output head and norms.
    pub other_weights: u64,
    /// LoRA factors in f32.
    pub adapters: u64,
    /// Their gradients in f32.
    pub gradients: u64,
    /// The optimizer's moments, as far as `train.optimizer_budget` lets them stay on the device.
    pub optimizer: u64,
    /// Activations kept for backward, one block's working set, and the logits.
    pub activations: u64,
}

impl MemoryEstimate {
    /// The sum.
    pub fn total(&self) -> u64 {
        self.linear_weights + self.other_weights + self.adapters + self.gradients + self.optimizer + self.activations
    }
}

/// What a run would train.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The adapters, with their layers' `[out_features, in_features]`.
    pub targets: Vec<(Target, [usize; 2])>,
    /// Parameters of the base model.
    pub base_parameters: u64,
    /// Parameters of the adapters.
    pub trainable_parameters: u64,
    /// Memory on the device.
    pub memory: MemoryEstimate,
}

impl Plan {
    /// Works a run out.
    ///
    /// Activations: a block keeps about `10 hidden + 6 intermediate` values a token in the compute dtype and
    /// four f32 scores per head and pair of tokens; without checkpointing every block does, with it one does
    /// and each keeps its input. Logits count three times in f32 (logits, log-softmax, gradient).
    ///
    /// # Errors
    /// A LoRA setting is out of range, or nothing matches.
    pub fn new(
        config: &TrainConfig,
        model: &ModelConfig,
        dtype: FloatDType,
        examples: &[Example],
    ) -> Result<Self, TrainError> {
        let linears = model.linears();
        let modules: Vec<LinearModule> = linears
            .iter()
            .map(|(path, _)| LinearModule { is_output_head: path == "lm_head", path: path.clone() })
            .collect();
        let targets: Vec<(Target, [usize; 2])> = resolve(&config.lora, &modules)?
            .into_iter()
            .filter_map(|target| {
                let shape = linears.iter().find(|(path, _)| *path == target.path)?.1;
                Some((target, shape))
            })
            .collect();
        let width: u64 = if dtype == FloatDType::F32 { 4 } else { 2 };
        let elements = |[rows, columns]: [usize; 2]| (rows * columns) as u64;
        let in_blocks: u64 =
            linears.iter().filter(|(path, _)| path != "lm_head").map(|(_, shape)| elements(*shape)).sum();
        let head: u64 = linears.iter().filter(|(path, _)| path == "lm_head").map(|(_, shape)| elements(*shape)).sum();
        let embeddings = elements([model.vocab_size, model.hidden_size]);
        let norms = ((2 * model.num_hidden_layers + 1) * model.hidden_size) as u64;
        let factors = || targets.iter().flat_map(|(target, [out, input])| [target.rank * input, target.rank * out]);
        let trainable: u64 = factors().map(|len| len as u64).sum();
        let optimizer = OptimizerConfig { kind: config.train.optimizer, ..Default::default() };
        let state: u64 = factors().map(|len| optimizer.state_bytes(len)).sum();
        let state_on_device = match config.train.optimizer_budget {
            Budget::Bytes(budget) => state.min(budget),
            Budget::Auto | Budget::Unlimited => state,
        };

        let linear_weights = match config.quantization.quant_config() {
            None => in_blocks * width,
            Some(q) => {
                let blocks = in_blocks.div_ceil(q.blocksize as u64);
                let absmax = if q.double_quant { blocks + 4 * blocks.div_ceil(256) } else { 4 * blocks };
                in_blocks.div_ceil(2) + absmax
            }
        };
        let longest = examples.iter().map(|example| example.input_ids.len()).max().unwrap_or(0);
        let (rows, len) = (config.train.batch_size as u64, longest as u64);
        let tokens = rows * len;
        let scores = 4 * 4 * rows * model.num_attention_heads as u64 * len * len;
        let block = tokens * (10 * model.hidden_size + 6 * model.intermediate_size) as u64 * width + scores;
        let blocks = model.num_hidden_layers as u64;
        let kept = match config.train.activation_checkpointing {
            ActivationCheckpointing::None => blocks * block,
            ActivationCheckpointing::Full => block + blocks * tokens * model.hidden_size as u64 * width,
        };
        Ok(Self {
            base_parameters: in_blocks + head + embeddings + norms,
            trainable_parameters: trainable,
            memory: MemoryEstimate {
                linear_weights,
                other_weights: (head + embeddings + norms) * width,
                adapters: 4 * trainable,
                gradients: 4 * trainable,
                optimizer: state_on_device,
                activations: kept + 3 * 4 * tokens * model.vocab_size as u64,
            },
            targets,
        })
    }
}
