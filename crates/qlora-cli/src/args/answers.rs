//! What the commands share that let a model answer, and `qlora generate`.

use std::path::PathBuf;

use burn_qlora::qlora_serve::Sampling;
use clap::{ArgGroup, Args};

use super::whole;
use crate::exit::UsageError;

/// The model, and where it runs.
#[derive(Clone, Debug, Default, Args)]
pub struct ModelArgs {
    /// The base model: a folder or a hub id; left out, the one that the first adapter names
    #[arg(long)]
    pub model: Option<String>,
    /// Branch, tag or commit of a hub id
    #[arg(long)]
    pub revision: Option<String>,
    /// Where to run: auto (the default), cpu, cuda, cuda:1, vulkan or metal
    #[arg(long)]
    pub device: Option<String>,
    /// How to keep the base's linear layers: nf4 (the default), fp4 or none
    #[arg(long, value_name = "TYPE")]
    pub quant_type: Option<String>,
    /// Dtype of activations: auto (the default), f32, bf16 or f16
    #[arg(long, value_name = "DTYPE")]
    pub compute_dtype: Option<String>,
    /// Where the base's 4-bit weights are: auto (the default: on the device, as far as they fit), device or host
    #[arg(long, value_name = "WHERE")]
    pub residency: Option<String>,
    /// What the base's weights may take of the device's memory, such as 15GiB
    #[arg(long, value_name = "SIZE")]
    pub device_budget: Option<String>,
    /// Pass over a key of the model's config.json that is not known and may change what it computes; may be repeated
    #[arg(long, value_name = "NAME")]
    pub accept_key: Vec<String>,
}

/// How prompts are written.
#[derive(Debug, Default, Args)]
pub struct PromptArgs {
    /// The conversation.
    #[command(flatten)]
    pub writing: WritingArgs,
    /// Give the prompt to the model as it is, without the chat template
    #[arg(long, conflicts_with_all = ["system", "chat_template", "template_kwarg"])]
    pub no_chat_template: bool,
}

/// How conversations are written.
#[derive(Debug, Default, Args)]
pub struct WritingArgs {
    /// A system message before the prompt
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// A Jinja chat template, or a file with one, in place of the adapter's or the model's
    #[arg(long, value_name = "FILE|TEXT")]
    pub chat_template: Option<String>,
    /// A variable for the chat template, such as enable_thinking=true; may be repeated
    #[arg(long, value_name = "NAME=VALUE")]
    pub template_kwarg: Vec<String>,
}

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq, Args)]
pub struct SamplingArgs {
    /// Tokens to generate at most
    #[arg(long, default_value_t = 256, value_name = "TOKENS", value_parser = whole::<usize>)]
    pub max_new_tokens: usize,
    /// 0 takes the likeliest token; higher is more varied
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f64,
    /// Choose among this many of the likeliest tokens; 0 for all
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = whole::<usize>)]
    pub top_k: usize,
    /// Choose among the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f64,
    /// Choose among tokens with at least this part of the likeliest one's probability
    #[arg(long, default_value_t = 0.0)]
    pub min_p: f64,
    /// Divide the logits of tokens that are in prompt or answer by this; 1 for none
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    pub repetition_penalty: f64,
    /// Take this off the logits of tokens that are in the answer
    #[arg(long, default_value_t = 0.0, value_name = "PENALTY", allow_negative_numbers = true)]
    pub presence_penalty: f64,
    /// Take this off the logits of tokens that are in the answer, once for each time
    #[arg(long, default_value_t = 0.0, value_name = "PENALTY", allow_negative_numbers = true)]
    pub frequency_penalty: f64,
    /// End the answer before this text; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Seed of the choice
    #[arg(long, default_value_t = 0, value_parser = whole::<u64>)]
    pub seed: u64,
}

impl SamplingArgs {
    /// The first setting that is out of its range, by its flag without the hyphens, and what is allowed: what `qlora serve`
    /// takes.
    pub fn out_of_range(&self) -> Option<(&'static str, &'static str)> {
        let settings = [
            ("max-new-tokens", self.max_new_tokens > 0, "1 or more"),
            ("temperature", (0.0..=2.0).contains(&self.temperature), "from 0 to 2"),
            ("top-p", self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1"),
            ("min-p", (0.0..=1.0).contains(&self.min_p), "from 0 to 1"),
            (
                "repetition-penalty",
                self.repetition_penalty > 0.0 && self.repetition_penalty <= 10.0,
                "above 0 and at most 10",
            ),
            ("presence-penalty", (-2.0..=2.0).contains(&self.presence_penalty), "from -2 to 2"),
            ("frequency-penalty", (-2.0..=2.0).contains(&self.frequency_penalty), "from -2 to 2"),
            ("stop", self.stop.iter().all(|text| !text.is_empty()), "a text that is not empty"),
        ];
        settings.into_iter().find(|(_, is_allowed, _)| !is_allowed).map(|(flag, _, allowed)| (flag, allowed))
    }

    /// What the engine is told.
    ///
    /// # Errors
    /// A flag is out of its range.
    pub fn sampling(&self) -> Result<Sampling, UsageError> {
        if let Some((flag, allowed)) = self.out_of_range() {
            return Err(UsageError(format!("--{flag} must be {allowed}")));
        }
        Ok(Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: Vec::new(),
            seed: self.seed,
        })
    }
}

/// `qlora generate`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("asked").args(["prompt", "prompts"]).required(true)))]
#[command(after_help = "\
An adapter that qlora trained is prompted as its rows were written: with its chat template, system prompt and template
variables, as an Alpaca instruction, or with the prompt as it is.

A file of prompts has one JSON object a line, with a `prompt` or a conversation's `messages`. Each is written out again with
its `answer`, its `finish_reason` (stop or length) and the `usage` in tokens, in the order of the file.")]
pub struct GenerateArgs {
    /// The model.
    #[command(flatten)]
    pub base: ModelArgs,
    /// An adapter, a folder or a hub id, with the weight of its update (1 if left out); may be repeated, and the updates
    /// add up
    #[arg(long, value_name = "[NAME=]DIR[:WEIGHT]")]
    pub adapter: Vec<String>,
    /// How several adapters are combined: cat (exact), svd (best of the largest rank) or linear (sums of the factors)
    #[arg(long, default_value = "cat", value_name = "HOW")]
    pub combine: String,
    /// Answer with each adapter by itself, one after the other on one base, instead of combining them
    #[arg(long, requires = "adapter", conflicts_with_all = ["combine", "prompts"])]
    pub each: bool,
    /// The prompt; `-` reads it from the standard input
    #[arg(long)]
    pub prompt: Option<String>,
    /// A file of prompts, JSONL, answered many at once
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Answers that are written at once at most
    #[arg(long, default_value_t = 64, value_name = "N", requires = "prompts",
        value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_batch: u32,
    /// How the prompt is written.
    #[command(flatten)]
    pub prompting: PromptArgs,
    /// How tokens are chosen.
    #[command(flatten)]
    pub choice: SamplingArgs,
}
