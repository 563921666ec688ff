//! Several ranks, which are threads here, beside one process: the same bits, whoever computes what.

use crate::common::{StopAfter, adapter, config, listing, losses, refused, run};
use qlora_data::Packing;
use qlora_dist::{Group, Place, Timeouts};
use qlora_layers::{LoraConfig, TargetModules};
use qlora_train::metrics::{History, METRICS_FILE};
use qlora_train::report::{Outcome, Summary};
use qlora_train::{Resume, Start, TrainConfig, TrainError, TrainEvents, Trainer};
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

const SHORT: Timeouts = Timeouts { rendezvous: Duration::from_secs(20), silence: Duration::from_secs(20) };

/// Trains with a rank for each configuration, rank 0's first.
fn together(
    configs: Vec<TrainConfig>,
    start: &Start,
    events: impl Fn(usize) -> Box<dyn TrainEvents> + Sync,
) -> Vec<Result<Summary, TrainError>> {
    let port = TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port();
    let world_size = configs.len();
    let events = &events;
    std::thread::scope(|scope| {
        let rank = |(rank, config): (usize, TrainConfig)| {
            let place = Place { rank, world_size, local_rank: rank, master_port: port, ..Place::alone() };
            scope.spawn(move || {
                let group = Group::join(place, SHORT)?;
                let mut events = events(rank);
                Trainer::in_group(config, start.clone(), group, &mut *events)?.run()
            })
        };
        let threads: Vec<_> = configs.into_iter().enumerate().map(rank).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn silent(_: usize) -> Box<dyn TrainEvents> {
    Box::new(())
}

/// The configuration of each of `count` ranks with `accumulation` micro-batches.
fn shares(config: &TrainConfig, count: usize, accumulation: usize) -> Vec<TrainConfig> {
    let mut config = config.clone();
    config.train.gradient_accumulation_steps = accumulation;
    vec![config; count]
}

fn evals(dir: &Path) -> Vec<(usize, u64, Option<u64>)> {
    let history = History::read(&dir.join(METRICS_FILE)).unwrap();
    history.evals.iter().map(|e| (e.step, e.eval_loss.to_bits(), e.eval_accuracy.map(f64::to_bits))).collect()
}

fn state(dir: &Path, step: usize) -> serde_json::Value {
    let path = dir.join(format!("checkpoint-{step:06}/training_state.json"));
    let mut state: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    // It names the output folder.
    state["config"] = serde_json::Value::Null;
    state
}

/// Sequences are dealt whole, and a rank's part is that of one process.
#[test]
fn ranks_share_packed_rows() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str| {
        let mut config = config(&dir.path().join(name));
        (config.data.max_length, config.data.packing) = (200, Packing::Auto);
        config.train.gradient_accumulation_steps = 4;
        config.train.max_steps = Some(2);
        config
    };
    let (one, many) = (of("one"), of("many"));
    run(one.clone(), Resume::No, &mut ()).unwrap();
    for summary in together(shares(&many, 2, 2), &Start::default(), silent) {
        let run = summary.unwrap().run;
        assert_eq!((run.ranks, run.rows_per_step, run.packing.is_some()), (2, 8, true));
    }
    let [one, many] = [&one, &many].map(|config| &*config.train.output_dir);
    assert_eq!(losses(one), losses(many));
    assert_eq!(evals(one), evals(many));
    assert_eq!(adapter(one), adapter(many));
}

#[test]
fn ranks_give_what_one_process_gives_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str, lora: &LoraConfig| {
        let mut config = config(&dir.path().join(name));
        config.lora = lora.clone();
        config.train.gradient_accumulation_steps = 4;
        config.train.max_steps = Some(3);
        config.train.eval_every = 2;
        config
    };
    let names = |names: &[&str]| TargetModules::Names(names.iter().map(ToString::to_string).collect());
    let plain = LoraConfig { rank: 4, alpha: 8.0, dropout: 0.1, ..Default::default() };
    let ends = LoraConfig {
        use_dora: true,
        target_modules: names(&["q_proj", "down_proj", "embed_tokens", "lm_head"]),
        modules_to_save: vec!["norm".into()],
        ..plain.clone()
    };
    for (kind, lora, counts) in [("plain", plain, &[(2, 2), (4, 1)][..]), ("ends", ends, &[(2, 2)])] {
        let one = of(&format!("{kind}-1"), &lora);
        run(one.clone(), Resume::No, &mut ()).unwrap();
        let one = &one.train.output_dir;
        assert!(evals(one).len() > 1 && losses(one).len() == 3);
        for (count, accumulation) in counts {
            let many = of(&format!("{kind}-{count}"), &lora);
            for summary in together(shares(&many, *count, *accumulation), &Start::default(), silent) {
                let summary = summary.unwrap();
                assert_eq!(
                    (summary.outcome, summary.run.ranks, summary.run.rows_per_step),
                    (Outcome::Finished, *count, 8)
                );
            }
            let many = &many.train.output_dir;
            assert_eq!(losses(one), losses(many), "{kind}, {count} ranks");
            assert_eq!(evals(one), evals(many), "{kind}, {count} ranks");
            assert_eq!(adapter(one), adapter(many), "{kind}, {count} ranks");
            assert_eq!(state(one, 3), state(many, 3), "{kind}, {count} ranks");
            let moments = |dir: &Path| std::fs::read(dir.join("checkpoint-000003/optimizer.safetensors")).unwrap();
            assert_eq!(moments(one), moments(many), "{kind}, {count} ranks");
            assert_eq!(listing(one), listing(many));
        }
    }
}

/// The last step of an epoch has fewer micro-batches than there are ranks, and others have some without a label.
#[test]
fn a_short_step_and_rows_without_labels_are_shared_too() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    let row = |words: usize| format!("{{\"prompt\": \"{}\", \"completion\": \" blue\"}}\n", "sky ".repeat(words));
    std::fs::write(&rows, (1..=9).map(row).collect::<String>()).unwrap();
    let of = |name: &str| {
        let mut config = config(&dir.path().join(name));
        config.data.train = rows.clone().into();
        config.data.eval_fraction = 0.0;
        config.train.batch_size = 1;
        config.train.gradient_accumulation_steps = 4;
        config.train.max_steps = Some(4);
        config
    };
    let (one, many) = (of("one"), of("many"));
    run(one.clone(), Resume::No, &mut ()).unwrap();
    together(shares(&many, 2, 2), &Start::default(), silent).into_iter().for_each(|summary| drop(summary.unwrap()));
    assert_eq!(losses(&one.train.output_dir), losses(&many.train.output_dir));
    assert_eq!(adapter(&one.train.output_dir), adapter(&many.train.output_dir));
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str| {
        let mut config = config(&dir.path().join(name));
        config.train.gradient_accumulation_steps = 4;
        config.train.max_steps = Some(4);
        config
    };
    let (whole, broken) = (of("whole"), of("broken"));
    run(whole.clone(), Resume::No, &mut ()).unwrap();
    // Stopped on one rank, all stop after the same step.
    let stop = |rank: usize| -> Box<dyn TrainEvents> { if rank == 1 { Box::new(StopAfter(2)) } else { Box::new(()) } };
    for summary in together(shares(&broken, 2, 2), &Start::default(), stop) {
        assert_eq!(summary.unwrap().outcome, Outcome::Interrupted);
    }
    // Steps of another size would be another run.
    let mut smaller = broken.clone();
    smaller.train.gradient_accumulation_steps = 1;
    let message = refused(smaller.clone(), Resume::Auto);
    assert!(message.contains("train.gradient_accumulation_steps was 4, now is 1"), "{message}");
    for message in
        together(vec![smaller; 2], &Resume::Auto.into(), silent).into_iter().map(|r| r.unwrap_err().to_string())
    {
        assert!(message.contains("was 4, now is 2"), "{message}");
    }
    for summary in together(shares(&broken, 4, 1), &Resume::Auto.into(), silent) {
        summary.unwrap();
    }
    assert_eq!(losses(&whole.train.output_dir), losses(&broken.train.output_dir));
    assert_eq!(adapter(&whole.train.output_dir), adapter(&broken.train.output_dir));
}

#[test]
fn what_is_wrong_with_one_rank_ends_all() {
    let dir = tempfile::tempdir().unwrap();
    let start = config(&dir.path().join("run"));
    let errors = |change: &dyn Fn(&mut TrainConfig)| {
        let mut configs = shares(&start, 2, 2);
        change(&mut configs[1]);
        let ended = together(configs, &Start::default(), silent);
        ended.into_iter().map(|summary| summary.unwrap_err().to_string()).collect::<Vec<_>>()
    };
    for message in errors(&|config| config.train.seed = 43) {
        assert!(message.contains("train.seed is 42 on rank 0 (") && message.contains("43 on rank 1 ("), "{message}");
    }
    let other = dir.path().join("other.jsonl");
    std::fs::write(&other, "{\"prompt\": \"a\", \"completion\": \" b\"}\n".repeat(600)).unwrap();
    for message in errors(&|config| config.data.train = other.clone().into()) {
        assert!(message.contains("the training rows") && message.contains("on rank 1 ("), "{message}");
    }
    // Its own words there, and who said them elsewhere.
    let messages = errors(&|config| config.data.train = "nowhere.jsonl".into());
    assert!(messages[0].starts_with("rank 1 on ") && messages[0].contains("nowhere.jsonl"), "{messages:?}");
    assert!(messages[1].starts_with("nowhere.jsonl") || messages[1].contains("nowhere.jsonl"), "{messages:?}");
    assert!(!dir.path().join("run").exists(), "nothing was written");
    std::fs::create_dir_all(dir.path().join("run/adapter")).unwrap();
    let messages = errors(&|_| ());
    assert!(messages[0].contains("--overwrite") && messages[1].contains(&messages[0]), "{messages:?}");
}

/// Each rank holds a part of the frozen weights, whatever their number, and whoever has micro-batches to compute: also where a step has fewer than
/// there are ranks, and where the rows of an evaluation do not share out.
#[test]
fn ranks_that_share_the_base_give_what_one_process_gives() {
    let dir = tempfile::tempdir().unwrap();
    let rows = dir.path().join("rows.jsonl");
    let row = |words: usize| format!("{{\"prompt\": \"{}\", \"completion\": \" blue\"}}\n", "sky ".repeat(words));
    std::fs::write(&rows, (1..=11).map(row).collect::<String>()).unwrap();
    let of = |name: &str, ranks: usize| {
        let mut config = config(&dir.path().join(name));
        config.data.train = rows.clone().into();
        config.data.eval = Some(rows.clone().into());
        config.data.eval_fraction = 0.0;
        config.train.batch_size = 1;
        config.train.gradient_accumulation_steps = 4 / ranks;
        config.train.max_steps = Some(4);
        config.train.eval_every = 2;
        config.distributed.shard_base = true;
        // Rank 0 answers, as long as it has something to say.
        config.eval.prompts = vec!["What is 2 + 3?".into(), "Name a colour.".into()];
        config.eval.max_new_tokens = 5;
        config
    };
    let answers = |out: &Path| {
        let history = History::read(&out.join(METRICS_FILE)).unwrap();
        history.evals.into_iter().map(|eval| eval.answers).collect::<Vec<_>>()
    };
    let one = of("one", 1);
    run(one.clone(), Resume::No, &mut ()).unwrap();
    let one = &one.train.output_dir;
    for ranks in [2, 4] {
        let many = of(&format!("{ranks}"), ranks);
        for summary in together(vec![many.clone(); ranks], &Start::default(), silent) {
            assert_eq!(summary.unwrap().run.ranks, ranks);
        }
        let many = &many.train.output_dir;
        assert_eq!(losses(one), losses(many), "{ranks} ranks");
        assert_eq!(evals(one), evals(many), "{ranks} ranks");
        assert_eq!(adapter(one), adapter(many), "{ranks} ranks");
        assert!(answers(one).iter().all(|answers| answers.len() == 2));
        assert_eq!(answers(one), answers(many), "{ranks} ranks");
    }
}
