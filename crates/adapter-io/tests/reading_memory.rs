//! What reading takes: a slice of what comes of a tensor, and the pages of one tensor's codes, which the system may take back, however large
//! tensors are and however many there are. All memory of the process is counted, mapped pages too, so that this file has one test.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;

use adapter_io::{BnbOptions, Checkpoint, Dtype, ShardedWriter, TensorSpec, quantize_checkpoint};
use serde_json::{Value, json};

const ROWS: usize = 8192;
const COLUMNS: usize = 4096;
const MIB: usize = 1 << 20;
/// What tables and threads take beside what is asked for, of which each has a chunk of half a MiB: 1 MiB is measured on two cores.
fn slack() -> usize {
    (8 + std::thread::available_parallelism().map_or(1, usize::from)) * MIB
}

/// The most that `work` holds beyond what the process held before.
fn peak_of<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let line = |key: &str| {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line =
            status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim().trim_end_matches(" kB").to_string();
        line.parse::<usize>().unwrap() << 10
    };
    // The peak begins anew.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let before = line("VmRSS:");
    let result = work();
    (result, line("VmHWM:").saturating_sub(before))
}

/// Bytes that differ, none of which is a NaN of 8 bits.
fn bytes(count: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let next = |state: &mut u64| {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*state >> 33) as u8 & 0xbf
    };
    (0..count).map(|_| next(&mut state)).collect()
}

/// A checkpoint with some weights of 8192 x 4096: 64 MiB each when they are decoded.
fn checkpoint(dir: &Path, weights: usize, config: &Value, parts: &[(&str, Dtype, &[usize])]) {
    let names =
        |module: usize| parts.iter().map(move |part| (format!("model.layers.{module}.mlp.up_proj.{}", part.0), part));
    let specs =
        (0..weights).flat_map(names).map(|(name, (_, dtype, shape))| TensorSpec::new(&name, *dtype, shape)).collect();
    let mut writer = ShardedWriter::create(dir, specs, u64::MAX).unwrap();
    for (name, (_, dtype, shape)) in (0..weights).flat_map(names) {
        let count = shape.iter().product::<usize>();
        let data = match dtype {
            Dtype::F32 => (0..count).flat_map(|i| (0.001 + i as f32 * 1e-7).to_le_bytes()).collect(),
            Dtype::F16 => (0..count).flat_map(|_| 0x2000u16.to_le_bytes()).collect(),
            dtype => bytes(count * dtype.bitsize() / 8, name.len() as u64),
        };
        writer.write(&name, &data).unwrap();
    }
    writer.finish().unwrap();
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

#[test]
fn reading_holds_a_slice_and_the_pages_of_one_weight() {
    let fp8 = json!({"model_type": "llama", "dtype": "bfloat16", "quantization_config":
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}});
    let gptq = json!({"model_type": "llama", "dtype": "float16", "quantization_config":
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false, "sym": true}});
    let of_fp8: &[(&str, Dtype, &[usize])] =
        &[("weight", Dtype::F8_E4M3, &[ROWS, COLUMNS]), ("weight_scale_inv", Dtype::F32, &[ROWS / 128, COLUMNS / 128])];
    let of_gptq: &[(&str, Dtype, &[usize])] = &[
        ("qweight", Dtype::I32, &[COLUMNS / 8, ROWS]),
        ("qzeros", Dtype::I32, &[COLUMNS / 128, ROWS / 8]),
        ("scales", Dtype::F16, &[COLUMNS / 128, ROWS]),
    ];
    for (config, parts) in [(&fp8, of_fp8), (&gptq, of_gptq)] {
        let dir = tempfile::tempdir().unwrap();
        let kind = config["quantization_config"]["quant_method"].as_str().unwrap();
        checkpoint(dir.path(), 3, config, parts);
        let open = || Checkpoint::open(dir.path()).unwrap();
        let dense = 2 * ROWS * COLUMNS;
        let codes = if kind == "fp8" { dense / 2 } else { dense / 4 };
        let within = |what: &str, (_, peak): ((), usize), bound: usize| {
            assert!(
                peak <= bound + slack(),
                "{kind}, {what}: {} MiB, {} are allowed",
                peak / MIB,
                (bound + slack()) / MIB
            );
        };

        // All three weights, 192 MiB of values, through one slice.
        let slices = peak_of(|| {
            let checkpoint = open();
            let mut slice = vec![0; MIB];
            for name in checkpoint.names() {
                let tensor = checkpoint.dense(name).unwrap();
                assert_eq!(tensor.num_bytes(), dense);
                (0..dense).step_by(MIB).for_each(|start| tensor.read_all(start, &mut slice).unwrap());
                checkpoint.release(name);
            }
        });
        within("in slices", slices, codes + MIB);
        let looked_at = peak_of(|| {
            let checkpoint = open();
            for name in checkpoint.names() {
                checkpoint.dense(name).unwrap().expect_finite().unwrap();
                checkpoint.release(name);
            }
        });
        within("looked at", looked_at, codes + 2 * MIB);
        let whole = peak_of(|| {
            let checkpoint = open();
            for name in checkpoint.names() {
                assert_eq!(checkpoint.dense(name).unwrap().bytes().unwrap().len(), dense);
                checkpoint.release(name);
            }
        });
        within("weight by weight", whole, codes + dense);

        // A weight and its 4 bits; of a conversion of all of them no more.
        let out = dir.path().join("out");
        let converted = peak_of(|| {
            quantize_checkpoint(dir.path(), &out, &BnbOptions::default(), &mut |_| {}).unwrap();
        });
        within("converted to 4 bits", converted, codes + dense + dense / 4 + dense / 8);
    }
}
