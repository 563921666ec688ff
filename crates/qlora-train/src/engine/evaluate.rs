//! Evaluation: loss and accuracy without training. Ranks share the batches, and add up what one process would.

use std::borrow::Borrow;

use host_copies::DeviceError;
use qlora_data::{Batch, Side};
use qlora_layers::Pass;

use super::Engine;
use super::pass::sequence;
use crate::error::TrainError;
use crate::loss::{LabelledTokens, loss_and_correct};
use crate::objective::{Counts, FIGURES, PreferenceFigures, Preferences};

/// What one pass over evaluation rows found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Mean loss over the unmasked tokens, in nats.
    pub loss: f64,
    /// Part of the unmasked tokens that the model thought likeliest; not measured where answers are compared.
    pub accuracy: Option<f64>,
    /// Unmasked tokens.
    pub tokens: usize,
    /// What is told of answers that are compared.
    pub preference: Option<PreferenceFigures>,
}

/// Numbers of one batch: its unmasked tokens, and of a supervised one the sum of their losses and how many are right. Of one whose answers are
/// compared how many it has, pairs, tokens of preferred answers and of their rows, the parts of the loss, and figures.
type Sums = [f64; SUMS];

/// As many as either kind needs.
const SUMS: usize = 6 + 3 + FIGURES;

impl Engine {
    /// Loss and accuracy over the unmasked tokens of `batches`, without training. Among ranks each takes every so many of them,
    /// and all find the same: all must give the same batches.
    ///
    /// # Errors
    /// No batch has an unmasked token, the device fails, or another rank does.
    pub fn evaluate(&self, batches: impl IntoIterator<Item = impl Borrow<Batch>>) -> Result<Evaluation, TrainError> {
        self.evaluate_telling(batches, &mut |_| {})
    }

    /// As [`Engine::evaluate`]; `tell` hears how many batches this rank has done.
    ///
    /// # Errors
    /// As [`Engine::evaluate`].
    pub fn evaluate_telling(
        &self,
        batches: impl IntoIterator<Item = impl Borrow<Batch>>,
        tell: &mut dyn FnMut(usize),
    ) -> Result<Evaluation, TrainError> {
        match self.preferences().is_some_and(Preferences::has_mismatches) {
            true => {
                // What all rows are compared by is known when all were looked at.
                let batches: Vec<_> = batches.into_iter().collect();
                let apart = self.apart(&batches)?;
                self.evaluate_by(batches, apart, tell)
            }
            false => self.evaluate_by(batches, None, tell),
        }
    }

    fn evaluate_by(
        &self,
        batches: impl IntoIterator<Item = impl Borrow<Batch>>,
        apart: Option<f64>,
        tell: &mut dyn FnMut(usize),
    ) -> Result<Evaluation, TrainError> {
        let (rank, count) = self.ranks.as_ref().map_or((0, 1), |ranks| (ranks.rank(), ranks.count()));
        let (mut mine, mut all) = (Vec::new(), 0_usize);
        for batch in batches {
            if all % count == rank {
                mine.push(self.sums_of(batch.borrow(), apart)?);
                tell(mine.len());
            }
            all += 1;
        }
        if self.shared_base {
            // Ranks that share the base do as many passes as each other.
            (mine.len()..all.div_ceil(count)).try_for_each(|_| self.pass_idly_for_evaluation())?;
        }
        let all = match &self.ranks {
            Some(ranks) => interleaved(&ranks.all_gather(mine.iter().flat_map(to_bytes).collect())?),
            None => mine,
        };
        let mut sums = [0.0; SUMS];
        for of_batch in all {
            sums.iter_mut().zip(of_batch).for_each(|(sum, value)| *sum += value);
        }
        let tokens = sums[0] as usize;
        if tokens == 0 {
            return Err(TrainError::NoLabels);
        }
        if self.comparison.is_none() {
            let [loss, correct] = [sums[1], sums[2]].map(|sum| sum / tokens as f64);
            return Ok(Evaluation { loss, accuracy: Some(correct), tokens, preference: None });
        }
        let [_, chosen, rejected, pairs, answer_tokens, whole, ..] = sums;
        let items = if pairs > 0.0 { pairs } else { chosen + rejected };
        let parts = sums[6..9].iter().zip([items, answer_tokens, whole]);
        let counts = Counts { chosen: chosen as usize, rejected: rejected as usize, pairs: pairs as usize };
        Ok(Evaluation {
            loss: parts.map(|(sum, count)| sum / count.max(1.0)).sum(),
            accuracy: None,
            tokens,
            preference: Some(PreferenceFigures::new(&sums[9..], counts, apart)),
        })
    }

    /// What another rank does for a batch, where ranks share the base.
    fn pass_idly_for_evaluation(&self) -> Result<(), TrainError> {
        if self.passes_reference() {
            self.model.pass_idly(false)?;
        }
        Ok(self.model.pass_idly(false)?)
    }

    fn sums_of(&self, batch: &Batch, apart: Option<f64>) -> Result<Sums, TrainError> {
        let labelled = LabelledTokens::of(batch, self.preferences());
        let mut sums = [0.0; SUMS];
        if labelled.is_empty() {
            if self.shared_base {
                self.pass_idly_for_evaluation()?;
            }
            return Ok(sums);
        }
        sums[0] = labelled.len() as f64;
        if let Some(comparison) = &self.comparison {
            let numbers = self.compared_for_evaluation(comparison, (batch, &labelled), apart.unwrap_or(0.0))?;
            let counts = Counts::of([batch]);
            let answer_tokens = labelled.answers.of_side(batch, Side::Chosen);
            let whole = labelled.answers.whole_of_chosen(batch);
            let known = [counts.chosen, counts.rejected, counts.pairs, answer_tokens, whole].map(|count| count as f64);
            let numbers = numbers.try_into_vec_as::<f32>().map_err(DeviceError::from)?;
            let values = known.into_iter().chain(numbers.into_iter().map(f64::from));
            sums[1..].iter_mut().zip(values).for_each(|(sum, value)| *sum = value);
            return Ok(sums);
        }
        let sequence = sequence(&self.model, batch);
        let x = self.model.begin(&sequence, &batch.input_ids, Pass::INFERENCE);
        let x =
            self.model.blocks().iter().fold(x, |x, block| self.model.run_block(block, x, &sequence, Pass::INFERENCE));
        let found = loss_and_correct(&self.model, x, &labelled);
        let found = found.try_into_vec_as::<f32>().map_err(DeviceError::from)?;
        sums[1..].iter_mut().zip(found).for_each(|(sum, value)| *sum = f64::from(value));
        Ok(sums)
    }
}

fn to_bytes(sums: &Sums) -> Vec<u8> {
    sums.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The sums of all batches in their order, of which each rank has every so many.
fn interleaved(ranks: &[Vec<u8>]) -> Vec<Sums> {
    const BYTES: usize = 8 * SUMS;
    let longest = ranks.iter().map(|sums| sums.len() / BYTES).max().unwrap_or(0);
    let of = |turn: usize, sums: &Vec<u8>| {
        let values = sums.chunks_exact(BYTES).nth(turn)?.as_chunks::<8>().0;
        let mut numbers = [0.0; SUMS];
        numbers.iter_mut().zip(values).for_each(|(number, bytes)| *number = f64::from_le_bytes(*bytes));
        Some(numbers)
    };
    (0..longest).flat_map(|turn| ranks.iter().filter_map(move |sums| of(turn, sums))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_come_back_in_the_order_of_batches() {
        for (batches, ranks) in [(0, 2), (1, 2), (5, 2), (7, 3), (6, 3), (2, 4)] {
            let sums = |i: usize| std::array::from_fn(|at| 0.1 * i as f64 + at as f64);
            let of = |rank: usize| (rank..batches).step_by(ranks).flat_map(|i| to_bytes(&sums(i))).collect();
            let sent: Vec<Vec<u8>> = (0..ranks).map(of).collect();
            assert_eq!(interleaved(&sent), (0..batches).map(sums).collect::<Vec<_>>(), "{batches} over {ranks}");
        }
    }
}
