//! A tensor in host memory: what adapters and weights are made of while they are worked on.

/// An owned tensor of 32-bit floats, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// The shape.
    pub shape: Vec<usize>,
    /// The elements.
    pub data: Vec<f32>,
}

impl HostTensor {
    /// A tensor from its elements, or `None` when their number does not fit the shape.
    pub fn new(shape: &[usize], data: Vec<f32>) -> Option<Self> {
        let elements = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        (elements == data.len()).then(|| Self { shape: shape.to_vec(), data })
    }
}
