//! The CPU implementation: the tokens of one adapter at a time.

use super::{GroupedOperand, GroupedOps};
use crate::ops::{QloraOps, float_dtype};
use burn::backend::Flex;
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::tensor::{FloatDType, Shape, Slice, TensorData};
use burn_flex::FlexTensor;

/// Part of a packed buffer, as a matrix.
fn part(packed: &FlexTensor, start: usize, shape: [usize; 2]) -> FlexTensor {
    let slice = Slice::from(start..start + shape[0] * shape[1]);
    Flex::float_reshape(Flex::float_slice(packed.clone(), &[slice]), Shape::new(shape))
}

fn transposed(x: FlexTensor) -> FlexTensor {
    Flex::float_swap_dims(x, 0, 1)
}

impl GroupedOps for Flex {
    fn grouped_low_rank(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        adapters: GroupedOperand<Self>,
    ) -> FloatTensor<Self> {
        let GroupedOperand { lora_a, lora_b, host, .. } = adapters;
        let (dtype, columns, rows) = (float_dtype(x.dtype()), host.in_features(), host.out_features());
        let mut y = y.to_contiguous();
        for adapter in 0..host.count() {
            let tokens: Vec<usize> = (0..host.tokens()).filter(|t| host.of_token(*t) == Some(adapter)).collect();
            let ranks = host.ranks(adapter);
            if tokens.is_empty() || ranks.is_empty() {
                continue;
            }
            let indices: Vec<i32> = tokens.iter().map(|token| *token as i32).collect();
            let indices = FlexTensor::from_data(TensorData::new(indices, [tokens.len()]));
            let own = Self::float_select(x.clone(), 0, indices);
            let a = part(&lora_a, ranks.start * columns, [ranks.len(), columns]);
            let b = part(&lora_b, ranks.start * rows, [rows, ranks.len()]);
            let u = Self::matmul(own, transposed(a), FloatDType::F32);
            let u = Self::float_cast(Self::float_mul_scalar(u, host.scaling(adapter).into()), dtype);
            let update = Self::matmul(u, transposed(b), FloatDType::F32).to_contiguous();
            let sums = y.storage_mut::<f32>();
            for (token, update) in tokens.iter().zip(update.storage::<f32>().chunks_exact(rows)) {
                sums[token * rows..][..rows].iter_mut().zip(update).for_each(|(sum, update)| *sum += update);
            }
        }
        y
    }
}
