//! Weights in other storages than plain floats: the values that the libraries of these storages give, bit for bit, and
//! what is said of files that hold none.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use adapter_io::finite::first_not_finite;
use adapter_io::listing::Listing;
use adapter_io::{
    Adapter, AdapterConfig, BnbOptions, Checkpoint, Dtype, FormatError, GptqOptions, HostTensor, MergeOptions,
    ShardedWriter, TargetModules, TensorSpec, gptq_checkpoint, merge_checkpoint, quantize_checkpoint,
};
use proptest::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use test_support::noise;

fn recorded() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference/sources")
}

fn cases() -> Vec<String> {
    let names = fs::read_dir(recorded()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.collect();
    names.sort();
    assert!(names.len() >= 14);
    names
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// The recorded tensors of a case, in memory.
fn tensors(case: &str, file: &str) -> Tensors {
    let file = Checkpoint::open_file(&recorded().join(case).join(file)).unwrap();
    let entry = |name: &str| {
        let view = file.tensor(name).unwrap();
        (name.to_string(), (view.dtype, view.shape, view.data.to_vec()))
    };
    file.names().map(entry).collect()
}

fn write(dir: &Path, tensors: &Tensors) {
    let specs = tensors.iter().map(|(name, (dtype, shape, _))| TensorSpec::new(name, *dtype, shape)).collect();
    let mut writer = ShardedWriter::create(dir, specs, u64::MAX).unwrap();
    tensors.iter().for_each(|(name, (_, _, bytes))| writer.write(name, bytes).unwrap());
    writer.finish().unwrap();
}

/// A checkpoint of a case, with `change` made to its configuration and tensors.
fn changed(
    case: &str,
    change: impl FnOnce(&mut Value, &mut Tensors),
) -> (tempfile::TempDir, Result<Checkpoint, FormatError>) {
    let dir = tempfile::tempdir().unwrap();
    let mut config = json_of(&recorded().join(case).join("quantization_config.json"));
    let mut tensors = tensors(case, "coded.safetensors");
    change(&mut config, &mut tensors);
    write(dir.path(), &tensors);
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let opened = Checkpoint::open(dir.path());
    (dir, opened)
}

fn open(case: &str) -> (tempfile::TempDir, Checkpoint) {
    let (dir, opened) = changed(case, |_, _| {});
    (dir, opened.unwrap_or_else(|error| panic!("{case}: {error}")))
}

#[test]
fn values_are_the_libraries_own_bit_for_bit() {
    for case in cases() {
        let (_dir, checkpoint) = open(&case);
        let facts = json_of(&recorded().join(&case).join("decoded.json"));
        let names: Vec<&str> = facts.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), names, "{case}");
        let mut in_file_order = checkpoint.names_in_file_order();
        in_file_order.sort_unstable();
        assert_eq!(in_file_order, names, "{case}");
        let values = tensors(&case, "decoded.safetensors");
        for (name, fact) in facts.as_object().unwrap() {
            let tensor = checkpoint.dense(name).unwrap();
            let dtype = match fact["dtype"].as_str().unwrap() {
                "float16" => Dtype::F16,
                "bfloat16" => Dtype::BF16,
                other => panic!("{other}"),
            };
            assert_eq!((tensor.dtype, json!(tensor.shape)), (dtype, fact["shape"].clone()), "{case} {name}");
            let bytes = tensor.expect_finite().unwrap().bytes().unwrap();
            if let Some((_, _, expected)) = values.get(name) {
                let differs = bytes.chunks(2).zip(expected.chunks(2)).position(|(a, b)| a != b);
                assert_eq!(differs, None, "{case} {name}: the first element that differs");
            }
            let sum: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(json!(sum), fact["sha256"], "{case} {name}");
            assert!(checkpoint.contains(name) && checkpoint.tensor(name).map_or(true, |view| view.floats().is_err()));
            checkpoint.release(name);
        }
    }
}

/// Slices of any size from anywhere, and parts of stacks.
#[test]
fn slices_are_parts_of_the_whole() {
    for case in cases() {
        let (_dir, checkpoint) = open(&case);
        for name in checkpoint.names() {
            let tensor = checkpoint.dense(name).unwrap();
            let whole = tensor.bytes().unwrap();
            let elements = whole.len() / 2;
            for (start, len) in [(0, 1), (1, 2), (3, 7), (31, 34), (elements - 5, 5), (63, elements - 64), (40, 0)] {
                let mut part = vec![0; 2 * len];
                tensor.read(2 * start, &mut part).unwrap();
                assert!(part == whole[2 * start..2 * (start + len)], "{case} {name}: {len} from {start}");
            }
            assert!(
                tensor.read(whole.len() - 2, &mut [0; 4]).is_err() && tensor.read(usize::MAX, &mut [0; 2]).is_err()
            );
            let rows = tensor.shape[0];
            let mut shape = tensor.shape.clone();
            shape[0] = 1;
            let last = tensor.part(rows - 1, rows, &shape).unwrap().bytes().unwrap();
            assert!(*last == whole[whole.len() / rows * (rows - 1)..], "{case} {name}");
            assert!(tensor.part(rows, rows, &shape).is_none() && tensor.part(0, rows + 1, &shape).is_none());
            let mut pieces = Vec::new();
            let collected = tensor.for_each_piece(|piece| {
                pieces.extend_from_slice(piece);
                Ok::<_, FormatError>(())
            });
            collected.unwrap();
            assert!(pieces == *whole);
        }
    }
}

#[test]
fn what_is_listed_is_what_the_weights_are() {
    for (case, dtype) in [
        ("awq", "AWQ"),
        ("fp8-blocks", "FP8"),
        ("gptq", "GPTQ"),
        ("mxfp4-gpt-oss", "MXFP4"),
        ("compressed-tensors-nvfp4", "NVFP4"),
    ] {
        let (dir, checkpoint) = open(case);
        let listing = Listing::new(&checkpoint);
        assert!(listing.tensors().iter().all(|tensor| tensor.dtype == dtype), "{case}");
        assert_eq!(checkpoint.storages(), [dtype]);
        // What only says how activations are quantized belongs to no weight.
        assert!(listing.bytes() <= checkpoint.total_bytes() && listing.bytes() > 0, "{case}");
        checkpoint.check_finite().unwrap();
        assert!(fs::metadata(dir.path().join("model.safetensors")).unwrap().len() > listing.bytes());
    }
}

const GATE: &str = "model.layers.0.mlp.gate_proj";

fn reshape(tensors: &mut Tensors, name: &str, shape: &[usize]) {
    let tensor = tensors.get_mut(name).unwrap();
    let size = tensor.2.len() / tensor.1.iter().product::<usize>();
    tensor.1 = shape.to_vec();
    tensor.2.resize(size * shape.iter().product::<usize>(), 0);
}

/// Each with the file, the tensor or the field, and what to do.
#[test]
fn what_can_not_be_is_refused_by_name() {
    type Change = Box<dyn FnOnce(&mut Value, &mut Tensors)>;
    let config = |key: &'static str, value: Value| -> Change {
        Box::new(move |config: &mut Value, _: &mut Tensors| config["quantization_config"][key] = value)
    };
    let without = |part: &'static str| -> Change {
        Box::new(move |_: &mut Value, tensors: &mut Tensors| drop(tensors.remove(&format!("{GATE}{part}")).unwrap()))
    };
    let shape = |part: &'static str, shape: &'static [usize]| -> Change {
        Box::new(move |_: &mut Value, tensors: &mut Tensors| reshape(tensors, &format!("{GATE}{part}"), shape))
    };
    let cases: Vec<(&str, Change, &[&str])> = vec![
        ("fp8-blocks", without(".weight_scale_inv"), &["gate_proj.weight`", "no scales", "download"]),
        (
            "fp8-blocks",
            shape(".weight_scale_inv", &[2, 4]),
            &["gate_proj.weight_scale_inv", "[2, 4]", "expected [1, 4]"],
        ),
        ("fp8-blocks", config("weight_block_size", json!([64])), &["weight_block_size", "config.json"]),
        ("fp8-blocks", config("weight_block_size", json!([16, 16])), &["weight_scale_inv", "expected"]),
        ("compressed-tensors-fp8", shape(".weight_scale", &[7, 1]), &["gate_proj.weight_scale", "[7, 1]"]),
        ("compressed-tensors-nvfp4", without(".weight_global_scale"), &["gate_proj.weight_global_scale", "not there"]),
        ("compressed-tensors-nvfp4", shape(".weight_scale", &[32, 3]), &["gate_proj.weight_scale", "expected [32, 4]"]),
        ("compressed-tensors-mxfp4", without(".weight_scale"), &["gate_proj.weight_scale", "not there"]),
        ("compressed-tensors-int4", shape(".weight_packed", &[32, 7]), &["gate_proj.weight_packed", "4 or 8 bits"]),
        ("compressed-tensors-int4", without(".weight_shape"), &["gate_proj.weight_shape", "not there"]),
        ("compressed-tensors-int4", config("format", json!("marlin-24")), &["marlin-24", "original checkpoint"]),
        ("gptq", without(".scales"), &["gate_proj.scales", "not there", "incomplete"]),
        ("gptq", shape(".scales", &[3, 32]), &["gate_proj.qzeros", "[3, 4]"]),
        ("gptq", shape(".qzeros", &[2, 3]), &["zero points [2, 3]", "4 or 8 bits"]),
        ("gptq", config("group_size", json!(16)), &["down_proj.scales", "expected [2, 64]"]),
        ("gptq", config("group_size", json!("many")), &["quantization_config.group_size", "-1"]),
        ("gptq", config("bits", json!(3)), &["quantization_config.bits", "`3`", "original checkpoint"]),
        ("gptq", config("checkpoint_format", json!("marlin")), &["checkpoint_format", "marlin"]),
        ("gptq", config("desc_act", json!("auto")), &["quantization_config.desc_act", "true or false"]),
        ("awq", config("version", json!("gemv")), &["quantization_config.version", "gemv"]),
        ("awq", shape(".qweight", &[64, 5]), &["gate_proj.qweight", "expected [64, 4]"]),
        ("awq", config("quant_method", json!("hqq")), &["quant_method", "`hqq` is not decoded", "original checkpoint"]),
        ("fp8-blocks", config("quant_method", json!("fbgemm_fp8")), &["`fbgemm_fp8` is not decoded"]),
    ];
    for (case, change, words) in cases {
        let (dir, opened) = changed(case, change);
        let message = opened.err().unwrap_or_else(|| panic!("{case} {words:?} is opened")).to_string();
        for word in words.iter().chain([&dir.path().to_str().unwrap()]) {
            assert!(message.contains(word), "{case} {word}: {message}");
        }
    }
    // gpt-oss's.
    let (_dir, opened) = changed("mxfp4-gpt-oss", |_, tensors| {
        reshape(tensors, "model.layers.0.mlp.experts.gate_up_proj_scales", &[2, 10, 4]);
    });
    assert!(opened.unwrap_err().to_string().contains("gate_up_proj_scales"));
    // A group that is not there is found where it is used.
    let (_dir, opened) = changed("gptq-act-order", |_, tensors| {
        tensors.get_mut(&format!("{GATE}.g_idx")).unwrap().2[20] = 4;
    });
    let message = opened.unwrap().dense(&format!("{GATE}.weight")).unwrap().bytes().unwrap_err().to_string();
    assert!(message.contains("gate_proj.g_idx") && message.contains("input 5 is in group 4"), "{message}");
}

#[test]
fn codes_and_scales_that_are_no_numbers_are_named_with_the_weight() {
    let weight = format!("{GATE}.weight");
    for (case, part, at, bytes, element) in [
        ("fp8-blocks", ".weight", 70, &[0x7f_u8][..], 70),
        ("fp8-blocks", ".weight_scale_inv", 0, &[0, 0, 0xc0, 0x7f], 0),
        ("compressed-tensors-mxfp4", ".weight_scale", 1, &[255], 32),
        ("gptq", ".scales", 2, &[0, 0x7c], 64),
        ("awq", ".scales", 2, &[0, 0x7e], 64),
    ] {
        let (dir, opened) = changed(case, |_, tensors| {
            tensors.get_mut(&format!("{GATE}{part}")).unwrap().2[at..at + bytes.len()].copy_from_slice(bytes);
        });
        let checkpoint = opened.unwrap();
        let tensor = checkpoint.dense(&weight).unwrap();
        let Err(FormatError::NotFinite { tensor: name, index, .. }) = tensor.expect_finite() else { panic!("{case}") };
        assert_eq!((name, index), (weight.clone(), element), "{case}{part}");
        let bytes = tensor.bytes().unwrap();
        assert_eq!(first_not_finite(tensor.dtype, &bytes).unwrap().0, element);
        // Nothing is written of it.
        let out = dir.path().join("out");
        let made = quantize_checkpoint(dir.path(), &out, &BnbOptions::default(), &mut |_| {});
        assert!(made.unwrap_err().to_string().contains("gate_proj") && !out.exists());
    }
}

/// Of experts that lie there and of those that are decoded, in slices that begin and end anywhere.
#[test]
fn columns_of_experts_come_as_rows() {
    let (_dir, coded) = open("mxfp4-gpt-oss");
    let stored = Checkpoint::open_file(&recorded().join("mxfp4-gpt-oss/decoded.safetensors")).unwrap();
    let name = "model.layers.0.mlp.experts.gate_up_proj";
    let whole = stored.dense(name).unwrap().bytes().unwrap().into_owned();
    let &[experts, rows, columns] = &stored.dense(name).unwrap().shape[..] else { panic!("experts are stacked") };
    for (checkpoint, expert, step) in [(&coded, 0, 2), (&coded, 1, 1), (&stored, 0, 5), (&stored, 1, 2)] {
        let tensor = checkpoint.dense(name).unwrap();
        let matrix = tensor.part(expert, experts, &[rows, columns]).unwrap();
        assert!(tensor.turned(0, 1).is_none() && matrix.turned(0, 3).is_none() && matrix.turned(2, 2).is_none());
        for first in 0..step {
            let turned = matrix.turned(first, step).unwrap();
            assert_eq!(turned.shape, [columns / step, rows]);
            let at = |i: usize| (expert * rows + i % rows) * columns + first + step * (i / rows);
            let elements = columns / step * rows;
            let expected: Vec<u8> = (0..elements).flat_map(|i| whole[2 * at(i)..][..2].to_vec()).collect();
            assert!(*turned.bytes().unwrap() == expected, "expert {expert}, column {first} of {step}");
            for (start, end) in [(1, 2), (31, 33), (rows - 1, rows + 40), (5, elements - 3), (elements - 1, elements)] {
                let mut part = vec![0; 2 * (end - start)];
                turned.read(2 * start, &mut part).unwrap();
                assert!(part == expected[2 * start..2 * end], "elements {start} to {end}");
            }
            assert!(turned.read(2 * elements, &mut [0; 2]).is_err());
            turned.expect_finite().unwrap();
        }
    }
}

/// A configuration that was left on weights in 16 bits says nothing, whatever it says.
#[test]
fn the_tensors_decide() {
    let methods = ["hqq", "gptq", "fp8", "mxfp4", "awq", "compressed-tensors", "bitsandbytes", "of tomorrow"];
    let (_dir, checkpoint) = open("awq");
    let name = format!("{GATE}.weight");
    let tensor = checkpoint.dense(&name).unwrap();
    let dense: Tensors =
        [(name.clone(), (tensor.dtype, tensor.shape.clone(), tensor.bytes().unwrap().into_owned()))].into();
    for method in methods {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &dense);
        let config = json!({"quantization_config": {"quant_method": method, "bits": 3}});
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let plain = Checkpoint::open(dir.path()).unwrap();
        assert!(plain.dense(&name).unwrap().bytes().unwrap() == dense[&name].2 && plain.storages().is_empty());
    }
    // Modules that were not converted lie beside those that were.
    for case in ["fp8-blocks", "gptq", "compressed-tensors-int4"] {
        let (_dir, opened) = changed(case, |_, tensors| {
            tensors.insert("lm_head.weight".into(), (Dtype::BF16, vec![2, 2], vec![0; 8]));
        });
        let checkpoint = opened.unwrap();
        assert_eq!(checkpoint.dense("lm_head.weight").unwrap().bytes().unwrap().as_ref(), [0; 8], "{case}");
    }
    // GPTQ's first programs wrote a file of their own.
    let (dir, opened) =
        changed("gptq", |config, _| drop(config.as_object_mut().unwrap().remove("quantization_config")));
    let expected = tensors("gptq", "decoded.safetensors")[&name].2.clone();
    assert!(opened.unwrap().dense(&name).unwrap().bytes().unwrap() == expected);
    let old = json!({"bits": 4, "group_size": 16, "desc_act": false});
    fs::write(dir.path().join("quantize_config.json"), old.to_string()).unwrap();
    assert!(Checkpoint::open(dir.path()).unwrap_err().to_string().contains("expected [2, 64]"));
}

/// What is made of a checkpoint is what is made of its dense decoding, to the byte.
#[test]
fn conversions_of_coded_weights_are_those_of_dense_ones() {
    for case in cases().iter().filter(|case| *case != "mxfp4-gpt-oss") {
        let (coded_dir, checkpoint) = changed(case, |config, tensors| {
            tensors.insert("model.norm.weight".into(), (Dtype::BF16, vec![4], vec![0, 63, 0, 63, 0, 63, 0, 63]));
            tensors.retain(|name, _| !name.contains(".odd."));
            config["model_type"] = json!("x");
        });
        let checkpoint = checkpoint.unwrap();
        let dense_dir = tempfile::tempdir().unwrap();
        let specs = checkpoint.names().map(|name| {
            let tensor = checkpoint.dense(name).unwrap();
            TensorSpec::new(name, tensor.dtype, &tensor.shape)
        });
        let mut writer = ShardedWriter::create(dense_dir.path(), specs.collect(), u64::MAX).unwrap();
        checkpoint.names().for_each(|name| writer.write_tensor(name, &checkpoint.dense(name).unwrap()).unwrap());
        writer.finish().unwrap();
        let mut config = json_of(&coded_dir.path().join("config.json"));
        config.as_object_mut().unwrap().remove("quantization_config");
        fs::write(dense_dir.path().join("config.json"), config.to_string()).unwrap();
        assert_eq!(checkpoint.dense_bytes(), Checkpoint::open(dense_dir.path()).unwrap().total_bytes());

        let targets = TargetModules::List(vec!["gate_proj".into()]);
        let config = AdapterConfig { r: 2, lora_alpha: 4.0, target_modules: Some(targets), ..AdapterConfig::default() };
        let mut adapter = Adapter::new(config);
        for (seed, factor, shape) in [(1, "lora_A", [2, 64]), (2, "lora_B", [32, 2])] {
            let key = format!("base_model.model.{GATE}.{factor}.weight");
            let tensor = HostTensor::new(&shape, noise(seed, shape[0] * shape[1])).unwrap();
            adapter.tensors.insert(key, tensor);
        }
        let made = |dir: &Path, what: &str| {
            let out = dir.join(what);
            match what {
                "merged" => drop(merge_checkpoint(dir, &adapter, &out, &MergeOptions::default(), &mut |_| {}).unwrap()),
                "nf4" => drop(quantize_checkpoint(dir, &out, &BnbOptions::default(), &mut |_| {}).unwrap()),
                _ => {
                    let options = GptqOptions { group_size: Some(32), ..GptqOptions::default() };
                    let calibrate = |_: &mut adapter_io::GptqCheckpoint<'_>| Ok::<_, FormatError>(());
                    drop(gptq_checkpoint(dir, &out, &options, &[], u64::MAX, calibrate, &mut |_| {}).unwrap());
                }
            }
            assert!(
                ["merged"].contains(&what) != json_of(&out.join("config.json")).get("quantization_config").is_some()
            );
            fs::read(out.join("model.safetensors")).unwrap()
        };
        for what in ["merged", "nf4", "gptq-of-ours"] {
            assert!(made(coded_dir.path(), what) == made(dense_dir.path(), what), "{case}: {what}");
        }
        // What we write as GPTQ is read back, and is what it was rounded to.
        let ours = Checkpoint::open(&coded_dir.path().join("gptq-of-ours")).unwrap();
        let name = format!("{GATE}.weight");
        assert_eq!(ours.storages(), ["GPTQ"]);
        let [before, after] = [&checkpoint, &ours].map(|c| c.dense(&name).unwrap().to_f32_vec().unwrap());
        let largest = before.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
        // Half a step is a fifteenth of a group's largest, and a little more for the rounding of its scale.
        assert!(before.iter().zip(&after).all(|(x, y)| (x - y).abs() < largest / 14.0), "{case}");
    }
}

/// A tensor of a case becomes another: of any type and shape, or of no name that is known.
fn broken(case: &str, tensor: usize, dtype: usize, shape: &[usize], gone: bool) -> Result<(), FormatError> {
    let (_dir, opened) = changed(case, |_, tensors| {
        let name = tensors.keys().nth(tensor % tensors.len()).unwrap().clone();
        let (_, old_shape, bytes) = tensors.remove(&name).unwrap();
        if gone {
            return;
        }
        let types =
            [Dtype::U8, Dtype::I8, Dtype::I32, Dtype::I64, Dtype::F8_E4M3, Dtype::F8_E8M0, Dtype::F16, Dtype::F32];
        let dtype = types[dtype % types.len()];
        let shape = if shape.len() < 4 { shape.to_vec() } else { old_shape };
        let size = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        let bytes = bytes.into_iter().cycle().take(size).collect();
        tensors.insert(name, (dtype, shape, bytes));
    });
    let checkpoint = opened?;
    let mut first = Ok(());
    for name in checkpoint.names() {
        let tensor = checkpoint.dense(name)?;
        first = first.and(tensor.bytes().and_then(|bytes| {
            assert_eq!(bytes.len(), tensor.num_bytes());
            tensor.expect_finite().map(drop)
        }));
    }
    first
}

proptest! {
    #[test]
    fn no_tensors_make_decoding_panic(
        case in 0_usize..14, tensor in 0_usize..40, dtype in 0_usize..8,
        shape in prop::collection::vec(0_usize..70, 0..5), gone in prop::bool::weighted(0.1),
    ) {
        let case = &cases()[case];
        if let Err(error) = broken(case, tensor, dtype, &shape, gone) {
            prop_assert!(error.to_string().len() > 40);
        }
    }
}
