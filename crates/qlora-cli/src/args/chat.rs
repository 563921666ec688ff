//! `qlora chat`.

use clap::Args;

use super::{ModelArgs, SamplingArgs, WritingArgs};

/// `qlora chat`.
#[derive(Debug, Args)]
#[command(after_help = "\
What is typed is answered with the conversation so far; an adapter is prompted as its rows were written. A line that ends
with a backslash goes on in the next one, and so do all lines between two of \"\"\". /help lists the commands.

Ctrl-C ends an answer, and at the prompt the program, as Ctrl-D does. Where the standard input is no terminal, its lines are
prompts and commands, only answers are printed, and the first mistake ends the program.")]
pub struct ChatArgs {
    /// The model.
    #[command(flatten)]
    pub base: ModelArgs,
    /// An adapter, a folder or a hub id, and the name by which /adapter and /compare know it; may be repeated. The first
    /// one answers first
    #[arg(long, value_name = "[NAME=]DIR")]
    pub adapter: Vec<String>,
    /// Tokens of a conversation at most; left out, what model and memory have room for
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(2..))]
    pub max_tokens: Option<u32>,
    /// How prompts are written.
    #[command(flatten)]
    pub writing: WritingArgs,
    /// How tokens are chosen.
    #[command(flatten)]
    pub choice: SamplingArgs,
}
