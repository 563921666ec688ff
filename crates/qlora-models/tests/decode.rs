//! Passes over one token of each row give the same, recorded or not, on every device at hand.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use adapter_io::Adapter;
use burn::module::Param;
use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use nf4_quant::QuantConfig;
use qlora_layers::{LoraConfig, TargetModules};
use qlora_models::{CachedRow, Decoder, LoadOptions, ModelConfig, PagedCache, Part, RowLogits, default_compute_dtype};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{LazyLock, Mutex, PoisonError};
use test_support::{devices, noise};

const BLOCK: usize = 4;

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference").join(name)
}

fn load(name: &str, device: &Device) -> Decoder {
    let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype: FloatDType::F32 };
    Decoder::load(&reference(name), options, device, &mut |_| {}).unwrap()
}

/// Runs a test on the one thread that uses devices. CUDA records what the whole process does, and a thread that ends gives its
/// memory back at a moment of its own.
fn alone(test: fn()) {
    type Job = (fn(), Sender<std::thread::Result<()>>);
    static THREAD: LazyLock<Mutex<Sender<Job>>> = LazyLock::new(|| {
        let (jobs, queue) = channel::<Job>();
        std::thread::spawn(move || {
            queue.into_iter().for_each(|(test, done)| done.send(std::panic::catch_unwind(test)).unwrap());
        });
        Mutex::new(jobs)
    });
    let (done, result) = channel();
    THREAD.lock().unwrap_or_else(PoisonError::into_inner).send((test, done)).unwrap();
    if let Err(panic) = result.recv().unwrap() {
        // The thread's own message goes where its first test's output goes.
        let message = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        panic!("{}", message.unwrap_or("the test's thread panicked"));
    }
}

/// Sequences that grow by their likeliest tokens, in two caches: one pass by `decode`, one by `forward_paged`.
struct Twice<'a> {
    models: Vec<&'a Decoder>,
    ids: Vec<Vec<u32>>,
    caches: [PagedCache; 2],
}

impl<'a> Twice<'a> {
    /// Row `i` is seen by `models[i]`; rows of one model lie beside each other.
    fn new(models: Vec<&'a Decoder>) -> Self {
        let words = models[0].vocab_size() as u32;
        let id = |row: u32, i: u32| (7 * i + 11 * row + 1) % words;
        let ids = (0..models.len() as u32).map(|row| (0..3 + 5 * (row % 4)).map(|i| id(row, i)).collect());
        let caches = [(); 2].map(|()| PagedCache::new(models[0], 8 * models.len(), BLOCK));
        Self { ids: ids.collect(), models, caches }
    }

    fn step(&mut self, past: impl Fn(usize) -> usize) -> [Vec<f32>; 2] {
        let blocks: Vec<Vec<u32>> = (0..self.ids.len() as u32).map(|row| (8 * row..8 * (row + 1)).collect()).collect();
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
        let step_candidates = step.candidates(&vec![0.8; rows]).unwrap();
        let vocab = expected.dims()[1];
        let mut found = step.logits.into_data().iter::<f32>().collect::<Vec<_>>();
        found.truncate(rows * vocab);
        // What a sampler would draw from has the largest logits, where the rows are not at hand.
        if let Some(candidates) = step_candidates {
            for (index, row) in found.chunks(vocab).enumerate() {
                let candidates = candidates.row(index).unwrap();
                let values = candidates.values.iter().map(|bits| f32::from_bits(*bits));
                assert!(candidates.ids.iter().zip(values).all(|(id, value)| row[*id as usize] == value));
                let above = row.iter().filter(|value| **value > candidates.rest.threshold).count();
                assert_eq!(candidates.ids.len(), above);
                assert_eq!(candidates.rest.highest, row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
            }
        }
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
    alone(|| {
        for (device_name, device) in devices() {
            let model = load("tiny-llama", &device);
            let [plain, dora] = ["plain", "dora"].map(|kind| {
                let mut adapted = model.clone();
                adapted.load_adapter(&Adapter::load(&reference("adapters").join(kind)).unwrap()).unwrap();
                adapted
            });
            for models in [vec![&model], vec![&model; 3], vec![&plain], vec![&model, &model, &plain, &dora]] {
                let mut twice = Twice::new(models);
                for step in 0..7 {
                    let [found, expected] = twice.step(|len| if step == 0 { 0 } else { len - 1 });
                    // The same launches on the same numbers; filling up changes no row.
                    assert_eq!(found, expected, "{device_name}, step {step}");
                }
                // The prompts are of several tokens; the second pass of one token each is the first that is recorded.
                let expected = if device_name == "flex" { 0 } else { 5 };
                let refusal = twice.caches[0].replay_refusal();
                assert_eq!(twice.caches[0].replays(), expected, "{device_name}: {refusal:?}");
            }
        }
    });
}

/// The length of the difference by the length of the second.
fn distance(found: &[f32], expected: &[f32]) -> f32 {
    let difference: f32 = found.iter().zip(expected).map(|(a, b)| (a - b).powi(2)).sum();
    (difference / expected.iter().map(|b| b.powi(2)).sum::<f32>()).sqrt()
}

/// Adapters of other ranks and targets in one batch of 16-bit passes, prompts and single tokens, which share launches where the
/// device has them, give what each gives by itself.
#[test]
fn adapters_of_one_batch_keep_apart() {
    alone(|| {
        let path = reference("tiny-llama").join("config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        // Rows of whole blocks, as products on tensor cores want them.
        config["intermediate_size"] = 704.into();
        for (device_name, device) in devices() {
            let dtype = default_compute_dtype(&device);
            if dtype == FloatDType::F32 {
                continue;
            }
            let config = ModelConfig::from_json(&config, &path).unwrap();
            let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype };
            let vocab = config.vocab_size;
            let model = Decoder::random(config, options, 0, &device, &mut |_| {}).unwrap();
            let adapted = |seed: u64, rank: usize, targets: &[&str]| {
                let mut adapted = model.clone();
                let target_modules = TargetModules::Names(targets.iter().map(|name| (*name).to_owned()).collect());
                let lora = LoraConfig { rank, alpha: 4.0 * rank as f32, target_modules, ..LoraConfig::default() };
                adapted.attach_lora(&lora, seed).unwrap();
                // Where lora_b starts at zero, an adapter changes nothing.
                let parameters = adapted.linears_mut().flat_map(|(_, layer)| layer.parameters_mut());
                for (index, (_, parameter)) in parameters.enumerate() {
                    let [rows, columns] = parameter.dims();
                    let values =
                        noise(1000 * seed + index as u64, rows * columns).into_iter().map(|value| 0.17 * value);
                    let values = TensorData::new(values.collect(), [rows, columns]);
                    *parameter = Param::from_tensor(Tensor::from_data(values, &device));
                }
                adapted
            };
            let all = adapted(1, 8, &["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]);
            let some = adapted(2, 40, &["q_proj", "v_proj", "down_proj"]);
            let third = adapted(3, 16, &["gate_proj", "up_proj"]);
            for models in [
                vec![&all],
                vec![&all; 3],
                vec![&all, &all, &some, &model, &third],
                [vec![&third; 5], vec![&model; 4], vec![&some; 7]].concat(),
                // More than one launch takes.
                vec![&all; 21],
                [vec![&third; 5], vec![&model; 4], vec![&some; 7], vec![&all], vec![&third; 8]].concat(),
            ] {
                let mut twice = Twice::new(models.clone());
                for step in 0..6 {
                    let [found, expected] = twice.step(|len| if step == 0 { 0 } else { len - 1 });
                    // Sums in another order, and factors rounded before and not behind a product: a unit in the last of 8 bits, 0.4 %,
                    // for each of six layers' dozen results, of which the root of their number adds up: 3.4 %, doubled. An adapter that
                    // is left out, or another row's, changes half of a row.
                    for (row, (found, expected)) in found.chunks(vocab).zip(expected.chunks(vocab)).enumerate() {
                        let difference = distance(found, expected);
                        let what = format!("{device_name}, row {row} of {}, step {step}", models.len());
                        assert!(difference < 0.08, "{what}: {difference}");
                    }
                }
                assert_eq!(twice.caches[0].replays(), 4, "{device_name}: {:?}", twice.caches[0].replay_refusal());
            }
            let mut twice = Twice::new(vec![&all, &some]);
            let [with, _] = twice.step(|_| 0);
            let mut bare = Twice::new(vec![&model, &model]);
            let [without, _] = bare.step(|_| 0);
            let difference = distance(&with, &without);
            assert!(difference > 0.5, "{device_name}: the adapters change {difference}");
        }
    });
}

#[test]
fn rotations_and_windows_are_followed() {
    alone(|| {
        for (device_name, device) in devices() {
            for name in ["archs/gemma3", "archs/gemma4_small", "archs/gemma4_moe", "archs/mixtral", "archs/llama3"] {
                let model = load(name, &device);
                let mut twice = Twice::new(vec![&model, &model]);
                twice.step(|_| 0);
                for step in 0..5 {
                    let [found, expected] = twice.step(|len| len - 1);
                    assert_eq!(found, expected, "{name} on {device_name}, step {step}");
                }
            }
        }
    });
}
