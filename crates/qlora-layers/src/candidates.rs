//! The largest logits of each row, brought to the host in place of the rows: [`fused_kernels::candidates`] on Burn's tensors.

use burn::tensor::{DType, Int, Shape, Tensor, TensorData};
use burn_cubecl::tensor::CubeTensor;
pub use fused_kernels::candidates::{Answer as Candidates, Summary as CandidatesRest};
use fused_kernels::candidates::{WORDS, candidates as launch};
use fused_kernels::{FloatFormat, Matrix};
use host_copies::{DeviceError, as_cube, int_from_cube};

/// The answers of all rows, on the host.
#[derive(Clone, Debug)]
pub struct RowCandidates(Vec<u32>);

impl RowCandidates {
    /// A row's.
    pub fn row(&self, row: usize) -> Option<Candidates<'_>> {
        Candidates::new(self.0.get(row * WORDS..(row + 1) * WORDS)?)
    }
}

/// Candidates of the rows of `logits`, `[rows, vocab]`, for each row's temperature, above 0; of the first rows, where there are
/// fewer temperatures. `None` in the host's memory, where the rows are at hand.
///
/// # Errors
/// The device fails.
pub fn candidates(logits: &Tensor<2>, temperatures: &[f32]) -> Result<Option<RowCandidates>, DeviceError> {
    let Some(words) = on_device(logits, temperatures) else { return Ok(None) };
    let words = words.try_into_vec_as::<i32>().map_err(DeviceError::from)?;
    Ok(Some(RowCandidates(words.into_iter().map(|word| word as u32).collect())))
}

fn on_device(logits: &Tensor<2>, temperatures: &[f32]) -> Option<Tensor<1, Int>> {
    let [rows, width] = logits.dims();
    let rows = rows.min(temperatures.len());
    let format = match logits.dtype() {
        DType::BF16 => FloatFormat::BF16,
        DType::F16 => FloatFormat::F16,
        DType::F32 => FloatFormat::F32,
        _ => return None,
    };
    let temperatures = TensorData::new(temperatures[..rows].to_vec(), [rows]);
    let temperatures = Tensor::<1>::from_data(temperatures, (&logits.device(), DType::F32));
    let (logits, temperatures) = (as_cube(logits)?, as_cube(&temperatures)?);
    let shape = Shape::new([rows * WORDS]);
    let handle = logits.client.empty(shape.num_elements() * 4);
    let out = CubeTensor::new_contiguous(logits.client.clone(), logits.device.clone(), shape, handle, DType::I32);
    let matrix = Matrix { rows, width, format };
    launch(&logits.client, &logits.handle, &temperatures.handle, &out.handle, matrix).ok()?;
    Some(int_from_cube(out))
}
