//! Which checkpoint is kept, when a run ends early, and which adapter it leaves.

use crate::common::{StopAfter, adapter, config, losses, refused, run, tensors};
use qlora_train::config::{FinalAdapter, KeepBest};
use qlora_train::metrics::{History, METRICS_FILE};
use qlora_train::report::Outcome;
use qlora_train::{Resume, TrainConfig, checkpoint};
use std::path::Path;

/// Learns well for a while, then is thrown about by a learning rate that rises.
fn overshooting(out: &Path) -> TrainConfig {
    let mut config = config(out);
    config.train.max_steps = Some(40);
    config.train.warmup_steps = Some(40);
    config.train.learning_rate = 0.6;
    config.train.max_grad_norm = 0.0;
    config.train.gradient_accumulation_steps = 1;
    config.train.eval_every = 1;
    config.train.save_every = 1;
    config.train.save_limit = 1;
    config.train.keep_best = KeepBest::Loss;
    config.train.final_adapter = FinalAdapter::Best;
    config.train.early_stopping_patience = 4;
    config
}

#[test]
fn the_best_checkpoint_stays_and_becomes_the_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let summary = run(overshooting(&whole), Resume::No, &mut ()).unwrap();
    assert_eq!(summary.outcome, Outcome::StoppedEarly);
    let history = History::read(&whole.join(METRICS_FILE)).unwrap();
    let best = history.evals.iter().min_by(|a, b| a.eval_loss.total_cmp(&b.eval_loss)).unwrap().step;
    assert!(best > 0 && history.evals.iter().all(|eval| eval.eval_accuracy.is_some()));
    assert_eq!((summary.adapter_step, summary.steps), (best, best + 4), "four evaluations without a gain");
    let kept: Vec<usize> = checkpoint::list(&whole).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(kept, [best, best + 4], "the newest, and the best");
    let of_best = tensors(&checkpoint::list(&whole).unwrap()[0].1);
    assert!(tensors(&whole.join("adapter")).tensors == of_best.tensors);
    assert!(std::fs::read_to_string(whole.join("summary.md")).unwrap().contains(&format!("that of step {best}")));

    // What the evaluations said is part of a checkpoint.
    run(overshooting(&broken), Resume::No, &mut StopAfter(best + 2)).unwrap();
    let resumed = run(overshooting(&broken), Resume::Auto, &mut ()).unwrap();
    assert_eq!((resumed.outcome, resumed.steps, resumed.adapter_step), (Outcome::StoppedEarly, best + 4, best));
    assert_eq!((losses(&broken), adapter(&broken)), (losses(&whole), adapter(&whole)));
    // Resumed once more there is nothing to do.
    let again = run(overshooting(&broken), Resume::Auto, &mut ()).unwrap();
    assert_eq!((again.outcome, again.steps, adapter(&broken)), (Outcome::StoppedEarly, best + 4, adapter(&whole)));
}

#[test]
fn the_best_needs_to_be_defined() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(&dir.path().join("run"));
    config.train.final_adapter = FinalAdapter::Best;
    assert!(refused(config, Resume::No).contains("train.keep_best"));
}
