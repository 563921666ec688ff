//! The kernels of the delta rule against the recurrence in f64, on a CUDA device.
//! `test_support` says what becomes of them where there is none.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{half_bytes, halves, on_device};
use cubecl::client::Client;
use cubecl::server::Handle;
use fused_kernels::delta_rule::oracle::{self, Batch};
use fused_kernels::delta_rule::{self, Gradients, Inputs, Operand, Recurrent, Rows, Shape, Sizes, recurrent};
use fused_kernels::{FloatFormat, KernelError, supports};
use test_support::{clients, noise};

const DIM: usize = 128;

fn client() -> Option<&'static Client> {
    test_support::cuda(|client| delta_rule::supports(client, FloatFormat::BF16, [DIM; 2]))
}

/// Rounded values, with `gap` elements after each token's `width`, and the buffer that holds them.
fn operand(client: &Client, values: &[f32], width: usize, gap: usize, format: FloatFormat) -> (Vec<f64>, Handle) {
    let bytes = half_bytes(values, format);
    let rounded = halves(&bytes, format).into_iter().map(f64::from).collect();
    let spaced: Vec<u8> = bytes.chunks(2 * width).flat_map(|token| [token, &vec![0xFF; 2 * gap]].concat()).collect();
    (rounded, client.create_from_slice(&spaced))
}

fn f32s(client: &Client, values: &[f32]) -> Handle {
    client.create_from_slice(bytemuck::cast_slice(values))
}

fn read_f32(client: &Client, handle: Handle) -> Vec<f64> {
    let bytes = client.read_one(handle).expect("the kernel runs");
    bytes.chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect()
}

fn read_half(client: &Client, handle: Handle, format: FloatFormat) -> Vec<f64> {
    halves(&client.read_one(handle).expect("the kernel runs"), format).into_iter().map(f64::from).collect()
}

/// Elements within some roundings of products' operands of the largest: what a head's terms are made of. Gradients of one token
/// or a few are small sums of 128 terms near 1, so that the largest may be smaller than those terms' rounding asks for: `least`.
fn assert_close(what: &str, found: &[f64], expected: &[f64], format: FloatFormat, least: f64) {
    let largest = expected.iter().fold(least, |most, value| most.max(value.abs()));
    // Four half-ulps: the error of a sum is a fraction of that of its largest terms, of which there are a few.
    let bar = largest * if format == FloatFormat::F16 { 4.0 * 4.9e-4 } else { 4.0 * 3.9e-3 };
    test_support::assert_close(format!("{what}, {format:?}"), found, expected, |_, _| bar);
}

#[test]
fn outputs_and_gradients_are_those_of_the_recurrence() {
    let Some(client) = client() else { return };
    let cases: [(&[usize], [usize; 2], f32); 6] = [
        (&[1], [1, 1], 0.5),
        (&[64], [1, 1], 0.5),
        (&[200, 200], [2, 2], 0.05),
        (&[100, 64, 0, 1, 130], [2, 4], 0.5),
        (&[150], [1, 3], 3.0),
        // Enough cubes for the wide kernels.
        (&[70; 9], [4, 8], 0.2),
    ];
    for format in [FloatFormat::BF16, FloatFormat::F16].map(|format| on_device(client, format)) {
        for (rows, [key_heads, value_heads], rate) in cases {
            let what = format!("{rows:?}, {key_heads} and {value_heads} heads, rate {rate}");
            let batch = Batch { rows: rows.into(), key_heads, value_heads, key_dim: DIM, value_dim: DIM };
            let tokens: usize = rows.iter().sum();
            let unit = |seed, scale: f32| -> Vec<f32> {
                let values = noise(seed, tokens * key_heads * DIM);
                let rows = values.chunks(DIM).map(|row| (row, row.iter().map(|x| x * x).sum::<f32>().sqrt()));
                rows.flat_map(|(row, length)| row.iter().map(move |x| scale * x / length)).collect()
            };
            let (keys, values) = (key_heads * DIM, value_heads * DIM);
            let (q, q_buffer) = operand(client, &unit(1, 0.1), keys, 0, format);
            let (k, k_buffer) = operand(client, &unit(2, 1.0), keys, 16, format);
            let (v, v_buffer) = operand(client, &noise(3, tokens * values), values, 8, format);
            let (d_out, d_out_buffer) = operand(client, &noise(6, tokens * values), values, 0, format);
            let g: Vec<f32> = noise(4, tokens * value_heads).iter().map(|g| -rate * g.abs()).collect();
            let beta: Vec<f32> = noise(5, tokens * value_heads).iter().map(|b| b.abs()).collect();
            let (g_buffer, beta_buffer) = (f32s(client, &g), f32s(client, &beta));

            let mut bounds = vec![0];
            for len in rows {
                bounds.push(bounds[bounds.len() - 1] + *len as u32);
            }
            let rows = Rows::new(client, &bounds).unwrap();
            let shape = Shape { rows, key_heads, value_heads, format };
            let at = |handle, stride| Operand { handle, stride };
            let inputs = Inputs {
                q: at(&q_buffer, keys),
                k: at(&k_buffer, keys + 16),
                v: at(&v_buffer, values + 8),
                g: &g_buffer,
                beta: &beta_buffer,
            };
            let poisoned = |bytes: usize| client.create_from_slice(&vec![0xFF; bytes]);
            let out = poisoned(2 * tokens * values);
            delta_rule::forward(client, inputs, at(&out, values), &shape).unwrap();
            let (d_q, d_k, d_v) =
                (poisoned(2 * tokens * keys), poisoned(2 * tokens * keys), poisoned(2 * tokens * values));
            let (d_g, d_beta) = (poisoned(4 * tokens * value_heads), poisoned(4 * tokens * value_heads));
            let gradients = Gradients { q: &d_q, k: &d_k, v: &d_v, g: &d_g, beta: &d_beta };
            delta_rule::backward(client, inputs, at(&d_out_buffer, values), gradients, &shape).unwrap();

            let [g, beta] = [g, beta].map(|x| x.into_iter().map(f64::from).collect::<Vec<_>>());
            let wide = oracle::Inputs { q: &q, k: &k, v: &v, g: &g, beta: &beta };
            let close = |name: &str, found: &[f64], expected: &[f64]| {
                let least = if name == "output" { 0.0 } else { 0.1 };
                assert_close(&format!("{name}, {what}"), found, expected, format, least);
            };
            close("output", &read_half(client, out, format), &oracle::forward(wide, &batch).0);
            let expected = oracle::backward(wide, &d_out, &batch);
            close("gradient of q", &read_half(client, d_q, format), &expected.q);
            close("gradient of k", &read_half(client, d_k, format), &expected.k);
            close("gradient of v", &read_half(client, d_v, format), &expected.v);
            close("gradient of g", &read_f32(client, d_g), &expected.g);
            close("gradient of beta", &read_f32(client, d_beta), &expected.beta);
        }
    }
}

/// On every runtime at hand: rows in two calls give what they give in one recurrence.
#[test]
fn rows_go_on_from_their_states() {
    for (name, client) in clients() {
        for format in FloatFormat::ALL.into_iter().filter(|format| supports(client, *format)) {
            for (rows, [key_heads, value_heads], [key_dim, value_dim]) in
                [(1, [1, 1], [4, 4]), (2, [2, 4], [12, 20]), (1, [1, 3], [16, 200])]
            {
                let what = format!("{name}, {format:?}, {rows} rows, {value_heads} heads of {key_dim} x {value_dim}");
                let lens = [3, 1];
                let len: usize = lens.iter().sum();
                let batch = Batch { rows: vec![len; rows], key_heads, value_heads, key_dim, value_dim };
                let held = |values: &[f32]| -> Vec<f64> {
                    match format {
                        FloatFormat::F32 => values.iter().copied().map(f64::from).collect(),
                        _ => halves(&half_bytes(values, format), format).into_iter().map(f64::from).collect(),
                    }
                };
                let noise_of = |seed, width: usize| held(&noise(seed, rows * len * width));
                let (q, k) = (noise_of(1, key_heads * key_dim), noise_of(2, key_heads * key_dim));
                let v = noise_of(3, value_heads * value_dim);
                let wide = |seed, sign: f32| -> Vec<f64> {
                    noise(seed, rows * len * value_heads).iter().map(|x| f64::from(sign * x.abs())).collect()
                };
                let (g, beta) = (wide(4, -1.0), wide(5, 0.5));
                let inputs = oracle::Inputs { q: &q, k: &k, v: &v, g: &g, beta: &beta };
                let (expected, states) = oracle::forward(inputs, &batch);

                let state = f32s(client, &vec![0.0; rows * value_heads * key_dim * value_dim]);
                let (mut found, mut start) = (vec![0.0; expected.len()], 0);
                for len_now in lens {
                    // The tokens of a call, of each row.
                    let places: Vec<usize> =
                        (0..rows).flat_map(|row| (start..start + len_now).map(move |at| row * len + at)).collect();
                    let part = |values: &[f64], width: usize, format: FloatFormat| -> Handle {
                        let tokens = places.iter().flat_map(|token| &values[token * width..][..width]);
                        let values: Vec<f32> = tokens.map(|value| *value as f32).collect();
                        match format {
                            FloatFormat::F32 => f32s(client, &values),
                            _ => client.create_from_slice(&half_bytes(&values, format)),
                        }
                    };
                    let width = value_heads * value_dim;
                    let out = client.create_from_slice(&vec![0xFF; places.len() * width * format.size()]);
                    let buffers = Recurrent {
                        q: &part(&q, key_heads * key_dim, format),
                        k: &part(&k, key_heads * key_dim, format),
                        v: &part(&v, width, format),
                        g: &part(&g, value_heads, FloatFormat::F32),
                        beta: &part(&beta, value_heads, FloatFormat::F32),
                        state: &state,
                        out: &out,
                    };
                    let sizes = Sizes { rows, len: len_now, key_heads, value_heads, key_dim, value_dim, format };
                    recurrent(client, buffers, sizes).unwrap();
                    let out = match format {
                        FloatFormat::F32 => read_f32(client, out),
                        _ => read_half(client, out, format),
                    };
                    for (values, token) in out.chunks(width).zip(&places) {
                        found[token * width..][..width].copy_from_slice(values);
                    }
                    start += len_now;
                }
                // One rounding of an output; states and sums are f32 over some tens of terms.
                let ulp = match format {
                    FloatFormat::F32 => 6e-8,
                    FloatFormat::F16 => 4.9e-4,
                    FloatFormat::BF16 => 3.91e-3,
                };
                let scale = |values: &[f64]| values.iter().fold(1.0_f64, |most, value| most.max(value.abs()));
                let (of_outputs, of_states) = (scale(&expected), scale(&states));
                test_support::assert_close(&what, &found, &expected, |_, e| ulp * e.abs() + 5e-6 * of_outputs);
                test_support::assert_close(&what, &read_f32(client, state), &states, |_, _| 5e-6 * of_states);
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(client) = client() else { return };
    for bounds in [&[0][..], &[1, 2], &[0, 3, 2]] {
        assert!(matches!(Rows::new(client, bounds), Err(KernelError::Shape { .. })), "{bounds:?}");
    }
    let buffer = client.create_from_slice(&[0; 4096]);
    let shape = |key_heads, value_heads, format| Shape {
        rows: Rows::new(client, &[0, 4]).unwrap(),
        key_heads,
        value_heads,
        format,
    };
    let at = |stride| Operand { handle: &buffer, stride };
    let run = |stride, shape: &Shape| {
        let inputs = Inputs { q: at(stride), k: at(DIM), v: at(DIM), g: &buffer, beta: &buffer };
        delta_rule::forward(client, inputs, at(DIM), shape).unwrap_err()
    };
    let format = on_device(client, FloatFormat::BF16);
    assert!(matches!(run(DIM, &shape(1, 1, FloatFormat::F32)), KernelError::Format { .. }));
    assert!(matches!(run(DIM, &shape(2, 3, format)), KernelError::Heads { .. }));
    assert!(matches!(run(DIM + 4, &shape(1, 1, format)), KernelError::Shape { .. }));
    assert!(matches!(run(1024, &shape(1, 1, format)), KernelError::BufferSize { .. }));
}
