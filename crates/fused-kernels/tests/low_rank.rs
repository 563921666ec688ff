//! The low-rank kernels against the oracle, on a CUDA device.
//! `test_support` says what becomes of them where there is none.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{half_bytes, halves, on_device};
use cubecl::client::Client;
use cubecl::server::Handle;
use fused_kernels::low_rank::{self, Factor, FactorLayout, Gradient, Output, Projection, Shape, oracle};
use fused_kernels::{Dropout, FloatFormat, KernelError};
use test_support::Random;

const FORMATS: [FloatFormat; 2] = [FloatFormat::BF16, FloatFormat::F16];
const LAYOUTS: [FactorLayout; 2] = [FactorLayout::RankFirst, FactorLayout::FeaturesFirst];

/// Tokens, features, rank: single rows, ends of tiles and panels, ranks that are padded, rows that are not aligned,
/// contractions that blocks share as a cluster or through scratch memory.
const SHAPES: [(usize, usize, usize); 16] = [
    (1, 64, 8),
    (1, 4096, 64),
    (7, 40, 4),
    (33, 200, 16),
    (128, 256, 64),
    (130, 264, 20),
    (300, 77, 5),
    (65, 130, 64),
    (129, 36, 12),
    (31, 24, 65),
    (257, 520, 256),
    (1030, 136, 128),
    (2049, 72, 1),
    (64, 3000, 32),
    (1500, 136, 64),
    (1536, 4096, 64),
];

fn client() -> Option<&'static Client> {
    test_support::cuda(|client| low_rank::supports(client, FloatFormat::F16))
}

fn floats_of(random: &mut Random, n: usize) -> Vec<f32> {
    (0..n).map(|_| random.signed()).collect()
}

/// Values of a format.
fn halves_of(random: &mut Random, n: usize, format: FloatFormat) -> Vec<f32> {
    (0..n).map(|_| oracle::round(random.signed(), format)).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// A large operand with NaN before and after it: what a kernel reads beyond its rows shows.
fn upload_between_nans(client: &Client, values: &[f32], format: FloatFormat, before: usize) -> Handle {
    const AFTER: usize = 64;
    let mut bytes = vec![0xff; 2 * before];
    bytes.extend(half_bytes(values, format));
    bytes.extend(vec![0xff; 2 * AFTER]);
    client.create_from_slice(&bytes).offset_start(2 * before as u64).offset_end(2 * AFTER as u64)
}

/// Runs `write` twice on an output of `initial` bytes between guards, and hands back what it wrote.
fn guarded(client: &Client, initial: &[u8], write: impl Fn(&Handle)) -> Vec<u8> {
    const GUARD: usize = 256;
    let run = || {
        let mut bytes = vec![0xa5; GUARD];
        bytes.extend(initial);
        bytes.extend(vec![0xa5; GUARD]);
        let whole = client.create_from_slice(&bytes);
        write(&whole.clone().offset_start(GUARD as u64).offset_end(GUARD as u64));
        let read = client.read_one(whole).expect("the kernel runs");
        let (before, rest) = read.split_at(GUARD);
        let (written, after) = rest.split_at(initial.len());
        assert!(before.iter().chain(after).all(|b| *b == 0xa5), "wrote outside its output");
        written.to_vec()
    };
    let first = run();
    assert_eq!(first, run(), "not the same bits on a second run");
    first
}

/// Every element as near to the oracle's as an f32 sum of n products on tensor cores can promise: they truncate, so
/// each of n / 16 steps may lose an ulp, 2^-23 of a sum that grows to about sqrt(n) / 2 with operands below one.
/// That is n sqrt(n) 2^-28; four times as much is allowed for sums that grow larger.
fn assert_close(what: &str, ours: &[f32], theirs: &[f64], n: usize, rounding: f64) {
    let sum_error = (n as f64).powf(1.5) * 2f64.powi(-26);
    test_support::assert_close(what, ours, theirs, |_, expected| sum_error + expected.abs() * rounding);
}

/// Half a unit in the last place, relative, with room for a tie that an f32 sum decides otherwise.
fn half_ulp(format: FloatFormat) -> f64 {
    match format {
        FloatFormat::F16 => 1.01 * 2f64.powi(-11),
        _ => 1.01 * 2f64.powi(-8),
    }
}

#[test]
fn projections_are_the_oracles() {
    let Some(client) = client() else { return };
    for (case, (tokens, features, rank)) in SHAPES.into_iter().enumerate() {
        let (format, layout) = (on_device(client, FORMATS[case % 2]), LAYOUTS[case / 2 % 2]);
        let shape = Shape { tokens, features, rank };
        let mut random = Random(case as u64);
        let (x, factor) = (halves_of(&mut random, tokens * features, format), floats_of(&mut random, rank * features));
        let dropout = (case % 3 == 0).then(|| Dropout::new(random.0, 0.25));
        let device_factor = client.create_from_slice(bytemuck::cast_slice(&factor));
        let values = Factor { values: &device_factor, features, rank, layout };
        let packed = low_rank::pack(client, values, format).unwrap();
        // One element before: no row starts at a multiple of 16 bytes.
        for before in [64, 1] {
            let device_x = upload_between_nans(client, &x, format, before);
            let expected = oracle::project(&x, &factor, shape, layout, 0.5, dropout, format);
            for output in [Output::Half, Output::F32] {
                let what =
                    format!("{shape:?} {layout:?} {format:?} {output:?} dropout {} x {before}", dropout.is_some());
                let size = if output == Output::F32 { 4 } else { 2 };
                let written = guarded(client, &vec![0xff; tokens * rank * size], |out| {
                    let operands = Projection { x: &device_x, factor: &packed, out };
                    low_rank::project(client, operands, tokens, output, 0.5, dropout).unwrap();
                });
                match output {
                    Output::F32 => assert_close(&what, &floats(&written), &expected, features, 0.0),
                    Output::Half => {
                        assert_close(&what, &halves(&written, format), &expected, features, half_ulp(format));
                    }
                }
            }
        }
    }
}

#[test]
fn gradients_are_the_oracles() {
    let Some(client) = client() else { return };
    for (case, (tokens, features, rank)) in SHAPES.into_iter().enumerate() {
        let (format, layout) = (on_device(client, FORMATS[case / 2 % 2]), LAYOUTS[case % 2]);
        let shape = Shape { tokens, features, rank };
        let mut random = Random(100 + case as u64);
        let (x, small) =
            (halves_of(&mut random, tokens * features, format), halves_of(&mut random, tokens * rank, format));
        let dropout = (case % 3 == 0).then(|| Dropout::new(random.0, 0.25));
        let expected = oracle::gradient(&x, &small, shape, layout, dropout);
        let product = upload_between_nans(client, &small, format, 64);
        for gap in [64, 1] {
            let what = format!("{shape:?} {layout:?} {format:?} x {gap}");
            let device_x = upload_between_nans(client, &x, format, gap);
            let written = guarded(client, &vec![0xff; 4 * rank * features], |out| {
                let operands = Gradient { x: &device_x, product: &product, out };
                low_rank::gradient(client, operands, shape, layout, dropout, format).unwrap();
            });
            assert_close(&what, &floats(&written), &expected, tokens, 0.0);
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let Some(client) = client() else { return };
    let format = FloatFormat::F16;
    let handle = |elements: usize| client.empty(elements * 4);
    let pack = |features, rank, values: &Handle| {
        let factor = Factor { values, features, rank, layout: FactorLayout::RankFirst };
        low_rank::pack(client, factor, format).map(|_| ())
    };
    assert_eq!(pack(64, 257, &handle(64 * 257)), Err(KernelError::Rank(257)));
    assert_eq!(pack(64, 0, &handle(1)), Err(KernelError::Rank(0)));
    let short = KernelError::BufferSize { name: "factor", expected: 4 * 64 * 8, actual: 4 * 64 * 8 - 4 };
    assert_eq!(pack(64, 8, &handle(64 * 8 - 1)), Err(short));
}
