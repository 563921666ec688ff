//! Interrupted and resumed runs, bit for bit; every policy and optimizer; and output that can't be written.

use crate::common::{StopAfter, adapter, config, losses, run};
use adapter_io::TokenIndices;
use paged_optim::{Budget, OptimizerKind};
use qlora_layers::{ActivationCheckpointing, Initialization, LoraConfig, TargetModules};
use qlora_train::metrics::{History, METRICS_FILE};
use qlora_train::report::Outcome;
use qlora_train::{Resume, TrainEvents, Trainer, checkpoint};
use std::path::Path;

fn names(names: &[&str]) -> TargetModules {
    TargetModules::Names(names.iter().map(ToString::to_string).collect())
}

/// Adapters beyond plain LoRA: every kind of trained tensor, and every initialisation that touches more than factors.
fn kinds() -> Vec<(&'static str, LoraConfig)> {
    let plain = LoraConfig { rank: 2, alpha: 4.0, dropout: 0.1, ..Default::default() };
    let few = LoraConfig {
        target_modules: names(&["q_proj", "down_proj"]),
        layers_to_transform: Some(vec![0, 5]),
        ..plain.clone()
    };
    vec![
        (
            "dora, embedding, head, norms",
            LoraConfig {
                use_dora: true,
                use_rslora: true,
                target_modules: names(&["q_proj", "down_proj", "embed_tokens", "lm_head"]),
                modules_to_save: vec!["norm".into()],
                ..plain.clone()
            },
        ),
        (
            "bias, whole modules",
            LoraConfig {
                lora_bias: true,
                modules_to_save: vec!["layers.1.mlp".into(), "lm_head".into(), "embed_tokens".into()],
                ..plain.clone()
            },
        ),
        (
            "tokens, norms",
            LoraConfig {
                trainable_token_indices: Some(TokenIndices::Embedding(vec![2, 1, 300])),
                modules_to_save: vec!["norm".into()],
                ..few.clone()
            },
        ),
        (
            "tokens, pissa",
            LoraConfig {
                trainable_token_indices: Some(TokenIndices::Embedding(vec![2, 1])),
                init: Initialization::Pissa { iterations: Some(4) },
                ..few.clone()
            },
        ),
        ("pissa", LoraConfig { init: Initialization::Pissa { iterations: None }, use_dora: true, ..few.clone() }),
        ("loftq", LoraConfig { init: Initialization::Loftq, loftq_iterations: 2, ..few.clone() }),
        ("eva", LoraConfig { init: Initialization::Eva, eva_batches: 2, ..few }),
    ]
}

#[test]
fn every_kind_resumes_bit_for_bit_and_under_both_policies() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, lora) in kinds() {
        let of = |name: &str| {
            let mut config = config(&dir.path().join(kind).join(name));
            config.lora = lora.clone();
            config.train.max_steps = Some(3);
            config
        };
        let whole = of("whole");
        run(whole.clone(), Resume::No, &mut ()).unwrap();
        let broken = of("broken");
        run(broken.clone(), Resume::No, &mut StopAfter(2)).unwrap();
        run(broken.clone(), Resume::Auto, &mut ()).unwrap();
        assert_eq!(losses(&whole.train.output_dir), losses(&broken.train.output_dir), "{kind}");
        assert!(adapter(&whole.train.output_dir) == adapter(&broken.train.output_dir), "{kind}: resumed");
        let mut plain = of("plain");
        plain.train.activation_checkpointing = ActivationCheckpointing::None.into();
        run(plain.clone(), Resume::No, &mut ()).unwrap();
        assert!(adapter(&whole.train.output_dir) == adapter(&plain.train.output_dir), "{kind}: policies");
    }
}

/// Whatever is trained moves: no parameter is listed that no gradient reaches.
#[test]
fn every_parameter_is_reached() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, lora) in kinds().into_iter().take(3) {
        let mut config = config(&dir.path().join(kind));
        (config.lora, config.train.max_steps) = (lora, Some(2));
        let mut silent = ();
        let trainer = Trainer::new(config.clone(), Resume::No, &mut silent).unwrap();
        let before = trainer.model().export_adapter("base", None).unwrap();
        trainer.run().unwrap();
        let after = adapter_io::Adapter::load(&config.train.output_dir.join("adapter")).unwrap();
        assert_eq!(before.tensors.keys().collect::<Vec<_>>(), after.tensors.keys().collect::<Vec<_>>(), "{kind}");
        for (key, tensor) in &before.tensors {
            assert!(tensor != &after.tensors[key], "{kind}: {key}");
        }
    }
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
    let summary = run(config(&whole), Resume::No, &mut ()).unwrap();
    assert_eq!((summary.outcome, summary.steps), (Outcome::Finished, 6));
    assert!(summary.last_loss < summary.first_loss);

    let stopped = run(config(&broken), Resume::No, &mut StopAfter(3)).unwrap();
    assert_eq!((stopped.outcome, stopped.steps), (Outcome::Interrupted, 3));
    assert!(!broken.join("adapter").exists());
    let resumed = run(config(&broken), Resume::Auto, &mut ()).unwrap();
    assert_eq!((resumed.outcome, resumed.steps), (Outcome::Finished, 6));
    assert_eq!(losses(&whole), losses(&broken));
    assert_eq!(adapter(&whole), adapter(&broken));

    // From an older checkpoint too: the log is cut back to it.
    let steps: Vec<usize> = checkpoint::list(&broken).unwrap().into_iter().map(|(step, _)| step).collect();
    assert_eq!(steps, [4, 6], "save_limit keeps the newest two");
    run(config(&broken), Resume::From(broken.join("checkpoint-000004")), &mut ()).unwrap();
    assert_eq!(losses(&whole), losses(&broken));
    assert_eq!(adapter(&whole), adapter(&broken));
}

/// With every optimizer: stopped and resumed under a budget that holds a tenth of the state, a run is the one that had
/// all the room and never stopped.
#[test]
fn every_optimizer_resumes_bit_for_bit_under_another_budget() {
    for kind in OptimizerKind::ALL {
        let dir = tempfile::tempdir().unwrap();
        let (whole, broken) = (dir.path().join("whole"), dir.path().join("broken"));
        let with = |out: &Path, budget| {
            let mut config = config(out);
            // Factors of 4096 elements and more: below that state is never 8-bit.
            config.lora.rank = 16;
            config.train.max_steps = Some(4);
            config.train.optimizer = kind;
            config.train.optimizer_budget = budget;
            config
        };
        run(with(&whole, Budget::Unlimited), Resume::No, &mut ()).unwrap();
        let history = History::read(&whole.join(METRICS_FILE)).unwrap();
        assert!(history.steps.iter().all(|step| step.paging.is_none()), "nothing was moved, nothing is said");
        let state = std::fs::metadata(whole.join("checkpoint-000004/optimizer.safetensors")).unwrap().len();

        let tenth = Budget::Bytes(state / 10);
        run(with(&broken, tenth), Resume::No, &mut StopAfter(2)).unwrap();
        run(with(&broken, Budget::Bytes(state / 3)), Resume::Auto, &mut ()).unwrap();
        assert_eq!(losses(&whole), losses(&broken), "{kind}");
        assert_eq!(adapter(&whole), adapter(&broken), "{kind}");
        let files = [&whole, &broken].map(|out| std::fs::read(out.join("checkpoint-000004/optimizer.safetensors")));
        let [whole_state, broken_state] = files.map(Result::unwrap);
        assert!(whole_state == broken_state, "{kind}: what is saved does not depend on the budget");
        let history = History::read(&broken.join(METRICS_FILE)).unwrap();
        let paging = history.steps[1].paging.unwrap();
        assert!(paging.evicted > 0 && paging.bytes_in > state / 2 && paging.resident_bytes <= state / 10, "{paging:?}");

        let other = OptimizerKind::ALL.into_iter().find(|other| *other != kind).unwrap();
        let mut changed = with(&broken, tenth);
        changed.train.optimizer = other;
        let message = run(changed, Resume::Auto, &mut ()).unwrap_err().to_string();
        assert!(message.contains(&format!("train.optimizer was \"{kind}\", now is \"{other}\"")), "{message}");
        let checkpoint = checkpoint::load(&broken.join("checkpoint-000004")).unwrap();
        let message = checkpoint.moments(&[], other).unwrap_err().to_string();
        assert!(
            message.contains(&format!("saved by the optimizer {kind}")) && message.contains("optimizer.safetensors")
        );
    }
}

#[test]
fn activation_checkpointing_does_not_change_a_bit() {
    let dir = tempfile::tempdir().unwrap();
    let adapters = ActivationCheckpointing::ALL.map(|policy| {
        let out = dir.path().join(format!("{policy:?}"));
        let mut config = config(&out);
        config.train.max_steps = Some(2);
        config.train.activation_checkpointing = policy.into();
        run(config, Resume::No, &mut ()).unwrap();
        adapter(&out)
    });
    for (policy, of_policy) in ActivationCheckpointing::ALL.iter().zip(&adapters) {
        assert_eq!(&adapters[0], of_policy, "{policy:?}");
    }
}

#[test]
fn accumulation_over_micro_batches_equals_one_large_batch() {
    let dir = tempfile::tempdir().unwrap();
    let first_steps = [(4, 1), (2, 2), (1, 4)].map(|(batch_size, accumulation)| {
        let mut config = config(&dir.path().join(format!("{batch_size}")));
        (config.lora.dropout, config.train.neftune_alpha) = (0.0, 0.0);
        config.train.max_steps = Some(1);
        config.train.batch_size = batch_size;
        config.train.gradient_accumulation_steps = accumulation;
        let out = config.train.output_dir.clone();
        run(config, Resume::No, &mut ()).unwrap();
        History::read(&out.join(METRICS_FILE)).unwrap().steps.remove(0)
    });
    for step in &first_steps[1..] {
        // The same sums in another order, in f32: some 1e-7 relative.
        assert!((step.loss / first_steps[0].loss - 1.0).abs() < 1e-5, "{step:?}");
        assert!((step.grad_norm / first_steps[0].grad_norm - 1.0).abs() < 1e-4, "{step:?}");
    }
}

#[test]
fn an_unwritable_output_is_an_error_and_the_previous_checkpoint_stays() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "in the way").unwrap();
    let message = run(config(&file.join("run")), Resume::No, &mut ()).unwrap_err().to_string();
    assert!(message.contains("file"), "{message}");

    // The output folder is lost in the middle of a run: the run ends with an error that names the path, and
    // the checkpoint of before can be resumed where it is now.
    struct Swap<'a>(&'a Path, &'a Path);
    impl TrainEvents for Swap<'_> {
        fn on_save(&mut self, checkpoint: &Path) {
            if checkpoint.ends_with("checkpoint-000002") {
                std::fs::rename(self.0, self.1).unwrap();
                std::fs::write(self.0, "in the way").unwrap();
            }
        }
    }
    let (out, moved) = (dir.path().join("run"), dir.path().join("moved"));
    let message = run(config(&out), Resume::No, &mut Swap(&out, &moved)).unwrap_err().to_string();
    assert!(message.contains("run"), "{message}");
    assert_eq!(run(config(&moved), Resume::Auto, &mut ()).unwrap().steps, 6);
}
