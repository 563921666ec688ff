//! A full-precision checkpoint becomes a GPTQ one, as transformers and vLLM load it.
//!
//! The Hessians come from outside, module by module in the order of the files: running the model on
//! calibration rows is not this crate's work. `config.json` gets `quantization_config`, and the same stands in
//! `quantize_config.json`, where older programs look for it.

use std::path::Path;

use serde_json::{Value, json};

use crate::atomic;
use crate::checkpoint::Checkpoint;
use crate::convert::{
    ModelConfigFile, OnProgress, Progress, copy_companions, format_of, quantized_module, refuse_same_folder,
};
use crate::error::FormatError;
use crate::gptq::{GptqOptions, GptqWeight, specs};
use crate::header::TensorSpec;
use crate::json;
use crate::shard_writer::ShardedWriter;

/// Gives X^T X [in, in] of a module's calibration inputs, or `None` to round it to the nearest.
pub type Hessians<'a> = &'a mut dyn FnMut(&str, [usize; 2]) -> Result<Option<Vec<f32>>, FormatError>;

/// What a quantization did to one module.
#[derive(Debug, Clone, PartialEq)]
pub struct GptqReport {
    /// The module.
    pub module: String,
    /// The relative error of its outputs ([`GptqWeight::output_error`]); `None` without a Hessian.
    pub output_error: Option<f64>,
    /// The same for rounding to the nearest.
    pub nearest_error: Option<f64>,
}

/// Quantizes the checkpoint in `base_dir` and writes it to `out_dir`, which is replaced as a whole when all is
/// done. Returns a report for each quantized module.
///
/// # Errors
/// [`FormatError::Gptq`] for a module that cannot be quantized so, [`FormatError::QuantState`] when the
/// checkpoint is quantized already, those of `hessians`, and of reading and writing. What was at `out_dir` is
/// unchanged then.
pub fn gptq_checkpoint(
    base_dir: &Path,
    out_dir: &Path,
    options: &GptqOptions,
    skip_modules: &[String],
    max_shard_bytes: u64,
    hessians: Hessians<'_>,
    progress: OnProgress<'_>,
) -> Result<Vec<GptqReport>, FormatError> {
    refuse_same_folder(base_dir, out_dir)?;
    let base = Checkpoint::open(base_dir)?;
    let mut config = ModelConfigFile::read(base_dir)?;
    if config.map.get("quantization_config").is_some_and(|v| !v.is_null()) {
        return Err(FormatError::QuantState {
            file: config.path,
            tensor: "quantization_config".into(),
            reason: "the checkpoint is quantized already; start from the full-precision one".into(),
        });
    }
    let mut planned: Vec<TensorSpec> = Vec::new();
    let mut jobs = Vec::new();
    for name in base.names_in_file_order() {
        let view = base.tensor(name)?;
        let module = quantized_module(name, &view.shape, skip_modules).filter(|_| format_of(view.dtype).is_some());
        match module {
            Some(module) => {
                let shape = options.check(module, &view.shape)?;
                let groups = shape[1] / options.group_size.unwrap_or(shape[1]);
                planned.extend(specs(module, shape, groups));
                jobs.push((name, Some((module, shape))));
            }
            None => {
                planned.push(TensorSpec::new(name, view.dtype, &view.shape));
                jobs.push((name, None));
            }
        }
    }
    let block = quantization_config(options, skip_modules);
    config.set("quantization_config", block.clone());
    let mut reports = Vec::new();
    atomic::replace_dir(out_dir, |dir| {
        config.write(dir)?;
        atomic::write_bytes(&dir.join("quantize_config.json"), (json::to_python(&block) + "\n").as_bytes())?;
        copy_companions(base_dir, None, dir)?;
        let mut writer = ShardedWriter::create(dir, planned, max_shard_bytes)?;
        let total_bytes = writer.total_bytes();
        let mut done_bytes = 0;
        for (name, module) in &jobs {
            let view = base.tensor(name)?;
            let Some((module, shape)) = module else {
                writer.write(name, view.data)?;
                done_bytes += view.data.len() as u64;
                progress(&Progress { tensor: name, done_bytes, total_bytes });
                continue;
            };
            let weight = view.to_f32_vec()?;
            let nearest = || GptqWeight::round_to_nearest(module, &weight, shape, options);
            let mut report = GptqReport { module: module.to_string(), output_error: None, nearest_error: None };
            let quantized = match hessians(module, *shape)? {
                None => nearest()?,
                Some(hessian) => {
                    let quantized = GptqWeight::quantize(module, &weight, shape, &hessian, options)?;
                    report.output_error = Some(quantized.output_error(&weight, &hessian));
                    report.nearest_error = Some(nearest()?.output_error(&weight, &hessian));
                    quantized
                }
            };
            reports.push(report);
            for (spec, bytes) in quantized.to_tensors(module) {
                writer.write(&spec.name, &bytes)?;
                done_bytes += bytes.len() as u64;
            }
            progress(&Progress { tensor: name, done_bytes, total_bytes });
        }
        writer.finish().map(drop)
    })
    .map(|()| reports)
}

/// The keys that transformers' `GPTQConfig` and vLLM's read.
fn quantization_config(options: &GptqOptions, skip_modules: &[String]) -> Value {
    let mut block = json!({
        "bits": 4,
        "checkpoint_format": "gptq",
        "damp_percent": options.damp_percent,
        "desc_act": options.act_order,
        "group_size": options.group_size.map_or(-1, |g| i64::try_from(g).unwrap_or(i64::MAX)),
        "lm_head": false,
        "meta": {"quantizer": [format!("adapter-io:{}", env!("CARGO_PKG_VERSION"))]},
        "pack_dtype": "int32",
        "quant_method": "gptq",
        "sym": true,
        "true_sequential": true,
    });
    if let (false, Some(map)) = (skip_modules.is_empty(), block.as_object_mut()) {
        // GPTQModel's and vLLM's way to say "not this one".
        let skip = |m: &String| (format!("-:.*{}.*", m.replace('.', r"\.")), json!({}));
        map.insert("dynamic".into(), Value::Object(skip_modules.iter().map(skip).collect()));
    }
    block
}
