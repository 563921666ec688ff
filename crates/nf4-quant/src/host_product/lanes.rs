//! Vector registers as the loops know them, and the portable ones.

use half::bf16;

use crate::Element;

/// Elements of a group: the shortest block, and 16 bytes of codes.
pub(super) const GROUP: usize = 32;
/// A group's elements, even ones first.
pub(super) type Group = [f32; GROUP];
/// A group's elements in bf16, in their own order.
pub(super) type Halves = [bf16; GROUP];
/// A group's codes.
pub(super) type Codes = [u8; GROUP / 2];

/// A processor's vectors. All methods are inlined into a function that is compiled for the processor.
///
/// # Safety
///
/// Every method may only be called on a processor that has the implementation's instructions.
pub(super) trait Lanes {
    /// The sixteen values of a block.
    type Table: Copy;
    /// A group of weights.
    type Weights: Copy;
    /// Partial sums of one output.
    type Sum: Copy;

    unsafe fn table(values: &[f32; 16]) -> Self::Table;
    /// Every value times `absmax`.
    unsafe fn scaled(table: Self::Table, absmax: f32) -> Self::Table;
    unsafe fn decode(codes: &Codes, table: Self::Table) -> Self::Weights;
    unsafe fn load(weights: &Group) -> Self::Weights;
    /// Weights of bf16, in their order.
    unsafe fn widen(halves: &Halves) -> Self::Weights;
    unsafe fn store(weights: Self::Weights, to: &mut Group);
    unsafe fn zero() -> Self::Sum;
    /// Adds the products of weights and `x` to the sums.
    unsafe fn add(sum: Self::Sum, weights: Self::Weights, x: &Group) -> Self::Sum;
    unsafe fn total(sum: Self::Sum) -> f32;
}

/// Plain Rust, for any processor.
pub(super) struct Portable;

impl Lanes for Portable {
    type Table = [f32; 16];
    type Weights = Group;
    type Sum = [f32; GROUP / 2];

    #[inline(always)]
    unsafe fn table(values: &[f32; 16]) -> Self::Table {
        *values
    }

    #[inline(always)]
    unsafe fn scaled(table: Self::Table, absmax: f32) -> Self::Table {
        let mut table = table;
        table.iter_mut().for_each(|value| *value *= absmax);
        table
    }

    #[inline(always)]
    unsafe fn decode(codes: &Codes, table: Self::Table) -> Self::Weights {
        let mut weights = [0.0; GROUP];
        for (i, code) in codes.iter().enumerate() {
            weights[i] = table[usize::from(code >> 4)];
            weights[i + GROUP / 2] = table[usize::from(code & 15)];
        }
        weights
    }

    #[inline(always)]
    unsafe fn load(weights: &Group) -> Self::Weights {
        *weights
    }

    #[inline(always)]
    unsafe fn widen(halves: &Halves) -> Self::Weights {
        let mut weights = [0.0; GROUP];
        bf16::widen(halves, &mut weights);
        weights
    }

    #[inline(always)]
    unsafe fn store(weights: Self::Weights, to: &mut Group) {
        *to = weights;
    }

    #[inline(always)]
    unsafe fn zero() -> Self::Sum {
        [0.0; GROUP / 2]
    }

    #[inline(always)]
    unsafe fn add(mut sum: Self::Sum, weights: Self::Weights, x: &Group) -> Self::Sum {
        let halves = weights.chunks_exact(GROUP / 2).zip(x.chunks_exact(GROUP / 2));
        for (weights, x) in halves {
            sum.iter_mut().zip(weights.iter().zip(x)).for_each(|(sum, (w, x))| *sum += w * x);
        }
        sum
    }

    #[inline(always)]
    unsafe fn total(mut sum: Self::Sum) -> f32 {
        let mut width = sum.len() / 2;
        while width > 0 {
            for i in 0..width {
                sum[i] += sum[i + width];
            }
            width /= 2;
        }
        sum[0]
    }
}
