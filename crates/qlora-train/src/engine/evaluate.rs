//! Evaluation: loss and accuracy without training. Ranks share the batches, and add up what one process would.

use std::borrow::Borrow;

use host_copies::DeviceError;
use qlora_data::Batch;
use qlora_layers::Pass;

use super::Engine;
use super::pass::sequence;
use crate::error::TrainError;
use crate::loss::{LabelledTokens, loss_and_correct};

/// What one pass over evaluation rows found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Evaluation {
    /// Mean loss over the unmasked tokens, in nats.
    pub loss: f64,
    /// Part of the unmasked tokens that the model thought likeliest.
    pub accuracy: f64,
    /// Unmasked tokens.
    pub tokens: usize,
}

/// Sums over one batch.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sums {
    loss: f64,
    correct: f64,
    tokens: usize,
}

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
        let (rank, count) = self.ranks.as_ref().map_or((0, 1), |ranks| (ranks.rank(), ranks.count()));
        let (mut mine, mut all) = (Vec::new(), 0_usize);
        for batch in batches {
            if all % count == rank {
                mine.push(self.sums_of(batch.borrow())?);
                tell(mine.len());
            }
            all += 1;
        }
        if self.shared_base {
            // Ranks that share the base do as many passes as each other.
            (mine.len()..all.div_ceil(count)).try_for_each(|_| self.model.pass_idly(false))?;
        }
        let all = match &self.ranks {
            Some(ranks) => interleaved(&ranks.all_gather(mine.iter().flat_map(|sums| sums.to_bytes()).collect())?),
            None => mine,
        };
        let (mut loss, mut correct, mut tokens) = (0.0, 0.0, 0);
        for sums in all {
            loss += sums.loss;
            correct += sums.correct;
            tokens += sums.tokens;
        }
        match tokens {
            0 => Err(TrainError::NoLabels),
            _ => Ok(Evaluation { loss: loss / tokens as f64, accuracy: correct / tokens as f64, tokens }),
        }
    }

    fn sums_of(&self, batch: &Batch) -> Result<Sums, TrainError> {
        let labelled = LabelledTokens::new(batch);
        if labelled.is_empty() {
            if self.shared_base {
                self.model.pass_idly(false)?;
            }
            return Ok(Sums { loss: 0.0, correct: 0.0, tokens: 0 });
        }
        let sequence = sequence(&self.model, batch);
        let x = self.model.begin(&sequence, &batch.input_ids, Pass::INFERENCE);
        let x =
            self.model.blocks().iter().fold(x, |x, block| self.model.run_block(block, x, &sequence, Pass::INFERENCE));
        let sums = loss_and_correct(&self.model, x, &labelled);
        let sums = sums.try_into_vec_as::<f32>().map_err(DeviceError::from)?;
        Ok(Sums { loss: f64::from(sums[0]), correct: f64::from(sums[1]), tokens: labelled.len() })
    }
}

impl Sums {
    const BYTES: usize = 24;

    fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.loss.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.correct.to_le_bytes());
        bytes[16..].copy_from_slice(&(self.tokens as u64).to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let eight = |at: usize| bytes.get(at..at + 8)?.try_into().ok();
        let tokens = usize::try_from(u64::from_le_bytes(eight(16)?)).ok()?;
        Some(Self { loss: f64::from_le_bytes(eight(0)?), correct: f64::from_le_bytes(eight(8)?), tokens })
    }
}

/// The sums of all batches in their order, of which each rank has every so many.
fn interleaved(ranks: &[Vec<u8>]) -> Vec<Sums> {
    let longest = ranks.iter().map(|sums| sums.len() / Sums::BYTES).max().unwrap_or(0);
    let of = |turn: usize, sums: &Vec<u8>| Sums::from_bytes(sums.chunks_exact(Sums::BYTES).nth(turn)?);
    (0..longest).flat_map(|turn| ranks.iter().filter_map(move |sums| of(turn, sums))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_come_back_in_the_order_of_batches() {
        for (batches, ranks) in [(0, 2), (1, 2), (5, 2), (7, 3), (6, 3), (2, 4)] {
            let sums = |i: usize| Sums { loss: 0.1 * i as f64, correct: i as f64, tokens: i };
            let of = |rank: usize| (rank..batches).step_by(ranks).flat_map(|i| sums(i).to_bytes()).collect();
            let sent: Vec<Vec<u8>> = (0..ranks).map(of).collect();
            assert_eq!(interleaved(&sent), (0..batches).map(sums).collect::<Vec<_>>(), "{batches} over {ranks}");
        }
    }
}
