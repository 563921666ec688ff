//! Training over frozen 4-bit layers holds at most one dense weight at a time, and never a gradient of one.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

mod common;

use burn::tensor::{DType, Device, Gradients, Tensor, TensorData};
use common::Pair;
use nf4_quant::{QuantConfig, Quantized4bit};
use qlora_layers::activation_checkpointing::{self, ActivationCheckpointing, ResidualBlock};
use qlora_layers::{FrozenLinear, Linear4bit, LoraLinear, LoraLinearConfig, Pass};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

const WIDTH: usize = 512;
const LAYERS: usize = 6;
/// Bytes of one dense weight in f32; activations of 3 tokens and factors of rank 2 are far smaller.
const DENSE: usize = WIDTH * WIDTH * 4;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// Counts the live allocations that are as large as a dense weight.
struct Counting;

// SAFETY: every call goes to the system allocator with the same arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() >= DENSE {
            PEAK.fetch_max(LIVE.fetch_add(1, SeqCst) + 1, SeqCst);
        }
        // SAFETY: the caller's contract is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        if layout.size() >= DENSE {
            LIVE.fetch_sub(1, SeqCst);
        }
        // SAFETY: `ptr` came from `alloc` above with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn one_dense_transient_at_a_time() {
    let device = Device::flex();
    let mut layers: Vec<LoraLinear> = (0..LAYERS as u32)
        .map(|index| {
            let values: Vec<f32> =
                (0..WIDTH * WIDTH).map(|i| ((i * 31 + index as usize) as f32 * 0.7).sin() * 0.05).collect();
            let weight = Quantized4bit::quantize(&values, &[WIDTH, WIDTH], &QuantConfig::default()).unwrap();
            let mut layer = LoraLinear::frozen(
                FrozenLinear::Quantized(Linear4bit::from_quantized(&weight, &device).unwrap()),
                None,
            );
            layer
                .set_adapter(
                    "layer",
                    LoraLinearConfig::new(2)
                        .with_alpha(2.0)
                        .with_dropout(0.1)
                        .with_index(Some(index))
                        .adapter([WIDTH, WIDTH], &device)
                        .unwrap(),
                )
                .unwrap();
            layer
        })
        .collect();
    layers.iter_mut().for_each(|layer| layer.adapter.as_mut().unwrap().track());
    let x = Tensor::<2>::from_data(TensorData::new(vec![0.1f32; 3 * WIDTH], [3, WIDTH]), (&device, DType::F32));
    let pass = Pass::training(1);

    // The matrix library keeps its packing buffer from the first product on; it is no weight.
    let _ = layers[0].forward_in(x.clone(), pass).square().sum().backward();
    PEAK.store(LIVE.load(SeqCst), SeqCst);
    let before = LIVE.load(SeqCst);
    let blocks: Vec<Pair> = layers.chunks(2).map(|pair| Pair(&pair[0], &pair[1], None)).collect();
    let y = blocks.iter().fold(x.clone(), |x, block| block.forward(x, pass));
    assert_eq!(LIVE.load(SeqCst), before, "the recorded graph keeps no dense weight");
    let grads = y.square().sum().backward();
    let factor = |layer: &LoraLinear| layer.adapter.as_ref().unwrap().lora_b.val();
    let plain: Vec<_> = layers.iter().map(|layer| factor(layer).grad(&grads).unwrap().into_data()).collect();
    assert_eq!(PEAK.load(SeqCst) - before, 1, "dense weights alive at once, forward and backward");

    // The same under activation checkpointing, with the same gradients bit for bit.
    for policy in ActivationCheckpointing::ALL {
        PEAK.store(before, SeqCst);
        let (y, kept) = activation_checkpointing::forward(&blocks, x.clone(), pass, &[policy], false).unwrap();
        let y = y.autodiff().require_grad();
        let mut grads = y.clone().square().sum().backward();
        let grad = y.grad_remove(&mut grads).unwrap();
        let mut checkpointed = vec![None; LAYERS];
        let collect = |index: usize, block: &Pair, grads: &mut Gradients| {
            for (slot, layer) in checkpointed[2 * index..].iter_mut().zip([block.0, block.1]) {
                if let Some(grad) = factor(layer).grad_remove(grads) {
                    assert!(slot.replace(grad.into_data()).is_none(), "a gradient comes once");
                }
            }
        };
        let below = activation_checkpointing::backward(&blocks, kept, grad, pass, false, collect).unwrap();
        assert!(below.is_none());
        assert_eq!(plain, checkpointed.into_iter().flatten().collect::<Vec<_>>(), "{policy:?}");
        assert_eq!(PEAK.load(SeqCst) - before, 1, "dense weights alive at once, {policy:?}");
    }
}
