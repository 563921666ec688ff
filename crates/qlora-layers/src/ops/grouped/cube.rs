//! The GPU implementation, for every CubeCL runtime.

use super::{GroupedOperand, GroupedOps};
use crate::ops::format_of;
use burn::backend::tensor::FloatTensor;
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use fused_kernels::grouped_low_rank::{Buffers, add};

impl GroupedOps for CubeBackend {
    fn grouped_low_rank(
        y: FloatTensor<Self>,
        x: FloatTensor<Self>,
        adapters: GroupedOperand<Self>,
    ) -> FloatTensor<Self> {
        let GroupedOperand { lora_a, lora_b, words, host } = adapters;
        let [y, x, lora_a, lora_b, words] = [y, x, lora_a, lora_b, words].map(into_contiguous);
        let y = if y.can_mut() { y } else { y.copy() };
        let buffers = Buffers {
            x: &x.handle,
            lora_a: &lora_a.handle,
            lora_b: &lora_b.handle,
            words: &words.handle,
            y: &y.handle,
        };
        // Shapes were checked, so what is left is a failed launch.
        add(&y.client, buffers, &host, format_of(x.dtype).into()).unwrap_or_else(|e| panic!("grouped_low_rank: {e}"));
        y
    }
}
