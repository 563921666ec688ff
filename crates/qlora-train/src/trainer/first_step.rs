//! The first step of a run shows whether anything can be learned at all: each adapter must get a gradient and move.

use qlora_data::Batches;

use super::Trainer;
use crate::error::{TrainError, first_of};
use crate::metrics::StepMetrics;

impl Trainer<'_> {
    /// The first step after a start that is not skipped, and a warning for adapters that did not move in it.
    pub(super) fn first_step(&mut self, batches: &mut Batches<'_>) -> Result<StepMetrics, TrainError> {
        let before = self.engine.checksums()?;
        let metrics = self.step(batches)?;
        let after = self.engine.checksums()?;
        let still = unmoved(&before, &after);
        if !still.is_empty() && metrics.learning_rate > 0.0 && !metrics.is_skipped() {
            self.events.on_warning(&format!(
                "the first step moved nothing in {} of {} adapters ({}): no gradient reaches them; experts may not have been \
                 chosen yet, and tokens not been met, anything else stays as it is to the end: check lora.target_modules",
                still.len(),
                modules(&before).len(),
                first_of(&still),
            ));
        }
        Ok(metrics)
    }
}

/// Names of the adapted modules among the parameters, in order.
fn modules(parameters: &[(String, f32)]) -> Vec<&str> {
    let mut names: Vec<&str> =
        parameters.iter().map(|(name, _)| name.rsplit_once('.').map_or(name.as_str(), |(module, _)| module)).collect();
    names.dedup();
    names
}

/// Modules of which no parameter changed. Of a fresh adapter one factor is zero, so that the other one has no gradient yet.
fn unmoved(before: &[(String, f32)], after: &[(String, f32)]) -> Vec<String> {
    let moved = |module: &str| {
        before.iter().zip(after).any(|((name, before), (_, after))| {
            name.strip_prefix(module).is_some_and(|rest| rest.starts_with('.')) && before.to_bits() != after.to_bits()
        })
    };
    modules(before).into_iter().filter(|module| !moved(module)).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_moved_if_any_of_its_parameters_did() {
        let of = |values: [f32; 4]| {
            let names = ["a.q.lora_a", "a.q.lora_b", "a.qk.lora_a", "a.qk.lora_b"];
            names.into_iter().map(str::to_owned).zip(values).collect::<Vec<_>>()
        };
        let before = of([1.0, 0.0, 2.0, 0.0]);
        assert_eq!(modules(&before), ["a.q", "a.qk"]);
        assert_eq!(unmoved(&before, &of([1.0, 0.5, 2.0, 0.0])), ["a.qk"]);
        assert!(unmoved(&before, &of([1.0, 0.5, 2.0, 0.1])).is_empty());
    }
}
