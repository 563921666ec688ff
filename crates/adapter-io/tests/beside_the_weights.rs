//! What a conversion keeps beside the weights, and what it leaves in full precision.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use common::{adapter_on, tensor};

use adapter_io::{
    Adapter, BnbOptions, Checkpoint, Dtype, FormatError, GptqOptions, MergeBase, MergeOptions, MergeReport, TensorSpec,
    gptq_checkpoint, merge_checkpoint, merge_checkpoint_checked, quantize_checkpoint,
};
use serde_json::{Value, json};

fn q_proj() -> Adapter {
    adapter_on(&[
        ("model.layers.0.self_attn.q_proj.lora_A.weight", tensor(&[2, 16], 0.5)),
        ("model.layers.0.self_attn.q_proj.lora_B.weight", tensor(&[16, 2], 0.5)),
    ])
}

fn merge(base: &Path, adapter: &Adapter, out: &Path, options: &MergeOptions) -> MergeReport {
    merge_checkpoint(base, adapter, out, options, &mut |_| {}).unwrap()
}

fn values(dir: &Path, name: &str) -> Option<Vec<f32>> {
    Checkpoint::open(dir).unwrap().get(name).map(|view| view.to_f32_vec().unwrap())
}

fn config_of(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// A model, and everything that may lie beside one.
fn full_folder(dir: &Path) {
    common::model(dir);
    for name in [
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
        "generation_config.json",
        "configuration_x.py",
        "modeling_x.py",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "tekken.json",
        "LICENSE",
        // Of the base, and not of what is made from it.
        "README.md",
        "quantize_config.json",
        "training_state.json",
        "checksums.json",
        "optimizer.pt",
        "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
        ".gitattributes",
    ] {
        fs::write(dir.join(name), format!("\"{name}\"")).unwrap();
    }
}

const KEPT: [&str; 12] = [
    "LICENSE",
    "config.json",
    "configuration_x.py",
    "generation_config.json",
    "model.safetensors",
    "modeling_x.py",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "video_preprocessor_config.json",
];

#[test]
fn what_a_model_needs_comes_along() {
    let folder = tempfile::tempdir().unwrap();
    let (base, out, other) = (folder.path().join("base"), folder.path().join("out"), folder.path().join("tokenizer"));
    full_folder(&base);
    fs::create_dir(&other).unwrap();
    for name in ["tokenizer.json", "vocab.json", "preprocessor_config.json"] {
        fs::write(other.join(name), "\"other\"").unwrap();
    }
    merge(&base, &q_proj(), &out, &MergeOptions::default());
    let with_tekken = || KEPT.iter().map(ToString::to_string).chain(["tekken.json".into()]);
    let mut wanted: Vec<String> = with_tekken().collect();
    wanted.sort();
    assert_eq!(names(&out), wanted);
    quantize_checkpoint(&base, &out, &BnbOptions::default(), &mut |_| {}).unwrap();
    assert_eq!(names(&out), wanted);
    let options = GptqOptions { group_size: Some(8), ..GptqOptions::default() };
    gptq_checkpoint::<FormatError>(&base, &out, &options, &[], 1 << 30, |_| Ok(()), &mut |_| {}).unwrap();
    let mut of_gptq: Vec<String> = with_tekken().chain(["quantize_config.json".into()]).collect();
    of_gptq.sort();
    assert_eq!(names(&out), of_gptq);
    // A tokenizer from elsewhere takes the place of the whole one of the base.
    merge(&base, &q_proj(), &out, &MergeOptions { tokenizer_from: Some(other), ..MergeOptions::default() });
    assert!(!out.join("tokenizer.model").exists() && !out.join("tekken.json").exists());
    assert_eq!(fs::read_to_string(out.join("vocab.json")).unwrap(), "\"other\"");
    assert_eq!(fs::read_to_string(out.join("tokenizer.json")).unwrap(), "\"other\"");
    let own = fs::read_to_string(out.join("preprocessor_config.json")).unwrap();
    assert_eq!(own, "\"preprocessor_config.json\"");
}

#[test]
fn a_map_to_code_keeps_what_has_its_code() {
    let folder = tempfile::tempdir().unwrap();
    let (base, out) = (folder.path().join("base"), folder.path().join("out"));
    for (map, kept) in [
        (json!({"AutoConfig": "configuration_x.XConfig"}), Some(json!({"AutoConfig": "configuration_x.XConfig"}))),
        (json!({"AutoConfig": "configuration_phi3.Phi3Config"}), None),
        (
            json!({"AutoConfig": "gone.X", "AutoModel": "org/name--modeling_y.Y", "AutoTokenizer": ["modeling_x.S", null]}),
            Some(json!({"AutoModel": "org/name--modeling_y.Y", "AutoTokenizer": ["modeling_x.S", null]})),
        ),
        (json!({"AutoTokenizer": ["modeling_x.S", "../modeling_x.F"]}), None),
    ] {
        full_folder(&base);
        let mut config = config_of(&base);
        config["auto_map"] = map.clone();
        fs::write(base.join("config.json"), config.to_string()).unwrap();
        merge(&base, &q_proj(), &out, &MergeOptions::default());
        assert_eq!(config_of(&out).get("auto_map"), kept.as_ref(), "{map}");
        quantize_checkpoint(&base, &out, &BnbOptions::default(), &mut |_| {}).unwrap();
        assert_eq!(config_of(&out).get("auto_map"), kept.as_ref(), "{map}");
    }
}

/// A file may hold a copy of the embedding as its head, and say that they are one.
#[test]
fn a_head_in_the_file_of_a_tied_model_does_not_hide_what_was_adapted() {
    let head = |x: f32| {
        [("lm_head.lora_A.weight", tensor(&[2, 16], x)), ("lm_head.lora_B.weight", tensor(&[32, 2], 0.5))].to_vec()
    };
    let embedding = [
        ("model.embed_tokens.lora_embedding_A", tensor(&[2, 32], 0.5)),
        ("model.embed_tokens.lora_embedding_B", tensor(&[16, 2], 0.5)),
    ];
    let saved = [("lm_head.weight", tensor(&[32, 16], 3.0))];
    let both = [("lm_head.weight", tensor(&[32, 16], 3.0)), ("model.embed_tokens.weight", tensor(&[32, 16], 3.0))];
    for nested in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let (base, out) = (folder.path().join("base"), folder.path().join("out"));
        common::model(&base);
        common::copy_head(&base);
        let mut config = config_of(&base);
        if nested {
            config.as_object_mut().unwrap().remove("tie_word_embeddings");
            config["text_config"] = json!({"tie_word_embeddings": true});
        } else {
            config["tie_word_embeddings"] = json!(true);
        }
        fs::write(base.join("config.json"), config.to_string()).unwrap();
        let embed = values(&base, "model.embed_tokens.weight").unwrap();
        // Rounded to bf16, as the file is.
        let plus = |x: f32| Some(embed.iter().map(|v| half::bf16::from_f32(v + x).to_f32()).collect::<Vec<_>>());
        for (adapter, new_embed, new_head) in [
            (adapter_on(&head(0.5)), Some(embed.clone()), plus(0.5)),
            (adapter_on(&embedding), plus(0.5), Some(embed.clone())),
            (adapter_on(&saved), Some(embed.clone()), Some(vec![3.0; 512])),
            (adapter_on(&both), Some(vec![3.0; 512]), None),
        ] {
            let report = merge(&base, &adapter, &out, &MergeOptions::default());
            assert_eq!(values(&out, "model.embed_tokens.weight"), new_embed);
            assert_eq!(values(&out, "lm_head.weight"), new_head);
            assert_eq!(report.untied, new_head.is_some());
            let config = config_of(&out);
            assert_eq!(config.get("tie_word_embeddings") == Some(&json!(false)), report.untied);
            if nested {
                assert_eq!(config["text_config"]["tie_word_embeddings"], json!(!report.untied));
            }
        }
        // What is not adapted stays as it is.
        let report = merge(&base, &q_proj(), &out, &MergeOptions::default());
        assert!(!report.untied && values(&out, "lm_head.weight") == values(&base, "lm_head.weight"));
        // Trained as one they stay one, and the old copy goes.
        let mut tied = adapter_on(&head(0.5));
        tied.config.ensure_weight_tying = true;
        let report = merge(&base, &tied, &out, &MergeOptions::default());
        assert!(!report.untied && values(&out, "lm_head.weight").is_none());
        assert_eq!(values(&out, "model.embed_tokens.weight"), plus(0.5));
    }
    // A head that is no copy is the head, whatever the configuration says.
    let folder = tempfile::tempdir().unwrap();
    let (base, out) = (folder.path().join("base"), folder.path().join("out"));
    common::model(&base);
    let mut config = config_of(&base);
    config["tie_word_embeddings"] = json!(true);
    fs::write(base.join("config.json"), config.to_string()).unwrap();
    let old = values(&base, "lm_head.weight").unwrap();
    merge(&base, &adapter_on(&head(0.5)), &out, &MergeOptions::default());
    let plus: Vec<f32> = old.iter().map(|v| half::bf16::from_f32(v + 0.5).to_f32()).collect();
    assert_eq!(values(&out, "lm_head.weight"), Some(plus));
    merge(&base, &adapter_on(&embedding), &out, &MergeOptions::default());
    assert_eq!(values(&out, "lm_head.weight"), Some(old));
    assert_eq!(config_of(&out)["tie_word_embeddings"], json!(false));
    // A model whose head is its own keeps it apart.
    let folder = tempfile::tempdir().unwrap();
    let (base, out) = (folder.path().join("base"), folder.path().join("out"));
    common::model(&base);
    let report = merge(&base, &adapter_on(&saved), &out, &MergeOptions::default());
    assert!(!report.untied && values(&out, "lm_head.weight") == Some(vec![3.0; 512]));
    assert_eq!(values(&out, "model.embed_tokens.weight"), values(&base, "model.embed_tokens.weight"));
}

/// A merged checkpoint that its check refuses is not left, and what was there stays.
#[test]
fn what_a_check_refuses_is_not_left() {
    let folder = tempfile::tempdir().unwrap();
    let (base, out) = (folder.path().join("base"), folder.path().join("out"));
    common::model(&base);
    merge(&base, &q_proj(), &out, &MergeOptions::default());
    let before = values(&out, "model.layers.0.self_attn.q_proj.weight");
    let mut twice = q_proj();
    twice.config.lora_alpha *= 2.0;
    let check = |dir: &Path| {
        // What is looked at is whole.
        assert!(Checkpoint::open(dir).unwrap().contains("lm_head.weight") && dir.join("config.json").is_file());
        Err(FormatError::NoCheckpoint { dir: dir.to_path_buf(), hint: "; it is wrong".into() })
    };
    let message =
        merge_checkpoint_checked(&base, &twice, &out, &MergeOptions::default(), &mut |_| {}, check).unwrap_err();
    assert!(message.to_string().contains("it is wrong"));
    assert_eq!(values(&out, "model.layers.0.self_attn.q_proj.weight"), before);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing else is left");
}

/// bitsandbytes replaces linear layers; an embedding in 4 bits is loaded by nobody.
#[test]
fn embeddings_of_any_name_stay_as_they_are() {
    let embeddings = [
        "model.embed_tokens",
        "vision_tower.vision_model.embeddings.position_embedding",
        "bert.embeddings.word_embeddings",
        "model.embed_positions",
        "tok_embeddings",
        "transformer.wte",
    ];
    let linears = ["vision_tower.encoder.layers.0.self_attn.q_proj", "vision_tower.patch_embed.proj", "embedder.dense"];
    let folder = tempfile::tempdir().unwrap();
    let (base, out) = (folder.path().join("base"), folder.path().join("out"));
    let spec = |name: &&str| TensorSpec::new(format!("{name}.weight"), Dtype::BF16, &[16, 64]);
    let specs: Vec<TensorSpec> = embeddings.iter().chain(&linears).map(spec).collect();
    common::write(&base, &specs, 1 << 30);
    fs::write(base.join("config.json"), "{}").unwrap();
    let report = quantize_checkpoint(&base, &out, &BnbOptions::default(), &mut |_| {}).unwrap();
    let made = Checkpoint::open(&out).unwrap();
    let mut wanted = linears.to_vec();
    wanted.sort_unstable();
    assert_eq!((report.quantized, made.quantized_modules()), (3, wanted));
    let dequantized = MergeBase::Dequantized { config: Default::default(), skip_modules: Vec::new() };
    let options = MergeOptions { base: dequantized, ..MergeOptions::default() };
    merge(&base, &adapter_on(&[("tok_embeddings.weight", tensor(&[16, 64], 1.0))]), &out, &options);
    for name in &embeddings[..4] {
        let name = format!("{name}.weight");
        assert_eq!(values(&out, &name), values(&base, &name), "{name}");
    }
    let name = format!("{}.weight", linears[0]);
    assert_ne!(values(&out, &name), values(&base, &name));
    let options = GptqOptions { group_size: Some(32), ..GptqOptions::default() };
    let made = gptq_checkpoint::<FormatError>(&base, &out, &options, &[], 1 << 30, |_| Ok(()), &mut |_| {});
    assert_eq!(made.unwrap().len(), 3);
}
