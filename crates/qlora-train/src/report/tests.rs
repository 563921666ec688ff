//! Tests of the report.

#![allow(clippy::unwrap_used)]

use super::curve::{curves, smoothed};
use super::*;
use crate::metrics::{EvalMetrics, StepMetrics};

fn history(steps: usize) -> History {
    let mut history = History::default();
    for k in 1..=steps {
        // A fall from 8.4 to about 0.25 with a deterministic ripple, like a small run's.
        let ripple = ((k * 7919) % 101) as f64 / 101.0 - 0.5;
        let loss = 0.25 + 8.1 * (-(k as f64) / 25.0).exp() + 0.25 * ripple * (-(k as f64) / 400.0).exp();
        history.steps.push(StepMetrics {
            step: k,
            epoch: k as f64 / 100.0,
            loss,
            learning_rate: 2e-3,
            grad_norm: 1.0,
            tokens: 1500,
            tokens_per_second: 1000.0,
            padding_tokens: 0,
            memory_bytes: (400 << 20) + k as u64,
            memory_in_use_bytes: 300 << 20,
            memory_reserved_bytes: 400 << 20,
            paging: None,
            loss_scaling: None,
            preference: None,
            slowest_rank: None,
            elapsed_seconds: 1.5 * k as f64,
        });
        if k % 25 == 0 {
            let eval_loss = loss + 0.05;
            history.evals.push(EvalMetrics {
                step: k,
                eval_loss,
                eval_accuracy: Some(0.5),
                eval_perplexity: Some(eval_loss.exp()),
                eval_tokens: 900,
                preference: None,
                answers: vec![Answer { prompt: "1 + 1?".into(), answer: format!("{k}"), tokens: 1, ended: true }],
                eval_seconds: 0.5,
                elapsed_seconds: 1.5 * k as f64 + 1.0,
            });
        }
    }
    history
}

fn run() -> RunInfo {
    RunInfo {
        model: "models/tiny".into(),
        device: "CPU, 2 threads".into(),
        compute_dtype: "f32".into(),
        quantization: "NF4, blocksize 64 with double quantization".into(),
        held: "3.6 GiB in 4 bits, 250.0 MiB in 16 bits".into(),
        base_parameters: 5_370_000,
        trainable_parameters: 500_000,
        adapted_modules: 42,
        rank: 16,
        train_data: "words.jsonl".into(),
        objective: None,
        train_rows: 1900,
        train_tokens: 230_456,
        eval_rows: 100,
        total_steps: 100,
        start_step: 0,
        ranks: 1,
        rows_per_step: 16,
        packing: None,
        activation_checkpointing: "full".into(),
        output_dir: "runs/words".into(),
    }
}

#[test]
fn a_summary_draws_its_figures_from_the_log() {
    let summary = Summary::new(run(), &history(100), Outcome::Finished, "runs/words/adapter".into());
    assert_eq!(summary.steps, 100);
    assert_eq!(summary.tokens, 150_000);
    // 100 quotients of 1500/1000, each within 1e-16 relative, summed.
    assert!((summary.tokens_per_second - 1000.0).abs() < 1e-9);
    assert_eq!(summary.peak_memory_bytes, (400 << 20) + 100);
    assert_eq!(summary.elapsed_seconds, 151.0);
    let steps = history(100).steps;
    let best = steps.iter().map(|step| step.loss).fold(f64::INFINITY, f64::min);
    assert_eq!(summary.best_loss.unwrap().0, best);
    assert_eq!(summary.first_loss, Some(steps[0].loss));
    assert_eq!(summary.best_eval_loss.unwrap().1, 100);
}

#[test]
fn the_page_says_what_was_trained_and_how_to_use_it() {
    let summary = Summary::new(run(), &history(100), Outcome::Finished, "runs/words/adapter".into());
    let page = summary.to_markdown();
    for part in [
        "# Training finished",
        "![Loss curve](loss.svg)",
        "`models/tiny`, 5.37 M parameters",
        "rank 16 on 42 modules, 500 k parameters (9.31 % of the base)",
        "`words.jsonl`: 1900 rows, 230 k tokens; 100 rows for evaluation",
        "100 of 100, 16 rows each, 150 k tokens in all",
        "1000 tokens/s on CPU, 2 threads",
        "| Peak memory | 400 MiB |",
        "| Evaluation | 50.0 % of tokens predicted right, perplexity ",
        "## Answers at the last evaluation\n\n```text\n1 + 1?\n```\n\n```text\n100\n```\n",
        "| Time | 2 min 31 s |",
        "qlora generate --model models/tiny --adapter runs/words/adapter --prompt",
    ] {
        assert!(page.contains(part), "{part} is not in\n{page}");
    }
    let stopped = Summary::new(run(), &history(7), Outcome::Interrupted, "runs/words/checkpoint-7".into());
    let page = stopped.to_markdown();
    assert!(page.contains("# Training interrupted") && page.contains("--resume"), "{page}");
}

#[test]
fn all_files_are_written() {
    let dir = tempfile::tempdir().unwrap();
    let history = history(60);
    let summary = Summary::new(run(), &history, Outcome::Finished, "adapter".into());
    summary.write(dir.path(), &history).unwrap();
    let json = std::fs::read(dir.path().join("summary.json")).unwrap();
    let read: Summary = serde_json::from_slice(&json).unwrap();
    assert_eq!((read.run, read.steps, read.outcome), (summary.run, summary.steps, summary.outcome));
    // serde_json may miss the last bit of an f64 when it reads one.
    assert!((read.last_loss.unwrap() - summary.last_loss.unwrap()).abs() < 1e-15);
    let svg = std::fs::read_to_string(dir.path().join("loss.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    for label in ["training, smoothed", "evaluation, lowest", "optimizer step", "learning rate", "gradient norm"] {
        assert!(svg.contains(label), "{label}");
    }
    assert!(std::fs::read_to_string(dir.path().join("summary.md")).unwrap().contains("loss.svg"));
}

#[test]
fn odd_histories_draw_too() {
    let mut nan = history(3);
    nan.steps[1].loss = f64::NAN;
    let mut flat = history(3);
    flat.steps.iter_mut().for_each(|step| step.loss = 1.0);
    for history in [History::default(), history(1), nan, flat] {
        let svg = curves(&history).unwrap();
        assert!(svg.trim_end().ends_with("</svg>") && !svg.contains("NaN"), "{svg}");
    }
}

/// Over a logarithmic axis equal factors have equal heights; over a linear one they have not.
#[test]
fn losses_of_a_wide_span_have_a_logarithmic_axis() {
    let heights = |losses: [f64; 3]| {
        let mut history = history(3);
        history.evals.clear();
        history.steps.iter_mut().zip(losses).for_each(|(step, loss)| step.loss = loss);
        let svg = curves(&history).unwrap();
        let lines = svg.split("<polyline").find(|line| line.contains("#2F81F7")).unwrap();
        let points = lines.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        let ys: Vec<f64> =
            points.split_whitespace().map(|point| point.split(',').nth(1).unwrap().parse().unwrap()).collect();
        [ys[1] - ys[0], ys[2] - ys[1]]
    };
    let [first, second] = heights([8.0, 2.0, 0.5]);
    // Pixels are whole.
    assert!(first > 50.0 && (first - second).abs() <= 2.0, "{first} {second}");
    let [first, second] = heights([3.6, 1.8, 0.9]);
    assert!((first - 2.0 * second).abs() <= 3.0, "{first} {second}");
}

#[test]
fn smoothing_keeps_a_line_and_skips_what_is_not_a_number() {
    // A symmetric mean of a line is the line: off by the rounding of sums of at most 13 values.
    let line: Vec<f64> = (0..200).map(|i| 5.0 - 0.02 * f64::from(i)).collect();
    assert!(smoothed(&line).iter().zip(&line).all(|(out, value)| (out - value).abs() < 1e-13));
    let mut values = vec![2.0; 200];
    values[0] = f64::NAN;
    values[50] = f64::INFINITY;
    let out = smoothed(&values);
    assert!(out[0].is_nan() && out[1..].iter().all(|value| (value - 2.0).abs() < 1e-13));
}

#[test]
fn numbers_read_as_people_write_them() {
    for (n, text) in
        [(0, "0"), (999, "999"), (1000, "1.00 k"), (12_345, "12.3 k"), (999_950, "1.00 M"), (6_738_000_000, "6.74 B")]
    {
        assert_eq!(count(n), text);
    }
    for (n, text) in [(1023, "1.00 KiB"), (512, "512 bytes"), (7 << 30, "7.00 GiB"), (1000 << 20, "0.98 GiB")] {
        assert_eq!(memory(n), text);
    }
    for (s, text) in [
        (0.04, "0.0 s"),
        (59.9, "59.9 s"),
        (59.97, "1 min 00 s"),
        (245.0, "4 min 05 s"),
        (7620.0, "2 h 07 min"),
        (90_000.0, "1 d 01 h"),
        (f64::NAN, "-"),
    ] {
        assert_eq!(duration(s), text);
    }
}
