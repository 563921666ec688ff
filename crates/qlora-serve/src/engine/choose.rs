//! The tokens of a pass: the likeliest ones on the device, drawn ones by the largest logits of a row, others by all of them.

use std::collections::HashMap;

use host_copies::DeviceError;
use qlora_models::{ModelError, RowLogits, Step};
use rayon::prelude::*;

use super::{Answering, Engine};
use crate::request::{FinishReason, TokenLogprobs};
use crate::sampling::logprobs;
use crate::scheduler::{SequenceId, Slice};

impl Engine {
    /// Chooses the next tokens from what a pass gave.
    pub(super) fn choose(&mut self, slices: &[Slice], wanted: &[RowLogits], step: Step) -> Result<(), DeviceError> {
        let is_greedy = |id| self.answering.get(id).is_none_or(Answering::takes_likeliest);
        if !wanted.contains(&RowLogits::All) && slices.iter().all(|slice| is_greedy(&slice.id)) {
            let tokens = step.likeliest().try_into_vec_as::<i32>().map_err(DeviceError::from)?;
            let asked = slices.iter().zip(wanted).filter(|(_, wanted)| **wanted == RowLogits::Last);
            for ((slice, _), token) in asked.zip(tokens) {
                match u32::try_from(token) {
                    Ok(token) => self.push(slice.id, token, None),
                    Err(_) => self.fail(slice.id, ModelError::NotANumber.to_string()),
                }
            }
            return Ok(());
        }
        let mut next = match wanted.contains(&RowLogits::All) {
            true => HashMap::new(),
            false => self.settle(slices, wanted, &step)?,
        };
        let asked = slices.iter().zip(wanted).filter(|(_, wanted)| **wanted != RowLogits::None);
        if !asked.map(|(slice, _)| slice.id).all(|id| next.contains_key(&id) || !self.answering.contains_key(&id)) {
            next.extend(self.choose_from_rows(slices, wanted, &step, &next)?);
        }
        for slice in slices {
            match next.remove(&slice.id) {
                Some(Next::Token(token, logprobs)) => self.push(slice.id, token, logprobs),
                Some(Next::Failed(message)) => self.fail(slice.id, message),
                Some(Next::Enough) => self.finish(slice.id, FinishReason::Length),
                None => {}
            }
        }
        Ok(())
    }

    /// Chooses tokens of a pass in which no row is wanted whole, where the likeliest ones decide; a row of the vocabulary takes as long
    /// on the host as the device takes for a token.
    fn settle(
        &mut self,
        slices: &[Slice],
        wanted: &[RowLogits],
        step: &Step,
    ) -> Result<HashMap<SequenceId, Next>, DeviceError> {
        let mut next = HashMap::new();
        let asked = slices.iter().zip(wanted).filter(|(_, wanted)| **wanted == RowLogits::Last);
        let asked: Vec<SequenceId> = asked.map(|(slice, _)| slice.id).collect();
        let draws_at = |id: &SequenceId| self.answering.get(id).and_then(Answering::draws_at);
        if asked.iter().all(|id| draws_at(id).is_none()) {
            return Ok(next);
        }
        let temperatures: Vec<f32> = asked.iter().map(|id| draws_at(id).unwrap_or(1.0) as f32).collect();
        let Some(candidates) = step.candidates(&temperatures)? else { return Ok(next) };
        let likeliest = step.likeliest().try_into_vec_as::<i32>().map_err(DeviceError::from)?;
        for (row, (id, likeliest)) in asked.iter().zip(likeliest).enumerate() {
            let Some(answering) = self.answering.get_mut(id) else { continue };
            let token = match (u32::try_from(likeliest), answering.draws_at()) {
                (Err(_), _) => continue,
                (Ok(token), None) if answering.takes_likeliest() => Some(token),
                (Ok(_), None) => None,
                (Ok(_), Some(_)) if answering.generated == answering.max_tokens => None,
                (Ok(_), Some(_)) => candidates.row(row).and_then(|row| answering.sampler.among(&row)),
            };
            next.extend(token.map(|token| (*id, Next::Token(token, None))));
        }
        Ok(next)
    }

    /// Chooses the tokens that are not `settled`, from the logits of all rows.
    fn choose_from_rows(
        &mut self,
        slices: &[Slice],
        wanted: &[RowLogits],
        step: &Step,
        settled: &HashMap<SequenceId, Next>,
    ) -> Result<HashMap<SequenceId, Next>, DeviceError> {
        let [_, vocab] = step.logits.dims();
        let mut logits = step.logits.clone().try_into_vec_as::<f32>().map_err(DeviceError::from)?;
        let mut rows = logits.chunks_exact_mut(vocab);
        let mut last_rows: HashMap<SequenceId, &mut [f32]> = HashMap::new();
        for (slice, wanted) in slices.iter().zip(wanted) {
            let count = match wanted {
                RowLogits::None => 0,
                RowLogits::Last => 1,
                RowLogits::All => slice.new,
            };
            let mut own: Vec<&mut [f32]> = rows.by_ref().take(count).collect();
            if *wanted == RowLogits::All {
                self.note_prompt(slice, &own);
            }
            if let Some(last) = own.pop().filter(|_| slice.is_last && !settled.contains_key(&slice.id)) {
                last_rows.insert(slice.id, last);
            }
        }
        // A vocabulary takes a thread as long as the device takes for a token.
        let answering: Vec<(SequenceId, &mut Answering, &mut [f32])> = self
            .answering
            .iter_mut()
            .filter_map(|(id, answering)| Some((*id, answering, last_rows.remove(id)?)))
            .collect();
        let choose = |(id, answering, row): (SequenceId, &mut Answering, &mut [f32])| (id, answering.next(row));
        Ok(answering.into_par_iter().map(choose).collect())
    }
}

/// How an answer goes on.
enum Next {
    Token(u32, Option<TokenLogprobs>),
    /// It is as long as it may be.
    Enough,
    Failed(String),
}

impl Answering {
    /// Chooses the next token.
    fn next(&mut self, row: &mut [f32]) -> Next {
        if self.generated == self.max_tokens {
            return Next::Enough;
        }
        let allowed = match self.constraint.as_mut().map(|constraint| constraint.allowed()).transpose() {
            Ok(allowed) => allowed.flatten(),
            Err(message) => return Next::Failed(message),
        };
        let original = self.logprobs.map(|_| row.to_vec());
        let Some(token) = self.sampler.choose(row, allowed.as_deref()) else {
            return Next::Failed(match row.iter().any(|logit| logit.is_nan()) {
                true => ModelError::NotANumber.to_string(),
                false => "no token may follow here: every one is forbidden by the constraint or by logit_bias".into(),
            });
        };
        let logprobs = original.map(|original| logprobs(&original, token, self.logprobs.unwrap_or(0)));
        Next::Token(token, logprobs)
    }

    /// The temperature, where nothing but a token drawn by the model's logits is asked for.
    fn draws_at(&self) -> Option<f64> {
        self.sampler.draws_at().filter(|_| self.logprobs.is_none() && self.constraint.is_none())
    }

    /// Whether nothing but the likeliest token is asked for.
    fn takes_likeliest(&self) -> bool {
        self.logprobs.is_none() && self.constraint.is_none() && self.sampler.takes_likeliest()
    }
}
