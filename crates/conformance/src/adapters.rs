//! Section `adapters`: PEFT adapters of each kind (`adapters/<kind>/`, `adapters/logits.safetensors`), and the same of each architecture
//! (`archs/<name>/adapters/`).
//!
//! The files of every kind are loaded and saved again, and must be the same bytes (errors count the
//! files that are not), unless the kind's name begins with `other_`: such files are as PEFT reads and does not write them. Then each is put on the f32 base, its logits are compared, absolute, per logit, and what the
//! decoder hands out again is compared with the file: the same tensors and the same configuration.
//!
//! The bar is 1e-4, unless f32 itself is coarser: recorded adapters are random, and one with a large
//! scaling amplifies rounding. How much is measured: the logits of the same adapter merged into the
//! weights are equal but for rounding, and the recorded ones may be twice as far from ours as those,
//! up to five times the bar. (A NumPy evaluation in f64 shows recorded logits up to 8e-5 off.)
//!
//! An adapter that uses something this workspace refuses by name is skipped with that reason.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use burn::tensor::{Device, FloatDType};
use burn_qlora::adapter_io::Adapter;
use burn_qlora::qlora_models::{Decoder, LoadOptions, ModelError};

use crate::compare::max_abs_diff;
use crate::logits::{DENSE_BAR, logits};
use crate::reference::dims;
use crate::{Reference, Report};

/// Compares every adapter of `adapters/` and of `archs/*/adapters/`.
///
/// # Errors
/// A file cannot be read, or a base cannot be loaded.
pub fn cases(reference: &Reference, device: &Device, report: &mut Report) -> Result<()> {
    let archs = match reference.find("archs") {
        Some(_) => reference.folders("archs")?,
        None => Vec::new(),
    };
    let of_archs = archs.iter().map(|name| (format!("archs/{name}/adapters"), format!("adapters of {name}")));
    let all = [("adapters".to_string(), "adapters".to_string())].into_iter().chain(of_archs);
    let mut found = 0;
    for (folder, subject) in all.filter(|(folder, _)| reference.find(folder).is_some()) {
        found += of_folder(reference, &folder, &subject, device, report)?;
    }
    if found == 0 {
        report.skip("adapters", "no adapters/*/adapter_config.json");
    }
    Ok(())
}

/// Compares the adapters of a folder, and returns how many there are.
fn of_folder(reference: &Reference, folder: &str, title: &str, device: &Device, report: &mut Report) -> Result<usize> {
    let kinds = reference.folders(folder)?;
    let is_adapter = |kind: &&String| reference.find(&format!("{folder}/{kind}/adapter_config.json")).is_some();
    let kinds: Vec<&String> = kinds.iter().filter(is_adapter).collect();
    let logits_file = format!("{folder}/logits.safetensors");
    let recorded = reference.find(&logits_file).map(|_| reference.tensors(&logits_file)).transpose()?;
    // An architecture's adapters are on its model.
    let of_arch = folder.strip_suffix("/adapters").map(|arch| reference.path(arch));
    let mut base: Option<(String, Decoder)> = None;
    let count = kinds.len();
    for kind in kinds {
        let subject = format!("{title} {kind}");
        let path = reference.path(&format!("{folder}/{kind}"));
        let adapter = match Adapter::load(&path) {
            Ok(adapter) => adapter,
            Err(error) => {
                report.fail(subject, &error.to_string());
                continue;
            }
        };
        if !kind.starts_with("other_") {
            round_trip(&path, &adapter, &subject, report)?;
        }
        let name = format!("{subject}: logits");
        let Some(view) = recorded.as_ref().and_then(|file| file.get(&format!("logits.{kind}"))) else {
            report.skip(name, format!("no logits.{kind} in {logits_file}"));
            continue;
        };
        let Some(input) = recorded.as_ref().and_then(|file| file.get("input_ids")) else {
            report.fail(name, &format!("no input_ids in {logits_file}"));
            continue;
        };
        let base_name = adapter.config.base_model_name_or_path.clone().unwrap_or_default();
        if base.as_ref().is_none_or(|(loaded, _)| *loaded != base_name) {
            let Some(dir) = of_arch.clone().map_or_else(|| reference.base_model(&base_name), |dir| Ok(Some(dir)))?
            else {
                report.skip(name, format!("its base `{base_name}` is not in the folder"));
                continue;
            };
            let options = LoadOptions { quantization: None, dtype: FloatDType::F32 };
            base = Some((base_name.clone(), Decoder::load(&dir, options, device, &mut |_| ())?));
        }
        let Some((_, decoder)) = &mut base else { continue };
        match decoder.load_adapter(&adapter) {
            Ok(()) => {}
            Err(error @ ModelError::AdapterFeature { .. }) => {
                report.skip(name, error.to_string());
                continue;
            }
            Err(error) => {
                report.fail(name, &error.to_string());
                continue;
            }
        }
        if !kind.starts_with("other_") {
            let again = decoder.export_adapter(&base_name, adapter.config.revision.as_deref())?;
            report.compare(format!("{subject}: handed out again"), f64::from(again != adapter), 0.0);
        }
        let [rows, _] = dims(&input)?;
        let ids = input.to_i64_vec()?;
        let ours = logits(decoder, &ids, rows, &view)?;
        let mut merged = decoder.clone();
        merged.merge_adapters()?;
        let rounding = max_abs_diff(&ours, &logits(&merged, &ids, rows, &view)?);
        let bar = (2.0 * rounding).clamp(DENSE_BAR, 5.0 * DENSE_BAR);
        report.compare_noted(
            name,
            max_abs_diff(&ours, &view.to_f32_vec()?),
            bar,
            format!("merged it differs by {rounding:.2e}"),
        );
    }
    Ok(count)
}

/// What is written is what was read: key order, number formats, tensor layout and all.
fn round_trip(dir: &Path, adapter: &Adapter, subject: &str, report: &mut Report) -> Result<()> {
    let out = tempfile::tempdir()?;
    adapter.save(out.path())?;
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        let path = dir.join(name);
        let theirs = fs::read(&path).with_context(|| path.display().to_string())?;
        let ours = fs::read(out.path().join(name))?;
        report.compare(format!("{subject}: {name} saved again"), f64::from(ours != theirs), 0.0);
    }
    Ok(())
}
