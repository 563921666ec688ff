//! Loading, generation with the cache, adapters and their merge, on the reference checkpoint.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use adapter_io::Adapter;
use burn::tensor::{Device, FloatDType, Tensor};
use nf4_quant::QuantConfig;
use qlora_layers::{FrozenLinear, LoraConfig, Pass, TargetModules};
use qlora_models::{Decoder, KvCache, LinearRole, LoadOptions, LoadProgress, ModelConfig, ModelError, RopeScaling};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference").join(name)
}

fn load(dir: &Path, quantization: Option<QuantConfig>) -> Result<Decoder, ModelError> {
    Decoder::load(dir, LoadOptions { quantization, dtype: FloatDType::F32 }, &Device::flex(), &mut |_| {})
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn assert_close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= tolerance, "element {i}: {found} against {expected}");
    }
}

#[test]
fn loading_reports_progress_up_to_the_whole_checkpoint() {
    let mut seen = Vec::new();
    let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype: FloatDType::F32 };
    Decoder::load(&reference("tiny-llama"), options, &Device::flex(), &mut |p| {
        seen.push((p.loaded_bytes, p.total_bytes))
    })
    .unwrap();
    assert!(seen.is_sorted());
    let (last, total) = *seen.last().unwrap();
    assert_eq!(last, total);
}

#[test]
fn a_quantized_model_is_an_eighth_of_f32_in_its_linear_layers() {
    let dense = load(&reference("tiny-llama"), None).unwrap();
    let quantized = load(&reference("tiny-llama"), Some(QuantConfig::default())).unwrap();
    let bytes = |model: &Decoder| model.linears().map(|(_, linear)| linear.base.device_bytes()).sum::<usize>() as f64;
    // 4.127 bits of 32 (QLoRA, section 3); short last nested blocks of small layers add a little.
    let ratio = bytes(&quantized) / bytes(&dense) * 32.0;
    assert!((4.125..4.15).contains(&ratio), "{ratio} bits per weight");
}

#[test]
fn the_cache_gives_the_logits_of_the_whole_sequence() {
    let model = load(&reference("tiny-llama"), Some(QuantConfig::default())).unwrap();
    let ids = [5, 900, 33, 2047, 1, 77, 4000];
    let vocab = model.config().vocab_size;
    let whole = values(model.forward(&ids, 1, Pass::INFERENCE));
    // A prompt of three, then token by token.
    let mut cache = KvCache::new();
    let mut found = values(model.forward_cached(&ids[..3], &mut cache).unwrap());
    for id in &ids[3..] {
        found.extend(values(model.forward_cached(&[*id], &mut cache).unwrap()));
    }
    assert_eq!(cache.len(), ids.len());
    // Sums over 256 to 688 terms in another order, logits of order 10: some 1e-5.
    assert_close(&found, &whole[2 * vocab..], 1e-4);
}

#[test]
fn rows_of_a_batch_do_not_touch_each_other() {
    let model = load(&reference("tiny-llama"), None).unwrap();
    let (first, second) = ([5u32, 6, 7, 8], [90u32, 91, 92, 93]);
    let both: Vec<u32> = first.iter().chain(&second).copied().collect();
    let alone = [values(model.forward(&first, 1, Pass::INFERENCE)), values(model.forward(&second, 1, Pass::INFERENCE))]
        .concat();
    assert_close(&values(model.forward(&both, 2, Pass::INFERENCE)), &alone, 1e-4);
}

#[test]
fn an_adapter_survives_export_and_load() {
    let mut model = load(&reference("tiny-llama"), Some(QuantConfig::default())).unwrap();
    let adapter = Adapter::load(&reference("qlora/final_adapter_f32")).unwrap();
    model.load_adapter(&adapter).unwrap();
    let exported = model.export_adapter("tiny-llama", None).unwrap();
    assert!(exported == adapter);
    let logits = values(model.forward(&[1, 2, 3], 1, Pass::INFERENCE));
    let mut again = load(&reference("tiny-llama"), Some(QuantConfig::default())).unwrap();
    again.load_adapter(&exported).unwrap();
    assert_eq!(values(again.forward(&[1, 2, 3], 1, Pass::INFERENCE)), logits);
}

#[test]
fn merging_is_refused_on_4_bits_and_exact_on_the_dense_base() {
    let adapter = Adapter::load(&reference("qlora/final_adapter_f32")).unwrap();
    let mut quantized = load(&reference("tiny-llama"), Some(QuantConfig::default())).unwrap();
    quantized.load_adapter(&adapter).unwrap();
    assert!(matches!(quantized.merge_adapters(), Err(ModelError::MergeQuantized { .. })));
    assert!(quantized.num_trainable() > 0, "a refused merge leaves the adapter");

    let mut dense = load(&reference("tiny-llama"), None).unwrap();
    dense.load_adapter(&adapter).unwrap();
    let apart = values(dense.forward(&[1, 2, 3], 1, Pass::INFERENCE));
    dense.merge_adapters().unwrap();
    assert_eq!(dense.num_trainable(), 0);
    // W + BA rounded to f32 against two products: some 1e-5 on logits of order 10.
    assert_close(&values(dense.forward(&[1, 2, 3], 1, Pass::INFERENCE)), &apart, 2e-4);
}

#[test]
fn targets_that_match_nothing_list_what_there_is() {
    let mut model = load(&reference("tiny-llama"), None).unwrap();
    let config =
        LoraConfig { target_modules: TargetModules::Names(vec!["query_key_value".into()]), ..Default::default() };
    let message = model.attach_lora(&config, 0).unwrap_err().to_string();
    assert!(
        message.contains("query_key_value") && message.contains("q_proj") && message.contains("down_proj"),
        "{message}"
    );
}

/// A copy of the reference checkpoint with an edited `config.json`.
fn edited(edit: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let source = reference("tiny-llama");
    std::fs::copy(source.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let mut config: Value = serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    edit(&mut config);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn failure(edit: impl FnOnce(&mut Value)) -> String {
    load(edited(edit).path(), None).unwrap_err().to_string()
}

#[test]
fn dropouts_of_the_base_are_left_out_and_told() {
    let model = load(edited(|c| c["attention_dropout"] = json!(0.1)).path(), None).unwrap();
    let notes = &model.config().notes;
    assert!(notes.iter().any(|note| note.contains("`attention_dropout` is 0.1")), "{notes:?}");
}

#[test]
fn bad_configurations_name_the_field_and_the_cure() {
    let unknown = failure(|c| c["model_type"] = json!("mamba"));
    assert!(unknown.contains("config.json") && unknown.contains("mamba") && unknown.contains("llama"), "{unknown}");
    let activation = failure(|c| c["hidden_act"] = json!("xielu"));
    assert!(activation.contains("hidden_act") && activation.contains("silu"), "{activation}");
    let unknown_key = failure(|c| c["no_rope_layers"] = json!([1, 0]));
    assert!(unknown_key.contains("no_rope_layers") && unknown_key.contains("config.json"), "{unknown_key}");
    let unknown_scaling = failure(|c| c["rope_parameters"]["mrope_section"] = json!([1, 2]));
    assert!(unknown_scaling.contains("rope_parameters.mrope_section"), "{unknown_scaling}");
    let heads = failure(|c| c["num_key_value_heads"] = json!(3));
    assert!(heads.contains("num_key_value_heads"), "{heads}");
    let rope = failure(|c| c["rope_parameters"]["rope_type"] = json!("proportional"));
    assert!(rope.contains("rope_parameters.rope_type") && rope.contains("proportional"), "{rope}");
    let missing = failure(|c| {
        c.as_object_mut().unwrap().remove("hidden_size");
    });
    assert!(missing.contains("hidden_size"), "{missing}");
}

#[test]
fn a_tensor_of_another_shape_is_named() {
    let message = failure(|c| c["intermediate_size"] = json!(700));
    assert!(message.contains("gate_proj") && message.contains("700") && message.contains("688"), "{message}");
}

#[test]
fn a_missing_tensor_is_named() {
    let message = failure(|c| c["num_hidden_layers"] = json!(7));
    assert!(message.contains("model.layers.6"), "{message}");
}

#[test]
fn older_rope_keys_mean_the_same() {
    let path = Path::new("config.json");
    let mut config: Value =
        serde_json::from_slice(&std::fs::read(reference("tiny-llama/config.json")).unwrap()).unwrap();
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    config["rope_parameters"] = scaling.clone();
    config["rope_parameters"]["rope_theta"] = json!(500000.0);
    let new = ModelConfig::from_json(&config, path).unwrap();
    config.as_object_mut().unwrap().remove("rope_parameters");
    config["rope_scaling"] = scaling;
    config["rope_theta"] = json!(500000.0);
    let old = ModelConfig::from_json(&config, path).unwrap();
    assert_eq!(old.attention_kinds, new.attention_kinds);
    assert!(matches!(new.attention_kinds[0].rope.scaling, RopeScaling::Llama3 { .. }));
}

#[test]
fn random_models_have_every_familys_modules() {
    for entry in std::fs::read_dir(reference("archs")).unwrap() {
        let dir = entry.unwrap().path();
        let (name, config) = (dir.display(), ModelConfig::from_dir(&dir).unwrap());
        let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype: FloatDType::F32 };
        let mut seen = Vec::new();
        let random = |seed, seen: &mut Vec<_>| {
            let mut progress = |p: LoadProgress| seen.push((p.loaded_bytes, p.total_bytes));
            Decoder::random(config.clone(), options, seed, &Device::flex(), &mut progress).unwrap()
        };
        let model = random(1, &mut seen);
        assert_eq!(seen.last().map(|(loaded, _)| loaded), seen.last().map(|(_, total)| total), "{name}");
        let specs = config.linear_specs();
        let linears: Vec<_> = model.linears().collect();
        assert_eq!(linears.len(), specs.len(), "{name}");
        for ((path, linear), spec) in linears.into_iter().zip(specs) {
            assert_eq!((&path, linear.base.shape()), (&spec.path, spec.shape), "{name}");
            let dense = matches!(spec.role, LinearRole::Head | LinearRole::Router);
            assert_eq!(matches!(linear.base, FrozenLinear::Dense(_)), dense, "{name}: {path}");
        }
        let logits = |model: &Decoder| model.forward(&[1, 2, 3, 4], 1, Pass::INFERENCE).into_data();
        let first = logits(&model);
        assert!(first.iter::<f32>().all(f32::is_finite), "{name}");
        // The same seed is the same model, another one is not.
        assert_eq!(first, logits(&random(1, &mut Vec::new())), "{name}");
        assert_ne!(first, logits(&random(2, &mut Vec::new())), "{name}");
    }
}
