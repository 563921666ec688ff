//! Models whose blocks are streamed give the bits of those that are on the device as a whole, on every device at hand.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use burn::module::Param;
use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use nf4_quant::QuantConfig;
use qlora_layers::streamed::{BlockStore, HostStore, SLOTS};
use qlora_layers::{Initialization, LayerError, LoraConfig, Pass};
use qlora_models::{Decoder, KvCache, LoadOptions, ModelConfig, ModelError, Placement, Streams};
use std::path::{Path, PathBuf};
use test_support::{devices, noise};

const IDS: [u32; 12] = [3, 9, 4, 1, 30, 11, 5, 9, 2, 6, 5, 3];

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference").join(name)
}

fn load(name: &str, double_quant: bool, streams: Option<Streams>, device: &Device) -> Result<Decoder, ModelError> {
    let quantization = Some(QuantConfig { double_quant, ..QuantConfig::default() });
    let options = LoadOptions { quantization, dtype: FloatDType::F32 };
    load_as(name, options, streams, device)
}

fn load_as(name: &str, options: LoadOptions, streams: Option<Streams>, device: &Device) -> Result<Decoder, ModelError> {
    let dir = reference(name);
    Decoder::load_as(ModelConfig::from_dir(&dir)?, &dir, options, streams, device, &mut |_| {})
}

fn streams(blocks: usize, streamed: usize, device: &Device) -> Option<Streams> {
    Some(Streams { placement: Placement::evenly(blocks, streamed), store: Box::new(HostStore::new(device)) })
}

fn adapted(mut model: Decoder, config: &LoraConfig) -> Decoder {
    model.attach_lora(config, 3).unwrap();
    for (i, (_, adapter)) in model.adapters_mut().enumerate() {
        let [rows, rank] = adapter.lora_b.dims();
        let values: Vec<f32> = noise(i as u64, rows * rank).into_iter().map(|value| 0.2 * value).collect();
        let values = Tensor::from_data(TensorData::new(values, [rows, rank]), &adapter.lora_b.device());
        adapter.lora_b = Param::initialized(adapter.lora_b.id, values);
    }
    model
}

fn bits(tensor: Tensor<2>) -> Vec<u32> {
    tensor.try_into_vec_as::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// Two batches' logits, then those of a sequence that grows token by token.
fn results(model: &Decoder) -> Vec<Vec<u32>> {
    let mut found = vec![bits(model.forward(&IDS, 2, Pass::INFERENCE)), bits(model.forward(&IDS, 1, Pass::INFERENCE))];
    let mut cache = KvCache::new();
    for ids in [&IDS[..5], &IDS[5..6], &IDS[6..7], &IDS[7..]] {
        found.push(bits(model.forward_cached(ids, &mut cache).unwrap()));
    }
    assert!(found.iter().flatten().all(|bits| f32::from_bits(*bits).is_finite()));
    found
}

#[test]
fn streamed_models_give_the_bits_of_resident_ones() {
    for (device_name, device) in devices() {
        for (name, blocks) in [("tiny-llama", 6), ("archs/qwen3_moe", 3), ("archs/gemma2", 2)] {
            // Software Vulkan takes a while.
            let slow = device_name == "wgpu";
            for double_quant in if slow { &[true][..] } else { &[true, false] }.iter().copied() {
                let config = LoraConfig { rank: 4, ..LoraConfig::default() };
                let resident = load(name, double_quant, None, &device).unwrap();
                let expected = results(&resident);
                let expected_adapted = results(&adapted(resident.clone(), &config));
                for streamed in [1, blocks / 2 + 1, blocks].into_iter().skip(if slow { 2 } else { 0 }) {
                    let case = format!("{device_name}: {name}, {streamed} of {blocks}, double {double_quant}");
                    let model = load(name, double_quant, streams(blocks, streamed, &device), &device).unwrap();
                    assert!(results(&model) == expected, "{case}");
                    let moved = model.streaming();
                    // On GPUs experts of such small shapes stay on the device.
                    if name == "tiny-llama" || device_name == "flex" {
                        assert_eq!((moved.blocks, moved.slots), (streamed, streamed.min(SLOTS)), "{case}");
                        assert!(moved.bytes_in >= moved.host_bytes && moved.host_bytes > 0, "{case}: {moved:?}");
                        // Slots have room for the largest block.
                        let smaller = model.device_bytes() < resident.device_bytes();
                        assert!(smaller || streamed <= SLOTS || name != "tiny-llama", "{case}");
                    }
                    assert!(results(&adapted(model, &config)) == expected_adapted, "{case}, with adapters");
                }
            }
        }
    }
}

/// What starts from the weights reads and changes them: they change where they wait.
#[test]
fn adapters_that_change_weights_change_streamed_ones() {
    let device = Device::flex();
    for init in [Initialization::Pissa { iterations: None }, Initialization::Loftq, Initialization::Olora] {
        let config = LoraConfig { rank: 4, init, loftq_iterations: 2, ..LoraConfig::default() };
        let attached = |streams| {
            let mut model = load("tiny-llama", true, streams, &device).unwrap();
            model.attach_lora(&config, 3).unwrap();
            model
        };
        let (resident, streamed) = (attached(None), attached(streams(6, 6, &device)));
        assert!(streamed.is_streamed() && streamed.streaming().blocks == 6);
        assert!(results(&streamed) == results(&resident), "{init:?}");
        assert!(streamed.device_bytes() < resident.device_bytes(), "{init:?}");
    }
    let dora = LoraConfig { rank: 4, use_dora: true, ..LoraConfig::default() };
    let of = |streams| results(&adapted(load("tiny-llama", true, streams, &device).unwrap(), &dora));
    assert!(of(None) == of(streams(6, 6, &device)));
}

#[test]
fn what_reads_a_layer_by_itself_finds_its_own_weight() {
    for (name, device) in devices() {
        let [resident, streamed] =
            [None, streams(6, 6, &device)].map(|streams| load("tiny-llama", true, streams, &device).unwrap());
        // From last to first, as nobody does who fetches ahead.
        let pairs: Vec<_> = resident.linears().zip(streamed.linears()).collect();
        for ((path, resident), (_, streamed)) in pairs.into_iter().rev() {
            let dense = |layer: &qlora_layers::LoraLinear| bits(layer.base.to_dense(FloatDType::F32));
            assert!(dense(resident) == dense(streamed), "{name}: {path}");
        }
    }
}

/// The whole graph would be differentiated with the weights of other blocks in the slots.
#[test]
fn a_recorded_pass_over_all_blocks_gives_no_numbers() {
    let device = Device::flex();
    let mut model = load("tiny-llama", true, streams(6, 6, &device), &device).unwrap();
    model.attach_lora(&LoraConfig { rank: 4, ..LoraConfig::default() }, 3).unwrap();
    model.track();
    let logits = model.forward(&IDS, 2, Pass::training(1)).without_autodiff();
    assert!(logits.try_into_vec_as::<f32>().unwrap().iter().all(|logit| logit.is_nan()));
}

#[test]
fn dense_weights_and_full_hosts_are_refused_by_name() {
    let device = Device::flex();
    let options = LoadOptions { quantization: None, dtype: FloatDType::F32 };
    let dense = load_as("tiny-llama", options, streams(6, 6, &device), &device);
    let message = dense.unwrap_err().to_string();
    assert!(message.contains("model.residency") && message.contains("quantization.quant_type"), "{message}");

    /// A store without room.
    struct Full;
    impl BlockStore for Full {
        fn push(&mut self, _: Vec<Tensor<1, Int>>) -> Result<(), LayerError> {
            Err(LayerError::Weight("no room".into()))
        }
        fn finish(self: Box<Self>) -> Result<qlora_layers::streamed::StreamedBlocks, host_copies::DeviceError> {
            unreachable!("nothing was pushed")
        }
    }
    let full = Some(Streams { placement: Placement::evenly(6, 1), store: Box::new(Full) });
    assert!(load("tiny-llama", true, full, &device).unwrap_err().to_string().contains("no room"));
}
