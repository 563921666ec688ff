//! 4-bit block quantization of weights: NF4 and FP4 with double quantization, bit-compatible with
//! bitsandbytes 0.50.2.
//!
//! A weight is flattened row-major and cut into blocks of `blocksize` elements, which may cross rows.
//! Of each block its largest magnitude, `absmax`, is kept as f32, and every element as the 4-bit index
//! of a fixed 16-entry codebook; two codes share a byte, the first (even) element in the high nibble.
//! Double quantization then quantizes the absmax themselves to 8 bits (see [`NestedAbsmax`]).
//!
//! Three implementations of the same arithmetic live here:
//!
//! - [`mod@reference`]: the scalar oracle, short enough to be checked by reading;
//! - [`Quantized4bit`], [`quantize_blocks`], [`dequantize_blocks`]: the host codec, parallel and
//!   vectorised, used to load checkpoints and as the CPU path;
//! - `kernels` (feature `kernels`): CubeCL kernels for every runtime.
//!
//! All three give the same bits. For bf16 weights they are those of bitsandbytes on CUDA: even its
//! approximate reciprocal of absmax is followed. For f32 and f16 weights that reciprocal may differ in
//! the last bit, and move an element that lies on a threshold by one code.
//!
//! The crate does no file I/O and knows no tensor library.
//!
//! ```
//! use nf4_quant::{QuantConfig, Quantized4bit};
//!
//! let weight: Vec<f32> = (0..64 * 48).map(|i| (i as f32 * 0.37).sin() * 0.02).collect();
//! let quantized = Quantized4bit::quantize(&weight, &[64, 48], &QuantConfig::default())?;
//! assert_eq!(quantized.codes.len(), 64 * 48 / 2);
//!
//! let restored: Vec<f32> = quantized.dequantize()?;
//! // Half of the codebook's widest gap, 0.152, times absmax (at most 0.02).
//! assert!(weight.iter().zip(&restored).all(|(a, b)| (a - b).abs() < 0.02 * 0.16));
//! # Ok::<(), nf4_quant::QuantError>(())
//! ```

mod blocks;
mod codebook;
mod codec;
mod element;
mod error;
pub mod host_product;
#[cfg(feature = "kernels")]
pub mod kernels;
#[cfg(feature = "kernels")]
pub mod matmul;
mod metadata;
mod nested;
mod python;
mod quant_state;
mod reciprocal;
pub mod reference;

pub use codebook::{QuantType, signed_dynamic_map};
pub use codec::{block_absmax, dequantize_blocks, quantize_blocks};
pub use element::{Element, FloatFormat};
pub use error::QuantError;
pub use metadata::{Metadata, NestedMetadata};
pub use nested::NestedAbsmax;
pub use python::python_float;
pub use quant_state::{Absmax, QuantConfig, QuantState, Quantized4bit};
