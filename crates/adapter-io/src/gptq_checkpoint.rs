//! A full-precision checkpoint becomes a GPTQ one, as transformers and vLLM load it.
//!
//! The Hessians come from outside, in whatever order the caller runs the model: that is not this crate's work.
//! `config.json` gets `quantization_config`, and the same stands in `quantize_config.json`, where older programs
//! look for it.

use std::collections::BTreeMap;
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

/// A GPTQ checkpoint that is being made.
pub struct GptqCheckpoint<'a> {
    base: Checkpoint,
    options: GptqOptions,
    /// The modules still to come.
    modules: BTreeMap<String, [usize; 2]>,
    writer: ShardedWriter,
    reports: Vec<GptqReport>,
    done_bytes: u64,
    on_progress: OnProgress<'a>,
}

impl GptqCheckpoint<'_> {
    /// The modules still to come, with the shapes of their weights.
    pub fn modules(&self) -> impl Iterator<Item = (&str, [usize; 2])> {
        self.modules.iter().map(|(module, shape)| (module.as_str(), *shape))
    }

    /// Quantizes and writes one module, with the Hessian X^T X [in, in] of its calibration inputs; without one it
    /// is rounded to the nearest. Gives the weight, for what runs on it.
    ///
    /// # Errors
    /// [`FormatError::Gptq`], which names the module: one that is not to be quantized, or was before, or cannot
    /// be; those of reading and writing.
    pub fn quantize(&mut self, module: &str, hessian: Option<&[f32]>) -> Result<GptqWeight, FormatError> {
        let shape = self.modules.remove(module).ok_or_else(|| FormatError::Gptq {
            module: module.to_string(),
            reason: "it is not among the modules to quantize, or was quantized before".into(),
        })?;
        let name = format!("{module}.weight");
        let weight = self.base.dense(&name)?.to_f32_vec()?;
        self.base.release(&name);
        let nearest = || GptqWeight::round_to_nearest(module, &weight, &shape, &self.options);
        let mut report = GptqReport { module: module.to_string(), output_error: None, nearest_error: None };
        let quantized = match hessian {
            None => nearest()?,
            Some(hessian) => {
                let quantized = GptqWeight::quantize(module, &weight, &shape, hessian, &self.options)?;
                report.output_error = Some(quantized.output_error(&weight, hessian));
                report.nearest_error = Some(nearest()?.output_error(&weight, hessian));
                quantized
            }
        };
        self.reports.push(report);
        for (spec, bytes) in quantized.to_tensors(module) {
            self.writer.write(&spec.name, &bytes)?;
            self.written(&spec.name, bytes.len());
        }
        Ok(quantized)
    }

    /// The weight of a module, rounded to the nearest: what [`Self::quantize`] is compared with. Nothing is
    /// written.
    ///
    /// # Errors
    /// As [`Self::quantize`].
    pub fn rounded_to_nearest(&self, module: &str) -> Result<GptqWeight, FormatError> {
        let tensor = self.base.dense(&format!("{module}.weight"))?;
        GptqWeight::round_to_nearest(module, &tensor.to_f32_vec()?, &tensor.shape, &self.options)
    }

    fn written(&mut self, name: &str, bytes: usize) {
        self.done_bytes += bytes as u64;
        let (done_bytes, total_bytes) = (self.done_bytes, self.writer.total_bytes());
        (self.on_progress)(&Progress { tensor: name, done_bytes, total_bytes });
    }
}

/// Quantizes the checkpoint in `base_dir` and writes it to `out_dir`, which is replaced as a whole when all is
/// done. `calibrate` quantizes the modules for which it has a Hessian, in any order; the others are rounded to the
/// nearest. Returns a report for each quantized module.
///
/// # Errors
/// [`FormatError::Gptq`] for a module that cannot be quantized so, [`FormatError::QuantState`] when the
/// checkpoint is quantized already, [`FormatError::NotFinite`], those of `calibrate`, and of reading and writing. What was at `out_dir` is
/// unchanged then.
pub fn gptq_checkpoint<E: From<FormatError>>(
    base_dir: &Path,
    out_dir: &Path,
    options: &GptqOptions,
    skip_modules: &[String],
    max_shard_bytes: u64,
    calibrate: impl FnOnce(&mut GptqCheckpoint<'_>) -> Result<(), E>,
    on_progress: OnProgress<'_>,
) -> Result<Vec<GptqReport>, E> {
    refuse_same_folder(base_dir, out_dir)?;
    let base = Checkpoint::open(base_dir)?;
    let mut config = ModelConfigFile::read(base_dir)?;
    base.refuse_quantized()?;
    config.keep_code(base_dir)?;
    let mut planned: Vec<TensorSpec> = Vec::new();
    let mut modules = BTreeMap::new();
    let mut kept = Vec::new();
    for name in base.names_in_file_order() {
        let view = base.dense(name)?;
        let module = quantized_module(name, &view.shape, skip_modules).filter(|_| format_of(view.dtype).is_some());
        match module {
            Some(module) => {
                let shape = options.check(module, &view.shape)?;
                let groups = shape[1] / options.group_size.unwrap_or(shape[1]);
                planned.extend(specs(module, shape, groups));
                modules.insert(module.to_string(), shape);
            }
            None => {
                planned.push(TensorSpec::new(name, view.dtype, &view.shape));
                kept.push(name.to_string());
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
        let writer = ShardedWriter::create(dir, planned, max_shard_bytes)?;
        let mut made = GptqCheckpoint {
            base,
            options: *options,
            modules,
            writer,
            reports: Vec::new(),
            done_bytes: 0,
            on_progress,
        };
        calibrate(&mut made)?;
        while let Some(module) = made.modules.keys().next().cloned() {
            made.quantize(&module, None)?;
        }
        for name in &kept {
            let tensor = made.base.dense(name)?;
            let bytes = tensor.expect_finite()?.num_bytes();
            made.writer.write_tensor(name, &tensor)?;
            made.base.release(name);
            made.written(name, bytes);
        }
        made.writer.finish()?;
        reports = made.reports;
        Ok(())
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
        "true_sequential": false,
    });
    if let (false, Some(map)) = (skip_modules.is_empty(), block.as_object_mut()) {
        // GPTQModel's and vLLM's way to say "not this one".
        let skip = |m: &String| (format!("-:.*{}.*", m.replace('.', r"\.")), json!({}));
        map.insert("dynamic".into(), Value::Object(skip_modules.iter().map(skip).collect()));
    }
    block
}
