//! Readings on every device at hand, and a CUDA device that really runs out of memory.

#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use std::sync::Mutex;

use burn::tensor::{DType, Device, Tensor, TensorData};
use cubecl::bytes::AllocationProperty;
use host_copies::{
    Copies, DeviceError, Reading, as_cube, client_of, free_memory, from_buffer, from_cube, limit_memory, staging,
};
use test_support::devices;

/// One test at a time: another's buffers would be in the way of the one that fills the device.
static DEVICE: Mutex<()> = Mutex::new(());

fn numbers(len: usize, device: &Device) -> Tensor<1> {
    let values: Vec<f32> = (0..len).map(|i| i as f32 - 3.0).collect();
    Tensor::from_data(TensorData::new(values, [len]), (device, DType::F32))
}

#[test]
fn readings_arrive() {
    let _alone = DEVICE.lock().unwrap();
    for (name, device) in devices() {
        let first = Reading::start(numbers(1000, &device) * 2.0).unwrap();
        let second = Reading::start(numbers(1, &device)).unwrap();
        assert_eq!(second.wait().unwrap(), [-3.0], "{name}");
        let expected: Vec<f32> = (0..1000).map(|i| 2.0 * i as f32 - 6.0).collect();
        assert_eq!(first.wait().unwrap(), expected, "{name}");
        let half = Reading::start(numbers(3, &device).cast(DType::F16));
        assert!(matches!(half, Err(DeviceError::Failed(_))), "{name}: numbers are f32");
    }
}

/// Down beside the kernels and up again, and the tensor computes as before.
#[test]
fn a_buffer_that_went_to_the_host_and_back_is_the_same() {
    let _alone = DEVICE.lock().unwrap();
    for (name, device) in devices() {
        let tensor = numbers(5000, &device) + 1.0;
        let Some(mut cube) = as_cube(&tensor) else {
            assert_eq!(name, "flex", "only the CPU's tensors are no CubeCL's");
            continue;
        };
        let copies = Copies::of(&cube.client);
        assert_eq!(copies.run_beside_kernels(), name == "cuda");
        let bytes = copies.download(cube.handle.clone()).wait().unwrap();
        cube.handle = copies.upload(bytes);
        let back: Tensor<1> = from_cube(cube);
        let difference = (back - tensor).abs().sum();
        assert_eq!(difference.into_data().iter::<f32>().next(), Some(0.0), "{name}");
    }
}

/// Buffer after buffer over the same memory of the device, as a loader does it; on CUDA from pinned memory.
#[test]
fn what_was_staged_arrives_in_its_order() {
    let _alone = DEVICE.lock().unwrap();
    for (name, device) in devices() {
        let Some(client) = client_of(&device) else { continue };
        // CubeCL gives pinned memory back after two further writes of more than 10 MiB, and every buffer here is one.
        const LEN: usize = 3 << 20;
        let buffer = client.empty(4 * LEN);
        let tensor: Tensor<1> = from_buffer(&device, buffer.clone(), [LEN], DType::F32).unwrap();
        let mut sums = Vec::new();
        for round in 1..=5 {
            let mut bytes = staging(&client, 4 * LEN);
            assert_eq!(bytes.len(), 4 * LEN);
            assert_eq!(bytes.property() == AllocationProperty::Pinned, name == "cuda");
            bytes.copy_from_slice(bytemuck::cast_slice(&vec![round as f32; LEN]));
            client.write(&buffer, bytes);
            let part = |start| tensor.clone().narrow(0, start, 1000).sum();
            sums.push(part(0) + part(LEN - 1000));
        }
        let sums = Reading::start(Tensor::cat(sums, 0)).unwrap().wait().unwrap();
        assert_eq!(sums, [2000.0, 4000.0, 6000.0, 8000.0, 10000.0], "{name}");
    }
}

/// Takes the device's memory until an allocation fails, and uses the device afterwards.
#[test]
fn an_exhausted_memory_is_told_and_leaves_the_device_usable() {
    let _alone = DEVICE.lock().unwrap();
    let devices = devices();
    let Some((_, device)) = devices.iter().find(|(name, _)| *name == "cuda") else { return };
    let mut held: Vec<Tensor<1>> = Vec::new();
    // 1 GiB each; no card has 4 TiB.
    let error = (0..4096).find_map(|i| {
        let tensor = Tensor::<1>::full([1 << 28], i as f32, (device, DType::F32));
        let reading = Reading::start(tensor.clone().narrow(0, 0, 1)).and_then(Reading::wait);
        held.push(tensor);
        reading.err()
    });
    let error = error.expect("4 TiB were allocated");
    assert!(matches!(error, DeviceError::OutOfMemory(_)), "{error}");
    assert!(held.len() > 1, "the first GiB fitted");
    // Burn's own way of reading tells it, too.
    let failed = held[held.len() - 1].clone().narrow(0, 0, 1).try_into_vec_as::<f32>();
    assert!(matches!(failed.map_err(DeviceError::from), Err(DeviceError::OutOfMemory(_))));
    // What fitted is intact.
    let first = Reading::start(held[0].clone().narrow(0, 0, 2)).and_then(Reading::wait).unwrap();
    assert_eq!(first, [0.0; 2]);

    drop(held);
    device.memory_cleanup();
    let sum = Reading::start((numbers(8, device) * 3.0).sum()).and_then(Reading::wait).unwrap();
    assert_eq!(sum, [12.0]);
    let again = Tensor::<1>::full([1 << 28], 7.0, (device, DType::F32));
    assert_eq!(Reading::start(again.narrow(0, 5, 1)).and_then(Reading::wait).unwrap(), [7.0]);
}

/// A device that is limited to 2 GiB more than is in use has room for 1 GiB, and none for 4.
#[test]
fn a_limited_device_runs_out_where_the_smaller_one_would() {
    let _alone = DEVICE.lock().unwrap();
    let devices = devices();
    let Some((_, device)) = devices.iter().find(|(name, _)| *name == "cuda") else { return };
    device.memory_cleanup();
    let (free, total) = free_memory(device).unwrap();
    let limit = total - free + (2 << 30);
    assert_eq!(limit_memory(device, limit).unwrap(), limit);
    let (left, seen) = free_memory(device).unwrap();
    // The driver hands memory out in pages of 2 MiB.
    assert!(seen == limit && left.abs_diff(2 << 30) <= 4 << 20, "{left} of {seen}");
    let filled = |gib: usize| {
        let tensor = Tensor::<1>::full([gib << 28], 3.0, (device, DType::F32));
        Reading::start(tensor.narrow(0, 7, 1)).and_then(Reading::wait)
    };
    assert_eq!(filled(1).unwrap(), [3.0]);
    device.memory_cleanup();
    assert!(matches!(filled(4), Err(DeviceError::OutOfMemory(_))));
    assert_eq!(filled(1).unwrap(), [3.0], "the device is usable");
    device.memory_cleanup();
    assert_eq!(limit_memory(device, total).unwrap(), total);
    assert_eq!(filled(4).unwrap(), [3.0]);
}
