//! The optimizer's moments as a safetensors file.

use std::collections::HashMap;

use paged_optim::{Moment, Moments, OptimizerKind};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::{OPTIMIZER_FILE, TrainingCheckpoint};
use crate::error::TrainError;

/// Key of the optimizer's name in that file's metadata.
const OPTIMIZER_KEY: &str = "optimizer";

impl TrainingCheckpoint {
    /// The moments of the optimizer `kind` for `parameters`.
    ///
    /// # Errors
    /// The file is missing or damaged, was saved by another optimizer, or lacks a parameter.
    pub fn moments(&self, parameters: &[String], kind: OptimizerKind) -> Result<Vec<Moments>, TrainError> {
        let path = self.path.join(OPTIMIZER_FILE);
        let fail = |problem: String| TrainError::Checkpoint { path: path.clone(), problem };
        let bytes = std::fs::read(&path).map_err(|e| fail(e.to_string()))?;
        let damaged = |e: safetensors::SafeTensorError| fail(format!("damaged: {e}"));
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(damaged)?;
        // Files from before there was a choice don't say: they are AdamW's.
        let saved = metadata.metadata().as_ref().and_then(|map| map.get(OPTIMIZER_KEY));
        let saved = saved.map_or(OptimizerKind::AdamW32bit.name(), String::as_str);
        if saved != kind.name() {
            return Err(fail(format!(
                "was saved by the optimizer {saved}, this run has train.optimizer = {kind}: restore the key, or start afresh in another train.output_dir"
            )));
        }
        let file = SafeTensors::deserialize(&bytes).map_err(damaged)?;
        let tensor = |name: &str| {
            file.tensor(name)
                .map_err(|_| fail(format!("no tensor `{name}`: the checkpoint belongs to another adapter")))
        };
        let floats = |name: &str, view: &TensorView<'_>| match view.dtype() {
            Dtype::F32 => Ok(view.data().as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()),
            dtype => Err(fail(format!("`{name}` is {dtype:?}, expected F32"))),
        };
        let moment = |name: String| -> Result<Moment, TrainError> {
            let view = tensor(&name)?;
            match view.dtype() {
                Dtype::U8 => {
                    let absmax = format!("{name}.absmax");
                    let absmax = floats(&absmax, &tensor(&absmax)?)?;
                    Ok(Moment::Block8 { codes: view.data().to_vec(), absmax })
                }
                _ => floats(&name, &view).map(Moment::Full),
            }
        };
        parameters
            .iter()
            .map(|name| kind.moments().iter().map(|part| moment(format!("{name}.{part}"))).collect())
            .collect()
    }
}

/// The content of the file.
pub(super) fn serialize(parameters: &[String], kind: OptimizerKind, moments: &[Moments]) -> Result<Vec<u8>, String> {
    let mut views: Vec<(String, TensorView<'_>)> = Vec::new();
    for (name, moments) in parameters.iter().zip(moments) {
        for (part, moment) in kind.moments().iter().zip(moments) {
            let name = format!("{name}.{part}");
            let mut push = |name: String, dtype, len, data| -> Result<(), String> {
                views.push((name, TensorView::new(dtype, vec![len], data).map_err(|e| e.to_string())?));
                Ok(())
            };
            match moment {
                Moment::Full(values) => push(name, Dtype::F32, values.len(), bytemuck::cast_slice(values))?,
                Moment::Block8 { codes, absmax } => {
                    push(format!("{name}.absmax"), Dtype::F32, absmax.len(), bytemuck::cast_slice(absmax))?;
                    push(name, Dtype::U8, codes.len(), codes)?;
                }
            }
        }
    }
    let metadata = HashMap::from([(OPTIMIZER_KEY.to_string(), kind.name().to_string())]);
    safetensors::serialize(views, Some(metadata)).map_err(|e| e.to_string())
}
