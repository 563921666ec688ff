//! What the commands that convert read: adapters, combined as the flags say, and the base they belong to.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use burn_qlora::adapter_io::AdapterConfig;
use burn_qlora::adapter_io::checkpoint::refuse_adapter;
use burn_qlora::adapter_io::printable::printable;
use burn_qlora::chat_text::{CHAT_TEMPLATE_FILE, PROMPT_SETTINGS_FILE};
use burn_qlora::{Adapter, Combination, QuantConfig, QuantType, combine};

use crate::adapters;
use crate::args::{AdapterArgs, How};
use crate::exit::UsageError;
use crate::generate::adapter_argument;
use crate::hub;
use crate::output::say;

/// The adapters of the flags as one, and what says how it is prompted. A single one with the weight 1 stays what it is.
pub fn adapter(args: &AdapterArgs) -> Result<(Adapter, Vec<PathBuf>)> {
    check(args)?;
    let parsed = args.adapters.iter().map(|text| adapter_argument(text)).collect::<Result<Vec<_>, _>>()?;
    let weights: Vec<f64> = parsed.iter().map(|(_, _, weight)| *weight).collect();
    let loaded = parsed.iter().map(|(_, dir, _)| load(dir)).collect::<Result<Vec<_>>>()?;
    let (mut adapters, companions): (Vec<Adapter>, Vec<_>) = loaded.into_iter().unzip();
    let companions = companions.into_iter().find(|files| !files.is_empty()).unwrap_or_default();
    if let ([_], [1.0]) = (&adapters[..], &weights[..]) {
        return Ok((adapters.remove(0), companions));
    }
    let how = match args.combine {
        How::Cat => Combination::Cat,
        How::Linear => Combination::Linear,
        How::Svd => Combination::Svd { rank: args.svd_rank },
    };
    let pairs: Vec<(&Adapter, f64)> = adapters.iter().zip(weights).collect();
    let mut combined = combine(&pairs, how)?;
    let bases: Vec<_> = adapters.iter().map(|adapter| &adapter.config.base_model_name_or_path).collect();
    if bases.iter().any(|base| *base != bases[0]) {
        // Each names another base; which of them is meant is the caller's to say.
        combined.config.base_model_name_or_path = None;
    }
    Ok((combined, companions))
}

/// Reads one adapter, and finds what lies beside it and says how it is prompted.
pub fn load(name: &str) -> Result<(Adapter, Vec<PathBuf>)> {
    let dir = adapters::folder(name)?;
    let adapter = Adapter::load(&dir)?;
    warn_of_missing(name, &adapter);
    let files = [CHAT_TEMPLATE_FILE, PROMPT_SETTINGS_FILE].map(|file| dir.join(file));
    Ok((adapter, files.into_iter().filter(|path| path.is_file()).collect()))
}

/// Says so when an adapter has no weights for modules that its configuration names.
pub fn warn_of_missing(name: &str, adapter: &Adapter) {
    let missing = adapter.missing_targets();
    if !missing.is_empty() {
        let names = printable(&missing.join(", ")).into_owned();
        say!("warning: {name} has no weights for {names}, which its configuration names: they stay the base's");
    }
}

fn check(args: &AdapterArgs) -> Result<(), UsageError> {
    match args.svd_rank {
        Some(_) if args.combine != How::Svd => Err(UsageError("--svd-rank belongs to --combine svd".into())),
        Some(0) => Err(UsageError("--svd-rank must be 1 or more".into())),
        _ => Ok(()),
    }
}

/// The base that an adapter names.
#[derive(Clone, Debug, Default)]
pub struct NamedBase {
    /// A hub id, or a folder.
    pub name: Option<String>,
    /// Its branch, tag or commit.
    pub revision: Option<String>,
}

impl NamedBase {
    /// The one of an adapter's configuration.
    pub fn of(config: &AdapterConfig) -> Self {
        let name = config.base_model_name_or_path.clone().filter(|name| !name.is_empty());
        Self { name, revision: config.revision.clone() }
    }

    /// The revision of the base that was chosen: what the flags give, or else what the adapter names with it. A base that is another
    /// than the adapter's is told.
    pub fn revision<'a>(&'a self, chosen: &str, given: Option<&'a str>) -> Option<&'a str> {
        let last = |name: &str| name.trim_end_matches('/').rsplit('/').next().map(str::to_owned);
        let Some(named) = &self.name else { return given };
        if last(named) != last(chosen) {
            say!("note: the adapter was trained on {}", printable(named));
            return given;
        }
        match (given, self.revision.as_deref()) {
            (Some(given), Some(own)) if given != own => {
                say!("note: the adapter was trained on revision {} of {}", printable(own), printable(named));
                Some(given)
            }
            // A folder has no revisions.
            (None, own) if !Path::new(chosen).exists() => own,
            (given, _) => given,
        }
    }
}

/// The folder of the base: the model that is named, or else the one that the adapter names.
pub fn base(model: Option<&str>, revision: Option<&str>, adapter: Option<&Adapter>) -> Result<PathBuf> {
    let named = adapter.map(|adapter| NamedBase::of(&adapter.config)).unwrap_or_default();
    let chosen = model.or(named.name.as_deref()).filter(|name| !name.is_empty()).ok_or_else(|| {
        UsageError("the adapter names no base model, or several name different ones: give --model".into())
    })?;
    let dir = hub::resolve(chosen, named.revision(chosen, revision));
    let dir = match model {
        None => dir.context("can't find the base model that the adapter names; --model gives another place")?,
        Some(_) => dir?,
    };
    refuse_adapter(&dir)?;
    Ok(dir)
}

/// The 4-bit form that the flags describe.
pub fn four_bit(quant_type: &str, no_double_quant: bool) -> Result<QuantConfig, UsageError> {
    let quant_type = match quant_type.to_ascii_lowercase().as_str() {
        "nf4" => QuantType::Nf4,
        "fp4" => QuantType::Fp4,
        other => return Err(UsageError(format!("--quant-type {other}: must be nf4 or fp4"))),
    };
    Ok(QuantConfig { quant_type, double_quant: !no_double_quant, ..QuantConfig::default() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_adapters_revision_is_taken_unless_another_is_given() {
        let named = |name: &str| NamedBase { name: Some(name.into()), revision: Some("v2".into()) };
        let of_hub = named("org/base");
        assert_eq!(of_hub.revision("org/base", None), Some("v2"));
        assert_eq!(of_hub.revision("org/base", Some("v3")), Some("v3"));
        assert_eq!(of_hub.revision("mirror/base/", None), Some("v2"));
        // Another model has revisions of its own, and a folder has none.
        assert_eq!(of_hub.revision("org/other", None), None);
        assert_eq!(named("src").revision("src", None), None);
        assert_eq!(NamedBase::default().revision("org/base", Some("v1")), Some("v1"));
    }
}
