//! The attention kernels against the oracle, on a CUDA device.
//! `test_support` says what becomes of them where there is none.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use cubecl::client::Client;
use cubecl::server::Handle;
use fused_kernels::attention::oracle::{self, Batch};
use fused_kernels::attention::{self, Backward, Forward, Operand, Options, PackedRows, Path, Rows, Shape, Strides};
use fused_kernels::{FloatFormat, KernelError};
use half::{bf16, f16};
use test_support::{Random, missing, skipped};

use FloatFormat::F16;
use Layout::{Gaps, HeadMajor};

fn client() -> Option<&'static Client> {
    test_support::cuda(|client| attention::supports(client, F16))
}

/// Values of a format, up to `size`.
fn halves(random: &mut Random, n: usize, size: f32, format: FloatFormat) -> Vec<f32> {
    (0..n).map(|_| decode(encode(random.signed() * size, format), format)).collect()
}

fn encode(value: f32, format: FloatFormat) -> u16 {
    match format {
        F16 => f16::from_f32(value).to_bits(),
        _ => bf16::from_f32(value).to_bits(),
    }
}

fn decode(bits: u16, format: FloatFormat) -> f32 {
    match format {
        F16 => f16::from_bits(bits).to_f32(),
        _ => bf16::from_bits(bits).to_f32(),
    }
}

/// How heads lie in a buffer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    TokenMajor,
    HeadMajor,
    /// Token-major, with room for as many dimensions again after each head, 8 elements after each token and 16 after
    /// each row.
    Gaps,
}

/// A buffer of `[rows, len, heads, head_dim]` in some layout.
#[derive(Clone, Copy)]
struct Place {
    rows: usize,
    len: usize,
    heads: usize,
    head_dim: usize,
    strides: Strides,
    size: usize,
}

impl Place {
    fn new(rows: usize, len: usize, heads: usize, head_dim: usize, layout: Layout) -> Self {
        let strides = match layout {
            Layout::TokenMajor => Strides::token_major(len, heads, head_dim),
            HeadMajor => Strides { row: heads * len * head_dim, token: head_dim, head: len * head_dim },
            Gaps => {
                let token = heads * 2 * head_dim + 8;
                Strides { row: len * token + 16, token, head: 2 * head_dim }
            }
        };
        Self { rows, len, heads, head_dim, strides, size: rows * strides.row }
    }

    /// Where the elements of `[rows, len, heads, head_dim]` lie, in order.
    fn positions(self) -> impl Iterator<Item = usize> {
        let Self { rows, len, heads, head_dim, strides, .. } = self;
        (0..rows * len * heads * head_dim).map(move |i| {
            let (token, head, dim) = (i / head_dim / heads, i / head_dim % heads, i % head_dim);
            token / len * strides.row + token % len * strides.token + head * strides.head + dim
        })
    }

    fn operand(self, handle: &Handle) -> Operand<'_> {
        Operand { handle, strides: self.strides }
    }

    /// NaN wherever there is no element, and after the end: what a kernel reads there shows.
    fn upload(self, client: &Client, values: &[f32], format: FloatFormat) -> Handle {
        let mut bits = vec![0xffff_u16; self.size + 64];
        for (position, value) in self.positions().zip(values) {
            bits[position] = encode(*value, format);
        }
        client.create_from_slice(bytemuck::cast_slice(&bits)).offset_end(128)
    }

    /// A buffer full of NaN to write to, with guards.
    fn output(self, client: &Client) -> Handle {
        client.create_from_slice(&vec![0xff; 2 * self.size + 256])
    }

    /// The elements of an output; what lies between and after them must be untouched.
    fn download(self, client: &Client, handle: Handle, format: FloatFormat, what: &str) -> Vec<f32> {
        let bytes = client.read_one(handle).expect("the kernel runs");
        let mut bits: Vec<u16> = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        let values = self
            .positions()
            .map(|at| {
                let value = decode(bits[at], format);
                bits[at] = 0xffff;
                value
            })
            .collect();
        assert!(bits.iter().all(|b| *b == 0xffff), "{what}: wrote outside its output");
        values
    }
}

struct Case {
    lens: &'static [usize],
    /// Keys before the first query of each row.
    past: usize,
    packed: bool,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
    softcap: Option<f32>,
    scale: Option<f32>,
    format: FloatFormat,
    layout: Layout,
    /// Of queries, to reach where the softcap bends.
    size: f32,
    /// Whether query heads have sinks, of this size.
    sinks: Option<f32>,
}

const CASE: Case = Case {
    lens: &[64],
    past: 0,
    packed: false,
    heads: 1,
    kv_heads: 1,
    head_dim: 64,
    window: None,
    softcap: None,
    scale: None,
    format: FloatFormat::BF16,
    layout: Layout::TokenMajor,
    size: 1.0,
    sinks: None,
};

/// Lengths around tiles of 16, 32 and 64; every kernel width, and widths that are padded; groups of 1, 2, 4 and 8.
const CASES: &[Case] = &[
    Case { lens: &[1], ..CASE },
    Case { lens: &[17], head_dim: 40, heads: 2, kv_heads: 1, ..CASE },
    Case { lens: &[63, 63], head_dim: 80, heads: 2, kv_heads: 2, format: F16, ..CASE },
    Case { lens: &[64], head_dim: 96, layout: HeadMajor, ..CASE },
    Case { lens: &[65, 65], head_dim: 128, heads: 4, kv_heads: 2, layout: Gaps, ..CASE },
    Case { lens: &[200], head_dim: 128, heads: 8, kv_heads: 1, ..CASE },
    Case { lens: &[333], head_dim: 64, heads: 4, kv_heads: 1, ..CASE },
    Case { lens: &[333], head_dim: 128, format: F16, ..CASE },
    Case { lens: &[130], head_dim: 192, heads: 2, kv_heads: 1, ..CASE },
    Case { lens: &[70], head_dim: 160, layout: Gaps, ..CASE },
    Case { lens: &[200], head_dim: 256, heads: 2, kv_heads: 1, ..CASE },
    Case { lens: &[1, 1], head_dim: 256, format: F16, layout: HeadMajor, ..CASE },
    Case { lens: &[64], head_dim: 8, heads: 3, kv_heads: 3, ..CASE },
    // Windows below, at and above the tiles.
    Case { lens: &[200], head_dim: 64, window: Some(1), ..CASE },
    Case { lens: &[200], head_dim: 128, heads: 2, window: Some(37), ..CASE },
    Case { lens: &[333], head_dim: 96, window: Some(64), ..CASE },
    Case { lens: &[333], head_dim: 256, window: Some(100), heads: 2, kv_heads: 2, ..CASE },
    Case { lens: &[65], head_dim: 64, window: Some(1000), ..CASE },
    // Several tiles of 128, whole and not, with and without a part outside the window; a few heads for each block.
    Case { lens: &[600], head_dim: 128, heads: 2, kv_heads: 1, ..CASE },
    Case { lens: &[384, 384], head_dim: 64, heads: 2, kv_heads: 2, window: Some(190), ..CASE },
    Case { lens: &[520], head_dim: 104, heads: 1, kv_heads: 1, window: Some(129), format: F16, ..CASE },
    Case { lens: &[600], head_dim: 256, heads: 2, kv_heads: 1, ..CASE },
    Case { lens: &[400, 400], head_dim: 192, heads: 2, kv_heads: 2, window: Some(190), ..CASE },
    Case { lens: &[450], head_dim: 248, window: Some(129), format: F16, layout: Gaps, ..CASE },
    Case { lens: &[333], head_dim: 136, heads: 2, kv_heads: 1, format: F16, layout: HeadMajor, ..CASE },
    // More tiles than multiprocessors.
    Case { lens: &[9; 12], head_dim: 64, heads: 24, kv_heads: 12, ..CASE },
    // Softcap, and scales of models.
    Case { lens: &[200], head_dim: 256, softcap: Some(50.0), scale: Some(0.0625), size: 30.0, heads: 2, ..CASE },
    Case { lens: &[129], head_dim: 128, softcap: Some(5.0), size: 8.0, format: F16, heads: 4, kv_heads: 2, ..CASE },
    Case { lens: &[100], head_dim: 64, softcap: Some(1.0), window: Some(33), size: 4.0, ..CASE },
    Case {
        lens: &[300],
        head_dim: 256,
        softcap: Some(5.0),
        window: Some(150),
        size: 8.0,
        heads: 4,
        kv_heads: 2,
        ..CASE
    },
    Case { lens: &[260], head_dim: 192, softcap: Some(3.0), size: 8.0, format: F16, ..CASE },
    Case { lens: &[100], head_dim: 64, scale: Some(1.5), ..CASE },
    // Packed rows; empty ones; padding as a row.
    Case { lens: &[64, 1, 100, 17], packed: true, head_dim: 128, heads: 4, kv_heads: 2, ..CASE },
    Case { lens: &[5, 0, 130, 64, 0], packed: true, head_dim: 64, window: Some(70), layout: Gaps, ..CASE },
    Case { lens: &[33, 200, 7], packed: true, head_dim: 256, format: F16, heads: 2, kv_heads: 2, ..CASE },
    Case { lens: &[300, 20], packed: true, head_dim: 80, softcap: Some(3.0), size: 4.0, heads: 8, kv_heads: 2, ..CASE },
    Case { lens: &[64, 1, 300, 0, 17, 130], packed: true, head_dim: 256, heads: 4, kv_heads: 2, ..CASE },
    Case { lens: &[77, 240, 0], packed: true, head_dim: 192, softcap: Some(5.0), window: Some(90), size: 8.0, ..CASE },
    // Queries after cached keys.
    Case { lens: &[30, 30], past: 45, head_dim: 128, heads: 2, kv_heads: 2, layout: HeadMajor, ..CASE },
    Case { lens: &[1], past: 200, head_dim: 64, heads: 8, kv_heads: 1, window: Some(100), ..CASE },
    Case { lens: &[65], past: 300, head_dim: 96, window: Some(20), ..CASE },
    Case { lens: &[130, 130], past: 300, head_dim: 256, heads: 2, kv_heads: 2, ..CASE },
    Case { lens: &[65], past: 200, head_dim: 192, window: Some(40), layout: HeadMajor, ..CASE },
    // Sinks: beside scores of their size, far above them, and with what else changes the end of a row.
    Case { lens: &[200], head_dim: 64, heads: 8, kv_heads: 1, window: Some(128), sinks: Some(3.0), ..CASE },
    Case { lens: &[333, 333], head_dim: 64, heads: 4, kv_heads: 2, sinks: Some(3.0), ..CASE },
    Case { lens: &[70], head_dim: 64, heads: 4, kv_heads: 4, sinks: Some(300.0), format: F16, ..CASE },
    Case { lens: &[5, 0, 130, 64], packed: true, head_dim: 128, heads: 2, sinks: Some(4.0), ..CASE },
    Case { lens: &[30], past: 45, head_dim: 96, heads: 4, kv_heads: 2, window: Some(20), sinks: Some(2.0), ..CASE },
    Case { lens: &[140], head_dim: 192, softcap: Some(3.0), size: 8.0, sinks: Some(3.0), ..CASE },
    Case { lens: &[140], head_dim: 256, heads: 2, kv_heads: 1, sinks: Some(3.0), layout: Gaps, ..CASE },
];

impl Case {
    fn name(&self) -> String {
        let Self { lens, past, packed, heads, kv_heads, head_dim, window, softcap, format, layout, sinks, .. } = self;
        format!(
            "lens {lens:?} past {past} packed {packed} heads {heads}/{kv_heads} x {head_dim} window {window:?} \
             softcap {softcap:?} {format:?} {layout:?} sinks {sinks:?}"
        )
    }

    fn options(&self) -> Options {
        let scale = self.scale.unwrap_or(1.0 / (self.head_dim as f32).sqrt());
        Options { scale, window: self.window, softcap: self.softcap }
    }

    fn rows(&self, client: &Client) -> Rows {
        match self.packed {
            false => Rows::Equal { rows: self.lens.len(), q_len: self.lens[0], kv_len: self.lens[0] + self.past },
            true => {
                let ends = self.lens.iter().scan(0, |end, len| {
                    *end += *len as u32;
                    Some(*end)
                });
                Rows::Packed(PackedRows::new(client, &std::iter::once(0).chain(ends).collect::<Vec<_>>()).unwrap())
            }
        }
    }

    fn places(&self) -> (Place, Place) {
        let &Self { heads, kv_heads, head_dim, layout, .. } = self;
        let (rows, len) = if self.packed { (1, self.lens.iter().sum()) } else { (self.lens.len(), self.lens[0]) };
        let place = |len, heads| Place::new(rows, len, heads, head_dim, layout);
        (place(len, heads), place(len + self.past, kv_heads))
    }
}

/// Every element at most twice as far from the exact one as the farthest element of a computation in f64 that only
/// rounds what it stores (P, dS, O and the results) to the format: the kernels round the same things, with other ties,
/// and P before it is divided by its sum. Together (root of squares) at most 1.25 times that. On top, what f32 sums and
/// exp2 may add: 2^-22 relative for each of the few hundred terms, far below the formats' 2^-9 and 2^-12.
fn assert_close(what: &str, ours: &[f32], exact: &[f64], rounded: &[f64]) {
    assert_eq!(ours.len(), exact.len(), "{what}: length");
    let largest = exact.iter().fold(1.0_f64, |most, x| most.max(x.abs()));
    let slack = 2e-5 * largest;
    let distance = |values: &mut dyn Iterator<Item = f64>| -> (f64, f64) {
        values.zip(exact).fold((0.0_f64, 0.0), |(most, sum), (value, exact)| {
            let error = (value - exact).abs();
            (if error.is_nan() { f64::NAN } else { most.max(error) }, sum + error * error)
        })
    };
    let (most, sum) = distance(&mut rounded.iter().copied());
    for (i, (a, b)) in ours.iter().zip(exact).enumerate() {
        let error = (f64::from(*a) - b).abs();
        assert!(error <= 2.0 * most + slack, "{what}: element {i} is {a}, should be {b}; bar {}", 2.0 * most + slack);
    }
    let (_, ours_sum) = distance(&mut ours.iter().map(|x| f64::from(*x)));
    let bar = 1.25 * sum.sqrt() + slack * (exact.len() as f64).sqrt();
    assert!(ours_sum.sqrt() <= bar, "{what}: errors are {} together, the bar {bar}", ours_sum.sqrt());
}

/// The cases with those head_dims; compiling the kernels takes the time, and tests run side by side.
fn attention_and_its_gradients_are_the_oracles(path: Path, head_dims: std::ops::RangeInclusive<usize>) {
    let Some(client) = client() else { return };
    for (number, case) in CASES.iter().enumerate().filter(|(_, case)| head_dims.contains(&case.head_dim)) {
        // Compute capability 7.5 multiplies f16 alone.
        let format = if attention::supports(client, case.format) { case.format } else { F16 };
        let case = &Case { format, ..*case };
        let (what, options) = (format!("{} by {path:?}", case.name()), case.options());
        let (of_queries, of_keys) = case.places();
        let mut random = Random(number as u64);
        let count = |place: Place| place.rows * place.len * place.heads * place.head_dim;
        let mut draw = |place, size| halves(&mut random, count(place), size, format);
        let (q, k, v) = (draw(of_queries, case.size), draw(of_keys, 1.0), draw(of_keys, 1.0));
        let d_out = draw(of_queries, 1.0);
        let batch = Batch {
            rows: case.lens.iter().map(|len| (*len, len + case.past)).collect(),
            heads: case.heads,
            kv_heads: case.kv_heads,
            head_dim: case.head_dim,
            sinks: case.sinks.map(|size| random.normals(case.heads).into_iter().map(|x: f32| x * size).collect()),
        };
        let shape = Shape {
            rows: case.rows(client),
            heads: case.heads,
            kv_heads: case.kv_heads,
            head_dim: case.head_dim,
            format,
        };

        if !attention::paths(client, &shape).contains(&path) {
            // wgmma is one generation's.
            match path {
                Path::Hopper => skipped("this kernel is for other devices"),
                Path::Mma => missing("cuda", format_args!("no kernel for {what}")),
            }
            return;
        }

        let [device_q, device_out] = [&q, &d_out].map(|x| of_queries.upload(client, x, format));
        let [device_k, device_v] = [&k, &v].map(|x| of_keys.upload(client, x, format));
        let sinks = batch.sinks.as_ref().map(|sinks| client.create_from_slice(bytemuck::cast_slice(sinks)));
        let statistics = 4 * case.heads * shape.rows.queries();
        let run = || {
            let [o, d_q] = [(); 2].map(|()| of_queries.output(client));
            let [d_k, d_v] = [(); 2].map(|()| of_keys.output(client));
            let lse = client.create_from_slice(&vec![0xff; statistics + 64]);
            let (q, k, v) = (of_queries.operand(&device_q), of_keys.operand(&device_k), of_keys.operand(&device_v));
            let operands = Forward { q, k, v, sinks: sinks.as_ref(), o: of_queries.operand(&o), lse: &lse };
            attention::forward_on(client, path, operands, &shape, options).expect("forward");
            let operands = Backward {
                q,
                k,
                v,
                o: of_queries.operand(&o),
                lse: &lse,
                d_out: of_queries.operand(&device_out),
                d_q: of_queries.operand(&d_q),
                d_k: of_keys.operand(&d_k),
                d_v: of_keys.operand(&d_v),
            };
            attention::backward_on(client, path, operands, &shape, options).expect("backward");
            let lse = client.read_one(lse).expect("the kernel runs").to_vec();
            let results = [(o, of_queries), (d_q, of_queries), (d_k, of_keys), (d_v, of_keys)];
            (lse, results.map(|(handle, place)| place.download(client, handle, format, &what)))
        };
        let (lse, [o, d_q, d_k, d_v]) = run();
        let bits = |values: &Vec<f32>| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let again = run();
        assert_eq!(lse, again.0, "{what}: lse is not the same on a second run");
        for (first, second) in [&o, &d_q, &d_k, &d_v].into_iter().zip(&again.1) {
            assert!(bits(first) == bits(second), "{what}: not the same bits on a second run");
        }

        let expected = oracle::forward(&q, &k, &v, &batch, options, None);
        let rounded = oracle::forward(&q, &k, &v, &batch, options, Some(format));
        assert_close(&format!("{what}: o"), &o, &expected.o, &rounded.o);
        assert!(lse[statistics..].iter().all(|b| *b == 0xff), "{what}: wrote outside lse");
        for (i, (bytes, expected)) in lse.chunks_exact(4).zip(&expected.lse).enumerate() {
            let value = f64::from(f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
            // f32 sums of up to 256 products and of up to 600 exponentials, each 2^-22 off; tanh out of exp2 and a
            // reciprocal, some 4e-7 of the cap.
            let bar = 3e-5 * expected.abs().max(1.0) + 1e-6 * f64::from(case.softcap.unwrap_or(0.0));
            assert!((value - expected).abs() <= bar, "{what}: lse {i} is {value}, should be {expected}");
        }
        let expected = oracle::backward(&q, &k, &v, &d_out, &batch, options, None);
        let rounded = oracle::backward(&q, &k, &v, &d_out, &batch, options, Some(format));
        assert_close(&format!("{what}: d_q"), &d_q, &expected.q, &rounded.q);
        assert_close(&format!("{what}: d_k"), &d_k, &expected.k, &rounded.k);
        assert_close(&format!("{what}: d_v"), &d_v, &expected.v, &rounded.v);
    }
}

#[test]
fn heads_up_to_64_by_mma() {
    attention_and_its_gradients_are_the_oracles(Path::Mma, 8..=64);
}

#[test]
fn heads_up_to_96_by_mma() {
    attention_and_its_gradients_are_the_oracles(Path::Mma, 72..=96);
}

#[test]
fn heads_up_to_128_by_mma() {
    attention_and_its_gradients_are_the_oracles(Path::Mma, 104..=128);
}

#[test]
fn heads_up_to_192_by_mma() {
    attention_and_its_gradients_are_the_oracles(Path::Mma, 136..=192);
}

#[test]
fn heads_up_to_256_by_mma() {
    attention_and_its_gradients_are_the_oracles(Path::Mma, 200..=256);
}

#[test]
fn heads_up_to_64_by_wgmma() {
    attention_and_its_gradients_are_the_oracles(Path::Hopper, 8..=64);
}

#[test]
fn heads_up_to_128_by_wgmma() {
    attention_and_its_gradients_are_the_oracles(Path::Hopper, 72..=128);
}

#[test]
fn heads_up_to_192_by_wgmma() {
    attention_and_its_gradients_are_the_oracles(Path::Hopper, 136..=192);
}

#[test]
fn heads_up_to_256_by_wgmma() {
    attention_and_its_gradients_are_the_oracles(Path::Hopper, 200..=256);
}

#[test]
fn what_does_not_fit_is_named() {
    let Some(client) = client() else { return };
    let shape = |heads, kv_heads, head_dim, q_len| Shape {
        rows: Rows::Equal { rows: 2, q_len, kv_len: 16 },
        heads,
        kv_heads,
        head_dim,
        format: F16,
    };
    let options = Options { scale: 1.0, window: None, softcap: None };
    let run = |shape: &Shape, options, elements: usize, strides: Strides| {
        let handle = client.empty(2 * elements);
        let lse = client.empty(4 * 64 * 64);
        let operand = Operand { handle: &handle, strides };
        let operands = Forward { q: operand, k: operand, v: operand, sinks: None, o: operand, lse: &lse };
        attention::forward(client, operands, shape, options)
    };
    let strides = Strides::token_major(16, 4, 64);
    let size = 2 * 16 * 4 * 64;
    let wide = Shape { format: FloatFormat::F32, ..shape(4, 4, 64, 16) };
    assert!(matches!(run(&wide, options, size, strides), Err(KernelError::Format { .. })));
    assert_eq!(run(&shape(4, 4, 60, 16), options, size, strides), Err(KernelError::HeadDim(60)));
    assert_eq!(run(&shape(4, 4, 264, 16), options, size, strides), Err(KernelError::HeadDim(264)));
    let heads = KernelError::Heads { heads: 4, kv_heads: 3 };
    assert_eq!(run(&shape(4, 3, 64, 16), options, size, strides), Err(heads));
    let short = KernelError::BufferSize { name: "q", expected: 2 * size, actual: 2 * (size - 8) };
    assert_eq!(run(&shape(4, 4, 64, 16), options, size - 8, strides), Err(short));
    for (shape, options, strides) in [
        (shape(4, 4, 64, 17), options, strides),
        (shape(4, 4, 64, 16), Options { window: Some(0), ..options }, strides),
        (shape(4, 4, 64, 16), Options { softcap: Some(0.0), ..options }, strides),
        (shape(4, 4, 64, 16), Options { scale: f32::NAN, ..options }, strides),
        (shape(4, 4, 64, 16), options, Strides { head: 60, ..strides }),
    ] {
        let result = run(&shape, options, size, strides);
        assert!(matches!(result, Err(KernelError::Attention { .. })), "{result:?}");
    }
    for bounds in [&[][..], &[0], &[1, 2], &[0, 5, 4]] {
        let result = PackedRows::new(client, bounds).map(|_| ());
        assert!(matches!(result, Err(KernelError::Attention { .. })), "{result:?}");
    }
}
