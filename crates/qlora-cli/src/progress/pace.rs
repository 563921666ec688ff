//! How long a run will still take: steps at the pace of the last ones, and the evaluations to come.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Steps that the pace is taken from.
const RECENT: usize = 20;

/// The pace of a run. Times are given, not taken, so that a test can choose them.
#[derive(Debug)]
pub struct Pace {
    total_steps: usize,
    /// Steps between two evaluations; 0: at the end alone.
    eval_every: usize,
    evaluates: bool,
    /// When the last step ended, or the first began.
    since: Instant,
    /// What has to be taken off the step under way: an evaluation within it.
    apart: Duration,
    /// What recent steps took, saving included.
    steps: VecDeque<Duration>,
    /// What the last evaluation took.
    eval: Option<Duration>,
}

impl Pace {
    /// A run of `total_steps` that begins now.
    pub fn new(total_steps: usize, eval_every: usize, evaluates: bool, now: Instant) -> Self {
        let (apart, steps) = (Duration::ZERO, VecDeque::new());
        Self { total_steps, eval_every, evaluates, since: now, apart, steps, eval: None }
    }

    /// A step has ended.
    pub fn step(&mut self, now: Instant) {
        let took = now.duration_since(self.since).saturating_sub(std::mem::take(&mut self.apart));
        self.since = now;
        if self.steps.len() == 1 {
            // The first step compiles kernels, and says nothing of those that follow.
            self.steps.clear();
        }
        self.steps.push_back(took);
        if self.steps.len() > RECENT {
            self.steps.pop_front();
        }
    }

    /// An evaluation has ended.
    pub fn eval(&mut self, took: Duration) {
        self.apart += took;
        self.eval = Some(took);
    }

    /// What is left after `step` steps; `None` before the first step of this start.
    pub fn left(&self, step: usize) -> Option<Duration> {
        let sum: Duration = self.steps.iter().sum();
        let count = u32::try_from(self.steps.len()).ok().filter(|count| *count > 0)?;
        let steps = (sum / count).mul_f64(self.total_steps.saturating_sub(step) as f64);
        let evals = self.eval.unwrap_or_default().mul_f64(self.evals_after(step) as f64);
        Some(steps + evals)
    }

    /// What is left while the evaluation after `step` is under way, of which a part is done, 0 to 1.
    pub fn left_evaluating(&self, step: usize, done: f64) -> Option<Duration> {
        let rest = self.eval.unwrap_or_default().mul_f64((1.0 - done).clamp(0.0, 1.0));
        self.left(step).map(|left| left + rest)
    }

    /// Evaluations that follow `step`: at multiples of the interval, and at the end.
    fn evals_after(&self, step: usize) -> usize {
        if !self.evaluates || step >= self.total_steps {
            return 0;
        }
        match self.eval_every {
            0 => 1,
            every => {
                let at_end = usize::from(!self.total_steps.is_multiple_of(every));
                self.total_steps / every - step / every + at_end
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn recent_steps_and_evaluations_to_come_count() {
        let start = Instant::now();
        let mut pace = Pace::new(100, 10, true, start);
        assert_eq!(pace.left(0), None);
        // Kernels are compiled in the first step.
        let mut now = start + 60 * SECOND;
        pace.step(now);
        assert_eq!(pace.left(1), Some(99 * 60 * SECOND));
        for step in 2..=30 {
            // Slow steps, then twenty that count.
            now += if step <= 10 { 5 * SECOND } else { 2 * SECOND };
            pace.step(now);
        }
        assert_eq!(pace.left(30), Some(70 * 2 * SECOND));
        // An evaluation of 7 seconds is not a part of the next step's time; those after 40 to 100 steps are to come.
        pace.eval(7 * SECOND);
        now += 9 * SECOND;
        pace.step(now);
        assert_eq!(pace.left(31), Some(69 * 2 * SECOND + 7 * 7 * SECOND));
        assert_eq!(pace.left(100), Some(Duration::ZERO));
        // The last one, half of which is done.
        assert_eq!(pace.left_evaluating(100, 0.5), Some(Duration::from_millis(3500)));
    }

    #[test]
    fn evaluations_are_at_multiples_and_at_the_end() {
        let of = |total, every, evaluates| Pace::new(total, every, evaluates, Instant::now());
        assert_eq!(of(25, 10, true).evals_after(0), 3);
        assert_eq!(of(25, 10, true).evals_after(10), 2);
        assert_eq!(of(25, 10, true).evals_after(20), 1);
        assert_eq!(of(30, 10, true).evals_after(20), 1);
        assert_eq!(of(30, 0, true).evals_after(20), 1);
        assert_eq!(of(30, 10, false).evals_after(0), 0);
        assert_eq!(of(30, 10, true).evals_after(30), 0);
    }
}
