//! What a run shows while it goes on, and what bends its steps: noise, rates by kind, answers, trackers, the picture.

use crate::common::{StopAfter, Told, config, losses, run, tensors};
use qlora_train::config::WeightDecayOf;
use qlora_train::metrics::{History, METRICS_FILE};
use qlora_train::{Resume, Start, Tracker, TrainConfig, TrainEvents};
use std::path::Path;

/// Two steps without dropout, noise and warmup.
fn plain(out: &Path) -> TrainConfig {
    let mut config = config(out);
    config.lora.dropout = 0.0;
    config.train.neftune_alpha = 0.0;
    config.train.max_steps = Some(2);
    config.train.warmup_steps = Some(0);
    config.train.max_grad_norm = 0.0;
    config
}

#[test]
fn noise_moves_training_and_not_evaluation() {
    let dir = tempfile::tempdir().unwrap();
    let history = |name: &str, alpha: f64| {
        let out = dir.path().join(name);
        let mut config = plain(&out);
        config.train.max_steps = Some(1);
        config.train.neftune_alpha = alpha;
        run(config, Resume::No, &mut ()).unwrap();
        History::read(&out.join(METRICS_FILE)).unwrap()
    };
    let (without, with) = (history("without", 0.0), history("with", 10.0));
    assert!(without.steps[0].loss != with.steps[0].loss);
    // Before the first step both are the base.
    assert_eq!(without.evals[0].eval_loss, with.evals[0].eval_loss);
}

/// The first step of AdamW is as long as the learning rate, whatever the gradient: so is the way that each kind goes.
#[test]
fn kinds_learn_at_their_own_rates() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = |name: &str, change: &dyn Fn(&mut TrainConfig)| {
        let out = dir.path().join(name);
        let mut config = plain(&out);
        config.train.max_steps = Some(1);
        config.train.learning_rate = 1e-4;
        config.lora.target_modules = "q_proj".parse_names();
        config.lora.modules_to_save = vec!["norm".into(), "embed_tokens".into()];
        change(&mut config);
        run(config, Resume::No, &mut ()).unwrap();
        tensors(&out.join("adapter"))
    };
    let still = adapter("still", &|config| {
        config.train.learning_rate = 1e-30;
    });
    let moved = |now: &adapter_io::Adapter, part: &str| {
        let of = |name: &&String| name.contains(part);
        let name = still.tensors.keys().find(of).unwrap_or_else(|| panic!("{part}: {:?}", still.tensors.keys()));
        let pairs = still.tensors[name].data.iter().zip(&now.tensors[name].data);
        pairs.map(|(before, after)| f64::from((after - before).abs())).fold(0.0, f64::max)
    };
    let now = adapter("plus", &|config| {
        config.train.lora_plus_ratio = 16.0;
        config.train.embedding_learning_rate = Some(1e-5);
    });
    for (part, rate) in [("lora_B", 1.6e-3), ("norm", 1.6e-3), ("embed_tokens", 1e-5)] {
        // AdamW's epsilon takes something from small gradients, and weights near 1 are rounded by 6e-8.
        let way = moved(&now, part);
        assert!((0.99..1.01).contains(&(way / rate)), "{part}: {way} at a rate of {rate}");
    }
    // Decay takes a part of the weights of the one kind.
    let decayed = adapter("decay", &|config| {
        config.train.learning_rate = 1e-4;
        config.train.weight_decay_of = WeightDecayOf { vectors: Some(1000.0), ..WeightDecayOf::default() };
    });
    assert!(moved(&decayed, "norm") > 0.05 && moved(&decayed, "lora_B") < 1.01e-4);
}

/// Names of modules, as a configuration has them.
trait Names {
    fn parse_names(&self) -> qlora_layers::TargetModules;
}

impl Names for str {
    fn parse_names(&self) -> qlora_layers::TargetModules {
        qlora_layers::TargetModules::Names(self.split(' ').map(str::to_string).collect())
    }
}

/// Looks at the picture when an evaluation begins.
struct Looks {
    folder: std::path::PathBuf,
    pictures: Vec<Option<String>>,
}

impl TrainEvents for Looks {
    fn on_eval_start(&mut self, _: usize) {
        self.pictures.push(std::fs::read_to_string(self.folder.join("loss.svg")).ok());
    }
}

#[test]
fn evaluations_answer_prompts_and_renew_the_picture() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.train.eval_every = 2;
    config.eval.prompts = vec!["What is 2 + 3?".into(), "Name a colour.".into()];
    config.eval.max_new_tokens = 5;
    let mut looks = Looks { folder: dir.path().into(), pictures: Vec::new() };
    let summary = run(config, Resume::No, &mut looks).unwrap();
    // Before evaluations 0 and 2 there is none, before 4 and 6 there is one, which grew.
    let drawn: Vec<bool> = looks.pictures.iter().map(Option::is_some).collect();
    assert_eq!(drawn, [false, false, true, true]);
    assert!(looks.pictures[2] != looks.pictures[3]);
    let history = History::read(&dir.path().join(METRICS_FILE)).unwrap();
    for eval in &history.evals {
        let [first, second] = &eval.answers[..] else { panic!("{:?}", eval.answers) };
        assert!(first.prompt == "What is 2 + 3?" && second.prompt == "Name a colour.");
        assert!((1..=5).contains(&first.tokens) && (first.ended || first.tokens == 5), "{first:?}");
        // The exponential of a number that was written and read.
        assert!((eval.eval_perplexity.unwrap() / eval.eval_loss.exp() - 1.0).abs() < 1e-12);
    }
    assert_eq!(summary.answers, history.evals.last().unwrap().answers);
    assert!(std::fs::read_to_string(dir.path().join("summary.md")).unwrap().contains("Name a colour."));
}

#[test]
fn trackers_change_nothing_and_an_overwritten_run_takes_its_events_along() {
    let dir = tempfile::tempdir().unwrap();
    let (silent, told) = (dir.path().join("silent"), dir.path().join("told"));
    run(config(&silent), Resume::No, &mut ()).unwrap();
    let mut watched = config(&told);
    // No server is named: that is told, and ends nothing.
    let named = |variables: &[&str]| variables.iter().any(|name| std::env::var_os(name).is_some());
    let mut missing = Vec::new();
    watched.train.log_to = vec![Tracker::TensorBoard];
    for (tracker, variables, told) in [
        (Tracker::MlFlow, &["MLFLOW_TRACKING_URI"][..], "mlflow (train.log_to): set MLFLOW_TRACKING_URI"),
        (
            Tracker::Trackio,
            &["TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID"],
            "trackio (train.log_to): set TRACKIO_SERVER_URL",
        ),
    ] {
        if !named(variables) {
            watched.train.log_to.push(tracker);
            missing.push(told);
        }
    }
    let mut events = Told::default();
    run(watched.clone(), Resume::No, &mut StopAfter(3)).unwrap();
    run(watched.clone(), Resume::Auto, &mut events).unwrap();
    assert!(missing.iter().all(|told| events.has(told)), "{:?}", events.0);
    assert_eq!(losses(&silent), losses(&told));
    let files = || told.join("tensorboard").read_dir().unwrap().count();
    assert_eq!(files(), 2);
    run(watched, Start { overwrite: true, ..Start::default() }, &mut ()).unwrap();
    assert_eq!(files(), 1);
}
