//! Every family of the table: configurations as transformers 4 and 5 write them, what is refused, and small
//! models of each. `conformance` compares their logits with recorded ones.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use adapter_io::{Checkpoint, Dtype, ShardedWriter, TensorSpec};
use burn::tensor::{Device, FloatDType, Tensor};
use nf4_quant::QuantConfig;
use proptest::prelude::*;
use qlora_layers::{FrozenLinear, LoraConfig, Pass, TargetModules};
use qlora_models::{ConfigOptions, Decoder, LinearRole, LoadOptions, ModelConfig, ModelError, RopeScaling};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use test_support::devices;

fn archs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference/archs")
}

fn names() -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(archs()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn load(dir: &Path, quantization: Option<QuantConfig>) -> Result<Decoder, ModelError> {
    Decoder::load(dir, LoadOptions { quantization, dtype: FloatDType::F32 }, &Device::flex(), &mut |_| {})
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn json_of(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(archs().join(name).join("config.json")).unwrap()).unwrap()
}

fn parse(config: &Value) -> Result<ModelConfig, ModelError> {
    ModelConfig::from_json(config, Path::new("config.json"))
}

/// The message for the configuration of `name` with an edit.
fn refusal(name: &str, edit: impl FnOnce(&mut Value)) -> String {
    let mut config = json_of(name);
    edit(&mut config);
    parse(&config).unwrap_err().to_string()
}

#[test]
fn what_a_configuration_describes_is_what_is_loaded() {
    for name in names() {
        let model = load(&archs().join(&name), Some(QuantConfig::default())).unwrap();
        let config = model.config();
        let found: Vec<_> = model.linears().map(|(path, linear)| (path, linear.base.shape())).collect();
        assert_eq!(found, config.linears(), "{name}");
        let found: Vec<_> = model.norms().map(|(path, norm)| (path, norm.weight.dims()[0])).collect();
        assert_eq!(found, config.norms(), "{name}");
        for (spec, (_, linear)) in config.linear_specs().iter().zip(model.linears()) {
            let quantized = matches!(linear.base, FrozenLinear::Quantized(_));
            let expected = matches!(spec.role, LinearRole::Projection | LinearRole::Expert);
            assert_eq!((quantized, linear.bias.is_some()), (expected, spec.bias), "{name} {}", spec.path);
        }
    }
}

#[test]
fn layers_that_are_named_stay_dense() {
    let dir = archs().join("qwen3_5");
    let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype: FloatDType::F32 };
    let loaded = |config| Decoder::load_as(config, &dir, options, None, &Device::flex(), &mut |_| {}).unwrap();
    let read = || ModelConfig::from_dir(&dir).unwrap();
    let dense = |model: &Decoder| -> Vec<String> {
        let dense = model.linears().filter(|(_, linear)| matches!(linear.base, FrozenLinear::Dense(_)));
        dense.map(|(path, _)| path).filter(|path| path != "lm_head").collect()
    };
    let of_blocks = |names: &[&str], blocks: &[usize]| -> Vec<String> {
        let of_block = |block| names.iter().map(move |name| format!("model.layers.{block}.{name}"));
        blocks.iter().flat_map(of_block).collect()
    };
    assert!(dense(&loaded(read())).is_empty());
    let mut config = read();
    config.keep_sensitive_dense();
    let names = ["linear_attn.in_proj_b", "linear_attn.in_proj_a"];
    assert_eq!(dense(&loaded(config)), of_blocks(&names, &[0, 1, 2]));
    let mut config = read();
    config.keep_dense(&["down_proj".into(), "layers.3.self_attn.k_proj".into()]).unwrap();
    let mut expected = of_blocks(&["mlp.down_proj"], &[0, 1, 2]);
    expected.extend(of_blocks(&["self_attn.k_proj", "mlp.down_proj"], &[3]));
    let mut model = loaded(config);
    assert_eq!(dense(&model), expected);
    // They are adapted as all others: three blocks of eight, and one of seven.
    assert_eq!(model.attach_lora(&LoraConfig { rank: 2, ..Default::default() }, 0).unwrap(), 3 * 8 + 7);
    let message = read().keep_dense(&["down".into()]).unwrap_err().to_string();
    assert!(message.contains("quantization.skip_modules: `down`"), "{message}");
}

#[test]
fn every_parameter_of_the_language_model_is_counted_once() {
    for name in names() {
        let checkpoint = Checkpoint::open(&archs().join(&name)).unwrap();
        // `model.visual` and `model.vision` both.
        let others = ["vision_tower", "multi_modal", "model.vis", "visual", "model.embed_vision", "model.embed_audio"];
        let of_language = |tensor: &&str| !others.iter().any(|other| tensor.starts_with(other));
        let stored: usize = checkpoint
            .names()
            .filter(of_language)
            .map(|tensor| checkpoint.tensor(tensor).unwrap().num_elements())
            .sum();
        let dense = load(&archs().join(&name), None).unwrap();
        assert_eq!(dense.num_params(), stored, "{name}");
        // Norms are f32 whatever the dtype; here everything is.
        assert_eq!(dense.device_bytes(), 4 * stored, "{name}");
    }
}

#[test]
fn half_precision_gives_nearly_the_same() {
    let ids: Vec<u32> = (5..25).collect();
    // A software device takes minutes for so many models.
    for (device_name, device) in devices().into_iter().filter(|(name, _)| *name != "wgpu") {
        for name in names() {
            let forward = |dtype| {
                let options = LoadOptions { quantization: None, dtype };
                let model = Decoder::load(&archs().join(&name), options, &device, &mut |_| {}).unwrap();
                values(model.forward(&ids, 1, Pass::INFERENCE))
            };
            let (full, half) = (forward(FloatDType::F32), forward(FloatDType::BF16));
            let largest = full.iter().fold(0f32, |m, x| m.max(x.abs()));
            let mean = full.iter().zip(&half).map(|(a, b)| (a - b).abs()).sum::<f32>() / full.len() as f32;
            // A few dozen roundings of 2^-9. The mean, since a token may go to another expert.
            assert!(mean < 0.01 * largest, "{name} on {device_name}: {mean} of {largest}");
        }
    }
}

#[test]
fn all_linear_adapts_experts_and_leaves_routers_to_those_who_name_them() {
    let mut model = load(&archs().join("mixtral"), Some(QuantConfig::default())).unwrap();
    assert_eq!(model.attach_lora(&LoraConfig { rank: 2, ..Default::default() }, 0).unwrap(), 2 * (4 + 3 * 4));
    let paths: Vec<String> = model.adapters().map(|(path, _)| path).collect();
    assert!(paths.contains(&"model.layers.1.block_sparse_moe.experts.3.w2".into()), "{paths:?}");
    let config =
        LoraConfig { rank: 2, target_modules: TargetModules::Names(vec!["gate".into()]), ..Default::default() };
    assert_eq!(model.attach_lora(&config, 0).unwrap(), 2);
    let mut fused = load(&archs().join("phi3"), None).unwrap();
    assert_eq!(fused.attach_lora(&LoraConfig { rank: 2, ..Default::default() }, 0).unwrap(), 2 * 4);
    assert_eq!(fused.adapters().next().unwrap().0, "model.layers.0.self_attn.qkv_proj");
}

/// What transformers 4 wrote, and what the keys are today.
#[test]
fn earlier_configurations_mean_the_same() {
    type Edit = fn(&mut serde_json::Map<String, Value>);
    let cases: [(&str, Edit); 6] = [
        ("mistral", |c| {
            c.insert("rope_theta".into(), json!(10000.0));
            c.insert("torch_dtype".into(), json!("bfloat16"));
            c.insert("_name_or_path".into(), json!("somewhere"));
        }),
        ("llama_linear", |c| {
            c.insert("rope_theta".into(), json!(10000.0));
            c.insert("rope_scaling".into(), json!({"type": "linear", "factor": 4.0}));
        }),
        ("gemma3", |c| {
            c.insert("rope_theta".into(), json!(1000000));
            c.insert("rope_local_base_freq".into(), json!(10000));
            c.insert("rope_scaling".into(), json!({"rope_type": "linear", "factor": 8.0}));
            c.insert("cache_implementation".into(), json!("hybrid"));
        }),
        ("phi3", |c| {
            c.insert("rope_theta".into(), json!(10000.0));
            c.insert("partial_rotary_factor".into(), json!(0.5));
            c.insert(
                "rope_scaling".into(),
                json!({"type": "su", "short_factor": [1.0, 1.1], "long_factor": [2.0, 2.3]}),
            );
            c.insert("auto_map".into(), json!({"AutoConfig": "configuration_phi3.Phi3Config"}));
        }),
        ("qwen3_moe", |c| {
            c.insert("rope_theta".into(), json!(10000.0));
            let count = c.remove("num_local_experts").unwrap();
            c.insert("num_experts".into(), count);
            c.insert("max_window_layers".into(), json!(2));
        }),
        ("lfm2", |c| {
            c.insert("rope_theta".into(), json!(1000000.0));
            c.remove("layer_types");
            c.insert("full_attn_idxs".into(), json!([1]));
            c.insert("block_ff_dim".into(), json!(28));
            c.insert("intermediate_size".into(), json!(12288));
            c.insert("tie_embedding".into(), json!(true));
            c.insert("tie_word_embeddings".into(), json!(false));
            c.insert("block_norm_eps".into(), json!(1e-5));
            c.insert("use_pos_enc".into(), json!(true));
        }),
    ];
    for (name, edit) in cases {
        let new = parse(&json_of(name)).unwrap();
        let mut config = json_of(name);
        let map = config.as_object_mut().unwrap();
        map.remove("rope_parameters");
        edit(map);
        let old = parse(&config).unwrap();
        assert_eq!(old.attention_kinds, new.attention_kinds, "{name}");
        assert_eq!(old.experts, new.experts, "{name}");
        assert_eq!(old.linear_specs(), new.linear_specs(), "{name}");
        assert_eq!(old.norms(), new.norms(), "{name}");
        assert_eq!(old.tie_word_embeddings, new.tie_word_embeddings, "{name}");
    }
}

#[test]
fn keys_of_published_files_are_known() {
    let extras = [
        (
            "llama_linear",
            json!({"is_llama_config": true, "rope_interleaved": false, "transformers.js_config": {"dtype": "q4"}}),
        ),
        (
            "llama3",
            json!({"_name_or_path": "x", "max_sequence_length": 2048, "unsloth_fixed": true, "pretraining_tp": 1}),
        ),
        (
            "qwen2",
            json!({"use_mrope": false, "tokenizer_class": "Qwen2Tokenizer", "_attn_implementation_autoset": true}),
        ),
        ("qwen3_moe", json!({"qkv_bias": false, "use_qk_norm": true, "shared_expert_intermediate_size": 0})),
        (
            "gemma2",
            json!({"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "sliding_window_size": 4096}),
        ),
        (
            "phi3",
            json!({"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": false, "mlp_bias": false, "auto_map": {}}),
        ),
        ("qwen3_5", json!({"output_gate_type": "swish", "partial_rotary_factor": 0.25})),
        ("qwen3_5_moe", json!({"output_gate_type": "swish", "partial_rotary_factor": 0.25})),
        ("qwen3_next", json!({"output_gate_type": "swish"})),
        ("mixtral", json!({"output_router_logits": true, "router_aux_loss_coef": 0.02, "id2label": {"0": "LABEL_0"}})),
    ];
    // As in DeepSeek V3 and GLM 4.5.
    let routers = json!({"ep_size": 1, "moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": true, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "num_nextn_predict_layers": 1, "pretraining_tp": 1});
    for name in ["deepseek_v3", "glm4_moe_lite", "glm4_moe"] {
        let mut config = json_of(name);
        config.as_object_mut().unwrap().extend(routers.as_object().unwrap().clone());
        parse(&config).unwrap();
    }
    // As in Devstral 2: a 0 is an absent factor, and no growth.
    let mut config = json_of("ministral3");
    config["rope_parameters"]["mscale_all_dim"] = json!(0.0);
    config["rope_parameters"]["llama_4_scaling_beta"] = json!(0.0);
    config["rope_parameters"]["type"] = json!("yarn");
    let rope = &parse(&config).unwrap().attention_kinds[0].rope;
    let RopeScaling::Yarn { attention_factor, .. } = rope.scaling else { panic!("{rope:?}") };
    assert!((attention_factor - (0.1 * 4f64.ln() + 1.0)).abs() < 1e-12 && rope.query_growth.is_none(), "{rope:?}");
    for (name, keys) in extras {
        let mut config = json_of(name);
        config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
        if let Err(error) = parse(&config) {
            panic!("{name}: {error}");
        }
    }
}

#[test]
fn absent_keys_have_their_familys_value_and_null_may_be_another() {
    let windows = |name: &str, edit: fn(&mut serde_json::Map<String, Value>)| {
        let mut config = json_of(name);
        edit(config.as_object_mut().unwrap());
        parse(&config).unwrap().attention_kinds.iter().map(|kind| kind.window).collect::<Vec<_>>()
    };
    assert_eq!(windows("mistral", |_| ()), [Some(7)]);
    let absent = |c: &mut serde_json::Map<String, Value>| drop(c.remove("sliding_window"));
    assert_eq!(windows("mistral", absent), [Some(4096)]);
    assert_eq!(windows("mistral", |c| c["sliding_window"] = Value::Null), [None]);
    assert_eq!(windows("mixtral", absent), [None]);
    assert_eq!(windows("qwen2", |c| drop(c.remove("layer_types"))), [None, Some(6)]);
    let off = |c: &mut serde_json::Map<String, Value>| {
        c.remove("layer_types");
        c["use_sliding_window"] = json!(false);
    };
    assert_eq!(windows("qwen2", off), [None]);
    assert_eq!(windows("gemma2", absent), [None, Some(4096)]);

    let mut gemma = json_of("gemma2");
    let map = gemma.as_object_mut().unwrap();
    for key in ["attn_logit_softcapping", "query_pre_attn_scalar", "tie_word_embeddings", "layer_types"] {
        map.remove(key);
    }
    map["final_logit_softcapping"] = Value::Null;
    let gemma = parse(&gemma).unwrap();
    assert_eq!((gemma.score_softcap, gemma.logit_softcap), (Some(50.0), None));
    assert_eq!((gemma.score_scale, gemma.tie_word_embeddings), (1.0 / 16.0, true));
}

#[test]
fn what_is_not_covered_is_refused_by_name() {
    let has = |message: String, parts: &[&str]| {
        for part in parts {
            assert!(message.contains(part), "`{part}` is not in: {message}");
        }
    };
    has(
        refusal("llama3", |c| c["model_type"] = json!("llama4")),
        &["config.json", "model_type", "llama4", "qwen3_moe"],
    );
    has(refusal("mistral", |c| c["attention_bias"] = json!(true)), &["attention_bias", "true", "false"]);
    has(refusal("llama3", |c| c["sliding_window"] = json!(8)), &["sliding_window", "8"]);
    has(refusal("llama3", |c| c["partial_rotary_factor"] = json!(0.5)), &["partial_rotary_factor", "0.5"]);
    has(refusal("gemma3", |c| c["attn_logit_softcapping"] = json!(50.0)), &["attn_logit_softcapping", "50"]);
    has(refusal("gemma2", |c| c["use_bidirectional_attention"] = json!(true)), &["use_bidirectional_attention"]);
    has(refusal("gemma2", |c| c["layer_types"][0] = json!("chunked_attention")), &["layer_types", "chunked_attention"]);
    has(refusal("gemma2", |c| c["layer_types"] = json!(["full_attention"])), &["layer_types", "1", "2 layers"]);
    has(refusal("gemma2", |c| c["sliding_window"] = Value::Null), &["sliding_window"]);
    has(refusal("qwen2", |c| c["use_sliding_window"] = json!(false)), &["sliding_window"]);
    has(refusal("mixtral", |c| c["num_local_experts"] = json!(1u32 << 31)), &["num_local_experts", "50000"]);
    has(refusal("mixtral", |c| c["num_local_experts"] = json!(60_000)), &["num_local_experts", "60000"]);
    has(refusal("mistral", |c| c["num_hidden_layers"] = json!(1u32 << 31)), &["num_hidden_layers", "10000"]);
    has(refusal("mixtral", |c| c["num_experts_per_tok"] = json!(5)), &["num_experts_per_tok", "5", "4 experts"]);
    has(refusal("mixtral", |c| c["router_jitter_noise"] = json!(0.1)), &["router_jitter_noise", "0.1"]);
    has(
        refusal("qwen3_moe", |c| c["shared_expert_intermediate_size"] = json!(32)),
        &["shared_expert_intermediate_size"],
    );
    has(
        refusal("gemma3_images", |c| c["text_config"]["model_type"] = json!("gemma3n_text")),
        &["text_config.model_type"],
    );
    has(
        refusal("gemma3_images", |c| c["model_type"] = json!("paligemma")),
        &["model_type", "paligemma", "behind them"],
    );
    has(
        refusal("gemma3_images", |c| c["text_config"]["final_logit_softcapping"] = json!(30.0)),
        &["final_logit_softcapping"],
    );
    has(refusal("smollm3", |c| c["no_rope_layers"] = json!([1, 0])), &["no_rope_layers", "2 entries", "3 layers"]);
    has(refusal("smollm3", |c| c["no_rope_layers"] = json!([1, 0, 2])), &["no_rope_layers", "2"]);
    has(
        refusal("ministral3", |c| drop(c["rope_parameters"].as_object_mut().unwrap().remove("llama_4_scaling_beta"))),
        &["llama_4_scaling_beta"],
    );
    has(refusal("hunyuan", |c| c["norm_type"] = json!("layer")), &["norm_type", "layer", "rms"]);
    has(
        refusal("olmo3_yarn", |c| c["rope_parameters"] = json!({"rope_type": "yarn", "factor": 2.0})),
        &["rope_parameters", "full_attention"],
    );
    has(refusal("llama3", |c| c["mup_multiplier"] = json!(2)), &["mup_multiplier", "--accept-key mup_multiplier"]);
    has(
        refusal("gemma3_images", |c| c["text_config"]["altup_num_inputs"] = json!(4)),
        &["text_config.altup_num_inputs"],
    );
    has(
        refusal("phi3", |c| c["rope_parameters"]["short_factor"] = json!([1.0])),
        &["rope_parameters.short_factor", "1", "2"],
    );
    has(refusal("phi3", |c| c["resid_pdrop"] = json!(1.5)), &["resid_pdrop", "1.5"]);
    has(refusal("gemma3", |c| c["rope_parameters"]["chunked"] = json!({})), &["rope_parameters.chunked"]);
}

#[test]
fn what_computes_nothing_passes_with_a_note() {
    let mut config = json_of("seed_oss");
    let keys = json!({"attention_dropout": 0.1, "residual_dropout": 0.1, "unk_token_id": 3, "_model_name_or_path": "x", "pretraining_tp": 1});
    config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    let notes = parse(&config).unwrap().notes;
    for parts in [
        ["`_model_name_or_path`", "passed over"],
        ["`attention_dropout`", "0.1"],
        ["`residual_dropout`", "0.1"],
        ["`unk_token_id`", "3"],
    ] {
        let told = |note: &&String| note.contains("config.json") && parts.iter().all(|part| note.contains(part));
        assert_eq!(notes.iter().filter(told).count(), 1, "{parts:?} in {notes:?}");
    }
    assert_eq!(notes.len(), 4, "{notes:?}");

    // Accepted by name, and only then.
    config["rope_parameters"]["swing_factor"] = json!(2);
    config["residual_gain"] = json!(2);
    let accepting = |keys: &[&str]| {
        ModelConfig::from_json_with(&config, Path::new("config.json"), &ConfigOptions::accepting(keys.iter().copied()))
    };
    let refused = |accepted: &[&str], key: &str| {
        accepting(accepted).unwrap_err().to_string().contains(&format!("--accept-key {key}"))
    };
    let [swing, gain] = ["rope_parameters.swing_factor", "residual_gain"];
    assert!(refused(&[], swing));
    assert!(refused(&[swing], gain));
    assert!(refused(&[gain, "swing_factor"], swing));
    assert_eq!(accepting(&[swing, gain]).unwrap().notes.len(), 6);
    assert!(parse(&config).is_err(), "what was accepted once is accepted from then on");
}

#[test]
fn the_text_model_of_any_wrapper_is_its_familys() {
    let text = json_of("qwen3");
    let whole = parse(&text).unwrap();
    for (wrapper, path) in [
        ("lighton_ocr", "model.language_model"),
        ("smolvlm", "model.text_model"),
        ("never_heard_of", "model.language_model"),
    ] {
        let config = json!({"model_type": wrapper, "text_config": text, "vision_config": {"attention_type": "x"}, "image_size": 3});
        let config = parse(&config).unwrap();
        assert_eq!(config.attention_kinds, whole.attention_kinds);
        assert_eq!(config.linears()[0].0, format!("{path}.layers.0.self_attn.q_proj"));
    }
    // As in llava-1.5-7b-hf: what equals the defaults is left out, and so may be the type.
    let config =
        parse(&json!({"model_type": "llava", "text_config": {"max_position_embeddings": 4096, "vocab_size": 32064}}))
            .unwrap();
    assert_eq!((config.hidden_size, config.num_hidden_layers, config.num_key_value_heads), (4096, 32, 32));
    // As Qwen2.5-VL's: no section, the keys of the language model beside the others.
    let mut flat = json_of("qwen2");
    for (key, value) in
        [("use_sliding_window", json!(false)), ("vision_config", json!({"depth": 32})), ("vision_token_id", json!(5))]
    {
        flat[key] = value;
    }
    flat["rope_scaling"] = json!({"type": "mrope", "mrope_section": [2, 1, 1]});
    flat["rope_theta"] = json!(1e6);
    flat.as_object_mut().unwrap().remove("rope_parameters");
    flat.as_object_mut().unwrap().remove("layer_types");
    for (kind, path) in [("qwen2_5_vl", "model.language_model"), ("qwen2_vl", "model.language_model")] {
        flat["model_type"] = json!(kind);
        let config = parse(&flat).unwrap();
        assert_eq!(config.attention_kinds[0].rope.theta, 1e6);
        assert_eq!(config.attention_kinds[0].rope.scaling, RopeScaling::Default);
        assert_eq!(config.linears()[0].0, format!("{path}.layers.0.self_attn.q_proj"));
    }
    flat["model_type"] = json!("qwen2");
    let message = parse(&flat).unwrap_err().to_string();
    assert!(message.contains("rope_type") && message.contains("mrope"), "{message}");
    let nobody = parse(&json!({"model_type": "never_heard_of", "text_config": {}})).unwrap_err().to_string();
    assert!(nobody.contains("text_config.model_type"), "{nobody}");
    let whole = parse(&json!({"model_type": "llama"})).unwrap_err().to_string();
    assert!(whole.contains("hidden_size"), "{whole}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_value_of_any_key_is_read_or_refused(
        name in prop::sample::select(names()),
        key in any::<prop::sample::Index>(),
        value in prop::sample::select(vec![
            json!(null), json!(0), json!(1), json!(3), json!(-1), json!(0.5), json!(1e30), json!(u64::MAX), json!(9999),
            json!(true), json!(false), json!(""), json!("silu"), json!([]), json!([0]), json!(["full_attention"]), json!({}),
            json!({"rope_type": "yarn", "factor": 1e-9}), json!({"type": "longrope"}), json!({"full_attention": {}}),
        ]),
        inside in any::<bool>(),
    ) {
        let mut config = json_of(&name);
        let section = if config.get("text_config").is_some() { "text_config" } else { "rope_parameters" };
        let map = match inside {
            true => config[section].as_object_mut().unwrap(),
            false => config.as_object_mut().unwrap(),
        };
        let keys: Vec<String> = map.keys().cloned().collect();
        map.insert(key.get(&keys).clone(), value);
        match parse(&config) {
            // Whatever is accepted can be laid out and rotated.
            Ok(config) => {
                prop_assert!(config.linear_specs().len() > config.num_hidden_layers);
                for kind in &config.attention_kinds {
                    prop_assert_eq!(kind.rope.frequencies(100).len(), kind.rope.dim / 2);
                }
            }
            Err(error) => prop_assert!(error.to_string().contains("config.json")),
        }
    }
}

#[test]
fn a_tensor_without_a_place_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = archs().join("llama3");
    std::fs::copy(source.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let mut config = json_of("llama3");
    config["attention_bias"] = json!(false);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let message = load(dir.path(), None).unwrap_err().to_string();
    assert!(message.contains("model.layers.0.self_attn.k_proj.bias") && message.contains("llama"), "{message}");
}

/// A copy of a model with other tensors and keys.
fn edited(
    name: &str,
    edit: impl FnOnce(&mut BTreeMap<String, (Vec<usize>, Vec<u8>)>, &mut Value),
) -> tempfile::TempDir {
    let (dir, checkpoint, mut config) =
        (tempfile::tempdir().unwrap(), Checkpoint::open(&archs().join(name)).unwrap(), json_of(name));
    let owned = |name: &str| {
        let view = checkpoint.tensor(name).unwrap();
        (name.to_string(), (view.shape.clone(), view.data.to_vec()))
    };
    let mut tensors = checkpoint.names().map(owned).collect();
    edit(&mut tensors, &mut config);
    let specs = tensors.iter().map(|(name, (shape, _))| TensorSpec::new(name, Dtype::BF16, shape)).collect();
    let mut writer = ShardedWriter::create(dir.path(), specs, 1 << 30).unwrap();
    tensors.iter().for_each(|(name, (_, data))| writer.write(name, data).unwrap());
    writer.finish().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

#[test]
fn a_head_that_is_not_the_embedding_table_is_a_head_whatever_the_file_says() {
    let logits = |dir: &Path| values(load(dir, None).unwrap().forward(&[3, 4, 5], 1, Pass::INFERENCE));
    let tied = edited("qwen3", |_, _| ());
    let with_head = |flip: u8, tie: bool| {
        edited("qwen3", |tensors, config| {
            let mut head = tensors["model.embed_tokens.weight"].clone();
            head.1.iter_mut().skip(1).step_by(2).for_each(|byte| *byte ^= flip);
            tensors.insert("lm_head.weight".into(), head);
            config["tie_word_embeddings"] = json!(tie);
        })
    };
    // The table once more is the table; the negative of it is a head.
    let (same, other) = (with_head(0, true), with_head(0x80, true));
    assert_eq!(logits(same.path()), logits(tied.path()));
    assert!(ModelConfig::from_dir(same.path()).unwrap().notes.is_empty());
    let config = ModelConfig::from_dir(other.path()).unwrap();
    assert!(!config.tie_word_embeddings && config.notes[0].contains("lm_head.weight"), "{:?}", config.notes);
    assert_eq!(logits(other.path()), logits(with_head(0x80, false).path()));
    assert_eq!(logits(other.path()), logits(tied.path()).iter().map(|x| -x).collect::<Vec<_>>());
}

#[test]
fn what_is_left_aside_is_told() {
    let model = load(&archs().join("mistral3_images"), Some(QuantConfig::default())).unwrap();
    let [note] = &model.config().notes[..] else { panic!("{:?}", model.config().notes) };
    for part in ["left aside", "vision_tower (", "multi_modal_projector (", "tensors"] {
        assert!(note.contains(part), "{note}");
    }
    // A block behind the last one, that predicts the token after the next.
    let further = |key: bool| {
        edited("llama3", |tensors, config| {
            let norm = tensors["model.layers.0.input_layernorm.weight"].clone();
            tensors.insert("model.layers.2.enorm.weight".into(), norm);
            if key {
                config["num_nextn_predict_layers"] = json!(1);
            }
        })
    };
    let model = load(further(true).path(), None).unwrap();
    assert!(model.config().notes[0].contains("model.layers.2 (1 tensors"), "{:?}", model.config().notes);
    assert!(load(further(false).path(), None).unwrap_err().to_string().contains("model.layers.2.enorm.weight"));
}

#[test]
fn what_weights_are_held_in_is_read_from_them() {
    let model = load(&archs().join("qwen3_moe"), Some(QuantConfig::default())).unwrap();
    let held = model.held_weights();
    assert_eq!(held.format(), "NF4, blocksize 64 with double quantization");
    assert_eq!(held.four_bit + held.sixteen_bit + held.f32, model.device_bytes());
    assert!(held.left_dense.is_none() && held.four_bit > 0 && held.sixteen_bit == 0, "{held}");
    let dense = load(&archs().join("qwen3_moe"), None).unwrap().held_weights();
    assert_eq!((dense.format().as_str(), dense.four_bit, dense.left_dense), ("unquantized", 0, None));
}
