//! One case, measured: a model of random weights, its adapters, and whole steps of the engine that `qlora train` runs.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};
use burn::tensor::Device;
use burn_qlora::qlora_layers::mix;
use burn_qlora::qlora_models::{ModelConfig, Streams, device_memory, held_memory};
use burn_qlora::qlora_train::config::{Objective, Term};
use burn_qlora::qlora_train::objective::Preferences;
use burn_qlora::qlora_train::profile::{Profile, ProfileLayer, Window, short_name, with_subscriber};
use burn_qlora::qlora_train::ranks::Ranks;
use burn_qlora::qlora_train::{Engine, Plan, Room, RowSizes, StepOutput, compute_dtype, engine};
use burn_qlora::{Decoder, LoadOptions, TrainConfig};
use cubecl::client::Client;
use serde::{Deserialize, Serialize};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::{Layer as _, Registry};

use super::case::{Case, Fill};
use super::look;
use super::memory::{self, Driver, Peak};

/// Steps during which the allocator is read.
const READ_STEPS: usize = 2;

/// How often.
#[derive(Debug, Clone)]
pub(crate) struct Repeats {
    pub warm_up: usize,
    pub steps: usize,
    pub tracing: Option<Tracing>,
}

/// Where.
pub(crate) struct Place {
    pub device: Device,
    /// The same device's, if it is CubeCL's.
    pub client: Option<Client>,
    pub driver: Option<Driver>,
}

/// A trace of further steps.
#[derive(Debug, Clone)]
pub(crate) struct Tracing {
    pub path: PathBuf,
    pub steps: usize,
}

/// A reading of the allocator after a timed step.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Reading {
    pub step: usize,
    pub in_use_bytes: u64,
    pub reserved_bytes: u64,
}

/// How many readings are kept.
const READINGS: usize = 10;

/// The figures of a case.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Measured {
    /// Tokens of a step, padding not counted; of packed and padded rows the mean of the timed steps.
    pub tokens: usize,
    /// Random weights, quantization and upload, until the device has them.
    pub load_seconds: f64,
    /// The first step: kernels are compiled, or loaded from the cache.
    pub first_step_seconds: f64,
    /// Median of the timed steps, loss read back, update done.
    pub step_seconds: f64,
    /// Half of the distance between the quartiles, of the median.
    pub spread: f64,
    /// Until everything before the read-back was handed to the driver.
    pub host_seconds: Option<f64>,
    /// Launches of a step.
    pub launches: usize,
    /// Different kernels among them, and the most frequent ones.
    pub kernels: usize,
    pub most_frequent: Vec<(String, usize)>,
    /// The allocator's bytes in use with the model loaded.
    pub base_bytes: u64,
    /// The allocator's most bytes in use, in a reading every millisecond.
    pub in_use_bytes: u64,
    /// The allocator's most bytes reserved.
    pub reserved_bytes: u64,
    /// The driver's figure for the process.
    pub driver_bytes: Option<u64>,
    /// The allocator after timed steps at equal distances.
    pub readings: Vec<Reading>,
    /// Loss of the first and the last step.
    pub losses: [f64; 2],
    /// Blocks whose frozen weights wait in the host's memory, and the bytes of these.
    #[serde(default)]
    pub streamed_blocks: usize,
    #[serde(default)]
    pub streamed_bytes: u64,
    /// Bytes of the device that they pass through.
    #[serde(default)]
    pub slot_bytes: u64,
    /// Bytes of frozen weights that a timed step brought over the bus.
    #[serde(default)]
    pub bus_bytes: u64,
}

/// A model of random weights with its adapters, ready to train on micro-batches of a case, by itself or as one of several ranks.
pub(super) fn random_engine(
    shape: &ModelConfig,
    config: &TrainConfig,
    case: Case,
    device: &Device,
    ranks: Option<&Ranks>,
) -> Result<Engine> {
    let planned = plan(shape, config, case, device, ranks.map_or(1, Ranks::count))?;
    let shared = planned.weights.shared_by > 1;
    let (streams, note) = planned.weights.streams(device, ranks)?;
    note.iter().for_each(|note| tracing::info!("{note}"));
    let model = random_model(shape, config, streams, device)?;
    let engine = planned_engine(model, config, case, planned)?.with_ranks(ranks.cloned());
    Ok(if shared { engine.with_shared_base() } else { engine })
}

/// A model of random weights, some of which may be streamed.
pub(super) fn random_model(
    shape: &ModelConfig,
    config: &TrainConfig,
    streams: Option<Streams>,
    device: &Device,
) -> Result<Decoder> {
    let dtype = compute_dtype(config.quantization.compute_dtype, device)?;
    let options = LoadOptions { quantization: config.quantization.quant_config(), dtype };
    Ok(Decoder::random_streamed(shape.clone(), options, streams, config.train.seed, device, &mut |_| {})?)
}

/// What of a case's activations is kept, by what the device has free now, on one of so many ranks.
pub(super) fn plan(
    shape: &ModelConfig,
    config: &TrainConfig,
    case: Case,
    device: &Device,
    ranks: usize,
) -> Result<Plan> {
    let dtype = compute_dtype(config.quantization.compute_dtype, device)?;
    // Of packed rows a sequence is what a row is otherwise.
    let len = if case.fill == Fill::Padded { case.lengths(0).into_iter().max().unwrap_or(case.len) } else { case.len };
    // A pair is two rows.
    let len = if case.fill.is_pairs() { 2 * len } else { len };
    let mut planned = config.clone();
    planned.train.batch_size = case.rows;
    let room = Room::of_rank(device, config.train.memory_budget, ranks, ranks);
    Ok(Plan::new(&planned, shape, dtype, &room, &RowSizes::of_longest(len))?)
}

/// An engine over a model that is given fresh adapters.
pub(super) fn planned_engine(mut model: Decoder, config: &TrainConfig, case: Case, plan: Plan) -> Result<Engine> {
    let Plan { policies, lighter, .. } = plan;
    if config.train.activation_checkpointing.fixed().is_none() {
        eprintln!("{case}: {policies}");
    }
    let reference = (case.fill == Fill::Pairs).then(|| model.clone());
    model.attach_lora(&config.lora, config.train.seed)?;
    let engine = engine(model, &config.train, policies)?.with_lighter(lighter);
    if !case.fill.is_pairs() {
        return Ok(engine);
    }
    let preferences = Preferences { objective: Objective::One(Term::Dpo), settings: config.preference.clone() };
    Ok(engine.with_preferences(preferences, reference))
}

/// Measures a case on a device.
pub(crate) fn run(
    shape: &ModelConfig,
    config: &TrainConfig,
    case: Case,
    repeats: &Repeats,
    place: &Place,
) -> Result<Measured> {
    let device = &place.device;
    let start = Instant::now();
    let engine = random_engine(shape, config, case, device, None)?;
    device.sync().context("loading")?;
    let load_seconds = start.elapsed().as_secs_f64();
    // What a larger card lacks to be a smaller one is not the run's.
    let held = held_memory(device);
    let base_bytes = device_memory(device).map_or(0, |(in_use, _)| in_use);

    let mut steps = Steps::new(engine, config, case);
    let mut peak = Peak::default();
    let start = Instant::now();
    let first = steps.next()?;
    let first_step_seconds = start.elapsed().as_secs_f64();
    for _ in 1..repeats.warm_up {
        steps.next()?;
        peak.read(device);
    }
    device.sync()?;
    let mut seconds = Vec::with_capacity(repeats.steps);
    let mut last = first;
    let before = steps.engine.model().streaming();
    let warm = steps.tokens;
    let mut readings = Vec::new();
    for step in 1..=repeats.steps {
        // A step returns with its loss, while the device is at the update, and the next step queues behind that: what is
        // timed is from one read-back to the next, as in training.
        let start = Instant::now();
        last = steps.next()?;
        seconds.push(start.elapsed().as_secs_f64());
        let reading = peak.read(device);
        if step.is_multiple_of((repeats.steps / READINGS).max(1)) {
            readings.push(Reading { step, in_use_bytes: reading.in_use, reserved_bytes: reading.reserved });
        }
    }
    let (step_seconds, spread) = median(&mut seconds);
    let tokens = (steps.tokens - warm) / repeats.steps.max(1);
    let streaming = steps.engine.model().streaming();

    device.sync()?;
    let (output, look) = look::at(place.client.as_ref(), || steps.next());
    output?;
    for _ in 0..READ_STEPS {
        memory::while_running(device, &mut peak, || steps.next())?;
    }
    device.sync()?;
    peak.read(device);
    if let Some(tracing) = &repeats.tracing {
        trace(&mut steps, tracing)?;
    }

    let mut most_frequent: Vec<(String, usize)> = look.launches.iter().map(|(k, n)| (short_name(k), *n)).collect();
    most_frequent.sort_by_key(|(name, count)| (std::cmp::Reverse(*count), name.clone()));
    most_frequent.truncate(10);
    Ok(Measured {
        tokens,
        load_seconds,
        first_step_seconds,
        step_seconds,
        spread,
        host_seconds: look.queueing.map(|time| time.as_secs_f64()),
        launches: look.launches.values().sum(),
        kernels: look.launches.len(),
        most_frequent,
        base_bytes,
        in_use_bytes: peak.in_use,
        reserved_bytes: peak.reserved,
        driver_bytes: place.driver.as_ref().map(|driver| driver.peak().saturating_sub(held)),
        readings,
        losses: [first.loss, last.loss],
        streamed_blocks: streaming.blocks,
        streamed_bytes: streaming.host_bytes,
        slot_bytes: streaming.slot_bytes,
        bus_bytes: (streaming.bytes_in - before.bytes_in) / repeats.steps.max(1) as u64,
    })
}

/// Profiles further steps, and prints their tables where a person sees them.
fn trace(steps: &mut Steps<'_>, tracing: &Tracing) -> Result<()> {
    let profile = Profile::new(Window { skip: 0, steps: tracing.steps });
    let subscriber = Registry::default().with(profile.layer().with_filter(filter_fn(ProfileLayer::filter)));
    with_subscriber(subscriber, || (0..tracing.steps).try_for_each(|_| steps.next().map(drop)))?;
    let trace = profile.finish();
    trace.write(&tracing.path)?;
    eprintln!("\n{}\n{}: for https://ui.perfetto.dev\n", trace.summary(), tracing.path.display());
    Ok(())
}

/// Steps on new tokens each.
pub(super) struct Steps<'a> {
    engine: Engine,
    config: &'a TrainConfig,
    case: Case,
    /// Ranks that share each step.
    ranks: usize,
    done: u64,
    /// Tokens of the steps so far, of all ranks.
    pub(super) tokens: usize,
}

impl<'a> Steps<'a> {
    pub(super) fn new(engine: Engine, config: &'a TrainConfig, case: Case) -> Self {
        Self { engine, config, case, ranks: 1, done: 0, tokens: 0 }
    }

    /// As one of several ranks.
    pub(super) fn of_ranks(self, ranks: usize) -> Self {
        Self { ranks, ..self }
    }

    pub(super) fn next(&mut self) -> Result<StepOutput> {
        let options = &self.config.train;
        let vocab = self.engine.model().config().vocab_size;
        let seed = mix(options.seed ^ mix(self.done));
        self.done += 1;
        let batch = |micro_step: usize| self.case.batch(vocab, mix(seed ^ micro_step as u64));
        let micro_batches: Vec<_> = (0..options.gradient_accumulation_steps * self.ranks).map(batch).collect();
        self.tokens += micro_batches.iter().flat_map(|batch| &batch.lengths).sum::<usize>();
        let output = self.engine.step(&micro_batches, options.learning_rate, seed);
        output.with_context(|| format!("step {}", self.done))
    }
}

/// Median, and half of the distance between the quartiles as a part of it.
pub(super) fn median(seconds: &mut [f64]) -> (f64, f64) {
    seconds.sort_by(f64::total_cmp);
    let len = seconds.len();
    let median = (seconds[(len - 1) / 2] + seconds[len / 2]) / 2.0;
    (median, (seconds[len * 3 / 4] - seconds[len / 4]) / 2.0 / median)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::shapes;

    #[test]
    fn the_median_is_between_the_middle_ones() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]).0, 2.0);
        assert_eq!(median(&mut [4.0, 1.0, 2.0, 3.0]), (2.5, 0.4));
    }

    #[test]
    fn pairs_are_measured_with_a_reference_and_with_one_known_ahead() {
        let shape = shapes::config("tiny", None, None).unwrap();
        let mut config = TrainConfig::default();
        config.set("lora.rank", "8").unwrap();
        config.set("train.gradient_accumulation_steps", "1").unwrap();
        let place = Place { device: Device::flex(), client: None, driver: None };
        for case in ["2x16-pairs", "2x16-pairs-ahead"] {
            let repeats = Repeats { warm_up: 1, steps: 2, tracing: None };
            let measured = run(&shape, &config, case.parse().unwrap(), &repeats, &place).unwrap();
            assert_eq!(measured.tokens, 2 * 2 * 16, "{case}");
            assert!(measured.losses.iter().all(|loss| loss.is_finite()), "{measured:?}");
        }
    }

    #[test]
    fn a_tiny_model_is_measured_under_both_policies() {
        for (shape, policy) in [("tiny", "none"), ("tiny", "full"), ("tiny-moe", "full")] {
            let shape = shapes::config(shape, None, None).unwrap();
            let mut config = TrainConfig::default();
            config.set("train.activation_checkpointing", policy).unwrap();
            config.set("train.gradient_accumulation_steps", "2").unwrap();
            config.set("lora.rank", "8").unwrap();
            let dir = tempfile::tempdir().unwrap();
            let tracing = Some(Tracing { path: dir.path().join("t.json"), steps: 2 });
            let (case, repeats) = (Case::full(2, 16), Repeats { warm_up: 1, steps: 3, tracing });
            let place = Place { device: Device::flex(), client: None, driver: None };
            let measured = run(&shape, &config, case, &repeats, &place).unwrap();
            let trace = std::fs::read_to_string(dir.path().join("t.json")).unwrap();
            assert_eq!(trace.matches("\"name\":\"step\"").count(), 2, "{policy}");
            assert_eq!(measured.tokens, 2 * 2 * 16);
            assert!(measured.step_seconds > 0.0 && measured.load_seconds > 0.0 && measured.first_step_seconds > 0.0);
            // The engine's span was seen: queueing ends within the step.
            assert!(measured.host_seconds.is_some_and(|host| host > 0.0), "{policy}");
            // Random weights know nothing: the loss is near the entropy of a uniform choice among 4,096, ln 4096 = 8.3.
            assert!(measured.losses.iter().all(|loss| (8.0..9.0).contains(loss)), "{:?}", measured.losses);
            assert!(measured.in_use_bytes > 0 && measured.reserved_bytes >= measured.in_use_bytes);
        }
    }
}
