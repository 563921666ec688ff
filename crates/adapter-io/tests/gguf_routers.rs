//! GGUF of models whose routers score by sigmoids, and what of their relatives is refused.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use adapter_io::Checkpoint;
use adapter_io::gguf::{GgmlType, GgufFile, GgufOptions, Value, export_gguf};
use serde_json::json;

fn reference(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/reference")).join(path)
}

/// Keys and names of llama.cpp's converter for GLM 4.5, whose first layer has no experts.
#[test]
fn routers_of_sigmoids_and_experts_of_all_tokens_are_written() {
    let (dir, base) = (tempfile::tempdir().unwrap(), reference("archs/glm4_moe"));
    let export = |base: &Path| {
        let options = GgufOptions { kind: GgmlType::F32, without_tokenizer: true, ..GgufOptions::default() };
        let out = dir.path().join("m.gguf");
        export_gguf(base, &out, &options, &mut |_| {}).map_err(|e| e.to_string())?;
        Ok::<_, String>(GgufFile::open(&out).unwrap())
    };
    let file = export(&base).unwrap();
    for (key, value) in [
        ("expert_count", Value::U32(6)),
        ("expert_used_count", Value::U32(2)),
        ("expert_feed_forward_length", Value::U32(12)),
        ("expert_shared_count", Value::U32(1)),
        ("leading_dense_block_count", Value::U32(1)),
        ("expert_gating_func", Value::U32(2)),
        ("expert_weights_scale", Value::F32(1.5)),
        ("expert_weights_norm", Value::Bool(true)),
        ("rope.dimension_count", Value::U32(4)),
        ("attention.key_length", Value::U32(8)),
    ] {
        assert_eq!(file.value(&format!("glm4moe.{key}")), Some(&value), "{key}");
    }
    let checkpoint = Checkpoint::open(&base).unwrap();
    for (ours, theirs) in [
        ("blk.1.exp_probs_b.bias", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("blk.1.ffn_gate_inp.weight", "model.layers.1.mlp.gate.weight"),
        ("blk.1.ffn_up_shexp.weight", "model.layers.1.mlp.shared_experts.up_proj.weight"),
        ("blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"),
        ("blk.1.post_attention_norm.weight", "model.layers.1.post_attention_layernorm.weight"),
        ("blk.1.attn_q_norm.weight", "model.layers.1.self_attn.q_norm.weight"),
        ("blk.0.attn_k.bias", "model.layers.0.self_attn.k_proj.bias"),
    ] {
        assert_eq!(file.to_f32_vec(ours).unwrap(), checkpoint.tensor(theirs).unwrap().to_f32_vec().unwrap(), "{ours}");
    }
    assert_eq!(file.tensor("blk.1.ffn_down_exps.weight").unwrap().0.shape, [6, 24, 12]);
    let refused = |name: &str, edit: fn(&mut serde_json::Value)| {
        let copy = tempfile::tempdir().unwrap();
        fs::copy(reference(name).join("model.safetensors"), copy.path().join("model.safetensors")).unwrap();
        let mut config = serde_json::from_slice(&fs::read(reference(name).join("config.json")).unwrap()).unwrap();
        edit(&mut config);
        fs::write(copy.path().join("config.json"), config.to_string()).unwrap();
        export(copy.path()).map(|_| ()).unwrap_err()
    };
    let message = refused("archs/glm4_moe", |c| c["first_k_dense_replace"] = json!(0));
    assert!(message.contains("first_k_dense_replace") && message.contains("first 1 layers"), "{message}");
    let message = refused("archs/glm4_moe", |c| c["n_shared_experts"] = json!(2));
    assert!(message.contains("n_shared_experts"), "{message}");
    assert!(refused("archs/glm4_moe_groups", |_| ()).contains("n_group"));
    assert!(refused("archs/deepseek_v3_whole", |_| ()).contains("kv_b_proj"));
}
