//! One optimizer step: forward and backward over its micro-batches, clipping, update.
//!
//! The loss of a step is the sum over all unmasked tokens of all its micro-batches, divided once by
//! their number. Accumulating k micro-batches therefore gives the gradients of one batch k times
//! the size, however the tokens are spread over them.
//!
//! When the device runs out of memory, the optimizer's state moves to the host and the step is done once more: nothing
//! was updated yet, and dropout draws the same masks.
//!
//! The host waits only once per step, to read the loss, and only after the update is queued; while the device works on
//! the update, the host begins with the next step. If loss or gradients are not finite, the update kernel itself leaves
//! everything unchanged; what follows for the run is [`crate::loss_scale`]'s to say.

mod buckets;
mod evaluate;
mod gradients;
mod noise;
mod pass;
mod preference;

use crate::checkpointing::{PART, Policies};
use crate::config::ParameterRates;
use crate::error::TrainError;
use crate::loss::{LabelledTokens, chunk_len};
use crate::loss_scale::{LossScaler, LossScaling};
use crate::objective::{Counts, FIGURES, PreferenceFigures, Preferences};
use crate::ranks::Ranks;
use burn::module::Param;
use burn::tensor::{DType, Tensor, TensorData};
use gradients::{Computed, Step};
use host_copies::{DeviceError, client_of, is_cuda};
use noise::EmbeddingNoise;
use paged_optim::{Budget, Clip, Optimizer, OptimizerConfig, Scalars, Update};
use preference::Comparison;
use qlora_data::Batch;
use qlora_models::Decoder;
use std::collections::VecDeque;

pub use evaluate::Evaluation;
pub(crate) use gradients::ParameterGrads;
pub use preference::ReferenceLogProbs;
pub(crate) use preference::reference_log_probs;

/// What one optimizer step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepOutput {
    /// Mean loss over the step's unmasked tokens, in nats.
    pub loss: f64,
    /// Global norm of the gradients before clipping.
    pub grad_norm: f64,
    /// Unmasked tokens.
    pub label_tokens: usize,
    /// What loss scaling did, where it is on. A step that it skipped changed nothing, and loss or norm is not finite.
    pub loss_scaling: Option<LossScaling>,
    /// Seconds that this rank waited for the sums of all, where there are several.
    pub waited_seconds: Option<f64>,
    /// What is told of answers that are compared.
    pub preference: Option<PreferenceFigures>,
}

impl StepOutput {
    /// Whether loss scaling skipped the step.
    pub fn is_skipped(&self) -> bool {
        self.loss_scaling.is_some_and(|scaling| scaling.skipped)
    }
}

/// A model in training: its adapters, their optimizer, and how activations are kept.
#[derive(Debug)]
pub struct Engine {
    model: Decoder,
    /// Number of the first parameter of each block, and of the head: parameters are numbered as the model lists them.
    first_of_block: Vec<usize>,
    optimizer: Optimizer,
    /// What each block keeps.
    policies: Policies,
    /// What they keep instead when the device's memory is short, and what has to be told of that.
    lighter: VecDeque<Policies>,
    notice: Option<String>,
    max_grad_norm: f32,
    /// How each parameter is updated beside others; empty: all alike.
    rates: Vec<ParameterRates>,
    /// Noise on embeddings in training.
    noise: EmbeddingNoise,
    /// What compares answers, where something does.
    comparison: Option<Comparison>,
    /// Whether the device's allocator has seen a whole step.
    settled: bool,
    loss_scaler: LossScaler,
    /// The ranks that share each step, where there are several.
    ranks: Option<Ranks>,
    /// Whether each of them holds a part of the frozen weights alone, so that all have to do as many passes as each other.
    shared_base: bool,
}

impl Engine {
    /// Takes a model whose adapters are in place. Experts' adapters are [joined](Decoder::join_experts) where they can be.
    ///
    /// # Errors
    /// [`TrainError::NothingToTrain`] when it has no adapter.
    pub fn new(
        mut model: Decoder,
        optimizer: OptimizerConfig,
        budget: Budget,
        max_grad_norm: f32,
        policies: impl Into<Policies>,
    ) -> Result<Self, TrainError> {
        model.join_experts();
        let (names, lens): (Vec<String>, Vec<usize>) =
            model.parameters().into_iter().map(|(name, parameter)| (name, parameter.shape().num_elements())).unzip();
        if lens.is_empty() {
            return Err(TrainError::NothingToTrain);
        }
        let mut first_of_block = vec![model.embedding_parameters().len()];
        for block in model.blocks() {
            first_of_block.push(first_of_block[first_of_block.len() - 1] + block.parameters().len());
        }
        let optimizer = Optimizer::new(optimizer, &lens, model.device(), budget).with_names(names);
        model.track();
        let (policies, lighter) = (policies.into(), VecDeque::new());
        let loss_scaler = LossScaler::default();
        let (notice, settled) = (None, false);
        Ok(Self {
            model,
            first_of_block,
            optimizer,
            policies,
            lighter,
            notice,
            max_grad_norm,
            rates: Vec::new(),
            noise: EmbeddingNoise::default(),
            comparison: None,
            settled,
            loss_scaler,
            ranks: None,
            shared_base: false,
        })
    }

    /// With loss scaling, which a model that computes in f16 needs.
    #[must_use]
    pub fn with_loss_scaler(mut self, loss_scaler: LossScaler) -> Self {
        self.loss_scaler = loss_scaler;
        self
    }

    /// With rates for each parameter, in the order of [`Decoder::parameters`].
    #[must_use]
    pub fn with_rates(mut self, rates: Vec<ParameterRates>) -> Self {
        self.rates = rates;
        self
    }

    /// With NEFTune's noise of this alpha on the embeddings of training rows; 0: none.
    #[must_use]
    pub fn with_neftune(mut self, alpha: f32) -> Self {
        self.noise = EmbeddingNoise { alpha };
        self
    }

    /// As one of several ranks, each of which must be given the same micro-batches, rates and seeds.
    #[must_use]
    pub fn with_ranks(mut self, ranks: Option<Ranks>) -> Self {
        self.ranks = ranks;
        self
    }

    /// Over a model of whose frozen weights each rank holds a part. A step that does not fit into the device's memory is an error then.
    #[must_use]
    pub fn with_shared_base(mut self) -> Self {
        self.shared_base = true;
        self
    }

    /// The ranks that hold a part of the frozen weights each, where they do.
    pub(crate) fn sharers(&self) -> Option<&Ranks> {
        self.ranks.as_ref().filter(|_| self.shared_base)
    }

    /// With policies to fall back on, one after the other, each time a step does not fit into the device's memory.
    #[must_use]
    pub fn with_lighter(mut self, lighter: Vec<Policies>) -> Self {
        self.lighter = lighter.into();
        self
    }

    /// What each block keeps for the backward pass.
    pub fn policies(&self) -> &Policies {
        &self.policies
    }

    /// What the last step had to change, once.
    pub fn take_notice(&mut self) -> Option<String> {
        self.notice.take()
    }

    /// The model in its present state. What experts [joined](Decoder::join_experts) is theirs again in [`Decoder::parted`].
    pub fn model(&self) -> &Decoder {
        &self.model
    }

    /// The model, done with training.
    pub fn into_model(self) -> Decoder {
        let mut model = self.model;
        model.part_experts();
        model
    }

    /// The optimizer.
    pub fn optimizer(&self) -> &Optimizer {
        &self.optimizer
    }

    /// The optimizer, to read its state or to restore it.
    pub fn optimizer_mut(&mut self) -> &mut Optimizer {
        &mut self.optimizer
    }

    /// The loss scale and what it depends on.
    pub fn loss_scaler(&self) -> &LossScaler {
        &self.loss_scaler
    }

    /// The loss scale, to restore it.
    pub fn loss_scaler_mut(&mut self) -> &mut LossScaler {
        &mut self.loss_scaler
    }

    /// One optimizer step over `micro_batches`, those of all ranks. `seed` picks this step's dropout masks.
    ///
    /// # Errors
    /// Another rank failed (adapters and moments are unchanged then).
    /// No micro-batch has an unmasked token, the loss or the gradients are not finite (beyond what loss scaling can cure)
    /// or the device's memory is short (adapters and moments are unchanged then), or the device fails.
    pub fn step(&mut self, micro_batches: &[Batch], learning_rate: f64, seed: u64) -> Result<StepOutput, TrainError> {
        let _span = tracing::trace_span!("step").entered();
        let preferences = self.preferences();
        let labelled: Vec<LabelledTokens> =
            micro_batches.iter().map(|batch| LabelledTokens::of(batch, preferences)).collect();
        let label_tokens: usize = labelled.iter().map(LabelledTokens::len).sum();
        if label_tokens == 0 {
            return Err(TrainError::NoLabels);
        }
        if !self.settled {
            self.size_pages(micro_batches);
        }
        let mut step = Step { micro_batches, labelled: &labelled, label_tokens, seed, scope: None };
        step.scope = self.scope(&step)?;
        let mut buckets = self.buckets();
        let mut compute = |engine: &Self| {
            let local = engine.local(&step, buckets.as_mut());
            local.map_err(|e| with_largest_batch(e, micro_batches, &engine.policies))
        };
        let mut local = compute(self);
        // What ranks share of the base they gather at the same places, which a step that one of them does once more would leave.
        let again = !self.shared_base;
        while again && matches!(local, Err(TrainError::OutOfMemory { .. })) && (self.make_room()? || self.keep_less()) {
            local = compute(self);
        }
        if let (Err(_), Some(failure)) = (&local, self.ranks.as_ref().and_then(Ranks::failure)) {
            return Err(failure.into());
        }
        drop(buckets);
        let Computed { numbers, waited, norm, grads } = self.joined(&step, local?)?;
        let compared = step.scope.map(|scope| (Counts::of(micro_batches), scope.apart));
        self.update(grads, norm, learning_rate)?;
        let _span = tracing::trace_span!("read_back").entered();
        let numbers = numbers.wait()?;
        if !std::mem::replace(&mut self.settled, true) {
            // CubeCL's pages grow with what is asked of them. Those that the first step has outgrown go back to the driver here,
            // which else holds them.
            self.model.device().memory_cleanup();
        }
        let figures = if compared.is_some() { FIGURES } else { 0 };
        let [loss, grad_norm, ref rest @ ..] = numbers[..] else {
            let sent = format!("it sent {} numbers instead of loss and norm", numbers.len());
            return Err(DeviceError::Failed(sent).into());
        };
        if !loss.is_finite() || !grad_norm.is_finite() {
            self.optimizer.discount_void_step();
            // Sums that were broken off are no numbers.
            if let Some(failure) = self.ranks.as_ref().and_then(Ranks::failure) {
                return Err(failure.into());
            }
        }
        let (of_answers, of_device) = rest.split_at(figures.min(rest.len()));
        let waited_seconds = of_device.first().copied().map(f64::from).or(waited);
        let of_answers: Vec<f64> = of_answers.iter().copied().map(f64::from).collect();
        let has_mismatches = self.preferences().is_some_and(Preferences::has_mismatches);
        let preference = compared
            .map(|(counts, apart)| PreferenceFigures::new(&of_answers, counts, has_mismatches.then_some(apart)));
        let scale = self.loss_scaler.scale();
        let [loss, grad_norm] = [loss / scale, grad_norm / scale];
        let loss_scaling = self.loss_scaler.update(loss, grad_norm, learning_rate)?;
        Ok(StepOutput {
            loss: f64::from(loss),
            grad_norm: f64::from(grad_norm),
            label_tokens,
            loss_scaling,
            waited_seconds,
            preference,
        })
    }

    /// Brings the device's allocator to the page size that steps need, before the first one.
    ///
    /// CubeCL's pages follow the largest buffer so far. In a step that asks for larger and larger ones, what is kept keeps outgrown
    /// pages alive, and nothing else goes into them: memory that no later step takes. So the largest buffer is asked for first,
    /// and what lies in smaller pages, adapters, moves.
    fn size_pages(&self, micro_batches: &[Batch]) {
        let device = self.model.device();
        // Other runtimes may have no buffer as large as an estimate.
        if client_of(device).is_some_and(|client| is_cuda(&client)) {
            let largest = largest_buffer(&self.model, micro_batches);
            drop(Tensor::<1>::empty([largest.div_ceil(4)], (device, DType::F32)));
            device.memory_cleanup();
        }
    }

    /// Moves the optimizer's state out of the device's memory; false when none was there.
    fn make_room(&mut self) -> Result<bool, TrainError> {
        let freed = self.optimizer.make_room()?;
        self.model.device().memory_cleanup();
        Ok(freed > 0)
    }

    /// Keeps less for the backward pass from now on; false when there is no less.
    fn keep_less(&mut self) -> bool {
        let Some(next) = self.lighter.pop_front() else { return false };
        tracing::info!(before = %self.policies, now = %next, "the device's memory is short: less is kept for the backward pass");
        self.notice = Some(format!(
            "the device's memory is short: what is kept for the backward pass is now {next} (train.activation_checkpointing = \
             \"auto\"); a smaller train.memory_budget would have chosen that before the first step"
        ));
        self.policies = next;
        true
    }

    /// The sum of the absolute values of each parameter, by name: what a step changes.
    pub(crate) fn checksums(&self) -> Result<Vec<(String, f32)>, TrainError> {
        let (names, sums): (Vec<String>, Vec<Tensor<1>>) = self
            .model
            .parameters()
            .into_iter()
            .map(|(name, parameter)| (name, parameter.clone().without_autodiff().abs().sum()))
            .unzip();
        let sums = Tensor::cat(sums, 0).try_into_vec_as::<f32>().map_err(DeviceError::from)?;
        Ok(names.into_iter().zip(sums).collect())
    }

    /// Gives every rank rank 0's parameters: an initialisation that looks at activations may differ in its last bits where devices do.
    pub(crate) fn share_parameters(&mut self) -> Result<(), TrainError> {
        let Some(ranks) = self.ranks.clone() else { return Ok(()) };
        let mut bytes = Vec::new();
        for (_, parameter) in self.model.parameters().into_iter().filter(|_| ranks.rank() == 0) {
            let values = parameter.clone().without_autodiff().try_into_vec_as::<f32>().map_err(DeviceError::from)?;
            values.iter().for_each(|value| bytes.extend_from_slice(&value.to_le_bytes()));
        }
        let bytes = ranks.broadcast(bytes)?;
        if ranks.rank() == 0 {
            return Ok(());
        }
        let mut values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let device = self.model.device().clone();
        for (_, parameter) in self.model.parameters_mut() {
            let shape: [usize; 2] = parameter.dims();
            let data = TensorData::new(values.by_ref().take(shape[0] * shape[1]).collect::<Vec<f32>>(), shape);
            let dtype = parameter.dtype();
            *parameter = Param::initialized(parameter.id, Tensor::from_data(data, (&device, dtype)));
        }
        self.model.track();
        Ok(())
    }

    /// The scalars of each parameter's update.
    fn with_scalars(&self, updates: Vec<Update>, learning_rate: f64) -> Vec<(Update, Scalars)> {
        let (config, number) = (self.optimizer.config(), self.optimizer.updates() + 1);
        let scalars = |update: &Update| match self.rates.get(update.index) {
            Some(&ParameterRates { learning_rate_factor, weight_decay }) => {
                let config = OptimizerConfig { weight_decay, ..*config };
                config.scalars(number, learning_rate * learning_rate_factor, 0.0)
            }
            None => config.scalars(number, learning_rate, 0.0),
        };
        updates
            .into_iter()
            .map(|update| (scalars(&update), update))
            .map(|(scalars, update)| (update, scalars))
            .collect()
    }

    /// Clips and applies the gradients.
    fn update(&mut self, grads: Vec<Tensor<2>>, norm: Tensor<1>, learning_rate: f64) -> Result<(), TrainError> {
        let _span = tracing::trace_span!("optimizer").entered();
        let clip = Clip { norm, max_norm: self.max_grad_norm, loss_scale: self.loss_scaler.scale() };
        let mut updates = Vec::with_capacity(grads.len());
        for (index, ((_, parameter), grad)) in self.model.parameters_mut().into_iter().zip(grads).enumerate() {
            // The gradient takes the parameter's place meanwhile, so that the optimizer has the only handle of the
            // parameter and may update the parameter in place.
            let place = Param::initialized(parameter.id, grad.clone());
            let param = std::mem::replace(parameter, place).into_value().without_autodiff();
            updates.push(Update::new(index, param, grad));
        }
        let updated = self.optimizer.step_each(self.with_scalars(updates, learning_rate), Some(clip))?;
        for ((_, parameter), updated) in self.model.parameters_mut().into_iter().zip(updated) {
            let shape = parameter.dims();
            *parameter = Param::initialized(parameter.id, updated.reshape(shape));
        }
        self.model.track();
        Ok(())
    }
}

/// The error of a step; where the device ran out of memory, it names the step's largest micro-batch.
fn with_largest_batch(error: TrainError, micro_batches: &[Batch], policies: &Policies) -> TrainError {
    let TrainError::Device(DeviceError::OutOfMemory(report)) = &error else { return error };
    match micro_batches.iter().max_by_key(|batch| batch.input_ids.len()) {
        Some(batch) => {
            // Packed rows are one sequence.
            let (rows, cols) = if batch.packed { (1, batch.input_ids.len()) } else { (batch.rows, batch.cols) };
            tracing::debug!(%report, %policies, "out of memory");
            TrainError::OutOfMemory { rows, cols, checkpointing: policies.heaviest() }
        }
        None => error,
    }
}

/// Bytes of the largest buffer that a step over these micro-batches makes, of those that every model makes: logits, and the widest
/// activations; never less than the largest gradient of a parameter.
fn largest_buffer(model: &Decoder, micro_batches: &[Batch]) -> usize {
    let config = model.config();
    let width = DType::from(model.dtype()).size();
    let tokens = micro_batches.iter().map(|batch| batch.input_ids.len()).max().unwrap_or(0);
    let logits = chunk_len(config.vocab_size).min(tokens) * config.vocab_size;
    let queries = config.attended().map(|index| config.qkv_widths(index)[0]).max().unwrap_or_default();
    let mlp = match config.experts {
        Some(experts) => {
            (experts.per_token * experts.intermediate_size.max(config.hidden_size)).max(experts.shared_size)
        }
        None => config.intermediate_size,
    };
    // The MLP takes parts of the tokens; attention sums the gradient of its queries in f32.
    let mlp = width * mlp * tokens.min(PART as usize);
    let activations = mlp.max(tokens * (width * config.hidden_size).max(4 * queries));
    let parameters = model.parameters().into_iter().map(|(_, parameter)| 4 * parameter.shape().num_elements());
    parameters.max().unwrap_or(0).max(width * logits).max(activations)
}

#[cfg(test)]
mod tests {
    use super::*;
    use qlora_data::Example;
    use qlora_layers::ActivationCheckpointing;

    #[test]
    fn a_short_memory_is_told_from_other_failures() {
        let row = |len| Example { input_ids: vec![1; len], labels: vec![1; len], line: 1 };
        let batches = [Batch::new(&[row(9)], 0), Batch::new(&[row(5), row(7)], 0), Batch::new(&[row(3)], 0)];
        let of = |error| with_largest_batch(error, &batches, &ActivationCheckpointing::OffloadSelective.into());
        let short = of(DeviceError::OutOfMemory("out of device memory allocating 312475648 bytes".into()).into());
        assert!(matches!(short, TrainError::OutOfMemory { rows: 2, cols: 7, .. }));
        let message = short.to_string();
        assert!(message.contains("2 rows of 7 tokens") && message.contains("\"offload\", which"), "{message}");
        let packed = [Batch::end_to_end(&[row(3), row(4)]), Batch::new(&[row(3), row(3)], 0)];
        let short = DeviceError::OutOfMemory("out of memory".into()).into();
        let error = with_largest_batch(short, &packed, &ActivationCheckpointing::Full.into());
        assert!(matches!(error, TrainError::OutOfMemory { rows: 1, cols: 7, .. }));
        let failed = of(DeviceError::Failed("the device is gone".into()).into());
        assert!(matches!(failed, TrainError::Device(DeviceError::Failed(_))));
        assert!(matches!(of(TrainError::NoLabels), TrainError::NoLabels));
    }

    /// A policy that needs as little memory as any has no other to propose.
    #[test]
    fn the_advice_depends_on_the_policy() {
        let message = |checkpointing| TrainError::OutOfMemory { rows: 1, cols: 2, checkpointing }.to_string();
        let full = message(ActivationCheckpointing::Full);
        assert!(full.contains("\"offload_selective\" or \"offload\", which"), "{full}");
        let offload = message(ActivationCheckpointing::Offload);
        assert!(offload.ends_with("Start afresh with a smaller train.batch_size or data.max_length"), "{offload}");
    }
}
