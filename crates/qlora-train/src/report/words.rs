//! The report in words, and numbers as people write them.

use super::{Outcome, Summary};
use std::path::Path;

impl Summary {
    /// The summary as a Markdown page that shows `loss.svg` beside it.
    pub fn to_markdown(&self) -> String {
        let run = &self.run;
        let mut rows = vec![
            ("Base model", format!("`{}`, {} parameters", run.model, count(run.base_parameters))),
            ("Weights", format!("{}; computed in {}", run.quantization, run.compute_dtype)),
            (
                "Adapters",
                format!(
                    "rank {} on {} modules, {} parameters ({} of the base)",
                    run.rank,
                    run.adapted_modules,
                    count(run.trainable_parameters),
                    percent(run.trainable_parameters, run.base_parameters)
                ),
            ),
            (
                "Data",
                format!(
                    "`{}`: {} rows, {} tokens; {}",
                    run.train_data,
                    run.train_rows,
                    count(run.train_tokens),
                    match run.eval_rows {
                        0 => "no evaluation".to_string(),
                        rows => format!("{rows} rows for evaluation"),
                    }
                ),
            ),
            (
                "Steps",
                format!(
                    "{} of {}, {} each, {} tokens in all",
                    self.steps,
                    run.total_steps,
                    run.step_contents(),
                    count(self.tokens)
                ),
            ),
        ];
        if let Some(objective) = &run.objective {
            rows.push(("Objective", objective.clone()));
        }
        if self.skipped_steps > 0 {
            let words =
                format!("{} steps, whose gradients overflowed at the loss scale of their time", self.skipped_steps);
            rows.push(("Skipped", words));
        }
        if let (Some(first), Some(last)) = (self.first_loss, self.last_loss) {
            rows.push(("Training loss", losses(first, last, self.best_loss)));
        }
        if let (Some(first), Some(last)) = (self.first_eval_loss, self.last_eval_loss) {
            rows.push(("Evaluation loss", losses(first, last, self.best_eval_loss)));
        }
        if let (Some(accuracy), Some(perplexity)) = (self.last_eval_accuracy, self.last_eval_perplexity) {
            let words =
                format!("{:.1} % of tokens predicted right, perplexity {perplexity:.3}, both last", 100.0 * accuracy);
            rows.push(("Evaluation", words));
        }
        if let Some(words) = self.last_preference.map(|figures| figures.words()).filter(|words| !words.is_empty()) {
            rows.push(("Answers", format!("{}, all last", words.replace("  ", ", "))));
        }
        rows.push(("Speed", format!("{:.0} tokens/s on {}", self.tokens_per_second, run.device)));
        rows.push(("Peak memory", memory(self.peak_memory_bytes)));
        rows.push(("Time", duration(self.elapsed_seconds)));
        let table: String = rows.iter().map(|(name, value)| format!("| {name} | {value} |\n")).collect();
        let (title, next) = match self.outcome {
            Outcome::Finished => ("Training finished", self.usage()),
            Outcome::StoppedEarly => ("Training stopped early", self.usage()),
            Outcome::Interrupted => ("Training interrupted", self.resume_hint()),
        };
        let answers = self.answered();
        format!(
            "# {title}\n\n{}\n\n![Loss curve](loss.svg)\n\n| | |\n|---|---|\n{table}\n{answers}{next}",
            self.sentence()
        )
    }

    /// The last answers, where the configuration has prompts.
    fn answered(&self) -> String {
        let answers = self.answers.iter().map(|answer| format!("{}\n\n", answer.to_markdown()));
        match self.answers.is_empty() {
            true => String::new(),
            false => format!("## Answers at the last evaluation\n\n{}", answers.collect::<String>()),
        }
    }

    /// The run in one sentence.
    pub fn sentence(&self) -> String {
        let run = &self.run;
        let mut text = format!(
            "Trained {} adapter parameters over `{}` on {} rows of `{}` for {} steps in {}",
            count(run.trainable_parameters),
            run.model,
            run.train_rows,
            run.train_data,
            self.steps,
            duration(self.elapsed_seconds),
        );
        if let (Some(first), Some(last)) = (self.first_loss, self.last_loss) {
            text += &format!("; the training loss went from {first:.3} to {last:.3}");
        }
        if let Some(last) = self.last_eval_loss {
            text += &format!(", the evaluation loss is {last:.3}");
        }
        text + "."
    }

    /// The command that prompts the adapter as its rows were written: what they were written with lies beside it.
    pub fn try_it(&self) -> String {
        format!(
            "qlora generate --model {} --adapter {} --prompt \"...\"",
            quoted(Path::new(&self.run.model)),
            quoted(&self.adapter)
        )
    }

    fn usage(&self) -> String {
        let of = match (self.outcome, self.adapter_step == self.steps) {
            (_, false) => format!(" It is that of step {}, the best evaluation.", self.adapter_step),
            (Outcome::StoppedEarly, true) => " The run ended as evaluations improved no more.".into(),
            _ => String::new(),
        };
        format!(
            "The adapter lies in `{adapter}`, in PEFT's format.{of} To use it:\n\n```sh\n{}\n```\n\nIn Python: `PeftModel.from_pretrained(base_model, \"{adapter}\")`.\n",
            self.try_it(),
            adapter = self.adapter.display(),
        )
    }

    fn resume_hint(&self) -> String {
        format!("The checkpoint lies in `{}`. `qlora train CONFIG --resume` goes on from it.\n", self.adapter.display())
    }
}

/// A path as a shell takes it for one word.
fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    // Only a NUL can't be quoted, and no path holds one.
    shlex::try_quote(&text).map_or_else(|_| text.to_string(), |quoted| quoted.into_owned())
}

fn losses(first: f64, last: f64, best: Option<(f64, usize)>) -> String {
    let best = best.map_or(String::new(), |(loss, step)| format!("; lowest {loss:.4} at step {step}"));
    format!("{first:.4} first, {last:.4} last{best}")
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        return "-".into();
    }
    format!("{:.2} %", 100.0 * part as f64 / whole as f64)
}

/// A number with three digits and a unit: `5.36 M`, `6.74 B`; below a thousand as it is.
pub fn count(n: u64) -> String {
    let units = ["", " k", " M", " B", " T"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => n.to_string(),
        _ => format!("{}{}", three_digits(value), units[unit]),
    }
}

/// A size in binary units, as GPU memory is sold: `512 MiB`, `7.05 GiB`.
pub fn memory(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} bytes"),
        _ => format!("{} {}", three_digits(value), units[unit]),
    }
}

fn three_digits(value: f64) -> String {
    let decimals = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.decimals$}")
}

/// A time in its two largest units: `3.2 s`, `4 min 05 s`, `2 h 07 min`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".into();
    }
    if seconds < 59.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    match whole {
        0..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        3600..86_400 => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{} d {:02} h", whole / 86_400, whole % 86_400 / 3600),
    }
}
