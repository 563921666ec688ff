//! The command line: commands, flags and their help.

mod answers;
mod chat;
mod eval;
mod export;
mod push;
mod serve;

use std::path::PathBuf;

use burn_qlora::profile::{Profile, Window};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

pub use answers::{GenerateArgs, ModelArgs, SamplingArgs, WritingArgs};
pub use chat::ChatArgs;
pub use eval::{EvalArgs, Metric};
pub use export::{
    AdapterArgs, BnbArgs, CombineArgs, ConvertArgs, Format, GptqArgs, How, MergeArgs, MergeInto, QuantFormat,
    QuantizeArgs,
};
pub use push::PushArgs;
pub use serve::ServeArgs;

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed while running (device, memory, disk)
  2    the command line or the configuration is wrong
  3    the data, the checkpoint or the adapter can't be used
  4    another rank of the run failed, which says why
  130  interrupted; `qlora train` has saved a checkpoint to resume from, the others have written nothing";

/// Fine-tunes 4-bit language models with LoRA (QLoRA).
#[derive(Debug, Parser)]
#[command(name = "qlora", version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

impl Cli {
    /// What the program was started with. A mistake is told, and ends it.
    pub fn of_program() -> Self {
        let matches = Self::numbers_command().get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.format(&mut Self::numbers_command()).exit())
    }

    /// The command line, where a number below zero is a flag's value: it is refused for what it is, not as a flag that
    /// does not exist.
    fn numbers_command() -> clap::Command {
        let takes_value = |arg: &clap::Arg| !arg.is_positional() && arg.get_action().takes_values();
        let numbers = move |arg: clap::Arg| if takes_value(&arg) { arg.allow_negative_numbers(true) } else { arg };
        Self::command().mut_subcommands(move |command| command.mut_args(numbers))
    }
}

/// Reads a number that counts something.
fn whole<T: std::str::FromStr>(text: &str) -> Result<T, String> {
    text.parse().map_err(|_| "must be a whole number, 0 or more".into())
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Train an adapter as a configuration says
    Train(Box<TrainArgs>),
    /// Show rows as they are trained, and what an epoch of them is
    Preview(PreviewArgs),
    /// Write a commented configuration that documents every key
    Init(InitArgs),
    /// Let a model, with or without an adapter, answer a prompt
    Generate(Box<GenerateArgs>),
    /// Talk with a model and its adapters in the terminal
    Chat(Box<ChatArgs>),
    /// Measure a model and its adapters on rows: loss, perplexity, right answers
    Eval(Box<EvalArgs>),
    /// Answer over HTTP with a model and any number of adapters, many requests at once
    Serve(Box<ServeArgs>),
    /// Add adapters to their base: a checkpoint that needs no adapter
    Merge(MergeArgs),
    /// Make one adapter of several
    Combine(CombineArgs),
    /// Write a checkpoint in 4 bits, for bitsandbytes or as GPTQ
    Quantize(QuantizeArgs),
    /// Write a model or an adapter for llama.cpp
    Convert(ConvertArgs),
    /// Upload an adapter or a model to the hub, with a model card
    Push(PushArgs),
    /// Say what a checkpoint, an adapter, a training checkpoint, a run's folder or a GGUF file is
    Inspect(InspectArgs),
    /// Look at cards, libraries, memory, folders and the launcher: what would stop a run, and what to do
    Doctor(DoctorArgs),
    /// Write the completions of a shell, to be sourced by it
    Completions(CompletionsArgs),
    /// Write the manual page, or those of all commands into a folder
    Man(ManArgs),
}

/// `qlora train`.
#[derive(Debug, Args)]
#[command(after_help = "\
Flags override the configuration; --set reaches every key, e.g. --set lora.use_rslora=true.
`qlora init` writes a configuration that documents them all.

Under torchrun, mpirun or srun each process is a rank; a step has gradient_accumulation_steps micro-batches of each.

An output folder that holds a run is refused unless --resume or --overwrite says what is to happen to it.

Ctrl-C finishes the step, saves a checkpoint and exits with 130; a second Ctrl-C stops at once.")]
pub struct TrainArgs {
    /// The configuration, a TOML file
    pub config: PathBuf,
    /// Say what would be trained, how large it is and what the data is like, and stop
    #[arg(long)]
    pub dry_run: bool,
    /// Train on this many cards of this host, a process each; on the CPU the processes share its cores
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub gpus: Option<u32>,
    /// Go on from a training checkpoint: the newest in the output folder, or the one given; auto-or-start begins where there is none
    #[arg(long, value_name = "auto|auto-or-start|PATH", num_args = 0..=1, default_missing_value = "auto")]
    pub resume: Option<String>,
    /// Remove the run that lies in the output folder, and start over
    #[arg(long)]
    pub overwrite: bool,
    /// Resume although settings, rows or the base changed since the checkpoint; each difference is told
    #[arg(long, requires = "resume")]
    pub accept_changes: bool,
    /// Any key of the configuration; may be repeated
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// Write where the time of a few steps goes: a trace that Perfetto opens, and tables at the end
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    pub profile: Option<PathBuf>,
    /// How many steps, beginning with the third
    #[arg(long, value_name = "STEPS", default_value_t = 3, requires = "profile",
        value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub profile_steps: u32,
    /// What is told meanwhile.
    #[command(flatten)]
    pub voice: TrainVoice,
    /// The flags that stand for a key.
    #[command(flatten)]
    pub keys: KeyFlags,
}

/// What a run tells meanwhile.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct TrainVoice {
    /// Say nothing but warnings and errors, and at the end what came of it
    #[arg(long)]
    pub quiet: bool,
    /// One JSON object a line on stdout for what happens, with the keys of metrics.jsonl and summary.json, instead of bar and text
    #[arg(long, conflicts_with_all = ["quiet", "dry_run", "profile"])]
    pub json: bool,
}

impl TrainArgs {
    /// Steps before those that are profiled: in the first, kernels are compiled.
    const PROFILE_SKIPS: usize = 2;

    /// The profile that is asked for, not begun yet.
    pub fn profile(&self) -> Option<Profile> {
        let window = Window { skip: Self::PROFILE_SKIPS, steps: self.profile_steps as usize };
        self.profile.as_ref().map(|_| Profile::new(window))
    }
}

/// `qlora preview`.
#[derive(Debug, Args)]
#[command(after_help = "\
Learned tokens are green; without colour (NO_COLOR, or output to a file) they are marked beneath. Control characters of the data are shown
as pictures.")]
pub struct PreviewArgs {
    /// The configuration, a TOML file
    pub config: PathBuf,
    /// How many rows to show
    #[arg(long, default_value_t = 5, value_parser = whole::<usize>)]
    pub rows: usize,
    /// Rows drawn with this seed instead of the first ones
    #[arg(long, value_name = "SEED", value_parser = whole::<u64>)]
    pub random: Option<u64>,
    /// A line for each token, with its id
    #[arg(long)]
    pub ids: bool,
    /// The evaluation rows instead of the training rows
    #[arg(long)]
    pub eval_rows: bool,
    /// Write a page to look at in a browser, too
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Replace a page that exists
    #[arg(long, requires = "html")]
    pub force: bool,
    /// One JSON object on stdout instead of text
    #[arg(long, conflicts_with = "ids")]
    pub json: bool,
    /// Any key of the configuration; may be repeated
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    pub set: Vec<String>,
    /// The flags that stand for a key.
    #[command(flatten)]
    pub keys: KeyFlags,
}

/// Flags for the keys that are changed most.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Keys of the configuration")]
pub struct KeyFlags {
    /// device: auto, cpu, cuda, cuda:1, vulkan or metal
    #[arg(long)]
    pub device: Option<String>,
    /// model.path: a folder or a hub id
    #[arg(long)]
    pub model: Option<String>,
    /// data.train: the training rows: a file of JSON lines, a JSON array, CSV, TSV or Parquet, a folder, a glob or a hub id
    #[arg(long, value_name = "ROWS")]
    pub data: Option<String>,
    /// data.eval: the evaluation rows, as data.train
    #[arg(long, value_name = "ROWS")]
    pub eval: Option<String>,
    /// data.max_length
    #[arg(long, value_name = "TOKENS")]
    pub max_length: Option<String>,
    /// quantization.quant_type: nf4, fp4 or none
    #[arg(long, value_name = "TYPE")]
    pub quant_type: Option<String>,
    /// lora.rank
    #[arg(long)]
    pub rank: Option<String>,
    /// lora.alpha
    #[arg(long)]
    pub alpha: Option<String>,
    /// train.output_dir
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<String>,
    /// train.epochs
    #[arg(long)]
    pub epochs: Option<String>,
    /// train.max_steps
    #[arg(long, value_name = "STEPS")]
    pub max_steps: Option<String>,
    /// train.batch_size
    #[arg(long, value_name = "ROWS")]
    pub batch_size: Option<String>,
    /// train.gradient_accumulation_steps
    #[arg(long, value_name = "N")]
    pub gradient_accumulation_steps: Option<String>,
    /// train.learning_rate
    #[arg(long, value_name = "LR")]
    pub learning_rate: Option<String>,
    /// train.seed
    #[arg(long)]
    pub seed: Option<String>,
    /// Pass over a key of the model's config.json that is not known and may change what it computes; may be repeated
    #[arg(long, value_name = "NAME", help_heading = "Options")]
    pub accept_key: Vec<String>,
}

impl KeyFlags {
    /// The keys that are set, with their values.
    pub fn overrides(&self) -> impl Iterator<Item = (&'static str, &str)> {
        [
            ("device", &self.device),
            ("model.path", &self.model),
            ("data.train", &self.data),
            ("data.eval", &self.eval),
            ("data.max_length", &self.max_length),
            ("quantization.quant_type", &self.quant_type),
            ("lora.rank", &self.rank),
            ("lora.alpha", &self.alpha),
            ("train.output_dir", &self.output_dir),
            ("train.epochs", &self.epochs),
            ("train.max_steps", &self.max_steps),
            ("train.batch_size", &self.batch_size),
            ("train.gradient_accumulation_steps", &self.gradient_accumulation_steps),
            ("train.learning_rate", &self.learning_rate),
            ("train.seed", &self.seed),
        ]
        .into_iter()
        .filter_map(|(key, value)| value.as_deref().map(|value| (key, value)))
    }
}

/// `qlora init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Where to write it; `-` is the standard output
    #[arg(default_value = "qlora.toml")]
    pub path: PathBuf,
    /// Say what another trainer's configuration says: Axolotl's or LLaMA-Factory's YAML, or a PEFT adapter_config.json
    #[arg(long, value_name = "FILE")]
    pub from: Option<PathBuf>,
    /// Replace a file that exists
    #[arg(long)]
    pub force: bool,
}

/// `qlora completions`.
#[derive(Debug, Args)]
#[command(after_help = "\
bash:  qlora completions bash > ~/.local/share/bash-completion/completions/qlora
zsh:   qlora completions zsh > a folder of $fpath, named _qlora
fish:  qlora completions fish > ~/.config/fish/completions/qlora.fish")]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// `qlora man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// A folder for the pages of all commands, qlora.1, qlora-train.1 and so on; without it the first goes to the standard output
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
}

/// `qlora inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// A checkpoint's, an adapter's, a training checkpoint's or a run's folder, or a safetensors or GGUF file
    pub path: PathBuf,
    /// List every tensor instead of summing up layers
    #[arg(long)]
    pub tensors: bool,
    /// One JSON object on stdout instead of text
    #[arg(long)]
    pub json: bool,
}

/// `qlora doctor`.
#[derive(Debug, Args)]
#[command(after_help = "\
Started as a run would be (under torchrun, mpirun or srun, with its variables), it looks at the way to rank 0 as well; one process of each host
looks at the host. The exit code is 1 where something would stop a run.")]
pub struct DoctorArgs {
    /// Write JSON, for programs
    #[arg(long)]
    pub json: bool,
    /// Only list graphics adapters, as `doctor` has another process do
    #[arg(long, hide = true)]
    pub adapters: bool,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::numbers_command().debug_assert();
    }

    /// A flag that was added to the struct but not to the list would do nothing.
    #[test]
    fn every_key_flag_reaches_its_key() {
        let command = Cli::command();
        let train = command.find_subcommand("train").unwrap();
        let heading = Some("Keys of the configuration");
        let flags =
            train.get_arguments().filter(|arg| arg.get_help_heading() == heading).filter_map(|arg| arg.get_long());
        let flags: Vec<String> = flags.map(|flag| format!("--{flag}=7")).collect();
        let line = ["qlora", "train", "x.toml"].into_iter().map(str::to_owned).chain(flags.clone());
        let Command::Train(args) = Cli::try_parse_from(line).unwrap().command else { panic!("train") };
        let overrides: Vec<_> = args.keys.overrides().collect();
        assert_eq!(overrides.len(), flags.len());
        let known = burn_qlora::config::known_keys();
        for (key, value) in overrides {
            assert!(known.iter().any(|name| name == key), "{key}");
            assert_eq!(value, "7");
        }
    }

    #[test]
    fn resume_takes_a_path_or_finds_one() {
        let resume = |line: &[&str]| match Cli::try_parse_from(line).unwrap().command {
            Command::Train(args) => args.resume,
            _ => None,
        };
        assert_eq!(resume(&["qlora", "train", "x.toml"]), None);
        assert_eq!(resume(&["qlora", "train", "x.toml", "--resume"]).as_deref(), Some("auto"));
        assert_eq!(resume(&["qlora", "train", "x.toml", "--resume", "a/b"]).as_deref(), Some("a/b"));
    }
}
