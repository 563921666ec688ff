//! A quantized weight on a device.

use cubecl::client::Client;
use cubecl::server::Handle;

use super::{MAX_ELEMENTS, check_size, read};
use crate::blocks::{check_blocksize, check_shape};
use crate::{Absmax, FloatFormat, NestedAbsmax, QuantError, QuantState, QuantType, Quantized4bit};

/// Packed codes and statistics of one weight in device buffers.
///
/// The fields are public so that a tensor library can build it from buffers that it owns.
#[derive(Debug, Clone)]
pub struct DeviceWeight {
    /// ceil(num_elements / 8) u32 words: the packed codes' bytes, little-endian, zero-padded.
    pub codes: Handle,
    /// Statistics of the blocks.
    pub absmax: DeviceAbsmax,
    /// Codebook.
    pub quant_type: QuantType,
    /// Elements per block: a power of two from 32 to 4096.
    pub blocksize: usize,
    /// Elements of the weight.
    pub num_elements: usize,
}

/// The largest magnitude of each block, in device buffers.
#[derive(Debug, Clone)]
pub enum DeviceAbsmax {
    /// One f32 per block.
    Plain(Handle),
    /// Double quantization, see [`NestedAbsmax`].
    Nested {
        /// ceil(blocks / 4) u32 words: one byte per block, little-endian, zero-padded.
        codes: Handle,
        /// One f32 per `blocksize` codes, and behind them the offset, the mean of the absmax: it is made on the
        /// device, and kernels find it there.
        absmax: Handle,
        /// Codes per nested block.
        blocksize: usize,
    },
}

impl DeviceAbsmax {
    /// The blocks' buffer and the nested one, or `unused` where there is none.
    pub(crate) fn buffers<'a>(&'a self, unused: &'a Handle) -> (&'a Handle, &'a Handle) {
        match self {
            Self::Plain(absmax) => (absmax, unused),
            Self::Nested { codes, absmax, .. } => (codes, absmax),
        }
    }
}

impl DeviceWeight {
    /// Blocks of the weight; the last one may be short.
    pub fn num_blocks(&self) -> usize {
        self.num_elements.div_ceil(self.blocksize)
    }

    /// Copies a quantized weight to a device.
    ///
    /// # Errors
    ///
    /// As [`Quantized4bit::validate`], and [`QuantError::TooLarge`].
    pub fn from_host(client: &Client, weight: &Quantized4bit) -> Result<Self, QuantError> {
        weight.validate()?;
        let state = &weight.state;
        check_len(state.num_elements())?;
        let absmax = match &state.absmax {
            Absmax::Plain(absmax) => DeviceAbsmax::Plain(client.create_from_slice(bytemuck::cast_slice(absmax))),
            Absmax::Nested(nested) => DeviceAbsmax::Nested {
                codes: words(client, &nested.codes),
                absmax: client
                    .create_from_slice(bytemuck::cast_slice(&[&nested.absmax[..], &[nested.offset]].concat())),
                blocksize: nested.blocksize,
            },
        };
        Ok(Self {
            codes: words(client, &weight.codes),
            absmax,
            quant_type: state.quant_type,
            blocksize: state.blocksize,
            num_elements: state.num_elements(),
        })
    }

    /// Copies the weight back, with the shape and dtype that the device does not know.
    ///
    /// # Errors
    ///
    /// [`QuantError::Shape`]; [`QuantError::BufferSize`]; [`QuantError::Device`] when reading fails,
    /// which is also when an earlier kernel's failure shows.
    pub fn to_host(&self, client: &Client, shape: &[usize], dtype: FloatFormat) -> Result<Quantized4bit, QuantError> {
        self.validate()?;
        check_shape(shape, self.num_elements)?;
        let bytes = |handle: &Handle, len: usize| Ok(read(client, handle.clone())?[..len].to_vec());
        let floats = |handle: &Handle, len: usize| {
            let bytes = read(client, handle.clone())?;
            Ok::<_, QuantError>(bytemuck::pod_collect_to_vec::<u8, f32>(&bytes[..4 * len]))
        };
        let absmax = match &self.absmax {
            DeviceAbsmax::Plain(absmax) => Absmax::Plain(floats(absmax, self.num_blocks())?),
            DeviceAbsmax::Nested { codes, absmax, blocksize } => {
                let nested_blocks = self.num_blocks().div_ceil(*blocksize);
                let mut absmax = floats(absmax, nested_blocks + 1)?;
                let offset = absmax[nested_blocks];
                absmax.truncate(nested_blocks);
                Absmax::Nested(NestedAbsmax {
                    codes: bytes(codes, self.num_blocks())?,
                    absmax,
                    offset,
                    blocksize: *blocksize,
                })
            }
        };
        let codes = bytes(&self.codes, self.num_elements.div_ceil(2))?;
        let (quant_type, blocksize) = (self.quant_type, self.blocksize);
        Quantized4bit::new(codes, QuantState { quant_type, blocksize, dtype, shape: shape.to_vec(), absmax })
    }

    /// Checks that the buffers are as large as the number of elements asks for.
    ///
    /// # Errors
    ///
    /// [`QuantError::Blocksize`], [`QuantError::NestedBlocksize`], [`QuantError::Empty`],
    /// [`QuantError::TooLarge`] or [`QuantError::BufferSize`] naming the buffer.
    pub fn validate(&self) -> Result<(), QuantError> {
        check_blocksize(self.blocksize)?;
        check_len(self.num_elements)?;
        check_size("codes", &self.codes, 4 * self.num_elements.div_ceil(8))?;
        match &self.absmax {
            DeviceAbsmax::Plain(absmax) => check_size("absmax", absmax, 4 * self.num_blocks()),
            DeviceAbsmax::Nested { blocksize: 0, .. } => Err(QuantError::NestedBlocksize),
            DeviceAbsmax::Nested { codes, absmax, blocksize, .. } => {
                check_size("absmax", codes, 4 * self.num_blocks().div_ceil(4))?;
                check_size("nested_absmax", absmax, 4 * (self.num_blocks().div_ceil(*blocksize) + 1))
            }
        }
    }
}

pub(super) fn check_len(num_elements: usize) -> Result<(), QuantError> {
    match num_elements {
        0 => Err(QuantError::Empty(vec![0])),
        1..=MAX_ELEMENTS => Ok(()),
        _ => Err(QuantError::TooLarge { num_elements, limit: MAX_ELEMENTS }),
    }
}

/// A byte stream as whole u32 words.
fn words(client: &Client, bytes: &[u8]) -> Handle {
    if bytes.len().is_multiple_of(4) {
        return client.create_from_slice(bytes);
    }
    let mut padded = bytes.to_vec();
    padded.resize(bytes.len().next_multiple_of(4), 0);
    client.create_from_slice(&padded)
}
