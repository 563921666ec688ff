//! What the commands that convert read: adapters, combined as the flags say, and the base they belong to.

use std::path::PathBuf;

use anyhow::{Context, Result};
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

/// The folder of the base: the model that is named, or else the one that the adapter names.
pub fn base(model: Option<&str>, revision: Option<&str>, adapter: Option<&Adapter>) -> Result<PathBuf> {
    let named = adapter.and_then(|adapter| adapter.config.base_model_name_or_path.as_deref());
    let chosen = model.or(named).filter(|name| !name.is_empty()).ok_or_else(|| {
        UsageError("the adapter names no base model, or several name different ones: give --model".into())
    })?;
    let last = |name: &str| name.trim_end_matches('/').rsplit('/').next().map(str::to_owned);
    if let Some(named) = named.filter(|named| last(named) != last(chosen)) {
        say!("note: the adapter was trained on {named}");
    }
    let dir = hub::resolve(chosen, revision);
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
