//! Every policy of activation checkpointing gives the same gradients, on every device.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

mod common;

use burn::tensor::{DType, Device, Gradients, Tensor, TensorData};
use common::Pair;
use nf4_quant::{QuantConfig, Quantized4bit};
use qlora_layers::activation_checkpointing::{self, ActivationCheckpointing, ResidualBlock};
use qlora_layers::{FrozenLinear, Linear4bit, LoraLinear, LoraLinearConfig, Pass, trainable};
use test_support::{devices, noise};

const WIDTH: usize = 64;
const BLOCKS: usize = 3;

#[test]
fn every_policy_gives_the_same_gradients() {
    for (name, device) in devices() {
        let mut layers: Vec<LoraLinear> = (0..2 * BLOCKS as u32)
            .map(|index| {
                let values = noise(u64::from(index), WIDTH * WIDTH);
                let weight = Quantized4bit::quantize(&values, &[WIDTH, WIDTH], &QuantConfig::default()).unwrap();
                let base = FrozenLinear::Quantized(Linear4bit::from_quantized(&weight, &device).unwrap());
                let mut layer = LoraLinear::frozen(base, None);
                let mut adapter = LoraLinearConfig::new(4)
                    .with_alpha(4.0)
                    .with_dropout(0.1)
                    .with_index(Some(index))
                    .adapter([WIDTH, WIDTH], &device)
                    .unwrap();
                adapter.lora_b = trainable(Tensor::from_data(
                    TensorData::new(noise(100 + u64::from(index), 4 * WIDTH), [WIDTH, 4]),
                    (&device, DType::F32),
                ));
                layer.set_adapter("layer", adapter).unwrap();
                layer
            })
            .collect();
        layers.iter_mut().for_each(|layer| layer.adapter.as_mut().unwrap().track());
        // So many that the second branch takes them in two parts.
        for tokens in [3, 9000] {
            for factor in [None, Some(0.7)] {
                same_gradients(&format!("{name}, {tokens} tokens, {factor:?}"), (&layers, factor), tokens, &device);
            }
        }
    }
}

fn same_gradients(name: &str, (layers, factor): (&[LoraLinear], Option<f32>), tokens: usize, device: &Device) {
    let blocks: Vec<Pair> = layers.chunks(2).map(|pair| Pair(&pair[0], &pair[1], factor)).collect();
    let matrix = |seed| {
        let values = noise(seed, tokens * WIDTH).into_iter().map(|v| v * 0.1).collect::<Vec<_>>();
        Tensor::<2>::from_data(TensorData::new(values, [tokens, WIDTH]), (device, DType::F32))
    };
    let (x, grad, pass) = (matrix(200), matrix(201), Pass::training(1));
    let factors = |index: usize| {
        let adapter = layers[index].adapter.as_ref().unwrap();
        [adapter.lora_a.val(), adapter.lora_b.val()]
    };

    let input = x.clone().autodiff().require_grad();
    let y = blocks.iter().fold(input.clone(), |x, block| block.forward(x, pass));
    let mut recorded = qlora_layers::ops::backward_from(y.clone(), grad.clone());
    let mut take = |tensor: Tensor<2>| tensor.grad_remove(&mut recorded).unwrap().into_data();
    let expected: Vec<TensorData> = (0..2 * BLOCKS).flat_map(factors).map(&mut take).collect();
    let (expected_below, y) = (take(input), y.without_autodiff().into_data());

    use ActivationCheckpointing::{Full, None as Everything, Offload, OffloadSelective, Selective};
    let mixed = [
        vec![Full, Selective, Everything],
        vec![OffloadSelective, Everything, Offload],
        vec![Everything, OffloadSelective, Full],
        vec![Offload, OffloadSelective, Everything],
    ];
    for policy in ActivationCheckpointing::ALL.map(|policy| vec![policy]).into_iter().chain(mixed) {
        let (output, kept) = activation_checkpointing::forward(&blocks, x.clone(), pass, &policy, true).unwrap();
        assert_eq!(output.into_data(), y, "{name}, {policy:?}");
        let mut found: Vec<Option<Tensor<2>>> = vec![None; 4 * BLOCKS];
        let collect = |index: usize, _: &Pair, grads: &mut Gradients| {
            let parameters = (2 * index..2 * index + 2).flat_map(factors);
            for (slot, factor) in found[4 * index..].iter_mut().zip(parameters) {
                if let Some(grad) = factor.grad_remove(grads) {
                    *slot = Some(match slot.take() {
                        Some(sum) => sum + grad,
                        None => grad,
                    });
                }
            }
        };
        let below = activation_checkpointing::backward(&blocks, kept, grad.clone(), pass, true, collect).unwrap();
        assert_eq!(
            found.into_iter().flatten().map(Tensor::into_data).collect::<Vec<_>>(),
            expected,
            "{name}, {policy:?}"
        );
        assert_eq!(below.unwrap().into_data(), expected_below, "{name}, {policy:?}");
    }
}
