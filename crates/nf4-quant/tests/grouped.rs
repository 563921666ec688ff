//! Products of groups of rows against their oracle in f64, on CUDA.
//!
//! An element may be off by what f32 sums on tensor cores lose, and half a unit in the last place of the result; see
//! `tests/matmul.rs`, whose products are the same kernel's.
#![cfg(feature = "kernels")]
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{narrow, on_device, round_to};
use cubecl::client::Client;
use nf4_quant::kernels::{DeviceAbsmax, DeviceWeight};
use nf4_quant::matmul::grouped::{
    GroupedOperands, GroupedPath, Groups, grouped, max_tiles, path, paths, reference, tile_rows,
};
use nf4_quant::matmul::{Direction, LowRank, Problem, Weight};
use nf4_quant::{Absmax, Element, FloatFormat, QuantConfig, Quantized4bit};
use test_support::{Random, assert_close};

const PROBLEM: Problem = Problem {
    tokens: 0,
    out_features: 256,
    in_features: 192,
    direction: Direction::Forward,
    rank: 0,
    format: FloatFormat::BF16,
    out: FloatFormat::BF16,
    blocksize: Some(64),
};
const DIRECTIONS: [Direction; 2] = [Direction::Forward, Direction::InputGradient];

fn client() -> Option<&'static Client> {
    test_support::cuda(|client| path(client, &on_device(client, Problem { tokens: 100, ..PROBLEM }), 3, 64).is_some())
}

fn bytes(values: &[f32], format: FloatFormat) -> Vec<u8> {
    with_element!(format, E => bytemuck::cast_slice(&narrow::<E>(values)).to_vec())
}

fn floats(bytes: &[u8], format: FloatFormat) -> Vec<f32> {
    with_element!(format, E => bytemuck::pod_collect_to_vec::<u8, E>(bytes).into_iter().map(Element::to_f32).collect())
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// The table of tiles, with some without rows behind.
fn table(counts: &[usize], tile_rows: usize) -> Vec<u32> {
    let rows: usize = counts.iter().sum();
    let (mut table, mut first) = (Vec::new(), 0);
    for (group, &count) in counts.iter().enumerate() {
        for start in (first..first + count).step_by(tile_rows) {
            table.extend([group, start, (start + tile_rows).min(first + count)].map(|v| v as u32));
        }
        first += count;
    }
    let most = 3 * max_tiles(rows, counts.len(), tile_rows);
    assert!(table.len() <= most, "{counts:?} in tiles of {tile_rows}");
    table.resize(most, 0);
    table
}

/// The weights of all groups as one on the device, and what they mean, rounded to `format`.
fn stack(client: &Client, weights: &[Quantized4bit], format: FloatFormat) -> (DeviceWeight, Vec<f32>) {
    let upload = |bytes: Vec<u8>| client.create_from_slice(&bytes);
    let codes = weights.iter().flat_map(|weight| weight.codes.clone()).collect();
    let plain = |of: &dyn Fn(&Quantized4bit) -> Vec<f32>| {
        upload(weights.iter().flat_map(of).flat_map(f32::to_le_bytes).collect())
    };
    let absmax = match &weights[0].state.absmax {
        Absmax::Plain(_) => DeviceAbsmax::Plain(plain(&|weight| match &weight.state.absmax {
            Absmax::Plain(absmax) => absmax.clone(),
            Absmax::Nested(_) => unreachable!(),
        })),
        Absmax::Nested(first) => {
            let nested = |weight: &Quantized4bit| match &weight.state.absmax {
                Absmax::Nested(nested) => nested.clone(),
                Absmax::Plain(_) => unreachable!(),
            };
            let mut values: Vec<f32> = weights.iter().flat_map(|weight| nested(weight).absmax).collect();
            values.extend(weights.iter().map(|weight| nested(weight).offset));
            DeviceAbsmax::Nested {
                codes: upload(weights.iter().flat_map(|weight| nested(weight).codes).collect()),
                absmax: upload(values.into_iter().flat_map(f32::to_le_bytes).collect()),
                blocksize: first.blocksize,
            }
        }
    };
    let state = &weights[0].state;
    let num_elements = weights.len() * state.num_elements();
    let meaning: Vec<f32> = weights.iter().flat_map(|weight| weight.dequantize::<f32>().unwrap()).collect();
    let (quant_type, blocksize) = (state.quant_type, state.blocksize);
    let device = DeviceWeight { codes: upload(codes), absmax, quant_type, blocksize, num_elements };
    (device, round_to(&meaning, format))
}

/// What a case checks; `PROBLEM`'s sizes are its group's.
struct Case {
    problem: Problem,
    counts: Vec<usize>,
    double_quant: bool,
    scale: f32,
}

fn check(client: &Client, path: GroupedPath, case: &Case, tile_rows: usize, seed: u64) {
    let counts = &case.counts;
    let problem = Problem { tokens: counts.iter().sum(), ..case.problem };
    let Problem { tokens, out_features, in_features, rank, format, out, .. } = problem;
    let (features, depth, groups) = (problem.features(), problem.depth(), counts.len());
    let mut random = Random(seed);
    let mut draw = |len: usize, scale: f32| -> Vec<f32> { (0..len).map(|_| random.normal() * scale).collect() };
    let handle = |values: &[f32], format| client.create_from_slice(&bytes(values, format));
    let x = round_to(&draw(tokens * depth, 1.0), format);
    let product = round_to(&draw(tokens * rank, 1.0), format);
    let factor = draw(groups * features * rank, 0.05);
    let (quantized, dense);
    let (weight, meaning) = match problem.blocksize {
        Some(blocksize) => {
            let config = QuantConfig { blocksize, double_quant: case.double_quant, ..QuantConfig::default() };
            let one = |group: usize| {
                // Other means, so that an offset of another group shows.
                let values = draw(out_features * in_features, 0.03 * (group + 1) as f32);
                Quantized4bit::quantize(&values, &[out_features, in_features], &config).unwrap()
            };
            let weights: Vec<_> = (0..groups).map(one).collect();
            let (device, meaning) = stack(client, &weights, format);
            quantized = device;
            (Weight::FourBit(&quantized), meaning)
        }
        None => {
            let values = round_to(&draw(groups * out_features * in_features, 0.05), format);
            dense = handle(&values, format);
            (Weight::Dense(&dense), values)
        }
    };
    let table: Vec<u8> = table(counts, tile_rows).into_iter().flat_map(u32::to_le_bytes).collect();
    let tiles = client.create_from_slice(&table);
    let table = Groups { count: groups, tiles: &tiles, tile_count: table.len() / 12, tile_rows };
    let (x_handle, product_handle, factor_handle) =
        (handle(&x, format), handle(&product, format), handle(&factor, FloatFormat::F32));
    let low_rank = (rank > 0).then_some(LowRank { product: &product_handle, factor: &factor_handle, mask: None });
    let operands = GroupedOperands { x: &x_handle, weight, low_rank, scale: case.scale };
    let y = handle(&vec![f32::NAN; tokens * features], out);
    grouped(client, path, &problem, &table, &operands, &y).unwrap();
    let actual = floats(&client.read_one(y).expect("the kernel runs"), out);

    let (x, meaning, product) = (wide(&x), wide(&meaning), wide(&product));
    let factor = wide(&round_to(&factor, format));
    let expect = |of: fn(f64) -> f64| {
        let map = |values: &[f64]| values.iter().map(|v| of(*v)).collect::<Vec<_>>();
        let (x, weight, u, b) = (map(&x), map(&meaning), map(&product), map(&factor));
        let low_rank = (rank > 0).then_some((&u[..], &b[..]));
        reference(&problem, counts, &x, &weight, low_rank, of(f64::from(case.scale)))
    };
    let (expected, magnitudes) = (expect(|v| v), expect(f64::abs));
    let steps = depth.div_ceil(16) + rank.div_ceil(16) + 8;
    let lost = (17 * steps) as f64 * 2_f64.powi(-23);
    let half_ulp = match out {
        FloatFormat::F32 => 2_f64.powi(-24),
        FloatFormat::F16 => 2_f64.powi(-11),
        FloatFormat::BF16 => 2_f64.powi(-8),
    };
    let what = format!("{path:?}, {problem:?}, {counts:?} in tiles of {tile_rows}");
    assert_close(what, &actual, &expected, |i, expected| {
        let sums = lost * magnitudes[i];
        sums + half_ulp * (expected.abs() + sums)
    });
}

/// Rows of groups: none, few, one less and one more than a tile, many, none at the end.
fn counts() -> Vec<Vec<usize>> {
    vec![vec![3, 0, 17, 130, 0, 64, 1], vec![0, 0, 300, 0], vec![129, 127, 128], vec![1], vec![16, 15, 65, 63, 0]]
}

fn all(problem: Problem, double_quant: bool) {
    let Some(client) = client() else { return };
    for (seed, counts) in counts().into_iter().enumerate() {
        for direction in DIRECTIONS {
            for tile_rows in [16, 64, 128] {
                let problem = on_device(client, Problem { direction, ..problem });
                let scale = if problem.blocksize.is_none() { 0.7 } else { 1.0 };
                let case = Case { problem, counts: counts.clone(), double_quant, scale };
                let tokens = counts.iter().sum();
                let paths = paths(client, &Problem { tokens, ..problem }, counts.len(), tile_rows);
                assert!(!paths.is_empty(), "no path for {problem:?}");
                paths.into_iter().for_each(|path| check(client, path, &case, tile_rows, seed as u64));
            }
        }
    }
}

#[test]
fn weights_in_4_bits() {
    // A nested block is 16,384 weights.
    all(Problem { out_features: 256, in_features: 192, ..PROBLEM }, true);
    all(PROBLEM, false);
    all(Problem { out_features: 72, in_features: 320, blocksize: Some(256), ..PROBLEM }, false);
}

#[test]
fn low_rank_updates() {
    for rank in [8, 16, 40, 128] {
        all(Problem { rank, out_features: 128, in_features: 256, ..PROBLEM }, true);
    }
    let out = FloatFormat::F16;
    all(Problem { rank: 16, format: FloatFormat::F16, out, out_features: 128, in_features: 128, ..PROBLEM }, true);
}

/// As LoRA's factors are: few rows or columns.
#[test]
fn dense_weights() {
    for (out_features, in_features) in [(16, 256), (8, 72), (40, 320), (256, 16)] {
        all(Problem { blocksize: None, out_features, in_features, ..PROBLEM }, false);
    }
}

#[test]
fn the_same_operands_give_the_same_bits_whatever_the_tiles() {
    let Some(client) = client() else { return };
    let problem = Problem { tokens: 180, out_features: 8, in_features: 64, blocksize: None, ..PROBLEM };
    let problem = on_device(client, problem);
    let mut random = Random(5);
    let mut draw = |len: usize| -> Vec<f32> { (0..len).map(|_| random.normal()).collect() };
    let x = client.create_from_slice(&bytes(&draw(180 * 64), problem.format));
    let weight = client.create_from_slice(&bytes(&draw(3 * 8 * 64), problem.format));
    let run = |tile_rows: usize| {
        let path = path(client, &problem, 3, tile_rows).unwrap();
        let table: Vec<u8> = table(&[50, 100, 30], tile_rows).into_iter().flat_map(u32::to_le_bytes).collect();
        let tiles = client.create_from_slice(&table);
        let groups = Groups { count: 3, tiles: &tiles, tile_count: table.len() / 12, tile_rows };
        let operands = GroupedOperands { x: &x, weight: Weight::Dense(&weight), low_rank: None, scale: 1.0 };
        let y = client.empty(180 * 8 * 2);
        grouped(client, path, &problem, &groups, &operands, &y).unwrap();
        client.read_one(y).unwrap().to_vec()
    };
    let first = run(16);
    for tile_rows in [16, 64, 128, 128] {
        assert!(run(tile_rows) == first, "tiles of {tile_rows}");
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let Some(client) = client() else { return };
    let problem = on_device(client, Problem { tokens: 100, blocksize: None, ..PROBLEM });
    let (large, short) = (client.empty(1 << 20), client.empty(100));
    let path = path(client, &problem, 2, 64).unwrap();
    let groups = Groups { count: 2, tiles: &large, tile_count: 4, tile_rows: 64 };
    let operands = GroupedOperands { x: &large, weight: Weight::Dense(&large), low_rank: None, scale: 1.0 };
    for (problem, groups, operands, message) in [
        (problem, groups, GroupedOperands { x: &short, ..operands }, "`x`"),
        (problem, Groups { tiles: &short, tile_count: 10, ..groups }, operands, "`tiles`"),
        (problem, Groups { count: 20, ..groups }, operands, "`weight`"),
        (problem, Groups { tile_rows: 32, ..groups }, operands, "32 rows a tile"),
        (Problem { rank: 8, ..problem }, groups, operands, "rank 8 with no"),
        (Problem { blocksize: Some(64), ..problem }, groups, operands, "kind"),
    ] {
        let error = grouped(client, path, &problem, &groups, &operands, &large).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    for problem in [Problem { rank: 4, ..problem }, Problem { in_features: 60, ..problem }] {
        assert_eq!(paths(client, &problem, 2, 64), [], "{problem:?}");
    }
    assert_eq!(paths(client, &problem, 2, 32), []);
}

#[test]
fn tiles_follow_the_mean_of_the_groups() {
    assert_eq!(
        [(100, 128), (2048, 128), (16_384, 128), (65_536, 128)].map(|(r, g)| tile_rows(r, g)),
        [16, 16, 64, 128]
    );
    for (rows, groups) in [(0, 4), (1, 128), (1000, 3)] {
        for tile_rows in [16, 64, 128] {
            assert!(max_tiles(rows, groups, tile_rows) >= rows.div_ceil(tile_rows), "{rows} {groups} {tile_rows}");
        }
    }
}
