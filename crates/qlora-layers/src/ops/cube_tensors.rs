//! Burn's tensors on a CubeCL runtime as the kernels below take them.

use super::{Layout4bit, Packed4bit};
use burn::backend::Dispatch;
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::client::Client;
use cubecl::{CubeCount, CubeDim};
use host_copies::int_from_cube;
use nf4_quant::FloatFormat;
use nf4_quant::kernels::{DeviceAbsmax, DeviceWeight, scale_rows};

/// Burn's name of a float format.
pub(super) fn dtype_of(format: FloatFormat) -> DType {
    match format {
        FloatFormat::F32 => DType::F32,
        FloatFormat::F16 => DType::F16,
        FloatFormat::BF16 => DType::BF16,
    }
}

/// A contiguous tensor whose values are not written yet.
pub(super) fn empty(client: &Client, device: &CubeDevice, shape: Shape, dtype: DType) -> CubeTensor {
    let handle = client.empty(shape.num_elements() * dtype.size());
    CubeTensor::new_contiguous(client.clone(), device.clone(), shape, handle, dtype)
}

/// One thread per element. Two grid dimensions: one alone holds at most 65,535 cubes on WebGPU.
pub(super) fn grid(elements: usize) -> (CubeCount, CubeDim) {
    const CUBE_DIM: u32 = 256;
    let cubes = (elements as u32).div_ceil(CUBE_DIM).max(1);
    let rows = cubes.div_ceil(65_535);
    (CubeCount::Static(cubes.div_ceil(rows), rows, 1), CubeDim::new_1d(CUBE_DIM))
}

/// A weight whose rows no block crosses, each row multiplied by its factor of f32 `[1, out_features]`: the same codes under other
/// absmax.
pub(crate) fn scaled_rows(weight: &Packed4bit<CubeBackend>, factors: &CubeTensor) -> Packed4bit<Dispatch> {
    let Packed4bit { codes, nested_absmax, layout, .. } = weight;
    let factors = into_contiguous(factors.clone());
    let scaled = scale_rows(&codes.client, &device_weight(weight), &factors.handle, layout.in_features)
        .unwrap_or_else(|e| panic!("a weight that was valid when it was uploaded can't be scaled: {e}"));
    let absmax = match scaled.absmax {
        DeviceAbsmax::Plain(absmax) | DeviceAbsmax::Nested { absmax, .. } => absmax,
    };
    let blocks = Shape::new([layout.num_blocks()]);
    let absmax = CubeTensor::new_contiguous(codes.client.clone(), codes.device.clone(), blocks, absmax, DType::U32);
    let tensor = |tensor: CubeTensor| int_from_cube::<1>(tensor).into_dispatch();
    Packed4bit {
        codes: tensor(codes.clone()),
        absmax: tensor(absmax),
        nested_absmax: tensor(nested_absmax.clone()),
        layout: Layout4bit { nested_blocksize: None, ..*layout },
    }
}

/// A 4-bit weight as `nf4_quant` takes it.
pub(crate) fn device_weight(weight: &Packed4bit<CubeBackend>) -> DeviceWeight {
    let handle = |tensor: &CubeTensor| into_contiguous(tensor.clone()).handle;
    let absmax = handle(&weight.absmax);
    let layout = weight.layout;
    DeviceWeight {
        codes: handle(&weight.codes),
        absmax: match layout.nested_blocksize {
            None => DeviceAbsmax::Plain(absmax),
            Some(blocksize) => DeviceAbsmax::Nested { codes: absmax, absmax: handle(&weight.nested_absmax), blocksize },
        },
        quant_type: layout.quant_type,
        blocksize: layout.blocksize,
        num_elements: layout.num_elements(),
    }
}
