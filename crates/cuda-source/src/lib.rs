//! Hand-written CUDA C++ kernels, launched on CubeCL's own stream.
//!
//! CubeCL hands a kernel's own text to NVRTC, caches what comes out in memory and on disk, and launches
//! it in order with everything else on its stream, on buffers of its own pools. This crate is the thin
//! layer over that: a [`Source`] (text, entry point, threads), [`Arguments`], [`launch()`], what a kernel
//! author asks of the card ([`device()`]), and what all kernels share: a [`prelude!`], [`FloatFormat`], [`Choices`] of
//! one kernel among several. No cuBLAS and no second stream, because CubeCL's stream is not
//! exposed: a foreign call would mean waiting for the device before and after it.
//!
//! # What a kernel looks like
//!
//! ```cuda
//! struct Params { unsigned long long n; float factor; unsigned pad; };  // as the Rust struct, repr(C)
//!
//! extern "C" __global__ void __launch_bounds__(256) scale(
//!     const float* x, float* y,                    // buffers and tensor maps, in the order of Arguments
//!     const __grid_constant__ Params p)            // the parameters by value, always last
//! ```
//!
//! - One parameter for each buffer (a pointer; the handle's offset is already in it) and each tensor map
//!   (`const __grid_constant__`, 128 bytes, aligned to 64), in the order in which they were added, then the
//!   parameter struct if there is one. [`launch()`] counts the parameters in the text and refuses another
//!   number of arguments: the driver would read past the end of the list.
//! - The parameter struct has the same size on both sides: pad it to a multiple of 8 bytes by name, so that
//!   neither compiler does.
//! - The text can't use `<cuda.h>`, the C++ standard library or other host headers: NVRTC has none.
//!   `<cuda_bf16.h>` and `<cuda_fp16.h>` work and cost compile time at first use; a kernel that needs
//!   little of them is better off with PTX.
//! - NVRTC compiles for the card itself, from compute capability 9.0 on with its special features
//!   (`sm_90a`: wgmma, TMA), without `--use_fast_math`.
//! - A cube has the threads of [`Source`], in x only. No clusters but those that the text declares with
//!   `__cluster_dims__`.
//!
//! # Shared memory
//!
//! CubeCL launches such kernels without dynamic shared memory, so everything is static, and 48 KB is the
//! limit that every toolchain accepts. NVRTC makes PTX; the driver's own assembler makes machine code of
//! it. CUDA 13.0's assembler accepts more than 48 KB of static shared memory for `sm_90a`, CUDA 12.8's
//! refuses it ("uses too much shared data"). A kernel that wants more asks
//! [`CudaDevice::takes_large_static_memory`] and has a smaller variant.
//!
//! # Errors
//!
//! [`launch()`] returns what can be known without the device. A launch only queues, so everything else shows
//! up later: text that doesn't compile, a tensor map that the driver refuses or a failed launch leave the
//! error on the buffers that the kernel was to write, and reading one of them (or `Client::check`)
//! returns it with the compiler's log. Buffers that were passed with [`Arguments::read`] stay good, which
//! is why reads and writes are declared. An illegal address poisons the CUDA context for good, as always.

mod arguments;
mod assemble;
mod barriers;
mod choice;
mod counters;
mod device;
mod dropout;
mod error;
mod format;
mod launch;
mod prelude;
mod signature;
mod source;
mod tensor_cores;
mod tensor_map;

pub use arguments::Arguments;
pub use assemble::{Resources, assemble};
pub use choice::{Choices, choose};
pub use counters::counters;
pub use device::{CudaDevice, LeftMultiprocessors, compute_capability, device, leave_multiprocessors};
pub use error::LaunchError;
pub use format::FloatFormat;
pub use launch::launch;
pub use source::Source;
pub use tensor_map::{Swizzle, TensorElement, TensorMap, TensorMap2d};
