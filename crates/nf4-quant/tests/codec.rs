//! The host codec on random weights: against the oracle, against bitsandbytes' published error, and on
//! input that can't be quantized.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{assert_bits, narrow, round_to};
use nf4_quant::{
    Absmax, Element, FloatFormat, NestedAbsmax, QuantConfig, QuantError, QuantState, QuantType, Quantized4bit,
    dequantize_blocks, quantize_blocks, reference,
};
use proptest::prelude::*;
use test_support::Random;

const BLOCKSIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// Half the widest gap between neighbours of a codebook: the largest error relative to absmax.
fn half_gap(quant_type: QuantType) -> f32 {
    let mut values = *quant_type.codebook();
    values.sort_by(f32::total_cmp);
    values.windows(2).fold(0.0, |m, w| f32::max(m, w[1] - w[0])) / 2.0
}

/// Weights with what checkpoints hold: normal values of any scale, outliers, zeros, whole zero blocks.
fn weights(seed: u64, len: usize, blocksize: usize) -> Vec<f32> {
    let mut random = Random(seed);
    let mut out = Vec::with_capacity(len);
    while out.len() < len {
        let scale = 10_f32.powf((random.uniform() * 8.0 - 6.0) as f32);
        let kind = random.next_u64() % 8;
        for _ in 0..blocksize.min(len - out.len()) {
            out.push(match kind {
                0 => 0.0,
                1 if random.next_u64().is_multiple_of(16) => 40.0 * scale * random.normal(),
                2 if random.next_u64().is_multiple_of(2) => 0.0,
                3 => scale * if random.next_u64().is_multiple_of(2) { -1.0 } else { 1.0 },
                _ => scale * random.normal(),
            });
        }
    }
    out
}

fn config() -> impl Strategy<Value = (QuantType, usize, FloatFormat)> {
    (
        prop::sample::select(QuantType::ALL.to_vec()),
        prop::sample::select(BLOCKSIZES.to_vec()),
        prop::sample::select(FloatFormat::ALL.to_vec()),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Codes, absmax and values are the oracle's, for every format, blocksize and length.
    #[test]
    fn equals_the_oracle((quant_type, blocksize, format) in config(), len in 1_usize..20_000, seed: u64) {
        let weight = round_to(&weights(seed, len, blocksize), format);
        let (codes, absmax) = reference::quantize(&weight, quant_type, blocksize);
        let mut ours = (vec![0xff; len.div_ceil(2)], vec![f32::NAN; len.div_ceil(blocksize)]);
        with_element!(format, E => quantize_blocks(&narrow::<E>(&weight), quant_type, blocksize, &mut ours.0, &mut ours.1)).unwrap();
        prop_assert_eq!(&ours.0, &codes);
        assert_bits("absmax", &ours.1, &absmax);

        let expected = reference::dequantize(&codes, &absmax, quant_type, blocksize, len);
        let values: Vec<f32> = with_element!(format, E => {
            let mut out = vec![E::from_f32(f32::NAN); len];
            dequantize_blocks(&codes, &absmax, quant_type, blocksize, &mut out).unwrap();
            out.into_iter().map(Element::to_f32).collect()
        });
        assert_bits("values", &values, &round_to(&expected, format));
    }

    /// No element is further from its weight than half the codebook's widest gap, in units of absmax.
    #[test]
    fn round_trip_error_is_bounded((quant_type, blocksize, _) in config(), len in 1_usize..20_000, seed: u64) {
        let weight = weights(seed, len, blocksize);
        let config = QuantConfig { quant_type, blocksize, double_quant: false };
        let quantized = Quantized4bit::quantize(&weight, &[len], &config).unwrap();
        let restored = quantized.dequantize::<f32>().unwrap();
        // Scaling, the product and FP4's thresholds, given to eight decimals, round: 1e-6 covers them.
        let bound = half_gap(quant_type) + 1e-6;
        for (block, restored) in weight.chunks(blocksize).zip(restored.chunks(blocksize)) {
            let absmax = reference::absmax(block);
            for (a, b) in block.iter().zip(restored) {
                prop_assert!((a - b).abs() <= bound * absmax, "{} became {} in a block up to {}", a, b, absmax);
                prop_assert!(a * b >= 0.0, "{} changed sign to {}", a, b);
            }
        }
    }

    /// Quantizing what dequantizing gave changes no code: a codebook value decodes to itself.
    #[test]
    fn codes_are_stable((quant_type, blocksize, _) in config(), blocks in 1_usize..8, seed: u64) {
        let mut random = Random(seed);
        let full = (0..16_u8).find(|c| quant_type.codebook()[usize::from(*c)] == 1.0).unwrap();
        let nibbles: Vec<u8> = (0..blocks * blocksize).map(|i| match (random.next_u64() % 16) as u8 {
            // Every block holds a 1, so that absmax stays.
            _ if i % blocksize == 0 => full,
            // FP4's negative zero encodes as zero.
            8 if quant_type == QuantType::Fp4 => 0,
            code => code,
        }).collect();
        let codes: Vec<u8> = nibbles.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
        let absmax: Vec<f32> = (0..blocks).map(|b| (b + 1) as f32 * 0.37).collect();
        let mut values = vec![0.0_f32; blocks * blocksize];
        dequantize_blocks(&codes, &absmax, quant_type, blocksize, &mut values).unwrap();
        let mut again = (vec![0; codes.len()], vec![0.0; blocks]);
        quantize_blocks(&values, quant_type, blocksize, &mut again.0, &mut again.1).unwrap();
        prop_assert_eq!(again.0, codes);
        assert_bits("absmax", &again.1, &absmax);
    }

    /// Double quantization is the oracle's, for any offset and nested blocksize, and stays in its bound.
    #[test]
    fn nested_equals_the_oracle(len in 1_usize..3000, blocksize in 1_usize..600, seed: u64, offset in -1.0_f32..1.0) {
        let mut random = Random(seed);
        let absmax: Vec<f32> = (0..len).map(|_| random.normal().abs() * 0.05).collect();
        let nested = NestedAbsmax::quantize_with(&absmax, offset, blocksize).unwrap();
        let (codes, maxima) = reference::quantize_nested(&absmax, offset, blocksize);
        prop_assert_eq!(&nested.codes, &codes);
        assert_bits("nested absmax", &nested.absmax, &maxima);
        for (i, value) in nested.dequantize().into_iter().enumerate() {
            let expected = reference::decode_nested(codes[i], maxima[i / blocksize], offset);
            prop_assert_eq!(value.to_bits(), expected.to_bits());
            // Half the map's widest step, 0.9/64; the roundings are far below 1e-6.
            prop_assert!((value - absmax[i]).abs() <= (0.9 / 128.0 + 1e-6) * maxima[i / blocksize] + 1e-7);
        }
    }
}

/// bitsandbytes' own test of its 4-bit codec, on the same data distribution.
#[test]
fn mean_error_is_bitsandbytes() {
    let n = 1024;
    let weight = Random(42).normals(n * n);
    let published = [
        (QuantType::Nf4, [(64, 0.072798), (128, 0.076831), (4096, 0.092547)]),
        (QuantType::Fp4, [(64, 0.096543), (128, 0.102969), (4096, 0.129536)]),
    ];
    for (quant_type, rows) in published {
        for (blocksize, expected) in rows {
            for double_quant in [false, true] {
                let config = QuantConfig { quant_type, blocksize, double_quant };
                let restored: Vec<f32> =
                    Quantized4bit::quantize(&weight, &[n, n], &config).unwrap().dequantize().unwrap();
                let total: f64 = weight.iter().zip(&restored).map(|(a, b)| f64::from((a - b).abs())).sum();
                let mean = total / (n * n) as f64;
                // The mean of 2^20 errors of about this size scatters by its size / 1000 (at blocksize
                // 4096 the 256 maxima do more: 0.5 %), and double quantization adds up to 0.2 %.
                let tolerance = expected * if blocksize == 4096 { 0.015 } else { 0.005 };
                assert!(
                    (mean - expected).abs() < tolerance,
                    "{quant_type}/{blocksize} {double_quant}: {mean}, should be {expected}"
                );
            }
        }
    }
}

#[test]
fn zero_blocks_decode_to_zero() {
    for quant_type in QuantType::ALL {
        let config = QuantConfig { quant_type, blocksize: 64, double_quant: false };
        let mut weight = Random(7).normals(256);
        weight[64..128].fill(0.0);
        // A block of subnormals counts as zero: their reciprocal overflows.
        weight[128..192].fill(f32::from_bits(3));
        let quantized = Quantized4bit::quantize(&weight, &[256], &config).unwrap();
        assert_eq!(quantized.state.absmax_f32()[1..3], [0.0, 0.0]);
        let restored: Vec<f32> = quantized.dequantize().unwrap();
        assert!(restored[64..192].iter().all(|v| *v == 0.0));
        assert!(restored[..64].iter().any(|v| *v != 0.0));
    }
}

#[test]
fn the_first_non_finite_element_is_named() {
    for (bad, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let mut weight = Random(3).normals(300_000);
        (weight[123_456], weight[222_222]) = (bad, bad);
        let error = Quantized4bit::quantize(&weight, &[300, 1000], &QuantConfig::default()).unwrap_err();
        assert!(error.to_string().starts_with(&format!("element 123456 is {text}:")), "{error}");
        let halves = narrow::<half::bf16>(&weight);
        let error = Quantized4bit::quantize(&halves, &[300, 1000], &QuantConfig::default()).unwrap_err();
        assert!(matches!(error, QuantError::NonFinite { index: 123_456, .. }));
    }
}

#[test]
fn odd_lengths_pad_with_the_code_of_zero() {
    let weight = [0.5_f32, -0.25, 1.0];
    let config = QuantConfig { blocksize: 64, double_quant: false, ..QuantConfig::default() };
    let quantized = Quantized4bit::quantize(&weight, &[3], &config).unwrap();
    // 1 is code 15, zero is code 7.
    assert_eq!((quantized.codes.len(), quantized.codes[1]), (2, 0xf7));
    let restored: Vec<f32> = quantized.dequantize().unwrap();
    assert_eq!(restored.len(), 3);
    assert_eq!(restored[2], 1.0);
}

#[test]
fn what_does_not_fit_is_refused() {
    let weight = [1.0_f32; 128];
    for blocksize in [0, 1, 16, 48, 63, 8192] {
        let config = QuantConfig { blocksize, ..QuantConfig::default() };
        assert_eq!(config.validate(), Err(QuantError::Blocksize(blocksize)));
        assert!(Quantized4bit::quantize(&weight, &[128], &config).is_err());
    }
    let config = QuantConfig::default();
    let error = Quantized4bit::quantize(&weight, &[3, 50], &config).unwrap_err();
    assert_eq!(error.to_string(), "shape [3, 50] has 150 elements but the data has 128");
    assert_eq!(Quantized4bit::quantize::<f32>(&[], &[0, 4], &config), Err(QuantError::Empty(vec![0, 4])));
    assert!(Quantized4bit::quantize(&weight, &[usize::MAX, 2, usize::MAX], &config).is_err());

    let good = Quantized4bit::quantize(&weight, &[128], &config).unwrap();
    let with = |edit: &dyn Fn(&mut Quantized4bit)| {
        let mut bad = good.clone();
        edit(&mut bad);
        bad.dequantize::<f32>().unwrap_err().to_string()
    };
    assert_eq!(with(&|q| q.codes.truncate(9)), "`codes` has 9 entries where 64 are needed");
    assert_eq!(with(&|q| q.state.absmax = Absmax::Plain(vec![1.0])), "`absmax` has 1 entries where 2 are needed");
    assert!(with(&|q| q.state.blocksize = 7).starts_with("blocksize 7"));
    let nested = |edit: &dyn Fn(&mut NestedAbsmax)| {
        with(&|q| {
            if let Absmax::Nested(nested) = &mut q.state.absmax {
                edit(nested);
            }
        })
    };
    assert_eq!(nested(&|n| n.absmax.clear()), "`nested_absmax` has 0 entries where 1 are needed");
    assert!(nested(&|n| n.blocksize = 0).starts_with("nested_blocksize is 0"));
    let mut out = [0.0_f32; 100];
    assert_eq!(good.dequantize_into(&mut out).unwrap_err().to_string(), "`out` has 100 entries where 128 are needed");
}

#[test]
fn state_counts_and_expands() {
    let state = QuantState {
        quant_type: QuantType::Nf4,
        blocksize: 64,
        dtype: FloatFormat::BF16,
        shape: vec![3, 50],
        absmax: Absmax::Nested(NestedAbsmax {
            codes: vec![255, 127, 0],
            absmax: vec![2.0],
            offset: 1.0,
            blocksize: 256,
        }),
    };
    assert_eq!((state.num_elements(), state.num_blocks(), state.validate()), (150, 3, Ok(())));
    let absmax = state.absmax_f32();
    assert_eq!(absmax[..2], [3.0, 1.0]);
}
