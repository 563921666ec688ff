//! What is to be changed in place, on every device with CubeCL.

#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use burn::tensor::{DType, Tensor, TensorData};
use host_copies::{from_cube, into_cube, owned};
use test_support::devices;

/// Rows of 5 and of 8,000 numbers are none that CUDA lays side by side by itself.
#[test]
fn a_tensor_that_is_held_twice_is_copied_row_by_row_without_gaps() {
    for (name, device) in devices() {
        for shape in [[7, 5], [3, 8000], [64, 16], [1, 1]] {
            let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| i as f32).collect();
            let tensor = Tensor::<2>::from_data(TensorData::new(values.clone(), shape), (&device, DType::F32));
            let Some(held) = into_cube(tensor.clone()) else { continue };
            let copy = owned(held);
            assert!(copy.is_contiguous(), "{name}, {shape:?}: {:?}", copy.meta.strides());
            assert_eq!(copy.meta.shape().dims::<2>(), shape, "{name}");
            let of_buffer = copy.client.read_one(copy.handle.clone()).unwrap();
            assert_eq!(&bytemuck::cast_slice::<u8, f32>(&of_buffer)[..values.len()], values, "{name}, {shape:?}");
            // The copy changes alone.
            let changed = from_cube::<2>(owned(copy)).add_scalar(1.0);
            assert_eq!(changed.try_into_vec_as::<f32>().unwrap()[0], 1.0, "{name}");
            assert_eq!(tensor.try_into_vec_as::<f32>().unwrap(), values, "{name}, {shape:?}");
        }
    }
}

/// Without another holder it is the same buffer.
#[test]
fn a_tensor_that_nothing_else_holds_stays_where_it_is() {
    for (name, device) in devices() {
        let tensor = Tensor::<2>::ones([4, 24], (&device, DType::F32));
        let Some(alone) = into_cube(tensor) else { continue };
        // The device's thread is done with making it.
        alone.client.check([&alone.handle]).unwrap();
        let before = alone.handle.memory.descriptor().location();
        assert_eq!(owned(alone).handle.memory.descriptor().location(), before, "{name}");
    }
}
