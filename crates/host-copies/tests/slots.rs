//! Slots on every device at hand: what is read is what was filled in last, however far copies and kernels run ahead.

#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use burn::tensor::{Device, Int, Tensor};
use host_copies::{HostBuffer, Slot};
use test_support::devices;

fn words(tensor: Tensor<1, Int>) -> Vec<u32> {
    tensor.try_into_vec_as().unwrap()
}

fn buffer(device: &Device, fill: impl Fn(usize) -> u32, len: usize) -> HostBuffer {
    let mut buffer = HostBuffer::new(device, len).unwrap();
    buffer.words_mut().unwrap().iter_mut().enumerate().for_each(|(i, word)| *word = fill(i));
    buffer
}

/// Bits that are no number as floats among them.
#[test]
fn a_view_shows_what_was_filled_in_last_to_the_bit() {
    for (name, device) in devices() {
        let patterns = [0x7FC0_0001, 0xFF80_0001, 0x7F80_0001, 0xFFFF_FFFF, 0, 0x8000_0000];
        let first = buffer(&device, |i| patterns[i % patterns.len()], 1024);
        let second = buffer(&device, |i| i as u32, 768);
        let mut slot = Slot::new(&device, 1000).unwrap();
        let view = slot.view(128, 250);
        for _ in 0..3 {
            slot.fill(&first).unwrap();
            slot.arrive();
            assert_eq!(words(view.clone()), first.words()[128..378], "{name}");
            slot.fill(&second).unwrap();
            slot.arrive();
            assert_eq!(words(view.clone()), second.words()[128..378], "{name}");
        }
        let long = buffer(&device, |_| 1, 1153);
        assert!(slot.fill(&long).unwrap_err().to_string().contains("1153 words"), "{name}");
    }
}

/// Two slots in turn, read by kernels of other lengths than the copies: neither may overtake the other.
#[test]
fn copies_and_kernels_do_not_overtake_each_other() {
    for (name, device) in devices() {
        // On CUDA 32 MiB, some 0.6 ms of copying; what is read in between takes less and more than that.
        let len: usize = if name == "cuda" { 8 << 20 } else { 4096 };
        let blocks: Vec<HostBuffer> = (0..6).map(|block| buffer(&device, |i| (i % 7 + block) as u32, len)).collect();
        let mut slots = [Slot::new(&device, len).unwrap(), Slot::new(&device, len).unwrap()];
        let sums: Vec<i64> = blocks.iter().map(|b| b.words().iter().map(|word| i64::from(*word % 5)).sum()).collect();
        slots[0].fill(&blocks[0]).unwrap();
        let mut found = Vec::new();
        for step in 0..60 {
            let (here, next) = (step % 2, (step + 1) % 2);
            slots[here].arrive();
            slots[next].fill(&blocks[(step + 1) % 6]).unwrap();
            let view = slots[here].view(0, len);
            let mut sum = view.clone().remainder_scalar(5).sum();
            for _ in 0..(step % 5) * 4 {
                // The same again, so that the slot is read for a while.
                sum = (sum + view.clone().remainder_scalar(5).sum()).div_scalar(2);
            }
            found.push(sum);
        }
        for (step, sum) in found.into_iter().enumerate() {
            let sum = i64::from(words(sum)[0]);
            assert_eq!(sum, sums[step % 6], "{name}: step {step}");
        }
    }
}

/// As two processes have them, each with its own view of the pages.
#[cfg(target_os = "linux")]
#[test]
fn words_are_shared_until_one_side_changes_its_own() {
    for (name, device) in devices() {
        let mut pages = host_copies::SharedPages::new().unwrap();
        let mut opened = host_copies::SharedPages::open(&pages.address()).unwrap();
        let mut writer = HostBuffer::shared(&device, &mut pages, 300).unwrap();
        let mut reader = HostBuffer::shared(&device, &mut opened, 300).unwrap();
        writer.words_mut().unwrap().iter_mut().zip(1..).for_each(|(word, number)| *word = number);
        assert!(!reader.is_published(), "{name}");
        writer.publish();
        assert!(reader.is_published(), "{name}");
        assert_eq!(reader.words(), (1..=300).collect::<Vec<u32>>(), "{name}");
        // The memory outlives what it was taken from.
        drop((pages, opened));
        reader.write(299, &[7]).unwrap();
        assert_eq!((reader.words()[298], reader.words()[299], writer.words()[299]), (299, 7, 300), "{name}");
        assert!(reader.is_published(), "{name}: what is its own is there");
    }
}
