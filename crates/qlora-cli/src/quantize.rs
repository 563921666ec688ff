//! `qlora quantize`: a full-precision checkpoint in 4 bits, for other programs.

use std::fmt::Write as _;

use anyhow::Result;
use burn_qlora::adapter_io::checkpoint::refuse_adapter;
use burn_qlora::calibrate::{self, Calibration, CalibrationReport};
use burn_qlora::nf4_quant::FloatFormat;
use burn_qlora::report::{count, memory};
use burn_qlora::{
    BnbOptions, GptqOptions, LoadProgress, Tokenizer, TrainConfig, compute_dtype, load_rows, quantize_checkpoint,
    select_device,
};

use crate::args::{BnbArgs, GptqArgs, QuantFormat, QuantizeArgs};
use crate::exit::{Code, UsageError};
use crate::hub;
use crate::inspect::group_name;
use crate::output::{Table, print};
use crate::outputs::{self, ConvertBar};
use crate::progress::LoadBar;
use crate::sources;

/// Runs the command.
pub fn run(args: &QuantizeArgs) -> Result<Code> {
    let foreign = match args.format {
        QuantFormat::Bnb4bit => args.gptq.given().map(|flag| (flag, "gptq")),
        QuantFormat::Gptq => args.bnb.given().map(|flag| (flag, "bnb-4bit")),
    };
    if let Some((flag, format)) = foreign {
        return Err(UsageError(format!("{flag} belongs to --format {format}")).into());
    }
    match args.format {
        QuantFormat::Bnb4bit => bnb(args),
        QuantFormat::Gptq => gptq(args),
    }
}

impl BnbArgs {
    /// A flag that was given.
    fn given(&self) -> Option<&'static str> {
        [
            (self.quant_type.is_some(), "--quant-type"),
            (self.no_double_quant, "--no-double-quant"),
            (self.compute_dtype.is_some(), "--compute-dtype"),
            (self.quantize_experts, "--quantize-experts"),
        ]
        .into_iter()
        .find_map(|(given, flag)| given.then_some(flag))
    }
}

impl GptqArgs {
    /// A flag that was given.
    fn given(&self) -> Option<&'static str> {
        [
            (self.data.is_some(), "--data"),
            (self.calibration_rows.is_some(), "--calibration-rows"),
            (self.eval_rows.is_some(), "--eval-rows"),
            (self.max_length.is_some(), "--max-length"),
            (self.seed.is_some(), "--seed"),
            (self.group_size.is_some(), "--group-size"),
            (self.act_order, "--act-order"),
            (self.damp_percent.is_some(), "--damp-percent"),
            (self.device.is_some(), "--device"),
        ]
        .into_iter()
        .find_map(|(given, flag)| given.then_some(flag))
    }

    fn options(&self) -> Result<GptqOptions, UsageError> {
        let group_size = match self.group_size.unwrap_or(128) {
            -1 => None,
            n => Some(usize::try_from(n).ok().filter(|n| *n > 0).ok_or_else(|| {
                UsageError(format!("--group-size {n}: must be 1 or more, or -1 for all inputs of an output"))
            })?),
        };
        let damp_percent = self.damp_percent.unwrap_or(0.01);
        if !(0.0..1.0).contains(&damp_percent) {
            return Err(UsageError(format!("--damp-percent {damp_percent}: must be at least 0 and below 1")));
        }
        Ok(GptqOptions { group_size, act_order: self.act_order, damp_percent })
    }
}

fn bnb(args: &QuantizeArgs) -> Result<Code> {
    let quant_type = args.bnb.quant_type.as_deref().unwrap_or("nf4");
    let options = BnbOptions {
        config: sources::four_bit(quant_type, args.bnb.no_double_quant)?,
        compute_dtype: args.bnb.compute_dtype.as_deref().map(float_format).transpose()?,
        skip_modules: args.skip_modules.clone(),
        quantize_experts: args.bnb.quantize_experts,
        max_shard_bytes: args.max_shard_size,
    };
    outputs::folder(&args.output, args.force)?;
    let base = hub::resolve(&args.model, args.revision.as_deref())?;
    let mut bar = ConvertBar::new("Quantizing");
    let report = quantize_checkpoint(&base, &args.output, &options, &mut |progress| bar.update(progress))?;
    bar.finish();
    let output = args.output.display();
    print(&format!(
        "Quantized    {output}: {} layers in {}{}, {} became {}\n\
         Train on it  qlora train CONFIG.toml --model {output}\n",
        report.quantized,
        options.config.quant_type.to_string().to_uppercase(),
        if options.config.double_quant { " with double quantization" } else { "" },
        memory(report.bytes_before),
        memory(report.bytes_after),
    ))?;
    Ok(Code::Done)
}

fn float_format(name: &str) -> Result<FloatFormat, UsageError> {
    match name.to_ascii_lowercase().as_str() {
        "f32" | "float32" => Ok(FloatFormat::F32),
        "f16" | "float16" => Ok(FloatFormat::F16),
        "bf16" | "bfloat16" => Ok(FloatFormat::BF16),
        _ => Err(UsageError(format!("--compute-dtype {name}: must be f32, f16 or bf16"))),
    }
}

fn gptq(args: &QuantizeArgs) -> Result<Code> {
    let flags = &args.gptq;
    let options = flags.options()?;
    let wrong = |text: &str| Err(UsageError(text.into()));
    let Some(rows) = &flags.data else {
        wrong("--format gptq needs rows to calibrate on: --data FILE")?;
        return Ok(Code::Usage);
    };
    let wanted = flags.calibration_rows.unwrap_or(128);
    if wanted == 0 {
        wrong("--calibration-rows must be 1 or more")?;
    }
    let mut config = TrainConfig::default();
    config.data.train = rows.clone().into();
    config.data.max_length = flags.max_length.unwrap_or(2048);
    config.data.validate()?;
    outputs::folder(&args.output, args.force)?;
    let base = hub::resolve(&args.model, args.revision.as_deref())?;
    refuse_adapter(&base)?;
    let device = select_device(flags.device.as_deref().unwrap_or("auto"))?;
    let tokenizer = Tokenizer::from_dir(&base)?;
    let dataset = load_rows(rows, &config.data, &tokenizer)?;
    // At most a fifth of a short file is held out.
    let evaluated = flags.eval_rows.unwrap_or(32).min(dataset.examples.len() / 5);
    let [held_out, calibration] = dataset.choose([evaluated, wanted], flags.seed.unwrap_or(config.train.seed));
    let job = Calibration {
        base: &base,
        out: &args.output,
        options,
        skip_modules: &args.skip_modules,
        max_shard_bytes: args.max_shard_size,
        device: &device,
        dtype: compute_dtype(config.quantization.compute_dtype, &device)?,
        rows: &calibration,
        held_out: &held_out,
    };
    let (mut loading, mut bar) = (LoadBar::new(), ConvertBar::new("Quantizing"));
    let mut loaded = |progress: LoadProgress<'_>| {
        loading.update(progress);
        if progress.loaded_bytes == progress.total_bytes {
            loading.finish();
        }
    };
    let report = calibrate::gptq(&job, &mut loaded, &mut |progress| bar.update(progress))?;
    bar.finish();
    print(&describe(args, &report, calibration.len(), held_out.len())?)?;
    Ok(Code::Done)
}

/// The errors, layers of the same name together, and the losses.
fn describe(args: &QuantizeArgs, report: &CalibrationReport, rows: usize, held_out: usize) -> Result<String> {
    let mut groups: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
    let mut uncalibrated = 0;
    for module in &report.modules {
        let (Some(ours), Some(nearest)) = (module.output_error, module.nearest_error) else {
            uncalibrated += 1;
            continue;
        };
        let name = group_name(&module.module);
        match groups.iter_mut().find(|group| group.0 == name) {
            Some(group) => group.1.push((ours, nearest)),
            None => groups.push((name, vec![(ours, nearest)])),
        }
    }
    let mut table = Table::new(["output error, relative", "layers", "GPTQ: mean", "worst", "nearest: mean", "worst"]);
    let percent = |part: f64| format!("{:.2} %", 100.0 * part);
    for (name, errors) in &groups {
        let mean = |of: fn(&(f64, f64)) -> f64| errors.iter().map(of).sum::<f64>() / errors.len() as f64;
        let worst = |of: fn(&(f64, f64)) -> f64| errors.iter().map(of).fold(0.0, f64::max);
        table.row([
            name.clone(),
            errors.len().to_string(),
            percent(mean(|e| e.0)),
            percent(worst(|e| e.0)),
            percent(mean(|e| e.1)),
            percent(worst(|e| e.1)),
        ]);
    }
    let mut text = table.to_string();
    if uncalibrated > 0 {
        writeln!(text, "{uncalibrated} modules saw no row and were rounded to the nearest")?;
    }
    if let Some(losses) = report.losses {
        let mut table = Table::new(["held-out rows", "loss", "perplexity"]);
        for (name, loss) in
            [("as it was", losses.full), ("GPTQ", losses.gptq), ("rounded to the nearest", losses.nearest)]
        {
            table.row([name.to_string(), format!("{loss:.4}"), format!("{:.3}", loss.exp())]);
        }
        write!(text, "\n{table}")?;
    }
    writeln!(
        text,
        "\nQuantized  {}: {} layers, calibrated on {rows} rows ({} tokens), measured on {held_out}",
        args.output.display(),
        report.modules.len(),
        count(report.tokens as u64)
    )?;
    Ok(text)
}
