//! Files written by PEFT 0.21 and bitsandbytes 0.50.2: read, compared, written back byte for byte.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use adapter_io::{Adapter, AdapterConfig, BnbConfig, Checkpoint, Floats, HostTensor, TargetModules, bnb};
use nf4_quant::{FloatFormat, Metadata, QuantConfig, QuantType, Quantized4bit};

fn reference(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/reference")).join(path)
}

/// The whole reference folder where there is one; testdata/ holds a part of it.
const FULL: &str = "BURN_QLORA_REFERENCE";

fn adapter_dirs() -> Vec<PathBuf> {
    let full = std::env::var_os(FULL).map(PathBuf::from);
    let mut dirs: Vec<PathBuf> = ["adapters", "qlora"]
        .iter()
        .flat_map(|d| [Some(reference(d)), full.as_ref().map(|f| f.join(d))])
        .flatten()
        .flat_map(|d| fs::read_dir(d).unwrap())
        .map(|e| e.unwrap().path())
        .filter(|p| p.join("adapter_config.json").exists())
        .collect();
    dirs.sort();
    assert!(dirs.len() >= 7, "{dirs:?}");
    dirs
}

#[test]
fn peft_adapters_survive_load_and_save_byte_for_byte() {
    for dir in adapter_dirs() {
        let adapter = Adapter::load(&dir).unwrap();
        assert!(adapter.config.extra.is_empty(), "{dir:?}: {:?}", adapter.config.extra);
        assert!(!adapter.modules().is_empty(), "{dir:?}");
        let out = tempfile::tempdir().unwrap();
        adapter.save(&out.path().join("new")).unwrap();
        for name in ["adapter_config.json", "adapter_model.safetensors"] {
            let (theirs, ours) =
                (fs::read(dir.join(name)).unwrap(), fs::read(out.path().join("new").join(name)).unwrap());
            assert!(theirs == ours, "{}: {name} differs", dir.display());
        }
    }
}

#[test]
fn adapter_ranks_and_scalings_follow_the_config() {
    let patterns = Adapter::load(&reference("adapters/patterns")).unwrap();
    let lora = |module: &str| patterns.lora(module).unwrap();
    let config = &patterns.config;
    for module in patterns.modules() {
        let (a, b) = lora(&module);
        assert_eq!(a.shape[0], config.rank_for(&module).unwrap());
        assert_eq!(b.shape[1], config.rank_for(&module).unwrap());
    }
    assert_eq!(config.rank_for("model.layers.3.self_attn.q_proj").unwrap(), 6);
    assert_eq!(config.rank_for("model.layers.13.self_attn.q_proj").unwrap(), 4);
    assert_eq!(config.scaling_for("model.layers.0.mlp.up_proj").unwrap(), 8.0);
    assert_eq!(config.scaling_for("model.layers.0.self_attn.k_proj").unwrap(), 4.0);
    let rslora = AdapterConfig::load(&reference("adapters/rslora")).unwrap();
    assert_eq!(rslora.scaling_for("model.layers.0.self_attn.q_proj").unwrap(), 8.0 / 8f64.sqrt());
    let regex = AdapterConfig::load(&reference("adapters/regex")).unwrap();
    assert!(matches!(regex.target_modules, Some(TargetModules::Pattern(_))));
    assert!(regex.beyond_plain_lora().is_empty());
}

#[test]
fn quantized_checkpoint_equals_our_own_quantization_of_the_original() {
    let theirs = Checkpoint::open(&reference("tiny-llama-bnb-4bit")).unwrap();
    let original = Checkpoint::open(&reference("tiny-llama")).unwrap();
    let modules = theirs.quantized_modules();
    // Seven projections of six layers.
    assert_eq!(modules.len(), 42);
    for module in modules {
        let quantized = theirs.quantized(module).unwrap().unwrap();
        let view = original.tensor(&format!("{module}.weight")).unwrap();
        let Floats::BF16(weight) = view.floats().unwrap() else { panic!("{module} is not bfloat16") };
        let ours = Quantized4bit::quantize(&weight, &view.shape, &QuantConfig::default()).unwrap();
        assert_eq!(ours.codes, quantized.codes, "{module}");
        assert_eq!(ours.state.shape, quantized.state.shape);
        assert_eq!(quantized.state.dtype, FloatFormat::BF16);
        // The mean inside double quantization is summed in another order there, so its last bit may
        // differ, and with it each nested maximum and each absmax by a last bit: three of 2^-23.
        for (a, b) in ours.state.absmax_f32().iter().zip(quantized.state.absmax_f32()) {
            assert!((a - b).abs() <= 3.6e-7 * b.abs(), "{module}: {a} {b}");
        }
    }
    assert!(theirs.quantized("model.embed_tokens").unwrap().is_none());
}

#[test]
fn quantized_weights_are_written_as_bitsandbytes_writes_them() {
    for (dir, file) in [
        ("tiny-llama-bnb-4bit", "model.safetensors"),
        ("bnb", "quantize_4bit.safetensors"),
        ("bnb", "matmul_4bit.safetensors"),
    ] {
        let checkpoint = Checkpoint::open_file(&reference(dir).join(file)).unwrap();
        let modules = checkpoint.quantized_modules();
        assert!(!modules.is_empty());
        for module in modules {
            let weight = match checkpoint.quantized(module) {
                Ok(weight) => weight.unwrap(),
                Err(e) => panic!("{module}: {e}"),
            };
            let tensors = bnb::to_tensors(module, &weight);
            assert_eq!(
                tensors.len(),
                checkpoint.names().filter(|n| n.starts_with(&format!("{module}.weight"))).count()
            );
            for (spec, bytes) in tensors {
                let view = checkpoint.tensor(&spec.name).unwrap();
                assert_eq!((view.dtype, &view.shape), (spec.dtype, &spec.shape), "{}", spec.name);
                if view.data != bytes {
                    // Only the decimal spelling of the same number may differ.
                    let parse = |json: &[u8]| Metadata::parse(std::str::from_utf8(json).unwrap()).unwrap();
                    assert!(spec.name.contains("quant_state"), "{} differs", spec.name);
                    assert_eq!(parse(view.data), parse(&bytes), "{}", spec.name);
                }
            }
        }
    }
}

#[test]
fn quantization_config_is_read() {
    let path = reference("tiny-llama-bnb-4bit/config.json");
    let config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let expected = BnbConfig {
        quant_type: QuantType::Nf4,
        double_quant: true,
        compute_dtype: FloatFormat::BF16,
        quant_storage: "uint8".into(),
        skip_modules: vec![],
    };
    assert_eq!(BnbConfig::from_config(&config, &path).unwrap(), Some(expected));
    let plain = serde_json::from_slice(&fs::read(reference("tiny-llama/config.json")).unwrap()).unwrap();
    assert_eq!(BnbConfig::from_config(&plain, &path).unwrap(), None);
}

/// The definition, in 64-bit floats.
fn naive_delta(a: &HostTensor, b: &HostTensor, scaling: f32) -> Vec<f64> {
    let (rank, columns) = (a.shape[0], a.shape[1]);
    let mut out = vec![0.0; b.shape[0] * columns];
    for (row, out) in out.chunks_mut(columns).enumerate() {
        for (column, out) in out.iter_mut().enumerate() {
            for k in 0..rank {
                *out += f64::from(b.data[row * rank + k]) * f64::from(a.data[k * columns + column]);
            }
            *out *= f64::from(scaling);
        }
    }
    out
}

#[test]
fn merge_adds_the_update_and_rounds_once() {
    let adapter = Adapter::load(&reference("adapters/rslora")).unwrap();
    let base = Checkpoint::open(&reference("tiny-llama")).unwrap();
    for module in adapter.modules() {
        let (a, b) = adapter.lora(&module).unwrap();
        let scaling = adapter.config.scaling_for(&module).unwrap() as f32;
        let part = adapter.lora_module(&module).unwrap().unwrap();
        let delta = part.delta().unwrap();
        let exact = naive_delta(a, b, scaling);
        assert_eq!(delta.shape, [b.shape[0], a.shape[1]]);
        for (ours, exact) in delta.data.iter().zip(&exact) {
            // Eight products of magnitude around 0.05 accumulated in f32: 8 * 2^-24 of their size.
            assert!((f64::from(*ours) - exact).abs() < 1e-6, "{module}: {ours} {exact}");
        }
        let view = base.tensor(&format!("{module}.weight")).unwrap();
        let mut merged = view.to_f32_vec().unwrap();
        let original = merged.clone();
        let largest = part.merge_into(&mut merged, &view.shape).unwrap().largest;
        let Floats::BF16(half) = view.floats().unwrap() else { panic!("{module} is not bfloat16") };
        let mut half = half.into_owned();
        part.merge_into(&mut half, &view.shape).unwrap();
        let mut expected_largest = 0f32;
        for i in 0..merged.len() {
            assert_eq!(merged[i], original[i] + delta.data[i]);
            // One rounding of the f32 sum, not a sum of rounded terms.
            assert_eq!(half[i], half::bf16::from_f32(merged[i]));
            expected_largest = expected_largest.max((merged[i] - original[i]).abs());
        }
        assert_eq!(largest, expected_largest);
        assert!(largest > 0.0);
    }
}
