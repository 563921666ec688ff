//! Training, evaluation and generation with frozen weights that wait in the host's memory: no bit differs.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use burn::tensor::{Device, FloatDType, Tensor};
use nf4_quant::QuantConfig;
use paged_optim::{Budget, OptimizerConfig, OptimizerKind};
use qlora_data::Batch;
use qlora_layers::streamed::HostStore;
use qlora_layers::{ActivationCheckpointing, Initialization, LoraConfig};
use qlora_models::{Decoder, KvCache, LoadOptions, ModelConfig, Placement, Streams};
use qlora_train::{Engine, Resume, TrainConfig, TrainEvents, Trainer};
use std::path::{Path, PathBuf};
use test_support::devices;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn batch(rows: usize, len: usize, seed: u32) -> Batch {
    let input_ids: Vec<u32> = (0..(rows * len) as u32).map(|i| 3 + (i * 7 + seed) % 50).collect();
    let labels = input_ids.iter().map(|&id| i64::from(id)).collect();
    Batch { input_ids, labels, rows, cols: len, lengths: vec![len; rows], packed: false, judged: None }
}

fn bits(tensor: Tensor<2>) -> Vec<u32> {
    tensor.without_autodiff().try_into_vec_as::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// A run's settings.
struct Case<'a> {
    model: &'a str,
    streamed: usize,
    policies: Vec<ActivationCheckpointing>,
    lora: LoraConfig,
    budget: Budget,
}

impl Case<'_> {
    fn load(&self, device: &Device) -> Decoder {
        let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype: FloatDType::F32 };
        let dir = root().join("testdata/reference").join(self.model);
        let config = ModelConfig::from_dir(&dir).unwrap();
        let store = Box::new(HostStore::new(device));
        let streams = Streams { placement: Placement::evenly(config.num_hidden_layers, self.streamed), store };
        Decoder::load_as(config, &dir, options, Some(streams), device, &mut |_| ()).unwrap()
    }

    /// Losses, evaluation, factors and moments of three steps, then what is generated, all as bits.
    fn results(&self, device: &Device) -> Vec<Vec<u64>> {
        let mut model = self.load(device);
        model.attach_lora(&self.lora, 3).unwrap();
        let optimizer = OptimizerConfig { kind: OptimizerKind::AdamW8bit, ..Default::default() };
        let policies = qlora_train::Policies(self.policies.clone());
        let mut engine = Engine::new(model, optimizer, self.budget, 1.0, policies).unwrap();
        let mut found = Vec::new();
        for seed in 0..3 {
            let output = engine.step(&[batch(2, 12, seed), batch(1, 9, seed)], 1e-2, u64::from(seed)).unwrap();
            let evaluation = engine.evaluate([batch(2, 11, 5)]).unwrap();
            found.push(
                [output.loss, output.grad_norm, evaluation.loss, evaluation.accuracy.unwrap()]
                    .map(f64::to_bits)
                    .to_vec(),
            );
        }
        assert_eq!(engine.model().streaming().blocks, self.streamed);
        let model = engine.model().parted();
        let of_factor = |factor: &Tensor<2>| bits(factor.clone()).into_iter().map(u64::from).collect();
        let factors =
            model.adapters().flat_map(|(_, adapter)| [&adapter.lora_a, &adapter.lora_b].map(|f| of_factor(f)));
        found.extend(factors.collect::<Vec<_>>());
        let mut cache = KvCache::new();
        for ids in [&[3, 9, 4, 1][..], &[7], &[8], &[9, 2]] {
            let logits = engine.model().forward_cached(ids, &mut cache).unwrap();
            found.push(bits(logits).into_iter().map(u64::from).collect());
        }
        found
    }
}

fn lora() -> LoraConfig {
    LoraConfig { rank: 2, dropout: 0.1, ..Default::default() }
}

#[test]
fn residency_changes_no_bit_under_any_policy() {
    for (device_name, device) in devices() {
        // Experts of such small shapes stay on a GPU.
        let models: &[(&str, &[usize])] = match device_name {
            "flex" => &[("tiny-llama", &[6, 3]), ("archs/qwen3_moe", &[3, 2])],
            _ => &[("tiny-llama", &[6])],
        };
        for (model, placements) in models {
            // Software Vulkan takes seconds a step.
            let policies = match device_name {
                "wgpu" => &[ActivationCheckpointing::None, ActivationCheckpointing::OffloadSelective][..],
                _ => &ActivationCheckpointing::ALL[..],
            };
            for &policy in policies {
                let case = |streamed, budget| Case { model, streamed, policies: vec![policy], lora: lora(), budget };
                let expected = case(0, Budget::Unlimited).results(&device);
                for streamed in *placements {
                    // The optimizer's state waits in the host's memory too.
                    let found = case(*streamed, Budget::Bytes(4096)).results(&device);
                    assert!(found == expected, "{device_name}: {model}, {streamed} streamed, {policy:?}");
                }
            }
        }
    }
}

#[test]
fn policies_of_blocks_and_kinds_of_adapters_change_no_bit_either() {
    use ActivationCheckpointing::{Full, None as Everything, OffloadSelective, Selective};
    let mixed = vec![OffloadSelective, Full, Full, Selective, Everything, Everything];
    let kinds = [
        LoraConfig { use_dora: true, ..lora() },
        LoraConfig { init: Initialization::Pissa { iterations: None }, ..lora() },
        LoraConfig { lora_bias: true, modules_to_save: vec!["norm".into(), "layers.1.mlp.down_proj".into()], ..lora() },
    ];
    for lora in kinds {
        let case = |streamed| Case {
            model: "tiny-llama",
            streamed,
            policies: mixed.clone(),
            lora: lora.clone(),
            budget: Budget::Unlimited,
        };
        let name = format!("{lora:?}");
        assert!(case(5).results(&Device::flex()) == case(0).results(&Device::flex()), "{name}");
    }
}

/// Stops a run after so many steps, and notes what the user is told.
struct Watch(usize, Vec<String>);

impl TrainEvents for Watch {
    fn on_step(&mut self, _: &qlora_train::metrics::StepMetrics) {
        self.0 -= 1;
    }

    fn on_notice(&mut self, message: &str) {
        self.1.push(message.into());
    }

    fn should_stop(&mut self) -> bool {
        self.0 == 0
    }
}

fn config(output_dir: &Path) -> TrainConfig {
    let mut config = TrainConfig { device: "cpu".into(), ..Default::default() };
    config.model.path = root().join("testdata/reference/tiny-llama").display().to_string();
    config.data.train = root().join("examples/quickstart/word_problems.jsonl").into();
    config.data.eval_fraction = 0.002;
    config.data.max_length = 96;
    config.lora = LoraConfig { rank: 4, dropout: 0.1, ..Default::default() };
    config.train.output_dir = output_dir.into();
    config.train.max_steps = Some(4);
    config.train.batch_size = 2;
    config.train.gradient_accumulation_steps = 2;
    config.train.save_every = 2;
    config
}

/// A run that begins with weights in the host's memory and goes on with them on the device is the run that never moved them.
#[test]
fn a_run_goes_on_under_another_residency() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str, residency: &str, budget: &str| {
        let mut config = config(&dir.path().join(name));
        config.set("model.residency", residency).unwrap();
        config.set("model.device_budget", budget).unwrap();
        config
    };
    let adapter = |name: &str| std::fs::read(dir.path().join(name).join("adapter/adapter_model.safetensors")).unwrap();
    let mut told = Watch(9, Vec::new());
    Trainer::new(of("device", "device", "auto"), Resume::No, &mut told).unwrap().run().unwrap();
    assert!(!told.1.iter().any(|notice| notice.contains("model.residency")), "{:?}", told.1);
    let mut told = Watch(2, Vec::new());
    Trainer::new(of("moved", "host", "auto"), Resume::No, &mut told).unwrap().run().unwrap();
    assert!(told.1.iter().any(|notice| notice.contains("6 of 6 blocks")), "{:?}", told.1);
    // Embeddings take 4 MiB of f32, a block some 0.5 MiB.
    let mut told = Watch(9, Vec::new());
    Trainer::new(of("moved", "host", "6MiB"), Resume::Auto, &mut told).unwrap().run().unwrap();
    let some = |notice: &String| notice.contains("of 6 blocks") && !notice.contains("6 of 6");
    assert!(told.1.iter().any(some), "{:?}", told.1);
    assert!(adapter("moved") == adapter("device"));
}

#[test]
fn settings_that_contradict_each_other_are_named() {
    let refusal = |settings: &[(&str, &str)]| {
        let mut config = config(Path::new("nowhere"));
        for (key, value) in settings {
            config.set(key, value)?;
        }
        config.validate()
    };
    let message = |settings: &[(&str, &str)]| refusal(settings).unwrap_err().to_string();
    let dense = message(&[("model.residency", "host"), ("quantization.quant_type", "none")]);
    assert!(dense.contains("model.residency") && dense.contains("quantization.quant_type"), "{dense}");
    let both = message(&[("model.residency", "device"), ("model.device_budget", "2GiB")]);
    assert!(both.contains("model.device_budget") && both.contains("model.residency"), "{both}");
    assert!(message(&[("model.residency", "disk")]).contains("model.residency"));
    assert!(message(&[("model.device_budget", "some")]).contains("model.device_budget"));
    refusal(&[("model.residency", "host"), ("model.device_budget", "1.5GiB")]).unwrap();
}
