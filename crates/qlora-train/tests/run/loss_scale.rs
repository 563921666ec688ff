//! Runs with loss scaling: in f16, and in f32, where it must change nothing.

use crate::common::{StopAfter, adapter, config, losses, run};
use adapter_io::checksum::Manifest;
use qlora_train::config::ComputeDtype;
use qlora_train::loss_scale::{LossScale, LossScalerState};
use qlora_train::metrics::{History, METRICS_FILE, StepMetrics};
use qlora_train::{Resume, TrainConfig, checkpoint};
use std::path::Path;

fn history(dir: &Path) -> Vec<StepMetrics> {
    History::read(&dir.join(METRICS_FILE)).unwrap().steps
}

fn in_f16(out: &Path) -> TrainConfig {
    let mut config = config(out);
    config.quantization.compute_dtype = ComputeDtype::F16;
    config
}

/// Gives the newest checkpoint another loss scale.
fn rescale(run: &Path, scale: f64) {
    let (_, path) = checkpoint::list(run).unwrap().pop().unwrap();
    let mut state = checkpoint::load(&path).unwrap().state;
    let kept = state.loss_scaler.unwrap();
    state.loss_scaler = Some(LossScalerState { scale, ..kept });
    std::fs::write(path.join("training_state.json"), serde_json::to_vec(&state).unwrap()).unwrap();
    std::fs::remove_file(path.join("checksums.json")).unwrap();
    Manifest::of(&path).unwrap().save(&path).unwrap();
}

/// Scales are powers of two, so that in f32 nothing but the exponents of gradients is another.
#[test]
fn loss_scaling_changes_no_bit_in_f32() {
    let dir = tempfile::tempdir().unwrap();
    let [plain, scaled] = [LossScale::Auto, LossScale::Dynamic].map(|scale| {
        let out = dir.path().join(scale.to_string());
        let mut config = config(&out);
        config.train.loss_scale = scale;
        run(config, Resume::No, &mut ()).unwrap();
        out
    });
    assert_eq!(losses(&plain), losses(&scaled));
    assert_eq!(adapter(&plain), adapter(&scaled));
    let scaling = history(&scaled).last().unwrap().loss_scaling.unwrap();
    assert_eq!((scaling.scale, scaling.skipped, scaling.skipped_steps), (65536.0, false, 0));
    assert!(history(&plain).iter().all(|step| step.loss_scaling.is_none()));
}

/// The same rows in f16 and in f32.
#[test]
fn f16_learns_as_f32_does() {
    let dir = tempfile::tempdir().unwrap();
    let [half, full] = [ComputeDtype::F16, ComputeDtype::F32].map(|dtype| {
        let mut config = config(&dir.path().join(format!("{dtype:?}")));
        (config.quantization.compute_dtype, config.train.max_steps) = (dtype, Some(20));
        let out = config.train.output_dir.clone();
        run(config, Resume::No, &mut ()).unwrap();
        history(&out)
    });
    for (half, full) in half.iter().zip(&full) {
        // f16 rounds to 2^-11 = 0.05 %, in every product of twenty steps.
        assert!((half.loss / full.loss - 1.0).abs() < 0.01, "{half:?}\n{full:?}");
        assert!((half.grad_norm / full.grad_norm - 1.0).abs() < 0.05, "{half:?}\n{full:?}");
    }
    assert!(half.last().unwrap().loss < 0.9 * half[0].loss);
}

/// A scale that gradients overflow at: steps are skipped until it is small enough, rows and steps go on, and a run that is
/// stopped in the midst of that is the one that is not.
#[test]
fn a_run_that_skips_steps_resumes_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let [whole, broken] = ["whole", "broken"].map(|name| dir.path().join(name));
    for out in [&whole, &broken] {
        run(in_f16(out), Resume::No, &mut StopAfter(1)).unwrap();
        rescale(out, 2.0_f64.powi(20));
    }
    run(in_f16(&whole), Resume::Auto, &mut ()).unwrap();
    for _ in 0..3 {
        run(in_f16(&broken), Resume::Auto, &mut StopAfter(1)).unwrap();
    }
    run(in_f16(&broken), Resume::Auto, &mut ()).unwrap();
    assert_eq!(losses(&whole), losses(&broken));
    assert!(adapter(&whole) == adapter(&broken));

    let steps = history(&whole);
    let scaling: Vec<_> = steps.iter().map(|step| step.loss_scaling.unwrap()).collect();
    let skipped = scaling.iter().filter(|scaling| scaling.skipped).count();
    assert!((1..5).contains(&skipped) && scaling[1].skipped && !scaling[5].skipped, "{scaling:?}");
    assert_eq!(scaling[5].skipped_steps, skipped as u64);
    assert_eq!(scaling[5].scale, 2.0_f64.powi(20 - skipped as i32));
    let summary = std::fs::read_to_string(whole.join("summary.md")).unwrap();
    assert!(summary.contains(&format!("| Skipped | {skipped} steps")), "{summary}");
    assert!(steps.windows(2).all(|pair| pair[0].epoch < pair[1].epoch && pair[0].step + 1 == pair[1].step));
}

#[test]
fn a_fixed_scale_that_overflows_ends_the_run() {
    let dir = tempfile::tempdir().unwrap();
    run(in_f16(dir.path()), Resume::No, &mut StopAfter(1)).unwrap();
    let mut config = in_f16(dir.path());
    config.train.loss_scale = LossScale::Fixed(2.0_f64.powi(40));
    let start = qlora_train::Start { accept_changes: true, ..Resume::Auto.into() };
    let message = run(config, start, &mut ()).unwrap_err().to_string();
    assert!(message.contains("training diverged") && message.contains("gradient norm"), "{message}");
}
