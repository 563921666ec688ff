//! Quantize a weight that comes to the device in parts.
//!
//! A part is encoded behind the copy that brings it, so the device never holds more of the original than its caller's buffer
//! for one part, which the next part may overwrite. The offset of double quantization depends on the whole weight:
//! the host computes it with [`NestedAbsmax::mean`](crate::NestedAbsmax::mean) from the absmax that
//! [`block_absmax`](crate::block_absmax) finds while it copies. So codes and statistics are the host codec's bit for bit,
//! offset included, no absmax travels to the host, and nothing waits for the device.

use cubecl::client::Client;
use cubecl::server::Handle;

use super::quantize::{launch, quantize_nested};
use super::weight::check_len;
use super::{DeviceAbsmax, DeviceWeight, check_size, check_supported};
use crate::{FloatFormat, QuantConfig, QuantError};

/// A weight of which the parts that came so far are quantized, or queued to be.
#[derive(Debug)]
pub struct StreamedQuantize {
    codes: Handle,
    /// f32, one per block.
    absmax: Handle,
    format: FloatFormat,
    config: QuantConfig,
    num_elements: usize,
    /// Elements that came.
    come: usize,
}

impl StreamedQuantize {
    /// Every part but the last has a multiple of so many elements: whole blocks of every size, and codes and statistics that
    /// begin where every runtime lets a buffer begin.
    pub const PART: usize = 1 << 20;

    /// Makes room for a weight of `num_elements` of `format`. What stays of it gets memory of its own, beside the client's
    /// pools.
    ///
    /// # Errors
    ///
    /// [`QuantError::Blocksize`], [`QuantError::Empty`], [`QuantError::TooLarge`], [`QuantError::UnsupportedFormat`].
    pub fn new(
        client: &Client,
        num_elements: usize,
        format: FloatFormat,
        config: &QuantConfig,
    ) -> Result<Self, QuantError> {
        config.validate()?;
        check_len(num_elements)?;
        check_supported(client, format)?;
        let absmax_bytes = 4 * num_elements.div_ceil(config.blocksize);
        let codes = client.memory_persistent_allocation((), |()| client.empty(4 * num_elements.div_ceil(8)));
        let absmax = match config.double_quant {
            true => client.empty(absmax_bytes),
            false => client.memory_persistent_allocation((), |()| client.empty(absmax_bytes)),
        };
        Ok(Self { codes, absmax, format, config: *config, num_elements, come: 0 })
    }

    /// Queues the quantization of the next `elements`, which are the first ones of `input`; the buffer may be overwritten
    /// by what is queued behind.
    ///
    /// # Errors
    ///
    /// [`QuantError::Part`] for more elements than are left, none, or a number that is neither a multiple of [`Self::PART`] nor what is
    /// left; [`QuantError::BufferSize`] for `input`.
    pub fn push(&mut self, client: &Client, input: &Handle, elements: usize) -> Result<(), QuantError> {
        let Self { format, config, num_elements, come: start, .. } = *self;
        let end = start + elements;
        if end > num_elements || elements == 0 || (end < num_elements && !elements.is_multiple_of(Self::PART)) {
            return Err(self.refuse(elements));
        }
        check_size("input", input, elements * format.size())?;
        let from = |buffer: &Handle, bytes: usize| buffer.clone().offset_start(bytes as u64);
        let (codes, absmax) = (from(&self.codes, start / 2), from(&self.absmax, 4 * (start / config.blocksize)));
        launch(client, input, format, elements, &config, &codes, &absmax);
        self.come = end;
        Ok(())
    }

    /// The weight, for kernels that are queued behind its own. `offset` is the mean of its absmax, which only double
    /// quantization looks at.
    ///
    /// # Errors
    ///
    /// [`QuantError::Part`] when elements have not come.
    pub fn finish(self, client: &Client, offset: f32) -> Result<DeviceWeight, QuantError> {
        if self.come < self.num_elements {
            return Err(self.refuse(0));
        }
        let Self { codes, absmax, config, num_elements, .. } = self;
        let QuantConfig { quant_type, blocksize, double_quant } = config;
        let absmax = match double_quant {
            true => {
                let offset = client.create_from_slice(&offset.to_ne_bytes());
                client.memory_persistent_allocation((), |()| {
                    quantize_nested(client, &absmax, num_elements.div_ceil(blocksize), &offset)
                })
            }
            false => DeviceAbsmax::Plain(absmax),
        };
        Ok(DeviceWeight { codes, absmax, quant_type, blocksize, num_elements })
    }

    fn refuse(&self, elements: usize) -> QuantError {
        let Self { come, num_elements, .. } = *self;
        QuantError::Part { elements, come, num_elements, multiple: Self::PART }
    }
}
