//! Passes over one token of each row, recorded and replayed.
//!
//! Generation runs the same launches for every token, thousands of times, and on a GPU to queue them takes the host longer
//! than the device needs to run them. So the second pass of a kind is recorded, and from then on one call queues it all.
//! Kinds differ in the number of rows, which are filled up to one of few numbers, in the adapters, and in the length that
//! there is room for.

use crate::decoder::Decoder;
use crate::paged::{CachedRow, Inputs, MixedPass, PagedCache, Part, RowLogits};
use burn::tensor::{Int, Tensor};
use host_copies::{DeviceError, Recording};
use qlora_layers::ops::likeliest;
use std::collections::HashMap;

/// Recorded passes at most: each keeps the memory of its activations.
const MOST: usize = 24;
/// Adapters of a recorded pass at most.
const MOST_PARTS: usize = 8;
/// Room for at least so many tokens.
const SHORTEST: usize = 512;

/// What a pass gives of each row.
#[derive(Clone, Debug)]
pub struct Step {
    /// `[rows, vocab]`, in the compute dtype.
    pub logits: Tensor<2>,
    /// Found with the pass, or `None` until somebody asks.
    likeliest: Option<Tensor<1, Int>>,
}

impl Step {
    /// What a pass that is not replayed gives.
    pub fn of(logits: Tensor<2>) -> Self {
        Self { logits, likeliest: None }
    }

    /// `[rows]`, i32: the token of the first largest logit; -1 where a logit is no number.
    pub fn likeliest(&self) -> Tensor<1, Int> {
        self.likeliest.clone().unwrap_or_else(|| likeliest(self.logits.clone()))
    }
}

/// Adapters with their numbers of rows, and the room for tokens.
type Kind = (Vec<(u64, usize)>, usize);

#[derive(Debug)]
struct Entry {
    recording: Recording,
    inputs: Inputs,
    output: Step,
    /// The models whose weights the recording reads.
    _models: Vec<Decoder>,
    last_used: u64,
}

/// The recorded passes of a cache.
#[derive(Debug, Default)]
pub(crate) struct Recorded {
    entries: HashMap<Kind, Entry>,
    last: Option<Kind>,
    clock: u64,
    replays: u64,
    /// Why nothing is recorded any more.
    refusal: Option<String>,
}

impl PagedCache {
    /// How many passes were replayed since the cache was made or grew.
    pub fn replays(&self) -> u64 {
        self.recorded.replays
    }

    /// Why passes are not recorded any more, once the device refused.
    pub fn replay_refusal(&self) -> Option<&str> {
        self.recorded.refusal.as_deref()
    }
}

impl Decoder {
    /// One token of each row: [`forward_paged`](Self::forward_paged) of rows of one id, with logits for each. The numbers beside
    /// the parts tell their adapters apart: a model of the same number has the same weights. On devices that can, the
    /// pass is recorded when it comes a second time, and replayed from then on.
    ///
    /// Rows of the result beyond those of `parts` mean nothing.
    ///
    /// # Errors
    /// The device refuses to replay.
    pub fn decode(parts: &[(u64, Part<'_>)], cache: &mut PagedCache) -> Result<Option<Step>, DeviceError> {
        let parts: Vec<&(u64, Part<'_>)> = parts.iter().filter(|(_, part)| !part.rows.is_empty()).collect();
        let Some((_, first)) = parts.first() else { return Ok(None) };
        let one_each = parts.iter().flat_map(|(_, part)| &part.rows).all(|row| row.ids.len() == 1);
        let records = one_each
            && cache.recorded.refusal.is_none()
            && parts.len() <= MOST_PARTS
            // The host chooses experts, and finds trained tokens among the ids.
            && first.model.config.experts.is_none()
            && !parts.iter().any(|(_, part)| part.model.has_trained_tokens());
        if records {
            let longest = parts.iter().flat_map(|(_, part)| &part.rows).map(|row| row.past + 1).max().unwrap_or(1);
            let sizes = parts.iter().map(|(number, part)| (*number, filled(part.rows.len(), parts.len())));
            let kind: Kind = (sizes.collect(), longest.next_power_of_two().max(SHORTEST));
            if let Some(step) = replayed(&parts, kind, cache)? {
                return Ok(Some(step));
            }
        }
        let parts: Vec<Part<'_>> = parts.iter().map(|(_, part)| part.clone()).collect();
        Ok(Self::forward_paged(&parts, cache).map(Step::of))
    }
}

/// How many rows a part of `rows` is filled up to. Of several parts none is: rows could not be told apart behind the pass.
fn filled(rows: usize, parts: usize) -> usize {
    match parts {
        1 => {
            [1, 2, 4, 8, 12, 16, 24, 32, 48].into_iter().find(|size| *size >= rows).unwrap_or(rows.next_multiple_of(32))
        }
        _ => rows,
    }
}

/// The step, if its kind is recorded or can be now.
fn replayed(parts: &[&(u64, Part<'_>)], kind: Kind, cache: &mut PagedCache) -> Result<Option<Step>, DeviceError> {
    let nobodys = [cache.blocks() as u32];
    let filler = CachedRow { ids: &[0], past: 0, rotated_for: 1, blocks: &nobodys, logits: RowLogits::Last };
    let rows: Vec<CachedRow<'_>> = parts
        .iter()
        .zip(&kind.0)
        .flat_map(|((_, part), (_, size))| part.rows.iter().copied().chain(std::iter::repeat(filler)).take(*size))
        .collect();
    let model = parts[0].1.model;
    cache.recorded.clock += 1;
    let clock = cache.recorded.clock;
    if let Some(entry) = cache.recorded.entries.get_mut(&kind) {
        if entry.inputs.overwrite(model, &rows) {
            entry.last_used = clock;
            // SAFETY: the entry holds inputs, outputs and weights; the cache's tensors live as long as their recordings,
            // which go when the cache grows. The engine's thread, or the one that asks, does all of it.
            unsafe { entry.recording.replay()? };
            cache.recorded.replays += 1;
            return Ok(Some(entry.output.clone()));
        }
        return Ok(None);
    }
    let is_second = cache.recorded.last.replace(kind.clone()).as_ref() == Some(&kind);
    if !is_second {
        return Ok(None);
    }
    if cache.recorded.entries.len() >= MOST {
        let oldest = cache.recorded.entries.iter().min_by_key(|(_, entry)| entry.last_used);
        if let Some(oldest) = oldest.map(|(kind, _)| kind.clone()) {
            cache.recorded.entries.remove(&oldest);
        }
    }
    let inputs = Inputs::new(model, &rows, cache.block_tokens(), kind.1);
    let models: Vec<Decoder> = parts.iter().map(|(_, part)| part.model.clone()).collect();
    let sizes: Vec<(usize, &Decoder)> = kind.0.iter().map(|(_, size)| *size).zip(&models).collect();
    let recorded = Recording::record(&model.device, || {
        let pass = MixedPass::new(sizes.clone(), &inputs);
        let hidden = pass.hidden(cache);
        let logits = pass.logits(hidden);
        Step { likeliest: Some(likeliest(logits.clone())), logits }
    });
    match recorded {
        Ok(Some((recording, output))) => {
            // SAFETY: as above; everything was made just now.
            unsafe { recording.replay()? };
            cache.recorded.replays += 1;
            let entry = Entry { recording, inputs, output: output.clone(), _models: models, last_used: clock };
            tracing::debug!(rows = ?kind.0, room = kind.1, "a pass of generation is recorded");
            cache.recorded.entries.insert(kind, entry);
            Ok(Some(output))
        }
        Ok(None) => {
            cache.recorded.refusal = Some("the device records nothing".into());
            Ok(None)
        }
        Err(e) => {
            tracing::warn!("a pass of generation can't be recorded, and is queued anew for every token: {e}");
            cache.recorded.refusal = Some(e.to_string());
            Ok(None)
        }
    }
}
