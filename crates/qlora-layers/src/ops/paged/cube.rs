//! The GPU implementation, for every CubeCL runtime.

use super::{PagedOperand, PagedOps};
use crate::ops::cube_tensors::empty;
use crate::ops::{AttentionOptions, format_of};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape as TensorShape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use fused_kernels::likeliest::likeliest;
use fused_kernels::paged_attention::{self, Attend, Shape, Write};
use fused_kernels::{KernelError, Matrix};

/// Shapes and options were checked, so what is left is a failed launch.
fn expect(result: Result<(), KernelError>) {
    result.unwrap_or_else(|e| panic!("paged attention: {e}"));
}

impl PagedOps for CubeBackend {
    fn paged_write(cache: FloatTensor<Self>, new: FloatTensor<Self>, batch: PagedOperand<Self>) -> FloatTensor<Self> {
        let (cache, new, words) = (into_contiguous(cache), into_contiguous(new), into_contiguous(batch.words));
        let [slots, kv_heads, dim] = cache.meta.shape().dims();
        let buffers = Write { new: &new.handle, cache: &cache.handle, words: &words.handle };
        let format = format_of(cache.dtype).into();
        expect(paged_attention::write(&cache.client, buffers, &batch.host, slots, kv_heads * dim, format));
        cache
    }

    fn paged_attention(
        q: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        batch: PagedOperand<Self>,
        options: AttentionOptions,
    ) -> FloatTensor<Self> {
        let [q, keys, values] = [q, keys, values].map(into_contiguous);
        let words = into_contiguous(batch.words);
        let out = empty(&q.client, &q.device, q.meta.shape().clone(), q.dtype);
        let [_, heads, head_dim] = q.meta.shape().dims();
        let [slots, kv_heads, _] = keys.meta.shape().dims();
        let shape = Shape { heads, kv_heads, head_dim, slots, format: format_of(q.dtype).into() };
        let buffers =
            Attend { q: &q.handle, keys: &keys.handle, values: &values.handle, words: &words.handle, out: &out.handle };
        expect(paged_attention::attend(&q.client, buffers, &batch.host, &shape, options.scores));
        out
    }

    fn likeliest(logits: FloatTensor<Self>) -> IntTensor<Self> {
        let logits = into_contiguous(logits);
        let [rows, width] = logits.meta.shape().dims();
        let out = empty(&logits.client, &logits.device, TensorShape::new([rows]), DType::I32);
        let matrix = Matrix { rows, width, format: format_of(logits.dtype).into() };
        expect(likeliest(&logits.client, &logits.handle, &out.handle, matrix));
        out
    }
}
