//! The adapters that a run starts from and compares its model with, and what the reference thinks of its rows.

use std::fs;
use std::path::{Path, PathBuf};

use adapter_io::{Adapter, atomic};
use qlora_data::{Batch, BatchOrder, DataConfig, Dataset};
use qlora_models::Decoder;
use sha2::{Digest as _, Sha256};

use super::parameter_names;
use super::rows::Rows;
use crate::checkpoint::Basis;
use crate::config::{Reference, TrainConfig};
use crate::engine::{ReferenceLogProbs, reference_log_probs};
use crate::error::TrainError;
use crate::events::TrainEvents;
use crate::objective::Preferences;
use crate::ranks::Ranks;

/// An adapter that a configuration names.
pub(super) struct Named {
    key: &'static str,
    dir: PathBuf,
    adapter: Adapter,
}

impl Named {
    /// Loads one from its folder, or from that of the run that left it.
    fn load(key: &'static str, dir: &Path) -> Result<Self, TrainError> {
        let inner = dir.join("adapter");
        let is_run = !dir.join("adapter_config.json").is_file() && inner.join("adapter_config.json").is_file();
        let dir = if is_run { inner } else { dir.to_owned() };
        let adapter = Adapter::load(&dir).map_err(|error| TrainError::StartAdapter {
            key,
            path: dir.clone(),
            problem: error.to_string(),
        })?;
        Ok(Self { key, dir, adapter })
    }

    /// SHA-256 of its tensors by their names, in hexadecimal digits.
    fn hash(&self) -> String {
        let mut hash = Sha256::new();
        for (name, tensor) in &self.adapter.tensors {
            hash.update(format!("{name} {:?}:", tensor.shape));
            tensor.data.iter().for_each(|value| hash.update(value.to_le_bytes()));
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn fail(&self, problem: String) -> TrainError {
        TrainError::StartAdapter { key: self.key, path: self.dir.clone(), problem }
    }

    /// Puts it on a model, as what is trained from now on. It has to be what `[lora]` describes, but for dropout, which is `[lora]`'s.
    pub fn begin(&self, model: &mut Decoder, config: &TrainConfig) -> Result<(), TrainError> {
        let mut fresh = model.clone();
        fresh.attach_lora(&config.lora, config.train.seed)?;
        let dropout = self.adapter.config.lora_dropout;
        let mut adapter = self.adapter.clone();
        adapter.config.lora_dropout = f64::from(config.lora.dropout);
        model.load_adapter(&adapter)?;
        let shapes = |model: &Decoder| -> Vec<(String, [usize; 2])> {
            model.parameters().into_iter().map(|(name, parameter)| (name, parameter.dims())).collect()
        };
        let (asked, there) = (shapes(&fresh), shapes(model));
        if let Some((name, shape)) = asked.iter().find(|entry| !there.contains(entry)) {
            let of_adapter = there.iter().find(|(other, _)| other == name);
            let has = of_adapter.map_or("not".to_string(), |(_, shape)| format!("as {shape:?}"));
            return Err(self.fail(format!(
                "[lora] asks for {name} {shape:?}, which the adapter has {has}: set lora.rank, lora.target_modules and what else [lora] has as its \
                 adapter_config.json says (r = {})",
                self.adapter.config.r
            )));
        }
        if let Some((name, _)) = there.iter().find(|(name, _)| asked.iter().all(|(other, _)| other != name)) {
            return Err(self.fail(format!(
                "it has {name}, which [lora] does not ask for: name its module in lora.target_modules"
            )));
        }
        let scalings = |model: &Decoder| model.adapters().map(|(_, adapter)| adapter.scaling.get()).collect::<Vec<_>>();
        if let Some((asked, there)) = scalings(&fresh)
            .into_iter()
            .zip(scalings(model))
            .find(|(asked, there)| (asked - there).abs() > 1e-6 * asked.abs())
        {
            return Err(self.fail(format!(
                "its factors count {there}, and by [lora] they would count {asked}: set lora.alpha = {} and lora.use_rslora = {}",
                self.adapter.config.lora_alpha, self.adapter.config.use_rslora
            )));
        }
        tracing::debug!(was = dropout, now = config.lora.dropout, "dropout of the adapter that training begins with");
        Ok(())
    }
}

/// The adapters of a configuration that are there before training.
#[derive(Default)]
pub(super) struct Before {
    /// What training begins with.
    pub start: Option<Named>,
    /// What the reference has, where that is another.
    reference: Option<Named>,
}

impl Before {
    /// Loads what the configuration names.
    ///
    /// # Errors
    /// One can't be read, or would be put on weights that the initialisation changes.
    pub fn load(config: &TrainConfig) -> Result<Self, TrainError> {
        let start =
            config.train.from_adapter.as_deref().map(|dir| Named::load("train.from_adapter", dir)).transpose()?;
        let compares = config.train.objective.has_reference();
        let reference = match &config.preference.reference {
            Reference::Adapter(dir) if compares => Some(Named::load("preference.reference", dir)?),
            _ => None,
        };
        if config.lora.init.changes_base(config.lora.loftq_iterations) {
            let init = config.lora.init;
            let problem =
                format!("lora.init = \"{init}\" makes fresh adapters over other weights: set it to \"default\"");
            if let Some(start) = &start {
                return Err(start.fail(problem));
            }
            if compares && !config.preference.precompute_reference {
                return Err(TrainError::ConfigRange {
                    key: "lora.init".into(),
                    value: format!("\"{init}\""),
                    allowed: "would keep the base twice, once changed and once for the reference: set preference.precompute_reference = true, or \
                              lora.init = \"default\""
                        .into(),
                });
            }
        }
        Ok(Self { start, reference })
    }

    /// What they are, for a run that goes on: hashes of their weights.
    pub fn fingerprint(&self) -> Option<String> {
        let named = [&self.start, &self.reference].into_iter().flatten();
        let hashes: Vec<String> = named.map(|named| format!("{} {}", named.key, named.hash())).collect();
        (!hashes.is_empty()).then(|| hashes.join(", "))
    }

    /// The reference over a base without adapters.
    ///
    /// # Errors
    /// Its adapter does not fit the base.
    pub fn reference(&self, mut base: Decoder, config: &TrainConfig) -> Result<Decoder, TrainError> {
        let adapter = match config.preference.reference {
            Reference::Start => self.start.as_ref(),
            Reference::Base => None,
            Reference::Adapter(_) => self.reference.as_ref(),
        };
        if let Some(named) = adapter {
            base.load_adapter(&named.adapter)?;
        }
        tracing::debug!(adapter = parameter_names(&base).len(), "the reference is there");
        Ok(base)
    }
}

/// What the reference thinks of all rows, known ahead.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Known {
    pub train: Vec<ReferenceLogProbs>,
    pub eval: Vec<ReferenceLogProbs>,
}

/// Has a batch bring along what is known of its rows.
pub(super) fn bring(known: &[ReferenceLogProbs], batch: &mut Batch) {
    if let Some(judged) = &mut batch.judged {
        let of = |(row, side): &(usize, usize)| known.get(*row).map(|sides| sides[*side]);
        judged.reference = judged.origins.iter().map_while(of).collect();
    }
}

impl Known {
    /// Computes what the reference thinks of training and evaluation rows, or reads what an earlier start has kept of it.
    ///
    /// # Errors
    /// The device fails, another rank does, or the events ask to stop.
    pub fn compute(
        reference: &Decoder,
        rows: &Rows,
        (config, basis): (&TrainConfig, &Basis),
        preferences: &Preferences,
        (ranks, shared_base): (Option<&Ranks>, bool),
        events: &mut dyn TrainEvents,
    ) -> Result<Self, TrainError> {
        let mut of = |dataset: &Dataset, hash: &str| {
            let file = kept_at(&config.data, basis, config, hash, reference);
            let kept = file.as_deref().and_then(|file| read(file, dataset.examples.len()));
            // Ranks of other hosts have caches of their own.
            let all_have = match ranks {
                Some(ranks) => !ranks.agree(kept.is_none())?,
                None => true,
            };
            if let Some(kept) = kept.filter(|_| all_have) {
                return Ok(kept);
            }
            let (data, count) = (&config.data, dataset.examples.len());
            if count == 0 {
                return Ok(Vec::new());
            }
            events.on_notice(&format!("the reference's log-probabilities of {count} rows are computed ahead"));
            let order = BatchOrder::in_file_order(&dataset.examples, config.train.batch_size, 0);
            let order =
                order.judged(&dataset.judged, &DataConfig { packing: Default::default(), ..data.clone() }, false);
            let known = reference_log_probs(
                reference,
                order.epoch(&dataset.examples, 0),
                preferences,
                ranks,
                shared_base,
                |_, _| if ranks.is_none() && events.should_stop() { Err(TrainError::Stopped) } else { Ok(()) },
            )?;
            if let Some(Err(problem)) = file.map(|file| write(&file, &known)) {
                events.on_warning(&problem);
            }
            Ok::<_, TrainError>(known)
        };
        Ok(Self { train: of(&rows.train, &basis.train_rows)?, eval: of(&rows.eval, &basis.eval_rows)? })
    }
}

/// Where the numbers of these rows are kept: a name made of all that they depend on.
fn kept_at(data: &DataConfig, basis: &Basis, config: &TrainConfig, rows: &str, model: &Decoder) -> Option<PathBuf> {
    let folder = data.cache.folder_of("reference")?;
    let mut hash = Sha256::new();
    let settings = [
        format!("{:?} {:?}", config.quantization, model.dtype()),
        format!("{:?} {:?}", model.device(), config.preference.reference),
        format!("{:?} {:?}", basis.program, basis.base),
        format!("{:?} {rows}", basis.adapters),
    ];
    settings.iter().for_each(|setting| hash.update(format!("{}:{setting}", setting.len())));
    let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Some(folder.join(format!("{name}.logprobs")))
}

/// A file's numbers, behind their SHA-256; `None` if they are not there, of other rows, or damaged.
fn read(file: &Path, rows: usize) -> Option<Vec<ReferenceLogProbs>> {
    let bytes = fs::read(file).ok()?;
    let (sum, values) = bytes.split_at_checked(32)?;
    if values.len() != 8 * rows || Sha256::digest(values)[..] != *sum {
        return None;
    }
    let number = |bytes: &[u8; 4]| f32::from_le_bytes(*bytes);
    Some(values.as_chunks::<4>().0.as_chunks::<2>().0.iter().map(|pair| [number(&pair[0]), number(&pair[1])]).collect())
}

fn write(file: &Path, known: &[ReferenceLogProbs]) -> Result<(), String> {
    let values: Vec<u8> = known.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
    let bytes = [&Sha256::digest(&values)[..], &values].concat();
    let fail = |error: String| {
        format!(
            "the reference's log-probabilities are not kept in {}: {error}; data.cache names another folder, or \"off\"",
            file.display()
        )
    };
    if let Some(folder) = file.parent() {
        fs::create_dir_all(folder).map_err(|error| fail(error.to_string()))?;
    }
    atomic::write_bytes(file, &bytes).map_err(|error| fail(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_are_known_by_their_weights() {
        let reference = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../testdata/reference"));
        let of = |start: &str, other: &str| {
            let mut config = TrainConfig::default();
            config.train.from_adapter = Some(reference.join(start));
            config.train.objective = crate::config::Objective::One(crate::config::Term::Dpo);
            config.preference.reference = Reference::Adapter(reference.join(other));
            Before::load(&config).unwrap().fingerprint().unwrap()
        };
        let both = of("adapters/plain", "qlora/final_adapter_f32");
        assert_eq!(both, of("adapters/plain", "qlora/final_adapter_f32"));
        assert_ne!(both, of("adapters/plain", "qlora/initial_adapter"));
        assert!(both.starts_with("train.from_adapter ") && both.contains(", preference.reference "), "{both}");
        assert_eq!(Before::load(&TrainConfig::default()).unwrap().fingerprint(), None);
        let mut config = TrainConfig::default();
        config.train.from_adapter = Some(reference.join("adapters"));
        let error = Before::load(&config).err().unwrap().to_string();
        assert!(error.starts_with("train.from_adapter = "), "{error}");
    }

    #[test]
    fn what_is_kept_is_read_again_unless_it_is_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a/b.logprobs");
        let known = vec![[-1.5, -2.0], [-0.25, f32::MIN_POSITIVE], [-7.0, 0.0]];
        assert_eq!(read(&file, 3), None);
        write(&file, &known).unwrap();
        assert_eq!(read(&file, 3), Some(known));
        assert_eq!(read(&file, 2), None);
        let mut bytes = fs::read(&file).unwrap();
        bytes[40] ^= 1;
        fs::write(&file, bytes).unwrap();
        assert_eq!(read(&file, 3), None);
    }
}
