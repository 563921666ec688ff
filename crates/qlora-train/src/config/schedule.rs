//! Learning-rate schedules: a linear warmup, then constant, linear or cosine.

use serde::{Deserialize, Serialize};

/// What the learning rate does after the warmup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Stays at its peak, as in the QLoRA paper.
    Constant,
    /// Falls in a line, to reach 0 after the last step.
    Linear,
    /// Falls along half a cosine, to reach 0 after the last step.
    Cosine,
}

impl Schedule {
    /// The factor on the peak learning rate at `step` (from 0) of `total_steps`.
    ///
    /// Warmup: `(step + 1) / warmup_steps`, so that the first step learns already and the peak is
    /// reached with the last warmup step. After it, with
    /// `t = (step - warmup_steps) / (total_steps - warmup_steps)`: 1, `1 - t`, or
    /// `(1 + cos(pi t)) / 2`. Steps past the end have the end's factor.
    pub fn factor(self, step: usize, warmup_steps: usize, total_steps: usize) -> f64 {
        if step < warmup_steps {
            return (step + 1) as f64 / warmup_steps as f64;
        }
        let rest = total_steps.saturating_sub(warmup_steps).max(1);
        let t = ((step - warmup_steps) as f64 / rest as f64).min(1.0);
        match self {
            Self::Constant => 1.0,
            Self::Linear => 1.0 - t,
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * t).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Schedule;

    // The factors are a division and at most one cosine of f64: 1e-12 is far above their rounding
    // and far below any mistake of one step.
    fn close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-12, "{a} != {b}");
    }

    #[test]
    fn warmup_reaches_the_peak_with_its_last_step() {
        for schedule in [Schedule::Constant, Schedule::Linear, Schedule::Cosine] {
            for (step, expected) in [0.2, 0.4, 0.6, 0.8, 1.0].into_iter().enumerate() {
                close(schedule.factor(step, 5, 100), expected);
            }
            close(schedule.factor(5, 5, 100), 1.0);
            close(schedule.factor(0, 0, 100), 1.0);
        }
    }

    #[test]
    fn decay_ends_at_zero_and_stays_there() {
        close(Schedule::Constant.factor(99, 10, 100), 1.0);
        close(Schedule::Linear.factor(55, 10, 100), 0.5);
        close(Schedule::Linear.factor(99, 10, 100), 1.0 / 90.0);
        close(Schedule::Cosine.factor(55, 10, 100), 0.5);
        for schedule in [Schedule::Linear, Schedule::Cosine] {
            close(schedule.factor(100, 10, 100), 0.0);
            close(schedule.factor(500, 10, 100), 0.0);
            // A run that is all warmup has no decay to divide by zero.
            close(schedule.factor(9, 10, 10), 1.0);
            close(schedule.factor(10, 10, 10), 1.0);
        }
    }
}
