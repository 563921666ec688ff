//! Kernels: time and GB/s per shape on the first runtime at hand (CUDA, else wgpu).
//!
//! Bytes are what each kernel must move once; weights are random, outputs are warm, and each figure is
//! the median of several batches of launches that the host waits for once.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use std::time::Instant;

use cubecl::client::Client;
use cubecl::device::{Device, WgpuDeviceKind};
use nf4_quant::kernels::{self, DeviceWeight};
use nf4_quant::{Element, FloatFormat, QuantConfig};

const BATCHES: usize = 7;

fn main() {
    let Ok(device) = Device::cuda(0).or_else(|_| Device::wgpu(WgpuDeviceKind::default())) else {
        println!("no GPU runtime on this machine");
        return;
    };
    let client = device.client();
    let large = matches!(device, Device::Cuda(_));
    let shapes: &[[usize; 2]] = if large { &[[4096, 4096], [11008, 4096], [28672, 8192]] } else { &[[1024, 1024]] };
    println!("{device:?}");
    for shape in shapes {
        for double_quant in [false, true] {
            bench(&client, *shape, double_quant);
        }
    }
}

fn bench(client: &Client, shape: [usize; 2], double_quant: bool) {
    let n = shape[0] * shape[1];
    let bf16 = kernels::supports(client, FloatFormat::BF16);
    let format = if bf16 { FloatFormat::BF16 } else { FloatFormat::F32 };
    let input = client.create_from_slice(&random_weight(n, format));
    let config = QuantConfig { double_quant, ..QuantConfig::default() };
    let quantize = || kernels::quantize(client, input.clone(), format, n, &config).unwrap();
    let weight: DeviceWeight = quantize();
    let out = client.empty(n * format.size());

    let statistics = if double_quant { n / 64 + 4 * (n / 64).div_ceil(256) } else { 4 * n / 64 };
    let bytes = n / 2 + statistics + n * format.size();
    let name = format!("{shape:?} {format} double_quant={double_quant}");
    // Quantizing waits for its own reduction, so it runs one at a time.
    report(&format!("quantize   {name}"), bytes, median(client, 3, || drop(quantize())));
    let launch = || kernels::dequantize(client, &weight, out.clone(), format).unwrap();
    report(&format!("dequantize {name}"), bytes, median(client, 20, launch));
}

/// Seconds per call.
fn median(client: &Client, calls: usize, call: impl Fn()) -> f64 {
    let wait = || cubecl::future::block_on(client.sync()).unwrap();
    call();
    let mut times: Vec<f64> = (0..BATCHES)
        .map(|_| {
            wait();
            let start = Instant::now();
            (0..calls).for_each(|_| call());
            wait();
            start.elapsed().as_secs_f64() / calls as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[BATCHES / 2]
}

fn report(name: &str, bytes: usize, seconds: f64) {
    println!("{name}: {:.3} ms, {:.0} GB/s", seconds * 1e3, bytes as f64 / seconds / 1e9);
}

fn random_weight(n: usize, format: FloatFormat) -> Vec<u8> {
    let mut state = 1_u64;
    let values = (0..n).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5) * 0.04
    });
    match format {
        FloatFormat::F32 => bytemuck::cast_slice(&values.collect::<Vec<f32>>()).to_vec(),
        _ => bytemuck::cast_slice(&values.map(<half::bf16 as Element>::from_f32).collect::<Vec<_>>()).to_vec(),
    }
}
