//! What an output folder may hold when a run starts, and what it holds afterwards.

use crate::common::{StopAfter, Told, adapter, config, listing, losses, refused, run};
use qlora_train::{Resume, Start, TrainError, Trainer, checkpoint, run_holder};

fn overwrite() -> Start {
    Start { overwrite: true, ..Start::default() }
}

#[test]
fn a_folder_belongs_to_one_run_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut silent = ();
    let first = Trainer::new(config(&out), Resume::No, &mut silent).unwrap();
    for start in [Start::default(), overwrite(), Resume::AutoOrStart.into()] {
        let second = run(config(&out), start, &mut ());
        assert!(matches!(&second, Err(TrainError::Held { holder, .. }) if holder.contains("process ")), "{second:?}");
    }
    assert!(run_holder(&out).unwrap().unwrap().contains(&std::process::id().to_string()));
    first.run().unwrap();
    assert_eq!(run_holder(&out).unwrap(), None);
    let expected = [
        "adapter",
        "checkpoint-000004",
        "checkpoint-000006",
        "loss.svg",
        "metrics.jsonl",
        "summary.json",
        "summary.md",
    ];
    assert_eq!(listing(&out), expected, "nothing else is left");
}

#[test]
fn what_is_finished_is_not_replaced_unasked() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut short = config(&out);
    short.train.max_steps = Some(2);
    run(short.clone(), Resume::No, &mut ()).unwrap();
    // Checkpoints are what people remove to save space.
    std::fs::remove_dir_all(out.join("checkpoint-000002")).unwrap();
    let (before, log) = (adapter(&out), std::fs::read(out.join("metrics.jsonl")).unwrap());
    let mut other = short.clone();
    other.train.seed = 99;
    for start in [Resume::No, Resume::Auto, Resume::AutoOrStart] {
        let message = refused(other.clone(), start);
        assert!(message.contains("an adapter") && message.contains("run"), "{message}");
    }
    // Nor by a mistake that shows only later.
    let mut wrong = other.clone();
    wrong.data.train = dir.path().join("none.jsonl").into();
    assert!(refused(wrong, overwrite()).contains("none.jsonl"));
    assert_eq!((adapter(&out), std::fs::read(out.join("metrics.jsonl")).unwrap()), (before.clone(), log));
    run(other, overwrite(), &mut ()).unwrap();
    assert!(adapter(&out) != before);
}

#[test]
fn a_run_that_saved_nothing_is_started_over_by_a_launcher_alone() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    assert!(refused(config(&out), Resume::Auto).contains("no checkpoint to resume"));
    assert!(!out.exists(), "a refused run leaves no folder");
    // As if it were killed in its first steps.
    run(config(&out), Resume::AutoOrStart, &mut StopAfter(2)).unwrap();
    std::fs::remove_dir_all(out.join("checkpoint-000002")).unwrap();
    for name in ["summary.json", "summary.md", "loss.svg"] {
        std::fs::remove_file(out.join(name)).unwrap();
    }
    assert!(refused(config(&out), Resume::No).contains("a log"));
    assert!(refused(config(&out), Resume::Auto).contains("a log"));
    assert_eq!(run(config(&out), Resume::AutoOrStart, &mut ()).unwrap().steps, 6);
    assert_eq!(losses(&out).len(), 6);
}

#[test]
fn a_checkpoint_from_elsewhere_begins_a_run_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let (theirs, ours) = (dir.path().join("theirs"), dir.path().join("ours"));
    run(config(&theirs), Resume::No, &mut ()).unwrap();
    let of_theirs =
        |names: &[String]| names.iter().map(|name| std::fs::metadata(theirs.join(name)).unwrap().len()).sum::<u64>();
    let (names, bytes) = (listing(&theirs), of_theirs(&listing(&theirs)));
    let from = Resume::From(theirs.join("checkpoint-000004"));
    let mut longer = config(&ours);
    longer.train.max_steps = Some(8);
    run(longer.clone(), from.clone(), &mut ()).unwrap();
    assert_eq!((listing(&theirs), of_theirs(&names)), (names, bytes), "the other run is as it was");
    // The log begins where the other run began, and the first steps are that run's.
    assert_eq!(losses(&ours).len(), 8);
    assert_eq!(losses(&ours)[..6], losses(&theirs)[..6]);
    assert_eq!(checkpoint::list(&ours).unwrap().iter().map(|(step, _)| *step).collect::<Vec<_>>(), [6, 8]);
    let finished = adapter(&ours);
    assert!(refused(longer.clone(), from.clone()).contains("an adapter"));
    assert_eq!(adapter(&ours), finished);
    run(longer, Start { resume: from, overwrite: true, ..Start::default() }, &mut ()).unwrap();
    assert_eq!(adapter(&ours), finished, "the same run again");
}

#[test]
fn going_back_drops_what_came_after_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut all = config(&out);
    all.train.save_limit = 0;
    run(all.clone(), Resume::No, &mut ()).unwrap();
    let (finished, whole) = (adapter(&out), losses(&out));
    let mut told = Told::default();
    let back = Resume::From(out.join("checkpoint-000002"));
    let mut stopping = Both(StopAfter(1), &mut told);
    let stopped = run(all.clone(), back, &mut stopping).unwrap();
    assert!(told.has("checkpoints of steps 4 to 6 are removed") && told.has("adapter-000006"), "{:?}", told.0);
    // What it says to go on from is there, and is the newest.
    assert_eq!(stopped.adapter, out.join("checkpoint-000003"));
    let steps = |out| checkpoint::list(out).unwrap().into_iter().map(|(step, _)| step).collect::<Vec<_>>();
    assert_eq!(steps(&out), [2, 3]);
    assert!(!out.join("adapter").exists());
    assert_eq!(std::fs::read(out.join("adapter-000006/adapter_model.safetensors")).unwrap(), finished);
    run(all, Resume::Auto, &mut ()).unwrap();
    assert_eq!((adapter(&out), losses(&out)), (finished, whole));
}

/// Stops, and notes what is said.
struct Both<'a>(StopAfter, &'a mut Told);

impl qlora_train::TrainEvents for Both<'_> {
    fn on_step(&mut self, metrics: &qlora_train::metrics::StepMetrics) {
        self.0.on_step(metrics);
    }

    fn on_warning(&mut self, message: &str) {
        self.1.on_warning(message);
    }

    fn should_stop(&mut self) -> bool {
        self.0.should_stop()
    }
}

#[test]
fn files_of_the_users_own_keep_a_checkpoint_from_being_pruned() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    let mut config = config(&out);
    config.train.save_every = 1;
    config.train.save_limit = 1;
    config.train.max_steps = Some(3);
    run(config.clone(), Resume::No, &mut StopAfter(1)).unwrap();
    std::fs::write(out.join("checkpoint-000001/notes.txt"), "the good one").unwrap();
    let mut told = Told::default();
    run(config, Resume::Auto, &mut told).unwrap();
    assert!(told.has("notes.txt"), "{:?}", told.0);
    assert!(out.join("checkpoint-000001/notes.txt").is_file() && out.join("checkpoint-000003").is_dir());
    assert!(!out.join("checkpoint-000002").exists());
}

#[test]
fn what_killed_saves_left_is_cleaned_by_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("run");
    run(config(&out), Resume::No, &mut StopAfter(2)).unwrap();
    for stub in [".checkpoint-000003.new-a1B2c3", ".checkpoint-000001.removed-a1B2c3/dir", ".metrics.jsonl.new-zzzzzz"]
    {
        std::fs::create_dir_all(out.join(stub)).unwrap();
    }
    std::fs::write(out.join(".mine"), "the user's own").unwrap();
    run(config(&out), Resume::Auto, &mut ()).unwrap();
    let hidden: Vec<String> = listing(&out).into_iter().filter(|name| name.starts_with('.')).collect();
    assert_eq!(hidden, [".mine"]);
}
