//! RMSNorm, gated activations and rotary embeddings on every device: values and gradients against f64.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use qlora_layers::ops::backward_from;
use qlora_layers::ops::fused::{
    Activation, Conv, Norm, Rotation, add_norm, causal_conv, cross_entropy, gated, reorder_columns, rms_norm, rotate,
};
use test_support::{devices, dtypes, noise};

fn tensor<const D: usize>(values: &[f32], shape: [usize; D], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), (device, DType::F32))
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data_as::<f32>().iter::<f32>().map(f64::from).collect()
}

fn widened(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

/// Sums of up to some hundred f32 products of values near 1: a hundred half-ulps.
fn assert_close(what: &str, found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= 1e-5 * e.abs().max(1.0), "{what}: element {i} is {f}, should be {e}");
    }
}

#[test]
fn rms_norm_and_its_gradients() {
    for (name, device) in devices() {
        for (rows, width, offset) in [(1, 8, 0.0), (7, 33, 1.0), (20, 256, 0.0)] {
            let what = format!("{name}, {rows} x {width}");
            let (x, dy, weight) = (noise(1, rows * width), noise(2, rows * width), noise(3, width));
            let [x_leaf, w_leaf] =
                [tensor(&x, [rows, width], &device), tensor(&weight, [width], &device).reshape([1, width])]
                    .map(|t| t.autodiff().require_grad());
            let norm = Norm { eps: 1e-5, offset };
            let y = rms_norm(x_leaf.clone(), w_leaf.clone().reshape([width]), norm);
            let mut grads = (y.clone() * tensor(&dy, [rows, width], &device)).sum().backward();
            let [x, dy, weight] = [x, dy, weight].map(|v| widened(&v));
            assert_close(&what, &values(y.inner()), &fused_kernels::rms_norm::oracle::forward(&x, &weight, norm));
            let (dx, dweight) = fused_kernels::rms_norm::oracle::backward(&dy, &x, &weight, norm);
            assert_close(&what, &values(x_leaf.grad_remove(&mut grads).unwrap()), &dx);
            assert_close(&what, &values(w_leaf.grad_remove(&mut grads).unwrap()), &dweight);
        }
    }
}

#[test]
fn adding_and_normalising_at_once_is_both() {
    for (name, device) in devices() {
        for dtype in dtypes(name) {
            for (rows, width, offset) in [(1, 8, 0.0), (7, 33, 1.0), (20, 256, 0.0), (3, 4096, 0.0)] {
                let [x, delta] =
                    [1, 2].map(|seed| tensor(&noise(seed, rows * width), [rows, width], &device).cast(dtype));
                let (weight, norm) = (tensor(&noise(3, width), [width], &device), Norm { eps: 1e-5, offset });
                let [sum, out] = add_norm(x.clone(), delta.clone(), weight.clone(), norm);
                let expected = x + delta;
                // The same roundings in the same places.
                let what = format!("{name}, {dtype:?}, {rows} x {width}");
                assert_eq!(values(sum), values(expected.clone()), "{what}");
                assert_eq!(values(out), values(rms_norm(expected, weight, norm)), "{what}");
            }
        }
    }
}

#[test]
fn gated_activations_and_their_gradients() {
    for (name, device) in devices() {
        for activation in Activation::ALL {
            let what = format!("{name}, {activation:?}");
            let shape = [11, 37];
            let [gate, up, dy] = [4, 5, 6].map(|seed| noise(seed, 11 * 37));
            let [gate_leaf, up_leaf] =
                [&gate, &up].map(|v| tensor(v, shape, &device).mul_scalar(4.0).autodiff().require_grad());
            let y = gated(gate_leaf.clone(), up_leaf.clone(), activation);
            let mut grads = (y.clone() * tensor(&dy, shape, &device)).sum().backward();
            let [gate, up] = [gate, up].map(|v| v.iter().map(|v| f64::from(v * 4.0)).collect::<Vec<_>>());
            let pairs = || gate.iter().zip(&up);
            let expected: Vec<f64> =
                pairs().map(|(g, u)| fused_kernels::gated::oracle::forward(*g, *u, activation)).collect();
            let (dgate, dup): (Vec<f64>, Vec<f64>) = pairs()
                .zip(widened(&dy))
                .map(|((g, u), d)| fused_kernels::gated::oracle::backward(d, *g, *u, activation))
                .unzip();
            assert_close(&what, &values(y.inner()), &expected);
            assert_close(&what, &values(gate_leaf.grad_remove(&mut grads).unwrap()), &dgate);
            assert_close(&what, &values(up_leaf.grad_remove(&mut grads).unwrap()), &dup);
        }
    }
}

#[test]
fn short_convolution_and_its_gradient() {
    for (name, device) in devices() {
        let packed = Conv { packed: Some([0, 5, 5, 6, 15].into()), ..Conv::new(15, 4) };
        for (tokens, channels, conv) in [
            (1, 3, Conv::new(1, 4)),
            (15, 7, Conv::new(5, 4)),
            (18, 64, Conv::new(9, 3)),
            (15, 7, packed.clone()),
            (15, 8, Conv { silu: false, ..packed }),
        ] {
            let (taps, what) = (conv.taps, format!("{name}, {conv:?} over {tokens} x {channels}"));
            let [x, dy] = [10, 11].map(|seed| noise(seed, tokens * channels));
            let weight = noise(12, taps * channels);
            let leaf = tensor(&x, [tokens, channels], &device).autodiff().require_grad();
            let y = causal_conv(leaf.clone(), tensor(&weight, [taps, channels], &device), conv.clone());
            let mut grads = (y.clone() * tensor(&dy, [tokens, channels], &device)).sum().backward();
            let [x, dy, weight] = [x, dy, weight].map(|v| widened(&v));
            let expected = fused_kernels::causal_conv::oracle::forward(&x, &weight, channels, &conv);
            assert_close(&what, &values(y.inner()), &expected);
            let expected = fused_kernels::causal_conv::oracle::backward(&dy, &x, &weight, channels, &conv);
            assert_close(&what, &values(leaf.grad_remove(&mut grads).unwrap()), &expected);
        }
    }
}

#[test]
fn columns_in_another_order_and_their_gradient() {
    for (name, device) in devices() {
        let (order, inverse) = ([2, 4, 0, 1, 3], [2, 3, 0, 4, 1]);
        let [x, dy] = [10, 11].map(|seed| noise(seed, 15));
        let index = |order: [i32; 5]| Tensor::<1, Int>::from_data(TensorData::from(order), (&device, DType::I32));
        let leaf = tensor(&x, [3, 5], &device).autodiff().require_grad();
        let y = reorder_columns(leaf.clone(), index(order), index(inverse));
        let mut grads = (y.clone() * tensor(&dy, [3, 5], &device)).sum().backward();
        let moved = |values: &[f32], order: [i32; 5]| -> Vec<f64> {
            (0..15).map(|i| f64::from(values[i / 5 * 5 + order[i % 5] as usize])).collect()
        };
        assert_eq!(values(y.inner()), moved(&x, order), "{name}");
        assert_eq!(values(leaf.grad_remove(&mut grads).unwrap()), moved(&dy, inverse), "{name}");
    }
}

#[test]
fn rotation_and_its_gradient() {
    for (name, device) in devices() {
        for (len, heads, head_dim, rotary) in [(5, 2, 8, 8), (3, 3, 20, 10)] {
            let (tokens, what) = (2 * len, format!("{name}, {heads} heads of {head_dim}"));
            let shape = [tokens, heads * head_dim];
            let [x, dy] = [7, 8].map(|seed| noise(seed, tokens * heads * head_dim));
            let angles = noise(9, len * rotary / 2);
            let [cos, sin] = [f32::cos, f32::sin].map(|f| angles.iter().map(|a| f(3.0 * a)).collect::<Vec<_>>());
            let leaf = tensor(&x, shape, &device).autodiff().require_grad();
            let [cos_table, sin_table] = [&cos, &sin].map(|t| tensor(t, [len, rotary / 2], &device));
            let rotation = Rotation { len, head_dim, rotary, inverse: false };
            let y = rotate(leaf.clone(), cos_table, sin_table, rotation);
            let mut grads = (y.clone() * tensor(&dy, shape, &device)).sum().backward();
            let [x, dy, cos, sin] = [x, dy, cos, sin].map(|v| widened(&v));
            let oracle = |x: &[f64], inverse| {
                fused_kernels::rope::oracle(x, &cos, &sin, heads, Rotation { inverse, ..rotation })
            };
            assert_close(&what, &values(y.inner()), &oracle(&x, false));
            assert_close(&what, &values(leaf.grad_remove(&mut grads).unwrap()), &oracle(&dy, true));
        }
    }
}

#[test]
fn losses_and_their_gradients() {
    for (name, device) in devices() {
        for (rows, width) in [(1, 5), (7, 300)] {
            let what = format!("{name}, {rows} x {width}");
            let (logits, dloss) = (noise(12, rows * width), noise(13, rows));
            let targets: Vec<i32> = (0..rows).map(|row| ((row * 31 + 4) % width) as i32).collect();
            let leaf = tensor(&logits, [rows, width], &device).autodiff().require_grad();
            let targets_there: Tensor<1, Int> =
                Tensor::from_data(TensorData::new(targets.clone(), [rows]), (&device, DType::I32));
            // Doubled: the leaf itself must survive, its double may become the gradient.
            let losses = cross_entropy(leaf.clone().mul_scalar(2.0), targets_there);
            let weighted = losses.clone() * tensor(&dloss, [rows], &device);
            let mut grads = weighted.sum().backward();
            let doubled: Vec<f64> = logits.iter().map(|v| 2.0 * f64::from(*v)).collect();
            let rows_of = || doubled.chunks(width).zip(&targets).map(|(row, target)| (row, *target as usize));
            let oracle = fused_kernels::cross_entropy::oracle::forward;
            let expected: Vec<f64> = rows_of().map(|(row, target)| oracle(row, target)).collect();
            assert_close(&what, &values(losses.inner()), &expected);
            let gradient = |((row, target), d): ((&[f64], usize), f64)| {
                fused_kernels::cross_entropy::oracle::backward(2.0 * d, row, target)
            };
            let expected: Vec<f64> = rows_of().zip(widened(&dloss)).flat_map(gradient).collect();
            assert_close(&what, &values(leaf.clone().grad_remove(&mut grads).unwrap()), &expected);
            assert_close(&what, &values(leaf.inner()), &widened(&logits));
        }
    }
}

#[test]
fn a_backward_pass_starts_from_a_given_gradient() {
    for (name, device) in devices() {
        let [x, dy] = [14, 15].map(|seed| noise(seed, 6 * 9));
        let leaf = tensor(&x, [6, 9], &device).autodiff().require_grad();
        let y = leaf.clone().square() + leaf.clone();
        let mut grads = backward_from(y, tensor(&dy, [6, 9], &device));
        let expected: Vec<f64> =
            x.iter().zip(&dy).map(|(x, dy)| f64::from(*dy) * (2.0 * f64::from(*x) + 1.0)).collect();
        assert_close(name, &values(leaf.grad_remove(&mut grads).unwrap()), &expected);
    }
}

/// Narrow dtypes round once: within half an ulp of the f32 result, at most 2^-8 of it.
#[test]
fn narrow_activations_are_rounded_once() {
    for (name, device) in devices().into_iter().filter(|(name, _)| *name != "wgpu") {
        let shape = [6, 40];
        let x = tensor(&noise(10, 240), shape, &device).cast(FloatDType::BF16);
        let weight = tensor(&noise(11, 40), [40], &device);
        let norm = Norm { eps: 1e-6, offset: 1.0 };
        let narrow = values(rms_norm(x.clone(), weight.clone(), norm).cast(FloatDType::F32));
        let wide = values(rms_norm(x.cast(FloatDType::F32), weight, norm));
        for (n, w) in narrow.iter().zip(&wide) {
            assert!((n - w).abs() <= w.abs() / 256.0 + 1e-7, "{name}: {n} is not {w}, rounded");
        }
    }
}
