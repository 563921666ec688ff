//! Passes over one token of each row give the same, recorded or not, on every device at hand.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use adapter_io::Adapter;
use burn::tensor::{Device, FloatDType};
use nf4_quant::QuantConfig;
use qlora_models::{CachedRow, Decoder, LoadOptions, PagedCache, Part, RowLogits};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use test_support::devices;

const BLOCK: usize = 4;

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference").join(name)
}

fn load(name: &str, device: &Device) -> Decoder {
    let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype: FloatDType::F32 };
    Decoder::load(&reference(name), options, device, &mut |_| {}).unwrap()
}

/// CUDA records what the whole process does: one test at a time.
static DEVICE: Mutex<()> = Mutex::new(());

/// Sequences that grow by their likeliest tokens, in two caches: one pass by `decode`, one by `forward_paged`.
struct Twice<'a> {
    models: Vec<&'a Decoder>,
    ids: Vec<Vec<u32>>,
    caches: [PagedCache; 2],
}

impl<'a> Twice<'a> {
    /// Row `i` is seen by `models[i]`; rows of one model lie beside each other.
    fn new(models: Vec<&'a Decoder>) -> Self {
        let ids = (0..models.len() as u32).map(|row| (0..3 + 5 * row).map(|i| 7 * i + 11 * row + 1).collect());
        let caches = [(); 2].map(|()| PagedCache::new(models[0], 64, BLOCK));
        Self { ids: ids.collect(), models, caches }
    }

    fn step(&mut self, past: impl Fn(usize) -> usize) -> [Vec<f32>; 2] {
        let blocks: Vec<Vec<u32>> = (0..self.ids.len() as u32).map(|row| (8 * row..8 * row + 8).collect()).collect();
        let rows = self.ids.iter().zip(&blocks).map(|(ids, blocks)| {
            let past = past(ids.len());
            CachedRow { ids: &ids[past..], past, rotated_for: ids.len(), blocks, logits: RowLogits::Last }
        });
        let mut parts: Vec<(u64, Part<'_>)> = Vec::new();
        for (row, model) in rows.zip(&self.models) {
            match parts.last_mut().filter(|(_, part)| std::ptr::eq(part.model, *model)) {
                Some((_, part)) => part.rows.push(row),
                None => parts.push((parts.len() as u64, Part { model, rows: vec![row] })),
            }
        }
        let rows = self.ids.len();
        let [one, other] = &mut self.caches;
        let step = Decoder::decode(&parts, one).unwrap().unwrap();
        let plain: Vec<Part<'_>> = parts.into_iter().map(|(_, part)| part).collect();
        let expected = Decoder::forward_paged(&plain, other).unwrap();
        let likeliest = step.likeliest().try_into_vec_as::<i32>().unwrap();
        let vocab = expected.dims()[1];
        let mut found = step.logits.into_data().iter::<f32>().collect::<Vec<_>>();
        found.truncate(rows * vocab);
        for (ids, (row, token)) in self.ids.iter_mut().zip(found.chunks(vocab).zip(likeliest)) {
            let best = row.iter().enumerate().fold(0, |best, (i, value)| if *value > row[best] { i } else { best });
            assert_eq!(best, token as usize);
            ids.push(best as u32);
        }
        [found, expected.into_data().iter::<f32>().collect()]
    }
}

#[test]
fn a_replayed_pass_is_the_pass() {
    let _alone = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
    for (device_name, device) in devices() {
        let model = load("tiny-llama", &device);
        let [plain, dora] = ["plain", "dora"].map(|kind| {
            let mut adapted = model.clone();
            adapted.load_adapter(&Adapter::load(&reference("adapters").join(kind)).unwrap()).unwrap();
            adapted
        });
        for models in [vec![&model], vec![&model; 3], vec![&plain], vec![&model, &model, &plain, &dora]] {
            let mut twice = Twice::new(models);
            twice.step(|_| 0);
            for step in 0..6 {
                let [found, expected] = twice.step(|len| len - 1);
                // The same launches on the same numbers; filling up changes no row.
                assert_eq!(found, expected, "{device_name}, step {step}");
            }
            // The prompts are of several tokens; the second pass of one token each is the first that is recorded.
            let expected = if device_name == "flex" { 0 } else { 5 };
            let refusal = twice.caches[0].replay_refusal();
            assert_eq!(twice.caches[0].replays(), expected, "{device_name}: {refusal:?}");
        }
    }
}

#[test]
fn rotations_and_windows_are_followed() {
    let _alone = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
    for (device_name, device) in devices() {
        for name in ["archs/gemma3", "archs/mixtral", "archs/llama3"] {
            let model = load(name, &device);
            let mut twice = Twice::new(vec![&model, &model]);
            twice.step(|_| 0);
            for step in 0..5 {
                let [found, expected] = twice.step(|len| len - 1);
                assert_eq!(found, expected, "{name} on {device_name}, step {step}");
            }
        }
    }
}
