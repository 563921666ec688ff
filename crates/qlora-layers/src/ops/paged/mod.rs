//! Generation's attention: a key-value cache in blocks, and the queries of many sequences at once.
//!
//! The cache of a layer is two tensors `[blocks * block_tokens, kv_heads, head_dim]`. Sequences own blocks of it, in any
//! order. A [`PagedBatch`] says which rows a pass has and what they look at; it is built once a pass and serves all
//! layers. [`paged_write`] puts the new tokens' keys and values into the cache, [`paged_attention`] attends.
//!
//! The result of a token depends on nothing but its sequence, bit for bit: not on the other rows of the batch, nor on
//! how a prompt was cut into chunks. Softmax and sums are f32.
//!
//! CubeCL devices run [`fused_kernels::paged_attention`], the CPU a loop over tokens and key heads on all threads, which
//! reads the cache in place. The two add in different orders.
//!
//! Neither operation has a gradient.

mod autodiff;
mod cube;
mod flex;
mod tile;

use super::fused::{Rotation, rotate};
use super::{AttentionOptions, QloraOps};
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch, ExtensionType, backend_extension};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use fused_kernels::paged_attention::{Batch, MAX_HEAD_DIM};
use fused_kernels::rotate_into_cache::Heads;
use host_copies::overwrite_int;
use std::sync::Arc;

pub use fused_kernels::paged_attention::{Row as PagedRow, slot as paged_slot};

/// What the rows of a batch look at, on the host and on a device.
#[derive(Clone, Debug)]
pub struct PagedBatch {
    host: Arc<Batch>,
    words: Tensor<1, Int>,
}

impl PagedBatch {
    /// The rows of a batch over caches of blocks of `block_tokens` tokens. The new tokens of all rows lie one after the
    /// other in the batch; rows may share blocks that they only read. One upload.
    ///
    /// # Panics
    /// When a row has fewer tokens than new ones, or fewer blocks than its tokens fill.
    pub fn new(rows: &[PagedRow<'_>], block_tokens: usize, device: &Device) -> Self {
        Self::with_room(rows, block_tokens, 0, device)
    }

    /// [`new`](Self::new) with room for sequences of `max_len` tokens, to be [overwritten](Self::overwrite) by batches like it.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn with_room(rows: &[PagedRow<'_>], block_tokens: usize, max_len: usize, device: &Device) -> Self {
        let host = Batch::with_room(rows, block_tokens, max_len).unwrap_or_else(|e| panic!("paged batch: {e}"));
        let words: Vec<i32> = host.words().into_iter().map(|word| word as i32).collect();
        let len = words.len();
        let device = device.clone().without_autodiff();
        let words = Tensor::from_data(TensorData::new(words, [len]), (&device, DType::I32));
        Self { host: Arc::new(host), words }
    }

    /// Makes the batch say something else, in the same memory of the device: what was recorded with it looks at the new rows
    /// from the next replay on. `false`, and nothing done, where the words have another layout.
    ///
    /// # Panics
    /// As [`new`](Self::new).
    pub fn overwrite(&mut self, rows: &[PagedRow<'_>]) -> bool {
        let host = Batch::with_room(rows, self.host.block_tokens(), self.host.max_len());
        let host = host.unwrap_or_else(|e| panic!("paged batch: {e}"));
        let layout = |batch: &Batch| (batch.starts().to_vec(), batch.max_len(), batch.num_words());
        if layout(&host) != layout(&self.host) || !overwrite_int(&self.words, &host.words()) {
            return false;
        }
        self.host = Arc::new(host);
        true
    }

    /// What it says, on the host.
    pub fn host(&self) -> &Batch {
        &self.host
    }

    /// New tokens of all rows.
    pub fn tokens(&self) -> usize {
        self.host.tokens()
    }

    fn operand(&self) -> PagedOperand<Dispatch> {
        PagedOperand { words: self.words.clone().into_dispatch(), host: self.host.clone() }
    }
}

/// A [`PagedBatch`] on a backend.
#[derive(Clone, Debug, ExtensionType)]
pub struct PagedOperand<B: Backend> {
    /// i32: [`Batch::words`].
    pub words: IntTensor<B>,
    /// What it says.
    pub host: Arc<Batch>,
}

/// The tensor-level part.
#[backend_extension(Cube, Flex, Autodiff)]
pub trait PagedOps: Backend {
    /// See [`paged_write`].
    fn paged_write(
        cache: FloatTensor<Self>,
        new: FloatTensor<Self>,
        #[extension_type] batch: PagedOperand<Self>,
    ) -> FloatTensor<Self>;

    /// See [`paged_attention`].
    fn paged_attention(
        q: FloatTensor<Self>,
        keys: FloatTensor<Self>,
        values: FloatTensor<Self>,
        #[extension_type] batch: PagedOperand<Self>,
        options: AttentionOptions,
    ) -> FloatTensor<Self>;

    /// See [`likeliest`].
    fn likeliest(logits: FloatTensor<Self>) -> IntTensor<Self>;
}

/// The token of the first largest logit of each row; -1 where a logit is no number.
///
/// # Shapes
/// `[rows, vocab]` to `[rows]`, i32.
pub fn likeliest(logits: Tensor<2>) -> Tensor<1, Int> {
    let logits = logits.without_autodiff().into_dispatch();
    Tensor::from_dispatch(<Dispatch as PagedOps>::likeliest(logits))
}

/// Writes the keys (or values) of new tokens into a cache, and returns it.
///
/// The caller hands over the only tensor of the cache, and it is written in place. (A clone that someone kept sees the
/// written values on CubeCL; on the CPU a shared cache is copied first.)
///
/// # Shapes
/// - `cache`: `[blocks * block_tokens, kv_heads, head_dim]`
/// - `new`: `[tokens, kv_heads, head_dim]`, in the dtype of `cache`
///
/// # Panics
/// When shapes or dtypes don't fit one another, the batch names blocks that the cache does not have, or a tensor is
/// tracked by autodiff.
pub fn paged_write(cache: Tensor<3>, new: Tensor<3>, batch: &PagedBatch) -> Tensor<3> {
    let ([slots, kv_heads, dim], tokens) = (cache.dims(), batch.tokens());
    assert_eq!(new.dims(), [tokens, kv_heads, dim], "paged_write: new tokens for a cache of {kv_heads} x {dim}");
    assert_eq!(new.dtype(), cache.dtype(), "paged_write: new tokens and cache must have one dtype");
    check_reach("paged_write", batch, slots);
    if tokens == 0 {
        return cache;
    }
    let (cache, new) = (cache.into_dispatch(), new.into_dispatch());
    Tensor::from_dispatch(<Dispatch as PagedOps>::paged_write(cache, new, batch.operand()))
}

/// Queries, keys and values of new tokens, as projections write them.
#[derive(Clone, Debug)]
pub struct NewTokens {
    /// `[tokens, heads * head_dim]`.
    pub q: Tensor<2>,
    /// `[tokens, kv_heads * head_dim]`.
    pub k: Tensor<2>,
    /// As `k`.
    pub v: Tensor<2>,
}

/// Rotates queries and new keys, as [`rotate`] does with tables of one row a token, and [writes](paged_write) keys and values
/// into the cache: on CubeCL devices one launch, with the same results bit for bit. Returns the rotated queries, the keys and
/// the values. The caller hands over the only tensors of the cache.
///
/// # Shapes
/// - `new`: see [`NewTokens`], in the dtype of the cache
/// - `tables`: cosines and sines, `[tokens, rotary / 2]`, f32
/// - `cache`: keys and values, `[blocks * block_tokens, kv_heads, head_dim]` each
/// - output: `[tokens, heads * head_dim]`, and the cache
///
/// # Panics
/// As the two operations.
pub fn rotate_into_cache(
    new: NewTokens,
    tables: [Tensor<2>; 2],
    cache: [Tensor<3>; 2],
    batch: &PagedBatch,
    rotation: Rotation,
) -> (Tensor<2>, [Tensor<3>; 2]) {
    let NewTokens { q, k, v } = new;
    let [slots, kv_heads, head_dim] = cache[0].dims();
    let [tokens, width] = q.dims();
    assert_eq!(cache[0].dims(), cache[1].dims(), "rotate_into_cache: keys and values differ in shape");
    assert_eq!(
        k.dims(),
        [tokens, kv_heads * head_dim],
        "rotate_into_cache: keys for a cache of {kv_heads} x {head_dim}"
    );
    assert_eq!(v.dims(), k.dims(), "rotate_into_cache: keys and values are alike");
    assert!(tokens == batch.tokens(), "rotate_into_cache: {tokens} tokens for {} new ones", batch.tokens());
    let on_device = match rotation.rotary > 0 && tokens > 0 {
        true => cube::New::of([&q, &k, &v], &tables),
        false => None,
    };
    let Some(on_device) = on_device else {
        let [cos, sin] = tables;
        let turned = |x: Tensor<2>| match rotation.rotary {
            0 => x,
            _ => rotate(x, cos.clone(), sin.clone(), rotation),
        };
        let heads = |x: Tensor<2>| x.reshape([tokens, kv_heads, head_dim]);
        let [keys, values] = cache;
        return (turned(q), [paged_write(keys, heads(turned(k)), batch), paged_write(values, heads(v), batch)]);
    };
    check_reach("rotate_into_cache", batch, slots);
    let format = super::format_of(cache[0].dtype()).into();
    let heads = Heads { heads: width / head_dim, kv_heads, head_dim, rotary: rotation.rotary, slots, format };
    cube::rotate_into_cache(on_device, cache, batch, &heads)
}

/// Causal attention of each row's new tokens over their whole sequence in the cache, which [`paged_write`] has put
/// them into: a token sees itself and what comes before it, or of that the last `window`.
///
/// # Shapes
/// - `q`: `[tokens, heads, head_dim]`, `head_dim` up to 1024, where it is a multiple of 4, and up to 256 where not
/// - `keys`, `values`: `[blocks * block_tokens, kv_heads, head_dim]` in the dtype of `q`, `heads` a multiple of
///   `kv_heads`
/// - output: as `q`, in its dtype
///
/// # Panics
/// When shapes or dtypes don't fit one another, the batch names blocks that the cache does not have, options are out of
/// range or name packed rows (the batch has its own), or a tensor is tracked by autodiff.
pub fn paged_attention(
    q: Tensor<3>,
    keys: &Tensor<3>,
    values: &Tensor<3>,
    batch: &PagedBatch,
    options: &AttentionOptions,
) -> Tensor<3> {
    let ([tokens, heads, dim], [slots, kv_heads, kv_dim]) = (q.dims(), keys.dims());
    assert_eq!(keys.dims(), values.dims(), "paged_attention: keys and values differ in shape");
    assert!(tokens == batch.tokens(), "paged_attention: {tokens} queries for {} new tokens", batch.tokens());
    assert!(dim == kv_dim && dim <= MAX_HEAD_DIM, "paged_attention: heads of {dim}, and of {kv_dim} in the cache");
    assert!(
        kv_heads > 0 && heads.is_multiple_of(kv_heads),
        "paged_attention: {heads} query heads, {kv_heads} key heads"
    );
    assert!(
        q.dtype() == keys.dtype() && keys.dtype() == values.dtype(),
        "paged_attention: queries and cache must have one dtype"
    );
    assert!(options.packed.is_none(), "paged_attention: the batch says how rows divide, not the options");
    assert!(options.scores.window != Some(0), "paged_attention: a query sees itself at least");
    let sinks = options.sinks().map_or(heads, <[f32]>::len);
    assert!(sinks == heads, "paged_attention: {sinks} sinks of {heads} heads");
    check_reach("paged_attention", batch, slots);
    if q.shape().num_elements() == 0 {
        return q;
    }
    Tensor::from_dispatch(<Dispatch as PagedOps>::paged_attention(
        q.into_dispatch(),
        keys.clone().into_dispatch(),
        values.clone().into_dispatch(),
        batch.operand(),
        options.clone(),
    ))
}

fn check_reach(operation: &str, batch: &PagedBatch, slots: usize) {
    let reach = batch.host.reach();
    assert!(reach <= slots, "{operation}: the batch's blocks reach slot {reach}, the cache has {slots}");
}

/// Backends that autodiff may stand above.
trait PagedBackend: PagedOps + QloraOps {}

impl<B: PagedOps + QloraOps> PagedBackend for B {}
