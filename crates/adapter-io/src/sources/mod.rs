//! Weights that a checkpoint holds in another storage than plain floats, decoded while they are read.
//!
//! A tensor is asked for by its name and comes as dense values in slices ([`Checkpoint::dense`]), whatever the
//! files hold for it. Who reads does not know: names, shapes and types are those of the dense checkpoint, and the
//! tensors that a weight is made of do not appear among the names.
//!
//! | storage | tensors of a weight | `quant_method` |
//! |---|---|---|
//! | FP8 in blocks, rows or as a whole; MXFP8 | `X.weight` F8, `X.weight_scale_inv` or `X.weight_scale` | `fp8`, `mxfp8`, `compressed-tensors` |
//! | 8-bit integers | `X.weight` I8, `X.weight_scale`, `X.weight_zero_point` | `compressed-tensors` |
//! | 4 or 8-bit integers in words | `X.weight_packed` I32, `X.weight_scale`, `X.weight_shape` | `compressed-tensors` |
//! | MXFP4, NVFP4 | `X.weight_packed` U8, `X.weight_scale`, `X.weight_global_scale` | `compressed-tensors` |
//! | MXFP4 of gpt-oss | `X_blocks`, `X_scales` | `mxfp4` |
//! | GPTQ, AWQ | `X.qweight`, `X.qzeros`, `X.scales`, `X.g_idx` | `gptq`, `awq`, `auto-round` |
//!
//! **What decides.** The tensors do. `quantization_config` in `config.json` says what the tensors do not: the size
//! of blocks and groups, and which version's zero points they are (`sources/config.rs`). Where it was left on weights in
//! 16 bits, it says nothing. A module that was not converted has a plain `X.weight`, and that is read.
//!
//! **Numbers.** value = (code - zero) * scale, computed in f32 and rounded once into the type of the scales where that
//! is F16 or BF16, and otherwise into the model's (`dtype` in `config.json`, BF16 without one). Those are the bits that
//! compressed-tensors, transformers' integrations and GPTQModel give; `testdata/make_sources.py` has recorded some. A
//! NaN among codes or scales comes out as one, and is refused by whoever looks for them ([`crate::finite`]).
//!
//! **Speed.** What many elements share becomes a table: the 16 values of a group's 4-bit codes, the 256 of a block in
//! 8 bits. An element is then a load and a store.

mod coded;
pub(crate) mod config;
mod dense;
mod find;
mod grid;
mod input_major;
mod lookup;
mod scales;
mod stacked;
mod turned;

pub(crate) use coded::Coded;
pub use dense::DenseTensor;
pub(crate) use find::{Found, find};

#[cfg(doc)]
use crate::checkpoint::Checkpoint;
