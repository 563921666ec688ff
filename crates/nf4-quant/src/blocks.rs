//! What blocks and shapes are allowed: the checks that the codec, the quantization state and the kernels share.

use crate::QuantError;

/// Fails unless the blocksize is one that bitsandbytes has: a power of two from 32 to 4096.
pub(crate) fn check_blocksize(blocksize: usize) -> Result<(), QuantError> {
    match blocksize.is_power_of_two() && (32..=4096).contains(&blocksize) {
        true => Ok(()),
        false => Err(QuantError::Blocksize(blocksize)),
    }
}

/// Fails unless a shape describes `actual` elements, at least one.
pub(crate) fn check_shape(shape: &[usize], actual: usize) -> Result<(), QuantError> {
    let expected = num_elements(shape);
    if expected != actual {
        return Err(QuantError::Shape { shape: shape.to_vec(), expected, actual });
    }
    match expected {
        0 => Err(QuantError::Empty(shape.to_vec())),
        _ => Ok(()),
    }
}

/// The product of the dimensions; a shape too large for memory saturates, and so fits no data.
pub(crate) fn num_elements(shape: &[usize]) -> usize {
    if shape.contains(&0) { 0 } else { shape.iter().fold(1, |n, d| n.saturating_mul(*d)) }
}
