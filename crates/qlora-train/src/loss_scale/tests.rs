//! The state machine against one written down from PyTorch's kernel, and the key's words.

#![allow(clippy::unwrap_used)]

use super::*;
use proptest::prelude::*;

/// `amp_update_scale_cuda_kernel` (aten/src/ATen/native/cuda/AmpKernels.cu), with GradScaler's default arguments.
struct GradScaler {
    current_scale: f32,
    growth_tracker: i32,
}

impl GradScaler {
    fn update(&mut self, found_inf: f32) {
        if found_inf != 0.0 {
            self.current_scale *= 0.5;
            self.growth_tracker = 0;
        } else {
            let successful = self.growth_tracker + 1;
            if successful == 2000 {
                let new_scale = self.current_scale * 2.0;
                if new_scale.is_finite() {
                    self.current_scale = new_scale;
                }
                self.growth_tracker = 0;
            } else {
                self.growth_tracker = successful;
            }
        }
    }
}

/// Runs of good steps, each ended by one that overflows, in one of three ways.
fn steps() -> impl Strategy<Value = Vec<(usize, u8)>> {
    proptest::collection::vec((prop_oneof![0_usize..4, 1997_usize..2004, 0_usize..9000], 0_u8..3), 0..40)
}

fn numbers(how: u8) -> (f32, f32) {
    [(1.0, f32::INFINITY), (1.0, f32::NAN), (f32::NAN, 1.0)][usize::from(how)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_scale_is_that_of_grad_scaler(runs in steps()) {
        let mut scaler = LossScaler::new(LossScale::Auto, FloatDType::F16);
        let mut torch = GradScaler { current_scale: 65536.0, growth_tracker: 0 };
        let mut skipped = 0;
        for (good, how) in runs {
            for _ in 0..good {
                let before = scaler.scale();
                let done = scaler.update(1.0, 1.0, 1e-3).unwrap().unwrap();
                prop_assert_eq!(done, LossScaling { scale: before.into(), skipped: false, skipped_steps: skipped });
                torch.update(0.0);
            }
            let (loss, norm) = numbers(how);
            let before = scaler.clone();
            match scaler.update(loss, norm, 1e-3) {
                Ok(done) => {
                    torch.update(1.0);
                    skipped += 1;
                    let done = done.unwrap();
                    prop_assert!(done.skipped && done.skipped_steps == skipped && done.scale == before.state.scale);
                }
                Err(error) => {
                    prop_assert!(before.scale() < 2.0, "{error}");
                    prop_assert!(scaler == before, "an error changes nothing");
                    return Ok(());
                }
            }
            let state = scaler.state().unwrap();
            prop_assert_eq!(state.scale as f32, torch.current_scale);
            prop_assert_eq!(state.growth_tracker as i32, torch.growth_tracker);
            // From a checkpoint it goes on alike.
            let mut resumed = LossScaler::new(LossScale::Dynamic, FloatDType::F32);
            resumed.restore(state);
            prop_assert!(resumed == scaler);
        }
    }
}

#[test]
fn a_scale_that_grows_on_and_on_stays_finite() {
    let mut scaler = LossScaler::new(LossScale::Dynamic, FloatDType::F16);
    for _ in 0..2000 * 130 {
        scaler.update(1.0, 1.0, 1e-3).unwrap();
    }
    assert_eq!(scaler.scale(), 2.0_f32.powi(127));
}

#[test]
fn without_an_end_of_overflows_the_run_ends() {
    let mut scaler = LossScaler::new(LossScale::Dynamic, FloatDType::F16);
    for skipped in 1..=16 {
        let done = scaler.update(2.0, f32::INFINITY, 1e-3).unwrap().unwrap();
        assert_eq!(done.skipped_steps, skipped);
    }
    let message = scaler.update(2.0, f32::INFINITY, 1e-3).unwrap_err().to_string();
    for words in ["loss scale of 1", "16 steps", "\"bf16\"", "\"f32\""] {
        assert!(message.contains(words), "{words}: {message}");
    }
}

#[test]
fn a_fixed_scale_and_none_end_the_run_at_once() {
    for (choice, scale) in [(LossScale::Fixed(128.0), 128.0), (LossScale::Off, 1.0), (LossScale::Auto, 1.0)] {
        let mut scaler = LossScaler::new(choice, FloatDType::BF16);
        assert_eq!(scaler.scale(), scale);
        let done = scaler.update(2.0, 3.0, 1e-3).unwrap();
        assert_eq!(
            done.map(|done| (done.scale, done.skipped)),
            choice.is_on(FloatDType::BF16).then_some((128.0, false))
        );
        assert!(matches!(scaler.update(2.0, f32::NAN, 1e-3), Err(TrainError::NotFinite { .. })), "{choice}");
        // What was skipped before stays known: the optimizer's count depends on it.
        scaler.restore(LossScalerState { scale: 4.0, growth_tracker: 7, skipped_steps: 3 });
        assert_eq!(scaler.scale(), scale);
        assert_eq!(scaler.state().map(|state| state.skipped_steps), Some(3));
    }
}

#[test]
fn the_key_reads_words_and_numbers() {
    #[derive(Deserialize, Serialize, Debug, PartialEq)]
    struct Key {
        k: LossScale,
    }
    let parse = |text: &str| toml::from_str::<Key>(text).map(|key| key.k);
    for (text, expected) in [
        ("k = \"auto\"", LossScale::Auto),
        ("k = \"dynamic\"", LossScale::Dynamic),
        ("k = \"off\"", LossScale::Off),
        ("k = 128", LossScale::Fixed(128.0)),
        ("k = 0.5", LossScale::Fixed(0.5)),
    ] {
        let key = parse(text).unwrap();
        assert_eq!(key, expected);
        let written = toml::to_string(&Key { k: key }).unwrap();
        assert_eq!(parse(&written).unwrap(), expected, "{written}");
    }
    let message = parse("k = \"static\"").unwrap_err().to_string();
    assert!(message.contains("\"dynamic\"") && message.contains("or a number"), "{message}");
    for (scale, valid) in [(128.0, true), (1e-30, true), (0.0, false), (-1.0, false), (f64::NAN, false), (1e39, false)]
    {
        assert_eq!(LossScale::Fixed(scale).is_valid(), valid, "{scale}");
    }
}
