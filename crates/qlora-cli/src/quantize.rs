//! `qlora quantize`: a full-precision checkpoint in 4 bits, for other programs.

use anyhow::Result;
use burn_qlora::adapter_io::{BnbOptions, quantize_checkpoint};
use burn_qlora::nf4_quant::FloatFormat;
use burn_qlora::qlora_models::hub;
use burn_qlora::qlora_train::report::memory;

use crate::args::{QuantFormat, QuantizeArgs};
use crate::exit::{Code, UsageError};
use crate::output::print;
use crate::outputs::{self, ConvertBar};
use crate::sources;

/// Runs the command.
pub fn run(args: &QuantizeArgs) -> Result<Code> {
    match args.format {
        QuantFormat::Bnb4bit => bnb(args),
    }
}

fn bnb(args: &QuantizeArgs) -> Result<Code> {
    let options = BnbOptions {
        config: sources::four_bit(&args.four_bit)?,
        compute_dtype: args.compute_dtype.as_deref().map(compute_dtype).transpose()?,
        skip_modules: args.four_bit.skip_modules.clone(),
        quantize_experts: args.quantize_experts,
        max_shard_bytes: args.max_shard_size,
    };
    outputs::folder(&args.output, args.force)?;
    let base = hub::resolve(&args.model, args.revision.as_deref())?;
    let mut bar = ConvertBar::new("Quantizing");
    let report = quantize_checkpoint(&base, &args.output, &options, &mut |progress| bar.update(progress))?;
    bar.finish();
    let output = args.output.display();
    print(&format!(
        "Quantized {output}: {} layers in {}{}, {} became {}\n\
         Train on it  qlora train CONFIG.toml --model {output}\n",
        report.quantized,
        options.config.quant_type.to_string().to_uppercase(),
        if options.config.double_quant { " with double quantization" } else { "" },
        memory(report.bytes_before),
        memory(report.bytes_after),
    ))?;
    Ok(Code::Done)
}

fn compute_dtype(name: &str) -> Result<FloatFormat, UsageError> {
    match name.to_ascii_lowercase().as_str() {
        "f32" | "float32" => Ok(FloatFormat::F32),
        "f16" | "float16" => Ok(FloatFormat::F16),
        "bf16" | "bfloat16" => Ok(FloatFormat::BF16),
        _ => Err(UsageError(format!("--compute-dtype {name}: must be f32, f16 or bf16"))),
    }
}
