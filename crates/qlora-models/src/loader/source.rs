//! Where a model's tensors come from.

use crate::ModelError;
use adapter_io::{Checkpoint, TensorView};
use nf4_quant::Quantized4bit;
use std::borrow::Cow;

/// Tensors by the names that checkpoints have for them.
pub(super) trait Source: Sync {
    /// Bytes of everything.
    fn total_bytes(&self) -> u64;

    /// The tensors that there are; all of them are to be read.
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_>;

    /// Whether there is a tensor of this name.
    fn contains(&self, name: &str) -> bool;

    /// The weight of a module, if it is in 4 bits already. Its shape is still to be compared.
    fn quantized(&self, module: &str, shape: [usize; 2]) -> Result<Option<Cow<'_, Quantized4bit>>, ModelError>;

    /// A tensor of this shape.
    fn tensor<'a>(&'a self, name: &'a str, shape: &[usize]) -> Result<TensorView<'a>, ModelError>;

    /// Copies the bytes of a view of a tensor from `start` on, as many as `to` has.
    fn read(&self, view: &TensorView, start: usize, to: &mut [u8]) -> Result<(), ModelError>;

    /// A tensor has been read, and need not stay in memory.
    fn release(&self, name: &str);
}

impl Source for Checkpoint {
    fn read(&self, view: &TensorView, start: usize, to: &mut [u8]) -> Result<(), ModelError> {
        Ok(self.read(view, start, to)?)
    }

    fn release(&self, name: &str) {
        self.release(name);
    }

    fn total_bytes(&self) -> u64 {
        self.total_bytes()
    }

    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        Box::new(self.names())
    }

    fn contains(&self, name: &str) -> bool {
        self.contains(name)
    }

    fn quantized(&self, module: &str, _: [usize; 2]) -> Result<Option<Cow<'_, Quantized4bit>>, ModelError> {
        Ok(self.quantized(module)?.map(Cow::Owned))
    }

    fn tensor<'a>(&'a self, name: &'a str, shape: &[usize]) -> Result<TensorView<'a>, ModelError> {
        let view = self.tensor(name)?;
        view.expect_shape(shape)?;
        Ok(view)
    }
}
