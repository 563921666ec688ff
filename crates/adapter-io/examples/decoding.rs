//! How fast weights in other storages than plain floats are decoded: one random weight of each, from the page cache into
//! memory, on all processor cores.
//!
//! ```sh
//! cargo run --release -p adapter-io --example decoding [-- ROWS COLUMNS]
//! ```
#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a program that measures")]

use std::fs;
use std::time::Instant;

use adapter_io::{Checkpoint, Dtype, ShardedWriter, TensorSpec};
use serde_json::{Value, json};

/// How often; the fastest is shown.
const RUNS: usize = 7;

fn main() {
    let sizes: Vec<usize> = std::env::args().skip(1).map(|size| size.parse().unwrap()).collect();
    let [n, k] = match sizes[..] {
        [n, k] => [n, k],
        _ => [14336, 4096],
    };
    let part = |name: &'static str, dtype, shape: &[usize]| TensorSpec::new(format!("m.{name}"), dtype, shape);
    let (f32, bf16, f16, i32, u8, f8) = (Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::I32, Dtype::U8, Dtype::F8_E4M3);
    let method = |name: &str| json!({"quant_method": name, "weight_block_size": [128, 128], "group_size": 128});
    let cases: Vec<(&str, Value, Vec<TensorSpec>)> = vec![
        ("BF16", Value::Null, vec![part("weight", bf16, &[n, k])]),
        (
            "FP8, blocks of 128 x 128",
            method("fp8"),
            vec![part("weight", f8, &[n, k]), part("weight_scale_inv", f32, &[n.div_ceil(128), k.div_ceil(128)])],
        ),
        (
            "FP8, rows",
            method("compressed-tensors"),
            vec![part("weight", f8, &[n, k]), part("weight_scale", bf16, &[n, 1])],
        ),
        ("MXFP8", method("mxfp8"), vec![part("weight", f8, &[n, k]), part("weight_scale_inv", u8, &[n, k / 32])]),
        (
            "MXFP4",
            method("compressed-tensors"),
            vec![part("weight_packed", u8, &[n, k / 2]), part("weight_scale", u8, &[n, k / 32])],
        ),
        (
            "MXFP4 of gpt-oss",
            method("mxfp4"),
            vec![part("weight_blocks", u8, &[1, n, k / 32, 16]), part("weight_scales", u8, &[1, n, k / 32])],
        ),
        (
            "NVFP4",
            method("compressed-tensors"),
            vec![
                part("weight_packed", u8, &[n, k / 2]),
                part("weight_scale", f8, &[n, k / 16]),
                part("weight_global_scale", f32, &[1]),
            ],
        ),
        (
            "GPTQ, 4 bits",
            method("gptq"),
            vec![
                part("qweight", i32, &[k / 8, n]),
                part("qzeros", i32, &[k / 128, n / 8]),
                part("scales", f16, &[k / 128, n]),
            ],
        ),
        (
            "GPTQ, 8 bits",
            method("gptq"),
            vec![
                part("qweight", i32, &[k / 4, n]),
                part("qzeros", i32, &[k / 128, n / 4]),
                part("scales", f16, &[k / 128, n]),
            ],
        ),
        (
            "AWQ",
            method("awq"),
            vec![
                part("qweight", i32, &[k, n / 8]),
                part("qzeros", i32, &[k / 128, n / 8]),
                part("scales", f16, &[k / 128, n]),
            ],
        ),
    ];
    println!("{n} x {k}, {} threads", rayon::current_num_threads());
    println!("{:<26} {:>14} {:>14} {:>16}", "storage", "GB/s of file", "GB/s decoded", "10^9 weights/s");
    for (name, method, specs) in cases {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), json!({"quantization_config": method}).to_string()).unwrap();
        let mut writer = ShardedWriter::create(dir.path(), specs.clone(), u64::MAX).unwrap();
        for spec in &specs {
            // Any bytes are codes; these are no NaN as scales.
            let bytes = (0..spec.num_bytes().unwrap()).map(|i| (i * 131 % 119) as u8);
            writer.write(&spec.name, &bytes.collect::<Vec<_>>()).unwrap();
        }
        writer.finish().unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let tensor = checkpoint.dense("m.weight").unwrap();
        let mut memory = vec![0; 64 << 20];
        let pass = |memory: &mut [u8]| {
            let start = Instant::now();
            for at in (0..tensor.num_bytes()).step_by(memory.len()) {
                let slice = memory.len().min(tensor.num_bytes() - at);
                tensor.read_all(at, &mut memory[..slice]).unwrap();
            }
            start.elapsed().as_secs_f64()
        };
        let time = (0..RUNS).map(|_| pass(&mut memory)).fold(f64::INFINITY, f64::min);
        let rate = |bytes: u64| bytes as f64 / time / 1e9;
        let (file, decoded) = (rate(checkpoint.total_bytes()), rate(tensor.num_bytes() as u64));
        println!("{name:<26} {file:>14.2} {decoded:>14.2} {:>16.2}", (n * k) as f64 / time / 1e9);
    }
}
