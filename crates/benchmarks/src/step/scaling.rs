//! Whole steps of several ranks, each on a card of its own, beside the same step of one.
//!
//! With `--gpus N` each case has N fresh processes. Under a launcher, such as `torchrun --no-python`, the processes are the launcher's:
//! they measure all cases together, one after the other, while rank 0 alone measures what one card does, in a process of its own.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use burn::tensor::Device;
use burn_qlora::TrainConfig;
use burn_qlora::qlora_dist::{Group, Place, Timeouts};
use burn_qlora::qlora_models::{ModelConfig, device_memory};
use burn_qlora::qlora_train::ranks::Ranks;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::case::Case;
use super::measure::{Measured, Steps, median, random_engine};
use super::report::gib;

/// Steps of several ranks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Scaled {
    pub ranks: usize,
    /// How gradients went from rank to rank, as the ranks say it.
    pub transport: String,
    /// Tokens of a step, those of all ranks.
    pub tokens: usize,
    /// Median of the timed steps, and half of the distance between the quartiles as a part of it.
    pub step_seconds: f64,
    pub spread: f64,
    /// Of each rank, the median of what it waited for the sums of all in a step.
    pub waited_seconds: Vec<f64>,
    /// Bytes of the gradients that a step sums.
    pub gradient_bytes: usize,
    /// The allocator's bytes in use on rank 0 with the model loaded, and its bytes reserved after the last step.
    pub base_bytes: u64,
    pub reserved_bytes: u64,
    /// Loss of the first and the last step.
    pub losses: [f64; 2],
}

impl Scaled {
    /// Tokens a second over those of one card, where it could.
    fn ratio(&self, one: Option<&Measured>) -> Option<f64> {
        Some((self.tokens as f64 / self.step_seconds) / one.map(|one| one.tokens as f64 / one.step_seconds)?)
    }

    /// A line below that of one card.
    pub(crate) fn line(&self, one: Option<&Measured>) -> String {
        let waited = self.waited_seconds.iter().map(|seconds| format!("{:.1}", 1e3 * seconds)).collect::<Vec<_>>();
        format!(
            "  {} ranks: {:.1} ms +- {:.1} %, {:.0} tok/s, {}; waited {} ms for sums of {} MB; {} GiB of weights, {} reserved; {}",
            self.ranks,
            1e3 * self.step_seconds,
            100.0 * self.spread,
            self.tokens as f64 / self.step_seconds,
            self.ratio(one).map_or("more than one can do".into(), |ratio| format!("{ratio:.3}x of one")),
            waited.join(" and "),
            self.gradient_bytes / 1_000_000,
            gib(self.base_bytes),
            gib(self.reserved_bytes),
            self.transport,
        )
    }

    pub(crate) fn json(&self, one: Option<&Measured>) -> Value {
        let mut line = json!(self);
        line["tokens_per_second"] = json!((self.tokens as f64 / self.step_seconds).round());
        line["ratio_to_one"] = json!(self.ratio(one).map(|ratio| (ratio * 1e3).round() / 1e3));
        line
    }
}

/// The ranks of this process's launcher, on their devices.
pub(super) struct Together {
    ranks: Ranks,
    transport: String,
    pub device: Device,
}

/// The name of the device of a rank.
pub(super) fn device_of(name: &str, place: &Place) -> String {
    match name {
        "auto" | "cuda" => format!("cuda:{}", place.card(std::env::var("CUDA_VISIBLE_DEVICES").ok().as_deref())),
        other => other.into(),
    }
}

impl Together {
    /// Meets the others.
    pub(super) fn meet(place: Place, device: &Device, config: &TrainConfig) -> Result<Self> {
        let group = Group::join(place, Timeouts::default())?;
        let (ranks, note) = Ranks::over_hosts(group).connect(device, config.distributed.transport)?;
        let transport = note.unwrap_or_else(|| "gradients go over TCP".into());
        Ok(Self { ranks, transport, device: device.clone() })
    }

    /// Whether this is rank 0.
    pub(super) fn is_first(&self) -> bool {
        self.ranks.rank() == 0
    }

    /// Returns when all ranks are here.
    pub(super) fn wait_for_all(&self) -> Result<()> {
        self.ranks.all_gather(Vec::new())?;
        Ok(())
    }

    /// Measures a case on all ranks.
    pub(super) fn measure(
        &self,
        shape: &ModelConfig,
        config: &TrainConfig,
        case: Case,
        (warm_up, steps): (usize, usize),
    ) -> Result<Scaled> {
        let count = self.ranks.count();
        let engine = random_engine(shape, config, case, &self.device, Some(&self.ranks))?;
        let gradient_bytes = 4 * engine.model().num_trainable();
        let base_bytes = device_memory(&self.device).map_or(0, |(in_use, _)| in_use);
        let mut all = Steps::new(engine, config, case).of_ranks(count);
        let first = all.next()?;
        tracing::info!(loss = first.loss, grad_norm = first.grad_norm, waited = ?first.waited_seconds, "the first step");
        for _ in 1..warm_up {
            let next = all.next()?;
            tracing::info!(loss = next.loss, grad_norm = next.grad_norm, waited = ?next.waited_seconds, "a step");
        }
        self.device.sync()?;
        self.wait_for_all()?;
        let (mut seconds, mut waited) = (Vec::new(), Vec::new());
        let mut last = first;
        let warm = all.tokens;
        for _ in 0..steps {
            let start = std::time::Instant::now();
            last = all.next()?;
            seconds.push(start.elapsed().as_secs_f64());
            waited.push(last.waited_seconds.unwrap_or(0.0));
            tracing::info!(loss = last.loss, grad_norm = last.grad_norm, seconds = ?seconds.last(), waited = ?waited.last(), "a step");
        }
        let (step_seconds, spread) = median(&mut seconds);
        let tokens = (all.tokens - warm) / steps.max(1);
        waited.sort_by(f64::total_cmp);
        let mine = waited.get(waited.len() / 2).copied().unwrap_or(0.0);
        let of_all = self.ranks.all_gather(mine.to_le_bytes().to_vec())?;
        let waited_seconds = of_all.iter().filter_map(|bytes| bytes.as_slice().try_into().ok().map(f64::from_le_bytes));
        let (_, reserved_bytes) = device_memory(&self.device).unwrap_or_default();
        Ok(Scaled {
            ranks: count,
            base_bytes,
            reserved_bytes,
            transport: self.transport.clone(),
            tokens,
            step_seconds,
            spread,
            waited_seconds: waited_seconds.collect(),
            gradient_bytes,
            losses: [first.loss, last.loss],
        })
    }
}

/// Runs this program once more as each of `count` ranks, for a part of its work, and returns what rank 0 answers.
pub(super) fn children(count: usize, part: &str) -> Result<Scaled, String> {
    let run = || -> Result<Value> {
        let first = Place::first_of(count).context("this host gives no port for the ranks to meet at")?;
        let program = std::env::current_exe()?;
        let mut children = Vec::new();
        for rank in 0..count {
            let place = Place { rank, local_rank: rank, ..first.clone() };
            let mut command = Command::new(&program);
            command.args(std::env::args_os().skip(1)).args(["--child", part]).envs(place.to_env());
            children.push(command.stdout(Stdio::piped()).stdin(Stdio::null()).spawn()?);
        }
        let outputs = children.into_iter().map(std::process::Child::wait_with_output);
        let outputs = outputs.collect::<std::io::Result<Vec<_>>>()?;
        // What went wrong is said by whom it went wrong with; the others repeat it.
        let mut answer = None;
        for output in outputs.iter().rev() {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            match text.lines().rev().find(|line| line.starts_with('{')) {
                Some(line) => answer = Some(serde_json::from_str(line)?),
                None => bail!("a rank ended: {}", output.status),
            }
        }
        answer.context("there is no rank")
    };
    let mut answer = run().map_err(|error| format!("{error:#}"))?;
    match answer["error"].as_str() {
        Some(error) => Err(error.to_owned()),
        None => serde_json::from_value(answer["ok"].take()).map_err(|error| error.to_string()),
    }
}
