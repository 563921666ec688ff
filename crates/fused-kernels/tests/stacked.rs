//! Updates of tokens that have different adapters, against the oracle, on a CUDA device.
//! `test_support` says what becomes of them where there is none.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{half_bytes, halves, on_device};
use cubecl::client::Client;
use cubecl::server::Handle;
use fused_kernels::low_rank::stacked::{Input, Stack, Update, oracle, project, update};
use fused_kernels::low_rank::{self, oracle::round};
use fused_kernels::{FloatFormat, KernelError};
use test_support::{Random, assert_close};

const SLOTS: usize = 5;

/// Rows and rank of a weight.
#[derive(Clone, Copy, Debug)]
struct Layer(usize, usize);

#[derive(Clone, Debug)]
struct Case {
    tokens: usize,
    columns: usize,
    layers: Vec<Layer>,
    /// First token, the one behind the last, slot.
    spans: Vec<[usize; 3]>,
    format: FloatFormat,
    bias: bool,
}

fn client() -> Option<&'static Client> {
    test_support::cuda(|client| low_rank::supports(client, FloatFormat::F16))
}

/// Half a unit in the last place, relative, with room for a tie that an f32 sum decides otherwise.
fn half_ulp(format: FloatFormat) -> f64 {
    match format {
        FloatFormat::F16 => 1.01 * 2f64.powi(-11),
        _ => 1.01 * 2f64.powi(-8),
    }
}

struct Held {
    lora_a: Vec<f32>,
    lora_b: Vec<f32>,
    scalings: Vec<f32>,
    sums: Vec<f32>,
    bias: Vec<f32>,
    handles: [Handle; 6],
}

fn check(client: &Client, case: &Case, seed: u64) {
    let &Case { tokens, columns, format, bias, .. } = case;
    let mut random = Random(seed);
    let mut draw =
        |len: usize, scale: f32| -> Vec<f32> { (0..len).map(|_| round(scale * random.normal(), format)).collect() };
    let handle = |values: &[f32]| client.create_from_slice(&half_bytes(values, format));
    let wide = |values: &[f32]| client.create_from_slice(bytemuck::cast_slice(values));
    let x = draw(tokens * columns, 1.0);
    let held: Vec<Held> = case
        .layers
        .iter()
        .map(|&Layer(rows, rank)| {
            let (lora_a, lora_b) = (draw(SLOTS * rank * columns, 0.05), draw(SLOTS * rows * rank, 0.05));
            let scalings: Vec<f32> = (0..SLOTS).map(|slot| 0.7 + slot as f32).collect();
            let (sums, bias) = (draw(tokens * rows, 1.0), draw(rows, 1.0));
            // Poisoned: an element that is not written stays NaN, and so must those behind the end.
            let out = handle(&vec![f32::NAN; (tokens + 1) * rows]);
            let handles = [handle(&lora_a), handle(&lora_b), wide(&scalings), wide(&sums), handle(&bias), out];
            Held { lora_a, lora_b, scalings, sums, bias, handles }
        })
        .collect();
    let words: Vec<u32> = std::iter::once(case.spans.len() as u32)
        .chain(case.spans.iter().flatten().map(|value| *value as u32))
        .collect();
    let (x_handle, spans) = (handle(&x), client.create_from_slice(bytemuck::cast_slice(&words)));
    let input = Input { x: &x_handle, spans: &spans, tokens, in_features: columns, format };
    let stacks: Vec<Stack<'_>> = held
        .iter()
        .zip(&case.layers)
        .map(|(Held { handles: [lora_a, lora_b, scalings, ..], .. }, &Layer(out_features, rank))| Stack {
            lora_a,
            lora_b,
            scalings,
            rank,
            slots: SLOTS,
            out_features,
        })
        .collect();
    let updates: Vec<Update<'_>> = held
        .iter()
        .map(|Held { handles: [_, _, _, sums, own, out], .. }| Update { sums, bias: bias.then_some(own), out })
        .collect();
    let read = |product: &Handle| client.read_one(product.clone()).expect("the kernel runs");
    let product = project(client, &input, &stacks).unwrap();
    let found = read(&product);
    // Counters are as they were, and parts are added in their order.
    assert_eq!(found, read(&project(client, &input, &stacks).unwrap()), "{case:?}: not the same bits on a second run");
    update(client, &input, &stacks, &product, &updates).unwrap();

    let slot_of = |token: usize| case.spans.iter().find(|[first, end, _]| (*first..*end).contains(&token));
    let found = halves(&found, format);
    let ranks: usize = case.layers.iter().map(|Layer(_, rank)| rank).sum();
    let mut first_rank = 0;
    for (&Layer(rows, rank), held) in case.layers.iter().zip(&held) {
        let results = halves(&read(&held.handles[5]), format);
        let (results, behind) = results.split_at(tokens * rows);
        assert!(behind.iter().all(|v| v.is_nan()), "{case:?} wrote behind its end");
        let bias = bias.then_some(&held.bias[..]);
        for token in 0..tokens {
            let u = &found[token * ranks + first_rank..][..rank];
            let sums = &held.sums[token * rows..][..rows];
            let what = format!("{case:?}, token {token}, rank {rank}");
            let Some([.., slot]) = slot_of(token) else {
                assert!(u.iter().all(|v| *v == 0.0), "{what}: a product without an adapter");
                let expected = oracle::update(sums, &[], &[], bias);
                assert_close(&what, &results[token * rows..][..rows], &expected, |_, e| e.abs() * half_ulp(format));
                continue;
            };
            let x = &x[token * columns..][..columns];
            let lora_a = &held.lora_a[slot * rank * columns..][..rank * columns];
            let expected = oracle::project(x, lora_a, held.scalings[*slot]);
            // Tensor cores truncate: each of n / 16 steps may lose an ulp of a sum of some sqrt(n) / 20 times the scaling.
            let lost = (columns as f64).powf(1.5) * 2f64.powi(-26);
            assert_close(format!("{what}: u"), u, &expected, |_, e| lost + e.abs() * half_ulp(format));
            let lora_b = &held.lora_b[slot * rows * rank..][..rows * rank];
            let expected = oracle::update(sums, u, lora_b, bias);
            let lost = 16.0 * (rank / 16 + 1) as f64 * 2f64.powi(-23);
            assert_close(&what, &results[token * rows..][..rows], &expected, |_, e| {
                lost * (1.0 + e.abs()) + e.abs() * half_ulp(format)
            });
        }
        first_rank += rank;
    }
}

#[test]
fn every_token_has_its_own_adapter() {
    let Some(client) = client() else { return };
    let each = |tokens: usize| (0..tokens).map(|token| [token, token + 1, 3 * token % SLOTS]).collect::<Vec<_>>();
    let three = vec![Layer(200, 16), Layer(64, 80), Layer(72, 32)];
    let cases = [
        (1, 64, vec![Layer(8, 16)], vec![[0, 1, 4]]),
        (17, 320, three.clone(), vec![[0, 17, 2]]),
        (20, 72, vec![Layer(40, 16)], vec![]),
        (33, 1288, three.clone(), vec![[0, 3, 1], [5, 6, 0], [8, 33, 4]]),
        (64, 4096, vec![Layer(64, 64); 3], (0..8).map(|i| [8 * i, 8 * i + 8, i % SLOTS]).collect()),
        (70, 11008, vec![Layer(136, 64)], vec![[2, 9, 1], [9, 20, 3], [20, 69, 2]]),
        (40, 256, three.clone(), each(40)),
        // Larger tiles.
        (129, 520, three.clone(), vec![[0, 64, 1], [64, 129, 0]]),
        (300, 264, vec![Layer(8, 112), Layer(1000, 16)], each(64)),
        (1030, 136, vec![Layer(48, 16)], vec![[5, 500, 3], [700, 1030, 4]]),
    ];
    for (seed, (tokens, columns, layers, spans)) in cases.into_iter().enumerate() {
        let format = on_device(client, [FloatFormat::BF16, FloatFormat::F16][seed % 2]);
        let case = Case { tokens, columns, layers, spans, format, bias: seed % 3 == 0 };
        check(client, &case, seed as u64);
    }
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let Some(client) = client() else { return };
    let buffer = client.empty(1 << 16);
    let input = Input { x: &buffer, spans: &buffer, tokens: 4, in_features: 64, format: FloatFormat::F16 };
    let stack = Stack { lora_a: &buffer, lora_b: &buffer, scalings: &buffer, rank: 16, slots: 2, out_features: 64 };
    let refused = |input: Input<'_>, stacks: &[Stack<'_>]| project(client, &input, stacks).unwrap_err().to_string();
    assert!(refused(input, &[]).contains("0 stacks, which should be 1 to 3"));
    assert!(refused(input, &[Stack { rank: 24, ..stack }]).contains("rank 24"));
    assert!(refused(input, &[Stack { out_features: 36, ..stack }]).contains("36 x 64"));
    assert!(refused(input, &[Stack { slots: 1000, ..stack }]).contains("`lora_a` holds 65536 bytes"));
    assert!(refused(Input { tokens: 1000, ..input }, &[stack]).contains("`x` holds"));
    let shifted = buffer.clone().offset_start(8);
    assert!(refused(Input { x: &shifted, ..input }, &[stack]).contains("`x` starts at byte 8"));
    let error = update(client, &input, &[stack], &buffer, &[]).unwrap_err();
    assert!(matches!(error, KernelError::Shape { .. }), "{error}");
    let error = project(client, &Input { format: FloatFormat::F32, ..input }, &[stack]).unwrap_err();
    assert!(matches!(error, KernelError::Format { .. }), "{error}");
}
