//! The device to measure, with random operands on it.

use anyhow::{Context, Result, bail};
use cubecl::Device;
use cubecl::client::Client;
use cubecl::device::WgpuDeviceKind;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use cubecl::server::{CubeCountSelection, Handle};
use nf4_quant::{FloatFormat, kernels};

const UNITS: usize = 256;

/// Sets of buffers together exceed the second-level cache by this factor, so that a call finds nothing of
/// its own there: in training, a weight is used again after all the others.
const CACHES: usize = 3;
/// Enough sets for the smallest case.
const MAX_SETS: usize = 256;

/// The device and its format. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Bench {
    pub client: Client,
    /// The same device for Burn.
    pub device: burn::tensor::Device,
    /// Activations and dense weights: bf16 where the device has it.
    pub format: FloatFormat,
    l2_bytes: usize,
}

impl Bench {
    /// `cuda`, `cuda:<index>`, `wgpu`, or `auto` for the first of them that answers.
    pub(crate) fn open(name: &str) -> Result<Self> {
        if name == "auto" {
            return Self::open("cuda").or_else(|_| Self::open("wgpu")).context("no GPU answers");
        }
        if name != "wgpu" && !name.starts_with("cuda") {
            bail!("unknown device `{name}`; known ones: auto, cuda, cuda:<index>, wgpu");
        }
        // Through the library, and before anything else: compiled kernels are kept as in its programs.
        let portable = if cfg!(target_os = "macos") { "metal" } else { "vulkan" };
        let burn = burn_qlora::select_device(if name == "wgpu" { portable } else { name })?;
        let device = match name.strip_prefix("cuda") {
            Some(index) => Device::cuda(index.strip_prefix(':').unwrap_or("0").parse()?)?,
            None => Device::wgpu(WgpuDeviceKind::default())?,
        };
        let client = device.client();
        let bf16 = kernels::supports(&client, FloatFormat::BF16);
        let format = if bf16 { FloatFormat::BF16 } else { FloatFormat::F32 };
        let l2_bytes = cuda_source::device(&client).map_or(4 << 20, |device| device.l2_bytes);
        Ok(Self { client, device: burn, format, l2_bytes })
    }

    /// How many sets of buffers of that many bytes to rotate through.
    pub(crate) fn sets(&self, bytes: usize) -> usize {
        (CACHES * self.l2_bytes).div_ceil(bytes).clamp(1, MAX_SETS)
    }

    /// Random values, close to normal with the given deviation, in [`format`](Self::format).
    pub(crate) fn random(&self, elements: usize, seed: u32, deviation: f32) -> Handle {
        self.random_in(self.format, elements, seed, deviation)
    }

    /// Random values in a format.
    pub(crate) fn random_in(&self, format: FloatFormat, elements: usize, seed: u32, deviation: f32) -> Handle {
        let out = self.client.empty(elements * format.size());
        let elem = ElemType::Float(match format {
            FloatFormat::F32 => FloatKind::F32,
            FloatFormat::F16 => FloatKind::F16,
            FloatFormat::BF16 => FloatKind::BF16,
        });
        // SAFETY: `out` holds `elements`, and the kernel stays within them.
        unsafe {
            random_kernel::launch_unchecked(
                &self.client,
                self.cubes(elements),
                CubeDim::new_1d(UNITS as u32),
                BufferArg::from_raw_parts(out.clone(), elements),
                elements,
                seed,
                deviation,
                elem,
            );
        }
        out
    }

    /// Queues a copy of `bytes`, a multiple of 16.
    pub(crate) fn copy(&self, from: &Handle, to: &Handle, bytes: usize) {
        let vectors = bytes / 16;
        // SAFETY: callers pass buffers of `bytes`, and the kernel stays within them.
        unsafe {
            copy_kernel::launch_unchecked(
                &self.client,
                self.cubes(vectors),
                CubeDim::new_1d(UNITS as u32),
                4,
                BufferArg::from_raw_parts(from.clone(), vectors),
                BufferArg::from_raw_parts(to.clone(), vectors),
                vectors,
            );
        }
    }

    fn cubes(&self, units: usize) -> CubeCount {
        CubeCountSelection::new(&self.client, units.div_ceil(UNITS) as u32).cube_count()
    }
}

/// One value per unit: a hash of its position, and the sum of its bytes as a bell curve.
#[cube(launch_unchecked)]
fn random_kernel<F: Float>(out: &mut [F], elements: usize, seed: u32, deviation: f32, #[define(F)] _format: ElemType) {
    let position = ABSOLUTE_POS;
    if position < elements {
        // Ellis' "lowbias32".
        let mut x = (position as u32) ^ (seed * 0x9e37_79b9u32);
        x = (x ^ (x >> 16)) * 0x7feb_352du32;
        x = (x ^ (x >> 15)) * 0x846c_a68bu32;
        x ^= x >> 16;
        let sum = (x & 255) + ((x >> 8) & 255) + ((x >> 16) & 255) + (x >> 24);
        // Four bytes: mean 510, deviation sqrt(4 (256^2 - 1) / 12).
        let normal = (f32::cast_from(sum) - 510.0f32) * 0.006_765_9f32;
        out[position] = F::cast_from(normal * deviation);
    }
}

#[cube(launch_unchecked)]
fn copy_kernel<N: Size>(from: &[Vector<u32, N>], to: &mut [Vector<u32, N>], vectors: usize) {
    let position = ABSOLUTE_POS;
    if position < vectors {
        to[position] = from[position];
    }
}
