//! What a program sees while a run goes on: one JSON object a line on stdout.
//!
//! Each has an `event`: `start`, `step`, `eval`, `saved`, `note`, `warning`, `end`; beside it stands what `metrics.jsonl` and
//! `summary.json` hold, by the same names.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn_qlora::metrics::{EvalMetrics, RunInfo, StepMetrics};
use burn_qlora::{Summary, TrainEvents};
use serde::Serialize;
use serde_json::{Value, json};

use crate::output::tell;

/// Tells of a run in JSON.
pub struct JsonLines {
    stop: Arc<AtomicBool>,
}

impl JsonLines {
    /// `stop` is raised to stop the run.
    pub fn new(stop: Arc<AtomicBool>) -> Self {
        Self { stop }
    }
}

/// An event with the keys of what it tells.
fn line(event: &str, what: &impl Serialize) -> String {
    let mut object = json!({ "event": event });
    // What is told here are structs of numbers and texts, which JSON can hold.
    if let (Value::Object(object), Ok(Value::Object(keys))) = (&mut object, serde_json::to_value(what)) {
        object.extend(keys);
    }
    format!("{object}\n")
}

/// Tells a warning that is no run's own.
pub fn warning(message: &str) {
    tell(&line("warning", &json!({ "message": message })));
}

impl TrainEvents for JsonLines {
    fn on_start(&mut self, run: &RunInfo) {
        tell(&line("start", run));
    }

    fn on_step(&mut self, metrics: &StepMetrics) {
        tell(&line("step", metrics));
    }

    fn on_eval(&mut self, metrics: &EvalMetrics) {
        tell(&line("eval", metrics));
    }

    fn on_save(&mut self, checkpoint: &Path) {
        tell(&line("saved", &json!({ "path": checkpoint.display().to_string() })));
    }

    fn on_notice(&mut self, message: &str) {
        tell(&line("note", &json!({ "message": message })));
    }

    fn on_warning(&mut self, message: &str) {
        warning(message);
    }

    fn on_end(&mut self, summary: &Summary) {
        tell(&line("end", summary));
    }

    fn stop_flag(&mut self) -> Option<Arc<AtomicBool>> {
        Some(Arc::clone(&self.stop))
    }

    fn should_stop(&mut self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_an_object_that_begins_with_its_event() {
        let text = line("warning", &json!({ "message": "two\nlines" }));
        assert_eq!(text, "{\"event\":\"warning\",\"message\":\"two\\nlines\"}\n");
    }
}
