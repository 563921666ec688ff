//! The host codec and the oracle against bitsandbytes' own outputs.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod common;

use common::{Case, assert_bits, cases, code_at, narrow, ulps};
use nf4_quant::{Absmax, Metadata, NestedAbsmax, Quantized4bit, quantize_blocks, reference, signed_dynamic_map};

fn quantize(case: &Case) -> Quantized4bit {
    with_element!(case.state.dtype, E => {
        Quantized4bit::quantize(&narrow::<E>(&case.input), &case.state.shape, &case.config).expect("finite")
    })
}

fn absmax(case: &Case) -> Vec<f32> {
    case.input.chunks(case.config.blocksize).map(reference::absmax).collect()
}

#[test]
fn codebooks_are_bitsandbytes() {
    for case in cases() {
        assert_bits(&case.name, case.config.quant_type.quant_map(), &case.codebook);
        if let Some(map) = &case.nested_map {
            assert_bits(&case.name, signed_dynamic_map(), map);
        }
    }
}

#[test]
fn codes_equal() {
    for case in cases() {
        let quantized = quantize(&case);
        for i in 0..case.input.len() {
            let (ours, theirs) = (code_at(&quantized.codes, i), code_at(&case.codes, i));
            assert_eq!(ours, theirs, "{}: element {i}", case.name);
        }
        // An odd tensor's padding too.
        assert_eq!(quantized.codes, case.codes, "{}", case.name);
    }
}

#[test]
fn statistics_equal() {
    for case in cases() {
        match (&quantize(&case).state.absmax, &case.state.absmax) {
            (Absmax::Plain(ours), Absmax::Plain(theirs)) => assert_bits(&case.name, ours, theirs),
            (Absmax::Nested(ours), Absmax::Nested(theirs)) => {
                // The last bit of an f32 mean depends on the order of summation.
                assert!(ulps(ours.offset, theirs.offset) <= 1, "{}: {} {}", case.name, ours.offset, theirs.offset);
                // Given the offset, everything is equal.
                let ours =
                    NestedAbsmax::quantize_with(&absmax(&case), theirs.offset, theirs.blocksize).expect("blocksize");
                assert_eq!(ours.codes, theirs.codes, "{}", case.name);
                assert_bits(&case.name, &ours.absmax, &theirs.absmax);
            }
            _ => panic!("{}: one is nested, the other not", case.name),
        }
    }
}

#[test]
fn dequantized_values_equal() {
    for case in cases() {
        let theirs = Quantized4bit::new(case.codes.clone(), case.state.clone()).expect("consistent");
        let ours: Vec<f32> = with_element!(case.state.dtype, E => {
            theirs.dequantize::<E>().expect("consistent").into_iter().map(nf4_quant::Element::to_f32).collect()
        });
        assert_bits(&case.name, &ours, &case.dequantized);
    }
}

#[test]
fn the_oracle_agrees_with_the_codec() {
    for case in cases() {
        let (quant_type, blocksize) = (case.config.quant_type, case.config.blocksize);
        let (codes, absmax) = reference::quantize(&case.input, quant_type, blocksize);
        let mut ours = (vec![0; codes.len()], vec![0.0; absmax.len()]);
        quantize_blocks(&case.input, quant_type, blocksize, &mut ours.0, &mut ours.1).expect("finite");
        assert_eq!(ours.0, codes, "{}", case.name);
        assert_bits(&case.name, &ours.1, &absmax);
        let values =
            reference::dequantize(&case.codes, &case.state.absmax_f32(), quant_type, blocksize, case.input.len());
        assert_bits(&case.name, &common::round_to(&values, case.state.dtype), &case.dequantized);
        if let Absmax::Nested(theirs) = &case.state.absmax {
            let (codes, nested) = reference::quantize_nested(&absmax, theirs.offset, theirs.blocksize);
            assert_eq!(codes, theirs.codes, "{}", case.name);
            assert_bits(&case.name, &nested, &theirs.absmax);
            let expanded: Vec<f32> = (theirs.codes.iter().enumerate())
                .map(|(i, c)| reference::decode_nested(*c, theirs.absmax[i / theirs.blocksize], theirs.offset))
                .collect();
            assert_bits(&case.name, &case.state.absmax_f32(), &expanded);
        }
    }
}

#[test]
fn metadata_is_byte_exact() {
    for case in cases() {
        assert_eq!(case.state.metadata_json(), case.json);
        assert_eq!(Metadata::parse(&case.json), Ok(case.state.metadata()));
    }
}

#[test]
fn eight_bit_quantization_equals() {
    assert_bits("dynamic_map_signed", signed_dynamic_map(), &common::blockwise("dynamic_map_signed"));
    for kind in ["normal", "uniform"] {
        let input = common::blockwise(&format!("{kind}.input"));
        let theirs = NestedAbsmax {
            codes: common::blockwise_codes(&format!("{kind}.q")),
            absmax: common::blockwise(&format!("{kind}.absmax")),
            offset: 0.0,
            blocksize: 256,
        };
        let ours = NestedAbsmax::quantize_with(&input, 0.0, 256).expect("blocksize");
        assert_bits(kind, &ours.absmax, &theirs.absmax);
        assert_eq!(ours.codes, theirs.codes, "{kind}");
        assert_bits(kind, &theirs.dequantize(), &common::blockwise(&format!("{kind}.dequantized")));
    }
}
