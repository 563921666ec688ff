//! `qlora init`: a commented configuration.

use std::path::Path;

use anyhow::Result;
use burn_qlora::atomic;
use burn_qlora::config::TEMPLATE;

use crate::args::InitArgs;
use crate::exit::{Code, UsageError};
use crate::output::{print, tell};

/// Writes the template.
pub fn run(args: &InitArgs) -> Result<Code> {
    let path = &args.path;
    if path == Path::new("-") {
        print(TEMPLATE)?;
        return Ok(Code::Done);
    }
    if path.exists() && !args.force {
        return Err(UsageError(format!("{} exists; --force replaces it", path.display())).into());
    }
    atomic::write_bytes(path, TEMPLATE.as_bytes())?;
    let path = path.display();
    tell(&format!(
        "Wrote {path}. Fill in model.path and data.train, then run\n  qlora train {path} --dry-run\n  qlora train {path}\n"
    ));
    Ok(Code::Done)
}
