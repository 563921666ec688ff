//! Passes of parts with numbers: their adapters in stacks, and those over one token of each row recorded and replayed.
//!
//! Generation runs the same launches for every token, thousands of times, and on a GPU to queue them takes the host longer
//! than the device needs to run them. So the second pass of a kind is recorded, and from then on one call queues it all.
//! Kinds differ in the number of rows, which are filled up to one of few numbers, in the adapters, and in the length that
//! there is room for.

use crate::decoder::Decoder;
use crate::paged::{CachedRow, Inputs, MixedPass, PagedCache, Part, RowLogits, Stacked, wanted};
use crate::stacks::Placed;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use host_copies::{DeviceError, Recording};
use qlora_layers::candidates::{RowCandidates, candidates};
use qlora_layers::ops::likeliest;
use qlora_layers::{AdapterSpan, AdapterSpans};
use std::collections::HashMap;

/// Recorded passes at most: each keeps the memory of its activations.
const MOST: usize = 24;
/// Adapters of a recorded pass at most, where they are not stacked.
const MOST_PARTS: usize = 8;
/// Tokens of one adapter up to which it is taken from its stack, where its factors are as products want them.
const FEW_TOKENS: usize = 128;
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

    /// The largest logits of as many rows as there are temperatures, above 0, with what the others weigh; `None` where the rows are in
    /// the host's memory anyhow.
    ///
    /// # Errors
    /// The device fails.
    pub fn candidates(&self, temperatures: &[f32]) -> Result<Option<RowCandidates>, DeviceError> {
        candidates(&self.logits, temperatures)
    }

    /// `[rows]`, i32: the token of the first largest logit; -1 where a logit is no number.
    pub fn likeliest(&self) -> Tensor<1, Int> {
        self.likeliest.clone().unwrap_or_else(|| likeliest(self.logits.clone()))
    }
}

/// What one recording serves, and the room for tokens.
type Kind = (Rows, usize);

/// The rows of a recorded pass.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Rows {
    /// Adapters with their numbers of rows.
    ByPart(Vec<(u64, usize)>),
    /// So many rows, with any adapters that are stacked, or with none.
    Stacked { rows: usize, adapted: bool },
}

#[derive(Debug)]
struct Entry {
    recording: Recording,
    inputs: Inputs,
    output: Step,
    spans: Option<AdapterSpans>,
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

impl Recorded {
    /// Drops what reads the stacks of adapters.
    fn drop_adapted(&mut self) {
        let reads_stacks = |(rows, _): &Kind| matches!(rows, Rows::Stacked { adapted: true, .. });
        self.entries.retain(|kind, _| !reads_stacks(kind));
        self.last.take_if(|kind| reads_stacks(kind));
    }
}

impl PagedCache {
    /// At most so many adapters are kept on the device for passes over this cache, beside what their models hold.
    pub fn limit_adapters(&mut self, most: usize) {
        self.stacks.limit(most);
    }

    /// An adapter, by the number that [`Decoder::decode`] knows it by, will not come again.
    pub fn forget_adapter(&mut self, number: u64) {
        self.stacks.forget(number);
    }

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
    /// [`forward_paged`](Self::forward_paged) of parts that numbers tell apart: a model of the same number has the same
    /// weights. Where the device can, tokens of different adapters share products, and a pass over one token of each row is
    /// recorded when its kind comes a second time, and replayed from then on.
    ///
    /// Rows of the result beyond those of `parts` mean nothing.
    ///
    /// # Errors
    /// The device refuses to replay.
    pub fn decode(parts: &[(u64, Part<'_>)], cache: &mut PagedCache) -> Result<Option<Step>, DeviceError> {
        let parts: Vec<&(u64, Part<'_>)> = parts.iter().filter(|(_, part)| !part.rows.is_empty()).collect();
        let Some((_, first)) = parts.first() else { return Ok(None) };
        let rows = || parts.iter().flat_map(|(_, part)| &part.rows);
        let one_each = rows().all(|row| row.ids.len() == 1 && row.logits == RowLogits::Last);
        let tokens: usize = rows().map(|row| row.ids.len()).sum();
        let placed = match one_each || parts.len() > 1 || tokens <= FEW_TOKENS {
            true => {
                let numbered: Vec<(u64, &Self)> = parts.iter().map(|(number, part)| (*number, part.model)).collect();
                cache.stacks.place(&numbered)
            }
            false => None,
        };
        if placed.as_ref().is_some_and(|placed| placed.changed) {
            cache.recorded.drop_adapted();
        }
        let records = one_each
            && cache.recorded.refusal.is_none()
            && (placed.is_some() || parts.len() <= MOST_PARTS)
            // The host chooses experts, finds trained tokens among the ids, and holds the states of what is in the place of attention.
            && first.model.config.experts.is_none()
            && !first.model.config.has_states()
            && !parts.iter().any(|(_, part)| part.model.has_trained_tokens())
            // A recording holds launches alone, and not the copies of streamed weights between them.
            && !first.model.is_streamed();
        if records && let Some(step) = replayed(&PassOver::new(&parts, placed.as_ref()), cache)? {
            return Ok(Some(step));
        }
        let logits = match placed {
            Some(placed) => stacked(&parts, &placed, cache),
            None => {
                let parts: Vec<Part<'_>> = parts.iter().map(|(_, part)| part.clone()).collect();
                Self::forward_paged(&parts, cache)
            }
        };
        Ok(logits.map(Step::of))
    }
}

/// A pass that is not replayed, with its adapters in the cache's stacks.
fn stacked(parts: &[&(u64, Part<'_>)], placed: &Placed, cache: &mut PagedCache) -> Option<Tensor<2>> {
    let parts = || parts.iter().map(|(_, part)| part);
    let model = parts().next()?.model;
    let rows: Vec<CachedRow<'_>> = parts().flat_map(|part| &part.rows).copied().collect();
    let inputs = Inputs::new(model, &rows, cache.block_tokens(), 0);
    // The stacks stay as they are while the cache is written to.
    let stacks = std::mem::take(&mut cache.stacks);
    let (layers, tokens) = (stacks.layers(), rows.iter().map(|row| row.ids.len()).sum());
    let of_part = |part: &Part<'_>| part.rows.iter().map(|row| row.ids.len()).sum();
    let spans = on_device(&placed.spans(parts().map(of_part)), &model.device);
    let pass = MixedPass::stacked(model, tokens, &inputs, Stacked { layers, spans: spans.as_ref() });
    let hidden = pass.hidden(cache);
    let (wanted, counts) = wanted(parts());
    let logits = (!wanted.is_empty()).then(|| {
        let len = wanted.len();
        let wanted = Tensor::<1, Int>::from_data(TensorData::new(wanted, [len]), (&model.device, DType::I32));
        let spans = on_device(&placed.spans(counts), &model.device);
        let pass = MixedPass::stacked(model, len, &inputs, Stacked { layers, spans: spans.as_ref() });
        pass.logits(hidden.select(0, wanted))
    });
    cache.stacks = stacks;
    logits
}

/// Rows that one model stands for.
struct Group<'a> {
    model: &'a Decoder,
    rows: Vec<CachedRow<'a>>,
    /// What a recorded pass fills them up to.
    filled: usize,
}

/// A pass over one token of each row.
struct PassOver<'a> {
    kind: Kind,
    groups: Vec<Group<'a>>,
    /// Where adapters are stacked: which rows have which. One group has all rows then.
    spans: Option<Vec<AdapterSpan>>,
}

impl<'a> PassOver<'a> {
    fn new(parts: &[&(u64, Part<'a>)], placed: Option<&Placed>) -> Self {
        let rows = || parts.iter().flat_map(|(_, part)| &part.rows);
        let longest = rows().map(|row| row.past + 1).max().unwrap_or(1);
        let room = longest.next_power_of_two().max(SHORTEST);
        let Some(placed) = placed else {
            let group = |(_, part): &&(u64, Part<'a>)| Group {
                model: part.model,
                rows: part.rows.clone(),
                filled: filled(part.rows.len(), parts.len()),
            };
            let groups: Vec<Group<'a>> = parts.iter().map(group).collect();
            let sizes = parts.iter().zip(&groups).map(|((number, _), group)| (*number, group.filled));
            return Self { kind: (Rows::ByPart(sizes.collect()), room), groups, spans: None };
        };
        let spans = placed.spans(parts.iter().map(|(_, part)| part.rows.len()));
        let rows: Vec<CachedRow<'a>> = rows().copied().collect();
        let filled = filled(rows.len(), 1);
        let kind = (Rows::Stacked { rows: filled, adapted: !spans.is_empty() }, room);
        let group = Group { model: parts[0].1.model, rows, filled };
        Self { kind, groups: vec![group], spans: Some(spans) }
    }
}

/// The spans on the device, if there is any.
fn on_device(spans: &[AdapterSpan], device: &Device) -> Option<AdapterSpans> {
    (!spans.is_empty()).then(|| AdapterSpans::new(spans, device))
}

/// Logits of every row.
fn run(
    models: &[(usize, &Decoder)],
    inputs: &Inputs,
    cache: &mut PagedCache,
    spans: Option<&AdapterSpans>,
    is_stacked: bool,
) -> Tensor<2> {
    // The stacks stay as they are while the cache is written to.
    let stacks = std::mem::take(&mut cache.stacks);
    let pass = match (models, is_stacked) {
        (&[(tokens, model)], true) => {
            MixedPass::stacked(model, tokens, inputs, Stacked { layers: stacks.layers(), spans })
        }
        _ => MixedPass::new(models.to_vec(), inputs),
    };
    let hidden = pass.hidden(cache);
    let logits = pass.logits(hidden);
    cache.stacks = stacks;
    logits
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
fn replayed(pass: &PassOver<'_>, cache: &mut PagedCache) -> Result<Option<Step>, DeviceError> {
    let kind = pass.kind.clone();
    let nobodys = [cache.blocks() as u32];
    let filler = CachedRow { ids: &[0], past: 0, rotated_for: 1, blocks: &nobodys, logits: RowLogits::Last };
    let rows: Vec<CachedRow<'_>> = pass
        .groups
        .iter()
        .flat_map(|group| group.rows.iter().copied().chain(std::iter::repeat(filler)).take(group.filled))
        .collect();
    let model = pass.groups[0].model;
    cache.recorded.clock += 1;
    let clock = cache.recorded.clock;
    if let Some(entry) = cache.recorded.entries.get_mut(&kind) {
        let spans = match (&entry.spans, &pass.spans) {
            (Some(held), Some(spans)) => held.overwrite(spans),
            _ => true,
        };
        if spans && entry.inputs.overwrite(model, &rows) {
            entry.last_used = clock;
            // SAFETY: the entry holds inputs, outputs and weights; the cache's tensors live as long as their recordings,
            // which go when the cache grows, and so do the stacks of adapters, whose recordings go when a slot changes. The
            // engine's thread, or the one that asks, does all of it.
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
    let models: Vec<Decoder> = pass.groups.iter().map(|group| group.model.clone()).collect();
    let sizes: Vec<(usize, &Decoder)> = pass.groups.iter().map(|group| group.filled).zip(&models).collect();
    let spans = pass.spans.as_ref().and_then(|spans| on_device(spans, &model.device));
    let recorded = Recording::record(&model.device, || {
        let logits = run(&sizes, &inputs, cache, spans.as_ref(), pass.spans.is_some());
        Step { likeliest: Some(likeliest(logits.clone())), logits }
    });
    match recorded {
        Ok(Some((recording, output))) => {
            // SAFETY: as above; everything was made just now.
            unsafe { recording.replay()? };
            cache.recorded.replays += 1;
            tracing::debug!(rows = ?kind.0, room = kind.1, "a pass of generation is recorded");
            let entry = Entry { recording, inputs, output: output.clone(), spans, _models: models, last_used: clock };
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
