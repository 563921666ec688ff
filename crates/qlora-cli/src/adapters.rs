//! Adapters by name, each of which answers by itself.

use std::path::{Path, PathBuf};

use anyhow::Result;
use burn_qlora::{Adapter, checkpoint};

use crate::exit::UsageError;
use crate::generate::adapter_argument;
use crate::hub;
use crate::output::say;
use crate::sources::{NamedBase, warn_of_missing};

/// An adapter that can be asked.
pub struct NamedAdapter {
    /// What it is called.
    pub name: String,
    /// Its folder.
    pub dir: PathBuf,
}

/// The folder of an adapter, which is a folder or a hub id. Of a run's folder it is the adapter that the run left, or, where it has not
/// finished, its newest checkpoint.
pub fn folder(name: &str) -> Result<PathBuf> {
    let dir = hub::resolve(name, None)?;
    let inner = dir.join("adapter");
    let is_adapter = |dir: &Path| dir.join("adapter_config.json").is_file();
    if is_adapter(&dir) {
        return Ok(dir);
    }
    if is_adapter(&inner) {
        return Ok(inner);
    }
    match checkpoint::list(&dir)?.pop() {
        Some((step, newest)) => {
            say!("note: {name} is a run that has not finished: its checkpoint of step {step} is taken");
            Ok(newest)
        }
        None => Ok(dir),
    }
}

/// The adapters of flags that say `[NAME=]DIR`, and the base that the first of them names.
pub fn named(flags: &[String]) -> Result<(Vec<NamedAdapter>, NamedBase)> {
    let (mut adapters, mut base) = (Vec::new(), NamedBase::default());
    for text in flags {
        let (name, dir, weight) = adapter_argument(text)?;
        if weight != 1.0 {
            let problem = "each adapter answers by itself, without a weight; `qlora combine` makes one of several";
            return Err(UsageError(format!("--adapter {text}: {problem}")).into());
        }
        let dir = folder(dir)?;
        let adapter = Adapter::load(&dir)?;
        warn_of_missing(name, &adapter);
        if adapters.is_empty() {
            base = NamedBase::of(&adapter.config);
        }
        adapters.push(NamedAdapter { name: name.to_string(), dir });
    }
    Ok((adapters, base))
}

/// Refuses names that two have, one of which may be the base.
pub fn check_names(adapters: &[NamedAdapter], base: &str) -> Result<(), UsageError> {
    for (index, NamedAdapter { name, .. }) in adapters.iter().enumerate() {
        let problem = match adapters[..index].iter().any(|other| other.name == *name) {
            true => "names two adapters: give one of them",
            false if name == base => "is the base's name: give the adapter",
            false => continue,
        };
        return Err(UsageError(format!("{name:?} {problem} another one, as NAME=DIR")));
    }
    Ok(())
}
