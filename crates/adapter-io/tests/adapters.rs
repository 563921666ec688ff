//! Adapters and 4-bit weights that are broken, and writing that fails.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use adapter_io::{
    Adapter, AdapterConfig, BnbConfig, Checkpoint, Dtype, FormatError, HostTensor, InitLoraWeights, LoraModule,
    OneOrMany, Pattern, ShardedWriter, TargetModules, TensorSpec, atomic, bnb,
};
use nf4_quant::{QuantConfig, Quantized4bit};
use serde_json::json;

const Q: &str = "model.layers.0.self_attn.q_proj";

fn tensor(shape: &[usize]) -> HostTensor {
    let n: usize = shape.iter().product();
    HostTensor::new(shape, (0..n).map(|i| (i as f32).sin()).collect()).unwrap()
}

/// Gives the module [`Q`] its factors.
fn insert(adapter: &mut Adapter, lora_a: HostTensor, lora_b: HostTensor) {
    for (factor, tensor) in [("A", lora_a), ("B", lora_b)] {
        adapter.tensors.insert(format!("base_model.model.{Q}.lora_{factor}.weight"), tensor);
    }
}

fn small(rank: usize) -> Adapter {
    let mut adapter =
        Adapter::new(AdapterConfig { r: rank, task_type: Some("CAUSAL_LM".into()), ..AdapterConfig::default() });
    insert(&mut adapter, tensor(&[rank, 6]), tensor(&[5, rank]));
    adapter
}

/// Writes tensors of zeros under these names, beside a default config of rank 2.
fn adapter_dir(names: &[(&str, Dtype, &[usize])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    AdapterConfig { r: 2, ..AdapterConfig::default() }.save(dir.path()).unwrap();
    let specs: Vec<_> = names.iter().map(|(n, d, s)| TensorSpec::new(*n, *d, s)).collect();
    let mut writer = ShardedWriter::create(dir.path(), specs.clone(), 1 << 20).unwrap();
    for spec in &specs {
        writer.write(&spec.name, &common::content(spec)).unwrap();
    }
    writer.finish().unwrap();
    fs::rename(dir.path().join("model.safetensors"), dir.path().join("adapter_model.safetensors")).unwrap();
    dir
}

fn load_error(dir: &Path) -> String {
    Adapter::load(dir).map(|_| ()).expect_err("must be refused").to_string()
}

#[test]
fn adapters_survive_save_and_load() {
    let parent = tempfile::tempdir().unwrap();
    let mut adapter = small(3);
    adapter.config.extra.insert("a_key_of_the_future".into(), json!({"z": [1, 2.5], "a": null}));
    adapter.config.target_modules = Some(TargetModules::List(vec!["q_proj".into()]));
    adapter.config.exclude_modules = Some(TargetModules::Pattern(r".*\.5\..*".into()));
    adapter.config.layers_to_transform = Some(OneOrMany::One(0));
    adapter.config.init_lora_weights = InitLoraWeights::Method("gaussian".into());
    adapter.config.alpha_pattern = Pattern(vec![("k_proj".into(), 2.5)]);
    adapter.config.lora_dropout = 1e-5;
    adapter.config.base_model_name_or_path = Some("models/Über \"1\"".into());
    let dir = parent.path().join("deep/adapter");
    adapter.save(&dir).unwrap();
    assert_eq!(Adapter::load(&dir).unwrap(), adapter);
    let text = fs::read_to_string(dir.join("adapter_config.json")).unwrap();
    assert!(text.contains("\"lora_dropout\": 1e-05,") && text.contains(r#""models/\u00dcber \"1\"""#), "{text}");
    assert!(text.contains("\"lora_alpha\": 8,") && text.contains("\"layers_to_transform\": 0,"), "{text}");
}

#[test]
fn keys_with_an_adapter_name_inside_are_refused_with_the_cure() {
    let key = |middle: &str| format!("base_model.model.{Q}.{middle}");
    for (name, says) in [
        (key("lora_A.other.weight"), "rename it to `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`"),
        (key("lora_embedding_A.default"), "self_attn.q_proj.lora_embedding_A`"),
        (key("lora_magnitude_vector.other.weight"), "adapter's name `other` inside"),
        (key("lora_A.my.run.weight"), "adapter's name `my.run` inside, and PEFT ignores"),
        (key("lora_a.weight"), "capitals"),
        (format!("{Q}.lora_A.weight"), "rename it to `base_model.model.model.layers"),
        (key("lora_A.data"), "must be followed by `weight`"),
        (
            key("lora_A.weight"),
            "counterpart `base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight` is missing",
        ),
    ] {
        let dir = adapter_dir(&[(&name, Dtype::F32, &[2, 4])]);
        let message = load_error(dir.path());
        assert!(message.contains(says) && message.contains("adapter_model.safetensors"), "{message}");
    }
}

#[test]
fn ranks_that_disagree_are_refused_by_module() {
    let (a, b) = (format!("base_model.model.{Q}.lora_A.weight"), format!("base_model.model.{Q}.lora_B.weight"));
    for (shape_a, shape_b, says) in [
        (&[2, 4][..], &[4, 3][..], "lora_A [2, 4] has rank 2 but lora_B [4, 3] has rank 3"),
        (&[4, 4], &[4, 4], "tensors have rank 4, adapter_config.json gives it rank 2"),
        (&[2, 4, 1], &[4, 2], "must be matrices"),
    ] {
        let dir = adapter_dir(&[(&a, Dtype::F32, shape_a), (&b, Dtype::F32, shape_b)]);
        let message = load_error(dir.path());
        assert!(message.contains(says) && message.contains(Q), "{message}");
    }
    let mut adapter = small(2);
    insert(&mut adapter, tensor(&[2, 6]), tensor(&[5, 3]));
    assert!(adapter.lora_module(Q).unwrap_err().to_string().contains("rank 3"));
}

#[test]
fn half_precision_factors_are_converted() {
    let (a, b) = (format!("base_model.model.{Q}.lora_A.weight"), format!("base_model.model.{Q}.lora_B.weight"));
    let dir = adapter_dir(&[(&a, Dtype::BF16, &[2, 4]), (&b, Dtype::F16, &[4, 2])]);
    let adapter = Adapter::load(dir.path()).unwrap();
    let (lora_a, lora_b) = adapter.lora(Q).unwrap();
    let words = |dtype, shape: &[usize], name: &str| {
        let bytes = common::content(&TensorSpec::new(name, dtype, shape));
        bytes.chunks(2).map(|c| u16::from_le_bytes([c[0], c[1]])).collect::<Vec<_>>()
    };
    let expected: Vec<f32> =
        words(Dtype::BF16, &[2, 4], &a).into_iter().map(|w| half::bf16::from_bits(w).to_f32()).collect();
    assert_eq!(lora_a.data, expected);
    let expected: Vec<f32> =
        words(Dtype::F16, &[4, 2], &b).into_iter().map(|w| half::f16::from_bits(w).to_f32()).collect();
    assert_eq!(lora_b.data, expected);
    let dir = adapter_dir(&[(&a, Dtype::I32, &[2, 4]), (&b, Dtype::F16, &[4, 2])]);
    assert!(load_error(dir.path()).contains("data type I32"));
}

#[test]
fn folders_that_are_no_adapter_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(load_error(&dir.path().join("nowhere")).contains("there is no such folder"));
    assert!(load_error(dir.path()).contains("it has no adapter_config.json"));
    fs::write(dir.path().join("adapter_config.json"), "{}").unwrap();
    assert!(load_error(dir.path()).contains("it has no adapter_model.safetensors"));
    fs::write(dir.path().join("adapter_model.bin"), "x").unwrap();
    assert!(load_error(dir.path()).contains("convert adapter_model.bin"));
}

#[test]
fn config_fields_that_cannot_be_are_named() {
    for (text, says) in [
        (json!({"r": 0}), "field `r`: a rank of 0"),
        (json!({"r": "x"}), "field `r`: expected a whole number, found \"x\""),
        (json!({"r": -1}), "field `r`: expected a whole number, found -1"),
        (json!({"peft_type": "IA3"}), "`IA3` adapters are not supported"),
        (json!({"lora_dropout": 1.0}), "`lora_dropout`"),
        (json!({"bias": "some"}), "`some` is none of none, all, lora_only"),
        (json!({"target_modules": 7}), "field `target_modules`: expected a list of module names"),
        (json!({"rank_pattern": {"q_proj": 0}}), "`q_proj` has rank 0"),
        (json!({"rank_pattern": {"q_proj": null}}), "`q_proj`: expected a number"),
        (json!({"alpha_pattern": {"(": 3}}), "field `alpha_pattern`: `(` is not a valid pattern"),
        (json!([]), "not valid JSON"),
    ] {
        let error =
            AdapterConfig::from_json(&text.to_string(), Path::new("some/adapter_config.json")).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("some/adapter_config.json"), "{error}");
    }
    let path = Path::new("adapter_config.json");
    // What older versions of PEFT wrote: fewer keys, null patterns.
    let old =
        json!({"r": 16, "lora_alpha": 32, "target_modules": ["q"], "rank_pattern": null, "modules_to_save": null});
    let old = AdapterConfig::from_json(&old.to_string(), path).unwrap();
    assert_eq!((old.r, old.lora_alpha, old.bias.as_str()), (16, 32.0, "none"));
    assert_eq!(
        AdapterConfig::default().target_modules_or_default(),
        TargetModules::List(vec!["q_proj".into(), "v_proj".into()])
    );
    let set = json!({"use_dora": true, "lora_bias": true, "modules_to_save": ["norm"], "target_parameters": []});
    let set = AdapterConfig::from_json(&set.to_string(), path).unwrap();
    assert_eq!(set.beyond_plain_lora(), ["lora_bias", "modules_to_save", "use_dora"]);
}

#[test]
fn merging_into_another_model_is_refused() {
    let (a, b) = (tensor(&[2, 6]), tensor(&[5, 2]));
    let mut weight = vec![0f32; 5 * 7];
    let adapter = small(2);
    let module = LoraModule { scaling: 3.0, ..adapter.lora_module(Q).unwrap().unwrap() };
    let message = module.merge_into(&mut weight, &[5, 7]).unwrap_err().to_string();
    assert!(message.contains("[5, 7]") && message.contains(Q) && message.contains("another base model"), "{message}");
    // By hand: 3 * (b0 a0 + b1 a1) for one element, the same two products in the same order.
    let delta = module.delta().unwrap();
    assert_eq!(delta.data[2 * 6 + 1], (b.data[4] * a.data[1] + b.data[5] * a.data[7]) * 3.0);
    let message = LoraModule { lora_b: &tensor(&[5, 3]), ..module }.delta().unwrap_err().to_string();
    assert!(message.contains(Q) && message.contains("[2, 6]") && message.contains("[5, 3]"), "{message}");
}

/// A checkpoint with one NF4 weight, after `change` has had its way with the tensors.
fn quantized(
    change: impl Fn(&mut Vec<(TensorSpec, Vec<u8>)>),
) -> (tempfile::TempDir, Result<Option<Quantized4bit>, FormatError>) {
    let weight: Vec<f32> = (0..33 * 100).map(|i| (i as f32 * 0.7).sin()).collect();
    let weight = Quantized4bit::quantize(&weight, &[33, 100], &QuantConfig::default()).unwrap();
    let mut tensors = bnb::to_tensors("m", &weight);
    change(&mut tensors);
    let dir = tempfile::tempdir().unwrap();
    let specs = tensors.iter().map(|(s, _)| s.clone()).collect();
    let mut writer = ShardedWriter::create(dir.path(), specs, 1 << 20).unwrap();
    for (spec, bytes) in &tensors {
        writer.write(&spec.name, bytes).unwrap();
    }
    writer.finish().unwrap();
    let read = Checkpoint::open(dir.path()).unwrap().quantized("m");
    if let Ok(Some(read)) = &read {
        assert_eq!(read, &weight);
    }
    (dir, read)
}

fn find<'a>(tensors: &'a mut [(TensorSpec, Vec<u8>)], end: &str) -> &'a mut (TensorSpec, Vec<u8>) {
    tensors.iter_mut().find(|(s, _)| s.name.ends_with(end)).unwrap()
}

#[test]
fn quantized_weights_under_any_storage_type_are_the_same_bytes() {
    assert!(quantized(|_| ()).1.unwrap().is_some());
    for (dtype, width) in [(Dtype::BF16, 2), (Dtype::F16, 2)] {
        let view = |t: &mut Vec<(TensorSpec, Vec<u8>)>| {
            let (spec, bytes) = find(t, "m.weight");
            (spec.dtype, spec.shape) = (dtype, vec![bytes.len() / width, 1]);
        };
        assert!(quantized(view).1.unwrap().is_some());
    }
}

#[test]
fn quantized_weights_that_contradict_themselves_are_refused() {
    type Tensors = Vec<(TensorSpec, Vec<u8>)>;
    let json_edit = |from: &'static str, to: &'static str| {
        move |t: &mut Tensors| {
            let (spec, bytes) = find(t, "__nf4");
            *bytes = String::from_utf8(bytes.clone()).unwrap().replace(from, to).into_bytes();
            spec.shape = vec![bytes.len()];
        }
    };
    let cut = |end: &'static str| {
        move |t: &mut Tensors| {
            let (spec, bytes) = find(t, end);
            let width = spec.dtype.bitsize() / 8;
            bytes.truncate(bytes.len() - width);
            spec.shape[0] -= 1;
        }
    };
    type Change = Box<dyn Fn(&mut Tensors)>;
    let cases: Vec<(Change, &str)> = vec![
        (Box::new(json_edit("[33, 100]", "[33, 101]")), "do not fit the shape [33, 101]"),
        (Box::new(json_edit("[33, 100]", "[18446744073709551615, 3]")), "do not fit the shape"),
        (Box::new(json_edit("\"nf4\"", "\"fp4\"")), "it says fp4 inside"),
        (Box::new(json_edit("{", "")), "quant_state"),
        (Box::new(json_edit("64", "63")), "blocksize"),
        (Box::new(json_edit("float32", "int3")), "int3"),
        (Box::new(cut(".nested_absmax")), "m.weight.nested_absmax"),
        (Box::new(cut(".absmax")), "m.weight.absmax"),
        (Box::new(cut("m.weight")), "1649 bytes of codes"),
        (Box::new(cut(".nested_quant_map")), "[255]"),
        (Box::new(|t: &mut Tensors| find(t, ".weight.quant_map").1[0] ^= 1), "entry 0 of the codebook"),
        (Box::new(|t: &mut Tensors| find(t, ".nested_quant_map").1[401] ^= 1), "entry 100 of the codebook"),
        (
            Box::new(|t: &mut Tensors| t.retain(|(s, _)| !s.name.ends_with(".nested_absmax"))),
            "no tensor `m.weight.nested_absmax`",
        ),
        (Box::new(|t: &mut Tensors| t.retain(|(s, _)| !s.name.contains("quant_state"))), "no quant_state"),
    ];
    for (change, says) in cases {
        let message = quantized(change).1.expect_err(says).to_string();
        assert!(message.contains(says) && message.contains("model.safetensors"), "{says}: {message}");
    }
}

#[test]
fn other_quantizations_are_refused() {
    let path = Path::new("config.json");
    for other in [json!({"quant_method": "gptq", "bits": 4}), json!({"load_in_8bit": true})] {
        assert_eq!(BnbConfig::from_config(&json!({"quantization_config": other}), path).unwrap(), None);
    }
    for (config, says) in [
        (json!({"load_in_4bit": true, "bnb_4bit_quant_type": "int4"}), "bnb_4bit_quant_type"),
        (json!({"load_in_4bit": 1}), "expected true or false"),
        (json!(3), "expected an object"),
    ] {
        let error = BnbConfig::from_config(&json!({"quantization_config": config}), path).unwrap_err().to_string();
        assert!(error.contains(says) && error.contains("config.json"), "{error}");
    }
    let (_dir, read) = quantized(|t| {
        t.retain(|(s, _)| s.name == "m.weight");
        t.push((TensorSpec::new("m.SCB", Dtype::F32, &[1]), vec![0; 4]));
    });
    assert!(read.unwrap_err().to_string().contains("8 bits"));
}

#[test]
fn a_failed_write_leaves_the_file_that_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state.bin");
    atomic::write_bytes(&path, b"first").unwrap();
    for kind in [io::ErrorKind::StorageFull, io::ErrorKind::PermissionDenied] {
        let error = atomic::write_file(&path, |out| {
            out.write_all(&[0; 1 << 21])?;
            Err(kind.into())
        });
        let message = error.unwrap_err().to_string();
        assert!(message.contains("state.bin") && message.contains("unchanged"), "{message}");
        assert_eq!(fs::read(&path).unwrap(), b"first");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
    atomic::write_bytes(&path, b"second").unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"second");
    // A file stands where a folder is needed; an unwritable folder fails the same way, but not for root.
    let below = path.join("x");
    let message = atomic::write_bytes(&below, b"y").unwrap_err().to_string();
    assert!(message.starts_with("cannot write") && message.contains("state.bin"), "{message}");
    let message = small(2).save(&below).unwrap_err().to_string();
    assert!(message.starts_with("cannot write"), "{message}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_device_that_is_full_is_reported_as_such() {
    use std::os::unix::fs::PermissionsExt;
    // A real ENOSPC: /dev/full refuses every write.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter_model.safetensors");
    atomic::write_bytes(&path, b"old").unwrap();
    let error = atomic::write_file(&path, |out| {
        let mut full = fs::File::options().write(true).open("/dev/full")?;
        full.write_all(&[1; 4096])?;
        out.write_all(b"new")
    });
    let message = error.unwrap_err().to_string();
    assert!(
        message.contains("No space left") && message.contains("free some space") && message.contains("unchanged"),
        "{message}"
    );
    assert_eq!(fs::read(&path).unwrap(), b"old");
    // Files get the ordinary permissions, not a temporary file's private ones.
    let plain = dir.path().join("plain");
    fs::write(&plain, b"").unwrap();
    let mode = |p: &Path| fs::metadata(p).unwrap().permissions().mode();
    assert_eq!(mode(&path), mode(&plain));
}

#[test]
fn a_folder_is_replaced_as_a_whole_or_not_at_all() {
    let parent = tempfile::tempdir().unwrap();
    let target = parent.path().join("adapter");
    let listing = || {
        let mut names: Vec<_> = fs::read_dir(parent.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    for rank in [2, 3] {
        atomic::replace_dir(&target, |dir| small(rank).save(dir)).unwrap();
        assert_eq!(Adapter::load(&target).unwrap().config.r, rank);
        assert_eq!(listing(), ["adapter"]);
    }
    let failed: Result<(), FormatError> = atomic::replace_dir(&target, |dir| {
        small(4).save(dir)?;
        Err(FormatError::Write { path: dir.join("x"), source: io::ErrorKind::StorageFull.into() })
    });
    assert!(failed.is_err());
    assert_eq!(Adapter::load(&target).unwrap().config.r, 3);
    assert_eq!(listing(), ["adapter"]);
}
