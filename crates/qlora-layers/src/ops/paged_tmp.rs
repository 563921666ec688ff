//! tmp
#![allow(missing_docs)]
use super::{AttentionOptions, attention};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
#[derive(Clone, Debug)]
pub struct PagedBatch { rows: Vec<(Vec<i32>, usize)>, device: Device }
pub struct PagedRow<'a> { pub blocks: &'a [u32], pub len: usize, pub new: usize }
impl PagedBatch { pub fn new(rows: &[PagedRow<'_>], bt: usize, device: &Device) -> Self {
  Self { rows: rows.iter().map(|r| ((0..r.len).map(|p| (r.blocks[p/bt] as usize*bt + p%bt) as i32).collect(), r.new)).collect(), device: device.clone() } } }
pub fn paged_write(mut cache: Tensor<3>, new: Tensor<3>, batch: &PagedBatch) -> Tensor<3> {
  let mut t = 0; let [_, h, d] = new.dims();
  for (slots, n) in &batch.rows { for s in &slots[slots.len()-n..] { let s=*s as usize; cache = cache.slice_assign([s..s+1, 0..h, 0..d], new.clone().narrow(0, t, 1)); t += 1; } }
  cache }
pub fn paged_attention(q: Tensor<3>, keys: &Tensor<3>, values: &Tensor<3>, batch: &PagedBatch, options: &AttentionOptions) -> Tensor<3> {
  let mut t = 0; let mut out = Vec::new(); let [_, h, d] = q.dims(); let [_, kh, _] = keys.dims();
  for (slots, n) in &batch.rows { let len = slots.len();
    let idx = Tensor::<1, Int>::from_data(TensorData::new(slots.clone(), [len]), (&batch.device, DType::I32));
    let k = keys.clone().select(0, idx.clone()).reshape([1, len, kh, d]); let v = values.clone().select(0, idx).reshape([1, len, kh, d]);
    let qr = q.clone().narrow(0, t, *n).reshape([1, *n, h, d]); t += n;
    out.push(attention(qr, k, v, options).reshape([*n, h, d])); }
  Tensor::cat(out, 0) }
