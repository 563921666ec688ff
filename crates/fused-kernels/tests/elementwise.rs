//! The CubeCL kernels against their oracles in f64, on every runtime at hand.
//! `test_support` says which runtimes those are.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use cubecl::client::Client;
use cubecl::server::Handle;
use fused_kernels::adapted_norms::Sizes;
use fused_kernels::gated::Activation;
use fused_kernels::rms_norm::Norm;
use fused_kernels::rope::{Buffers, Rotation};
use fused_kernels::{
    FloatFormat, KernelError, Matrix, adapted_norms, candidates, causal_conv, columns, cross_entropy, gated, likeliest,
    rms_norm, rope, supports,
};
use half::{bf16, f16};
use test_support::clients;

/// Calls `test` with every client and each format that it has.
fn everywhere(test: impl Fn(&Client, FloatFormat)) {
    for (_, client) in clients() {
        FloatFormat::ALL.into_iter().filter(|format| supports(client, *format)).for_each(|format| test(client, format));
    }
}

/// Uniform in ±`scale`.
fn noise(seed: u64, len: usize, scale: f64) -> Vec<f64> {
    test_support::noise(seed, len).into_iter().map(|value| f64::from(value) * scale).collect()
}

/// The values as `format` holds them, and their bytes.
fn rounded(values: &[f64], format: FloatFormat) -> (Vec<f64>, Vec<u8>) {
    let mut bytes = Vec::new();
    let mut one = |value: f64| match format {
        FloatFormat::F32 => {
            bytes.extend((value as f32).to_le_bytes());
            f64::from(value as f32)
        }
        FloatFormat::F16 => {
            bytes.extend(f16::from_f64(value).to_le_bytes());
            f16::from_f64(value).to_f64()
        }
        FloatFormat::BF16 => {
            bytes.extend(bf16::from_f32(value as f32).to_le_bytes());
            f64::from(bf16::from_f32(value as f32).to_f32())
        }
    };
    let values = values.iter().map(|&value| one(value)).collect();
    (values, bytes)
}

struct Input {
    values: Vec<f64>,
    handle: Handle,
}

fn input(client: &Client, values: &[f64], format: FloatFormat) -> Input {
    let (values, bytes) = rounded(values, format);
    Input { values, handle: client.create_from_slice(&bytes) }
}

/// A buffer of NaNs: what is not written shows.
fn poisoned(client: &Client, len: usize, format: FloatFormat) -> Handle {
    client.create_from_slice(&vec![0xFF; len * format.size()])
}

fn read(client: &Client, handle: Handle, format: FloatFormat) -> Vec<f64> {
    let bytes = client.read_one(handle).expect("the kernel runs");
    match format {
        FloatFormat::F32 => {
            bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
        }
        FloatFormat::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes(b.try_into().unwrap()).to_f64()).collect(),
        FloatFormat::BF16 => {
            bytes.chunks_exact(2).map(|b| f64::from(bf16::from_le_bytes(b.try_into().unwrap()).to_f32())).collect()
        }
    }
}

/// Elements within one rounding to `format` and `f32_error` of the group's scale, its largest element or 1: f32 sums
/// and functions are relative to their terms, not to what is left after cancellation.
fn assert_close(what: &str, found: &[f64], expected: &[f64], format: FloatFormat, group: usize, f32_error: f64) {
    // Half a unit in the last place, and the smallest step of f16's subnormals.
    let (relative, step) = match format {
        FloatFormat::F32 => (6e-8, 0.0),
        FloatFormat::F16 => (4.9e-4, 6e-8),
        FloatFormat::BF16 => (3.91e-3, 0.0),
    };
    let scale_of = |group: &[f64]| group.iter().fold(1.0_f64, |max, v| max.max(v.abs()));
    let scales: Vec<f64> = expected.chunks(group).map(scale_of).collect();
    let bar = |i: usize, expected: f64| relative * expected.abs() + f32_error * scales[i / group] + step;
    test_support::assert_close(format!("{what}, {format:?}"), found, expected, bar);
}

#[test]
fn losses_and_the_gradients_of_logits() {
    everywhere(|client, format| {
        for (rows, width, scale) in
            [(1, 1, 4.0), (3, 7, 4.0), (5, 1000, 12.0), (9, 4099, 20.0), (3, 32_000, 30.0), (2, 1024, 3e4)]
        {
            let what = format!("losses of {rows} x {width}");
            let logits = input(client, &noise(6, rows * width, scale), format);
            // The first and the last word are among the targets.
            let targets: Vec<i32> = (0..rows).map(|row| ((row * 7919 + width - 1) % width) as i32).collect();
            let target_bytes: Vec<u8> = targets.iter().flat_map(|target| target.to_le_bytes()).collect();
            let target = client.create_from_slice(&target_bytes);
            let dloss = input(client, &noise(7, rows, 1.0), FloatFormat::F32);
            let [losses, whole] = [(); 2].map(|()| poisoned(client, rows, FloatFormat::F32));
            let (found, expected): (Vec<_>, Vec<_>) = (0..rows)
                .map(|row| (&logits.values[row * width..][..width], targets[row] as usize))
                .map(|(row, target)| {
                    (cross_entropy::oracle::log_sum_exp(row), cross_entropy::oracle::forward(row, target))
                })
                .unzip();
            let matrix = Matrix { rows, width, format };
            let buffers = cross_entropy::Forward {
                logits: &logits.handle,
                targets: &target,
                losses: &losses,
                log_sum_exp: &whole,
            };
            cross_entropy::forward(client, buffers, matrix).unwrap();
            // Differences of logits up to `scale`, and sums of up to 32,000 terms.
            let error = 2e-6 * scale.max(1.0);
            assert_close(&what, &read(client, whole.clone(), FloatFormat::F32), &found, FloatFormat::F32, 1, error);
            assert_close(&what, &read(client, losses, FloatFormat::F32), &expected, FloatFormat::F32, 1, error);

            let grads: Vec<f64> = (0..rows)
                .flat_map(|row| {
                    let values = &logits.values[row * width..][..width];
                    cross_entropy::oracle::backward(dloss.values[row], values, targets[row] as usize)
                })
                .collect();
            let buffers = cross_entropy::Backward {
                dloss: &dloss.handle,
                logits: &logits.handle,
                targets: &target,
                log_sum_exp: &whole,
            };
            cross_entropy::backward(client, buffers, matrix).unwrap();
            // A probability is an exponential of a difference whose error is that of the logits' magnitude.
            let found = read(client, logits.handle, format);
            assert_close(&format!("gradients, {what}"), &found, &grads, format, width, 1e-7 * scale.max(10.0));
        }
    });
}

#[test]
fn gated_products_and_their_gradients() {
    everywhere(|client, format| {
        for activation in Activation::ALL {
            for len in [1, 7, 256, 1000, 66_000] {
                let what = format!("{activation:?} of {len}");
                let gate = input(client, &noise(1, len, 12.0), format);
                // Beyond where it is clamped.
                let size = if activation == Activation::ClampedSwish { 9.0 } else { 3.0 };
                let up = input(client, &noise(2, len, size), format);
                let dy = input(client, &noise(3, len, 1.0), format);
                let [out, dgate, dup] = [(); 3].map(|()| poisoned(client, len, format));
                let buffers = gated::Forward { gate: &gate.handle, up: &up.handle, out: &out };
                gated::forward(client, buffers, len, activation, format).unwrap();
                let buffers =
                    gated::Backward { dy: &dy.handle, gate: &gate.handle, up: &up.handle, dgate: &dgate, dup: &dup };
                gated::backward(client, buffers, len, activation, format).unwrap();
                let inputs = || gate.values.iter().zip(&up.values);
                let expected: Vec<f64> = inputs().map(|(g, u)| gated::oracle::forward(*g, *u, activation)).collect();
                let (expected_gate, expected_up): (Vec<f64>, Vec<f64>) =
                    inputs().zip(&dy.values).map(|((g, u), d)| gated::oracle::backward(*d, *g, *u, activation)).unzip();
                // The functions' own error: CubeCL's erf is a polynomial good to 1.5e-7 of 1, which x up to 12
                // multiplies.
                assert_close(&what, &read(client, out, format), &expected, format, len, 4e-6);
                assert_close(&what, &read(client, dgate, format), &expected_gate, format, len, 4e-6);
                assert_close(&what, &read(client, dup, format), &expected_up, format, len, 4e-6);
            }
        }
    });
}

#[test]
fn short_convolutions_and_their_gradients() {
    everywhere(|client, format| {
        let of_length = |rows: usize, len, taps| (rows * len, causal_conv::Conv::new(len, taps));
        // The third row is empty, and the last is shorter than the filter.
        let packed = |taps| {
            let packed = Some([0, 1, 9, 9, 20, 22].into());
            (22, causal_conv::Conv { packed, ..causal_conv::Conv::new(22, taps) })
        };
        for ((tokens, conv), channels) in [
            (of_length(1, 1, 4), 1),
            (of_length(3, 5, 4), 7),
            (of_length(2, 9, 4), 64),
            (of_length(1, 40, 2), 24),
            (of_length(2, 3, 1), 8),
            (packed(4), 7),
            (packed(4), 64),
            (packed(1), 8),
            ((10, causal_conv::Conv { silu: false, ..causal_conv::Conv::new(5, 3) }), 16),
        ] {
            let (taps, what) = (conv.taps, format!("{conv:?} over {tokens} x {channels}"));
            let x = input(client, &noise(1, tokens * channels, 3.0), format);
            let dy = input(client, &noise(2, tokens * channels, 1.0), format);
            let weight = input(client, &noise(3, taps * channels, 1.0), FloatFormat::F32);
            let [out, dx] = [(); 2].map(|()| poisoned(client, tokens * channels, format));
            let matrix = Matrix { rows: tokens, width: channels, format };
            let buffers = causal_conv::Forward { x: &x.handle, weight: &weight.handle, out: &out };
            causal_conv::forward(client, buffers, matrix, &conv).unwrap();
            let buffers = causal_conv::Backward { dy: &dy.handle, x: &x.handle, weight: &weight.handle, dx: &dx };
            causal_conv::backward(client, buffers, matrix, &conv).unwrap();
            let expected = causal_conv::oracle::forward(&x.values, &weight.values, channels, &conv);
            // Sums of up to four products of values up to 3, through a function with slopes near 1.
            assert_close(&what, &read(client, out, format), &expected, format, channels, 2e-6);
            let expected = causal_conv::oracle::backward(&dy.values, &x.values, &weight.values, channels, &conv);
            assert_close(&what, &read(client, dx, format), &expected, format, channels, 2e-6);
        }
        let x = input(client, &[0.0; 12], format);
        let weight = input(client, &[0.0; 12], FloatFormat::F32);
        let buffers = causal_conv::Forward { x: &x.handle, weight: &weight.handle, out: &x.handle };
        let matrix = Matrix { rows: 4, width: 3, format };
        let short = causal_conv::Conv { packed: Some([0, 3].into()), ..causal_conv::Conv::new(4, 2) };
        for conv in [causal_conv::Conv::new(3, 4), causal_conv::Conv::new(4, 17), short] {
            let error = causal_conv::forward(client, buffers, matrix, &conv).unwrap_err();
            assert!(matches!(error, KernelError::Shape { .. }), "{error}");
        }
    });
}

#[test]
fn extreme_gates_give_numbers() {
    everywhere(|client, format| {
        let values = [-60000.0, -200.0, -89.0, 89.0, 200.0, 60000.0];
        let gate = input(client, &values, format);
        let one = input(client, &[1.0; 6], format);
        for activation in Activation::ALL {
            let [out, dgate, dup] = [(); 3].map(|()| poisoned(client, 6, format));
            let buffers = gated::Forward { gate: &gate.handle, up: &one.handle, out: &out };
            gated::forward(client, buffers, 6, activation, format).unwrap();
            let buffers =
                gated::Backward { dy: &one.handle, gate: &gate.handle, up: &one.handle, dgate: &dgate, dup: &dup };
            gated::backward(client, buffers, 6, activation, format).unwrap();
            // The largest value, what is multiplied with it, and how near it comes.
            let (most, by, near) = match activation {
                Activation::Sigmoid => (1.0, 1.0, 1e-6),
                Activation::ClampedSwish => (7.0, 2.0, 1e-5),
                _ => (f64::INFINITY, 1.0, 1e-6),
            };
            for (i, y) in read(client, out, format).into_iter().enumerate() {
                let expected = by * gate.values[i].max(0.0).min(most);
                // A half ulp of the format, where the value is none of its own.
                let near =
                    if most == 7.0 { near + 4e-3 * f64::from(u8::from(format != FloatFormat::F32)) } else { near };
                assert!((y - expected).abs() <= near * expected, "{activation:?} of {} is {y}", gate.values[i]);
            }
            for (i, slope) in read(client, dgate, format).into_iter().enumerate() {
                let expected = f64::from(gate.values[i] > 0.0 && most.is_infinite());
                assert!((slope - expected).abs() <= 1e-6, "slope of {activation:?} at {} is {slope}", gate.values[i]);
            }
        }
    });
}

#[test]
fn rows_are_normalised_and_differentiated() {
    everywhere(|client, format| {
        for (rows, width) in [(1, 1), (3, 5), (17, 64), (9, 128), (5, 250), (4, 688), (130, 256), (2, 4096), (3, 5000)]
        {
            for offset in [0.0, 1.0] {
                let what = format!("{rows} x {width}, offset {offset}");
                let norm = Norm { eps: 1e-5, offset };
                let matrix = Matrix { rows, width, format };
                let x = input(client, &noise(4, rows * width, 2.0), format);
                let dy = input(client, &noise(5, rows * width, 1.0), format);
                let weight = input(client, &noise(6, width, 1.0), FloatFormat::F32);
                let [out, dx] = [(); 2].map(|()| poisoned(client, rows * width, format));
                let dweight = poisoned(client, width, FloatFormat::F32);
                let (x_handle, dy_handle) = (&x.handle, &dy.handle);
                let buffers = rms_norm::Forward { x: x_handle, weight: &weight.handle, out: &out };
                rms_norm::forward(client, buffers, matrix, norm).unwrap();
                let buffers = rms_norm::Backward { dy: dy_handle, x: x_handle, weight: &weight.handle, dx: &dx };
                rms_norm::backward(client, buffers, matrix, norm).unwrap();
                let buffers = rms_norm::WeightGradient { dy: dy_handle, x: x_handle, dweight: &dweight };
                rms_norm::weight_gradient(client, buffers, matrix, norm).unwrap();
                let expected = rms_norm::oracle::forward(&x.values, &weight.values, norm);
                let (expected_x, expected_weight) =
                    rms_norm::oracle::backward(&dy.values, &x.values, &weight.values, norm);
                // f32 sums of up to 5,000 terms in trees: some ulp of 6e-8.
                assert_close(&what, &read(client, out, format), &expected, format, width, 1e-6);
                // A row of one element has no gradient but what eps lets through: a difference of equal terms.
                if width > 1 {
                    assert_close(&what, &read(client, dx, format), &expected_x, format, width, 2e-6);
                }
                let found = read(client, dweight, FloatFormat::F32);
                assert_close(&what, &found, &expected_weight, FloatFormat::F32, width, 2e-6);
            }
        }
    });
}

#[test]
fn zero_rows_stay_zero() {
    everywhere(|client, format| {
        let norm = Norm { eps: 1e-6, offset: 0.0 };
        let zeros = input(client, &[0.0; 192], format);
        let weight = input(client, &[1.0; 96], FloatFormat::F32);
        let out = poisoned(client, 192, format);
        let buffers = rms_norm::Forward { x: &zeros.handle, weight: &weight.handle, out: &out };
        rms_norm::forward(client, buffers, Matrix { rows: 2, width: 96, format }, norm).unwrap();
        assert!(read(client, out, format).iter().all(|y| *y == 0.0));
    });
}

#[test]
fn heads_turn_and_turn_back() {
    everywhere(|client, format| {
        for (sequences, len, heads, head_dim, rotary) in
            [(1, 1, 1, 2, 2), (2, 5, 3, 16, 16), (1, 33, 4, 64, 64), (3, 7, 2, 80, 40), (1, 3, 2, 6, 0)]
        {
            let what = format!("{sequences} x {len} x {heads} x {head_dim}, {rotary} turn");
            let tokens = sequences * len;
            let matrix = Matrix { rows: tokens, width: heads * head_dim, format };
            let x = input(client, &noise(7, tokens * heads * head_dim, 2.0), format);
            let angles = noise(8, (len * rotary / 2).max(1), 3.0);
            let cos = input(client, &angles.iter().map(|a| a.cos()).collect::<Vec<_>>(), FloatFormat::F32);
            let sin = input(client, &angles.iter().map(|a| a.sin()).collect::<Vec<_>>(), FloatFormat::F32);
            for inverse in [false, true] {
                let out = poisoned(client, x.values.len(), format);
                let rotation = Rotation { len, head_dim, rotary, inverse };
                let buffers = Buffers { x: &x.handle, cos: &cos.handle, sin: &sin.handle, out: &out };
                rope::rotate(client, buffers, matrix, rotation).unwrap();
                let expected = rope::oracle(&x.values, &cos.values, &sin.values, heads, rotation);
                // Two f32 products and a sum.
                assert_close(&what, &read(client, out, format), &expected, format, head_dim, 2e-7);
            }
        }
    });
}

#[test]
fn what_does_not_fit_is_refused() {
    everywhere(|client, format| {
        let small = client.empty(8);
        let buffers = gated::Forward { gate: &small, up: &small, out: &small };
        let error = gated::forward(client, buffers, 1000, Activation::Silu, format).unwrap_err();
        assert!(matches!(error, KernelError::BufferSize { name: "gate", .. }), "{error}");
        let buffers = rms_norm::Forward { x: &small, weight: &small, out: &small };
        let norm = Norm { eps: 1e-5, offset: 0.0 };
        let error = rms_norm::forward(client, buffers, Matrix { rows: 2, width: 64, format }, norm).unwrap_err();
        assert!(matches!(error, KernelError::BufferSize { name: "x", .. }), "{error}");
        let odd = Rotation { len: 4, head_dim: 8, rotary: 3, inverse: false };
        let large = client.empty(4096);
        let rotate = |width, rotation| {
            let buffers = Buffers { x: &large, cos: &large, sin: &large, out: &large };
            rope::rotate(client, buffers, Matrix { rows: 4, width, format }, rotation).unwrap_err().to_string()
        };
        assert!(rotate(8, odd).contains("3 of 8 elements"));
        assert!(rotate(8, Rotation { rotary: 4, len: 3, ..odd }).contains("no whole sequences of 3"));
        assert!(rotate(12, Rotation { rotary: 4, ..odd }).contains("12 elements of a token are no whole heads of 8"));
    });
}

#[test]
fn the_likeliest_is_the_first_of_the_largest() {
    everywhere(|client, format| {
        for (rows, width) in [(1, 1), (3, 7), (5, 257), (2, 4096), (17, 1000)] {
            // Few different values, so that many are equal.
            let mut values: Vec<f64> = noise(width as u64, rows * width, 8.0).into_iter().map(f64::round).collect();
            if rows > 2 {
                values[width + width / 2] = f64::NAN;
                values[2 * width..3 * width].fill(f64::NEG_INFINITY);
            }
            let logits = input(client, &values, format);
            let out = client.create_from_slice(&vec![0x55; 4 * rows]);
            likeliest::likeliest(client, &logits.handle, &out, Matrix { rows, width, format }).unwrap();
            let bytes = client.read_one(out).unwrap();
            let found: Vec<u32> = bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
            let expected: Vec<u32> = logits.values.chunks(width).map(likeliest::oracle::likeliest).collect();
            assert_eq!(found, expected, "{rows} x {width} {format:?}");
        }
    });
}

#[test]
fn columns_are_scaled_and_differentiated() {
    everywhere(|client, format| {
        for (rows, width) in [(1, 1), (3, 5), (17, 64), (64, 250), (65, 688), (130, 256), (2, 4096), (300, 2056)] {
            let what = format!("columns of {rows} x {width}");
            let matrix = Matrix { rows, width, format };
            let x = input(client, &noise(4, rows * width, 2.0), format);
            let dy = input(client, &noise(5, rows * width, 1.0), format);
            let scale = input(client, &noise(6, width, 1.5), FloatFormat::F32);
            let expected = columns::oracle::forward(&x.values, &scale.values);
            for out_format in [format, FloatFormat::F32] {
                let out = poisoned(client, rows * width, out_format);
                let buffers = columns::Forward { x: &x.handle, scale: &scale.handle, out: &out };
                columns::forward(client, buffers, matrix, out_format).unwrap();
                // One product in f32.
                assert_close(&what, &read(client, out, out_format), &expected, out_format, 1, 1e-7);
            }
            let (dx, dscale) = (poisoned(client, rows * width, format), poisoned(client, width, FloatFormat::F32));
            let buffers =
                columns::Backward { dy: &dy.handle, x: &x.handle, scale: &scale.handle, dx: &dx, dscale: &dscale };
            columns::backward(client, buffers, matrix).unwrap();
            let (expected_dx, expected_dscale) = columns::oracle::backward(&dy.values, &x.values, &scale.values);
            assert_close(&what, &read(client, dx, format), &expected_dx, format, 1, 1e-7);
            // Up to 300 products of 2 and 1 in f32.
            let found = read(client, dscale, FloatFormat::F32);
            assert_close(&what, &found, &expected_dscale, FloatFormat::F32, width, 1e-6 * rows as f64);
        }
    });
}

#[test]
fn gains_are_differentiated_from_what_they_made() {
    everywhere(|client, format| {
        for (rows, width) in
            [(1, 1), (3, 5), (17, 64), (64, 250), (65, 688), (130, 256), (700, 40), (2, 4096), (300, 2056)]
        {
            let what = format!("gains of {rows} x {width}");
            let y = input(client, &noise(4, rows * width, 2.0), format);
            let dy = input(client, &noise(5, rows * width, 1.0), format);
            let gain: Vec<f64> = noise(6, width, 1.5).iter().map(|gain| gain.signum() * (0.5 + gain.abs())).collect();
            let gain = input(client, &gain, FloatFormat::F32);
            let dgain = poisoned(client, width, FloatFormat::F32);
            let buffers = columns::Gain { dy: &dy.handle, y: &y.handle, gain: &gain.handle, dgain: &dgain };
            columns::gain_gradient(client, buffers, Matrix { rows, width, format }).unwrap();
            let expected = columns::oracle::gain_gradient(&dy.values, &y.values, &gain.values);
            // Up to 700 products of 2 and 1 in f32, twice as much after the division.
            let found = read(client, dgain, FloatFormat::F32);
            assert_close(&what, &found, &expected, FloatFormat::F32, width, 2e-6 * rows as f64);
        }
    });
}

#[test]
fn norms_of_adapted_rows_are_those_of_the_sum() {
    for (_, client) in clients() {
        for (out_features, in_features, rank) in
            [(1, 1, 1), (5, 40, 3), (33, 130, 8), (70, 64, 64), (19, 300, 130), (9, 7, 512)]
        {
            let what = format!("norms of {out_features} x {in_features} rank {rank}");
            let sizes = Sizes { out_features, in_features, rank };
            let f32s = |seed, len| input(client, &noise(seed, len, 1.0), FloatFormat::F32);
            let (weight, lora_a) = (noise(1, out_features * in_features, 1.0), f32s(2, rank * in_features));
            let (lora_b, scaling) = (f32s(3, out_features * rank), 0.75_f32);
            let squares: Vec<f64> = weight.chunks(in_features).map(|row| row.iter().map(|w| w * w).sum()).collect();
            let dot = |j: usize, i: usize| {
                let (a, w) = (&lora_a.values[j * in_features..], &weight[i * in_features..][..in_features]);
                w.iter().zip(a).map(|(w, a)| w * a).sum::<f64>()
            };
            let a_w: Vec<f64> = (0..rank * out_features).map(|i| dot(i / out_features, i % out_features)).collect();
            let (squares, a_w) = (input(client, &squares, FloatFormat::F32), input(client, &a_w, FloatFormat::F32));
            let norms = poisoned(client, out_features, FloatFormat::F32);
            let buffers = adapted_norms::Buffers {
                weight_squares: &squares.handle,
                a_w: &a_w.handle,
                lora_a: &lora_a.handle,
                lora_b: &lora_b.handle,
                norms: &norms,
            };
            adapted_norms::adapted_norms(client, buffers, sizes, scaling).unwrap();
            let expected =
                adapted_norms::oracle::adapted_norms(&weight, &lora_a.values, &lora_b.values, sizes, scaling.into());
            let found = read(client, norms.clone(), FloatFormat::F32);
            // Sums of up to 300 squares of some tens, in f32.
            assert_close(&what, &found, &expected, FloatFormat::F32, out_features, 2e-5);
            let refused = Sizes { rank: adapted_norms::MAX_RANK + 1, ..sizes };
            let refused = adapted_norms::adapted_norms(client, buffers, refused, scaling);
            assert!(matches!(refused, Err(KernelError::Rank(513))), "{what}");
        }
    }
}

#[test]
fn two_parts_of_16_bits_hold_a_number() {
    everywhere(|client, format| {
        let len = 70_001;
        let x = input(client, &noise(3, len, 4.0), FloatFormat::F32);
        let parts = poisoned(client, 2 * len, format);
        adapted_norms::split(client, adapted_norms::Split { x: &x.handle, parts: &parts }, len, format).unwrap();
        let parts = read(client, parts, format);
        let relative = match format {
            FloatFormat::F32 => 0.0,
            // As below, with three bits more in each part; the rest may be one of f16's subnormals.
            FloatFormat::F16 => 2.0_f64.powi(-22) + 2.0_f64.powi(-25),
            // What the first part leaves is half a unit at most, 2⁻⁸ where x is 1, and the second has half a unit of that: 2⁻¹⁷.
            FloatFormat::BF16 => 2.0_f64.powi(-17),
        };
        for (i, x) in x.values.iter().enumerate() {
            let sum = parts[i] + parts[len + i];
            assert!((sum - x).abs() <= relative * x.abs().max(1.0), "{format:?} {i}: {x} became {sum}");
        }
    });
}

#[test]
fn candidates_are_all_that_is_above_their_threshold() {
    everywhere(|client, format| {
        for (rows, width, scale) in [(1, 1, 1.0), (3, 100, 5.0), (5, 257, 90.0), (2, 32_000, 12.0), (9, 5001, 0.01)] {
            let mut values = noise(width as u64, rows * width, scale);
            if rows > 2 {
                // More equals than there is room for, and tokens that can't come.
                values[width..2 * width].fill(1.5);
                values[2 * width..2 * width + width / 2].fill(f64::NEG_INFINITY);
            }
            let logits = input(client, &values, format);
            let temperatures: Vec<f32> = (0..rows).map(|row| 0.7 + 0.3 * row as f32).collect();
            let on_device = client.create_from_slice(bytemuck::cast_slice(&temperatures));
            let out = client.create_from_slice(&vec![0x55; 4 * rows * candidates::WORDS]);
            let matrix = Matrix { rows, width, format };
            candidates::candidates(client, &logits.handle, &on_device, &out, matrix).unwrap();
            let bytes = client.read_one(out).unwrap();
            let words: Vec<u32> = bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
            for (row, words) in words.chunks(candidates::WORDS).enumerate() {
                let what = format!("row {row} of {rows} x {width} {format:?}");
                let found = candidates::Answer::new(words).unwrap();
                let own = &logits.values[row * width..][..width];
                let candidates::Summary { highest, threshold, weight } = found.rest;
                let temperature = f64::from(temperatures[row]);
                let expected = candidates::oracle::candidates(own, f64::from(threshold), temperature);
                assert_eq!(f64::from(highest), expected.0, "{what}");
                let mut ids = found.ids.to_vec();
                ids.sort_unstable();
                assert_eq!(ids, expected.1, "{what}");
                for (id, value) in found.ids.iter().zip(found.values) {
                    assert_eq!(f64::from(f32::from_bits(*value)), own[*id as usize], "{what}");
                }
                // Some hundred f32 sums of exponentials, which runtimes may have wrong by some ulps times their argument, and take
                // for zero where f32 ends.
                let bound = 1e-4 * expected.2 + 1e-30;
                assert!((f64::from(weight) - expected.2).abs() <= bound, "{what}: {weight}, {}", expected.2);
                // All that come near the largest are candidates, or enough of them; where bisection can't tell them apart, none.
                let near = own.iter().filter(|value| **value > f64::from(highest) - 60.0).count();
                let room = if (row == 1 && rows > 2) || scale < 1.0 { 0 } else { 100 };
                assert!(found.ids.len() >= near.min(room), "{what}: {} of {near}", found.ids.len());
            }
        }
    });
}
