//! LoRA layers: gradients, dropout, dtype handling.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use nf4_quant::{QuantConfig, Quantized4bit};
use qlora_layers::ops::{dropout_hash, matmul, noise_unit, seeded_dropout, seeded_noise};
use qlora_layers::{FrozenLinear, Linear4bit, LoraLinear, LoraLinearConfig, Pass, trainable};
use test_support::{devices, noise};

fn matrix(seed: u64, shape: [usize; 2], device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(noise(seed, shape[0] * shape[1]), shape), (device, DType::F32))
}

fn values(tensor: Tensor<2>) -> Vec<f32> {
    tensor.into_data_as::<f32>().iter::<f32>().collect()
}

fn layer(device: &Device, dropout: f32) -> LoraLinear {
    let weight = Quantized4bit::quantize(&noise(1, 24 * 40), &[24, 40], &QuantConfig::default()).unwrap();
    let mut layer =
        LoraLinear::frozen(FrozenLinear::Quantized(Linear4bit::from_quantized(&weight, device).unwrap()), None);
    let mut adapter = LoraLinearConfig::new(4)
        .with_alpha(8.0)
        .with_dropout(dropout)
        .with_seed(11)
        .with_index(Some(3))
        .adapter([24, 40], device)
        .unwrap();
    adapter.lora_b = trainable(matrix(2, [24, 4], device));
    layer.set_adapter("layer", adapter).unwrap();
    layer
}

#[test]
fn a_fresh_adapter_changes_nothing_and_is_reproducible() {
    for (name, device) in devices() {
        let mut layer = layer(&device, 0.0);
        layer.adapter = Some(
            LoraLinearConfig::new(4)
                .with_alpha(8.0)
                .with_seed(11)
                .with_index(Some(3))
                .adapter([24, 40], &device)
                .unwrap(),
        );
        let x = matrix(3, [5, 40], &device);
        assert_eq!(values(layer.forward_in(x.clone(), Pass::INFERENCE)), values(layer.base.forward(x)), "{name}");
        let again = LoraLinearConfig::new(4)
            .with_alpha(8.0)
            .with_seed(11)
            .with_index(Some(3))
            .adapter([24, 40], &device)
            .unwrap();
        let other = LoraLinearConfig::new(4)
            .with_alpha(8.0)
            .with_seed(11)
            .with_index(Some(4))
            .adapter([24, 40], &device)
            .unwrap();
        let lora_a = values(layer.adapter.unwrap().lora_a.val());
        assert_eq!(lora_a, values(again.lora_a.val()));
        assert_ne!(lora_a, values(other.lora_a.val()));
        let bound = 1.0 / 40f32.sqrt();
        assert!(lora_a.iter().all(|v| v.abs() <= bound) && lora_a.iter().any(|v| v.abs() > 0.9 * bound));
    }
}

#[test]
fn factor_gradients_match_the_formulas() {
    for (name, device) in devices() {
        let mut layer = layer(&device, 0.0);
        let (x, dy) = (matrix(3, [5, 40], &device), matrix(4, [5, 24], &device));
        layer.adapter.as_mut().unwrap().track();
        let y = layer.forward_in(x.clone(), Pass::training(0));
        let mut grads = (y * dy.clone()).sum().backward();
        let adapter = layer.adapter.as_ref().unwrap();
        let (a, b) = (adapter.lora_a.val().inner(), adapter.lora_b.val().inner());
        // y = 2 (x aᵀ) bᵀ: db = 2 dyᵀ (x aᵀ), da = 2 (dy b)ᵀ x.
        // Burn's own product would be TF32 on tensor cores.
        let expected_b = matmul(dy.clone().transpose(), matmul(x.clone(), a.transpose())).mul_scalar(2.0);
        let expected_a = matmul(matmul(dy, b).transpose(), x).mul_scalar(2.0);
        for (found, expected) in [
            (adapter.lora_a.grad_remove(&mut grads).unwrap(), expected_a),
            (adapter.lora_b.grad_remove(&mut grads).unwrap(), expected_b),
        ] {
            for (found, expected) in values(found).iter().zip(values(expected)) {
                // Sums of up to 120 products of order 1 in another order: some 1e-5 at most.
                assert!((found - expected).abs() < 1e-4, "{name}: {found} against {expected}");
            }
        }
    }
}

#[test]
fn bf16_activations_keep_f32_factors_and_f32_gradients() {
    for (name, device) in devices() {
        if !device.supports_dtype(FloatDType::BF16) {
            continue;
        }
        let mut layer = layer(&device, 0.0);
        let x = matrix(3, [5, 40], &device);
        let exact = values(layer.forward_in(x.clone(), Pass::INFERENCE));
        layer.adapter.as_mut().unwrap().track();
        let y = layer.forward_in(x.cast(FloatDType::BF16), Pass::training(0));
        assert_eq!(y.dtype(), DType::BF16);
        let mut grads = y.clone().sum().backward();
        let adapter = layer.adapter.as_ref().unwrap();
        assert_eq!(adapter.lora_a.dtype(), DType::F32);
        assert_eq!(adapter.lora_a.grad_remove(&mut grads).unwrap().dtype(), DType::F32);
        for (found, exact) in values(y.inner().cast(FloatDType::F32)).iter().zip(exact) {
            // bf16 keeps 8 bits: 2^-9 relative per rounding of values up to about 10, a handful of them.
            assert!((found - exact).abs() < 0.25, "{name}: {found} against {exact}");
        }
    }
}

#[test]
fn dropout_masks_are_the_oracles_on_every_runtime_and_in_backward() {
    let (seed, p) = (0x1234_5678_9abc_def0, 0.3);
    for (name, device) in devices() {
        let x = matrix(5, [37, 53], &device);
        let expected: Vec<f32> = values(x.clone())
            .iter()
            .enumerate()
            .map(|(i, v)| {
                // 0.3 of 2^16, rounded.
                if dropout_hash(i as u32, seed) < 19_661 { 0.0 } else { v * (65_536.0 / (65_536.0 - 19_661.0)) }
            })
            .collect();
        let kept = expected.iter().filter(|v| **v != 0.0).count() as f64 / expected.len() as f64;
        // Four standard deviations of 1961 draws.
        assert!((kept - 0.7).abs() < 0.042, "{kept}");
        let leaf = x.clone().autodiff().require_grad();
        let y = seeded_dropout(leaf.clone(), seed, p);
        let grad = leaf.grad(&y.clone().sum().backward()).unwrap();
        assert_eq!(values(y.inner()), expected, "{name}");
        let ones = seeded_dropout(Tensor::ones([37, 53], (&device, DType::F32)), seed, p);
        assert_eq!(values(grad), values(ones), "{name}");
    }
}

#[test]
fn noise_is_the_oracles_on_every_runtime_and_uniform() {
    let (seed, width, magnitudes) = (0x1234_5678_9abc_def0, 4096, [0.5, 0.0, 2.0]);
    let expected: Vec<f32> = (0..3 * width).map(|i| magnitudes[i / width] * noise_unit(i as u32, seed)).collect();
    for (name, device) in devices() {
        let of = |out| {
            let magnitudes = Tensor::<1>::from_data(TensorData::new(magnitudes.to_vec(), [3]), (&device, DType::F32));
            seeded_noise(magnitudes, width, seed, out)
        };
        assert_eq!(values(of(FloatDType::F32)), expected, "{name}");
        // WGSL has no bf16.
        if name == "wgpu" {
            continue;
        }
        for (found, exact) in values(of(FloatDType::BF16).cast(FloatDType::F32)).iter().zip(&expected) {
            // Half a unit in the last of bf16's 8 bits.
            assert!((found - exact).abs() <= exact.abs() / 256.0, "{name}: {found} against {exact}");
        }
    }
    // A uniform distribution on (-m, m) has mean 0, variance m^2 / 3 and fourth moment m^4 / 5.
    for (row, magnitude) in [(0, 0.5f64), (2, 2.0)] {
        let row = &expected[row * width..(row + 1) * width];
        let moment =
            |power: i32| row.iter().map(|v| (f64::from(*v) / magnitude).powi(power)).sum::<f64>() / width as f64;
        // Five standard deviations of the mean of 4,096 draws: sqrt(1 / 3), sqrt(1 / 5 - 1 / 9) and sqrt(1 / 9 - 1 / 25), each / 64.
        assert!(moment(1).abs() < 0.046, "{}", moment(1));
        assert!((moment(2) - 1.0 / 3.0).abs() < 0.024, "{}", moment(2));
        assert!((moment(4) - 1.0 / 5.0).abs() < 0.021, "{}", moment(4));
        assert!(row.iter().all(|v| f64::from(v.abs()) < magnitude));
        // Each of sixteen parts of the range has its share, 256, within five deviations of sqrt(256 * 15 / 16).
        for part in 0..16 {
            let in_part = |v: &&f32| ((f64::from(**v) / magnitude + 1.0) * 8.0) as usize == part;
            let count = row.iter().filter(in_part).count();
            assert!(count.abs_diff(256) < 78, "{part}: {count}");
        }
    }
}

#[test]
fn dropout_follows_the_pass_and_the_adapter() {
    let device = Device::flex();
    let layer = layer(&device, 0.5);
    let x = matrix(3, [5, 40], &device);
    let run = |pass: Pass| values(layer.forward_in(x.clone(), pass));
    assert_eq!(run(Pass::training(1).untracked()), run(Pass::training(1).untracked()));
    assert_ne!(run(Pass::training(1).untracked()), run(Pass::training(2).untracked()));
    assert_ne!(run(Pass::training(1).untracked()), run(Pass::INFERENCE));
}

#[test]
fn a_factor_of_another_shape_is_refused_by_name() {
    let device = Device::flex();
    let mut layer = layer(&device, 0.0);
    let wrong = LoraLinearConfig::new(4).with_alpha(4.0).with_index(Some(0)).adapter([24, 41], &device).unwrap();
    let message = layer.set_adapter("model.layers.0.mlp.up_proj", wrong).unwrap_err().to_string();
    assert!(
        message.contains("model.layers.0.mlp.up_proj.lora_A.weight")
            && message.contains("[4, 40]")
            && message.contains("[4, 41]"),
        "{message}"
    );
}

/// The kernels of low-rank products take 256 ranks at a time.
#[test]
fn more_ranks_than_a_kernel_takes_are_all_there() {
    const RANK: usize = 600;
    for (name, device) in devices() {
        let x = matrix(3, [64, 40], &device);
        let run = |dtype: FloatDType| {
            let mut layer = layer(&device, 0.5);
            let mut adapter = LoraLinearConfig::new(RANK)
                .with_alpha(8.0)
                .with_dropout(0.5)
                .with_seed(11)
                .with_index(Some(3))
                .adapter([24, 40], &device)
                .unwrap();
            adapter.lora_b = trainable(matrix(2, [24, RANK], &device));
            layer.set_adapter("layer", adapter).unwrap();
            layer.adapter.as_mut().unwrap().track();
            let y = layer.forward_in(x.clone().cast(dtype), Pass::training(0));
            let mut grads = y.clone().cast(FloatDType::F32).powi_scalar(2).sum().backward();
            let adapter = layer.adapter.as_ref().unwrap();
            let gradients = [&adapter.lora_a, &adapter.lora_b].map(|factor| factor.grad_remove(&mut grads).unwrap());
            assert_eq!([gradients[0].dims(), gradients[1].dims()], [[RANK, 40], [24, RANK]], "{name}");
            let [a, b] = gradients.map(values);
            [values(y.inner().cast(FloatDType::F32)), a, b]
        };
        let exact = run(FloatDType::F32);
        for dtype in test_support::dtypes(name) {
            for (what, (found, exact)) in ["y", "dA", "dB"].iter().zip(run(dtype).iter().zip(&exact)) {
                let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v * v)).sum::<f64>();
                let apart = squares(&mut found.iter().zip(exact).map(|(found, exact)| found - exact));
                let error = (apart / squares(&mut exact.iter().copied())).sqrt();
                // A handful of roundings of 2^-9 each; one part of the ranks is a third or more of all.
                assert!(error < 0.02, "{name} {dtype:?}: {what} is {error} from its f32 value");
            }
        }
    }
}
