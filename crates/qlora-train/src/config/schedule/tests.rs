//! The curves beside transformers' own values.

#![allow(clippy::unwrap_used)]

use super::*;

// The factors are a division and at most one cosine or root of f64: 1e-12 is far above their rounding and far below any mistake of one
// step.
fn close(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-12, "{a} != {b}");
}

fn curve(schedule: Schedule, warmup_steps: usize, total_steps: usize) -> Curve {
    let (decay_shape, cycles) = (DecayShape::Cosine, 1);
    Curve { schedule, warmup_steps, total_steps, floor: 0.0, decay_steps: total_steps / 10, decay_shape, cycles }
}

const ALL: [Schedule; 6] = [
    Schedule::Constant,
    Schedule::Linear,
    Schedule::Cosine,
    Schedule::CosineWithRestarts,
    Schedule::WarmupStableDecay,
    Schedule::InverseSqrt,
];

#[test]
fn warmup_reaches_the_peak_with_its_last_step() {
    for schedule in ALL {
        for (step, expected) in [0.2, 0.4, 0.6, 0.8, 1.0].into_iter().enumerate() {
            close(curve(schedule, 5, 100).factor(step), expected);
        }
        close(curve(schedule, 5, 100).factor(5), 1.0);
        close(curve(schedule, 0, 100).factor(0), 1.0);
    }
}

#[test]
fn decay_ends_at_the_floor_and_stays_there() {
    close(curve(Schedule::Constant, 10, 100).factor(99), 1.0);
    close(curve(Schedule::Linear, 10, 100).factor(55), 0.5);
    close(curve(Schedule::Linear, 10, 100).factor(99), 1.0 / 90.0);
    close(curve(Schedule::Cosine, 10, 100).factor(55), 0.5);
    for schedule in ALL.into_iter().filter(|schedule| schedule.has_floor()) {
        for floor in [0.0, 0.25] {
            let curve = Curve { floor, ..curve(schedule, 10, 100) };
            close(curve.factor(100), floor);
            close(curve.factor(500), floor);
        }
    }
    for schedule in ALL {
        // A run that is all warmup has no decay to divide by zero.
        close(curve(schedule, 10, 10).factor(9), 1.0);
        let after = curve(schedule, 10, 10).factor(10);
        assert!((0.0..=1.0).contains(&after), "{schedule:?}: {after}");
    }
    // What decays takes no more than what the warmup leaves.
    close(Curve { decay_steps: 95, ..curve(Schedule::WarmupStableDecay, 10, 100) }.factor(10), 1.0);
}

/// One curve of `testdata/make_schedules.py`.
#[derive(Deserialize)]
struct Recorded {
    name: String,
    schedule: Schedule,
    warmup_steps: usize,
    total_steps: usize,
    floor: f64,
    decay_steps: usize,
    decay_shape: DecayShape,
    cycles: usize,
    /// transformers' factors of steps from 0.
    factors: Vec<f64>,
}

#[test]
fn curves_are_those_of_transformers() {
    let recorded: Vec<Recorded> =
        serde_json::from_str(include_str!("../../../../../testdata/reference/schedules.json")).unwrap();
    assert!(ALL.iter().all(|schedule| recorded.iter().any(|curve| curve.schedule == *schedule)));
    for Recorded { name, schedule, warmup_steps, total_steps, floor, decay_steps, decay_shape, cycles, factors } in
        recorded
    {
        let curve = Curve { schedule, warmup_steps, total_steps, floor, decay_steps, decay_shape, cycles };
        assert_eq!(factors.len(), total_steps + 1, "{name}");
        for (step, expected) in factors.into_iter().enumerate() {
            if step < warmup_steps && floor == 0.0 {
                // The warmup is one step ahead.
                let ahead = if step == 0 { 0.0 } else { curve.factor(step - 1) };
                assert!((ahead - expected).abs() < 1e-12, "{name}, step {step}: {ahead} against {expected}");
            } else if step >= warmup_steps {
                let found = curve.factor(step);
                assert!((found - expected).abs() < 1e-12, "{name}, step {step}: {found} against {expected}");
            }
        }
    }
}
