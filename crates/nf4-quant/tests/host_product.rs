//! The product from codes against dequantize-then-multiply in f64.
#![allow(clippy::expect_used, clippy::unwrap_used)]

use half::{bf16, f16};
use nf4_quant::host_product::{AbsmaxView, Processor, WeightView, dense_product_on, product, product_on};
use nf4_quant::{Element, QuantConfig, QuantError, QuantType, Quantized4bit};
use test_support::{assert_close, noise};

fn quantized(seed: u64, [rows, columns]: [usize; 2], config: &QuantConfig) -> Quantized4bit {
    let weight: Vec<f32> = noise(seed, rows * columns).iter().map(|w| w * 0.3).collect();
    Quantized4bit::quantize(&weight, &[rows, columns], config).unwrap()
}

fn configs() -> impl Iterator<Item = QuantConfig> {
    [
        (QuantType::Nf4, 64, true),
        (QuantType::Fp4, 32, false),
        (QuantType::Nf4, 256, false),
        (QuantType::Fp4, 4096, true),
    ]
    .into_iter()
    .map(|(quant_type, blocksize, double_quant)| QuantConfig { quant_type, blocksize, double_quant })
}

fn check<E: Element>() {
    for config in configs() {
        // Whole groups; blocks that cross rows; rows that end within a byte; fewer columns than a group; many rows.
        for shape in [[5, 64], [7, 96], [18, 288], [19, 33], [3, 31], [40, 129], [1, 1], [130, 1024], [2, 4128]] {
            let [rows, columns] = shape;
            let weight = quantized(1, shape, &config);
            let dense: Vec<E> = weight.dequantize().unwrap();
            for tokens in [1, 2, 3, 4, 5, 6, 17] {
                let x: Vec<E> = noise(2, tokens * columns).into_iter().map(E::from_f32).collect();
                let dot = |t: usize, r: usize, term: fn(f64) -> f64| -> f64 {
                    let (x, w) = (&x[t * columns..][..columns], &dense[r * columns..][..columns]);
                    x.iter().zip(w).map(|(x, w)| term(f64::from(x.to_f32()) * f64::from(w.to_f32()))).sum()
                };
                let each = |term: fn(f64) -> f64| -> Vec<f64> {
                    (0..tokens).flat_map(|t| (0..rows).map(move |r| (t, r))).map(|(t, r)| dot(t, r, term)).collect()
                };
                let (expected, magnitudes) = (each(|p| p), each(f64::abs));
                for processor in Processor::available() {
                    let mut found = vec![f32::NAN; tokens * rows];
                    product_on(processor, &x, &WeightView::new(&weight).unwrap(), &mut found).unwrap();
                    // A sum has 16 lanes or fewer, each of columns / 8 terms at most, and a product may be rounded once
                    // before it is added: half an ulp for each, of the sum of magnitudes.
                    let roundings = columns as f64 / 4.0 + 8.0;
                    let bound = |i: usize, _| roundings * magnitudes[i] * f64::from(f32::EPSILON) / 2.0;
                    let what = format!("{processor:?}, {}, {tokens} x {shape:?}, {config:?}", E::FORMAT);
                    assert_close(&what, &found, &expected, bound);
                    let mut found = vec![f32::NAN; tokens * rows];
                    dense_product_on(processor, &x, &dense, shape, &mut found).unwrap();
                    assert_close(format!("dense, {what}"), &found, &expected, bound);
                }
            }
        }
    }
}

#[test]
fn products_of_f32() {
    check::<f32>();
}

#[test]
fn products_of_bf16() {
    check::<bf16>();
}

#[test]
fn products_of_f16() {
    check::<f16>();
}

#[test]
fn a_token_does_not_depend_on_the_others() {
    for config in configs() {
        for shape in [[37, 288], [21, 50]] {
            let [rows, columns] = shape;
            let weight = quantized(3, shape, &config);
            let view = WeightView::new(&weight).unwrap();
            let x = noise(4, 23 * columns);
            let dense: Vec<f32> = weight.dequantize().unwrap();
            for (processor, codes) in Processor::available().into_iter().flat_map(|p| [(p, true), (p, false)]) {
                let run = |x: &[f32]| {
                    let mut y = vec![f32::NAN; x.len() / columns * rows];
                    match codes {
                        true => product_on(processor, x, &view, &mut y).unwrap(),
                        false => dense_product_on(processor, x, &dense, shape, &mut y).unwrap(),
                    }
                    y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
                };
                let alone: Vec<Vec<u32>> = x.chunks(columns).map(run).collect();
                for tokens in 1..=23 {
                    let first = (23 - tokens) / 2;
                    let found = run(&x[first * columns..(first + tokens) * columns]);
                    let what = format!("{processor:?}, {tokens} tokens of {shape:?}, codes {codes}, {config:?}");
                    assert!(found == alone[first..first + tokens].concat(), "{what}");
                }
            }
        }
    }
}

#[test]
fn weights_in_bf16_give_the_bits_of_the_same_values_in_f32() {
    for shape in [[37, 288], [21, 50], [3, 1024]] {
        let [rows, columns] = shape;
        let narrow: Vec<bf16> = noise(7, rows * columns).into_iter().map(bf16::from_f32).collect();
        let wide: Vec<f32> = narrow.iter().map(|w| w.to_f32()).collect();
        for (processor, tokens) in Processor::available().into_iter().flat_map(|p| [1, 2, 3, 4, 5, 17].map(|t| (p, t)))
        {
            let x = noise(8, tokens * columns);
            let mut found = [vec![f32::NAN; tokens * rows], vec![f32::NAN; tokens * rows]];
            dense_product_on(processor, &x, &narrow, shape, &mut found[0]).unwrap();
            dense_product_on(processor, &x, &wide, shape, &mut found[1]).unwrap();
            let [narrow, wide] = found.map(|y| y.into_iter().map(f32::to_bits).collect::<Vec<_>>());
            assert!(narrow == wide, "{processor:?}, {tokens} tokens of {shape:?}");
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let weight = quantized(5, [4, 64], &QuantConfig::default());
    let view = WeightView::new(&weight).unwrap();
    let run = |view: &WeightView<'_>, x: usize, y: usize| product(&vec![0.0_f32; x], view, &mut vec![0.0; y]);
    assert_eq!(run(&view, 64, 4), Ok(()));
    assert_eq!(run(&view, 0, 0), Ok(()));
    let length = |name, expected, actual| Err(QuantError::Length { name, expected, actual });
    assert_eq!(run(&view, 65, 4), length("x", 64, 65));
    assert_eq!(run(&view, 128, 4), length("y", 8, 4));
    assert_eq!(run(&WeightView { codes: &weight.codes[1..], ..view }, 64, 4), length("codes", 128, 127));
    assert_eq!(run(&WeightView { blocksize: 48, ..view }, 64, 4), Err(QuantError::Blocksize(48)));
    let plain = AbsmaxView::Plain(&[1.0; 3]);
    assert_eq!(run(&WeightView { absmax: plain, ..view }, 64, 4), length("absmax", 4, 3));
    let nested = |blocksize| AbsmaxView::Nested { codes: &[0; 4], absmax: &[1.0; 2], offset: 0.0, blocksize };
    assert_eq!(run(&WeightView { absmax: nested(0), ..view }, 64, 4), Err(QuantError::NestedBlocksize));
    assert_eq!(run(&WeightView { absmax: nested(4), ..view }, 64, 4), length("nested_absmax", 1, 2));
    let mut y = [0.0; 4];
    assert_eq!(
        dense_product_on(Processor::best(), &[0.0_f32; 2], &[0.0_f32; 9], [4, 2], &mut y),
        length("weight", 8, 9)
    );
    let flat = Quantized4bit::quantize(&noise(6, 64), &[64], &QuantConfig::default()).unwrap();
    assert!(matches!(WeightView::new(&flat), Err(QuantError::Matmul(_))));
}
