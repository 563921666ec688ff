//! What a checkpoint says of the run that it belongs to, and what is refused when that changed.

use crate::common::{StopAfter, Told, adapter, config, refused, run};
use qlora_train::{Resume, Start, TrainConfig, TrainError, checkpoint};
use std::path::Path;

/// Resumes whatever changed.
fn accepting() -> Start {
    Start { resume: Resume::Auto, accept_changes: true, ..Start::default() }
}

/// A run whose files are its own, stopped after two steps.
fn stopped(dir: &Path) -> TrainConfig {
    let mut config = config(&dir.join("run"));
    let rows = std::fs::read_to_string(&config.data.train.0[0].path).unwrap();
    let rows: Vec<&str> = rows.lines().take(20).collect();
    std::fs::write(dir.join("rows.jsonl"), rows.join("\n")).unwrap();
    config.data.train = dir.join("rows.jsonl").into();
    config.data.eval_fraction = 0.0;
    run(config.clone(), Resume::No, &mut StopAfter(2)).unwrap();
    config
}

#[test]
fn other_settings_are_refused_by_key() {
    let dir = tempfile::tempdir().unwrap();
    let original = stopped(dir.path());
    let changed = |change: &dyn Fn(&mut TrainConfig)| {
        let mut config = original.clone();
        change(&mut config);
        config
    };
    // What the adapter's tensors depend on can't be accepted either.
    let alpha = changed(&|config| (config.lora.alpha, config.train.save_every) = (16.0, 1));
    for start in [Resume::Auto.into(), accepting()] {
        let message = refused(alpha.clone(), start);
        assert!(message.contains("lora.alpha was 8.0, now is 16.0") && !message.contains("save_every"), "{message}");
    }
    let lower = changed(&|config| config.train.learning_rate = 1e-4);
    let message = refused(lower.clone(), Resume::Auto);
    assert!(message.contains("train.learning_rate was 0.001, now is 0.0001"), "{message}");
    assert!(message.contains("--accept-changes"), "{message}");
    let mut told = Told::default();
    run(lower, accepting(), &mut told).unwrap();
    assert!(told.has("train.learning_rate was 0.001, now is 0.0001"), "{:?}", told.0);
    // A folder without its state file is no checkpoint; an older one is found in its place.
    let out = &original.train.output_dir;
    std::fs::create_dir(out.join("checkpoint-000009")).unwrap();
    assert_eq!(checkpoint::list(out).unwrap().last().unwrap().0, 6);
}

#[test]
fn other_rows_are_refused_wherever_they_lie() {
    let dir = tempfile::tempdir().unwrap();
    let config = stopped(dir.path());
    let rows = std::fs::read_to_string(&config.data.train.0[0].path).unwrap();
    let elsewhere = dir.path().join("elsewhere.jsonl");
    let mut moved = config.clone();
    moved.data.train = elsewhere.clone().into();
    // As many rows of as many tokens, in another order.
    let reversed: Vec<&str> = rows.lines().rev().collect();
    std::fs::write(&elsewhere, reversed.join("\n")).unwrap();
    let message = refused(moved.clone(), Resume::Auto);
    assert!(message.contains("elsewhere.jsonl") && message.contains("order"), "{message}");
    let mut told = Told::default();
    let summary = run(moved.clone(), accepting(), &mut told).unwrap();
    assert!(told.has("elsewhere.jsonl") && summary.steps == 6, "{:?}", told.0);
    // The same rows under another name are the same rows; the checkpoint is now of the reversed ones.
    std::fs::copy(&elsewhere, dir.path().join("third.jsonl")).unwrap();
    moved.data.train = dir.path().join("third.jsonl").into();
    moved.train.max_steps = Some(7);
    run(moved, Resume::Auto, &mut ()).unwrap();
}

#[test]
fn another_base_or_template_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    std::fs::create_dir(&base).unwrap();
    let mut config = stopped(dir.path());
    for entry in Path::new(&config.model.path).read_dir().unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), base.join(entry.file_name())).unwrap();
    }
    config.model.path = base.display().to_string();
    config.train.max_steps = Some(3);
    run(config.clone(), Resume::Auto, &mut ()).unwrap();
    config.train.max_steps = Some(4);
    let template = base.join("chat_template.jinja");
    let text = std::fs::read_to_string(&template).unwrap();
    // The rows' text stays the same: none of them has a role of this name.
    std::fs::write(&template, format!("{text}{{% if messages[0].role == 'oracle' %}}!{{% endif %}}")).unwrap();
    let message = refused(config.clone(), Resume::Auto);
    assert!(message.contains("chat template is another") && !message.contains("rows"), "{message}");
    std::fs::write(&template, text).unwrap();
    let weights = base.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    // The lowest bit of the first weight.
    bytes[header] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    assert!(refused(config.clone(), Resume::Auto).contains("the weights of"));
    run(config, accepting(), &mut ()).unwrap();
}

#[test]
fn a_flipped_bit_is_named_and_an_older_checkpoint_offered() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = stopped(dir.path());
    config.train.max_steps = Some(4);
    run(config.clone(), Resume::Auto, &mut ()).unwrap();
    config.train.max_steps = Some(6);
    let newest = config.train.output_dir.join("checkpoint-000004");
    for name in [
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "training_state.json",
        "adapter_config.json",
        "checksums.json",
    ] {
        let file = newest.join(name);
        let whole = std::fs::read(&file).unwrap();
        let mut flipped = whole.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 4;
        std::fs::write(&file, flipped).unwrap();
        let message = refused(config.clone(), Resume::Auto);
        assert!(message.contains(name) && message.contains("checkpoint-000002"), "{name}: {message}");
        std::fs::write(&file, whole).unwrap();
    }
    run(config, Resume::Auto, &mut ()).unwrap();
}

#[test]
fn what_is_not_finite_is_never_saved() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(&dir.path().join("run"));
    config.train.max_steps = Some(1);
    config.train.max_grad_norm = 0.0;
    config.train.warmup_ratio = 0.0;
    config.train.weight_decay = 1.0;
    config.train.learning_rate = 1e38;
    let error = run(config.clone(), Resume::No, &mut ()).unwrap_err();
    assert!(matches!(&error, TrainError::Spoilt { step: 1, what, saved: None, .. } if !what.is_empty()), "{error}");
    let out = &config.train.output_dir;
    assert!(checkpoint::list(out).unwrap().is_empty() && !out.join("adapter").exists());
    config.train.learning_rate = 1e39;
    assert!(refused(config, Resume::No).contains("train.learning_rate"));
}

#[test]
fn a_run_that_destroys_the_model_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(&dir.path().join("run"));
    config.train.max_steps = Some(12);
    config.train.learning_rate = 1e3;
    config.train.save_every = 0;
    let mut told = Told::default();
    run(config.clone(), Resume::No, &mut told).unwrap();
    assert!(told.has("the training loss"), "{:?}", told.0);
    // The adapter that it leaves is one all the same.
    assert!(!adapter(&config.train.output_dir).is_empty());
}
