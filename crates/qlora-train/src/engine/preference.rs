//! Losses that compare answers: passes of the reference, and of prompts with answers of other rows, beside the model's own.
//!
//! The reference's passes have no graph and keep nothing; the model's log-probabilities are those of the pass whose activations are kept,
//! so that a step costs one more forward pass than a supervised one over the same rows, and none where the reference is known ahead.

use std::borrow::Borrow;

use burn::tensor::{Device, Gradients, Tensor};
use host_copies::DeviceError;
use qlora_data::{Batch, Example, Side};
use qlora_layers::Pass;
use qlora_models::Decoder;

use super::Engine;
use super::gradients::Step;
use super::pass::sequence;
use crate::error::TrainError;
use crate::loss::{LabelledTokens, Weights, log_probabilities, loss_and_gradient};
use crate::objective::{Counts, Divisors, LogProbs, Preferences, RowSums, numbers};
use crate::ranks::Ranks;

/// The log-probabilities of a row's answers by a reference: of the first, and of the second where it has two.
pub type ReferenceLogProbs = [f32; 2];

/// An objective that compares answers, and what it compares the model with.
#[derive(Clone, Debug)]
pub(super) struct Comparison {
    pub preferences: Preferences,
    /// The reference; `None` where the objective has none, or batches bring its log-probabilities along.
    pub reference: Option<Decoder>,
}

/// How much each row of a step counts, and z of `kto`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scope {
    pub divisors: Divisors,
    pub apart: f64,
}

impl Comparison {
    /// The divisors of micro-batches that are taken together.
    pub fn divisors(&self, labelled: &[LabelledTokens], batches: &[impl Borrow<Batch>]) -> Divisors {
        let counts = Counts::of(batches.iter().map(Borrow::borrow));
        let (mut answer_tokens, mut tokens) = (0, 0);
        for (labelled, batch) in labelled.iter().zip(batches) {
            answer_tokens += labelled.answers.of_side(batch.borrow(), Side::Chosen);
            tokens += labelled.answers.whole_of_chosen(batch.borrow());
        }
        let items = if counts.pairs > 0 { counts.pairs } else { counts.chosen + counts.rejected };
        Divisors {
            items: items.max(1) as f64,
            answer_tokens: answer_tokens.max(1) as f64,
            tokens: tokens.max(1) as f64,
        }
    }

    /// The reference's log-probabilities of a batch's answers, `[rows]`; `None` where the objective has no reference.
    ///
    /// # Errors
    /// A batch does not bring along what there is no model to compute with.
    fn reference(&self, batch: &Batch, labelled: &LabelledTokens) -> Result<Option<Tensor<1>>, TrainError> {
        if !self.preferences.has_reference() {
            return Ok(None);
        }
        match &self.reference {
            Some(model) => Ok(Some(answers(model, batch, labelled))),
            None => Err(TrainError::NoReference),
        }
    }
}

/// The log-probabilities of a batch's answers, `[rows]`, without a graph.
fn answers(model: &Decoder, batch: &Batch, labelled: &LabelledTokens) -> Tensor<1> {
    answers_and_sums(model, batch, labelled).into_answers()
}

/// The same, with what else is summed over rows.
fn answers_and_sums(model: &Decoder, batch: &Batch, labelled: &LabelledTokens) -> RowSums {
    let sequence = sequence(model, batch);
    let x = model.begin(&sequence, &batch.input_ids, Pass::INFERENCE);
    let x = model.blocks().iter().fold(x, |x, block| model.run_block(block, x, &sequence, Pass::INFERENCE));
    labelled.answers.sums(&log_probabilities(model, &x, labelled, Pass::INFERENCE))
}

impl Engine {
    /// With an objective that compares answers, and what it compares the model with, if it does: a model over the same frozen weights. Without
    /// one batches must bring the reference's log-probabilities along.
    #[must_use]
    pub fn with_preferences(mut self, preferences: Preferences, reference: Option<Decoder>) -> Self {
        self.comparison = Some(Comparison { preferences, reference });
        self
    }

    /// What is compared, where something is.
    pub fn preferences(&self) -> Option<&Preferences> {
        self.comparison.as_ref().map(|comparison| &comparison.preferences)
    }

    /// Loss and figures of a micro-batch, `[1 + FIGURES]`, and the gradient in `x`.
    pub(super) fn compared(
        &self,
        comparison: &Comparison,
        (batch, labelled): (&Batch, &LabelledTokens),
        x: Tensor<2>,
        scope: Scope,
        pass: Pass,
        collect: impl FnMut(&mut Gradients),
    ) -> Result<(Tensor<1>, Tensor<2>), TrainError> {
        if batch.judged.is_none() {
            return Err(TrainError::NotJudged);
        }
        let model = &self.model;
        let reference = match known(batch, model.device())? {
            Some(known) => Some(known),
            None => comparison.reference(batch, labelled)?,
        };
        let policy = labelled.answers.sums(&log_probabilities(model, &x, labelled, pass)).tracked();
        let log_probs = LogProbs { policy, reference: reference.map(Tensor::autodiff) };
        let (loss, figures) = comparison.preferences.loss(batch, &log_probs, scope.divisors, scope.apart);
        let scale = self.loss_scaler.scale();
        let from = loss.backward();
        // What a token's loss counts is the negative of what its log-probability does.
        let weights = labelled.answers.weights(&log_probs.policy, &from).mul_scalar(-scale);
        let (_, grad) = loss_and_gradient(model, x, labelled, &Weights::Each(Box::new(weights)), pass, collect);
        let loss = loss.without_autodiff().mul_scalar(scale);
        Ok((Tensor::cat(vec![loss, figures], 0), grad))
    }

    /// z of `kto`: how far the model is from its reference over prompts with answers of other rows, of all micro-batches of a step, at least 0.
    /// Ranks take the micro-batches in turn. `None` where no objective asks for it.
    pub(super) fn apart(&self, batches: &[impl Borrow<Batch>]) -> Result<Option<f64>, TrainError> {
        let Some(comparison) = self.comparison.as_ref().filter(|compared| compared.preferences.has_mismatches()) else {
            return Ok(None);
        };
        let Some(reference) = &comparison.reference else { return Err(TrainError::NoReference) };
        let mut mine = Vec::new();
        let (rank, count) = self.ranks.as_ref().map_or((0, 1), |ranks| (ranks.rank(), ranks.count()));
        for batch in batches.iter().skip(rank).step_by(count) {
            let rows = batch.borrow().judged.iter().flat_map(|judged| &judged.mismatched);
            let rows: Vec<&Example> = rows.collect();
            let batch = Batch::end_to_end(rows.iter().copied());
            let labelled = LabelledTokens::of(&batch, Some(&comparison.preferences));
            if labelled.is_empty() {
                self.pass_twice_idly()?;
                continue;
            }
            let ratio = answers(&self.model, &batch, &labelled) - answers(reference, &batch, &labelled);
            let ratio = ratio.sum().try_into_vec_as::<f32>().map_err(DeviceError::from)?;
            mine.push((f64::from(ratio.first().copied().unwrap_or(0.0)), rows.len() as f64));
        }
        if self.shared_base {
            let of_each = batches.len().div_ceil(count);
            let own = batches.len().saturating_sub(rank).div_ceil(count);
            (own..of_each).try_for_each(|_| self.pass_twice_idly())?;
        }
        let bytes = mine.iter().flat_map(|(sum, rows)| [sum.to_le_bytes(), rows.to_le_bytes()].concat()).collect();
        let all = match &self.ranks {
            Some(ranks) => ranks.all_gather(bytes)?,
            None => vec![bytes],
        };
        // In an order that does not depend on how many ranks there are.
        let of_rank = |bytes: &Vec<u8>| bytes.as_chunks::<8>().0.iter().map(|n| f64::from_le_bytes(*n)).collect();
        let of_ranks: Vec<Vec<f64>> = all.iter().map(of_rank).collect();
        let (mut sum, mut rows) = (0.0, 0.0);
        for turn in 0..batches.len().div_ceil(count) {
            for pair in of_ranks.iter().filter_map(|numbers| numbers.get(2 * turn..2 * turn + 2)) {
                sum += pair[0];
                rows += pair[1];
            }
        }
        Ok(Some(if rows > 0.0 { (sum / rows).max(0.0) } else { 0.0 }))
    }

    /// What another rank does for a batch of mismatched rows, where ranks share the base.
    fn pass_twice_idly(&self) -> Result<(), TrainError> {
        if self.shared_base {
            self.model.pass_idly(false)?;
            self.model.pass_idly(false)?;
        }
        Ok(())
    }

    /// The loss of a batch in its three parts, each as a sum: of pairs or judged rows, of tokens of preferred answers, of those and their
    /// prompts; and the figures behind them, `[3 + FIGURES]`.
    pub(super) fn compared_for_evaluation(
        &self,
        comparison: &Comparison,
        (batch, labelled): (&Batch, &LabelledTokens),
        apart: f64,
    ) -> Result<Tensor<1>, TrainError> {
        let policy = answers_and_sums(&self.model, batch, labelled);
        let reference = match known(batch, self.model.device())? {
            Some(known) => Some(known),
            None => comparison.reference(batch, labelled)?,
        };
        let log_probs = LogProbs { policy, reference };
        const NONE: f64 = f64::INFINITY;
        let parts = [[1.0, NONE, NONE], [NONE, 1.0, NONE], [NONE, NONE, 1.0]];
        let (mut all, mut figures) = (Vec::new(), None);
        for [items, answer_tokens, tokens] in parts {
            let divisors = Divisors { items, answer_tokens, tokens };
            let (loss, of_batch) = comparison.preferences.loss(batch, &log_probs, divisors, apart);
            all.push(loss);
            figures = Some(of_batch);
        }
        all.extend(figures);
        Ok(Tensor::cat(all, 0))
    }

    /// Whether each micro-batch begins with a pass of the reference.
    pub(super) fn passes_reference(&self) -> bool {
        self.comparison.as_ref().is_some_and(|comparison| comparison.reference.is_some())
    }

    /// The scope of a step's micro-batches.
    pub(super) fn scope(&self, step: &Step<'_>) -> Result<Option<Scope>, TrainError> {
        let Some(comparison) = &self.comparison else { return Ok(None) };
        let divisors = comparison.divisors(step.labelled, step.micro_batches);
        Ok(Some(Scope { divisors, apart: self.apart(step.micro_batches)?.unwrap_or(0.0) }))
    }
}

/// What a batch brings along of its reference, `[rows]`.
fn known(batch: &Batch, device: &Device) -> Result<Option<Tensor<1>>, TrainError> {
    let values = batch.judged.iter().flat_map(|judged| &judged.reference).copied().collect::<Vec<f32>>();
    match values.len() {
        0 => Ok(None),
        rows if rows == batch.rows => Ok(Some(numbers(values, device))),
        _ => Err(TrainError::NoReference),
    }
}

/// The log-probabilities of answers by a model, of every row of a data set, in batches of its rows in their order. Ranks take batches in turn.
///
/// # Errors
/// The device fails, or another rank does.
pub(crate) fn reference_log_probs(
    model: &Decoder,
    batches: impl ExactSizeIterator<Item = Batch>,
    preferences: &Preferences,
    ranks: Option<&Ranks>,
    shared_base: bool,
    mut done: impl FnMut(usize, usize) -> Result<(), TrainError>,
) -> Result<Vec<ReferenceLogProbs>, TrainError> {
    let (rank, count) = ranks.map_or((0, 1), |ranks| (ranks.rank(), ranks.count()));
    let (all, mut bytes, mut passes) = (batches.len(), Vec::new(), 0);
    for (number, batch) in batches.enumerate() {
        if number % count != rank {
            continue;
        }
        let labelled = LabelledTokens::of(&batch, Some(preferences));
        let values = answers(model, &batch, &labelled).try_into_vec_as::<f32>().map_err(DeviceError::from)?;
        let origins = batch.judged.iter().flat_map(|judged| &judged.origins);
        for ((row, side), value) in origins.zip(values) {
            bytes.extend((2 * *row as u64 + *side as u64).to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        passes += 1;
        done(number + 1, all)?;
    }
    if shared_base {
        (passes..all.div_ceil(count)).try_for_each(|_| model.pass_idly(false))?;
    }
    let of_ranks = match ranks {
        Some(ranks) => ranks.all_gather(bytes)?,
        None => vec![bytes],
    };
    let mut known = Vec::new();
    for entry in of_ranks.iter().flat_map(|bytes| bytes.as_chunks::<12>().0) {
        let [a, b, c, d, e, f, g, h, value @ ..] = *entry;
        let place = u64::from_le_bytes([a, b, c, d, e, f, g, h]) as usize;
        if known.len() <= place / 2 {
            known.resize(place / 2 + 1, [0.0; 2]);
        }
        known[place / 2][place % 2] = f32::from_le_bytes(value);
    }
    Ok(known)
}

#[cfg(test)]
mod tests;
