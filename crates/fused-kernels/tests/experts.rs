//! The kernels around experts' products against their oracle, on every runtime at hand.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use cubecl::client::Client;
use cubecl::server::Handle;
use fused_kernels::experts::{
    Biased, Combine, FactorGradient, Gated, GatedBackward, Routing, WeightGradient, combine, gated, gated_backward,
    gather, gradient, oracle, route, weight_gradient, weights,
};
use fused_kernels::gated::{self as gate, Activation};
use fused_kernels::low_rank::FactorLayout;
use fused_kernels::{FloatFormat, KernelError, supports};
use half::{bf16, f16};
use test_support::{assert_close, clients, noise};

/// Tokens, experts, experts of a token, rows of a tile: one expert, as many as a token has, more than a cube has units,
/// more experts than rows, more entries than units.
const SHAPES: [(usize, usize, usize, usize); 7] = [
    (1, 1, 1, 16),
    (5, 4, 2, 16),
    (40, 8, 8, 16),
    (9, 300, 3, 16),
    (300, 128, 8, 64),
    (1000, 3, 1, 128),
    (0, 4, 2, 16),
];

fn everywhere(test: impl Fn(&Client)) {
    clients().into_iter().for_each(|(_, client)| test(client));
}

fn in_formats(test: impl Fn(&Client, FloatFormat)) {
    everywhere(|client| {
        FloatFormat::ALL.into_iter().filter(|format| supports(client, *format)).for_each(|format| test(client, format));
    });
}

/// Values as `format` holds them, and their bytes.
fn rounded(values: Vec<f32>, format: FloatFormat) -> (Vec<f64>, Vec<u8>) {
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
    let values = values.into_iter().map(one).collect();
    (values, bytes)
}

/// Random values and the buffer that holds them.
fn uploaded(client: &Client, seed: u64, len: usize, format: FloatFormat) -> (Vec<f64>, Handle) {
    let (values, bytes) = rounded(noise(seed, len), format);
    (values, client.create_from_slice(&padded(bytes)))
}

/// Bytes of no buffer at all are refused by some runtimes.
fn padded(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.resize(bytes.len().max(4), 0);
    bytes
}

fn read(client: &Client, handle: Handle, len: usize, format: FloatFormat) -> Vec<f32> {
    let bytes = client.read_one(handle).expect("the kernels run");
    let value = |bytes: &[u8]| match format {
        FloatFormat::F32 => f32::from_le_bytes(bytes.try_into().unwrap()),
        FloatFormat::F16 => f16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
        FloatFormat::BF16 => bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
    };
    bytes.chunks_exact(format.size()).take(len).map(value).collect()
}

/// A buffer of no number, so that what is not written shows.
fn poison(client: &Client, len: usize, format: FloatFormat) -> Handle {
    client.create_from_slice(&padded(rounded(vec![f32::NAN; len], format).1))
}

/// Half a unit in the last place, relative.
fn half_ulp(format: FloatFormat) -> f64 {
    match format {
        FloatFormat::F32 => 6e-8,
        FloatFormat::F16 => 4.9e-4,
        FloatFormat::BF16 => 3.91e-3,
    }
}

fn routing((tokens, experts, per_token, tile_rows): (usize, usize, usize, usize)) -> Routing {
    Routing::new(tokens, experts, per_token, tile_rows).unwrap()
}

fn words_of(client: &Client, scores: &[f32], routing: &Routing) -> (Vec<u32>, Handle) {
    let bytes = scores.iter().flat_map(|score| score.to_le_bytes()).collect();
    let scores = client.create_from_slice(&padded(bytes));
    let poison: Vec<u8> = vec![0xAA; 4 * routing.words()];
    let words = client.create_from_slice(&poison);
    route(client, &scores, &words, routing).unwrap();
    let bytes = client.read_one(words.clone()).expect("the kernels run");
    (bytes.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect(), words)
}

/// The words of random scores.
fn routed(client: &Client, routing: &Routing) -> (Vec<u32>, Handle) {
    words_of(client, &noise(9, routing.tokens() * routing.experts()), routing)
}

#[test]
fn rows_are_sorted_by_their_experts() {
    everywhere(|client| {
        for shape in SHAPES {
            let routing = routing(shape);
            let len = routing.tokens() * routing.experts();
            let uneven = |i: usize| if i.is_multiple_of(routing.experts()) { 5.0 } else { (i % 3) as f32 };
            for (what, scores) in [
                ("random", noise(1, len)),
                ("equal", vec![0.5; len]),
                ("the first for all", (0..len).map(uneven).collect()),
                ("of both signs, and zeros", (0..len).map(|i| [-1.0, 1.0, 0.0, -0.0, -2.0][i % 5]).collect()),
            ] {
                let expected = oracle::route(&scores, &routing);
                assert_eq!(words_of(client, &scores, &routing).0, expected, "{what}, {shape:?}");
            }
        }
    });
}

/// Software and hardware may take any bits for one that is no number, but words must stay within their bounds.
#[test]
fn scores_that_are_no_numbers_choose_something() {
    everywhere(|client| {
        let routing = routing((3, 5, 2, 16));
        let words = words_of(client, &[f32::NAN; 15], &routing).0;
        assert!(words[routing.chosen()].iter().all(|expert| *expert < 5));
        assert!(words[routing.slots()].iter().all(|slot| *slot < 6));
        assert_eq!(words[routing.offsets().end - 1], 6);
    });
}

#[test]
fn weights_and_their_gradient() {
    everywhere(|client| {
        for (shape, normalise) in SHAPES.into_iter().flat_map(|shape| [(shape, true), (shape, false)]) {
            let routing = routing(shape);
            let len = routing.tokens() * routing.experts();
            let (scores, scores_handle) = uploaded(client, 9, len, FloatFormat::F32);
            let (words, words_handle) = routed(client, &routing);
            let out = poison(client, routing.rows(), FloatFormat::F32);
            weights(client, &scores_handle, &words_handle, &out, &routing, normalise).unwrap();
            let expected = oracle::weights(&scores, &words, &routing, normalise);
            let found = read(client, out.clone(), routing.rows(), FloatFormat::F32);
            // Sums of up to 300 terms, and exponentials of some units in the last place.
            assert_close(format!("weights, {shape:?}"), &found, &expected, |_, e: f64| 3e-5 * e.abs() + 1e-7);

            let (dweights, dweights_handle) = uploaded(client, 11, routing.rows(), FloatFormat::F32);
            let dscores = poison(client, len, FloatFormat::F32);
            let buffers =
                WeightGradient { dweights: &dweights_handle, weights: &out, scores: &scores_handle, dscores: &dscores };
            weight_gradient(client, buffers, &words_handle, &routing, normalise).unwrap();
            let expected = oracle::weight_gradient(&dweights, &scores, &words, &routing, normalise);
            let found = read(client, dscores, len, FloatFormat::F32);
            // As the weights, which are at most 1, times up to four; differences of such numbers.
            assert_close(format!("gradient, {shape:?}"), &found, &expected, |_, _| 2e-4);
        }
    });
}

#[test]
fn rows_are_gathered_and_combined() {
    in_formats(|client, format| {
        for (shape, width) in SHAPES.into_iter().flat_map(|shape| [(shape, 64), (shape, 33)]) {
            let routing = routing(shape);
            let (words, words_handle) = routed(client, &routing);
            let (x, x_handle) = uploaded(client, 2, routing.tokens() * width, format);
            let out = poison(client, routing.rows() * width, format);
            gather(client, &x_handle, &words_handle, &out, &routing, width, format).unwrap();
            let found = read(client, out, routing.rows() * width, format);
            let expected = oracle::gather(&x, &words, &routing, width);
            assert!(found.iter().zip(&expected).all(|(a, b)| f64::from(*a) == *b), "{shape:?} {width} {format:?}");

            let (rows, rows_handle) = uploaded(client, 3, routing.rows() * width, format);
            let (more, more_handle) = uploaded(client, 4, routing.rows() * width, format);
            let (factors, factors_handle) = uploaded(client, 5, routing.rows(), FloatFormat::F32);
            let both: Vec<f64> = rows.iter().zip(&more).map(|(a, b)| a + b).collect();
            for (two, weighted) in [(false, true), (true, false)] {
                let out = poison(client, routing.tokens() * width, format);
                let buffers = Combine {
                    rows: &rows_handle,
                    more: two.then_some(&more_handle),
                    bias: None,
                    weights: weighted.then_some(&factors_handle),
                    out: &out,
                };
                combine(client, buffers, &words_handle, &routing, width, format).unwrap();
                let found = read(client, out, routing.tokens() * width, format);
                let rows = if two { &both } else { &rows };
                let expected = oracle::combine(rows, weighted.then_some(&factors), &words, &routing, width);
                // One rounding; f32 sums of up to eight terms of up to ten or so.
                let what = format!("combine, {shape:?} {width} {format:?}");
                assert_close(what, &found, &expected, |_, e: f64| half_ulp(format) * e.abs() + 1e-5);
            }
        }
    });
}

/// Both widths of rows odd, and not.
#[test]
fn biases_of_experts_come_in_where_rows_are_read() {
    in_formats(|client, format| {
        for ((shape, [width, hidden]), activation) in
            [(SHAPES[1], [64, 96]), (SHAPES[2], [33, 7]), (SHAPES[4], [96, 40])].into_iter().zip([
                Activation::ClampedSwish,
                Activation::Silu,
                Activation::ClampedSwish,
            ])
        {
            let what = format!("{shape:?} {width} {hidden} {activation:?} {format:?}");
            let routing = routing(shape);
            let (words, words_handle) = routed(client, &routing);
            let (rows, experts) = (routing.rows(), routing.experts());
            let sized = |seed, rows: usize, width: usize| uploaded(client, seed, rows * width, format);
            let [(dy, dy_handle), (gate_rows, gate_handle), (up_rows, up_handle)] =
                [2, 3, 4].map(|seed| sized(seed, rows, width));
            let [(gate_bias, gate_bias_handle), (up_bias, up_bias_handle)] =
                [5, 6].map(|seed| sized(seed, experts, width));
            let (down_bias, down_bias_handle) = sized(7, experts, hidden);
            let (dy_out, dy_out_handle) = sized(8, rows, hidden);
            let (factors, factors_handle) = uploaded(client, 9, rows, FloatFormat::F32);
            let with = |rows: &[f64], bias: &[f64], width| -> Vec<f64> {
                rows.iter().zip(oracle::biases(bias, &words, &routing, width)).map(|(row, bias)| row + bias).collect()
            };
            let (whole_gate, whole_up) = (with(&gate_rows, &gate_bias, width), with(&up_rows, &up_bias, width));
            // One rounding, and the activations' own error.
            let near = |_, e: f64| half_ulp(format) * e.abs() + 2e-5;

            let out = poison(client, rows * width, format);
            let inner = [&gate_bias_handle, &up_bias_handle];
            let buffers = Gated { gate: &gate_handle, up: &up_handle, biases: inner, out: &out };
            gated(client, buffers, &words_handle, &routing, width, activation, format).unwrap();
            let expected: Vec<f64> =
                whole_gate.iter().zip(&whole_up).map(|(g, u)| gate::oracle::forward(*g, *u, activation)).collect();
            assert_close(format!("gated, {what}"), &read(client, out, rows * width, format), &expected, near);

            let [dgate, dup, result] = [(); 3].map(|()| poison(client, rows * width, format));
            let dweights = poison(client, rows, FloatFormat::F32);
            let buffers = GatedBackward {
                dy: &dy_handle,
                gate: &gate_handle,
                up: &up_handle,
                biased: Some(Biased { inner, down: &down_bias_handle, dy: &dy_out_handle, hidden }),
                weights: &factors_handle,
                dgate: &dgate,
                dup: &dup,
                result: &result,
                dweights: &dweights,
            };
            gated_backward(client, buffers, &words_handle, &routing, width, activation, format).unwrap();
            let mut expected =
                oracle::gated_backward(&dy, &whole_gate, &whole_up, &factors, &words, &routing, width, activation);
            let of_rows = oracle::biases(&down_bias, &words, &routing, hidden);
            for (row, entry) in words[routing.entries()].iter().enumerate() {
                let range = row * hidden..(row + 1) * hidden;
                let product: f64 = dy_out[range.clone()].iter().zip(&of_rows[range]).map(|(d, b)| d * b).sum();
                expected[3][*entry as usize] += product;
            }
            for (name, handle, expected) in
                [("dgate", dgate, &expected[0]), ("dup", dup, &expected[1]), ("result", result, &expected[2])]
            {
                assert_close(format!("{name}, {what}"), &read(client, handle, rows * width, format), expected, near);
            }
            let found = read(client, dweights, rows, FloatFormat::F32);
            // Sums of `width` terms up to 8, each with a factor that was rounded to the format, and of `hidden` exact ones.
            let bar = half_ulp(format) * 8.0 * (width as f64).sqrt() + 2e-4;
            assert_close(format!("dweights, {what}"), &found, &expected[3], |_, _| bar);

            let (plain, plain_handle) = sized(10, rows, hidden);
            let out = poison(client, routing.tokens() * hidden, format);
            let buffers = Combine {
                rows: &plain_handle,
                more: None,
                bias: Some(&down_bias_handle),
                weights: Some(&factors_handle),
                out: &out,
            };
            combine(client, buffers, &words_handle, &routing, hidden, format).unwrap();
            let expected = with(&plain, &down_bias, hidden);
            let expected = oracle::combine(&expected, Some(&factors), &words, &routing, hidden);
            let found = read(client, out, routing.tokens() * hidden, format);
            assert_close(format!("combine, {what}"), &found, &expected, |_, e: f64| half_ulp(format) * e.abs() + 1e-5);
        }
    });
}

#[test]
fn activations_and_weights_get_gradients() {
    in_formats(|client, format| {
        for ((shape, width), activation) in [(SHAPES[1], 64), (SHAPES[2], 33), (SHAPES[4], 96), (SHAPES[6], 8)]
            .into_iter()
            .zip([Activation::Silu, Activation::Gelu, Activation::Silu, Activation::Relu])
        {
            let routing = routing(shape);
            let (words, words_handle) = routed(client, &routing);
            let len = routing.rows() * width;
            let [(dy, dy_handle), (gate, gate_handle), (up, up_handle)] =
                [2, 3, 4].map(|seed| uploaded(client, seed, len, format));
            let (factors, factors_handle) = uploaded(client, 5, routing.rows(), FloatFormat::F32);
            let [dgate, dup, result] = [(); 3].map(|()| poison(client, len, format));
            let dweights = poison(client, routing.rows(), FloatFormat::F32);
            let buffers = GatedBackward {
                dy: &dy_handle,
                gate: &gate_handle,
                up: &up_handle,
                biased: None,
                weights: &factors_handle,
                dgate: &dgate,
                dup: &dup,
                result: &result,
                dweights: &dweights,
            };
            gated_backward(client, buffers, &words_handle, &routing, width, activation, format).unwrap();
            let expected = oracle::gated_backward(&dy, &gate, &up, &factors, &words, &routing, width, activation);
            for (name, handle, expected) in
                [("dgate", dgate, &expected[0]), ("dup", dup, &expected[1]), ("result", result, &expected[2])]
            {
                let found = read(client, handle, len, format);
                // One rounding, and the activations' own error.
                let what = format!("{name}, {shape:?} {width} {format:?}");
                assert_close(what, &found, expected, |_, e: f64| half_ulp(format) * e.abs() + 2e-5);
            }
            let found = read(client, dweights, routing.rows(), FloatFormat::F32);
            // Sums of `width` terms, each with a factor that was rounded to the format.
            let bar = half_ulp(format) * 4.0 * (width as f64).sqrt() + 1e-4;
            assert_close(format!("dweights, {shape:?} {width} {format:?}"), &found, &expected[3], |_, _| bar);
        }
    });
}

#[test]
fn factors_of_all_experts_get_gradients() {
    in_formats(|client, format| {
        for (shape, features, rank) in [
            (SHAPES[0], 8, 1),
            (SHAPES[1], 300, 16),
            (SHAPES[2], 33, 5),
            (SHAPES[4], 64, 40),
            (SHAPES[5], 257, 8),
            (SHAPES[6], 8, 8),
        ] {
            let routing = routing(shape);
            let (words, words_handle) = routed(client, &routing);
            let (x, x_handle) = uploaded(client, 2, routing.rows() * features, format);
            let (product, product_handle) = uploaded(client, 3, routing.rows() * rank, format);
            let (factors, factors_handle) = uploaded(client, 5, routing.rows(), FloatFormat::F32);
            for (layout, weighted) in [(FactorLayout::RankFirst, true), (FactorLayout::FeaturesFirst, false)] {
                let len = routing.experts() * features * rank;
                let out = poison(client, len, FloatFormat::F32);
                let operands = FactorGradient {
                    x: &x_handle,
                    product: &product_handle,
                    weights: weighted.then_some(&factors_handle),
                    out: &out,
                    features,
                    rank,
                    layout,
                };
                gradient(client, operands, &words_handle, &routing, format).unwrap();
                let found = read(client, out, len, FloatFormat::F32);
                let weights = weighted.then_some(&factors[..]);
                let expected = oracle::gradient(&x, &product, weights, &words, &routing, [features, rank], layout);
                let size = |values: &[f64]| values.iter().map(|value| value.abs()).collect::<Vec<_>>();
                let (x, product, weights) = (size(&x), size(&product), weights.map(size));
                let of = [features, rank];
                let magnitudes = oracle::gradient(&x, &product, weights.as_deref(), &words, &routing, of, layout);
                // On tensor cores weighted rows are rounded to 16 bits.
                let rounded = if weighted && format != FloatFormat::F32 { half_ulp(format) } else { 0.0 };
                // f32 sums of up to 1,000 terms of up to 100.
                assert_close(format!("{shape:?} {features} {rank} {format:?}"), &found, &expected, |i, e: f64| {
                    1e-5 * e.abs() + 3e-4 + rounded * magnitudes[i]
                });
            }
        }
    });
}

#[test]
fn what_does_not_fit_is_named() {
    for (per_token, tile_rows) in [(0, 16), (5, 16), (2, 0)] {
        assert!(matches!(Routing::new(3, 4, per_token, tile_rows), Err(KernelError::Shape { .. })));
    }
    everywhere(|client| {
        let routing = routing(SHAPES[1]);
        let (small, large) = (client.empty(4), client.empty(1 << 16));
        let error = route(client, &small, &large, &routing).unwrap_err();
        assert!(matches!(error, KernelError::BufferSize { name: "scores", .. }), "{error}");
        let error = route(client, &large, &small, &routing).unwrap_err();
        assert!(matches!(error, KernelError::BufferSize { name: "words", .. }), "{error}");
        let error = gather(client, &large, &large, &small, &routing, 64, FloatFormat::F32).unwrap_err();
        assert!(matches!(error, KernelError::BufferSize { name: "out", .. }), "{error}");
    });
}
