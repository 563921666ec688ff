//! Trackers as a run meets them.

#![allow(clippy::unwrap_used)]

use super::*;

pub(super) fn step(step: usize) -> StepMetrics {
    StepMetrics {
        step,
        epoch: 0.5,
        loss: 1.0 / step as f64,
        learning_rate: 2e-4,
        grad_norm: 0.5,
        tokens: 100,
        tokens_per_second: 1000.0,
        padding_tokens: 0,
        memory_bytes: 1 << 20,
        memory_in_use_bytes: 1 << 19,
        memory_reserved_bytes: 1 << 20,
        paging: None,
        slowest_rank: None,
        loss_scaling: None,
        preference: None,
        elapsed_seconds: step as f64,
    }
}

pub(super) fn eval(step: usize) -> EvalMetrics {
    EvalMetrics {
        step,
        eval_loss: 2.0,
        eval_accuracy: Some(0.5),
        eval_perplexity: Some(2.0f64.exp()),
        eval_tokens: 7,
        preference: None,
        answers: vec![Answer { prompt: "1 + 1?".into(), answer: "two".into(), tokens: 2, ended: true }],
        eval_seconds: 0.25,
        elapsed_seconds: 1.0,
    }
}

/// The messages of an event file.
fn messages(path: &Path) -> Vec<Vec<u8>> {
    let bytes = std::fs::read(path).unwrap();
    let (mut rest, mut found) = (&bytes[..], Vec::new());
    while !rest.is_empty() {
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        found.push(rest[12..12 + length].to_vec());
        rest = &rest[16 + length..];
    }
    found
}

fn holds(message: &[u8], text: &str) -> bool {
    message.windows(text.len()).any(|window| window == text.as_bytes())
}

#[test]
fn each_start_has_an_event_file_and_a_resumed_one_says_where_it_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let settings = [("train.epochs".to_string(), 1.0.into())];
    for start in [0, 2] {
        let beginning = Beginning { folder: dir.path(), settings: &settings, step: start };
        let (mut trackers, warnings) = Trackers::open(&[Tracker::TensorBoard], beginning);
        assert!(warnings.is_empty(), "{warnings:?}");
        for k in 1..=3 {
            assert!(trackers.step(&step(start + k)).is_empty());
        }
        assert!(trackers.eval(&eval(start + 3)).is_empty() && trackers.finish(Outcome::Finished).is_empty());
    }
    let mut files: Vec<_> =
        dir.path().join("tensorboard").read_dir().unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    let [first, second] = [messages(&files[0]), messages(&files[1])];
    // Version, configuration, three steps, values and answers of an evaluation; a start where the run goes on.
    assert_eq!((first.len(), second.len()), (7, 8));
    assert!(holds(&first[1], "train.epochs") && holds(&first[2], "train/loss") && holds(&first[5], "eval/perplexity"));
    assert!(holds(&first[6], "answers/1") && holds(&first[6], "two"));
    // Step 3, and a session log of status 1.
    assert!(second[1].ends_with(&[2 << 3, 3, 7 << 3 | 2, 2, 1 << 3, 1]), "{:?}", second[1]);
    remove_events(dir.path()).unwrap();
    assert!(!dir.path().join("tensorboard").exists());
}

#[test]
fn what_lies_beside_event_files_stays() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("tensorboard");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("events.out.tfevents.1"), "").unwrap();
    std::fs::write(folder.join("notes.txt"), "").unwrap();
    remove_events(dir.path()).unwrap();
    let left: Vec<_> = folder.read_dir().unwrap().map(|file| file.unwrap().file_name()).collect();
    assert_eq!(left, ["notes.txt"]);
}

/// A tracker that takes two values.
struct Failing(usize);

impl Sink for Failing {
    fn scalars(&mut self, _: usize, _: &[(&'static str, f64)]) -> Result<(), String> {
        self.0 = self.0.checked_sub(1).ok_or("the disk is full")?;
        Ok(())
    }

    fn answers(&mut self, _: usize, _: &[Answer]) -> Result<(), String> {
        Ok(())
    }

    fn finish(&mut self, _: Option<Outcome>) -> Result<(), String> {
        Err("nobody asks".into())
    }
}

#[test]
fn a_tracker_that_fails_is_told_once() {
    let mut trackers = Trackers { sinks: vec![(Tracker::TensorBoard, Box::new(Failing(2)))], finished: false };
    assert!(trackers.step(&step(1)).is_empty() && trackers.eval(&eval(1)).is_empty());
    let told = trackers.step(&step(2));
    assert_eq!(told, ["tensorboard (train.log_to): the disk is full; the run goes on without it"]);
    assert!(trackers.step(&step(3)).is_empty() && trackers.finish(Outcome::Finished).is_empty());
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tensorboard"), "a file where the folder would be").unwrap();
    let beginning = Beginning { folder: dir.path(), settings: &[], step: 0 };
    let (mut trackers, told) = Trackers::open(&[Tracker::TensorBoard], beginning);
    assert!(told.len() == 1 && told[0].contains("tensorboard"), "{told:?}");
    assert!(trackers.step(&step(1)).is_empty());
}
