//! `qlora completions` and `qlora man`: what clap knows of the command line, for shells and for `man`.

use anyhow::{Context, Result};
use burn_qlora::atomic;
use clap::CommandFactory as _;

use crate::args::{Cli, CompletionsArgs, ManArgs};
use crate::exit::Code;
use crate::output::{print, say};

/// Runs `qlora completions`.
pub fn completions(args: &CompletionsArgs) -> Result<Code> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "qlora", &mut script);
    print(&String::from_utf8(script).context("the script is no UTF-8")?)?;
    Ok(Code::Done)
}

/// Runs `qlora man`.
pub fn man(args: &ManArgs) -> Result<Code> {
    let mut command = Cli::command();
    // Gives each command its whole name.
    command.build();
    let Some(folder) = &args.output else {
        print(&page(&command)?)?;
        return Ok(Code::Done);
    };
    std::fs::create_dir_all(folder).with_context(|| format!("can't make {}", folder.display()))?;
    let mut count = 0;
    for command in std::iter::once(&command).chain(command.get_subcommands().filter(|sub| sub.get_name() != "help")) {
        let name = command.get_display_name().unwrap_or(command.get_name()).to_string();
        atomic::write_bytes(&folder.join(format!("{name}.1")), page(command)?.as_bytes())?;
        count += 1;
    }
    say!("Wrote {count} pages to {}", folder.display());
    Ok(Code::Done)
}

fn page(command: &clap::Command) -> Result<String> {
    let mut text = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut text)?;
    String::from_utf8(text).context("the page is no UTF-8")
}
