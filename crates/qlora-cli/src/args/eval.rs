//! `qlora eval`.

use std::path::PathBuf;

use clap::{Args, Parser, ValueEnum};

use super::{ModelArgs, SamplingArgs, WritingArgs};

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Metric {
    /// Loss, perplexity and accuracy of the tokens that training would learn
    Loss,
    /// Answers that are the row's last answer, white space at the ends left out
    Exact,
    /// Answers in which --regex finds what it finds in the row's last answer
    Regex,
}

/// `qlora eval`.
#[derive(Debug, Args)]
#[command(after_help = "\
Rows are read and labelled as training would: an adapter's with the template, system prompt and variables that lie beside it,
the base's like those of the first adapter. The loss is the mean over learned tokens, as in `qlora train`.

Answers continue the tokens before a row's last answer. --regex compares the first group of the first match, or the match
where there is no group; numbers are compared as numbers. Examples: '####\\s*(-?[\\d,.]+)', '(-?\\d+)\\D*$'.

What stands behind +- is the standard error over rows.")]
pub struct EvalArgs {
    /// The model.
    #[command(flatten)]
    pub base: ModelArgs,
    /// An adapter, a folder or a hub id, and the name of its column; may be repeated
    #[arg(long, value_name = "[NAME=]DIR")]
    pub adapter: Vec<String>,
    /// Leave the base without an adapter out
    #[arg(long, requires = "adapter")]
    pub no_base: bool,
    /// The rows: a file of JSON lines, a JSON array, CSV, TSV or Parquet, a folder, a glob or a hub id
    #[arg(long, value_name = "ROWS")]
    pub data: PathBuf,
    /// The split of a folder or hub id, or a part of the rows, such as "test[:10%]"
    #[arg(long)]
    pub split: Option<String>,
    /// The configuration of a hub id that has several
    #[arg(long)]
    pub subset: Option<String>,
    /// The first rows only
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: Option<u32>,
    /// Layout of the rows: auto, chat, prompt_completion, alpaca or text
    #[arg(long, default_value = "auto")]
    pub format: String,
    /// Which tokens the loss counts: assistant or all
    #[arg(long, default_value = "assistant", value_name = "WHICH")]
    pub loss_on: String,
    /// Longer rows are cut to this many tokens; give what the adapter was trained with
    #[arg(long, default_value_t = 2048, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(2..))]
    pub max_length: u32,
    /// What is measured, separated by commas; left out, the loss, and with --regex what it compares
    #[arg(long, value_delimiter = ',', value_name = "WHAT")]
    pub metric: Vec<Metric>,
    /// A regular expression that finds what is compared in an answer
    #[arg(long, value_name = "PATTERN")]
    pub regex: Option<String>,
    /// Write the figures, and what was run, as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write what came of each row, JSONL
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Replace files that exist
    #[arg(long)]
    pub force: bool,
    /// Rows that are run at once at most
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_batch: u32,
    /// How conversations are written.
    #[command(flatten)]
    pub writing: WritingArgs,
    /// How tokens are chosen.
    #[command(flatten)]
    pub choice: SamplingArgs,
}

impl EvalArgs {
    /// What is measured.
    pub fn metrics(&self) -> Vec<Metric> {
        match (self.metric.as_slice(), &self.regex) {
            ([], None) => vec![Metric::Loss],
            ([], Some(_)) => vec![Metric::Loss, Metric::Regex],
            (given, _) => given.to_vec(),
        }
    }
}

impl SamplingArgs {
    /// Whether no flag is given that changes anything.
    pub fn is_default(&self) -> bool {
        #[derive(Parser)]
        struct Alone {
            #[command(flatten)]
            choice: SamplingArgs,
        }
        Alone::try_parse_from(["qlora"]).is_ok_and(|alone| alone.choice == *self)
    }
}
