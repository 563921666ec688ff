//! The CubeCL kernels against the oracle, bit for bit, on every runtime at hand.
//!
//! `test_support` says which runtimes those are. WGSL on a software device needs a Vulkan driver such as Mesa's, and
//! XDG_RUNTIME_DIR set.
#![cfg(feature = "kernels")]
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{assert_bits, cases, narrow, round_to, ulps};
use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::server::Handle;
use nf4_quant::kernels::{self, DeviceAbsmax, DeviceWeight, StreamedQuantize};
use nf4_quant::{
    Absmax, Element, FloatFormat, NestedAbsmax, QuantConfig, QuantError, QuantState, QuantType, Quantized4bit,
    block_absmax, reference,
};
use test_support::{Random, clients};

fn formats(client: &Client) -> impl Iterator<Item = FloatFormat> + use<'_> {
    FloatFormat::ALL.into_iter().filter(|f| kernels::supports(client, *f))
}

/// The bytes of values in a format.
fn bytes(values: &[f32], format: FloatFormat) -> Vec<u8> {
    with_element!(format, E => bytemuck::cast_slice(&narrow::<E>(values)).to_vec())
}

/// Values from bytes in a format.
fn floats(bytes: &[u8], format: FloatFormat) -> Vec<f32> {
    with_element!(format, E => bytemuck::pod_collect_to_vec::<u8, E>(bytes).into_iter().map(Element::to_f32).collect())
}

/// Bytes before and after an output that a kernel must leave alone.
const GUARD: usize = 256;
const POISON: u8 = 0xa5;

/// Runs `write` on a poisoned output of `len` elements with guards, and hands back what it wrote.
fn guarded(client: &Client, format: FloatFormat, len: usize, write: impl FnOnce(Handle)) -> Vec<f32> {
    let used = len * format.size();
    let whole = client.create_from_slice(&vec![POISON; GUARD + used + GUARD]);
    write(whole.clone().offset_start(GUARD as u64).offset_end(GUARD as u64));
    let read = client.read_one(whole).expect("the kernel runs");
    let (before, rest) = read.split_at(GUARD);
    let (written, after) = rest.split_at(used);
    assert!(before.iter().chain(after).all(|b| *b == POISON), "wrote outside its output");
    floats(written, format)
}

/// Quantizes on the device and compares every field with the oracle's.
fn check_quantize(
    client: &Client,
    what: &str,
    weight: &[f32],
    format: FloatFormat,
    config: &QuantConfig,
) -> DeviceWeight {
    let QuantConfig { quant_type, blocksize, .. } = *config;
    let input = client.create_from_slice(&bytes(weight, format));
    let device = kernels::quantize(client, input, format, weight.len(), config).expect("finite");
    let host = device.to_host(client, &[weight.len()], format).expect("readable");
    let (codes, absmax) = reference::quantize(weight, quant_type, blocksize);
    assert_eq!(host.codes, codes, "{what}: codes");
    match &host.state.absmax {
        Absmax::Plain(ours) => assert_bits(what, ours, &absmax),
        Absmax::Nested(ours) => {
            // A mean in f64 against one in pairs of f32: the last rounding may fall the other way.
            let mean = NestedAbsmax::mean(&absmax);
            assert!(ulps(ours.offset, mean) <= 1, "{what}: offset {}, should be {mean}", ours.offset);
            let (codes, nested) = reference::quantize_nested(&absmax, ours.offset, 256);
            assert_eq!((&ours.codes, ours.blocksize), (&codes, 256), "{what}: nested codes");
            assert_bits(what, &ours.absmax, &nested);
        }
    }
    // Padding is zero: tensors made of these buffers have defined bytes.
    let words = client.read_one(device.codes.clone()).expect("readable");
    assert!(words[codes.len()..].iter().all(|b| *b == 0), "{what}: padding");
    device
}

/// Dequantizes on the device and compares every element with the oracle's.
fn check_dequantize(client: &Client, what: &str, host: &Quantized4bit, format: FloatFormat) -> Vec<f32> {
    let device = DeviceWeight::from_host(client, host).expect("consistent");
    let QuantState { quant_type, blocksize, .. } = host.state;
    let n = host.state.num_elements();
    let values = guarded(client, format, n, |out| kernels::dequantize(client, &device, out, format).expect("launches"));
    let expected = reference::dequantize(&host.codes, &host.state.absmax_f32(), quant_type, blocksize, n);
    assert_bits(what, &values, &round_to(&expected, format));
    values
}

/// Weights with outliers, zeros and a zero block.
fn weights(random: &mut Random, len: usize) -> Vec<f32> {
    let mut weight = random.normals(len);
    for (i, w) in weight.iter_mut().enumerate() {
        *w *= match i {
            _ if i % 97 == 5 => 30.0,
            _ if i % 41 == 7 => 0.0,
            64..192 => 0.0,
            _ => 0.02 * (1.0 + (i / 1000) as f32),
        };
    }
    weight
}

#[test]
fn reference_cases_quantize_and_dequantize() {
    for (name, client) in clients() {
        for case in cases() {
            let what = format!("{name} {}", case.name);
            // A runtime without the case's format takes f32: widening is exact, so the codes are the same.
            let own = kernels::supports(client, case.state.dtype);
            let format = if own { case.state.dtype } else { FloatFormat::F32 };
            check_quantize(client, &what, &case.input, format, &case.config);
            let theirs = Quantized4bit::new(case.codes.clone(), case.state.clone()).unwrap();
            let values = check_dequantize(client, &what, &theirs, format);
            assert_bits(&what, &round_to(&values, case.state.dtype), &case.dequantized);
        }
    }
}

#[test]
fn every_blocksize_and_odd_lengths() {
    for (name, client) in clients() {
        let mut random = Random(11);
        let lens = [1, 2, 7, 8, 9, 31, 64, 65, 1000, 4097, 8192, 12_345, 20_001, 66_052, 70_002];
        for (b, blocksize) in [32, 64, 128, 256, 512, 1024, 2048, 4096].into_iter().enumerate() {
            // A third of the lengths each: every pair of the two would be minutes of compiling.
            for len in lens.into_iter().skip(b % 3).step_by(3) {
                for format in formats(client) {
                    let quant_type = QuantType::ALL[(len + b) % 2];
                    for double_quant in [false, true] {
                        let config = QuantConfig { quant_type, blocksize, double_quant };
                        let what = format!("{name} {len} x {format} {quant_type}/{blocksize} {double_quant}");
                        let weight = round_to(&weights(&mut random, len), format);
                        check_quantize(client, &what, &weight, format, &config);
                        let host = Quantized4bit::quantize(&weight, &[len], &config).unwrap();
                        check_dequantize(client, &what, &host, format);
                    }
                }
            }
        }
    }
}

#[test]
fn values_on_thresholds_fall_as_the_oracle_says() {
    for (name, client) in clients() {
        for quant_type in QuantType::ALL {
            // Every midpoint of the codebook and its neighbours, at several absmax.
            let mut book = *quant_type.codebook();
            book.sort_by(f32::total_cmp);
            let mut weight = Vec::new();
            for absmax in [1.0_f32, 0.7, 3.3e-5, 1.1e-30, 2.9e30] {
                let mut block = vec![absmax];
                for pair in book.windows(2) {
                    let mid = (pair[0] + pair[1]) * 0.5 * absmax;
                    block.extend([mid.next_down(), mid, mid.next_up()]);
                }
                block.resize(64, -absmax * 0.5);
                weight.extend(block);
            }
            let config = QuantConfig { quant_type, blocksize: 64, double_quant: false };
            check_quantize(client, &format!("{name} {quant_type}"), &weight, FloatFormat::F32, &config);
        }
    }
}

#[test]
fn reciprocals_of_bf16_values_are_the_oracles() {
    let fp4 = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333_f32];
    let nf4: Vec<f32> = QuantType::Nf4.codebook().windows(2).map(|w| (w[0] + w[1]) * 0.5).collect();
    for (name, client) in clients() {
        for (quant_type, thresholds) in [(QuantType::Nf4, nf4.clone()), (QuantType::Fp4, fp4.to_vec())] {
            // Every mantissa, also where the reciprocal is barely normal; blocks of elements on thresholds.
            let mut weight = Vec::new();
            for exponent in [30_u32, 120, 127, 252] {
                for mantissa in 0..128 {
                    let absmax = f32::from_bits(exponent << 23 | mantissa << 16);
                    let mut block = vec![absmax];
                    for threshold in &thresholds {
                        let on = threshold * absmax;
                        block.extend([on.next_down(), on, on.next_up()]);
                    }
                    block.resize(64, -absmax * 0.5);
                    weight.extend(block);
                }
            }
            let config = QuantConfig { quant_type, blocksize: 64, double_quant: false };
            check_quantize(client, &format!("{name} {quant_type}"), &weight, FloatFormat::F32, &config);
        }
    }
}

#[test]
fn all_nested_codes_decode() {
    for (name, client) in clients() {
        // Every 8-bit code, nested blocks of another size, and an offset that makes rounding show.
        let nested = NestedAbsmax {
            codes: (0..1024).map(|i| (i * 7 % 256) as u8).collect(),
            absmax: (0..16).map(|i| 0.013 + 0.1 * i as f32).collect(),
            offset: 0.137_654_32,
            blocksize: 64,
        };
        let codes = (0..1024 * 32).map(|i| (i * 31 % 256) as u8).collect();
        for quant_type in QuantType::ALL {
            let (shape, dtype) = (vec![256, 256], FloatFormat::F32);
            let state = QuantState { quant_type, blocksize: 64, dtype, shape, absmax: Absmax::Nested(nested.clone()) };
            let host = Quantized4bit::new(Vec::clone(&codes), state).unwrap();
            for format in formats(client) {
                check_dequantize(client, &format!("{name} {quant_type} {format}"), &host, format);
            }
            let device = DeviceWeight::from_host(client, &host).unwrap();
            assert_eq!(device.to_host(client, &[256, 256], dtype).unwrap(), host);
        }
    }
}

#[test]
fn ranges_write_what_they_name() {
    for (name, client) in clients() {
        let (rows, cols) = (37, 203);
        let weight = weights(&mut Random(5), rows * cols);
        for double_quant in [false, true] {
            let config = QuantConfig { blocksize: 32, double_quant, ..QuantConfig::default() };
            let host = Quantized4bit::quantize(&weight, &[rows, cols], &config).unwrap();
            let device = DeviceWeight::from_host(client, &host).unwrap();
            let n = rows * cols;
            let ranges = [
                0..n,
                0..8,
                8..24,
                3..4,
                5..n,
                cols..2 * cols,
                13 * cols..29 * cols,
                1024..4096,
                n - 1..n,
                9..9,
                17..4096 + 17,
            ];
            for format in formats(client) {
                let whole = round_to(&host.dequantize::<f32>().unwrap(), format);
                for range in &ranges {
                    let what = format!("{name} {format} {range:?}");
                    let part = guarded(client, format, range.len(), |out| {
                        kernels::dequantize_range(client, &device, range.clone(), out, format).expect("launches");
                    });
                    assert_bits(&what, &part, &whole[range.clone()]);
                }
            }
            let out = || client.empty(4 * n);
            for (start, end) in [(5, n + 1), (n + 1, n + 2), (9, 3)] {
                let error = kernels::dequantize_range(client, &device, start..end, out(), FloatFormat::F32);
                assert_eq!(error, Err(QuantError::Range { start, end, num_elements: n }));
            }
        }
    }
}

#[test]
fn the_offset_of_many_blocks_is_the_mean() {
    for (name, client) in clients() {
        // More absmax than one pass of the cubes takes, of scales that f32 sums lose.
        let mut random = Random(23);
        let len = 32 * 300_000;
        let mut weight = vec![0.0_f32; len];
        for block in weight.chunks_mut(32) {
            block[7] = random.normal() * 10_f32.powf((random.uniform() * 6.0 - 3.0) as f32);
        }
        let config = QuantConfig { blocksize: 32, ..QuantConfig::default() };
        check_quantize(client, name, &weight, FloatFormat::F32, &config);
        // The sum overflows f32, the mean does not.
        let config = QuantConfig { blocksize: 32, ..QuantConfig::default() };
        check_quantize(client, name, &[1.5e38; 32 * 100], FloatFormat::F32, &config);
    }
}

/// Codes stay, and every element is the codebook's times the scaled absmax.
#[test]
fn rows_are_scaled_in_their_statistics() {
    for (name, client) in clients() {
        for (rows, columns, blocksize, double_quant) in
            [(5, 64, 64, true), (33, 4096, 4096, false), (300, 192, 64, true), (7, 96, 32, false)]
        {
            let what = format!("{name} {rows} x {columns}");
            let config = QuantConfig { quant_type: QuantType::ALL[rows % 2], blocksize, double_quant };
            let weight = weights(&mut Random(rows as u64), rows * columns);
            let host = Quantized4bit::quantize(&weight, &[rows, columns], &config).unwrap();
            let factors: Vec<f32> = (0..rows).map(|row| row as f32 * 0.37 - 2.0).collect();
            let device = DeviceWeight::from_host(client, &host).unwrap();
            let on_device = client.create_from_slice(bytemuck::cast_slice(&factors));
            let scaled = kernels::scale_rows(client, &device, &on_device, columns).unwrap();
            let scaled = scaled.to_host(client, &[rows, columns], FloatFormat::F32).unwrap();
            let absmax = host.state.absmax_f32();
            let expected: Vec<f32> =
                absmax.iter().enumerate().map(|(block, a)| a * factors[block * blocksize / columns]).collect();
            assert_bits(&what, &scaled.state.absmax_f32(), &expected);
            assert_eq!(scaled.codes, host.codes, "{what}");

            let refused = kernels::scale_rows(client, &device, &on_device, columns + 1);
            assert!(matches!(refused, Err(QuantError::Rows { .. })), "{what}");
            let few = on_device.clone().offset_end(4);
            let refused = kernels::scale_rows(client, &device, &few, columns);
            assert!(matches!(refused, Err(QuantError::BufferSize { name: "factors", .. })), "{what}");
        }
    }
}

/// Through a buffer that every part overwrites, as a loader does it: codes and statistics of the host codec, offset included.
#[test]
fn a_weight_in_parts_is_the_host_codecs() {
    const PART: usize = StreamedQuantize::PART;
    for (name, client) in clients() {
        for format in formats(client) {
            for (len, blocksize, double_quant) in
                [(PART + 33, 64, true), (3 * PART, 4096, false), (2 * PART + 4097, 32, true), (7, 64, true)]
            {
                let what = format!("{name} {format} {len}/{blocksize}");
                let config = QuantConfig { quant_type: QuantType::ALL[len % 2], blocksize, double_quant };
                let weight = round_to(&weights(&mut Random(len as u64), len), format);
                let expected = with_element!(format, E => {
                    let weight = narrow::<E>(&weight);
                    let mut absmax = vec![f32::NAN; len.div_ceil(blocksize)];
                    assert_eq!(block_absmax(&weight, blocksize, &mut absmax), Ok(true), "{what}");
                    (Quantized4bit::quantize(&weight, &[len], &config).unwrap(), NestedAbsmax::mean(&absmax))
                });
                let (expected, offset) = expected;
                let buffer = client.empty(PART * format.size());
                let mut streamed = StreamedQuantize::new(client, len, format, &config).unwrap();
                for part in weight.chunks(PART) {
                    client.write(&buffer, Bytes::from_bytes_vec(bytes(part, format)));
                    streamed.push(client, &buffer, part.len()).unwrap();
                }
                let device = streamed.finish(client, offset).unwrap();
                assert_eq!(device.to_host(client, &[len], format).unwrap(), expected, "{what}");
            }
        }
        let mut streamed = StreamedQuantize::new(client, 2 * PART, FloatFormat::F32, &QuantConfig::default()).unwrap();
        let buffer = client.empty(4 * PART);
        for wrong in [0, 5, PART + 1, 3 * PART] {
            assert!(matches!(streamed.push(client, &buffer, wrong), Err(QuantError::Part { .. })), "{wrong}");
        }
        streamed.push(client, &buffer, PART).unwrap();
        assert!(matches!(streamed.finish(client, 0.0), Err(QuantError::Part { elements: 0, .. })));
    }
}

#[test]
fn the_first_non_finite_element_is_named() {
    for (name, client) in clients() {
        for format in formats(client) {
            for double_quant in [false, true] {
                for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut weight = weights(&mut Random(2), 70_000);
                    (weight[33_333], weight[55_555]) = (bad, bad);
                    let input = client.create_from_slice(&bytes(&weight, format));
                    let config = QuantConfig { double_quant, ..QuantConfig::default() };
                    match kernels::quantize(client, input, format, weight.len(), &config) {
                        Err(QuantError::NonFinite { index: 33_333, value }) => assert!(!value.is_finite()),
                        other => panic!("{name} {format} {bad}: {other:?}"),
                    }
                }
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    for (_, client) in clients() {
        let weight = weights(&mut Random(2), 1000);
        let host = Quantized4bit::quantize(&weight, &[1000], &QuantConfig::default()).unwrap();
        let good = DeviceWeight::from_host(client, &host).unwrap();
        let run =
            |weight: &DeviceWeight, bytes| kernels::dequantize(client, weight, client.empty(bytes), FloatFormat::F32);
        assert_eq!(run(&good, 4000), Ok(()));
        assert_eq!(run(&good, 3996), Err(QuantError::BufferSize { name: "out", expected: 4000, actual: 3996 }));
        let with = |edit: &dyn Fn(&mut DeviceWeight)| {
            let mut bad = good.clone();
            edit(&mut bad);
            run(&bad, 8000).unwrap_err()
        };
        assert_eq!(with(&|w| w.blocksize = 100), QuantError::Blocksize(100));
        assert!(matches!(with(&|w| w.num_elements = 1009), QuantError::BufferSize { name: "codes", .. }));
        assert!(matches!(with(&|w| w.num_elements = 0), QuantError::Empty(_)));
        assert!(matches!(with(&|w| w.num_elements = usize::MAX), QuantError::TooLarge { .. }));
        let plain = DeviceAbsmax::Plain(client.empty(4 * 15));
        let error = with(&|w| w.absmax = plain.clone());
        assert_eq!(error, QuantError::BufferSize { name: "absmax", expected: 64, actual: 60 });

        let input = client.create_from_slice(&bytes(&weight, FloatFormat::F32));
        let config = QuantConfig::default();
        let error = kernels::quantize(client, input, FloatFormat::F32, 1001, &config).unwrap_err();
        assert_eq!(error, QuantError::BufferSize { name: "input", expected: 4004, actual: 4000 });
        if !kernels::supports(client, FloatFormat::BF16) {
            let error = kernels::dequantize(client, &good, client.empty(4000), FloatFormat::BF16).unwrap_err();
            assert!(error.to_string().ends_with("can't hold bfloat16 here: use float32"), "{error}");
        }
    }
}

#[test]
fn threads_share_the_tables() {
    for (name, client) in clients() {
        let weight = weights(&mut Random(8), 5000);
        let host = Quantized4bit::quantize(&weight, &[5000], &QuantConfig::default()).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..8 {
                        check_dequantize(client, name, &host, FloatFormat::F32);
                    }
                });
            }
        });
    }
}
