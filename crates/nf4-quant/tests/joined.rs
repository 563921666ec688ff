//! Several 4-bit products of one input, with an adapter of its own for each token, against f64.
//!
//! The bound of an element is that of `tests/matmul.rs` for the same kernel, and what it adds for `u = scaling · x Aᵀ`: its
//! f32 sum may round to another neighbour in 16 bits than the oracle's, a unit in the last place of u, times B.
#![cfg(feature = "kernels")]
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{narrow, round_to};
use cubecl::client::Client;
use nf4_quant::kernels::DeviceWeight;
use nf4_quant::matmul::joined::{Joined, JoinedWeight, Spans, Stack, launch, launch_on, supports};
use nf4_quant::matmul::{Direction, Operands, Path, Problem, Weight, matmul, paths};
use nf4_quant::{Element, FloatFormat, QuantConfig, QuantType, Quantized4bit};
use test_support::{Random, assert_close};

/// A weight of a case.
#[derive(Clone, Copy, Debug)]
struct Layer {
    rows: usize,
    /// Of its stack; 0 without one.
    rank: usize,
    bias: bool,
}

#[derive(Clone, Debug)]
struct Case {
    tokens: usize,
    columns: usize,
    layers: Vec<Layer>,
    /// First token, the one behind the last, slot.
    spans: Vec<[usize; 3]>,
    format: FloatFormat,
    out: FloatFormat,
    double_quant: bool,
    quant_type: QuantType,
}

const SLOTS: usize = 5;

fn plain(rows: usize) -> Layer {
    Layer { rows, rank: 0, bias: false }
}

fn adapted(rows: usize, rank: usize) -> Layer {
    Layer { rows, rank, bias: false }
}

impl Case {
    fn new(tokens: usize, columns: usize, layers: &[Layer], spans: &[[usize; 3]]) -> Self {
        Self {
            tokens,
            columns,
            layers: layers.to_vec(),
            spans: spans.to_vec(),
            format: FloatFormat::BF16,
            out: FloatFormat::BF16,
            double_quant: true,
            quant_type: QuantType::Nf4,
        }
    }

    fn problem(&self) -> Problem {
        Problem {
            tokens: self.tokens,
            out_features: self.layers[0].rows,
            in_features: self.columns,
            direction: Direction::Forward,
            rank: 0,
            format: self.format,
            out: self.out,
            blocksize: Some(64),
        }
    }
}

fn client() -> Option<&'static Client> {
    let problem = Case::new(1, 64, &[plain(16)], &[]).problem();
    test_support::cuda(|client| supports(client, &problem, &[16]))
}

fn bytes(values: &[f32], format: FloatFormat) -> Vec<u8> {
    with_element!(format, E => bytemuck::cast_slice(&narrow::<E>(values)).to_vec())
}

fn floats(bytes: &[u8], format: FloatFormat) -> Vec<f32> {
    with_element!(format, E => bytemuck::pod_collect_to_vec::<u8, E>(bytes).into_iter().map(Element::to_f32).collect())
}

/// Half a unit in the last place, relative.
fn half_ulp(format: FloatFormat) -> f64 {
    match format {
        FloatFormat::F32 => 2_f64.powi(-24),
        FloatFormat::F16 => 2_f64.powi(-11),
        FloatFormat::BF16 => 2_f64.powi(-8),
    }
}

/// What a layer holds on the host and on the device.
struct Held {
    dense: Vec<f32>,
    weight: DeviceWeight,
    bias: Vec<f32>,
    lora_a: Vec<f32>,
    lora_b: Vec<f32>,
    scalings: Vec<f32>,
    handles: [cubecl::server::Handle; 5],
}

fn check(client: &Client, path: Path, case: &Case, seed: u64) {
    let Case { tokens, columns, format, out, .. } = *case;
    let mut random = Random(seed);
    let mut draw = |len: usize, scale: f32| -> Vec<f32> { (0..len).map(|_| random.normal() * scale).collect() };
    let handle = |values: &[f32], format| client.create_from_slice(&bytes(values, format));
    let x = round_to(&draw(tokens * columns, 1.0), format);
    let x_handle = handle(&x, format);
    let config = QuantConfig { quant_type: case.quant_type, blocksize: 64, double_quant: case.double_quant };
    let held: Vec<Held> = case
        .layers
        .iter()
        .map(|layer| {
            let quantized =
                Quantized4bit::quantize(&draw(layer.rows * columns, 0.05), &[layer.rows, columns], &config).unwrap();
            let lora_a = round_to(&draw((SLOTS * layer.rank * columns).max(1), 0.05), format);
            let lora_b = round_to(&draw((SLOTS * layer.rank * layer.rows).max(1), 0.05), format);
            let scalings: Vec<f32> = (0..SLOTS).map(|slot| 0.7 + slot as f32).collect();
            let bias = round_to(&draw(layer.rows, 1.0), format);
            // Poisoned: an element that is not written stays NaN, and so must those behind the end.
            let poison = vec![f32::NAN; (tokens + 1) * layer.rows];
            let handles = [
                handle(&lora_a, format),
                handle(&lora_b, format),
                handle(&scalings, FloatFormat::F32),
                handle(&bias, format),
                handle(&poison, out),
            ];
            let weight = DeviceWeight::from_host(client, &quantized).unwrap();
            Held { dense: quantized.dequantize::<f32>().unwrap(), weight, bias, lora_a, lora_b, scalings, handles }
        })
        .collect();
    let words: Vec<u32> = std::iter::once(case.spans.len() as u32)
        .chain(case.spans.iter().flatten().map(|value| *value as u32))
        .collect();
    let words = client.create_from_slice(bytemuck::cast_slice(&words));
    let weights: Vec<JoinedWeight<'_>> = case
        .layers
        .iter()
        .zip(&held)
        .map(|(layer, Held { weight, handles: [lora_a, lora_b, scalings, bias, out], .. })| JoinedWeight {
            weight,
            out_features: layer.rows,
            bias: layer.bias.then_some(bias),
            stack: (layer.rank > 0).then_some(Stack { lora_a, lora_b, scalings, rank: layer.rank, slots: SLOTS }),
            out,
        })
        .collect();
    let joined = Joined {
        x: &x_handle,
        tokens,
        in_features: columns,
        format,
        out,
        weights: &weights,
        spans: (!case.spans.is_empty()).then_some(Spans { words: &words }),
    };
    // Twice: the counters must be as they were.
    for _ in 0..2 {
        launch_on(client, path, &joined).unwrap();
    }
    for (which, (layer, held)) in case.layers.iter().zip(&held).enumerate() {
        let actual = floats(&client.read_one(held.handles[4].clone()).unwrap(), out);
        let (actual, behind) = actual.split_at(tokens * layer.rows);
        assert!(behind.iter().all(|v| v.is_nan()), "{case:?}, {path:?} wrote behind its end");
        let (expected, bounds) = oracle(case, layer, held, &x);
        assert_close(format!("{case:?}, {path:?}, weight {which}"), actual, &expected, |i, expected| {
            bounds[i] + half_ulp(out) * (expected.abs() + bounds[i])
        });
    }
}

/// Expected values, and how far sums may be from them before they are rounded.
fn oracle(case: &Case, layer: &Layer, held: &Held, x: &[f32]) -> (Vec<f64>, Vec<f64>) {
    let Case { tokens, columns, format, .. } = *case;
    let lost = (17 * (columns.div_ceil(16) + layer.rank.div_ceil(16) + 16)) as f64 * 2_f64.powi(-23);
    let (mut values, mut bounds) = (Vec::new(), Vec::new());
    for token in 0..tokens {
        let x = &x[token * columns..][..columns];
        let span = case.spans.iter().find(|[first, end, _]| (*first..*end).contains(&token));
        let u: Vec<f64> = match span {
            Some([.., slot]) => (0..layer.rank)
                .map(|k| {
                    let a = &held.lora_a[(slot * layer.rank + k) * columns..][..columns];
                    let sum: f64 = x.iter().zip(a).map(|(x, a)| f64::from(*x) * f64::from(*a)).sum();
                    f64::from(round_to(&[(f64::from(held.scalings[*slot]) * sum) as f32], format)[0])
                })
                .collect(),
            None => Vec::new(),
        };
        for row in 0..layer.rows {
            let w = &held.dense[row * columns..][..columns];
            let (mut sum, mut magnitude, mut squares, mut rounding) = (0.0, 0.0, 0.0, 0.0);
            for (x, w) in x.iter().zip(w) {
                let product = f64::from(*x) * f64::from(*w);
                sum += product;
                magnitude += product.abs();
                squares += product * product;
            }
            if let Some([.., slot]) = span {
                let b = &held.lora_b[(slot * layer.rows + row) * layer.rank..][..layer.rank];
                for (u, b) in u.iter().zip(b) {
                    sum += u * f64::from(*b);
                    magnitude += (u * f64::from(*b)).abs();
                    rounding += 2.0 * half_ulp(format) * (u * f64::from(*b)).abs();
                }
            }
            if layer.bias {
                sum += f64::from(held.bias[row]);
                magnitude += f64::from(held.bias[row].abs());
            }
            values.push(sum);
            bounds.push(lost * magnitude + 6.0 * half_ulp(format) * squares.sqrt() + rounding);
        }
    }
    (values, bounds)
}

fn check_all(cases: impl IntoIterator<Item = Case>) {
    let Some(client) = client() else { return };
    for (seed, case) in cases.into_iter().enumerate() {
        let here =
            paths(client, &case.problem()).into_iter().filter(|path| matches!(path, Path::Gemv | Path::Resident));
        for path in here {
            check(client, path, &case, seed as u64);
        }
    }
}

#[test]
fn weights_of_any_rows_share_an_input() {
    let layers = [
        vec![plain(200), plain(64), plain(72)],
        vec![plain(17), plain(5000)],
        vec![Layer { bias: true, ..plain(33) }, plain(8), Layer { bias: true, ..plain(100) }],
        vec![plain(136)],
    ];
    let of_tokens =
        |tokens| layers.iter().zip([320, 256, 1280, 2304]).map(move |(layers, columns)| (tokens, layers, columns));
    let cases = (1..=16).flat_map(of_tokens);
    check_all(cases.map(|(tokens, layers, columns)| Case::new(tokens, columns, layers, &[])));
}

#[test]
fn every_token_has_its_own_adapter() {
    let layers = [adapted(200, 16), plain(64), adapted(72, 32)];
    let each: Vec<[usize; 3]> = (0..16).map(|token| [token, token + 1, (3 * token) % SLOTS]).collect();
    let mut cases = Vec::new();
    for columns in [64, 320, 1280, 2304] {
        for (tokens, spans) in [
            (1, vec![[0, 1, 4]]),
            (4, vec![[0, 2, 1], [2, 4, 0]]),
            (5, vec![[1, 4, 3]]),
            (8, vec![[0, 8, 2]]),
            (16, vec![[0, 3, 1], [5, 6, 0], [8, 16, 4]]),
            (16, each.clone()),
        ] {
            cases.push(Case::new(tokens, columns, &layers, &spans));
        }
    }
    // More parts, and more tiles, than cubes.
    cases.push(Case::new(16, 2304, &[adapted(6000, 64), adapted(3000, 128), adapted(1000, 16)], &each));
    cases.push(Case::new(2, 1280, &[adapted(6000, 64), adapted(3000, 64)], &[[0, 2, 3]]));
    check_all(cases);
}

#[test]
fn formats_and_codebooks() {
    let layers = [adapted(40, 16), Layer { bias: true, ..adapted(24, 16) }];
    let mut cases = Vec::new();
    for tokens in [1, 7, 13] {
        for format in [FloatFormat::BF16, FloatFormat::F16] {
            for out in [format, FloatFormat::F32] {
                for (double_quant, quant_type) in
                    [(false, QuantType::Nf4), (true, QuantType::Fp4), (false, QuantType::Fp4)]
                {
                    let case = Case::new(tokens, 320, &layers, &[[0, tokens, 1]]);
                    cases.push(Case { format, out, double_quant, quant_type, ..case });
                }
            }
        }
    }
    check_all(cases);
}

#[test]
fn what_does_not_fit_together_is_refused() {
    let Some(client) = client() else { return };
    let quantize = |rows: usize, double_quant| {
        let config = QuantConfig { double_quant, ..QuantConfig::default() };
        let host = Quantized4bit::quantize(&vec![0.5; rows * 64], &[rows, 64], &config).unwrap();
        DeviceWeight::from_host(client, &host).unwrap()
    };
    let (one, other) = (quantize(16, true), quantize(16, false));
    let [x, out] = [2 * 64 * 2, 2 * 16 * 2].map(|bytes| client.empty(bytes));
    let each = |weight| JoinedWeight { weight, out_features: 16, bias: None, stack: None, out: &out };
    let of = |tokens, weights: &[JoinedWeight<'_>]| {
        let (format, out) = (FloatFormat::BF16, FloatFormat::BF16);
        let joined = Joined { x: &x, tokens, in_features: 64, format, out, weights, spans: None };
        launch(client, &joined).map_err(|e| e.to_string())
    };
    assert_eq!(of(2, &[each(&one), each(&one)]), Ok(()));
    assert!(of(2, &[each(&one), each(&other)]).unwrap_err().contains("different codebooks or blocks"));
    assert!(of(3, &[each(&one)]).unwrap_err().contains("`x`"));
    assert!(of(17, &[each(&one)]).unwrap_err().contains("no joined product"));
    assert!(of(2, &[each(&one); 4]).unwrap_err().contains("no joined product"));
    let stack = Stack { lora_a: &x, lora_b: &x, scalings: &x, rank: 8, slots: 1 };
    let odd = JoinedWeight { stack: Some(stack), ..each(&one) };
    assert!(of(2, &[odd]).unwrap_err().contains("no multiple of 16"));
    // x in registers would leave columns out.
    let host = Quantized4bit::quantize(&vec![0.5; 8 * 4160], &[8, 4160], &QuantConfig::default()).unwrap();
    let weight = DeviceWeight::from_host(client, &host).unwrap();
    let wide = client.empty(5 * 4160 * 2);
    let operands = Operands { x: &wide, weight: Weight::FourBit(&weight), low_rank: None, bias: None };
    let problem = Problem { out_features: 8, ..Case::new(5, 4160, &[plain(8)], &[]).problem() };
    let error = matmul(client, Path::Resident, &problem, &operands, &wide).unwrap_err().to_string();
    assert!(error.contains("take another path"), "{error}");
}
