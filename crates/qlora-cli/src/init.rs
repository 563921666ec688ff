//! `qlora init`: a commented configuration, or one that says what another trainer's says.

mod data_sets;
mod fill;
mod foreign;
mod layouts;
mod tables;
mod templates;

use std::path::Path;

use anyhow::Result;
use burn_qlora::adapter_io::printable::printable;
use burn_qlora::atomic;
use burn_qlora::config::TEMPLATE;

use crate::args::InitArgs;
use crate::exit::{Code, UsageError};
use crate::output::{print, say, tell};

/// Writes the template.
pub fn run(args: &InitArgs) -> Result<Code> {
    let path = &args.path;
    let (text, left) = match &args.from {
        Some(from) => {
            let translated = foreign::translate(from)?;
            say!("{}: {}", from.display(), translated.summary());
            translated.notes.iter().for_each(|note| say!("  {}", printable(note)));
            (translated.text, translated.missing)
        }
        None => (TEMPLATE.to_owned(), vec!["model.path", "data.train"]),
    };
    if path == Path::new("-") {
        print(&text)?;
        return Ok(Code::Done);
    }
    if path.exists() && !args.force {
        return Err(UsageError(format!("{} exists; --force replaces it", path.display())).into());
    }
    atomic::write_bytes(path, text.as_bytes())?;
    let path = path.display();
    let fill = match left.as_slice() {
        [] => "Look it over".to_owned(),
        keys => format!("Fill in {}", keys.join(" and ")),
    };
    tell(&format!("Wrote {path}. {fill}, then run\n  qlora train {path} --dry-run\n  qlora train {path}\n"));
    Ok(Code::Done)
}
