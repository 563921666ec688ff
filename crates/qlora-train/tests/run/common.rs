//! A small run on the reference model, and what it leaves.

use adapter_io::Adapter;
use qlora_layers::LoraConfig;
use qlora_train::metrics::{History, METRICS_FILE};
use qlora_train::report::Summary;
use qlora_train::{Start, TrainConfig, TrainError, TrainEvents, Trainer};
use std::path::Path;

pub fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// A run of six steps of two micro-batches, with dropout and noise on embeddings: everything that draws on the seed is in it.
pub fn config(output_dir: &Path) -> TrainConfig {
    let mut config = TrainConfig { device: "cpu".into(), ..Default::default() };
    config.model.path = root().join("testdata/reference/tiny-llama").display().to_string();
    config.data.train = root().join("examples/quickstart/word_problems.jsonl").into();
    config.data.eval_fraction = 0.002;
    config.data.max_length = 96;
    config.lora = LoraConfig { rank: 4, alpha: 8.0, dropout: 0.1, ..Default::default() };
    config.train.output_dir = output_dir.into();
    config.train.max_steps = Some(6);
    config.train.batch_size = 2;
    config.train.gradient_accumulation_steps = 2;
    config.train.learning_rate = 1e-3;
    config.train.neftune_alpha = 5.0;
    config.train.save_every = 2;
    config.train.save_limit = 2;
    config
}

/// Stops the run after a number of steps.
pub struct StopAfter(pub usize);

impl TrainEvents for StopAfter {
    fn on_step(&mut self, _: &qlora_train::metrics::StepMetrics) {
        self.0 -= 1;
    }

    fn should_stop(&mut self) -> bool {
        self.0 == 0
    }
}

/// Keeps the notices that the user is told.
#[derive(Default)]
pub struct Notices(pub Vec<String>);

impl TrainEvents for Notices {
    fn on_notice(&mut self, message: &str) {
        self.0.push(message.into());
    }
}

/// Keeps the warnings that the user is told.
#[derive(Default)]
pub struct Told(pub Vec<String>);

impl TrainEvents for Told {
    fn on_warning(&mut self, message: &str) {
        self.0.push(message.into());
    }
}

impl Told {
    pub fn has(&self, words: &str) -> bool {
        self.0.iter().any(|message| message.contains(words))
    }
}

pub fn run(config: TrainConfig, start: impl Into<Start>, events: &mut dyn TrainEvents) -> Result<Summary, TrainError> {
    Trainer::new(config, start, events)?.run()
}

/// The message of a run that has to fail.
pub fn refused(config: TrainConfig, start: impl Into<Start>) -> String {
    run(config, start, &mut ()).expect_err("a refusal").to_string()
}

pub fn losses(dir: &Path) -> Vec<(usize, u64, u64)> {
    let history = History::read(&dir.join(METRICS_FILE)).unwrap();
    history.steps.iter().map(|step| (step.step, step.loss.to_bits(), step.grad_norm.to_bits())).collect()
}

/// The bytes of a run's adapter.
pub fn adapter(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("adapter/adapter_model.safetensors")).unwrap()
}

/// An adapter's tensors.
pub fn tensors(dir: &Path) -> Adapter {
    Adapter::load(dir).unwrap()
}

/// Names in a folder, sorted.
pub fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        dir.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
