//! Folding plain factors into the weight they adapt: W + scaling * B A.
//!
//! Merging belongs on the full-precision weight: adding the update to a dequantized 4-bit weight and
//! quantizing again rounds the update away. Everything is accumulated in 32-bit floats and rounded to
//! the weight's type once. [`crate::LoraModule`] does this for every kind of module that PEFT writes,
//! [`mod@crate::merge_checkpoint`] for a whole checkpoint.

use nf4_quant::Element;

use crate::adapter::HostTensor;
use crate::error::FormatError;
use crate::lora_module::{LoraModule, ModuleKind};

/// The update of a weight: `scaling * lora_b @ lora_a`, in 32-bit floats.
///
/// # Shapes
/// `lora_a` [r, in], `lora_b` [out, r]; returns [out, in]. Factors that do not fit are the caller's
/// error ([`crate::Adapter::load`] has checked those of a file); nothing is added then.
pub fn lora_delta(lora_a: &HostTensor, lora_b: &HostTensor, scaling: f32) -> HostTensor {
    let module = plain("", lora_a, lora_b, scaling);
    match module.fits() {
        true => module.delta(),
        false => {
            let shape = module.weight_shape();
            HostTensor { shape: shape.to_vec(), data: vec![0.0; shape[0] * shape[1]] }
        }
    }
}

/// Adds `scaling * lora_b @ lora_a` to a weight; each element is rounded to the weight's type once.
///
/// Returns the largest absolute change of an element, as stored.
///
/// # Shapes
/// `weight` [out, in] row-major, `lora_a` [r, in], `lora_b` [out, r].
///
/// # Errors
/// [`FormatError::Factors`], which names `module`, when the factors do not fit the weight or the result
/// is not finite.
pub fn merge_into<E: Element>(
    module: &str,
    weight: &mut [E],
    shape: &[usize],
    lora_a: &HostTensor,
    lora_b: &HostTensor,
    scaling: f32,
) -> Result<f32, FormatError> {
    Ok(plain(module, lora_a, lora_b, scaling).merge_into(weight, shape)?.largest)
}

fn plain<'a>(path: &str, lora_a: &'a HostTensor, lora_b: &'a HostTensor, scaling: f32) -> LoraModule<'a> {
    LoraModule { path: path.into(), kind: ModuleKind::Linear, lora_a, lora_b, bias: None, magnitude: None, scaling }
}
