//! `qlora init`: a commented configuration.

use std::io::Write;
use std::path::Path;

use anyhow::Result;
use burn_qlora::atomic;
use burn_qlora::config::TEMPLATE;

use crate::args::InitArgs;
use crate::exit::{Code, UsageError};

/// Writes the template.
pub fn run(args: &InitArgs) -> Result<Code> {
    let path = &args.path;
    if path == Path::new("-") {
        std::io::stdout().write_all(TEMPLATE.as_bytes())?;
        return Ok(Code::Done);
    }
    if path.exists() && !args.force {
        return Err(UsageError(format!("{} exists; --force replaces it", path.display())).into());
    }
    atomic::write_bytes(path, TEMPLATE.as_bytes())?;
    println!("Wrote {}. Fill in model.path and data.train, then run", path.display());
    println!("  qlora train {0} --dry-run\n  qlora train {0}", path.display());
    Ok(Code::Done)
}
