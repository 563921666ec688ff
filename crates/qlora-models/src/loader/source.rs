//! Where a model's tensors come from.

use crate::ModelError;
use adapter_io::{Checkpoint, DenseTensor};
use nf4_quant::Quantized4bit;
use std::borrow::Cow;

/// Tensors by the names that checkpoints have for them.
pub(super) trait Source: Sync {
    /// Bytes of everything that is to be read.
    fn total_bytes(&self) -> u64;

    /// The tensors that there are; all of them are to be read.
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_>;

    /// Whether there is a tensor of this name.
    fn contains(&self, name: &str) -> bool;

    /// The weight of a module, if it is in 4 bits already. Its shape is still to be compared.
    fn quantized(&self, module: &str, shape: [usize; 2]) -> Result<Option<Cow<'_, Quantized4bit>>, ModelError>;

    /// A tensor of this shape.
    fn tensor<'a>(&'a self, name: &'a str, shape: &[usize]) -> Result<DenseTensor<'a>, ModelError>;

    /// A tensor has been read, and need not stay in memory.
    fn release(&self, name: &str);
}

impl Source for Checkpoint {
    fn release(&self, name: &str) {
        self.release(name);
    }

    fn total_bytes(&self) -> u64 {
        self.dense_bytes()
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

    fn tensor<'a>(&'a self, name: &'a str, shape: &[usize]) -> Result<DenseTensor<'a>, ModelError> {
        let tensor = self.dense(name)?;
        tensor.expect_shape(shape)?;
        Ok(tensor)
    }
}
