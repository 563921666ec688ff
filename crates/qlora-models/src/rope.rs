//! Rotary position embeddings (Su et al., 2021, arXiv 2104.09864), in the half-split layout of
//! Hugging Face checkpoints.

use crate::config::{ModelConfig, RopeScaling};
use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use std::f64::consts::PI;

/// One frequency per pair of head dimensions, `theta^(-2i/d)` with the scaling applied, in f32 as
/// transformers computes them.
pub fn inverse_frequencies(config: &ModelConfig) -> Vec<f32> {
    (0..config.head_dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / config.head_dim as f32;
            let frequency = 1.0 / (config.rope_theta as f32).powf(exponent);
            match config.rope_scaling {
                RopeScaling::Default => frequency,
                RopeScaling::Linear { factor } => frequency / factor as f32,
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                    let wavelength = 2.0 * PI / f64::from(frequency);
                    let (low, high) = (
                        original_max_position_embeddings / low_freq_factor,
                        original_max_position_embeddings / high_freq_factor,
                    );
                    if wavelength > low {
                        (f64::from(frequency) / factor) as f32
                    } else if wavelength < high {
                        frequency
                    } else {
                        let smooth = (original_max_position_embeddings / wavelength - low_freq_factor)
                            / (high_freq_factor - low_freq_factor);
                        ((1.0 - smooth) * f64::from(frequency) / factor + smooth * f64::from(frequency)) as f32
                    }
                }
            }
        })
        .collect()
}

/// Cosines and sines of the angles at positions `start..start + len`.
///
/// # Shapes
/// Each `[1, 1, len, head_dim / 2]`, f32.
pub fn tables(config: &ModelConfig, start: usize, len: usize, device: &Device) -> (Tensor<4>, Tensor<4>) {
    let frequencies = inverse_frequencies(config);
    // The angle is an f32 product, as in transformers; its sine and cosine are then exact to an ulp.
    let angles: Vec<f64> =
        (start..start + len).flat_map(|p| frequencies.iter().map(move |f| f64::from(p as f32 * f))).collect();
    let shape = [1, 1, len, frequencies.len()];
    let table = |function: fn(f64) -> f64| {
        let values: Vec<f32> = angles.iter().map(|&angle| function(angle) as f32).collect();
        Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
    };
    (table(f64::cos), table(f64::sin))
}

/// Rotates each pair `(x_i, x_{i + d/2})` by its angle, in f32.
///
/// # Shapes
/// `x` is `[rows, heads, len, head_dim]` and keeps its dtype; the tables are of [`tables`].
pub fn rotate(x: Tensor<4>, cos: &Tensor<4>, sin: &Tensor<4>) -> Tensor<4> {
    let (half, dtype) = (x.dims()[3] / 2, x.dtype());
    let x = x.cast(FloatDType::F32);
    let (first, second) = (x.clone().narrow(3, 0, half), x.narrow(3, half, half));
    let (cos, sin) = (cos.clone(), sin.clone());
    Tensor::cat(vec![first.clone() * cos.clone() - second.clone() * sin.clone(), second * cos + first * sin], 3)
        .cast(dtype)
}
