//! Answers that are compared: end to end, side by side, over several micro-batches, beside a reference that is known ahead.

use super::super::pass::tests::{Numbers, assert_near, computed, engine, rows};
use super::*;
use crate::config::{Objective, PreferenceConfig, Term};
use burn::tensor::Device;
use qlora_data::{JudgedRows, MASKED_LABEL};
use qlora_layers::ActivationCheckpointing;
use test_support::devices;

/// Prompts of 3 tokens, answers of the rest.
const LENS: [usize; 8] = [7, 12, 30, 9, 5, 6, 41, 22];

/// Rows whose first three tokens are a prompt.
fn answers(words: usize) -> Vec<Example> {
    let mut rows = rows(&LENS, words);
    rows.iter_mut().for_each(|row| row.labels[..3].fill(MASKED_LABEL));
    rows
}

fn judged(batch: Batch, paired: bool, numbers: std::ops::Range<usize>, rows: &[Example]) -> Batch {
    let sides: Vec<Side> =
        numbers.clone().map(|row| if row % 2 == 0 { Side::Chosen } else { Side::Rejected }).collect();
    let origins = numbers.clone().map(|row| (row / 2, row % 2)).collect();
    let other = |row: usize| {
        let answer = &rows[(row + 3) % rows.len()];
        Example {
            input_ids: [&rows[row].input_ids[..3], &answer.input_ids[3..]].concat(),
            labels: [&rows[row].labels[..3], &answer.labels[3..]].concat(),
            line: 1,
        }
    };
    let judged = JudgedRows { sides, paired, origins, mismatched: numbers.map(other).collect(), reference: Vec::new() };
    Batch { judged: Some(Box::new(judged)), ..batch }
}

fn comparing(device: &Device, objective: Objective) -> Engine {
    let engine = engine("archs/llama3", device, ActivationCheckpointing::Selective);
    let mut reference = engine.model().clone();
    reference.unload_adapter().unwrap();
    let preferences = Preferences { objective, settings: PreferenceConfig::default() };
    engine.with_preferences(preferences, Some(reference))
}

/// Losses, figures and gradients of rows, laid out in some ways.
fn in_each_way(engine: &Engine, paired: bool) -> Numbers {
    let rows = answers(engine.model().config().vocab_size);
    let all = 0..rows.len();
    let found = computed(engine, &[judged(Batch::end_to_end(&rows), paired, all.clone(), &rows)]);
    let padded = judged(Batch::new(&rows, 0), paired, all.clone(), &rows);
    assert_near("side by side", &computed(engine, &[padded]), &found);
    let part =
        |rows_of: std::ops::Range<usize>| judged(Batch::end_to_end(&rows[rows_of.clone()]), paired, rows_of, &rows);
    assert_near("in micro-batches", &computed(engine, &[part(0..2), part(2..6), part(6..8)]), &found);
    found
}

#[test]
fn packed_answers_give_what_padded_ones_and_parts_of_them_give() {
    for (name, device) in devices() {
        let terms = [(Term::Dpo, 1.0), (Term::Sft, 0.5), (Term::Orpo, 0.25)];
        let several = comparing(&device, Objective::Sum(terms.into_iter().collect()));
        let found = in_each_way(&several, true);
        let norm: f64 = found.1.iter().flat_map(|(_, grad)| grad).map(|value| f64::from(*value).powi(2)).sum();
        assert!((norm.sqrt() / f64::from(found.0[1]) - 1.0).abs() < 1e-4, "{name}: {norm}");
        if device == Device::flex() {
            in_each_way(&comparing(&device, Objective::One(Term::Simpo)), true);
        }
        // The mean over mismatched rows is that of the step, however they are divided.
        in_each_way(&comparing(&device, Objective::One(Term::Kto)), false);
    }
}

#[test]
fn a_reference_that_is_known_ahead_is_the_one_that_is_there() {
    let engine = comparing(&Device::flex(), Objective::One(Term::Dpo));
    let rows = answers(engine.model().config().vocab_size);
    let all = 0..rows.len();
    let batch = || judged(Batch::end_to_end(&rows), true, all.clone(), &rows);
    let comparison = engine.comparison.as_ref().unwrap();
    let parts = [(0..4, 0..4), (4..8, 4..8)]
        .map(|(rows_of, numbers)| judged(Batch::end_to_end(&rows[rows_of]), true, numbers, &rows));
    let reference = comparison.reference.as_ref().unwrap();
    let mut count = 0;
    let known = reference_log_probs(reference, parts.into_iter(), &comparison.preferences, None, false, |done, of| {
        count += 1;
        assert_eq!((done, of), (count, 2));
        Ok(())
    })
    .unwrap();
    assert_eq!(known.len(), rows.len() / 2);
    let there = computed(&engine, &[batch()]);
    let evaluated = engine.evaluate([batch()]).unwrap();
    let mut brought = batch();
    let of_batch = brought.judged.as_mut().unwrap();
    of_batch.reference = of_batch.origins.iter().map(|(row, side)| known[*row][*side]).collect();
    let Comparison { preferences, .. } = engine.comparison.clone().unwrap();
    let ahead = engine.with_preferences(preferences, None);
    assert_near("known ahead", &computed(&ahead, std::slice::from_ref(&brought)), &there);
    let again = ahead.evaluate([&brought]).unwrap();
    assert!((again.loss - evaluated.loss).abs() < 1e-6, "{again:?} {evaluated:?}");
    // Without either it is an error.
    assert!(matches!(ahead.evaluate([batch()]), Err(TrainError::NoReference)));
    // Evaluation has the loss of a step over the same rows, and rewards.
    assert!((evaluated.loss / f64::from(there.0[0]) - 1.0).abs() < 1e-5, "{evaluated:?} {:?}", there.0);
    let figures = evaluated.preference.unwrap();
    let (margin, right) = (figures.rewards_margin.unwrap(), figures.rewards_accuracy.unwrap());
    assert!(margin != 0.0 && (0.0..=1.0).contains(&right) && figures.kl.is_none(), "{figures:?}");
    assert_eq!(evaluated.accuracy, None);
}

#[test]
fn a_step_tells_rewards_and_learns_an_order() {
    let mut engine = comparing(&Device::flex(), Objective::One(Term::Dpo));
    let rows = answers(engine.model().config().vocab_size);
    let batch = judged(Batch::end_to_end(&rows), true, 0..rows.len(), &rows);
    let first = engine.step(std::slice::from_ref(&batch), 5e-3, 1).unwrap();
    let mut last = first;
    for seed in 2..12 {
        last = engine.step(std::slice::from_ref(&batch), 5e-3, seed).unwrap();
    }
    let [before, after] = [first, last].map(|output| output.preference.unwrap());
    assert!(last.loss < 0.8 * first.loss, "{first:?} {last:?}");
    assert!(after.rewards_margin > before.rewards_margin && after.rewards_accuracy == Some(1.0), "{after:?}");
}
