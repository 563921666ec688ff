//! Kinds of adapters beyond plain LoRA: magnitudes (DoRA), biases, embeddings, modules trained in full; forward
//! against the definition in f64, gradients against hand formulas and central differences.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use burn::module::Module;
use burn::tensor::{DType, Device, FloatDType, Int, Tensor, TensorData};
use nf4_quant::{QuantConfig, Quantized4bit};
use qlora_layers::ops::seeded_dropout;
use qlora_layers::{
    EmbeddingAdapter, FrozenLinear, Linear4bit, LoraAdapter, LoraLinear, Pass, frozen, track, trainable,
};
use test_support::{devices, noise};

const OUT: usize = 24;
const IN: usize = 64;
const RANK: usize = 4;
/// Enough for DoRA's factors to be a part of the weight.
const TOKENS: usize = 130;
const FEW: usize = 5;
const SCALING: f32 = 1.5;

fn matrix(seed: u64, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(noise(seed, shape[0] * shape[1]), shape), (device, DType::F32))
}

fn values(tensor: Tensor<2>) -> Vec<f64> {
    tensor.without_autodiff().into_data_as::<f32>().iter::<f32>().map(f64::from).collect()
}

/// A 4-bit or dense layer with random factors; the same values in both.
fn layer(device: &Device, quantized: bool, dropout: f32) -> LoraLinear {
    let weight = Quantized4bit::quantize(&noise(1, OUT * IN), &[OUT, IN], &QuantConfig::default()).unwrap();
    let weight = Linear4bit::from_quantized(&weight, device).unwrap();
    let base = match quantized {
        true => FrozenLinear::Quantized(weight),
        false => FrozenLinear::dense(weight.dequantize(FloatDType::F32)),
    };
    let mut layer = LoraLinear::frozen(base, None);
    let (lora_a, lora_b) = (matrix(2, [RANK, IN], device), matrix(3, [OUT, RANK], device));
    layer.set_adapter("layer", LoraAdapter::from_factors(lora_a, lora_b, SCALING, dropout, 3)).unwrap();
    layer
}

/// The layer with magnitudes that are no norms.
fn dora_layer(device: &Device, quantized: bool, dropout: f32) -> LoraLinear {
    let mut layer = layer(device, quantized, dropout);
    let magnitude = matrix(4, [1, OUT], device).add_scalar(3.0);
    let adapter = layer.adapter.take().unwrap().with_dora(&layer.base, Some(magnitude));
    layer.set_adapter("layer", adapter).unwrap();
    layer
}

/// Row-major product in f64.
fn product(a: &[f64], b: &[f64], [m, k, n]: [usize; 3]) -> Vec<f64> {
    (0..m * n).map(|i| (0..k).map(|j| a[i / n * k + j] * b[j * n + i % n]).sum()).collect()
}

fn transposed(a: &[f64], [m, n]: [usize; 2]) -> Vec<f64> {
    (0..m * n).map(|i| a[i % m * n + i / m]).collect()
}

/// `W + s·BA` and its norm for each output feature.
fn adapted(layer: &LoraLinear) -> (Vec<f64>, Vec<f64>) {
    let adapter = layer.adapter.as_ref().unwrap();
    let update = product(&values(adapter.lora_b.val()), &values(adapter.lora_a.val()), [OUT, RANK, IN]);
    let weight = values(layer.base.to_dense(FloatDType::F32));
    let sum: Vec<f64> = weight.iter().zip(update).map(|(w, u)| w + f64::from(SCALING) * u).collect();
    let norms = sum.chunks(IN).map(|row| row.iter().map(|x| x * x).sum::<f64>().sqrt()).collect();
    (sum, norms)
}

fn assert_close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() < tolerance, "{what}, element {i}: {found} against {expected}");
    }
}

#[test]
fn dora_is_its_definition_on_4_bits_and_dense() {
    for (name, device) in devices() {
        for quantized in [true, false] {
            let mut layer = dora_layer(&device, quantized, 0.0);
            let x = matrix(5, [TOKENS, IN], &device);
            let (sum, norms) = adapted(&layer);
            let magnitude = values(layer.adapter.as_ref().unwrap().dora.as_ref().unwrap().magnitude.val());
            let weight: Vec<f64> = (0..OUT * IN).map(|i| magnitude[i / IN] / norms[i / IN] * sum[i]).collect();
            let expected = product(&values(x.clone()), &transposed(&weight, [OUT, IN]), [TOKENS, IN, OUT]);
            // Sums of 64 products of order 1 and norms of order 5, in f32.
            assert_close(name, &values(layer.forward_in(x.clone(), Pass::INFERENCE)), &expected, 2e-5);
            assert_close(name, &values(layer.adapter.as_ref().unwrap().merged(&layer.base)), &weight, 1e-5);
            let computed = values(layer.forward_in(x.clone(), Pass::INFERENCE));
            let few = values(layer.forward_in(x.clone().narrow(0, 0, FEW), Pass::INFERENCE));
            assert_close(name, &few, &expected[..FEW * OUT], 2e-5);
            layer.keep_scale();
            assert_eq!(
                values(layer.forward_in(x.clone(), Pass::INFERENCE)),
                computed,
                "{name}: settled norms are the same"
            );
            let settled = values(layer.forward_in(x.narrow(0, 0, FEW), Pass::INFERENCE));
            assert_eq!(settled, few, "{name}: settled norms are the same");
        }
    }
}

#[test]
fn fresh_magnitudes_change_nothing() {
    for (name, device) in devices() {
        let mut layer = layer(&device, true, 0.0);
        let x = matrix(5, [TOKENS, IN], &device);
        let without = values(layer.forward_in(x.clone(), Pass::INFERENCE));
        let adapter = layer.adapter.take().unwrap().with_dora(&layer.base, None);
        layer.set_adapter("layer", adapter).unwrap();
        // A quotient of two equal norms: 1 within an ulp or two.
        assert_close(name, &values(layer.forward_in(x, Pass::INFERENCE)), &without, 1e-5);
    }
}

/// The norms are worked out once for all passes of a step: the forward pass, what runs again, and further micro-batches.
#[test]
fn norms_are_kept_until_the_adapter_is_tracked_again() {
    for (name, device) in devices() {
        let x = matrix(5, [TOKENS, IN], &device);
        let run = |layer: &LoraLinear| values(layer.forward_in(x.clone(), Pass::training(0)));
        let changed = |layer: &mut LoraLinear| {
            layer.adapter.as_mut().unwrap().lora_b = trainable(matrix(7, [OUT, RANK], &device));
        };
        let mut fresh = dora_layer(&device, true, 0.0);
        changed(&mut fresh);
        fresh.track();
        let expected = run(&fresh);

        let mut layer = dora_layer(&device, true, 0.0);
        layer.track();
        let before = run(&layer);
        let shared = layer.clone();
        // Behind the layer's back: what comes out has the norms of before.
        changed(&mut layer);
        assert_ne!(run(&layer), expected, "{name}: the norms were worked out again");
        layer.track();
        assert_eq!(run(&layer), expected, "{name}: after an update they are");
        assert_eq!(run(&shared), before, "{name}: a clone keeps its own");
        // What Burn's traversals change, an optimizer's step for one, is not trusted either.
        changed(&mut layer);
        assert_eq!(run(&layer.to_device(&device)), expected, "{name}");
    }
}

/// With a constant norm n: dm_i = Σ dy_i (x Wᵀ + s x Aᵀ Bᵀ)_i / n_i, and the factors' gradients are LoRA's of dy · m / n.
#[test]
fn dora_gradients_match_the_formulas() {
    for (name, device) in devices() {
        for quantized in [true, false] {
            let mut layer = dora_layer(&device, quantized, 0.0);
            let (x, dy) = (matrix(5, [TOKENS, IN], &device), matrix(6, [TOKENS, OUT], &device));
            let x_leaf = x.clone().autodiff().require_grad();
            let (sum, norms) = adapted(&layer);
            let adapter = layer.adapter.as_ref().unwrap();
            let (a, b) = (values(adapter.lora_a.val()), values(adapter.lora_b.val()));
            let magnitude = values(adapter.dora.as_ref().unwrap().magnitude.val());
            layer.track();
            let mut grads = (layer.forward_in(x_leaf.clone(), Pass::training(0)) * dy.clone()).sum().backward();

            let (x, dy, s) = (values(x), values(dy), f64::from(SCALING));
            let z = product(&x, &transposed(&sum, [OUT, IN]), [TOKENS, IN, OUT]);
            let d_magnitude: Vec<f64> = (0..OUT)
                .map(|i| (0..TOKENS).map(|t| dy[t * OUT + i] * z[t * OUT + i]).sum::<f64>() / norms[i])
                .collect();
            let dz: Vec<f64> = (0..TOKENS * OUT).map(|i| s * dy[i] * magnitude[i % OUT] / norms[i % OUT]).collect();
            let d_b = product(
                &transposed(&dz, [TOKENS, OUT]),
                &product(&x, &transposed(&a, [RANK, IN]), [TOKENS, IN, RANK]),
                [OUT, TOKENS, RANK],
            );
            let d_a =
                product(&transposed(&product(&dz, &b, [TOKENS, OUT, RANK]), [TOKENS, RANK]), &x, [RANK, TOKENS, IN]);
            let dz: Vec<f64> = dz.iter().map(|x| x / s).collect();
            let d_x = product(&dz, &sum, [TOKENS, OUT, IN]);
            let found = layer.parameters();
            let names: Vec<&str> = found.iter().map(|(name, _)| *name).collect();
            assert_eq!(names, ["lora_a", "lora_b", "lora_magnitude"]);
            for ((part, parameter), expected) in found.into_iter().zip([d_a, d_b, d_magnitude]) {
                let found = values(parameter.grad_remove(&mut grads).unwrap());
                // Sums of up to 120 products of order 10, in f32.
                assert_close(&format!("{name} {part}"), &found, &expected, 5e-4);
            }
            assert_close(name, &values(x_leaf.grad_remove(&mut grads).unwrap()), &d_x, 5e-4);
        }
    }
}

/// Magnitudes of nothing at all: what comes out is nothing, and still they have the gradient that makes them something.
#[test]
fn magnitudes_of_zero_are_trained() {
    for (name, device) in devices() {
        for quantized in [true, false] {
            let mut layer = dora_layer(&device, quantized, 0.0);
            let adapter =
                layer.adapter.take().unwrap().with_dora(&layer.base, Some(matrix(4, [1, OUT], &device) * 0.0));
            layer.set_adapter("layer", adapter).unwrap();
            let (x, dy) = (matrix(5, [TOKENS, IN], &device), matrix(6, [TOKENS, OUT], &device));
            let (sum, norms) = adapted(&layer);
            let z = product(&values(x.clone()), &transposed(&sum, [OUT, IN]), [TOKENS, IN, OUT]);
            layer.track();
            let y = layer.forward_in(x, Pass::training(0));
            assert_close(name, &values(y.clone()), &[0.0; TOKENS * OUT], 1e-20);
            let mut grads = (y * dy.clone()).sum().backward();
            let dy = values(dy);
            let expected: Vec<f64> = (0..OUT)
                .map(|i| (0..TOKENS).map(|t| dy[t * OUT + i] * z[t * OUT + i]).sum::<f64>() / norms[i])
                .collect();
            let magnitude = &layer.adapter.as_ref().unwrap().dora.as_ref().unwrap().magnitude;
            // Sums of some hundred products of order 1 in f32.
            assert_close(name, &values(magnitude.grad_remove(&mut grads).unwrap()), &expected, 1e-4);
        }
    }
}

/// PEFT's: y = x Wᵀ + (m/n - 1) · x' Wᵀ + m/n · s x' Aᵀ Bᵀ with x' = dropout(x).
#[test]
fn dora_drops_the_input_of_scaled_products_only() {
    for (name, device) in devices() {
        for quantized in [true, false] {
            let layer = dora_layer(&device, quantized, 0.4);
            let x = matrix(5, [TOKENS, IN], &device);
            let pass = Pass::training(9);
            let kept = values(seeded_dropout(x.clone(), pass.seed_for(3).unwrap(), 0.4));
            let (sum, norms) = adapted(&layer);
            let weight = transposed(&values(layer.base.to_dense(FloatDType::F32)), [OUT, IN]);
            let magnitude = values(layer.adapter.as_ref().unwrap().dora.as_ref().unwrap().magnitude.val());
            let shape = [TOKENS, IN, OUT];
            let whole = product(&values(x.clone()), &weight, shape);
            let dropped = product(&kept, &weight, shape);
            let z = product(&kept, &transposed(&sum, [OUT, IN]), shape);
            let expected: Vec<f64> =
                (0..TOKENS * OUT).map(|i| whole[i] - dropped[i] + magnitude[i % OUT] / norms[i % OUT] * z[i]).collect();
            assert_close(name, &values(layer.forward_in(x, pass.untracked())), &expected, 5e-5);
        }
    }
}

#[test]
fn the_bias_of_lora_b_is_scaled_and_trained() {
    for (name, device) in devices() {
        for quantized in [true, false] {
            let mut layer = layer(&device, quantized, 0.0);
            layer.bias = Some(frozen(Tensor::from_data(TensorData::new(noise(8, OUT), [OUT]), (&device, DType::F32))));
            let x = matrix(5, [TOKENS, IN], &device);
            let without = values(layer.forward_in(x.clone(), Pass::INFERENCE));
            let mut adapter = layer.adapter.take().unwrap().with_bias();
            let bias = matrix(9, [1, OUT], &device);
            adapter.bias = Some(trainable(bias.clone()));
            layer.set_adapter("layer", adapter).unwrap();
            let bias = values(bias);
            let expected: Vec<f64> =
                without.iter().enumerate().map(|(i, y)| y + f64::from(SCALING) * bias[i % OUT]).collect();
            assert_close(name, &values(layer.forward_in(x.clone(), Pass::INFERENCE)), &expected, 1e-5);
            layer.track();
            let dy = matrix(6, [TOKENS, OUT], &device);
            let mut grads = (layer.forward_in(x, Pass::training(0)) * dy.clone()).sum().backward();
            let found = layer.adapter.as_ref().unwrap().bias.as_ref().unwrap().grad_remove(&mut grads).unwrap();
            let dy = values(dy);
            let expected: Vec<f64> =
                (0..OUT).map(|i| f64::from(SCALING) * (0..TOKENS).map(|t| dy[t * OUT + i]).sum::<f64>()).collect();
            assert_close(name, &values(found), &expected, 1e-5);
        }
    }
}

#[test]
fn a_layer_trained_in_full_has_gradients_of_weight_and_bias() {
    for (name, device) in devices() {
        let mut layer = layer(&device, true, 0.0);
        layer.adapter = None;
        layer.bias = Some(frozen(Tensor::from_data(TensorData::new(noise(8, OUT), [OUT]), (&device, DType::F32))));
        let x = matrix(5, [TOKENS, IN], &device);
        let before = values(layer.forward_in(x.clone(), Pass::INFERENCE));
        layer.train_whole();
        assert_close(name, &values(layer.forward_in(x.clone(), Pass::INFERENCE)), &before, 1e-5);
        layer.track();
        let dy = matrix(6, [TOKENS, OUT], &device);
        let mut grads = (layer.forward_in(x.clone(), Pass::training(0)) * dy.clone()).sum().backward();
        let expected = product(&transposed(&values(dy), [TOKENS, OUT]), &values(x), [OUT, TOKENS, IN]);
        let parts = layer.parameters();
        assert_close(name, &values(parts[0].1.grad_remove(&mut grads).unwrap()), &expected, 1e-5);
        assert_eq!((parts[1].0, parts[1].1.grad_remove(&mut grads).unwrap().dims()), ("bias", [1, OUT]));
        let mut merged = layer.clone();
        merged.merge(FloatDType::F32);
        assert!(merged.parameters().is_empty());
        layer.unload();
        assert!(layer.whole.is_none() && matches!(layer.base, FrozenLinear::Quantized(_)));
    }
}

#[test]
fn embeddings_look_up_adapted_rows_and_train() {
    const VOCABULARY: usize = 11;
    const WIDTH: usize = 6;
    for (name, device) in devices() {
        for dora in [false, true] {
            let table = matrix(1, [VOCABULARY, WIDTH], &device);
            let mut lora = EmbeddingAdapter::new(&table, RANK, SCALING, 7);
            assert!(values(lora.lora_a.val()).iter().all(|x| *x == 0.0));
            lora.lora_a = trainable(matrix(2, [RANK, VOCABULARY], &device));
            if dora {
                lora = lora.with_dora(&table, Some(matrix(3, [1, WIDTH], &device).add_scalar(2.0)));
            }
            let ids = [3i32, 10, 3, 0];
            let ids_tensor = Tensor::<1, Int>::from_data(TensorData::new(ids.to_vec(), [4]), (&device, DType::I32));
            let (a, b) = (values(lora.lora_a.val()), values(lora.lora_b.val()));
            let update =
                product(&transposed(&a, [RANK, VOCABULARY]), &transposed(&b, [WIDTH, RANK]), [VOCABULARY, RANK, WIDTH]);
            let mut sum: Vec<f64> =
                values(table.clone()).iter().zip(update).map(|(w, u)| w + f64::from(SCALING) * u).collect();
            if let Some(dora) = &lora.dora {
                let magnitude = values(dora.magnitude.val());
                for feature in 0..WIDTH {
                    let norm = (0..VOCABULARY).map(|t| sum[t * WIDTH + feature].powi(2)).sum::<f64>().sqrt();
                    (0..VOCABULARY).for_each(|t| sum[t * WIDTH + feature] *= magnitude[feature] / norm);
                }
            }
            let expected: Vec<f64> = ids.iter().flat_map(|id| sum[*id as usize * WIDTH..][..WIDTH].to_vec()).collect();
            assert_close(name, &values(lora.forward(&table, ids_tensor.clone(), Pass::INFERENCE)), &expected, 1e-5);
            assert_close(name, &values(lora.merged(&table)), &sum, 1e-5);

            lora.track();
            let loss =
                |lora: &EmbeddingAdapter| lora.forward(&table, ids_tensor.clone(), Pass::training(0)).square().sum();
            let mut grads = loss(&lora).backward();
            let d_a = values(lora.lora_a.grad_remove(&mut grads).unwrap());
            for token in [1, 2, 4, 5, 6, 7, 8, 9] {
                assert!((0..RANK).all(|k| d_a[k * VOCABULARY + token] == 0.0), "{name}: token {token} was not seen");
            }
            if dora {
                continue;
            }
            // The loss is quadratic in each factor, so a central difference is exact but for rounding.
            let direction = matrix(8, [RANK, VOCABULARY], &device);
            let shifted = |step: f32| {
                let mut moved = lora.clone();
                moved.lora_a = trainable(lora.lora_a.val().without_autodiff() + direction.clone().mul_scalar(step));
                track(&mut moved.lora_a);
                values(loss(&moved).reshape([1, 1]))[0]
            };
            let numeric = (shifted(0.1) - shifted(-0.1)) / 0.2;
            let analytic: f64 = d_a.iter().zip(values(direction)).map(|(g, d)| g * d).sum();
            // Losses of order 1e2 in f32 over a step of 0.2.
            assert!((numeric - analytic).abs() < 1e-3 * analytic.abs().max(10.0), "{name}: {numeric} {analytic}");
        }
    }
}

#[test]
fn bf16_activations_keep_f32_magnitudes() {
    for (name, device) in devices() {
        if !device.supports_dtype(FloatDType::BF16) {
            continue;
        }
        let mut layer = dora_layer(&device, true, 0.0);
        let x = matrix(5, [TOKENS, IN], &device);
        let exact = values(layer.forward_in(x.clone(), Pass::INFERENCE));
        layer.track();
        let y = layer.forward_in(x.cast(FloatDType::BF16), Pass::training(0));
        assert_eq!(y.dtype(), DType::BF16);
        let mut grads = y.clone().sum().backward();
        for (part, parameter) in layer.parameters() {
            assert_eq!(parameter.grad_remove(&mut grads).unwrap().dtype(), DType::F32, "{name} {part}");
        }
        // bf16 keeps 8 bits: 2^-9 relative per rounding of values up to about 10, a handful of them.
        assert_close(name, &values(y.cast(FloatDType::F32)), &exact, 0.25);
    }
}

#[test]
fn magnitudes_of_another_layer_are_refused_by_name() {
    let device = Device::flex();
    let mut layer = layer(&device, false, 0.0);
    let other = LoraLinear::frozen(FrozenLinear::dense(matrix(1, [7, IN], &device)), None);
    let adapter = layer.adapter.take().unwrap().with_dora(&other.base, Some(matrix(4, [1, 7], &device)));
    let message = layer.set_adapter("model.layers.0.mlp.up_proj", adapter).unwrap_err().to_string();
    assert!(message.contains("model.layers.0.mlp.up_proj.lora_magnitude_vector") && message.contains("[1, 24]"));
}
