//! Matrices and arrays that the TMA unit loads and stores in boxes.
//!
//! The rules that the driver has for them (`cuTensorMapEncodeTiled`) are checked here first: its own
//! answer is "invalid value", and would come with the read of an output.

use cubecl::ir::{ElemType, FloatKind, UIntKind};
use cubecl::prelude::{OobFill, TensorMapFormat, TensorMapInterleave, TensorMapPrefetch, TensorMapSwizzle, TiledArgs};
use cubecl::server::{Handle, TensorMapBinding, TensorMapMeta};
use cubecl::zspace::metadata::Metadata;
use cubecl::zspace::{Shape, Strides};

/// A row-major matrix and the box that one TMA instruction moves.
///
/// In the kernel it is a `const __grid_constant__` parameter of 128 bytes, aligned to 64, and coordinates
/// are `{column, row}`. Boxes may hang over the edges: loads fill with zeros, stores leave out.
#[derive(Debug, Clone)]
pub struct TensorMap2d {
    /// The matrix; an offset must be a multiple of 16 bytes.
    pub handle: Handle,
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns of the matrix.
    pub cols: usize,
    /// Elements from one row to the next; a multiple of 16 bytes.
    pub row_stride: usize,
    /// Rows of a box: at most 256.
    pub box_rows: usize,
    /// Columns of a box: at most 256, a multiple of 16 bytes, and no more bytes than the swizzle spans.
    pub box_cols: usize,
    /// How a box lies in shared memory.
    pub swizzle: Swizzle,
    /// Elements of the matrix.
    pub element: TensorElement,
}

/// How a box's rows are permuted in shared memory, in chunks of 16 bytes, so that reading a column of
/// chunks meets no bank twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Swizzle {
    /// Rows as they are, one behind the other.
    #[default]
    None,
    /// Within 32 bytes; the box in shared memory must be aligned to 256.
    B32,
    /// Within 64 bytes; the box in shared memory must be aligned to 512.
    B64,
    /// Within 128 bytes; the box in shared memory must be aligned to 1024. Address bits 4 to 6 are xored
    /// with bits 7 to 9.
    B128,
}

/// Type of a tensor map's elements; it matters for size and for what NaN fill would be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TensorElement {
    /// One byte, of any meaning.
    U8,
    /// 16 bits.
    U16,
    /// 32 bits.
    U32,
    /// Half precision.
    F16,
    /// bfloat16.
    BF16,
    /// Single precision.
    F32,
}

impl TensorElement {
    /// Bytes.
    pub fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::U16 | Self::F16 | Self::BF16 => 2,
            Self::U32 | Self::F32 => 4,
        }
    }

    fn elem_type(self) -> ElemType {
        match self {
            Self::U8 => ElemType::UInt(UIntKind::U8),
            Self::U16 => ElemType::UInt(UIntKind::U16),
            Self::U32 => ElemType::UInt(UIntKind::U32),
            Self::F16 => ElemType::Float(FloatKind::F16),
            Self::BF16 => ElemType::Float(FloatKind::BF16),
            Self::F32 => ElemType::Float(FloatKind::F32),
        }
    }
}

/// An array of up to five dimensions, the last of them contiguous, and the box that one TMA instruction moves.
///
/// As [`TensorMap2d`], with one coordinate per dimension in the kernel, the last dimension's first. Strides need no
/// order: the tokens of a head may be farther apart than heads.
#[derive(Debug, Clone)]
pub struct TensorMap {
    /// The array; an offset must be a multiple of 16 bytes.
    pub handle: Handle,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Elements from one index to the next, for each dimension but the last; multiples of 16 bytes.
    pub strides: Vec<usize>,
    /// Dimensions of a box: at most 256 each. The last is a multiple of 16 bytes, and no more bytes than the swizzle
    /// spans.
    pub tile: Vec<usize>,
    /// How a box lies in shared memory.
    pub swizzle: Swizzle,
    /// Elements of the array.
    pub element: TensorElement,
}

impl From<TensorMap2d> for TensorMap {
    fn from(map: TensorMap2d) -> Self {
        let TensorMap2d { handle, rows, cols, row_stride, box_rows, box_cols, swizzle, element } = map;
        let (shape, strides, tile) = (vec![rows, cols], vec![row_stride], vec![box_rows, box_cols]);
        Self { handle, shape, strides, tile, swizzle, element }
    }
}

impl TensorMap {
    /// CubeCL's form of it, or the rule that it breaks.
    pub(crate) fn binding(self) -> Result<TensorMapBinding, String> {
        let Self { handle, shape, strides, tile, swizzle, element } = self;
        let geometry = Geometry { shape, strides, tile, swizzle, element };
        geometry.check(handle.offset_start.unwrap_or(0), handle.size_in_used())?;
        Ok(TensorMapBinding { binding: handle.binding(), map: geometry.meta() })
    }
}

/// A tensor map without its memory.
#[derive(Clone)]
struct Geometry {
    shape: Vec<usize>,
    strides: Vec<usize>,
    tile: Vec<usize>,
    swizzle: Swizzle,
    element: TensorElement,
}

impl Geometry {
    fn meta(self) -> TensorMapMeta {
        let strides: Vec<usize> = self.strides.iter().copied().chain([1]).collect();
        TensorMapMeta {
            format: TensorMapFormat::Tiled(TiledArgs { tile_size: self.tile.into() }),
            elem_stride: vec![1; self.shape.len()].into(),
            metadata: Metadata::new(Shape::from(self.shape), Strides::from(strides)),
            interleave: TensorMapInterleave::None,
            swizzle: match self.swizzle {
                Swizzle::None => TensorMapSwizzle::None,
                Swizzle::B32 => TensorMapSwizzle::B32,
                Swizzle::B64 => TensorMapSwizzle::B64,
                Swizzle::B128 => TensorMapSwizzle::B128,
            },
            // Neighbouring boxes are read soon after: let L2 fetch whole lines and their neighbours.
            prefetch: TensorMapPrefetch::B256,
            oob_fill: OobFill::Zero,
            elem_ty: self.element.elem_type(),
        }
    }

    /// Names the rule that this breaks on `available` bytes of memory that start `offset` bytes into a buffer.
    fn check(&self, offset: u64, available: u64) -> Result<(), String> {
        let rule = |holds: bool, text: String| if holds { Ok(()) } else { Err(text) };
        let Self { shape, strides, tile, .. } = self;
        let (rank, size) = (shape.len(), self.element.size());
        rule(
            (1..=5).contains(&rank) && strides.len() + 1 == rank && tile.len() == rank,
            format!("{rank} dimensions with {} strides and a box of {}", strides.len(), tile.len()),
        )?;
        let fits = |dim: &usize| (1..=1_u64 << 32).contains(&(*dim as u64));
        let dims = || shape.iter().map(ToString::to_string).collect::<Vec<_>>().join(" x ");
        rule(shape.iter().all(fits), format!("{} elements", dims()))?;
        let cols = shape[rank - 1];
        for stride in strides {
            rule(*stride >= cols, format!("a stride of {stride} elements is less than the {cols} of a row"))?;
            let bytes = (*stride as u64).saturating_mul(size as u64);
            rule(
                bytes.is_multiple_of(16) && bytes < 1 << 40,
                format!("a stride of {bytes} bytes is no multiple of 16"),
            )?;
        }
        for (dimension, value) in tile.iter().enumerate() {
            let text = || format!("a box of {value} in dimension {dimension}, 1 to 256 are possible");
            rule((1..=256).contains(value), text())?;
        }
        let span = match self.swizzle {
            Swizzle::None => usize::MAX,
            Swizzle::B32 => 32,
            Swizzle::B64 => 64,
            Swizzle::B128 => 128,
        };
        let inner = tile[rank - 1] * size;
        rule(inner.is_multiple_of(16), format!("box rows of {inner} bytes are no multiple of 16"))?;
        rule(inner <= span, format!("box rows of {inner} bytes are longer than the swizzle's {span}"))?;
        rule(offset.is_multiple_of(16), format!("an offset of {offset} bytes is no multiple of 16"))?;
        let last: u128 = shape.iter().zip(strides).map(|(dim, stride)| (dim - 1) as u128 * *stride as u128).sum();
        let needed = (last + cols as u128) * size as u128;
        rule(needed <= u128::from(available), format!("the array takes {needed} bytes, the buffer has {available}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Geometry {
        Geometry {
            shape: vec![100, 250],
            strides: vec![256],
            tile: vec![64, 64],
            swizzle: Swizzle::B128,
            element: TensorElement::BF16,
        }
    }
    /// The last row needs no padding.
    const BYTES: u64 = 99 * 512 + 500;

    #[test]
    fn a_matrix_becomes_a_row_major_binding() {
        good().check(16, BYTES).unwrap();
        let map = good().meta();
        assert_eq!(map.metadata.shape(), &Shape::from([100, 250]));
        assert_eq!(map.metadata.strides(), &Strides::from([256, 1]));
        assert_eq!(map.format, TensorMapFormat::Tiled(TiledArgs { tile_size: Shape::from([64, 64]) }));
        assert_eq!(map.swizzle, TensorMapSwizzle::B128);
    }

    #[test]
    fn heads_may_be_nearer_than_tokens() {
        let heads =
            Geometry { shape: vec![2, 4, 10, 64], strides: vec![2560, 64, 256], tile: vec![1, 1, 8, 64], ..good() };
        heads.check(0, 2 * 2560 * 2).unwrap();
        assert_eq!(heads.meta().metadata.strides(), &Strides::from([2560, 64, 256, 1]));
    }

    #[test]
    fn every_rule_of_the_driver_is_checked() {
        for (geometry, offset, available, text) in [
            (Geometry { shape: vec![0, 250], ..good() }, 0, BYTES, "0 x 250"),
            (Geometry { strides: vec![], ..good() }, 0, BYTES, "2 dimensions with 0 strides"),
            (Geometry { strides: vec![249], ..good() }, 0, BYTES, "less than"),
            (Geometry { strides: vec![252], ..good() }, 0, BYTES, "504 bytes is no multiple"),
            (Geometry { tile: vec![257, 64], ..good() }, 0, BYTES, "257 in dimension 0"),
            (Geometry { tile: vec![64, 0], ..good() }, 0, BYTES, "0 in dimension 1"),
            (Geometry { tile: vec![64, 63], ..good() }, 0, BYTES, "126 bytes are no multiple"),
            (Geometry { swizzle: Swizzle::B64, ..good() }, 0, BYTES, "longer than the swizzle's 64"),
            (good(), 8, BYTES, "offset of 8"),
            (good(), 0, BYTES - 1, "the array takes 51188 bytes, the buffer has 51187"),
        ] {
            let error = geometry.check(offset, available).unwrap_err();
            assert!(error.contains(text), "{error}");
        }
    }
}
