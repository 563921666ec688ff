//! NaN and infinities are named wherever weights are read.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use adapter_io::gguf::{GgmlType, GgufOptions, export_gguf};
use adapter_io::{
    Adapter, AdapterConfig, BnbOptions, Checkpoint, Dtype, FormatError, GptqOptions, HostTensor, MergeBase,
    MergeOptions, ShardedWriter, TensorSpec, gptq_checkpoint, merge_checkpoint, quantize_checkpoint,
};
use common::model;

/// Puts a 16-bit pattern into an element of a tensor.
fn poison(dir: &Path, tensor: &str, element: usize, bits: u16) {
    let path = dir.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let at = {
        let checkpoint = Checkpoint::open(dir).unwrap();
        let view = checkpoint.tensor(tensor).unwrap();
        let needle = view.data.as_ptr() as usize;
        let first = checkpoint.names_in_file_order()[0].to_string();
        let start = checkpoint.tensor(&first).unwrap().data.as_ptr() as usize;
        8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + needle - start
    };
    bytes[at + 2 * element..][..2].copy_from_slice(&bits.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

const NAN: u16 = 0x7fc1;
const MINUS_INFINITY: u16 = 0xff80;
const NORM: &str = "model.layers.0.input_layernorm.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";
const LINEAR: &str = "model.layers.0.mlp.up_proj.weight";

fn assert_named(error: &FormatError, tensor: &str, element: usize, value: &str) {
    assert!(matches!(error, FormatError::NotFinite { .. }), "{error}");
    let message = error.to_string();
    for part in ["model.safetensors", &format!("`{tensor}`"), &format!("element {element}:"), value] {
        assert!(message.contains(part), "no {part}: {message}");
    }
}

fn adapter(value: f32) -> Adapter {
    let config = AdapterConfig { r: 1, ..AdapterConfig::default() };
    let mut adapter = Adapter::new(config);
    let mut put = |key: &str, shape: &[usize]| {
        let mut data = vec![0.5; shape.iter().product()];
        data[shape[1] - 1] = value;
        adapter
            .tensors
            .insert(format!("base_model.model.model.layers.0.{key}"), HostTensor { shape: shape.to_vec(), data });
    };
    put("self_attn.q_proj.lora_A.weight", &[1, 16]);
    put("self_attn.q_proj.lora_B.weight", &[16, 1]);
    adapter
}

#[test]
fn every_conversion_names_them_and_writes_nothing() {
    for (tensor, element, bits, value) in
        [(NORM, 3, NAN, "NaN"), (EMBEDDING, 17, MINUS_INFINITY, "-inf"), (LINEAR, 40, NAN, "NaN")]
    {
        let folder = tempfile::tempdir().unwrap();
        let (base, out) = (folder.path().join("base"), folder.path().join("out"));
        model(&base);
        poison(&base, tensor, element, bits);
        let check = |result: Result<(), FormatError>, element: usize| {
            assert_named(&result.unwrap_err(), tensor, element, value);
            assert!(!out.exists());
        };
        check(Checkpoint::open(&base).unwrap().check_finite(), element);
        let dequantized = MergeBase::Dequantized { config: Default::default(), skip_modules: Vec::new() };
        for mode in [MergeBase::FullPrecision, dequantized] {
            let options = MergeOptions { base: mode, ..MergeOptions::default() };
            check(merge_checkpoint(&base, &adapter(0.5), &out, &options, &mut |_| {}).map(drop), element);
        }
        check(quantize_checkpoint(&base, &out, &BnbOptions::default(), &mut |_| {}).map(drop), element);
        let options = GptqOptions { group_size: Some(8), ..GptqOptions::default() };
        let made = gptq_checkpoint(&base, &out, &options, &[], 1 << 30, |_| Ok(()), &mut |_| {});
        check(made.map(drop), element);
        for kind in [GgmlType::F32, GgmlType::F16, GgmlType::Q8_0] {
            let options = GgufOptions { kind, without_tokenizer: true, ..GgufOptions::default() };
            check(export_gguf(&base, &out, &options, &mut |_| {}).map(drop), element);
        }
    }
}

#[test]
fn finite_weights_pass() {
    let folder = tempfile::tempdir().unwrap();
    let (base, out) = (folder.path().join("base"), folder.path().join("out"));
    model(&base);
    Checkpoint::open(&base).unwrap().check_finite().unwrap();
    merge_checkpoint(&base, &adapter(0.5), &out, &MergeOptions::default(), &mut |_| {}).unwrap();
    quantize_checkpoint(&base, &out, &BnbOptions::default(), &mut |_| {}).unwrap();
    Checkpoint::open(&out).unwrap().check_finite().unwrap();
}

#[test]
fn an_adapter_with_one_is_not_loaded() {
    let folder = tempfile::tempdir().unwrap();
    for (value, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf")] {
        adapter(value).save(folder.path()).unwrap();
        let message = Adapter::load(folder.path()).unwrap_err().to_string();
        for part in ["adapter_model.safetensors", "q_proj.lora_A.weight", "element 15:", text] {
            assert!(message.contains(part), "no {part}: {message}");
        }
    }
    adapter(0.5).save(folder.path()).unwrap();
    Adapter::load(folder.path()).unwrap();
}

/// Packed codes may be stored as floats, and then many of them look like NaN.
#[test]
fn codes_of_4_bit_weights_are_no_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let (base, out) = (folder.path().join("base"), folder.path().join("out"));
    model(&base);
    quantize_checkpoint(&base, &out, &BnbOptions::default(), &mut |_| {}).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    let mut specs = Vec::new();
    let mut data = std::collections::BTreeMap::new();
    for name in checkpoint.names() {
        let view = checkpoint.tensor(name).unwrap();
        let mut bytes = view.data.to_vec();
        let packed = view.dtype == Dtype::U8 && name.ends_with(".weight");
        let (dtype, shape) =
            if packed { (Dtype::BF16, vec![bytes.len() / 2, 1]) } else { (view.dtype, view.shape.clone()) };
        if packed {
            bytes.fill(0xff);
        }
        specs.push(TensorSpec::new(name, dtype, &shape));
        data.insert(name.to_string(), bytes);
    }
    let stored = folder.path().join("stored");
    let write = |data: &std::collections::BTreeMap<String, Vec<u8>>| {
        fs::create_dir_all(&stored).unwrap();
        let mut writer = ShardedWriter::create(&stored, specs.clone(), 1 << 30).unwrap();
        data.iter().for_each(|(name, bytes)| writer.write(name, bytes).unwrap());
        writer.finish().unwrap();
        Checkpoint::open(&stored).unwrap()
    };
    let module = LINEAR.trim_end_matches(".weight");
    let checkpoint = write(&data);
    checkpoint.check_finite().unwrap();
    assert!(checkpoint.quantized(module).unwrap().is_some());
    // Their statistics are.
    let name = format!("{module}.weight.nested_absmax");
    data.get_mut(&name).unwrap()[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let checkpoint = write(&data);
    assert_named(&checkpoint.quantized(module).unwrap_err(), &name, 0, "NaN");
    assert_named(&checkpoint.check_finite().unwrap_err(), &name, 0, "NaN");
}

#[test]
fn what_a_narrower_type_cannot_hold_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (base, out) = (folder.path().join("base"), folder.path().join("out.gguf"));
    model(&base);
    // 2^17 in bf16.
    poison(&base, LINEAR, 5, 0x4800);
    let export = |kind| {
        let options = GgufOptions { kind, without_tokenizer: true, ..GgufOptions::default() };
        export_gguf(&base, &out, &options, &mut |_| {}).map(drop).map_err(|e| e.to_string())
    };
    let message = export(GgmlType::F16).unwrap_err();
    assert!(
        message.contains("blk.0.ffn_up.weight") && message.contains("F16") && message.contains("BF16"),
        "{message}"
    );
    assert!(!out.exists());
    for kind in [GgmlType::BF16, GgmlType::F32] {
        export(kind).unwrap();
    }
}
