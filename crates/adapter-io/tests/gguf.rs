//! GGUF: blocks against ggml's, whole files against what llama.cpp's converter writes, headers that lie.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use adapter_io::gguf::{Array, GgmlType, GgufFile, GgufOptions, Value, export_gguf, export_lora_gguf};
use adapter_io::{Adapter, Checkpoint, Dtype, HostTensor, TensorSpec};
use serde_json::json;

fn reference(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/reference")).join(path)
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

#[test]
fn blocks_are_ggmls_bit_for_bit() {
    // Multiples of 1/256: many ties between codes. Then zeros, equal magnitudes, a ramp, a constant.
    let mut state = 1u32;
    let mut x: Vec<f32> = (0..4096)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 20) as f32 - 2048.0) / 256.0
        })
        .collect();
    for i in 0..32 {
        x[i] = 0.0;
        x[32 + i] = if i % 2 == 0 { 2.0 } else { -2.0 };
        x[64 + i] = i as f32 * 0.5 - 8.0;
        x[96 + i] = -3.0;
    }
    // FNV-1a of what `quantize` and `dequantize` of the gguf Python package 0.19 give for the same numbers.
    for (kind, encoded, decoded) in [
        (GgmlType::F16, 0x857c_7949_785a_1082, 0x5df9_39c9_c8d2_3345),
        (GgmlType::BF16, 0xfb02_b10a_6e79_957e, 0x68dc_43b7_cca2_b0f6),
        (GgmlType::Q8_0, 0x7744_f3e7_5cf7_660f, 0xb7e3_5f1c_cea2_ae6c),
        (GgmlType::Q4_0, 0x0cc9_5cfc_fb54_6e59, 0xa93e_98d2_c568_b4a3),
        (GgmlType::Q4_1, 0x9bab_dfa5_d94e_d57c, 0x0d9c_1e70_c97e_e2a0),
        (GgmlType::Q5_0, 0xf251_e8e5_5657_8644, 0x35d2_2e91_301e_a875),
    ] {
        let bytes = kind.encode(&x);
        assert_eq!(kind.num_bytes(&[128, 32]), Some(bytes.len()));
        assert_eq!(fnv(&bytes), encoded, "{}", kind.name());
        assert_eq!(fnv(bytemuck::cast_slice(&kind.decode(&bytes))), decoded, "{}", kind.name());
        assert_eq!(GgmlType::from_id(kind.id()), Some(kind));
    }
    assert_eq!(GgmlType::Q4_0.num_bytes(&[4, 48]), None);
    assert_eq!(GgmlType::F32.num_bytes(&[usize::MAX, 3]), None);
}

/// Row `row` of `heads` heads, in the order that llama.cpp wants them.
fn rotary_row(row: usize, heads: usize, rows: usize) -> usize {
    let width = rows / heads;
    let (head, within) = (row / width, row % width);
    head * width + within % 2 * (width / 2) + within / 2
}

#[test]
fn the_recorded_model_becomes_what_the_converter_writes() {
    let dir = tempfile::tempdir().unwrap();
    let base = Checkpoint::open(&reference("tiny-llama")).unwrap();
    for kind in GgmlType::ALL {
        let out = dir.path().join("m.gguf");
        let mut calls = 0;
        let options = GgufOptions { kind, ..GgufOptions::default() };
        let report = export_gguf(&reference("tiny-llama"), &out, &options, &mut |_| calls += 1).unwrap();
        let file = GgufFile::open(&out).unwrap();
        assert_eq!((report.tensors, calls, file.tensors.len()), (56, 56, 56));
        // The MLP's width, 688, is no multiple of 32: as in the converter, these become F16.
        assert_eq!(report.fallbacks.len(), if kind.block().0 > 1 { 6 } else { 0 }, "{:?}", report.fallbacks);
        for (key, value) in [
            ("general.architecture", Value::from("llama")),
            ("general.type", "model".into()),
            ("general.name", "tiny-llama".into()),
            ("general.size_label", "5.4M".into()),
            ("general.file_type", Value::U32(kind.file_type())),
            ("llama.block_count", Value::U32(6)),
            ("llama.attention.head_count_kv", Value::U32(4)),
            ("llama.rope.dimension_count", Value::U32(32)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("tokenizer.ggml.model", "gpt2".into()),
            ("tokenizer.ggml.pre", "gpt-2".into()),
            ("tokenizer.ggml.bos_token_id", Value::U32(0)),
            ("tokenizer.ggml.eos_token_id", Value::U32(2)),
            ("tokenizer.ggml.padding_token_id", Value::U32(3)),
        ] {
            assert_eq!(file.value(key), Some(&value), "{key}");
        }
        let template = fs::read_to_string(reference("tiny-llama/chat_template.jinja")).unwrap();
        assert_eq!(file.value("tokenizer.chat_template").and_then(Value::as_str), Some(template.as_str()));
        let Some(Value::Array(Array::String(tokens))) = file.value("tokenizer.ggml.tokens") else { panic!() };
        assert_eq!((tokens.len(), &tokens[1][..]), (4096, &b"<|im_start|>"[..]));
        let Some(Value::Array(Array::I32(kinds))) = file.value("tokenizer.ggml.token_type") else { panic!() };
        assert_eq!((&kinds[..5], kinds.len()), (&[3, 3, 3, 3, 1][..], 4096));
        let q = file.tensor("blk.3.attn_k.weight").unwrap().0;
        assert_eq!((&q.shape, q.kind), (&vec![128, 256], kind));
        assert_eq!(file.tensor("blk.0.attn_norm.weight").unwrap().0.kind, GgmlType::F32);
        if kind != GgmlType::F32 {
            continue;
        }
        let same = |ours: &str, theirs: &str, heads: Option<usize>| {
            let view = base.tensor(theirs).unwrap();
            let (expected, actual) = (view.to_f32_vec().unwrap(), file.to_f32_vec(ours).unwrap());
            let (rows, columns) = (view.shape[0], expected.len() / view.shape[0]);
            for row in 0..rows {
                let from = heads.map_or(row, |heads| rotary_row(row, heads, rows));
                assert_eq!(actual[row * columns..][..columns], expected[from * columns..][..columns], "{ours} {row}");
            }
        };
        same("token_embd.weight", "model.embed_tokens.weight", None);
        same("output_norm.weight", "model.norm.weight", None);
        same("blk.2.attn_q.weight", "model.layers.2.self_attn.q_proj.weight", Some(8));
        same("blk.2.attn_k.weight", "model.layers.2.self_attn.k_proj.weight", Some(4));
        same("blk.5.ffn_down.weight", "model.layers.5.mlp.down_proj.weight", None);
        same("blk.5.ffn_norm.weight", "model.layers.5.post_attention_layernorm.weight", None);
    }
}

#[test]
fn a_quantized_checkpoint_is_decoded_on_the_way() {
    let dir = tempfile::tempdir().unwrap();
    let (base, out) = (reference("tiny-llama-bnb-4bit"), dir.path().join("m.gguf"));
    let options = GgufOptions { kind: GgmlType::BF16, ..GgufOptions::default() };
    assert_eq!(export_gguf(&base, &out, &options, &mut |_| {}).unwrap().tensors, 56);
    let module = "model.layers.4.mlp.up_proj";
    let weight = Checkpoint::open(&base).unwrap().quantized(module).unwrap().unwrap();
    let expected: Vec<half::bf16> = weight.dequantize().unwrap();
    let file = GgufFile::open(&out).unwrap();
    let (tensor, bytes) = file.tensor("blk.4.ffn_up.weight").unwrap();
    assert_eq!(tensor.shape, [688, 256]);
    assert!(bytes == bytemuck::cast_slice::<_, u8>(&expected));
}

#[test]
fn an_adapter_becomes_a_lora_file() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("lora.gguf");
    // rsLoRA: alpha / sqrt(r), where llama.cpp computes alpha / r.
    let adapter = Adapter::load(&reference("adapters/rslora")).unwrap();
    export_lora_gguf(&adapter, &reference("tiny-llama"), &out, GgmlType::F32).unwrap();
    let file = GgufFile::open(&out).unwrap();
    assert_eq!(file.value("general.type"), Some(&"adapter".into()));
    assert_eq!(file.value("adapter.type"), Some(&"lora".into()));
    assert_eq!(file.value("adapter.lora.alpha"), Some(&Value::F32(8.0)));
    assert_eq!(file.tensors.len(), adapter.tensors.len());
    let (a, b) = adapter.lora("model.layers.1.self_attn.q_proj").unwrap();
    assert_eq!(file.to_f32_vec("blk.1.attn_q.weight.lora_a").unwrap(), a.data);
    let ours = file.to_f32_vec("blk.1.attn_q.weight.lora_b").unwrap();
    for row in 0..256 {
        for k in 0..8 {
            // Rounded once when the factor sqrt(8) is folded in.
            let expected = b.data[rotary_row(row, 8, 256) * 8 + k] * (8f64.sqrt() as f32);
            assert!((ours[row * 8 + k] - expected).abs() <= expected.abs() * 1e-6);
        }
    }
    let message = |change: fn(&mut Adapter)| {
        let mut adapter = adapter.clone();
        change(&mut adapter);
        export_lora_gguf(&adapter, &reference("tiny-llama"), &out, GgmlType::F16).unwrap_err().to_string()
    };
    assert!(message(|a| a.config.use_dora = true).contains("merge the adapter"));
    let head = |a: &mut Adapter| {
        let zeros = |shape: &[usize]| HostTensor::new(shape, vec![0.0; shape.iter().product()]).unwrap();
        for (factor, shape) in [("A", [8, 256]), ("B", [4096, 8])] {
            a.tensors.insert(format!("base_model.model.lm_head.lora_{factor}.weight"), zeros(&shape));
        }
    };
    assert!(message(head).contains("lm_head"));
}

/// What a model of one block has beside the given tensors.
fn common_tensors(config: &serde_json::Value, given: &[(&str, &[usize])]) -> Vec<(String, Vec<usize>)> {
    let mut block = vec!["input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj"];
    block.extend(["self_attn.v_proj", "self_attn.o_proj"]);
    if config["model_type"].as_str().is_some_and(|kind| kind.starts_with("gemma")) {
        block.extend(["pre_feedforward_layernorm", "post_feedforward_layernorm"]);
    }
    if !given.iter().any(|(name, _)| name.contains("experts")) {
        block.extend(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]);
    }
    let width = config["hidden_size"].as_u64().map_or(8, |n| n as usize);
    let shape = |name: &str| if name.ends_with("norm") { vec![width] } else { vec![width, width] };
    let vocabulary = config["vocab_size"].as_u64().map_or(4, |n| n as usize);
    let mut all: Vec<_> = block.iter().map(|name| (format!("model.layers.0.{name}.weight"), shape(name))).collect();
    all.push(("model.norm.weight".into(), vec![width]));
    all.push(("model.embed_tokens.weight".into(), vec![vocabulary, width]));
    all.retain(|(name, _)| !given.iter().any(|(other, _)| other == name));
    all
}

/// A model of one block with these configuration keys, and tensors of these shapes among the usual ones.
fn small(config: serde_json::Value, tensors: &[(&str, &[usize])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut specs: Vec<_> = tensors.iter().map(|(n, s)| TensorSpec::new(*n, Dtype::F32, s)).collect();
    specs.extend(common_tensors(&config, tensors).iter().map(|(n, s)| TensorSpec::new(n, Dtype::F32, s)));
    common::write(dir.path(), &specs, 1 << 20);
    let mut all = json!({"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,
        "max_position_embeddings": 64, "vocab_size": 4});
    all.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
    fs::write(dir.path().join("config.json"), all.to_string()).unwrap();
    dir
}

fn export(dir: &Path) -> Result<GgufFile, String> {
    let out = dir.join("out.gguf");
    let options = GgufOptions { kind: GgmlType::F32, without_tokenizer: true, ..GgufOptions::default() };
    export_gguf(dir, &out, &options, &mut |_| {}).map_err(|e| e.to_string())?;
    Ok(GgufFile::open(&out).unwrap())
}

#[test]
fn model_types_differ_by_the_table() {
    let p = "model.layers.0.";
    let moe: Vec<String> = (0..2)
        .flat_map(|e| ["w1", "w2", "w3"].map(|w| format!("{p}block_sparse_moe.experts.{e}.{w}.weight")))
        .chain([format!("{p}block_sparse_moe.gate.weight")])
        .collect();
    let mut tensors: Vec<(&str, &[usize])> = moe.iter().map(|n| (n.as_str(), &[8, 8][..])).collect();
    tensors[6].1 = &[2, 8];
    let dir = small(json!({"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}), &tensors);
    let file = export(dir.path()).unwrap();
    let (stack, _) = file.tensor("blk.0.ffn_down_exps.weight").unwrap();
    assert_eq!(stack.shape, [2, 8, 8]);
    let base = Checkpoint::open(dir.path()).unwrap();
    let both: Vec<f32> = [1, 4].iter().flat_map(|i| base.tensor(&moe[*i]).unwrap().to_f32_vec().unwrap()).collect();
    assert_eq!(file.to_f32_vec("blk.0.ffn_down_exps.weight").unwrap(), both);
    assert_eq!(file.tensor("blk.0.ffn_gate_inp.weight").unwrap().0.kind, GgmlType::F32);
    let one_missing =
        small(json!({"model_type": "mixtral", "num_local_experts": 3, "num_experts_per_tok": 1}), &tensors);
    assert!(export(one_missing.path()).unwrap_err().contains("3 experts"));

    let gemma = json!({"model_type": "gemma2", "sliding_window": 4, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 4});
    let norm = format!("{p}post_attention_layernorm.weight");
    let dir =
        small(gemma.clone(), &[(&norm, &[8]), ("lm_head.weight", &[4, 8]), ("model.embed_tokens.weight", &[4, 8])]);
    let file = export(dir.path()).unwrap();
    let plus_one: Vec<f32> = Checkpoint::open(dir.path())
        .unwrap()
        .tensor(&norm)
        .unwrap()
        .to_f32_vec()
        .unwrap()
        .iter()
        .map(|x| x + 1.0)
        .collect();
    assert_eq!(file.to_f32_vec("blk.0.post_attention_norm.weight").unwrap(), plus_one);
    assert!(file.tensor("output.weight").is_err());
    assert_eq!(file.value("gemma2.attn_logit_softcapping"), Some(&Value::F32(50.0)));

    let bias = format!("{p}self_attn.q_proj.bias");
    let llama = json!({"model_type": "llama", "rope_theta": 10000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}});
    let dir = small(llama, &[(&bias, &[8])]);
    let file = export(dir.path()).unwrap();
    assert_eq!(file.to_f32_vec("rope_freqs.weight").unwrap()[0], 1.0);
    let before = Checkpoint::open(dir.path()).unwrap().tensor(&bias).unwrap().to_f32_vec().unwrap();
    let after = file.to_f32_vec("blk.0.attn_q.bias").unwrap();
    assert!((0..8).all(|row| after[row] == before[rotary_row(row, 2, 8)]));

    for (config, says) in [
        (json!({"model_type": "gpt_neox"}), "gpt_neox"),
        (json!({"model_type": "qwen3_moe", "norm_topk_prob": false}), "norm_topk_prob"),
        (json!({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic"}}), "dynamic"),
        (json!({"model_type": "qwen3", "attention_bias": true}), "attention_bias"),
        (json!({"model_type": "llama", "hidden_size": -1}), "hidden_size"),
        (json!({"model_type": "gemma2", "sliding_window": 4, "query_pre_attn_scalar": 7}), "query_pre_attn_scalar"),
    ] {
        let dir = small(config, &[("model.norm.weight", &[8])]);
        let message = export(dir.path()).map(drop).unwrap_err();
        assert!(message.contains(says) && message.contains("config.json"), "{message}");
    }
    let dir = small(json!({"model_type": "llama"}), &[("model.vision.weight", &[8])]);
    assert!(export(dir.path()).unwrap_err().contains("model.vision"));
    assert!(!dir.path().join("out.gguf").exists());
}

/// Small models of the families that llama.cpp knows by another name than `llama`, as transformers saves them.
#[test]
fn families_have_the_names_and_keys_of_readers() {
    let out = tempfile::tempdir().unwrap();
    let export_arch = |name: &str| {
        let dir = reference("archs").join(name);
        let path = out.path().join(format!("{name}.gguf"));
        let options = GgufOptions { kind: GgmlType::F32, without_tokenizer: true, ..GgufOptions::default() };
        export_gguf(&dir, &path, &options, &mut |_| ()).map_err(|e| e.to_string())?;
        Ok::<_, String>((Checkpoint::open(&dir).unwrap(), GgufFile::open(&path).unwrap()))
    };
    let values = |base: &Checkpoint, name: &str| base.tensor(name).unwrap().to_f32_vec().unwrap();
    // The family, a tensor of the checkpoint and its name in the file, what is written for a reader, and the number of tensors
    // of a block.
    for (name, theirs, ours, entries, each) in [
        (
            "granite",
            "input_layernorm",
            "attn_norm",
            vec![
                ("granite.logit_scale", 8.0),
                ("granite.attention.scale", 0.2),
                ("granite.residual_scale", 0.22),
                ("granite.embedding_scale", 12.0),
            ],
            9,
        ),
        (
            "seed_oss",
            "post_attention_layernorm",
            "post_attention_norm",
            vec![("seed_oss.rope.freq_base", 10_000.0)],
            12,
        ),
        (
            "hunyuan",
            "self_attn.key_layernorm",
            "attn_k_norm",
            vec![("hunyuan-dense.rope.freq_base", 1e4 * 1000f32.powf(8.0 / 6.0))],
            11,
        ),
        ("olmo2", "self_attn.k_norm", "attn_k_norm", vec![("olmo2.attention.layer_norm_rms_epsilon", 1e-5)], 11),
        ("glm4", "post_mlp_layernorm", "post_ffw_norm", vec![("glm4.rope.freq_base", 10_000.0)], 13),
        ("ernie", "mlp.down_proj", "ffn_down", vec![("ernie4_5.rope.freq_base", 500_000.0)], 9),
    ] {
        let (base, file) = export_arch(name).unwrap();
        assert_eq!(
            values(&base, &format!("model.layers.1.{theirs}.weight")),
            file.to_f32_vec(&format!("blk.1.{ours}.weight")).unwrap(),
            "{name}"
        );
        assert_eq!(file.tensors.iter().filter(|tensor| tensor.name.starts_with("blk.1.")).count(), each, "{name}");
        for (key, value) in entries {
            let Some(&Value::F32(found)) = file.value(key) else { panic!("{name}: {key} is {:?}", file.value(key)) };
            assert!((found / value - 1.0).abs() < 1e-6, "{name}: {key} is {found}");
        }
    }
    let dimensions = |name: &str, key: &str| export_arch(name).unwrap().1.value(key).cloned();
    assert_eq!(dimensions("glm4", "glm4.rope.dimension_count"), Some(Value::U32(4)));
    assert_eq!(dimensions("glm4", "glm4.attention.key_length"), Some(Value::U32(8)));
    for (name, key, says) in [
        ("ministral3", "model_type", "growth of its queries"),
        ("gpt_oss", "model_type", "columns that take turns"),
        ("smollm3", "no_rope_layers", "one layer in 4"),
        ("seed_oss_biases", "attention_out_bias", "true"),
        ("hunyuan_biases", "attention_bias", "true"),
        ("olmo2_biases", "attention_bias", "true"),
        ("olmo3", "head_dim", "it is 6"),
        ("ernie_biases", "use_bias", "true"),
    ] {
        let message = export_arch(name).map(drop).unwrap_err();
        assert!(
            message.contains(key) && message.contains(says) && message.contains("config.json"),
            "{name}: {message}"
        );
    }
    // Published shapes: one block in four is global or not rotated, and the scaling of a longer context is the factor's own.
    let scaling = json!({"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.1 * 8f64.ln() + 1.0, "original_max_position_embeddings": 64});
    let olmo = |layer_types, scaling: &serde_json::Value| {
        let config = json!({"model_type": "olmo3", "head_dim": 4, "sliding_window": 8, "layer_types": layer_types, "rope_scaling": scaling});
        let p = "model.layers.0.";
        let norms = [format!("{p}post_attention_layernorm.weight"), format!("{p}self_attn.q_norm.weight")];
        let dir = small(config, &[(&norms[0], &[8]), (&norms[1], &[8])]);
        export(dir.path())
    };
    let file = olmo(vec!["sliding_attention"], &scaling).unwrap();
    assert_eq!(file.value("olmo2.rope.scaling.factor"), Some(&Value::F32(8.0)));
    assert_eq!(file.value("olmo2.attention.sliding_window"), Some(&Value::U32(8)));
    assert!(file.value("olmo2.rope.scaling.yarn_attn_factor").is_none());
    assert!(olmo(vec!["full_attention"], &scaling).map(drop).unwrap_err().contains("layer_types"));
    let mut other = scaling.clone();
    other["attention_factor"] = json!(1.0);
    assert!(olmo(vec!["sliding_attention"], &other).map(drop).unwrap_err().contains("attention_factor"));
}

/// As transformers saves a model without its head.
#[test]
fn a_bare_model_becomes_the_same_file() {
    let dir = small(json!({"model_type": "llama"}), &[]);
    let whole = export(dir.path()).unwrap();
    let base = Checkpoint::open(dir.path()).unwrap();
    let bare = tempfile::tempdir().unwrap();
    let name = |name: &str| name.strip_prefix("model.").unwrap().to_string();
    let specs: Vec<_> =
        base.names().map(|full| TensorSpec::new(name(full), Dtype::F32, &base.tensor(full).unwrap().shape)).collect();
    let mut writer = adapter_io::ShardedWriter::create(bare.path(), specs, 1 << 20).unwrap();
    base.names().for_each(|full| writer.write(&name(full), base.tensor(full).unwrap().data).unwrap());
    writer.finish().unwrap();
    fs::copy(dir.path().join("config.json"), bare.path().join("config.json")).unwrap();
    let other = export(bare.path()).unwrap();
    assert_eq!(other.tensors.len(), whole.tensors.len());
    for tensor in &whole.tensors {
        assert_eq!(other.to_f32_vec(&tensor.name).unwrap(), whole.to_f32_vec(&tensor.name).unwrap());
    }
}

/// A file whose metadata contradict its tensors is loaded by nobody.
#[test]
fn a_configuration_that_is_not_the_tensors_is_refused() {
    let dir = small(json!({"model_type": "llama", "num_key_value_heads": 2}), &[]);
    let path = dir.path().join("config.json");
    let whole: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    export(dir.path()).unwrap();
    for (key, value, says) in [
        ("intermediate_size", json!(1), "`model.layers.0.mlp"),
        ("num_hidden_layers", json!(0), "it is 0, the checkpoint has 1 layers"),
        ("num_hidden_layers", json!(2), "it is 2, the checkpoint has 1 layers"),
        ("num_hidden_layers", json!(1_048_576), "it is 1048576"),
        ("vocab_size", json!(1), "`model.embed_tokens.weight` is [1, 8], the checkpoint has [4, 8]"),
        ("hidden_size", json!(16), "`model.embed_tokens.weight` is [4, 16]"),
        ("hidden_act", json!("x"), "\"x\""),
        ("hidden_act", json!("gelu"), "\"gelu\""),
        ("num_attention_heads", json!(1), "num_key_value_heads"),
        ("num_key_value_heads", json!(1), "`model.layers.0.self_attn.k_proj.weight` is [4, 8]"),
        ("head_dim", json!(8), "is [16, 8], the checkpoint has [8, 8]"),
        ("rms_norm_eps", json!(0), "above 0"),
        ("rms_norm_eps", json!(-1e-6), "above 0"),
    ] {
        let mut config = whole.clone();
        config[key] = value.clone();
        fs::write(&path, config.to_string()).unwrap();
        let message = export(dir.path()).map(drop).unwrap_err();
        assert!(message.contains(says) && message.contains("config.json"), "{key} = {value}: {message}");
        assert!(message.contains(key) || key == "head_dim", "{key} = {value}: {message}");
    }
    let lacks = |name: &str, says: &str| {
        let empty = small(json!({"model_type": "llama"}), &[(&format!("model.layers.1.{name}.weight"), &[8, 8])]);
        let mut config = whole.clone();
        config["num_hidden_layers"] = json!(2);
        fs::write(empty.path().join("config.json"), config.to_string()).unwrap();
        let message = export(empty.path()).map(drop).unwrap_err();
        assert!(message.contains(says) && message.contains("incomplete"), "{message}");
    };
    lacks("mlp.up_proj", "layer 1 has no tensor for `attn_norm.weight`");
}

/// llama.cpp takes the width over the heads for one number of layers in each family, and the width of a head
/// otherwise (`llama-model.cpp`).
#[test]
fn the_scale_of_queries_is_the_one_that_llama_cpp_has_built_in() {
    let result = |kind: &str, layers: u32, scalar: f64| {
        let config = json!({"model_type": kind, "sliding_window": 4, "head_dim": 16, "hidden_size": 24,
            "num_attention_heads": 2, "num_hidden_layers": layers, "query_pre_attn_scalar": scalar});
        let dir = small(config, &[("model.norm.weight", &[8])]);
        export(dir.path()).map(drop).unwrap_err().contains("query_pre_attn_scalar")
    };
    for (kind, largest) in [("gemma2", 46), ("gemma3_text", 62)] {
        for layers in [1, 26, 42, 46, 62] {
            let by_width = layers == largest;
            assert_eq!(
                (result(kind, layers, 12.0), result(kind, layers, 16.0)),
                (!by_width, by_width),
                "{kind} {layers}"
            );
        }
    }
}

#[test]
fn vocabularies_of_both_kinds_are_written() {
    let dir = small(json!({"model_type": "llama", "vocab_size": 6, "bos_token_id": 1}), &[("model.norm.weight", &[8])]);
    let out = dir.path().join("out.gguf");
    let write = |tokenizer: serde_json::Value, pre: Option<&str>| {
        fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let options = GgufOptions { pre_tokenizer: pre.map(str::to_string), ..GgufOptions::default() };
        export_gguf(dir.path(), &out, &options, &mut |_| {}).map_err(|e| e.to_string())?;
        Ok::<_, String>(GgufFile::open(&out).unwrap())
    };
    let strings = |file: &GgufFile, key: &str| match file.value(key) {
        Some(Value::Array(Array::String(list))) => list.iter().map(|b| String::from_utf8(b.clone()).unwrap()).collect(),
        _ => vec![],
    };
    let pieces = json!({"model": {"type": "BPE", "byte_fallback": true, "vocab": {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "a": 3, "aa": 4},
        "merges": [["a", "a"]]}, "added_tokens": [{"id": 1, "content": "<s>", "special": true}]});
    let file = write(pieces, None).unwrap();
    assert_eq!(file.value("tokenizer.ggml.model"), Some(&"llama".into()));
    assert_eq!(strings(&file, "tokenizer.ggml.tokens"), ["<unk>", "<s>", "<0x0A>", "a", "aa", "[PAD5]"]);
    assert_eq!(file.value("tokenizer.ggml.token_type"), Some(&Value::Array(Array::I32(vec![1, 3, 6, 1, 1, 5]))));
    assert_eq!(file.value("tokenizer.ggml.bos_token_id"), Some(&Value::U32(1)));
    let bpe = |regex: &str| {
        json!({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": regex}}, {"type": "ByteLevel", "use_regex": false}]},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]},
        "added_tokens": [{"id": 3, "content": "<s>", "special": true}, {"id": 4, "content": "user", "special": false}]})
    };
    fs::write(dir.path().join("tokenizer_config.json"), json!({"bos_token": "<s>"}).to_string()).unwrap();
    let known = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let file = write(bpe(known), None).unwrap();
    assert_eq!(file.value("tokenizer.ggml.pre"), Some(&"qwen2".into()));
    assert_eq!(strings(&file, "tokenizer.ggml.merges"), ["a b"]);
    assert_eq!(file.value("tokenizer.ggml.token_type"), Some(&Value::Array(Array::I32(vec![1, 1, 1, 3, 4, 5]))));
    assert_eq!(file.value("tokenizer.ggml.bos_token_id"), Some(&Value::U32(3)));
    assert_eq!(file.value("tokenizer.ggml.add_bos_token"), Some(&Value::Bool(true)));
    assert!(write(bpe("[a-z]+"), None).unwrap_err().contains("tokenizer.ggml.pre"));
    assert_eq!(write(bpe("[a-z]+"), Some("mine")).unwrap().value("tokenizer.ggml.pre"), Some(&"mine".into()));
}

#[test]
fn headers_that_lie_are_refused() {
    let dir =
        small(json!({"model_type": "llama"}), &[("model.norm.weight", &[8]), ("model.embed_tokens.weight", &[4, 8])]);
    export(dir.path()).unwrap();
    let path = dir.path().join("out.gguf");
    let good = fs::read(&path).unwrap();
    let open = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        GgufFile::open(&path).map(drop).map_err(|e| e.to_string())
    };
    let at = |needle: &[u8]| good.windows(needle.len()).position(|w| w == needle).unwrap();
    let put = |position: usize, bytes: &[u8]| {
        let mut changed = good.clone();
        changed[position..position + bytes.len()].copy_from_slice(bytes);
        changed
    };
    let table = at(b"token_embd.weight") + "token_embd.weight".len();
    let huge = u64::MAX.to_le_bytes();
    for (bytes, says) in [
        (put(0, b"GGML"), "does not start"),
        (put(4, &9u32.to_le_bytes()), "version 9"),
        (put(4, &3u32.to_be_bytes()), "big-endian"),
        (put(8, &huge), "ends at byte"),
        (put(16, &huge), "ends at byte"),
        (put(24, &huge), "ends at byte"),
        (put(at(b"general.architecture") + 20, &77u32.to_le_bytes()), "value type 77"),
        (put(table, &5u32.to_le_bytes()), "5 dimensions"),
        (put(table + 4, &huge), "no valid size"),
        (put(table + 20, &99u32.to_le_bytes()), "ggml type 99"),
        (put(table + 24, &7u64.to_le_bytes()), "multiple of 32"),
        (put(table + 24, &(1u64 << 40).to_le_bytes()), "cut short"),
        (good[..good.len() - 40].to_vec(), "cut short"),
        (Vec::new(), "does not start"),
    ] {
        let message = open(&bytes).expect_err(says);
        assert!(message.contains(says) && message.contains("out.gguf"), "{says}: {message}");
    }
    open(&good).unwrap();
}
