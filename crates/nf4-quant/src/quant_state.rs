//! A quantized weight and what describes it, with bitsandbytes' field names.

use crate::blocks::{check_blocksize, check_shape, num_elements};
use crate::codec::{dequantize_blocks, quantize_blocks};
use crate::{Element, FloatFormat, Metadata, NestedAbsmax, NestedMetadata, QuantError, QuantType};

/// How to quantize a weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuantConfig {
    /// Codebook.
    pub quant_type: QuantType,
    /// Elements that share one absmax: a power of two from 32 to 4096.
    pub blocksize: usize,
    /// Whether the absmax are quantized to 8 bits in turn.
    pub double_quant: bool,
}

impl Default for QuantConfig {
    /// QLoRA's choice: NF4 in blocks of 64, with double quantization.
    fn default() -> Self {
        Self { quant_type: QuantType::Nf4, blocksize: 64, double_quant: true }
    }
}

impl QuantConfig {
    /// Checks the blocksize.
    ///
    /// # Errors
    ///
    /// [`QuantError::Blocksize`].
    pub fn validate(&self) -> Result<(), QuantError> {
        check_blocksize(self.blocksize)
    }
}

/// The largest magnitude of each block, as such or quantized to 8 bits.
#[derive(Debug, Clone, PartialEq)]
pub enum Absmax {
    /// One f32 per block.
    Plain(Vec<f32>),
    /// Double quantization.
    Nested(NestedAbsmax),
}

/// Everything but the codes that is needed to dequantize a weight (bitsandbytes' `QuantState`).
#[derive(Debug, Clone, PartialEq)]
pub struct QuantState {
    /// Codebook.
    pub quant_type: QuantType,
    /// Elements per block.
    pub blocksize: usize,
    /// The weight's dtype before quantization.
    pub dtype: FloatFormat,
    /// The weight's shape.
    pub shape: Vec<usize>,
    /// Statistics of the blocks.
    pub absmax: Absmax,
}

impl QuantState {
    /// Elements of the weight.
    pub fn num_elements(&self) -> usize {
        num_elements(&self.shape)
    }

    /// Blocks of the weight; the last one may be short.
    pub fn num_blocks(&self) -> usize {
        self.num_elements().div_ceil(self.blocksize)
    }

    /// One f32 per block, double quantization undone.
    pub fn absmax_f32(&self) -> Vec<f32> {
        match &self.absmax {
            Absmax::Plain(absmax) => absmax.clone(),
            Absmax::Nested(nested) => nested.dequantize(),
        }
    }

    /// The scalars, as they stand in a checkpoint's JSON.
    pub fn metadata(&self) -> Metadata {
        Metadata {
            quant_type: self.quant_type,
            blocksize: self.blocksize,
            dtype: self.dtype,
            shape: self.shape.clone(),
            nested: match &self.absmax {
                Absmax::Plain(_) => None,
                Absmax::Nested(n) => Some(NestedMetadata { blocksize: n.blocksize, offset: n.offset }),
            },
        }
    }

    /// bitsandbytes' quant_state JSON, byte for byte.
    pub fn metadata_json(&self) -> String {
        self.metadata().to_json()
    }

    /// Checks that blocksize, shape and statistics fit each other.
    ///
    /// # Errors
    ///
    /// [`QuantError::Blocksize`], [`QuantError::Empty`], [`QuantError::NestedBlocksize`] or
    /// [`QuantError::Length`] naming the field.
    pub fn validate(&self) -> Result<(), QuantError> {
        check_blocksize(self.blocksize)?;
        check_shape(&self.shape, self.num_elements())?;
        let actual = match &self.absmax {
            Absmax::Plain(absmax) => absmax.len(),
            Absmax::Nested(nested) => {
                nested.validate()?;
                nested.codes.len()
            }
        };
        match self.num_blocks() {
            expected if expected == actual => Ok(()),
            expected => Err(QuantError::Length { name: "absmax", expected, actual }),
        }
    }
}

/// A weight as 4-bit codes and their state.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized4bit {
    /// Two codes per byte, the first (even) element in the high nibble: ceil(elements / 2) bytes.
    pub codes: Vec<u8>,
    /// What is needed to dequantize them.
    pub state: QuantState,
}

impl Quantized4bit {
    /// Puts codes and state together.
    ///
    /// # Errors
    ///
    /// As [`QuantState::validate`], and [`QuantError::Length`] when `codes` has another length than the
    /// shape asks for.
    pub fn new(codes: Vec<u8>, state: QuantState) -> Result<Self, QuantError> {
        let quantized = Self { codes, state };
        quantized.validate()?;
        Ok(quantized)
    }

    /// Checks that codes and state fit each other.
    ///
    /// # Errors
    ///
    /// As [`Quantized4bit::new`].
    pub fn validate(&self) -> Result<(), QuantError> {
        self.state.validate()?;
        let (expected, actual) = (self.state.num_elements().div_ceil(2), self.codes.len());
        match expected == actual {
            true => Ok(()),
            false => Err(QuantError::Length { name: "codes", expected, actual }),
        }
    }

    /// Quantizes a row-major weight on all processor cores.
    ///
    /// # Shapes
    ///
    /// `weight` holds the product of `shape` elements.
    ///
    /// # Errors
    ///
    /// [`QuantError::Blocksize`]; [`QuantError::Shape`] or [`QuantError::Empty`];
    /// [`QuantError::NonFinite`] naming the first NaN or infinite element.
    pub fn quantize<E: Element>(weight: &[E], shape: &[usize], config: &QuantConfig) -> Result<Self, QuantError> {
        config.validate()?;
        check_shape(shape, weight.len())?;
        let mut codes = vec![0; weight.len().div_ceil(2)];
        let mut absmax = vec![0.0; weight.len().div_ceil(config.blocksize)];
        quantize_blocks(weight, config.quant_type, config.blocksize, &mut codes, &mut absmax)?;
        let absmax = match config.double_quant {
            true => Absmax::Nested(NestedAbsmax::quantize(&absmax)),
            false => Absmax::Plain(absmax),
        };
        let QuantConfig { quant_type, blocksize, .. } = *config;
        Ok(Self { codes, state: QuantState { quant_type, blocksize, dtype: E::FORMAT, shape: shape.to_vec(), absmax } })
    }

    /// The weight in row-major order: codebook\[code\] * absmax in f32, rounded once to `E`.
    ///
    /// `E` need not be the weight's own dtype.
    ///
    /// # Errors
    ///
    /// As [`Quantized4bit::validate`].
    pub fn dequantize<E: Element>(&self) -> Result<Vec<E>, QuantError> {
        self.validate()?;
        let mut out = vec![E::from_f32(0.0); self.state.num_elements()];
        self.dequantize_into(&mut out)?;
        Ok(out)
    }

    /// [`Quantized4bit::dequantize`] into a slice with one entry per element.
    ///
    /// # Errors
    ///
    /// As [`Quantized4bit::validate`], and [`QuantError::Length`] when `out` has another length.
    pub fn dequantize_into<E: Element>(&self, out: &mut [E]) -> Result<(), QuantError> {
        self.validate()?;
        if out.len() != self.state.num_elements() {
            return Err(QuantError::Length { name: "out", expected: self.state.num_elements(), actual: out.len() });
        }
        let QuantState { quant_type, blocksize, absmax, .. } = &self.state;
        match absmax {
            Absmax::Plain(absmax) => dequantize_blocks(&self.codes, absmax, *quant_type, *blocksize, out),
            Absmax::Nested(nested) => {
                dequantize_blocks(&self.codes, &nested.dequantize(), *quant_type, *blocksize, out)
            }
        }
    }
}
