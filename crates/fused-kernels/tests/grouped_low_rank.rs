//! Updates of different adapters in one batch against their oracle in f64, on every runtime at hand.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use cubecl::client::Client;
use fused_kernels::grouped_low_rank::{Adapters, Buffers, add, oracle};
use fused_kernels::{FloatFormat, KernelError, supports};
use half::{bf16, f16};
use test_support::{assert_close, clients, noise};

fn everywhere(test: impl Fn(&Client, FloatFormat)) {
    for (_, client) in clients() {
        FloatFormat::ALL.into_iter().filter(|format| supports(client, *format)).for_each(|format| test(client, format));
    }
}

/// Values as `format` holds them, and their bytes.
fn rounded(seed: u64, len: usize, format: FloatFormat) -> (Vec<f64>, Vec<u8>) {
    let mut bytes = Vec::new();
    let one = |value: f32| match format {
        FloatFormat::F32 => {
            bytes.extend(value.to_le_bytes());
            f64::from(value)
        }
        FloatFormat::F16 => {
            bytes.extend(f16::from_f32(value).to_le_bytes());
            f16::from_f32(value).to_f64()
        }
        FloatFormat::BF16 => {
            bytes.extend(bf16::from_f32(value).to_le_bytes());
            bf16::from_f32(value).to_f64()
        }
    };
    let values = noise(seed, len).into_iter().map(one).collect();
    (values, bytes)
}

fn run(client: &Client, adapters: &Adapters, x: &[u8], format: FloatFormat) -> Vec<f32> {
    let (rows, columns) = (adapters.out_features(), adapters.in_features());
    let upload = |bytes: &[u8]| client.create_from_slice(bytes);
    let (a, b) =
        (rounded(2, adapters.total_rank() * columns, format).1, rounded(3, adapters.total_rank() * rows, format).1);
    let words: Vec<u8> = adapters.words().iter().flat_map(|word| word.to_le_bytes()).collect();
    let (x, a, b, words) = (upload(x), upload(&a), upload(&b), upload(&words));
    let y = upload(&rounded(4, adapters.tokens() * rows, FloatFormat::F32).1);
    let buffers = Buffers { x: &x, lora_a: &a, lora_b: &b, words: &words, y: &y };
    add(client, buffers, adapters, format).unwrap();
    let bytes = client.read_one(y).expect("the kernels run");
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

const RANKS: [(usize, f32); 4] = [(8, 2.0), (1, 0.5), (33, 1.0), (16, -1.5)];

#[test]
fn every_token_gets_its_adapters_update() {
    everywhere(|client, format| {
        for (columns, rows) in [(64, 48), (33, 7), (1, 1), (520, 130)] {
            for of_tokens in [
                &[Some(0)][..],
                &[None, Some(2), Some(0), Some(2), None, Some(1), Some(3)],
                &[Some(1), Some(1), None],
                &[None, None],
            ] {
                let adapters = Adapters::new(columns, rows, &RANKS, of_tokens).unwrap();
                let (x, bytes) = rounded(1, of_tokens.len() * columns, format);
                let found = run(client, &adapters, &bytes, format);
                let (a, b) = (
                    rounded(2, adapters.total_rank() * columns, format).0,
                    rounded(3, adapters.total_rank() * rows, format).0,
                );
                let y = rounded(4, of_tokens.len() * rows, FloatFormat::F32).0;
                let expected = oracle(&x, &a, &b, &y, &adapters);
                // `u`, up to 2 sqrt(columns), is rounded to the format, half an ulp relative to it, and up to 33 of
                // them are added with factors below 1; f32 sums of `columns` and rank terms beside that.
                let step = match format {
                    FloatFormat::F32 => 1.2e-7,
                    FloatFormat::F16 => 4.9e-4,
                    FloatFormat::BF16 => 3.91e-3,
                };
                let bar = step * 8.0 * (columns as f64).sqrt() + 1e-5;
                assert_close(format!("{columns} to {rows}, {of_tokens:?}, {format:?}"), &found, &expected, |_, _| bar);
            }
        }
    });
}

#[test]
fn a_token_does_not_depend_on_the_others() {
    everywhere(|client, format| {
        let (columns, rows) = (100, 40);
        let of_tokens = [Some(2), None, Some(0), Some(3), Some(2), Some(1)];
        let bytes = rounded(1, of_tokens.len() * columns, format).1;
        let all = run(client, &Adapters::new(columns, rows, &RANKS, &of_tokens).unwrap(), &bytes, format);
        let y = rounded(4, of_tokens.len() * rows, FloatFormat::F32).0;
        for (token, adapter) in of_tokens.into_iter().enumerate() {
            // The same `x` and `y` in every place; `y` differs by place, so the first place's is what is compared.
            let row = &bytes[token * columns * format.size()..][..columns * format.size()];
            let update = run(client, &Adapters::new(columns, rows, &RANKS, &[adapter]).unwrap(), row, format);
            let moved = Adapters::new(columns, rows, &RANKS, &[adapter, Some(2), None, Some(1)]).unwrap();
            let beside = run(client, &moved, &[row, &bytes[..3 * columns * format.size()]].concat(), format);
            assert!(update.iter().zip(&beside).all(|(a, b)| a.to_bits() == b.to_bits()), "token {token}, {format:?}");
            if adapter.is_none() {
                let unchanged = all[token * rows..][..rows].iter().zip(&y[token * rows..]);
                assert!(unchanged.clone().all(|(a, b)| f64::from(*a) == *b), "token {token} has no adapter");
            }
        }
    });
}

#[test]
fn what_does_not_fit_is_named() {
    assert!(matches!(Adapters::new(4, 4, &RANKS, &[Some(4)]), Err(KernelError::Shape { .. })));
    everywhere(|client, format| {
        let adapters = Adapters::new(64, 32, &RANKS, &[Some(0), Some(1)]).unwrap();
        let (small, large) = (client.empty(16), client.empty(1 << 16));
        let buffers = Buffers { x: &small, lora_a: &large, lora_b: &large, words: &large, y: &large };
        let error = add(client, buffers, &adapters, format).unwrap_err();
        assert!(matches!(error, KernelError::BufferSize { name: "x", .. }), "{error}");
        let error = add(client, Buffers { x: &large, lora_b: &small, ..buffers }, &adapters, format).unwrap_err();
        assert!(matches!(error, KernelError::BufferSize { name: "lora_b", .. }), "{error}");
    });
}
