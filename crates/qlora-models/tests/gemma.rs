//! Configurations of Gemma 3 and 4, as published and as transformers 5 writes them.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use qlora_models::{ModelConfig, ModelError, RopeScaling};
use serde_json::{Value, json};
use std::path::Path;

fn parse(config: &Value) -> Result<ModelConfig, ModelError> {
    ModelConfig::from_json(config, Path::new("config.json"))
}

/// Of the 31 billion parameters, as published and as transformers 5.24 writes the same.
#[test]
fn blocks_without_a_window_have_heads_of_their_own() {
    let mut text = json!({
        "attention_bias": false, "attention_dropout": 0.0, "attention_k_eq_v": true, "dtype": "bfloat16", "enable_moe_block": false,
        "expert_intermediate_size": null, "final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 5376, "hidden_size_per_layer_input": 0, "intermediate_size": 21504,
        "max_position_embeddings": 262144, "model_type": "gemma4_text", "num_attention_heads": 32, "num_experts": null,
        "num_global_key_value_heads": 4, "num_hidden_layers": 60, "num_key_value_heads": 16, "num_kv_shared_layers": 0,
        "rms_norm_eps": 1e-6, "sliding_window": 1024, "tie_word_embeddings": true, "top_k_experts": null,
        "use_bidirectional_attention": "vision", "use_double_wide_mlp": false, "vocab_size": 262144, "vocab_size_per_layer_input": 262144,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
    });
    let of = |text: &Value| {
        parse(
            &json!({"model_type": "gemma4", "text_config": text, "vision_config": {"head_dim": 72}, "vision_soft_tokens_per_image": 280}),
        )
    };
    let published = of(&text).unwrap();
    let [global, local] = &published.attention_kinds[..] else { panic!("{:?}", published.attention_kinds) };
    assert_eq!((global.head_dim, global.num_key_value_heads, global.keys_are_values), (512, 4, true));
    assert_eq!((local.head_dim, local.num_key_value_heads, local.keys_are_values), (256, 16, false));
    assert_eq!((global.rope.dim, global.rope.turned, local.rope.dim), (128, 512, 256));
    assert_eq!((global.window, local.window, published.score_scale), (None, Some(1024), 1.0));
    // A pair that is rotated turns as fast as in a head that is rotated as a whole.
    assert_eq!(global.rope.frequencies(1)[1], 1.0 / 1e6f32.powf(2.0 / 512.0));
    let windows = |index: usize| published.attention(index).window.is_some();
    assert_eq!([4, 5, 6, 58, 59].map(windows), [true, false, true, true, false]);
    assert_eq!(published.qkv_widths(5), [16_384, 2048, 2048]);
    let of_block = |index: usize| -> Vec<(String, [usize; 2])> {
        let inside = format!("model.language_model.layers.{index}.self_attn.");
        published
            .linears()
            .into_iter()
            .filter_map(|(path, shape)| Some((path.strip_prefix(&inside)?.into(), shape)))
            .collect()
    };
    let expected = [("q_proj", [16_384, 5376]), ("k_proj", [2048, 5376]), ("o_proj", [5376, 16_384])];
    assert_eq!(of_block(5), expected.map(|(name, shape)| (name.to_string(), shape)));

    let sizes = text.as_object_mut().unwrap();
    for key in ["global_head_dim", "num_global_key_value_heads"] {
        sizes.remove(key);
    }
    let of_layers = (0..10).map(|i| ((6 * i + 5).to_string(), json!({"head_dim": 512, "num_key_value_heads": 4})));
    sizes.insert("per_layer_config".into(), Value::Object(of_layers.collect()));
    assert_eq!(of(&text).unwrap().attention_kinds, published.attention_kinds);
    // The keys' defaults: positions, and heads of 512, as many as in the other blocks.
    let sizes = text.as_object_mut().unwrap();
    for key in ["per_layer_config", "rope_parameters"] {
        sizes.remove(key);
    }
    let absent = of(&text).unwrap();
    assert_eq!((absent.attention_kinds[0].head_dim, absent.attention_kinds[0].num_key_value_heads), (512, 16));
    assert_eq!(absent.attention_kinds.iter().map(|kind| &kind.rope).collect::<Vec<_>>(), [&global.rope, &local.rope]);
    for (key, value, part) in [
        ("per_layer_config", json!({"5": {"head_dim": 128}}), "per_layer_config.11"),
        ("per_layer_config", json!({"5": {"hidden_size": 128}}), "per_layer_config.5.hidden_size"),
        ("num_global_key_value_heads", json!(5), "num_global_key_value_heads"),
        ("use_bidirectional_attention", json!("all"), "use_bidirectional_attention"),
    ] {
        let mut other = text.clone();
        other[key] = value;
        let message = of(&other).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
}

/// Of the sizes of Gemma 4 E2B: every fifth block sees all tokens, and the last twenty have no keys of their own.
#[test]
fn blocks_without_keys_take_those_of_the_last_of_their_kind() {
    let mut config = json!({
        "model_type": "gemma4_text", "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 35, "num_attention_heads": 8,
        "num_key_value_heads": 1, "head_dim": 256, "global_head_dim": 512, "num_kv_shared_layers": 20, "use_double_wide_mlp": true,
        "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 262144, "vocab_size": 262144, "sliding_window": 512,
        "layer_types": (1..=35).map(|n| if n % 5 == 0 { "full_attention" } else { "sliding_attention" }).collect::<Vec<_>>(),
    });
    let model = parse(&config).unwrap();
    assert_eq!(model.with_keys().collect::<Vec<_>>(), (0..15).collect::<Vec<_>>());
    assert_eq!([14, 15].map(|index| model.mlp_width(index)), [6144, 12_288]);
    let paths: Vec<String> = model.linears().into_iter().map(|(path, _)| path).collect();
    assert_eq!(paths[0], "model.per_layer_model_projection");
    let of_block = |index: usize| paths.iter().filter(|path| path.contains(&format!(".layers.{index}."))).count();
    // Four of attention or two, three of the MLP, two of the block's own input.
    assert_eq!([14, 15].map(of_block), [9, 7]);
    // Keys and values of one block of each kind, and 35 inputs.
    assert_eq!(model.passed_features(), 35 * 256 + 2 * 256 + 2 * 512);
    assert_eq!(model.table_values(), 262_144 * (1536 + 35 * 256));
    // Without inputs of the blocks' own, and with nobody to take keys from.
    config["hidden_size_per_layer_input"] = json!(0);
    assert!(parse(&config).unwrap().layer_inputs.is_none());
    config["num_kv_shared_layers"] = json!(32);
    let message = parse(&config).unwrap_err().to_string();
    assert!(message.contains("num_kv_shared_layers"), "{message}");
}

/// As in gemma-3-4b: what equals the defaults is left out.
#[test]
fn a_section_leaves_out_what_its_family_has_by_itself() {
    let images = json!({
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eos_token_id": [1, 106], "mm_tokens_per_image": 256, "torch_dtype": "bfloat16", "vision_config": {"hidden_size": 1152},
        "text_config": {
            "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
    });
    let images = parse(&images).unwrap();
    assert_eq!((images.vocab_size, images.num_attention_heads, images.num_key_value_heads), (262_208, 8, 4));
    let [global, local] = &images.attention_kinds[..] else { panic!("{:?}", images.attention_kinds) };
    assert_eq!((global.rope.theta, &global.rope.scaling), (1e6, &RopeScaling::Linear { factor: 8.0 }));
    assert_eq!((local.rope.theta, local.window), (1e4, Some(1024)));
    assert_eq!(images.linears()[0].0, "model.language_model.layers.0.self_attn.q_proj");
}
