//! Streamed weights: the bits that come back, whatever they are, and failures of a source.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use burn::tensor::{Device, Int, Tensor};
use host_copies::{DeviceError, SharedPages, Slot};
use nf4_quant::{Absmax, FloatFormat, QuantConfig, Quantized4bit};
use qlora_layers::Linear4bit;
use qlora_layers::streamed::{BlockSource, BlockStore, HostStore, Order, Sharers, StreamedBlocks};
use test_support::{devices, noise};

/// A weight whose statistics, and some of whose codes, are patterns that are no number as a float of any format.
fn weight(seed: u64, double_quant: bool) -> Quantized4bit {
    let config = QuantConfig { double_quant, ..QuantConfig::default() };
    let mut weight = Quantized4bit::quantize(&noise(seed, 96 * 160), &[96, 160], &config).unwrap();
    weight.state.dtype = FloatFormat::F32;
    let patterns = [0x7FC0_1234, 0xFF80_0001, 0x7F80_0001 + seed as u32, 0xFFFF_FFFF, 0x8000_0000, 1];
    let pattern = |i: usize| f32::from_bits(patterns[i % patterns.len()]);
    match &mut weight.state.absmax {
        Absmax::Plain(absmax) => absmax.iter_mut().enumerate().for_each(|(i, value)| *value = pattern(i)),
        Absmax::Nested(nested) => {
            nested.absmax.iter_mut().enumerate().for_each(|(i, value)| *value = pattern(i));
            nested.offset = pattern(1);
        }
    }
    weight.codes.iter_mut().step_by(3).for_each(|code| *code = 0xFF);
    weight
}

fn words(tensors: [Tensor<1, Int>; 3]) -> Vec<Vec<u32>> {
    tensors.into_iter().map(|tensor| tensor.try_into_vec_as().unwrap()).collect()
}

#[test]
fn every_bit_comes_back() {
    for (name, device) in devices() {
        for double_quant in [true, false] {
            let layers = (0..5).map(|seed| Linear4bit::from_quantized(&weight(seed, double_quant), &device).unwrap());
            let mut layers: Vec<Linear4bit> = layers.collect();
            let expected: Vec<_> = layers.iter().map(|layer| words(layer.tensors())).collect();
            let mut store = Box::new(HostStore::new(&device));
            for layer in &mut layers {
                store.push(layer.tensors().into()).unwrap();
                layer.leave();
            }
            let blocks = store.finish().unwrap();
            for (number, layer) in layers.iter_mut().enumerate() {
                layer.settle(&mut blocks.home(number).views()).unwrap();
            }
            let there = (0..5).map(|block| (block, Order::ThenBackward));
            let back = (0..5).rev().map(|block| (block, Order::Backward));
            for (block, order) in there.chain(back).chain([(3, Order::Forward), (0, Order::Forward)]) {
                blocks.home(block).enter(order).unwrap();
                // Were it in the slot of another, it would have that one's seed in its statistics.
                assert!(
                    words(layers[block].tensors()) == expected[block],
                    "{name}: block {block}, double {double_quant}"
                );
            }
            let mut views = blocks.home(0).views();
            layers[1].settle(&mut views).unwrap();
            assert!(layers[1].settle(&mut views).is_err(), "{name}: one layer has all tensors of its block");
        }
    }
}

/// A source that fails at its second fill.
struct Failing(usize);

impl BlockSource for Failing {
    fn fill(&mut self, _: usize, _: &mut Slot) -> Result<(), DeviceError> {
        self.0 += 1;
        match self.0 {
            2 => Err(DeviceError::Failed("another rank is gone".into())),
            _ => Ok(()),
        }
    }

    fn arrive(&mut self, _: usize, _: &mut Slot) -> Result<(), DeviceError> {
        Ok(())
    }

    fn write(&mut self, _: usize, _: usize, _: &[u32]) -> Result<(), DeviceError> {
        Ok(())
    }

    fn bus_bytes(&self, _: usize) -> u64 {
        7
    }

    fn host_bytes(&self) -> u64 {
        0
    }
}

#[test]
fn a_source_that_failed_is_not_asked_again() {
    let blocks = StreamedBlocks::new(&Device::flex(), &[vec![4], vec![4], vec![300]], Box::new(Failing(0))).unwrap();
    // The first block comes, the second does not.
    let message = blocks.home(0).enter(Order::Forward).unwrap_err().to_string();
    assert!(message.contains("another rank is gone"), "{message}");
    assert_eq!(blocks.home(0).enter(Order::Forward).unwrap_err().to_string(), message);
    let streaming = blocks.streaming();
    assert_eq!((streaming.blocks, streaming.slots, streaming.bytes_in), (3, 2, 7));
    // Room for the largest, in multiples of 128 words.
    assert_eq!(streaming.slot_bytes, 2 * 4 * 384);
}

#[cfg(target_os = "linux")]
#[test]
fn those_that_share_a_copy_read_what_each_of_them_wrote() {
    for (name, device) in devices() {
        let pages = SharedPages::new().unwrap();
        // Each opens what the first one has, as processes do.
        let addresses = [None, Some(pages.address()), Some(pages.address())];
        let layer = |seed| Linear4bit::from_quantized(&weight(seed, true), &device).unwrap();
        let read = |number: usize, pages: SharedPages| {
            let sharers = Sharers { pages, number, count: 3, failure: Box::new(|| None) };
            let mut store = Box::new(HostStore::shared(&device, sharers));
            // What is another's to write is not looked at: it would be seen.
            let seed = |block: usize| if block % 3 == number { block as u64 } else { 99 };
            let mut layers: Vec<_> = (0..5).map(|block| layer(seed(block))).collect();
            for layer in &mut layers {
                store.push(layer.tensors().into()).unwrap();
                layer.leave();
            }
            let blocks = store.finish().unwrap();
            assert!(blocks.streaming().host_bytes > 0);
            for (block, layer) in layers.iter_mut().enumerate() {
                layer.settle(&mut blocks.home(block).views()).unwrap();
                blocks.home(block).enter(Order::Forward).unwrap();
                let expected =
                    words(Linear4bit::from_quantized(&weight(block as u64, true), &device).unwrap().tensors());
                assert!(words(layer.tensors()) == expected, "{name}: {number} reads block {block}");
            }
        };
        let mut first = Some(pages);
        let opened = addresses.map(|address| match address {
            Some(address) => SharedPages::open(&address).unwrap(),
            None => first.take().unwrap(),
        });
        std::thread::scope(|scope| {
            let read = &read;
            for (number, pages) in opened.into_iter().enumerate() {
                scope.spawn(move || read(number, pages));
            }
        });
    }
}

#[cfg(target_os = "linux")]
#[test]
fn who_waits_for_another_that_failed_says_so() {
    let device = Device::flex();
    let failure = Box::new(|| Some("rank 0 on a: it was killed".to_string()));
    let sharers = Sharers { pages: SharedPages::new().unwrap(), number: 1, count: 2, failure };
    let mut store = Box::new(HostStore::shared(&device, sharers));
    store.push(Linear4bit::from_quantized(&weight(0, true), &device).unwrap().tensors().into()).unwrap();
    let error = store.finish().unwrap_err();
    assert_eq!(error, DeviceError::Peer("rank 0 on a: it was killed".into()));
}
