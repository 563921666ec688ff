//! The floats that kernels read and write.

use cubecl::ir::{ElemType, FloatKind};

use crate::TensorElement;

/// A float format of a buffer on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FloatFormat {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16, the upper half of an f32.
    BF16,
}

impl FloatFormat {
    /// Every format.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::BF16];

    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// Whether it has 16 bits, which is what tensor cores multiply.
    pub fn is_half(self) -> bool {
        self != Self::F32
    }

    /// CubeCL's name of it.
    pub fn elem_type(self) -> ElemType {
        ElemType::Float(match self {
            Self::F32 => FloatKind::F32,
            Self::F16 => FloatKind::F16,
            Self::BF16 => FloatKind::BF16,
        })
    }

    /// Its name in a tensor map.
    pub fn tensor_element(self) -> TensorElement {
        match self {
            Self::F32 => TensorElement::F32,
            Self::F16 => TensorElement::F16,
            Self::BF16 => TensorElement::BF16,
        }
    }

    /// The macro `F16` of [`prelude!`](crate::prelude!).
    pub fn define(self) -> (&'static str, i64) {
        ("F16", i64::from(self == Self::F16))
    }
}
