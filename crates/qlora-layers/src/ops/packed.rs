//! A 4-bit weight as one argument of the operations.

use burn::backend::tensor::IntTensor;
use burn::backend::{Backend, ExtensionType};
use nf4_quant::{FloatFormat, QuantType};

/// What the packed buffers of a 4-bit weight of shape `[out_features, in_features]` mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout4bit {
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// The codebook.
    pub quant_type: QuantType,
    /// Elements that share one absmax; blocks run over the row-major weight and may cross rows.
    pub blocksize: usize,
    /// The quantization state's dtype, that of the weight before it was quantized.
    pub dtype: FloatFormat,
    /// Double quantization: absmax values that share one nested absmax.
    pub nested_blocksize: Option<usize>,
}

impl Layout4bit {
    /// Elements of the weight.
    pub fn num_elements(&self) -> usize {
        self.out_features * self.in_features
    }

    /// Blocks of the weight; the last one may be short.
    pub fn num_blocks(&self) -> usize {
        self.num_elements().div_ceil(self.blocksize)
    }

    /// The same with nested blocks of which the weight has a whole number, so that those of weights that lie behind one another do
    /// not run into the next: each nested absmax is there for several smaller blocks then. As it is where they are whole, or where
    /// their size is no power of two.
    pub(crate) fn with_whole_nested_blocks(self) -> Self {
        let whole = |nested: usize| match nested.is_power_of_two() {
            true => nested.min(1 << self.num_blocks().trailing_zeros().min(usize::BITS - 1)),
            false => nested,
        };
        Self { nested_blocksize: self.nested_blocksize.map(whole), ..self }
    }
}

/// A 4-bit weight on a backend.
///
/// All tensors are integers, so that no part of a weight can enter the autodiff graph.
#[derive(Clone, Debug, ExtensionType)]
pub struct Packed4bit<B: Backend> {
    /// u32 `[ceil(out_features * in_features / 8)]`: the packed byte stream, little-endian.
    pub codes: IntTensor<B>,
    /// u32 `[blocks]`, the bits of f32 values; double-quantized, 8-bit codes four to a word.
    pub absmax: IntTensor<B>,
    /// Double-quantized, u32 `[ceil(blocks / nested_blocksize) + 1]`: the bits of the f32 nested absmax values, and last those
    /// of the offset in `absmax = map[code] * nested_absmax[block / nested_blocksize] + offset`. One unused element
    /// otherwise.
    pub nested_absmax: IntTensor<B>,
    /// What the buffers mean.
    pub layout: Layout4bit,
}
