//! The model card of an adapter: `README.md` with the hub's metadata at its head.
//!
//! It says what the adapter was made from and how: base model, data, hyper-parameters, losses. What is not
//! known (an adapter made elsewhere, a run whose folder is gone) is left out, not guessed. Paths of the
//! machine it was made on are nobody's business: data is named by its file's name.
//! (Format: <https://huggingface.co/docs/hub/model-cards>.)

use std::fmt::Write as _;

use adapter_io::{AdapterConfig, TargetModules};

use super::{Summary, count, duration};
use crate::config::TrainConfig;

/// What is known about an adapter.
#[derive(Clone, Copy, Debug)]
pub struct Card<'a> {
    /// The repository's name without its owner.
    pub name: &'a str,
    /// The base model's hub id.
    pub base_model: &'a str,
    /// The adapter's own configuration.
    pub adapter: &'a AdapterConfig,
    /// The run that made it.
    pub summary: Option<&'a Summary>,
    /// Its configuration.
    pub config: Option<&'a TrainConfig>,
}

impl Card<'_> {
    /// The card's text.
    pub fn to_markdown(&self) -> String {
        let base = self.base_model;
        let quantized = self.config.is_some_and(|config| config.quantization.quant_config().is_some());
        let mut text = format!(
            "---\nbase_model: {base}\nlibrary_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n{}- burn-qlora\n---\n\n\
             # {}\n\nA LoRA adapter for [`{base}`](https://huggingface.co/{base}), in PEFT's format.\n",
            if quantized { "- qlora\n" } else { "" },
            self.name,
        );
        self.push_table(&mut text, "Training", &self.training());
        self.push_table(&mut text, "Adapter", &self.adapter_rows());
        // Writing to a String cannot fail.
        let _ = write!(
            text,
            "\n## Use\n\n```sh\nqlora generate --model {base} --adapter {0} --prompt \"...\"\n```\n\n\
             ```python\nfrom transformers import AutoModelForCausalLM\nfrom peft import PeftModel\n\n\
             model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(\"{base}\"), \"{0}\")\n```\n",
            self.name,
        );
        text
    }

    fn push_table(&self, text: &mut String, title: &str, rows: &[(&str, String)]) {
        if rows.is_empty() {
            return;
        }
        *text += &format!("\n## {title}\n\n| | |\n|---|---|\n");
        // A bar in a file's name would end the cell.
        text.extend(rows.iter().map(|(key, value)| format!("| {key} | {} |\n", value.replace('|', "\\|"))));
    }

    fn training(&self) -> Vec<(&'static str, String)> {
        let mut rows = Vec::new();
        if let Some(summary) = self.summary {
            let run = &summary.run;
            let eval = match run.eval_rows {
                0 => String::new(),
                rows => format!("; {rows} more for evaluation"),
            };
            rows.push((
                "Data",
                format!(
                    "{}: {} rows, {} tokens{eval}",
                    sources(&run.train_data),
                    run.train_rows,
                    count(run.train_tokens)
                ),
            ));
            rows.push(("Base weights", format!("{}; computed in {}", run.quantization, run.compute_dtype)));
            rows.push(("Steps", format!("{} of {}, {} each", summary.steps, run.total_steps, run.step_contents())));
        }
        if let Some(config) = self.config {
            let train = &config.train;
            let schedule = format!("{:?}", train.schedule).to_lowercase();
            let warmup =
                train.warmup_steps.map_or(format!("{} of the steps", train.warmup_ratio), |n| format!("{n} steps"));
            rows.push(("Learning rate", format!("{:e}, {schedule}, warmup {warmup}", train.learning_rate)));
            rows.push((
                "Optimizer",
                format!(
                    "AdamW, betas {} and {}, epsilon {:e}, weight decay {}, gradients clipped at {}",
                    train.betas[0], train.betas[1], train.eps, train.weight_decay, train.max_grad_norm
                ),
            ));
            rows.push(("Longest row", format!("{} tokens", config.data.max_length)));
            rows.push(("Seed", train.seed.to_string()));
        }
        if let Some(summary) = self.summary {
            let losses =
                |first: Option<f64>, last: Option<f64>| Some(format!("{:.4} first, {:.4} last", first?, last?));
            rows.extend(losses(summary.first_loss, summary.last_loss).map(|text| ("Training loss", text)));
            rows.extend(losses(summary.first_eval_loss, summary.last_eval_loss).map(|text| ("Evaluation loss", text)));
            rows.push(("Time", format!("{} on {}", duration(summary.elapsed_seconds), summary.run.device)));
        }
        rows
    }

    fn adapter_rows(&self) -> Vec<(&'static str, String)> {
        let config = self.adapter;
        let targets = match config.target_modules_or_default() {
            TargetModules::List(names) => names.join(", "),
            TargetModules::Pattern(pattern) => format!("`{pattern}`"),
        };
        let mut rows = vec![
            ("Rank, alpha, dropout", format!("{}, {}, {}", config.r, config.lora_alpha, config.lora_dropout)),
            ("Scaling", if config.use_rslora { "alpha / sqrt(rank)" } else { "alpha / rank" }.to_string()),
            ("Target modules", targets),
        ];
        if !config.beyond_plain_lora().is_empty() {
            rows.push(("Beyond plain LoRA", config.beyond_plain_lora().join(", ")));
        }
        rows
    }
}

/// Sources as a reader elsewhere may know them: hub ids, and files without their folders.
fn sources(text: &str) -> String {
    let short = |word: &str| -> String {
        let is_local = word.starts_with(['/', '.', '~']) || word.contains(['.', '*']) || word.matches('/').count() > 1;
        match word.rsplit_once('/') {
            Some((_, name)) if is_local => name.to_owned(),
            _ => word.to_owned(),
        }
    };
    text.split(' ').map(short).collect::<Vec<_>>().join(" ")
}
