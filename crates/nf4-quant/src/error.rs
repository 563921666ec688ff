//! The crate's error type.

use crate::FloatFormat;

/// What can go wrong when weights are quantized, dequantized or described.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// The blocksize is not a power of two from 32 to 4096.
    #[error("blocksize {0} is not supported: use a power of two from 32 to 4096 (64 is usual)")]
    Blocksize(usize),
    /// A name that is neither `nf4` nor `fp4`.
    #[error("quant_type `{0}` is unknown: use `nf4` or `fp4`")]
    UnknownQuantType(String),
    /// A dtype name other than `float32`, `float16` or `bfloat16`.
    #[error("dtype `{0}` is not supported: weights are float32, float16 or bfloat16")]
    UnknownDtype(String),
    /// The shape does not describe the data.
    #[error("shape {shape:?} has {expected} elements but the data has {actual}")]
    Shape {
        /// The given shape.
        shape: Vec<usize>,
        /// The product of its dimensions.
        expected: usize,
        /// The length of the data.
        actual: usize,
    },
    /// A tensor without elements has no statistics.
    #[error("shape {0:?} has no elements: an empty tensor can't be quantized")]
    Empty(Vec<usize>),
    /// An element is NaN or infinite.
    #[error("element {index} is {value}: only finite weights can be quantized (is the checkpoint damaged?)")]
    NonFinite {
        /// Position in the flattened tensor.
        index: usize,
        /// The element's value.
        value: f32,
    },
    /// A buffer's length does not fit the number of elements.
    #[error("`{name}` has {actual} entries where {expected} are needed")]
    Length {
        /// The buffer: `codes`, `absmax`, `nested_absmax`, `out`.
        name: &'static str,
        /// The length that the shape and blocksize ask for.
        expected: usize,
        /// The length found.
        actual: usize,
    },
    /// A nested blocksize of zero.
    #[error("nested_blocksize is 0: bitsandbytes writes 256")]
    NestedBlocksize,
    /// The quant_state JSON lacks a field or holds a value of another kind.
    #[error("quant_state: field `{field}` {problem}")]
    Metadata {
        /// The JSON field at fault; the whole document when it does not parse.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The device's runtime has no such element type.
    #[error("{runtime} can't hold {format} here: use float32")]
    UnsupportedFormat {
        /// The runtime's name.
        runtime: String,
        /// The format asked for.
        format: FloatFormat,
    },
    /// A range of elements that the weight does not have.
    #[error("elements {start}..{end} lie outside the weight's {num_elements}")]
    Range {
        /// First element.
        start: usize,
        /// One past the last element.
        end: usize,
        /// Elements of the weight.
        num_elements: usize,
    },
    /// Rows of a weight that have no blocks of their own.
    #[error("blocks of {blocksize} cross the rows of {num_elements} elements, {columns} each")]
    Rows {
        /// Elements of a row.
        columns: usize,
        /// Elements of a block.
        blocksize: usize,
        /// Elements of the weight.
        num_elements: usize,
    },
    /// Parts of a weight that don't make it up.
    #[error(
        "{elements} elements can't come after {come} of {num_elements}: parts have a multiple of {multiple} elements, but \
         for the last, and together all"
    )]
    Part {
        /// Elements of the part; 0 where the weight was to be finished.
        elements: usize,
        /// Elements that came before.
        come: usize,
        /// Elements of the weight.
        num_elements: usize,
        /// What parts are multiples of.
        multiple: usize,
    },
    /// More elements than the kernels can index.
    #[error("{num_elements} elements exceed the {limit} that the kernels index: split the tensor")]
    TooLarge {
        /// Elements of the weight.
        num_elements: usize,
        /// The most elements the kernels index.
        limit: usize,
    },
    /// A device buffer is smaller than its content.
    #[error("device buffer `{name}` has {actual} bytes where {expected} are needed")]
    BufferSize {
        /// The buffer: `codes`, `absmax`, `nested_absmax`, `input`, `out`.
        name: &'static str,
        /// The bytes that the number of elements and the blocksize ask for.
        expected: usize,
        /// The bytes found.
        actual: usize,
    },
    /// Operands that the tensor-core product can't take; a caller that asked [`crate::matmul::path`] first
    /// never sees it.
    #[error("matmul: {0}")]
    Matmul(String),
    /// The device failed to run a kernel or to hand back a buffer.
    #[error("{runtime}: {message}")]
    Device {
        /// The runtime's name.
        runtime: String,
        /// The runtime's own words.
        message: String,
    },
}
