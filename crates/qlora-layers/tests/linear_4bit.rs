//! The 4-bit product and its backward, against a dense oracle, finite differences and bitsandbytes.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use nf4_quant::{QuantConfig, QuantType, Quantized4bit};
use qlora_layers::Linear4bit;
use test_support::{devices, noise};

fn matrix(values: Vec<f32>, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.into_data_as::<f32>().iter::<f32>().collect()
}

/// `x Wᵀ` in f64.
fn product(x: &[f32], w: &[f32], [tokens, rows, columns]: [usize; 3]) -> Vec<f64> {
    let dot =
        |t: usize, r: usize| (0..columns).map(|c| f64::from(x[t * columns + c]) * f64::from(w[r * columns + c])).sum();
    (0..tokens).flat_map(|t| (0..rows).map(move |r| dot(t, r))).collect()
}

fn transposed(w: &[f32], [rows, columns]: [usize; 2]) -> Vec<f32> {
    (0..columns).flat_map(|c| (0..rows).map(move |r| w[r * columns + c])).collect()
}

/// An f32 dot product of `terms` values below 1 errs by at most `terms` half-ulps of the sum of magnitudes.
fn tolerance(terms: usize) -> f64 {
    terms as f64 * terms as f64 * f64::from(f32::EPSILON) / 2.0
}

fn configs() -> impl Iterator<Item = QuantConfig> {
    [(QuantType::Nf4, 64, true), (QuantType::Nf4, 32, false), (QuantType::Fp4, 128, true)]
        .into_iter()
        .map(|(quant_type, blocksize, double_quant)| QuantConfig { quant_type, blocksize, double_quant })
}

#[test]
fn forward_and_input_gradient_match_the_dense_product_on_odd_shapes() {
    for (name, device) in devices() {
        for config in configs() {
            for [tokens, rows, columns] in [[1, 64, 64], [3, 17, 33], [5, 100, 96], [17, 7, 129]] {
                let weight = Quantized4bit::quantize(&noise(1, rows * columns), &[rows, columns], &config).unwrap();
                let dense: Vec<f32> = weight.dequantize().unwrap();
                let linear = Linear4bit::from_quantized(&weight, &device).unwrap();
                assert_eq!(values(linear.dequantize(FloatDType::F32)), dense, "{name}: dequantized values are exact");

                let (x, dy) = (noise(2, tokens * columns), noise(3, tokens * rows));
                let x_tensor = matrix(x.clone(), [tokens, columns], &device).autodiff().require_grad();
                let y = linear.forward(x_tensor.clone());
                let mut grads = (y.clone() * matrix(dy.clone(), [tokens, rows], &device)).sum().backward();
                let dx = x_tensor.grad_remove(&mut grads).unwrap();

                let expected_y = product(&x, &dense, [tokens, rows, columns]);
                let expected_dx = product(&dy, &transposed(&dense, [rows, columns]), [tokens, columns, rows]);
                for (found, expected, terms) in
                    [(values(y.inner()), expected_y, columns), (values(dx), expected_dx, rows)]
                {
                    for (found, expected) in found.iter().zip(expected) {
                        assert!(
                            (f64::from(*found) - expected).abs() < tolerance(terms),
                            "{name} {config:?}: {found} against {expected}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn input_gradient_agrees_with_finite_differences() {
    let device = Device::flex();
    let weight = Quantized4bit::quantize(&noise(4, 12 * 40), &[12, 40], &QuantConfig::default()).unwrap();
    let linear = Linear4bit::from_quantized(&weight, &device).unwrap();
    let (x, direction) = (noise(5, 2 * 40), noise(6, 2 * 40));
    let loss = |x: Tensor<2>| linear.forward(x).square().sum();
    let leaf = matrix(x.clone(), [2, 40], &device).autodiff().require_grad();
    let grad = values(leaf.grad(&loss(leaf.clone()).backward()).unwrap());
    let analytic: f64 = grad.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
    let shifted = |step: f32| {
        let moved = x.iter().zip(&direction).map(|(x, d)| x + step * d).collect();
        f64::from(loss(matrix(moved, [2, 40], &device)).into_data().iter::<f32>().next().unwrap())
    };
    // The loss is quadratic, so a central difference is exact but for rounding: f32 values near 1e2
    // over a step of 2e-1 leave about 1e-4 of absolute error in a derivative of order 1e2.
    let numeric = (shifted(0.1) - shifted(-0.1)) / 0.2;
    assert!((numeric - analytic).abs() < 1e-4 * analytic.abs().max(10.0), "{numeric} against {analytic}");
}

#[test]
fn a_frozen_product_of_untracked_input_records_nothing() {
    let device = Device::flex();
    let weight = Quantized4bit::quantize(&noise(7, 64), &[8, 8], &QuantConfig::default()).unwrap();
    let linear = Linear4bit::from_quantized(&weight, &device).unwrap();
    assert!(!linear.forward(matrix(noise(8, 8), [1, 8], &device)).is_tracked());
    assert!(!linear.forward(matrix(noise(8, 8), [1, 8], &device).autodiff()).is_tracked());
}

#[test]
fn a_weight_takes_half_a_byte_and_its_statistics() {
    let weight = Quantized4bit::quantize(&noise(9, 256 * 512), &[256, 512], &QuantConfig::default()).unwrap();
    let linear = Linear4bit::from_quantized(&weight, &Device::flex()).unwrap();
    // Codes, one byte per block of 64, one f32 per 256 blocks: 4.127 bits per weight (QLoRA, section 3). And the offset.
    assert_eq!(linear.device_bytes(), 256 * 512 / 2 + 256 * 512 / 64 + 4 * 8 + 4);
}
