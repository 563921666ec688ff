//! The GPU implementation, for every CubeCL runtime.

use super::{PagedBatch, PagedOperand, PagedOps};
use crate::ops::cube_tensors::empty;
use crate::ops::{AttentionOptions, Sinks, format_of};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::{DType, Shape as TensorShape, Tensor};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use fused_kernels::likeliest::likeliest;
use fused_kernels::paged_attention::{self, Attend, Shape, Write};
use fused_kernels::rotate_into_cache::{self, Heads};
use fused_kernels::{KernelError, Matrix};
use host_copies::{as_cube, cube_of_int, from_cube, into_cube};

/// Shapes and options were checked, so what is left is a failed launch.
fn expect(result: Result<(), KernelError>) {
    result.unwrap_or_else(|e| panic!("paged attention: {e}"));
}

/// Queries, keys, values, cosines and sines of new tokens.
pub(super) struct New([CubeTensor; 5]);

impl New {
    /// `None` where they lie in the host's memory.
    pub fn of([q, k, v]: [&Tensor<2>; 3], [cos, sin]: &[Tensor<2>; 2]) -> Option<Self> {
        Some(Self([as_cube(q)?, as_cube(k)?, as_cube(v)?, as_cube(cos)?, as_cube(sin)?]))
    }
}

/// See [`super::rotate_into_cache`].
pub(super) fn rotate_into_cache(
    New([q, k, v, cos, sin]): New,
    cache: [Tensor<3>; 2],
    batch: &PagedBatch,
    heads: &Heads,
) -> (Tensor<2>, [Tensor<3>; 2]) {
    // Everything else of the pass is on this device.
    let on_device = |x: Option<CubeTensor>| x.unwrap_or_else(|| panic!("rotate_into_cache: tensors on two devices"));
    let [keys, values] = cache.map(|tensor| on_device(into_cube(tensor)));
    let words = on_device(cube_of_int(batch.words.clone()));
    let out = empty(&q.client, &q.device, q.meta.shape().clone(), q.dtype);
    let buffers = rotate_into_cache::Buffers {
        q: &q.handle,
        k: &k.handle,
        v: &v.handle,
        cos: &cos.handle,
        sin: &sin.handle,
        words: &words.handle,
        out: &out.handle,
        keys: &keys.handle,
        values: &values.handle,
    };
    expect(rotate_into_cache::rotate_into_cache(&q.client, buffers, &batch.host, heads));
    (from_cube(out), [keys, values].map(from_cube))
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
        let sinks = options.sinks.as_ref().map(Sinks::on_device);
        let buffers = Attend {
            q: &q.handle,
            keys: &keys.handle,
            values: &values.handle,
            words: &words.handle,
            sinks: sinks.as_ref().map(|sinks| &sinks.handle),
            out: &out.handle,
        };
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
