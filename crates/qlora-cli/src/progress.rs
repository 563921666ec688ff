//! What a person sees while a run goes on: a progress bar on a terminal, plain lines elsewhere, nothing but warnings where they ask for
//! quiet.
//! Everything goes to stderr, so that stdout holds results only.

mod json;
mod pace;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use burn_qlora::adapter_io::printable::{printable, shortened};
use burn_qlora::metrics::{EvalMetrics, RunInfo, StepMetrics};
use burn_qlora::model_hub::OnProgress;
use burn_qlora::qlora_train::config::RunConfig;
use burn_qlora::qlora_train::{Answer, EvalPart, OnRows};
use burn_qlora::report::{count, duration, memory};
use burn_qlora::{LoadProgress, Summary, TrainEvents};

use crate::bars::{Bar, Counts, Figure, columns};
use crate::hub;
use crate::output::{Paint, say_wrapped};
use crate::reading;
pub use json::{JsonLines, warning as json_warning};
use pace::Pace;

/// Shows how far loading is.
#[derive(Default)]
pub struct LoadBar(Option<Bar>);

impl LoadBar {
    /// Nothing is shown before the first call of [`LoadBar::update`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Shows the progress.
    pub fn update(&mut self, progress: LoadProgress<'_>) {
        let bar = self.0.get_or_insert_with(|| Bar::new("Loading", progress.total_bytes, Counts::Bytes));
        bar.at(progress.loaded_bytes);
        bar.show(vec![Figure::name(progress.module)]);
    }

    /// Removes the bar.
    pub fn finish(&mut self) {
        self.0 = None;
    }
}

/// Shows how many rows are done.
pub struct RowBar(Bar);

impl RowBar {
    /// Rows of a name.
    pub fn new(name: &str, rows: usize) -> Self {
        let bar = Bar::new("Measuring", rows as u64, Counts::Things);
        bar.show(vec![Figure::name(name)]);
        Self(bar)
    }

    /// One more.
    pub fn advance(&mut self) {
        self.0.advance();
    }

    /// Removes the bar.
    pub fn finish(self) {
        drop(self);
    }
}

/// Shows a training run.
pub struct Terminal {
    load: LoadBar,
    /// When the first module was loaded, and the bytes that were left then.
    load_start: Option<(Instant, u64)>,
    /// The steps, where there is a terminal to show them.
    bar: Option<Bar>,
    quiet: bool,
    paint: Paint,
    log_every: usize,
    eval_every: usize,
    total_steps: usize,
    start_step: usize,
    pace: Option<Pace>,
    /// The step that is evaluated.
    step: usize,
    /// What stands behind the bar while steps are done.
    figures: Vec<Figure>,
    /// The lowest evaluation loss so far.
    best: Option<f64>,
    stop: Arc<AtomicBool>,
}

impl Terminal {
    /// Of a run with these options; `quiet` leaves warnings alone, `stop` is raised to stop the run.
    pub fn new(options: &RunConfig, quiet: bool, stop: Arc<AtomicBool>) -> Self {
        Self {
            load: LoadBar::new(),
            load_start: None,
            bar: None,
            quiet,
            paint: Paint::of_stderr(),
            log_every: options.log_every,
            eval_every: options.eval_every,
            total_steps: 0,
            start_step: 0,
            pace: None,
            step: 0,
            figures: Vec::new(),
            best: None,
            stop,
        }
    }

    /// A line that quiet leaves out.
    fn news(&self, text: &str) {
        if !self.quiet {
            say_wrapped(2, text);
        }
    }

    /// The bar of steps while the evaluation is under way, of which a part is done.
    fn evaluating(&self, words: String, done: f64) {
        if let Some(bar) = &self.bar {
            let left = self.pace.as_ref().and_then(|pace| pace.left_evaluating(self.step, done));
            let mut figures = vec![Figure::new(1, words)];
            figures.extend(left.map(left_words).map(|words| Figure::new(2, words)));
            bar.show(figures);
        }
    }
}

impl TrainEvents for Terminal {
    fn download_progress(&mut self) -> Option<OnProgress> {
        (!self.quiet).then(hub::bar)
    }

    fn rows_progress(&mut self) -> Option<OnRows> {
        (!self.quiet).then(reading::bar)
    }

    fn on_load(&mut self, progress: LoadProgress<'_>) {
        let left = progress.total_bytes - progress.loaded_bytes;
        self.load_start.get_or_insert_with(|| (Instant::now(), left));
        if !self.quiet {
            self.load.update(progress);
        }
    }

    fn on_start(&mut self, run: &RunInfo) {
        self.load.finish();
        if let Some((start, bytes)) = self.load_start.take() {
            let seconds = start.elapsed().as_secs_f64();
            let rate = load_rate(bytes, seconds);
            self.news(&format!("Loaded {} in {}{rate}: {}", run.model, duration(seconds), run.quantization));
        }
        if !self.quiet {
            start_lines(run).iter().for_each(|line| say_wrapped(LABEL, line));
        }
        (self.total_steps, self.start_step) = (run.total_steps, run.start_step);
        self.pace = Some(Pace::new(run.total_steps, self.eval_every, run.eval_rows > 0, Instant::now()));
        if !self.quiet && columns().is_some() {
            let bar = Bar::new("", run.total_steps as u64, Counts::Things).without_left().ticking();
            bar.at(run.start_step as u64);
            let compiles = if run.device.starts_with("CPU") { "" } else { ", which compiles kernels" };
            self.figures = vec![Figure::new(1, format!("the first step{compiles}"))];
            bar.show(self.figures.clone());
            self.bar = Some(bar);
        }
    }

    fn on_step(&mut self, metrics: &StepMetrics) {
        let left = self.pace.as_mut().and_then(|pace| {
            pace.step(Instant::now());
            pace.left(metrics.step)
        });
        if let Some(bar) = &self.bar {
            self.figures = step_figures(metrics, left);
            bar.at(metrics.step as u64);
            bar.show(self.figures.clone());
        } else if metrics.step.is_multiple_of(self.log_every)
            || metrics.step == self.start_step + 1
            || metrics.step == self.total_steps
        {
            self.news(&format!("step {}/{}  {}", metrics.step, self.total_steps, step_words(metrics, left)));
        }
    }

    fn on_eval_start(&mut self, step: usize) {
        self.step = step;
        self.evaluating("evaluating".into(), 0.0);
    }

    fn on_eval_progress(&mut self, part: EvalPart, done: usize, total: usize) {
        let part_done = done as f64 / total.max(1) as f64;
        match part {
            EvalPart::Batches => self.evaluating(format!("evaluating {done}/{total}"), part_done),
            // Of what answers take nothing is known apart.
            EvalPart::Answers => self.evaluating(format!("answering {}/{total}", done + 1), 1.0),
        }
    }

    fn on_eval(&mut self, metrics: &EvalMetrics) {
        if let Some(pace) = &mut self.pace {
            pace.eval(Duration::try_from_secs_f64(metrics.eval_seconds).unwrap_or_default());
        }
        let before = self.best.replace(metrics.eval_loss.min(self.best.unwrap_or(f64::INFINITY)));
        let best = match before {
            Some(before) if metrics.eval_loss < before => format!("  {}", self.paint.good("best")),
            _ => String::new(),
        };
        self.news(&format!("step {}/{}  {}{best}", metrics.step, self.total_steps, eval_words(metrics)));
        for answer in &metrics.answers {
            self.news(&format!("  {}", answer_words(answer)));
        }
        if let Some(bar) = &self.bar {
            bar.show(self.figures.clone());
        }
    }

    fn on_save(&mut self, checkpoint: &Path) {
        self.news(&format!("{} {}", self.paint.good("saved"), checkpoint.display()));
    }

    fn on_notice(&mut self, message: &str) {
        self.news(&format!("note: {message}"));
    }

    fn on_warning(&mut self, message: &str) {
        say_wrapped(2, &format!("{} {message}", self.paint.warning("warning:")));
    }

    fn on_end(&mut self, _: &Summary) {
        self.bar = None;
    }

    fn stop_flag(&mut self) -> Option<Arc<AtomicBool>> {
        Some(Arc::clone(&self.stop))
    }

    fn should_stop(&mut self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// An evaluation in words.
fn eval_words(metrics: &EvalMetrics) -> String {
    if let Some(figures) = metrics.preference {
        return format!("evaluation loss {:.4}  {}", metrics.eval_loss, figures.words());
    }
    let accuracy = metrics.eval_accuracy.map_or(String::new(), |part| format!("  {:.1} % right", 100.0 * part));
    format!("evaluation loss {:.4}  perplexity {:.3}{accuracy}", metrics.eval_loss, metrics.perplexity())
}

/// A prompt and its answer on a line.
fn answer_words(Answer { prompt, answer, .. }: &Answer) -> String {
    let short = |text: &str, longest| shortened(&printable(text), longest).into_owned();
    format!("{} -> {}", short(prompt, 40), short(answer, 160))
}

/// Columns of the words that the lines about a run begin with.
const LABEL: usize = 9;

/// What is about to be trained.
fn start_lines(run: &RunInfo) -> Vec<String> {
    let percent = 100.0 * run.trainable_parameters as f64 / run.base_parameters.max(1) as f64;
    let evaluated = if run.eval_rows == 0 { String::new() } else { format!(", {} rows for evaluation", run.eval_rows) };
    let resumed = if run.start_step == 0 { String::new() } else { format!(", {} of them done", run.start_step) };
    let mut lines = vec![
        format!("Weights  {}", run.held),
        format!("Device   {}, computing in {}", run.device, run.compute_dtype),
        format!(
            "Adapters rank {} on {} modules: {} of {} parameters train ({percent:.2} %)",
            run.rank,
            run.adapted_modules,
            count(run.trainable_parameters),
            count(run.base_parameters)
        ),
        format!("Data     {}: {} rows, {} tokens{evaluated}", run.train_data, run.train_rows, count(run.train_tokens)),
        format!(
            "Steps    {}{resumed}, {} each{}; output in {}",
            run.total_steps,
            run.step_contents(),
            if run.ranks > 1 { format!(" on {} ranks", run.ranks) } else { String::new() },
            run.output_dir.display()
        ),
        format!("Kept     for the backward pass: {}", run.activation_checkpointing),
    ];
    if let Some(objective) = &run.objective {
        lines.insert(lines.len() - 2, format!("Learns   {objective}"));
    }
    lines
}

/// A step in words.
fn step_words(metrics: &StepMetrics, left: Option<Duration>) -> String {
    let figures = step_figures(metrics, left);
    figures.iter().map(Figure::text).collect::<Vec<_>>().join("  ")
}

fn left_words(left: Duration) -> String {
    format!("{} left", duration(left.as_secs_f64()))
}

/// What is told of a step. The gradient norm and the rest stand in `metrics.jsonl`.
fn step_figures(metrics: &StepMetrics, left: Option<Duration>) -> Vec<Figure> {
    let mut figures = vec![
        Figure::new(1, format!("loss {:.4}", metrics.loss)),
        Figure::new(5, format!("lr {:.1e}", metrics.learning_rate)),
        Figure::new(3, format!("{:.0} tok/s", metrics.tokens_per_second)),
    ];
    if let Some(answers) = metrics.preference {
        figures.insert(1, Figure::new(3, answers.words()));
    }
    let (in_use, reserved) = (memory(metrics.memory_in_use_bytes), memory(metrics.memory_reserved_bytes));
    figures.push(Figure::new(4, if in_use == reserved { reserved } else { format!("{in_use} of {reserved}") }));
    // Said only while there is something to say: optimizer state that the device had no room for.
    if let Some(paging) = metrics.paging.filter(|paging| paging.resident < paging.pages) {
        let (bytes_in, bytes_out) = (memory(paging.bytes_in), memory(paging.bytes_out));
        let words =
            format!("optimizer {}/{} pages here, {bytes_in} in, {bytes_out} out", paging.resident, paging.pages);
        figures.push(Figure::new(7, words));
    }
    if let Some(scaling) = metrics.loss_scaling {
        let skipped = match scaling.skipped_steps {
            0 => String::new(),
            steps => format!(" ({steps} skipped)"),
        };
        figures.push(Figure::new(6, format!("scale {}{skipped}", scaling.scale)));
    }
    figures.extend(left.map(left_words).map(|words| Figure::new(2, words)));
    figures
}

/// ` (9.1 GB/s)` for this many bytes in so many seconds; nothing for a model so small that the figure says nothing.
fn load_rate(bytes: u64, seconds: f64) -> String {
    match bytes {
        ..1_000_000_000 => String::new(),
        _ => format!(" ({:.1} GB/s)", bytes as f64 / seconds / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_qlora::Paging;
    use burn_qlora::qlora_train::loss_scale::LossScaling;
    use burn_qlora::qlora_train::objective::PreferenceFigures;

    #[test]
    fn the_rate_of_a_large_model_is_told() {
        assert_eq!(load_rate(13_500_000_000, 1.5), " (9.0 GB/s)");
        assert_eq!(load_rate(10_000_000, 0.1), "");
    }

    #[test]
    fn a_step_reads_well() {
        let metrics = StepMetrics {
            step: 10,
            epoch: 0.1,
            loss: 1.23456,
            learning_rate: 2e-4,
            grad_norm: 0.5,
            tokens: 1000,
            tokens_per_second: 912.4,
            padding_tokens: 0,
            memory_bytes: 412 << 20,
            memory_in_use_bytes: 310 << 20,
            memory_reserved_bytes: 400 << 20,
            paging: None,
            loss_scaling: None,
            preference: None,
            slowest_rank: None,
            elapsed_seconds: 3.0,
        };
        let words = step_words(&metrics, Some(Duration::from_secs(190)));
        assert_eq!(words, "loss 1.2346  lr 2.0e-4  912 tok/s  310 MiB of 400 MiB  3 min 10 s left");
        let paging = Paging { pages: 80, resident: 12, bytes_in: 3 << 20, bytes_out: 5 << 20, ..Default::default() };
        let metrics = StepMetrics { paging: Some(paging), memory_in_use_bytes: 400 << 20, ..metrics };
        let words = step_words(&metrics, None);
        assert!(words.ends_with("s  400 MiB  optimizer 12/80 pages here, 3.00 MiB in, 5.00 MiB out"), "{words}");
        for (skipped_steps, expected) in [(0, "MiB  scale 65536"), (3, "MiB  scale 65536 (3 skipped)")] {
            let scaling = LossScaling { scale: 65536.0, skipped: false, skipped_steps };
            let words = step_words(&StepMetrics { loss_scaling: Some(scaling), paging: None, ..metrics.clone() }, None);
            assert!(words.ends_with(expected), "{words}");
        }
    }

    #[test]
    fn an_evaluation_reads_well() {
        let metrics = EvalMetrics {
            step: 4,
            eval_loss: 1.0,
            eval_accuracy: Some(0.625),
            eval_perplexity: None,
            eval_tokens: 9,
            preference: None,
            answers: Vec::new(),
            eval_seconds: 1.0,
            elapsed_seconds: 2.0,
        };
        assert_eq!(eval_words(&metrics), "evaluation loss 1.0000  perplexity 2.718  62.5 % right");
        let figures = PreferenceFigures {
            rewards_accuracy: Some(0.925),
            rewards_margin: Some(1.2034),
            ..PreferenceFigures::default()
        };
        let compared = EvalMetrics { preference: Some(figures), ..metrics };
        assert_eq!(eval_words(&compared), "evaluation loss 1.0000  92.5 % in order  margin 1.203");
        let answer = Answer { prompt: "a\nb".into(), answer: "\u{1b}[2Jc".into(), tokens: 3, ended: true };
        assert_eq!(answer_words(&answer), "a\\nb -> \\u{1b}[2Jc");
    }

    #[test]
    fn a_raised_flag_stops_the_run() {
        let stop = Arc::new(AtomicBool::new(false));
        let mut terminal = Terminal::new(&RunConfig::default(), false, stop.clone());
        assert!(!terminal.should_stop());
        stop.store(true, Ordering::Relaxed);
        assert!(terminal.should_stop());
    }
}
