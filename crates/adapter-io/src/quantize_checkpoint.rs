//! A full-precision checkpoint becomes one that bitsandbytes quantized: what transformers loads without
//! quantizing again (`quantization_config` in `config.json`, five tensors beside each packed weight).
//!
//! Every linear layer but the output head and the skipped modules is quantized; embeddings, norms, biases,
//! expert routers and, unless asked for, experts keep their type. The places of all tensors have to be known before the first is
//! written, and the length of a quant_state's JSON depends on the digits of the mean of its absmax: a first
//! pass over the weights computes only those, the second one quantizes.

use std::path::Path;

use nf4_quant::{Element, FloatFormat, NestedAbsmax, NestedMetadata, QuantConfig, Quantized4bit};
use rayon::prelude::*;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::atomic;
use crate::bnb;
use crate::checkpoint::Checkpoint;
use crate::convert::{
    ModelConfigFile, OnProgress, Progress, copy_companions, format_of, quantized_module, refuse_same_folder,
};
use crate::error::FormatError;
use crate::header::TensorSpec;
use crate::mapped::Floats;
use crate::shard_writer::{DEFAULT_SHARD_BYTES, ShardedWriter};

/// Runs the same code on whichever type the elements have, where they lie.
macro_rules! with_floats {
    ($floats:expr, $x:ident => $body:expr) => {
        match $floats {
            Floats::F32($x) => $body,
            Floats::F16($x) => $body,
            Floats::BF16($x) => $body,
        }
    };
}

/// How to quantize a checkpoint.
#[derive(Debug, Clone)]
pub struct BnbOptions {
    /// Codebook, blocksize and double quantization; transformers knows blocks of 64 only.
    pub config: QuantConfig,
    /// `bnb_4bit_compute_dtype`; the checkpoint's own type when `None`.
    pub compute_dtype: Option<FloatFormat>,
    /// `llm_int8_skip_modules`: modules that stay as they are, beside the output head.
    pub skip_modules: Vec<String>,
    /// Whether the experts of a mixture are quantized, too. transformers 5 holds them as stacked parameters,
    /// which bitsandbytes does not quantize, and cannot load them so; transformers 4 can.
    pub quantize_experts: bool,
    /// The data of one file at most.
    pub max_shard_bytes: u64,
}

impl Default for BnbOptions {
    fn default() -> Self {
        Self {
            config: QuantConfig::default(),
            compute_dtype: None,
            skip_modules: Vec::new(),
            quantize_experts: false,
            max_shard_bytes: DEFAULT_SHARD_BYTES,
        }
    }
}

/// What a quantization did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct QuantizeReport {
    /// How many weights are in 4 bits now.
    pub quantized: usize,
    /// The data of the checkpoint before.
    pub bytes_before: u64,
    /// And after.
    pub bytes_after: u64,
}

/// Quantizes the checkpoint in `base_dir` and writes it to `out_dir`, which is replaced as a whole when all
/// is done.
///
/// # Errors
/// [`FormatError::Field`] for a blocksize that transformers could not load, [`FormatError::QuantState`] when
/// the checkpoint is quantized already, [`FormatError::NotFinite`], and those of reading and writing. What was at `out_dir` is unchanged
/// then.
pub fn quantize_checkpoint(
    base_dir: &Path,
    out_dir: &Path,
    options: &BnbOptions,
    progress: OnProgress<'_>,
) -> Result<QuantizeReport, FormatError> {
    refuse_same_folder(base_dir, out_dir)?;
    let base = Checkpoint::open(base_dir)?;
    let mut config = ModelConfigFile::read(base_dir)?;
    if options.config.blocksize != 64 {
        return Err(FormatError::Field {
            path: config.path,
            field: "blocksize".into(),
            reason: format!(
                "it is {}, but transformers loads 4-bit checkpoints in blocks of 64 only",
                options.config.blocksize
            ),
        });
    }
    base.refuse_quantized()?;
    config.keep_code(base_dir)?;
    let mut jobs = Vec::new();
    let mut skip = options.skip_modules.clone();
    if !options.quantize_experts {
        skip.push("experts".into());
    }
    for name in base.names_in_file_order() {
        let view = base.dense(name)?;
        let module = quantized_module(name, &view.shape, &skip)
            .filter(|_| view.num_bytes() > 0)
            .and_then(|module| Some((module, format_of(view.dtype)?)));
        jobs.push((name, module));
    }
    let own = jobs.iter().find_map(|(_, module)| module.map(|(_, format)| format)).unwrap_or(FloatFormat::BF16);
    config.set("quantization_config", quantization_config(options, options.compute_dtype.unwrap_or(own)));
    let mut report = QuantizeReport { bytes_before: base.total_bytes(), ..QuantizeReport::default() };
    atomic::replace_dir(out_dir, |dir| {
        config.write(dir)?;
        copy_companions(base_dir, None, dir)?;
        let mut specs = Vec::new();
        for (name, module) in &jobs {
            let view = base.dense(name)?;
            match module {
                None => specs.push(TensorSpec::new(*name, view.dtype, &view.expect_finite()?.shape)),
                Some((module, format)) => {
                    let blocksize = options.config.blocksize;
                    let absmax = view.with_values(|view| {
                        let floats = view.expect_finite()?.floats()?;
                        Ok::<_, FormatError>(with_floats!(&floats, x => absmax(x, blocksize)))
                    })?;
                    specs.extend(specs_of(module, *format, &view.shape, &absmax, &options.config));
                }
            }
            base.release(name);
        }
        let mut writer = ShardedWriter::create(dir, specs, options.max_shard_bytes)?;
        report.bytes_after = writer.total_bytes();
        let mut done_bytes = 0;
        for (name, module) in &jobs {
            let view = base.dense(name)?;
            match module {
                None => {
                    writer.write_tensor(name, &view)?;
                    done_bytes += view.num_bytes() as u64;
                }
                Some((module, _)) => {
                    let weight = view.with_values(|view| {
                        let floats = view.floats()?;
                        with_floats!(&floats, x => Quantized4bit::quantize(x, &view.shape, &options.config)).map_err(
                            |e| FormatError::QuantState {
                                file: view.file.to_path_buf(),
                                tensor: name.to_string(),
                                reason: e.to_string(),
                            },
                        )
                    })?;
                    for (spec, bytes) in bnb::to_tensors(module, &weight) {
                        writer.write(&spec.name, &bytes)?;
                        done_bytes += bytes.len() as u64;
                    }
                    report.quantized += 1;
                }
            }
            base.release(name);
            progress(&Progress { tensor: name, done_bytes, total_bytes: report.bytes_after });
        }
        writer.finish().map(drop)
    })
    .map(|()| report)
}

/// The block of `config.json`, as `BitsAndBytesConfig.to_dict` gives it in transformers 5.
fn quantization_config(options: &BnbOptions, compute_dtype: FloatFormat) -> Value {
    let skip = match options.skip_modules.is_empty() {
        true => Value::Null,
        // A list replaces transformers' own, which holds the output head.
        false => {
            let mut skip = options.skip_modules.clone();
            if !skip.iter().any(|s| s == "lm_head") {
                skip.push("lm_head".into());
            }
            json!(skip)
        }
    };
    json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": compute_dtype.name(),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": options.config.quant_type.to_string(),
        "bnb_4bit_use_double_quant": options.config.double_quant,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": skip,
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    })
}

fn absmax<E: Element>(values: &[E], blocksize: usize) -> Vec<f32> {
    values.par_chunks(blocksize).map(|block| block.iter().map(|x| x.to_f32().abs()).fold(0.0, f32::max)).collect()
}

/// The tensors that [`bnb::to_tensors`] will give.
fn specs_of(
    module: &str,
    dtype: FloatFormat,
    shape: &[usize],
    absmax: &[f32],
    config: &QuantConfig,
) -> Vec<TensorSpec> {
    let nested = config
        .double_quant
        .then(|| NestedMetadata { blocksize: NestedAbsmax::DEFAULT_BLOCKSIZE, offset: NestedAbsmax::mean(absmax) });
    let metadata = nf4_quant::Metadata {
        quant_type: config.quant_type,
        blocksize: config.blocksize,
        dtype,
        shape: shape.to_vec(),
        nested,
    };
    let name = |suffix: &str| format!("{module}.weight{suffix}");
    let elements: usize = shape.iter().product();
    let state = format!(".quant_state.bitsandbytes__{}", config.quant_type);
    let mut specs = vec![
        TensorSpec::new(name(""), Dtype::U8, &[elements.div_ceil(2), 1]),
        TensorSpec::new(name(".quant_map"), Dtype::F32, &[16]),
        TensorSpec::new(name(&state), Dtype::U8, &[metadata.to_json().len()]),
    ];
    if config.double_quant {
        specs.push(TensorSpec::new(name(".absmax"), Dtype::U8, &[absmax.len()]));
        specs.push(TensorSpec::new(
            name(".nested_absmax"),
            Dtype::F32,
            &[absmax.len().div_ceil(NestedAbsmax::DEFAULT_BLOCKSIZE)],
        ));
        specs.push(TensorSpec::new(name(".nested_quant_map"), Dtype::F32, &[256]));
    } else {
        specs.push(TensorSpec::new(name(".absmax"), Dtype::F32, &[absmax.len()]));
    }
    specs
}
