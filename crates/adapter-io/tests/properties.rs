//! Input from strangers: whatever the bytes, an answer or an error; never a panic, a hang, or memory that the input
//! does not account for. `PROPTEST_CASES=100000` makes a long run of it.
#![allow(clippy::unwrap_used)]

mod bounded;
mod common;

use std::fs;
use std::path::Path;

use adapter_io::gguf::{GgmlType, GgufFile, GgufOptions, export_gguf};
use adapter_io::{
    Adapter, AdapterConfig, Checkpoint, Dtype, InitLoraWeights, OneOrMany, Pattern, ShardedWriter, TargetModules,
    TensorSpec, bnb,
};
use bounded::bounded;
use nf4_quant::{QuantConfig, QuantType, Quantized4bit};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::Config;

/// What reading may hold at once: every input here is below 8 KiB, the largest buffer of a reader or writer 1 MiB.
const BOUND: usize = 4 << 20;

/// Reads everything there is to read in a file of these bytes.
fn exercise(bytes: &[u8]) {
    bounded(BOUND, || read_everything(bytes));
}

fn read_everything(bytes: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.safetensors");
    fs::write(&path, bytes).unwrap();
    if let Ok(checkpoint) = Checkpoint::open(dir.path()) {
        for name in checkpoint.names() {
            let view = checkpoint.tensor(name).unwrap();
            let _ = (view.to_f32_vec().is_ok(), view.to_i64_vec().is_ok(), checkpoint.quantized(name).is_ok());
        }
        for module in checkpoint.quantized_modules() {
            let _ = checkpoint.quantized(module).map(|w| w.map(|w| w.dequantize::<f32>()));
        }
    }
    fs::rename(path, dir.path().join("adapter_model.safetensors")).unwrap();
    fs::write(dir.path().join("adapter_config.json"), "{}").unwrap();
    let _ = Adapter::load(dir.path()).is_ok();
}

fn quantized_file() -> Vec<u8> {
    let weight: Vec<f32> = (0..40 * 7).map(|i| (i as f32).cos()).collect();
    let config = QuantConfig { quant_type: QuantType::Nf4, blocksize: 64, double_quant: true };
    let tensors = bnb::to_tensors("m", &Quantized4bit::quantize(&weight, &[40, 7], &config).unwrap());
    let dir = tempfile::tempdir().unwrap();
    let mut writer =
        ShardedWriter::create(dir.path(), tensors.iter().map(|t| t.0.clone()).collect(), u64::MAX).unwrap();
    for (spec, bytes) in &tensors {
        writer.write(&spec.name, bytes).unwrap();
    }
    writer.finish().unwrap();
    fs::read(dir.path().join("model.safetensors")).unwrap()
}

fn json() -> impl Strategy<Value = serde_json::Value> {
    use serde_json::Value;
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        decimal().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        prop_oneof!["F32", "U8", "BF16", "nf4", "float32"].prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 6, |inner| {
        prop_oneof![
            vec(inner.clone(), 0..5).prop_map(Value::from),
            vec((key(), inner), 0..5).prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

/// Fractions as people write them. serde_json reads up to 15 digits exactly; beyond, its last bit may
/// differ from Python's.
fn decimal() -> impl Strategy<Value = f64> {
    (-1_000_000_000i64..1_000_000_000).prop_map(|x| x as f64 / 1e6)
}

fn key() -> impl Strategy<Value = String> {
    prop_oneof![
        "dtype|shape|data_offsets|__metadata__|m.weight|quant_type|blocksize|nested_blocksize|nested_offset|nested_dtype",
        "r|lora_alpha|target_modules|rank_pattern|layers_to_transform|peft_type|bias|init_lora_weights",
        any::<String>(),
    ]
}

fn config_key() -> impl Strategy<Value = String> {
    prop_oneof![
        "head_dim|vocab_size|hidden_size|rope_parameters|rope_scaling|rope_theta|num_experts|num_attention_heads|layer_types",
        "model|type|vocab|merges|added_tokens|byte_fallback|pre_tokenizer|post_processor|processors|single|pretokenizers",
        any::<String>(),
    ]
}

fn config() -> impl Strategy<Value = AdapterConfig> {
    let names = || vec("[a-z_.]{1,12}", 0..4);
    let targets =
        || prop_oneof![names().prop_map(TargetModules::List), any::<String>().prop_map(TargetModules::Pattern)];
    let pattern = |whole: bool| {
        vec(("[a-z_.]{1,8}", 1u32..300), 0..4).prop_map(move |entries| {
            let mut entries: Vec<_> =
                entries.into_iter().map(|(k, v)| (k, if whole { f64::from(v) } else { f64::from(v) / 8.0 })).collect();
            entries.sort_by(|a, b| a.0.cmp(&b.0));
            entries.dedup_by(|a, b| a.0 == b.0);
            Pattern(entries)
        })
    };
    let layers = prop_oneof![(0usize..99).prop_map(OneOrMany::One), vec(0usize..99, 0..4).prop_map(OneOrMany::Many)];
    let init =
        prop_oneof![any::<bool>().prop_map(InitLoraWeights::Default), "[a-z]+".prop_map(InitLoraWeights::Method)];
    (
        (1usize..512, decimal(), (0u32..1_000_000).prop_map(|x| f64::from(x) / 1e6), init),
        (
            proptest::option::of(targets()),
            proptest::option::of(targets()),
            proptest::option::of(layers),
            proptest::option::of(names()),
        ),
        (pattern(true), pattern(false), any::<Option<String>>(), vec(("future_[a-z]{1,5}", json()), 0..3)),
    )
        .prop_map(
            |(
                (r, lora_alpha, lora_dropout, init_lora_weights),
                (target_modules, exclude_modules, layers_to_transform, modules_to_save),
                (rank_pattern, alpha_pattern, revision, extra),
            )| AdapterConfig {
                r,
                lora_alpha,
                lora_dropout,
                init_lora_weights,
                target_modules,
                exclude_modules,
                layers_to_transform,
                modules_to_save,
                rank_pattern,
                alpha_pattern,
                revision,
                extra: extra.into_iter().collect(),
                ..AdapterConfig::default()
            },
        )
}

fn cases() -> Config {
    Config { failure_persistence: None, ..Config::default() }
}

/// Everything there is to read in a GGUF file of these bytes.
fn exercise_gguf(bytes: &[u8]) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    bounded(BOUND, || read_gguf(file.path()));
}

fn read_gguf(path: &Path) {
    if let Ok(gguf) = GgufFile::open(path) {
        for tensor in &gguf.tensors {
            // The file is small, so a tensor that lies in it is, too.
            let values = gguf.to_f32_vec(&tensor.name).unwrap();
            assert_eq!(values.len(), tensor.shape.iter().product::<usize>());
        }
    }
}

/// A model of one layer, with metadata of every kind that a writer gives.
fn gguf_file() -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    common::model(dir.path());
    let tokenizer = serde_json::json!({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
        "pre_tokenizer": {"type": "ByteLevel"}});
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let out = dir.path().join("m.gguf");
    let options = GgufOptions { kind: GgmlType::Q4_0, ..GgufOptions::default() };
    export_gguf(dir.path(), &out, &options, &mut |_| {}).unwrap();
    fs::read(out).unwrap()
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn any_bytes_are_a_file_or_an_error(bytes in vec(any::<u8>(), 0..300)) {
        exercise(&bytes);
    }

    #[test]
    fn any_bytes_are_a_gguf_file_or_an_error(version in 0u32..5, counts in any::<[u64; 2]>(), small in any::<bool>(), bytes in vec(any::<u8>(), 0..300)) {
        let mut file = b"GGUF".to_vec();
        file.extend(version.to_le_bytes());
        counts.iter().for_each(|c| file.extend((if small { c % 4 } else { *c }).to_le_bytes()));
        file.extend(&bytes);
        exercise_gguf(&file);
        exercise_gguf(&bytes);
    }

    #[test]
    fn damaged_gguf_files_are_read_or_refused(edits in vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4), cut in any::<proptest::sample::Index>(), truncate in any::<bool>()) {
        static GOOD: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(gguf_file);
        let mut bytes = GOOD.clone();
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if truncate {
            bytes.truncate(cut.index(bytes.len()));
        }
        exercise_gguf(&bytes);
    }

    #[test]
    fn any_json_is_a_header_or_an_error(header in json(), data in vec(any::<u8>(), 0..64)) {
        exercise(&common::file_of(&header.to_string(), &data));
    }

    #[test]
    fn damaged_files_are_read_or_refused(at in any::<proptest::sample::Index>(), byte in any::<u8>(), cut in any::<proptest::sample::Index>(), truncate in any::<bool>()) {
        static GOOD: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(quantized_file);
        let mut bytes = GOOD.clone();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if truncate {
            bytes.truncate(cut.index(bytes.len()));
        }
        exercise(&bytes);
    }

    #[test]
    fn any_quant_state_is_read_or_refused(state in json(), text in any::<String>(), plain in any::<bool>()) {
        let json = if plain { text } else { state.to_string() };
        let specs = vec![TensorSpec::new("m.weight", Dtype::U8, &[4, 1]), TensorSpec::new("m.weight.quant_state.bitsandbytes__nf4", Dtype::U8, &[json.len()])];
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ShardedWriter::create(dir.path(), specs, u64::MAX).unwrap();
        writer.write("m.weight", &[0; 4]).unwrap();
        writer.write("m.weight.quant_state.bitsandbytes__nf4", json.as_bytes()).unwrap();
        writer.finish().unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        prop_assert!(bounded(BOUND, || checkpoint.quantized("m").is_err()));
    }

    #[test]
    fn any_index_is_read_or_refused(index in json(), names in vec(any::<(String, String)>(), 0..4)) {
        let dir = tempfile::tempdir().unwrap();
        let map: serde_json::Map<_, _> = names.into_iter().map(|(k, v)| (k, v.into())).collect();
        for value in [index, serde_json::json!({"weight_map": map})] {
            fs::write(dir.path().join("model.safetensors.index.json"), value.to_string()).unwrap();
            let _ = bounded(BOUND, || Checkpoint::open(dir.path()).is_ok());
        }
    }

    /// However a name is put together, it opens nothing outside the folder.
    #[test]
    fn no_index_leads_out_of_its_folder(parts in vec("\\.\\.|\\.|sub|link|out|/|\\\\|model|C:|\\PC{1,3}", 1..6), separator in "/|//|\\\\", absolute in any::<bool>()) {
        let dir = tempfile::tempdir().unwrap();
        let (outside, inside) = (dir.path().join("out"), dir.path().join("in"));
        for folder in [&outside, &inside, &inside.join("sub")] {
            fs::create_dir(folder).unwrap();
        }
        static WEIGHTS: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(quantized_file);
        for file in [outside.join("model"), dir.path().join("model")] {
            fs::write(file, &*WEIGHTS).unwrap();
        }
        #[cfg(unix)]
        for link in [inside.join("link"), inside.join("sub/link")] {
            std::os::unix::fs::symlink(&outside, link).unwrap();
        }
        let start = if absolute { format!("{}{separator}", dir.path().display()) } else { String::new() };
        let name = start + &parts.join(&separator);
        let index = serde_json::json!({"weight_map": {"m.weight": name}});
        fs::write(inside.join("model.safetensors.index.json"), index.to_string()).unwrap();
        // There are no weights inside.
        prop_assert!(Checkpoint::open(&inside).is_err(), "{}", name);
    }

    #[test]
    fn adapter_configs_survive_writing_and_reading(config in config()) {
        let text = config.to_json();
        let read = AdapterConfig::from_json(&text, Path::new("adapter_config.json")).unwrap();
        prop_assert_eq!(&read, &config);
        prop_assert_eq!(read.to_json(), text);
    }

    #[test]
    fn any_adapter_config_is_read_or_refused(config in json(), entries in vec((key(), json()), 0..6)) {
        let path = Path::new("adapter_config.json");
        let map = serde_json::Value::Object(entries.into_iter().collect());
        for text in [config.to_string(), map.to_string()] {
            let read = bounded(BOUND, || AdapterConfig::from_json(&text, path));
            if let Ok(config) = read {
                prop_assert!(AdapterConfig::from_json(&config.to_json(), path).is_ok());
                // What a hostile pattern costs is bounded, too.
                bounded(BOUND, || {
                    let _ = (config.scaling_for("model.layers.0.self_attn.q_proj").is_ok(), config.rank_for("model.layers.0.mlp").is_ok());
                });
            }
        }
    }

    #[test]
    fn any_model_folder_is_written_as_gguf_or_refused(entries in vec((config_key(), json()), 0..8), tokenizer in vec((config_key(), json()), 0..5), inner in vec((config_key(), json()), 0..5), kind in 0usize..9) {
        static WEIGHTS: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(quantized_file);
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("model.safetensors"), &*WEIGHTS).unwrap();
        let types = ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3"];
        let mut config = serde_json::json!({"model_type": types[kind], "hidden_size": 32, "intermediate_size": 8,
            "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 64, "vocab_size": 4, "sliding_window": 4});
        config.as_object_mut().unwrap().extend(entries);
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let mut model: serde_json::Map<_, _> = tokenizer.into_iter().collect();
        model.insert("model".into(), serde_json::Value::Object(inner.into_iter().collect()));
        fs::write(dir.path().join("tokenizer.json"), serde_json::Value::Object(model).to_string()).unwrap();
        // The weights' names have no place in GGUF, so that configuration and names alone are exercised...
        let _ = bounded(BOUND, || export_gguf(dir.path(), &dir.path().join("m.gguf"), &GgufOptions::default(), &mut |_| {}).is_ok());
        // ...and here the tokenizer is.
        let specs = [TensorSpec::new("model.embed_tokens.weight", Dtype::F32, &[4, 32])];
        common::write(dir.path(), &specs, u64::MAX);
        let out = dir.path().join("m.gguf");
        if bounded(BOUND, || export_gguf(dir.path(), &out, &GgufOptions::default(), &mut |_| {}).is_ok()) {
            GgufFile::open(&out).unwrap();
        }
    }
}
