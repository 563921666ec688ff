//! Runs over packed rows: what they learn, and that they stop, go on and are shared as all runs are.

use crate::common::{Notices, StopAfter, Told, adapter, config, losses, refused, root, run};
use burn::tensor::{Device, FloatDType};
use chat_text::Tokenizer;
use qlora_data::{Batch, BatchOrder, Packing, load_splits};
use qlora_layers::{ActivationCheckpointing, Initialization};
use qlora_models::{Decoder, LoadOptions};
use qlora_train::metrics::{History, METRICS_FILE};
use qlora_train::{Resume, TrainConfig};
use std::path::Path;

/// Sequences of up to 400 tokens, of four or five rows each; two are a micro-batch.
fn packed(output_dir: &Path) -> TrainConfig {
    let mut config = config(output_dir);
    config.data.max_length = 400;
    config.data.packing = Packing::Auto;
    config
}

/// Each step's loss is the sum over its rows, each alone in its micro-batch, divided by the number of their tokens.
#[test]
fn a_run_over_packed_rows_is_that_of_the_sums_over_its_rows() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = packed(dir.path());
    config.lora.dropout = 0.0;
    // Rows alone have the noise of other places.
    config.train.neftune_alpha = 0.0;
    let mut told = Notices::default();
    let summary = run(config.clone(), Resume::No, &mut told).unwrap();
    let history = History::read(&dir.path().join(METRICS_FILE)).unwrap();
    assert_eq!(history.steps.len(), 6);

    let base = root().join("testdata/reference/tiny-llama");
    let tokenizer = Tokenizer::from_dir(&base).unwrap();
    let (train, eval) = load_splits(&config.data, &tokenizer, config.train.seed).unwrap();
    let order = BatchOrder::new(&train.examples, &config.data, config.train.batch_size, config.train.seed, 0);
    let info = summary.run.packing.unwrap();
    assert_eq!(info.rows, train.examples.len());
    assert_eq!((info.sequences, info.max_length, summary.run.rows_per_step), (order.sequences(), 400, 4));
    // Rows of 73 to 105 tokens leave a corner.
    assert!(info.fill > 0.85, "{info:?}");
    let note = told.0.iter().find(|note| note.starts_with("data.packing = \"auto\"")).unwrap();
    assert!(note.contains(&format!("end to end in {} sequences of up to 400 tokens", info.sequences)), "{note}");

    let options = LoadOptions { quantization: config.quantization.quant_config(), dtype: FloatDType::F32 };
    let mut model = Decoder::load(&base, options, &Device::flex(), &mut |_| ()).unwrap();
    model.attach_lora(&config.lora, config.train.seed).unwrap();
    let mut engine = qlora_train::engine(model, &config.train, ActivationCheckpointing::None).unwrap();
    let alone = |rows: &[usize]| -> Vec<Batch> {
        rows.iter().map(|row| Batch::new([&train.examples.get(*row).unwrap()], 0)).collect()
    };
    let evaluated =
        |engine: &qlora_train::Engine| engine.evaluate(eval.examples.iter().map(|row| Batch::new([row], 0))).unwrap();
    // Sums in another order, and what the updates make of their last bits.
    let near = |found: f64, expected: f64, what: &str| {
        assert!((found / expected - 1.0).abs() < 1e-4, "{what}: {found} against {expected}");
    };
    let before = evaluated(&engine);
    near(history.evals[0].eval_loss, before.loss, "evaluation before");
    let rows: Vec<Vec<usize>> = order.rows(0).collect();
    for (step, (metrics, rows)) in history.steps.iter().zip(rows.chunks(2)).enumerate() {
        let rows = rows.concat();
        let tokens: usize = rows.iter().map(|row| train.examples.get(*row).unwrap().input_ids.len()).sum();
        assert_eq!((metrics.tokens, metrics.padding_tokens), (tokens as u64, 0));
        let rate = config.train.learning_rate_at(step, 6);
        let output = engine.step(&alone(&rows), rate, step as u64).unwrap();
        near(metrics.loss, output.loss, &format!("step {step}"));
        near(metrics.grad_norm, output.grad_norm, &format!("norm of step {step}"));
    }
    let after = evaluated(&engine);
    let last = history.evals.last().unwrap();
    assert_eq!((last.step, last.eval_tokens), (6, after.tokens as u64));
    near(last.eval_loss, after.loss, "evaluation after");
}

#[test]
fn packed_runs_resume_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    for init in [Initialization::Default, Initialization::Eva] {
        let of = |name: &str| {
            let mut config = packed(&dir.path().join(format!("{init:?}-{name}")));
            config.lora.init = init;
            config.lora.eva_batches = 2;
            config.train.max_steps = Some(3);
            config
        };
        let (whole, broken) = (of("whole"), of("broken"));
        run(whole.clone(), Resume::No, &mut ()).unwrap();
        run(broken.clone(), Resume::No, &mut StopAfter(2)).unwrap();
        // Other sequences, other steps.
        let mut padded = broken.clone();
        padded.data.packing = Packing::Off;
        let message = refused(padded, Resume::Auto);
        assert!(message.contains("data.packing was \"auto\", now is absent"), "{message}");
        run(broken.clone(), Resume::Auto, &mut ()).unwrap();
        assert_eq!(losses(&whole.train.output_dir), losses(&broken.train.output_dir));
        assert!(adapter(&whole.train.output_dir) == adapter(&broken.train.output_dir));
    }
}

/// With "auto", rows of which no two fit into a sequence are the rows of a run without packing.
#[test]
fn rows_that_do_not_fit_together_are_padded() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str, packing| {
        let mut config = config(&dir.path().join(name));
        (config.data.max_length, config.data.packing, config.train.max_steps) = (100, packing, Some(2));
        config
    };
    let (auto, off) = (of("auto", Packing::Auto), of("off", Packing::Off));
    let mut told = Notices::default();
    let summary = run(auto.clone(), Resume::No, &mut told).unwrap();
    assert_eq!(summary.run.packing, None);
    let words = "no two of the ";
    assert!(told.0.iter().any(|note| note.contains(words)), "{:?}", told.0);
    run(off.clone(), Resume::No, &mut Told::default()).unwrap();
    assert!(adapter(&auto.train.output_dir) == adapter(&off.train.output_dir));
}
