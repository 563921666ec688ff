//! Settings near those of a configuration with which its run fits into the memory that there is.

use crate::checkpointing::{Checkpointing, Room};
use crate::config::TrainConfig;
use crate::error::TrainError;
use crate::plan::{Plan, RowSizes};
use crate::residency::Residency;
use burn::tensor::FloatDType;
use paged_optim::OptimizerKind;
use qlora_data::Packing;
use qlora_models::ModelConfig;

/// Lengths that are tried are multiples of so many tokens.
const TOKENS: usize = 64;

/// Settings with which a run fits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Keys and values, as `--set` takes them.
    pub settings: Vec<(&'static str, String)>,
    /// Bytes that the run then takes at most at a time.
    pub bytes: u64,
    /// What else it changes, in words; empty where the training stays the same.
    pub effect: &'static str,
}

struct Search<'a> {
    config: &'a TrainConfig,
    model: &'a ModelConfig,
    dtype: FloatDType,
    room: &'a Room,
    /// Bytes that there are.
    limit: u64,
    /// The run's rows.
    sizes: &'a RowSizes,
}

/// The nearest settings with which the run of `config` fits, where it does not: each setting that is enough alone, or all of them
/// together. Empty when the run fits, when nobody knows how much room there is, or when no setting is enough.
///
/// # Errors
/// As [`Plan::new`].
pub fn nearest(
    config: &TrainConfig,
    model: &ModelConfig,
    dtype: FloatDType,
    room: &Room,
    sizes: &RowSizes,
) -> Result<Vec<Change>, TrainError> {
    let Some(limit) = room.device.filter(|room| *room < u64::MAX && sizes.longest > 0) else {
        return Ok(Vec::new());
    };
    // Of packed rows a sequence is what a row is otherwise.
    let longest = sizes.longest;
    if Plan::new(config, model, dtype, room, sizes)?.memory.total() <= limit {
        return Ok(Vec::new());
    }
    let search = Search { config, model, dtype, room, limit, sizes };
    let rows = |rows: usize| {
        let times = config.train.batch_size / rows;
        let accumulated = config.train.gradient_accumulation_steps * times;
        vec![("train.batch_size", rows.to_string()), ("train.gradient_accumulation_steps", accumulated.to_string())]
    };
    let smaller = (1..config.train.batch_size).rev().filter(|rows| config.train.batch_size.is_multiple_of(*rows));
    let kept = match config.train.activation_checkpointing {
        Checkpointing::Auto => Vec::new(),
        Checkpointing::Fixed(_) => vec![("train.activation_checkpointing", "auto".to_string())],
    };
    let state = match config.train.optimizer {
        OptimizerKind::AdamW32bit => vec![("train.optimizer", "adamw_8bit".to_string())],
        _ => Vec::new(),
    };
    let paged = vec![("train.optimizer_budget", "256MiB".to_string())];
    let streamed = match config.model.residency {
        Residency::Device if !room.on_cpu && config.quantization.quant_config().is_some() => {
            vec![("model.residency", "auto".to_string())]
        }
        _ => Vec::new(),
    };

    let mut found = Vec::new();
    for rows in smaller.map(rows) {
        if let Some(change) = search.fits(&rows, longest, "")? {
            found.push(change);
            break;
        }
    }
    let alone = [
        (&kept, ""),
        (&streamed, "frozen weights of some blocks wait in the host's memory"),
        (&paged, "the optimizer's state waits in the host's memory"),
        (&state, "the optimizer's state is in 8 bits"),
    ];
    for (settings, effect) in alone.into_iter().filter(|(settings, _)| !settings.is_empty()) {
        found.extend(search.fits(settings, longest, effect)?);
    }
    found.extend(search.shorter(&[], longest)?);
    if found.is_empty() {
        let all = [rows(1), kept, paged, streamed].concat();
        match search.fits(&all, longest, "the optimizer's state waits in the host's memory")? {
            Some(change) => found.push(change),
            None => found.extend(search.shorter(&all, longest)?),
        }
    }
    Ok(found)
}

impl Search<'_> {
    /// The change to these settings, if the run fits with it.
    fn fits(
        &self,
        settings: &[(&'static str, String)],
        longest: usize,
        effect: &'static str,
    ) -> Result<Option<Change>, TrainError> {
        let mut config = self.config.clone();
        for (key, value) in settings {
            config.set(key, value)?;
        }
        let mut sizes = *self.sizes;
        if longest < sizes.longest {
            // Shorter sequences are more.
            sizes = RowSizes { longest, sequences: None, ..sizes };
        }
        let bytes = Plan::new(&config, self.model, self.dtype, self.room, &sizes)?.memory.total();
        Ok((bytes <= self.limit).then(|| Change { settings: settings.to_vec(), bytes, effect }))
    }

    /// The longest rows that fit, with further settings.
    fn shorter(&self, settings: &[(&'static str, String)], longest: usize) -> Result<Option<Change>, TrainError> {
        let (mut best, mut low, mut high) = (None, 0, longest.saturating_sub(1) / TOKENS);
        let effect = match self.config.data.packing {
            Packing::Off => "longer rows are cut",
            Packing::Auto => "packed sequences are shorter, and longer rows are cut",
        };
        while low < high {
            let middle = (low + high).div_ceil(2);
            match self.fits(settings, middle * TOKENS, effect)? {
                Some(mut change) => {
                    change.settings.push(("data.max_length", (middle * TOKENS).to_string()));
                    (best, low) = (Some(change), middle);
                }
                None => high = middle - 1,
            }
        }
        Ok(best)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

    use super::*;
    use qlora_data::{BatchOrder, Example, Examples, SourceWeight};
    use std::path::Path;

    fn model() -> ModelConfig {
        let shapes =
            std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/llama_shapes.json")).unwrap();
        let config = serde_json::from_slice::<serde_json::Value>(&shapes).unwrap()["llama-2-7b"].take();
        ModelConfig::from_json(&config, Path::new("llama-2-7b")).unwrap()
    }

    fn config(set: &[(&str, &str)]) -> TrainConfig {
        let mut config = TrainConfig::default();
        for (key, value) in [("lora.rank", "64"), ("train.batch_size", "6")].iter().chain(set) {
            config.set(key, value).unwrap();
        }
        config
    }

    fn rows(lens: &[usize]) -> Examples {
        lens.iter().map(|len| Example { input_ids: vec![0; *len], labels: vec![0; *len], line: 1 }).collect()
    }

    fn sizes(set: &[(&str, &str)], rows: &Examples, weights: &[SourceWeight]) -> RowSizes {
        let config = config(set);
        let order = BatchOrder::new(rows, &config.data, config.train.batch_size, 1, 0).weighted(weights).unwrap();
        RowSizes::new(&order, rows)
    }

    fn room(bytes: u64) -> Room {
        Room { on_cpu: false, device: Some(bytes), host: 64 << 30, ranks: 1, of_host: 1 }
    }

    /// What the run takes where nothing fits.
    fn least(len: usize, set: &[(&str, &str)]) -> u64 {
        Plan::new(&config(set), &model(), FloatDType::BF16, &room(0), &RowSizes::of_longest(len))
            .unwrap()
            .memory
            .total()
    }

    fn changes(bytes: u64, len: usize, set: &[(&str, &str)]) -> Vec<Change> {
        let sizes = sizes(set, &rows(&[len / 8, len]), &[]);
        let found = nearest(&config(set), &model(), FloatDType::BF16, &room(bytes), &sizes).unwrap();
        assert!(found.iter().all(|change| change.bytes <= bytes), "{found:?}");
        found
    }

    fn keys(change: &Change) -> Vec<&str> {
        change.settings.iter().map(|(key, _)| *key).collect()
    }

    #[test]
    fn a_run_that_fits_needs_no_change() {
        assert_eq!(changes(least(4096, &[]), 4096, &[]), []);
    }

    #[test]
    fn the_most_rows_that_fit_are_accumulated() {
        // Six rows, accumulated four times by default.
        let found = changes(least(4096, &[]) - 1, 4096, &[]);
        assert_eq!(
            found[0].settings,
            [("train.batch_size", "3".into()), ("train.gradient_accumulation_steps", "8".into())].to_vec()
        );
        let shorter = found.iter().find(|change| keys(change) == ["data.max_length"]).unwrap();
        // One step of 64 tokens is enough.
        assert_eq!(shorter.settings[0].1, "4032");
        let found = changes(least(4096, &[("train.batch_size", "3")]) - 1, 4096, &[]);
        assert_eq!(found[0].settings[0].1, "2");
    }

    /// 64 rows of 128 tokens, 16 to a sequence, are as large as one row of 2,048, and what makes room is the same.
    #[test]
    fn packed_rows_are_as_large_as_their_sequence() {
        let rows = rows(&[128; 64]);
        let packed = [("train.batch_size", "2"), ("data.packing", "auto")];
        let of = |room: u64, set: &[(&str, &str)], rows: &Examples| {
            nearest(&config(set), &model(), FloatDType::BF16, &self::room(room), &sizes(set, rows, &[])).unwrap()
        };
        let plan = |set: &[(&str, &str)], rows: &Examples| {
            Plan::new(&config(set), &model(), FloatDType::BF16, &room(0), &sizes(set, rows, &[])).unwrap().memory
        };
        let whole = self::rows(&[2048]);
        assert_eq!(plan(&packed, &rows), plan(&packed[..1], &whole));
        assert!(plan(&packed, &rows).activations > plan(&packed[..1], &rows).activations);
        // Four sequences are all that there are.
        assert_eq!(plan(&[("train.batch_size", "9"), packed[1]], &rows), plan(&[("train.batch_size", "4")], &whole));
        let least = plan(&packed, &rows).total();
        assert_eq!(of(least, &packed, &rows), []);
        let found = of(least - 1, &packed, &rows);
        assert_eq!(found[0].settings[0], ("train.batch_size", "1".into()));
        let shorter = found.iter().find(|change| keys(change) == ["data.max_length"]).unwrap();
        assert_eq!((shorter.settings[0].1.as_str(), shorter.effect.contains("packed sequences")), ("1984", true));
    }

    /// A row that is visited twice an epoch fills a sequence that its source alone would leave half empty.
    #[test]
    fn packed_rows_are_as_large_as_their_weights_make_them() {
        let rows = rows(&[700, 600, 500]);
        let packed = [("train.batch_size", "4"), ("data.packing", "auto")];
        let of = |weight: f64| sizes(&packed, &rows, &[SourceWeight { rows: 3, weight }]);
        // 700, 600 and 500 tokens in one sequence; twice each, 700, 700 and 600 beside 600, 500 and 500.
        assert_eq!((of(1.0).longest, of(1.0).sequences), (1800, Some(1)));
        assert_eq!((of(2.0).longest, of(2.0).sequences), (2000, Some(2)));
        let plan = |sizes: RowSizes| {
            Plan::new(&config(&packed), &model(), FloatDType::BF16, &room(0), &sizes).unwrap().memory.activations
        };
        assert!(plan(of(2.0)) > plan(of(1.0)));
    }

    #[test]
    fn a_policy_that_keeps_too_much_gives_way_to_the_choice() {
        let found = changes(least(4096, &[]), 4096, &[("train.activation_checkpointing", "none")]);
        assert!(found.iter().any(|change| keys(change) == ["train.activation_checkpointing"]), "{found:?}");
    }

    #[test]
    fn where_no_setting_is_enough_all_are_named_together_or_none() {
        let together = [("train.batch_size", "1"), ("train.optimizer_budget", "256MiB")];
        let least = least(1024, &together);
        let [all] = &changes(least, 1024, &[])[..] else { panic!("one change of several settings") };
        assert_eq!(keys(all), ["train.batch_size", "train.gradient_accumulation_steps", "train.optimizer_budget"]);
        // Weights alone take more than this.
        assert_eq!(changes(2 << 30, 1024, &[]), []);
    }
}
