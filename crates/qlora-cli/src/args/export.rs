//! The commands that turn checkpoints and adapters into files for other programs.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::whole;

/// The adapters that a command works on.
#[derive(Debug, Args)]
pub struct AdapterArgs {
    /// An adapter, a folder or a hub id, with its weight (1 if left out); several are combined
    #[arg(long = "adapter", value_name = "DIR[:WEIGHT]", required = true)]
    pub adapters: Vec<String>,
    /// How several adapters are combined
    #[arg(long, value_enum, default_value_t = How::Cat, value_name = "HOW")]
    pub combine: How,
    /// The rank that svd keeps; the largest one combined when left out
    #[arg(long, value_name = "RANK", value_parser = whole::<usize>)]
    pub svd_rank: Option<usize>,
}

/// How several adapters are combined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum How {
    /// Exact; the rank is the sum of the ranks
    Cat,
    /// The best approximation of one rank
    Svd,
    /// Sums of the factors, cross terms and all, as PEFT's `linear`; ranks must be equal
    Linear,
}

/// The base model of a command.
#[derive(Debug, Args)]
pub struct BaseArgs {
    /// The base model: a folder or a hub id; left out, the one that the adapter names
    #[arg(long)]
    pub model: Option<String>,
    /// Branch, tag or commit of a hub id
    #[arg(long)]
    pub revision: Option<String>,
}

/// The linear layers' 4-bit form.
#[derive(Debug, Args)]
pub struct FourBitArgs {
    /// The codebook: nf4 or fp4
    #[arg(long, default_value = "nf4", value_name = "TYPE")]
    pub quant_type: String,
    /// Keep the absmax in 32 bits instead of quantizing them, too
    #[arg(long)]
    pub no_double_quant: bool,
    /// A module that is not quantized, by its path or the end of it; may be repeated
    #[arg(long = "skip-module", value_name = "MODULE")]
    pub skip_modules: Vec<String>,
}

/// `qlora merge`.
#[derive(Debug, Args)]
#[command(after_help = "\
Which base: an adapter that was trained on a 4-bit base has learned to correct that base's rounding.
`full` adds it to the weights as they were before the rounding, which are closer to the model that was to
be tuned: the usual choice. `dequantized-4bit` adds it to the rounded weights: the result computes what
base and adapter computed in training, rounding included. The report says how large both changes are.

Quantizing a merged model again loses much of the adapter; keep base and adapter apart for that.")]
pub struct MergeArgs {
    /// The adapters.
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// The base.
    #[command(flatten)]
    pub base_model: BaseArgs,
    /// Where to write the merged checkpoint
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Replace a checkpoint that is there
    #[arg(long)]
    pub force: bool,
    /// What to add the adapter to
    #[arg(long, value_enum, default_value_t = MergeInto::Full)]
    pub base: MergeInto,
    /// How the base is rounded for `--base dequantized-4bit`.
    #[command(flatten)]
    pub four_bit: FourBitArgs,
    /// Size of one file of weights at most: 5GB, 500MB, 2GiB
    #[arg(long, default_value = "50GB", value_name = "SIZE", value_parser = size)]
    pub max_shard_size: u64,
    /// Take tokenizer and chat template from this folder instead of the base
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// Do not compare the logits of a few tokens of base and adapter with the merged checkpoint's before it is left
    #[arg(long)]
    pub no_verify: bool,
    /// One JSON object on stdout instead of text
    #[arg(long)]
    pub json: bool,
}

/// What an adapter is merged into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MergeInto {
    /// The checkpoint's own weights
    Full,
    /// The weights after quantization to 4 bits and back
    #[value(name = "dequantized-4bit")]
    Dequantized4bit,
}

/// `qlora combine`.
#[derive(Debug, Args)]
pub struct CombineArgs {
    /// The adapters.
    #[command(flatten)]
    pub adapters: AdapterArgs,
    /// Where to write the new adapter
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Replace an adapter that is there
    #[arg(long)]
    pub force: bool,
}

/// `qlora quantize`.
#[derive(Debug, Args)]
#[command(after_help = "\
bnb-4bit is what transformers loads without quantizing again; it needs no data.

gptq rounds each layer so that its outputs change least on the rows of --data, block by block: the model runs in
the device's compute dtype, unquantized. The report gives each layer's output error beside that of rounding to
the nearest, and the loss on rows that were held out. transformers and vLLM load the result.")]
pub struct QuantizeArgs {
    /// The full-precision model: a folder or a hub id
    #[arg(long)]
    pub model: String,
    /// Branch, tag or commit of a hub id
    #[arg(long)]
    pub revision: Option<String>,
    /// The format
    #[arg(long, value_enum)]
    pub format: QuantFormat,
    /// Where to write the quantized checkpoint
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Replace a checkpoint that is there
    #[arg(long)]
    pub force: bool,
    /// Size of one file of weights at most: 5GB, 500MB, 2GiB
    #[arg(long, default_value = "50GB", value_name = "SIZE", value_parser = size)]
    pub max_shard_size: u64,
    /// A module that is not quantized, by its path or the end of it; may be repeated
    #[arg(long = "skip-module", value_name = "MODULE")]
    pub skip_modules: Vec<String>,
    /// For bnb-4bit.
    #[command(flatten)]
    pub bnb: BnbArgs,
    /// For gptq.
    #[command(flatten)]
    pub gptq: GptqArgs,
}

/// Flags of `--format bnb-4bit`.
#[derive(Debug, Args)]
#[command(next_help_heading = "For --format bnb-4bit")]
pub struct BnbArgs {
    /// The codebook: nf4 or fp4 [default: nf4]
    #[arg(long, value_name = "TYPE")]
    pub quant_type: Option<String>,
    /// Keep the absmax in 32 bits instead of quantizing them, too
    #[arg(long)]
    pub no_double_quant: bool,
    /// Dtype that transformers shall compute in: f32, f16 or bf16; the checkpoint's own when left out
    #[arg(long, value_name = "DTYPE")]
    pub compute_dtype: Option<String>,
    /// Quantize the experts of a mixture, too; transformers 5 can't load them so
    #[arg(long)]
    pub quantize_experts: bool,
}

/// Flags of `--format gptq`.
#[derive(Debug, Args)]
#[command(next_help_heading = "For --format gptq")]
pub struct GptqArgs {
    /// The rows to calibrate on, as for training
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Rows of it to calibrate on, chosen at random [default: 128]
    #[arg(long, value_name = "ROWS", value_parser = whole::<usize>)]
    pub calibration_rows: Option<usize>,
    /// Further rows to measure the loss on; 0 measures none [default: 32]
    #[arg(long, value_name = "ROWS", value_parser = whole::<usize>)]
    pub eval_rows: Option<usize>,
    /// Tokens of a row at most [default: 2048]
    #[arg(long, value_name = "TOKENS", value_parser = whole::<usize>)]
    pub max_length: Option<usize>,
    /// Seed of the choice of rows [default: 42]
    #[arg(long, value_parser = whole::<u64>)]
    pub seed: Option<u64>,
    /// Inputs that share a scale; -1: all of an output's [default: 128]
    #[arg(long, value_name = "INPUTS", allow_negative_numbers = true)]
    pub group_size: Option<i64>,
    /// Round the inputs that matter most first
    #[arg(long)]
    pub act_order: bool,
    /// What is added to the Hessian's diagonal, as a part of its mean [default: 0.01]
    #[arg(long, value_name = "PART")]
    pub damp_percent: Option<f64>,
    /// Where to run: auto, cpu, cuda, cuda:1, vulkan or metal [default: auto]
    #[arg(long)]
    pub device: Option<String>,
}

/// A format that `qlora quantize` writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum QuantFormat {
    /// bitsandbytes' NF4 or FP4
    #[value(name = "bnb-4bit")]
    Bnb4bit,
    /// GPTQ, 4 bits, calibrated on data
    Gptq,
}

/// `qlora convert`.
#[derive(Debug, Args)]
#[command(after_help = "\
A model and an adapter become a model: they are merged in a temporary folder beside the output first, so
the disk needs room for both. --adapter-only writes the adapter by itself, to be loaded beside its base.")]
pub struct ConvertArgs {
    /// The model: a folder or a hub id; left out, the one that the adapter names
    #[arg(long, required_unless_present = "adapters")]
    pub model: Option<String>,
    /// Branch, tag or commit of a hub id
    #[arg(long)]
    pub revision: Option<String>,
    /// An adapter to merge on the way, or to write by itself: a folder or a hub id
    #[arg(long = "adapter", value_name = "ADAPTER")]
    pub adapters: Option<String>,
    /// Write the adapter alone, as LoRA GGUF
    #[arg(long, requires = "adapters", conflicts_with_all = ["name", "pre_tokenizer", "without_tokenizer"])]
    pub adapter_only: bool,
    /// The format
    #[arg(long, value_enum, default_value_t = Format::Gguf)]
    pub format: Format,
    /// Type of the matrices: f32, f16, bf16, q8_0, q5_0, q4_1 or q4_0
    #[arg(long = "type", default_value = "f16", value_name = "TYPE")]
    pub kind: String,
    /// Where to write it
    #[arg(long, value_name = "FILE")]
    pub output: PathBuf,
    /// Replace a file that is there
    #[arg(long)]
    pub force: bool,
    /// The model's name inside the file; the folder's when left out
    #[arg(long)]
    pub name: Option<String>,
    /// llama.cpp's name of the pre-tokenizer, for one that is not recognised
    #[arg(long, value_name = "NAME")]
    pub pre_tokenizer: Option<String>,
    /// Leave the tokenizer out
    #[arg(long)]
    pub without_tokenizer: bool,
    /// Do not compare the logits of a few tokens of base and adapter with the merged checkpoint's before the file is written
    #[arg(long)]
    pub no_verify: bool,
    /// One JSON object on stdout instead of text
    #[arg(long)]
    pub json: bool,
}

/// A format that `qlora convert` writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// llama.cpp's
    Gguf,
}

/// A size with a unit: `5GB` is 10^9 bytes each, `5GiB` 2^30.
fn size(text: &str) -> Result<u64, String> {
    let at = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(at);
    let factor = match unit.trim().to_ascii_uppercase().as_str() {
        "" | "B" => 1.0,
        "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "TB" => 1e12,
        "KIB" => 1024.0,
        "MIB" => 1024.0 * 1024.0,
        "GIB" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err("write a number and a unit, such as 5GB, 500MB or 2GiB".into()),
    };
    match number.parse::<f64>() {
        Ok(number) if number * factor >= 1.0 && number * factor < 1e18 => Ok((number * factor) as u64),
        _ => Err("write a positive number and a unit, such as 5GB, 500MB or 2GiB".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_have_units() {
        assert_eq!(size("5GB"), Ok(5_000_000_000));
        assert_eq!(size("1.5 gib"), Ok(1_610_612_736));
        assert_eq!(size("700"), Ok(700));
        for wrong in ["", "GB", "-1GB", "0", "5 apples", "1e9", "1.2.3GB", "99999999TB"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
    }
}
