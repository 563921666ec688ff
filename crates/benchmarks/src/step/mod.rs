//! `qlora-bench step`: whole training steps of models with random weights.
//!
//! What runs is what `qlora train` runs: the decoder, its adapters, the engine and its optimizer, on random tokens that
//! all have a label. Each case is a process of its own, because an allocator that has served another case holds its
//! pages, and because a case that does not fit must not take the others with it.

mod case;
pub(crate) mod curves;
mod draw;
mod look;
mod measure;
mod memory;
mod peers;
mod report;
mod scaling;
pub(crate) mod shapes;
pub(crate) mod stress;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use burn::tensor::Device;
use burn_qlora::qlora_dist::Place as Rank;
use burn_qlora::qlora_train::report::device_name;
use burn_qlora::{ActivationCheckpointing, TrainConfig};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::bench::Bench;
use crate::ceilings::Ceilings;
use crate::kernels::save;
use crate::machine;
use crate::timer::Timer;
use case::Case;
use measure::{Measured, Place, Repeats, Tracing};
use memory::Driver;
use peers::Answer;
use report::Row;
use scaling::{Scaled, Together};

/// What is trained, and where.
#[derive(clap::Args)]
struct Setting {
    /// A shape of testdata/llama_shapes.json, moe_shapes.json, linear_shapes.json or latent_shapes.json.
    #[arg(long, default_value = "llama-2-7b")]
    shape: String,
    /// Only so many of its layers.
    #[arg(long)]
    layers: Option<usize>,
    /// Only so many words of its vocabulary.
    #[arg(long)]
    words: Option<usize>,
    /// Rank of the adapters, on every linear layer.
    #[arg(long, default_value_t = 64)]
    rank: usize,
    /// train.optimizer: adamw_32bit, adamw_8bit or lion_8bit.
    #[arg(long, default_value = "adamw_32bit")]
    optimizer: String,
    /// model.residency: auto, device or host.
    #[arg(long, default_value = "auto")]
    residency: String,
    /// model.device_budget: what the frozen weights may take of the device, such as 15GiB.
    #[arg(long, default_value = "auto")]
    device_budget: String,
    /// Any other key of `qlora train`; may be repeated.
    #[arg(long = "set", value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
    /// auto, cpu, cuda, `cuda:<index>`, vulkan or metal.
    #[arg(long, default_value = "auto")]
    device: String,
}

/// Options of `step`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    setting: Setting,
    /// Rows and tokens of a micro-batch; may be repeated. `4x2048-packed` are 4 sequences of short rows end to end, of lengths about 150
    /// tokens, 50 to 400; `48x2048-padded` are 48 such rows side by side.
    #[arg(long = "case", value_name = "ROWSxTOKENS", value_delimiter = ',', default_value = "1x2048,4x2048")]
    cases: Vec<Case>,
    /// Values of train.activation_checkpointing, separated by commas.
    #[arg(long = "policy", value_name = "POLICY", value_delimiter = ',', default_value = "full")]
    policies: Vec<String>,
    /// Steps that are timed.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Steps before them.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    warm_up: u32,
    /// The same with so many ranks too, each on a card of its own, and how much faster that is than one.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=64))]
    gpus: Option<u32>,
    /// PEFT and Unsloth on the same cases, TRL and Unsloth on pairs, in this Python.
    #[arg(long, value_name = "PYTHON")]
    peer: Option<String>,
    /// What runs in it.
    #[arg(long = "peer-script", value_name = "FILE", value_delimiter = ',', default_values = SCRIPTS)]
    peer_scripts: Vec<PathBuf>,
    /// Writes a trace of further steps for Perfetto, and prints tables by part of the step and by kernel. With several
    /// cases or policies, their names go into the file's.
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// How many steps.
    #[arg(long, default_value_t = 2, requires = "profile", value_parser = clap::value_parser!(u32).range(1..=1000))]
    profile_steps: u32,
    /// Writes the figures to a file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Writes the figures to `DIR/<gpu>/<date>-step-<shape>.json`.
    #[arg(long, value_name = "DIR", conflicts_with = "json")]
    record: Option<PathBuf>,
    /// One process's part: `ceilings`, POLICY:CASE, or ranks:POLICY:CASE.
    #[arg(long, hide = true)]
    child: Option<String>,
}

const SCRIPTS: [&str; 4] = [
    "benches/peers/bench_step_peft.py",
    "benches/peers/bench_step_unsloth.py",
    "benches/peers/bench_step_trl.py",
    "benches/peers/bench_step_unsloth_dpo.py",
];

/// What the device is and gives at best.
#[derive(Debug, Serialize, Deserialize)]
struct Card {
    machine: Value,
    /// Operations per second of the best dense product, and whose it is.
    flops: Option<(f64, String)>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    match args.child.as_deref() {
        Some("ceilings") => answer(ceilings(&args.setting.device)),
        Some(child) if child.starts_with(RANKS) => {
            let (policy, case) = child[RANKS.len()..].split_once(':').context("a rank's part is ranks:POLICY:CASE")?;
            let case = case.parse::<Case>().map_err(anyhow::Error::msg)?;
            answer(of_ranks(args, policy, case))
        }
        Some(child) => {
            let (policy, case) = child.split_once(':').context("a child is POLICY:CASE")?;
            let case = case.parse::<Case>().map_err(anyhow::Error::msg)?;
            answer(measured(args, policy, case))
        }
        None => match Rank::from_env()? {
            place if place.is_alone() => parent(args, None),
            _ if args.gpus.is_some() => bail!("--gpus starts ranks, and this process is one already: leave it out"),
            place => under_launcher(args, place),
        },
    }
}

/// What the part of a rank begins with.
const RANKS: &str = "ranks:";

/// As a process that a launcher started.
fn under_launcher(args: &Args, place: Rank) -> Result<()> {
    let (device, _) = open(&scaling::device_of(&args.setting.device, &place))?;
    let together = Together::meet(place, &device, &args.setting.config(&args.policies[0])?)?;
    if together.is_first() {
        return parent(args, Some(&together));
    }
    for policy in &args.policies {
        for &case in &args.cases {
            together.wait_for_all()?;
            measured_together(args, &together, policy, case)?;
        }
    }
    Ok(())
}

/// A rank of several that this program started.
fn of_ranks(args: &Args, policy: &str, case: Case) -> Result<Scaled> {
    let place = Rank::from_env()?;
    let (device, _) = open(&scaling::device_of(&args.setting.device, &place))?;
    let together = Together::meet(place, &device, &args.setting.config(policy)?)?;
    measured_together(args, &together, policy, case)
}

fn measured_together(args: &Args, together: &Together, policy: &str, case: Case) -> Result<Scaled> {
    let shape = shapes::config(&args.setting.shape, args.setting.layers, args.setting.words)?;
    let config = args.setting.config(policy)?;
    together.measure(&shape, &config, case, (args.warm_up as usize, args.steps as usize))
}

/// A child's last line.
fn answer<T: Serialize>(result: Result<T>) -> Result<()> {
    let line = match result {
        Ok(value) => json!({"ok": value}),
        Err(error) => json!({"error": format!("{error:#}")}),
    };
    println!("{line}");
    Ok(())
}

/// Measures all cases; `together` are the ranks of a launcher, of which this is rank 0.
fn parent(args: &Args, together: Option<&Together>) -> Result<()> {
    let shape = shapes::config(&args.setting.shape, args.setting.layers, args.setting.words)?;
    for policy in &args.policies {
        args.setting.config(policy)?;
    }
    if let Some(folder) = args.profile.as_deref().and_then(Path::parent).filter(|folder| *folder != Path::new("")) {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let card: Card = child("ceilings").map_err(anyhow::Error::msg)?;
    let accumulation = args.setting.config(&args.policies[0])?.train.gradient_accumulation_steps;
    let gpu = card.machine["gpu"].as_str().unwrap_or_default().to_owned();
    let layers = shape.num_hidden_layers;
    println!("{gpu}; {}, {layers} layers, rank {}, {}", args.setting.shape, args.setting.rank, args.setting.optimizer);
    if let Some((flops, by)) = &card.flops {
        println!("ceiling: {:.0} TFLOP/s ({by})", flops / 1e12);
    }
    println!("\n{}", Row::header());
    let record = Record::new(args, &card, layers, accumulation);
    let mut rows = Vec::new();
    for policy in &args.policies {
        for &case in &args.cases {
            let result = child::<Measured>(&format!("{policy}:{case}"));
            let kept = args.setting.config(policy)?.train.activation_checkpointing;
            let reruns_blocks = kept.fixed().is_some_and(ActivationCheckpointing::reruns_blocks);
            // What padding takes is no work.
            let of_row = |len: usize| shapes::flops(&shape, 1, len, reruns_blocks);
            let work = case.lengths(0).into_iter().map(of_row).sum::<f64>() * accumulation as f64;
            let bound = card.flops.as_ref().map(|(flops, _)| work / flops);
            let scaled = match (together, args.gpus) {
                (Some(together), _) => {
                    together.wait_for_all()?;
                    Some(measured_together(args, together, policy, case).map_err(|error| format!("{error:#}")))
                }
                (None, Some(count)) => Some(scaling::children(count as usize, &format!("{RANKS}{policy}:{case}"))),
                (None, None) => None,
            };
            let row = Row { policy: policy.clone(), case, result, bound, scaled };
            println!("{}", row.line());
            let lines = [row.memory_line(), row.streamed_line(), row.scaled_line()];
            lines.iter().flatten().for_each(|line| println!("{line}"));
            rows.push(row);
            record.save(&rows, &[])?;
        }
    }
    if let Some(python) = args.peer.as_deref() {
        let peers = run_peers(args, python, accumulation, |peers| record.save(&rows, peers))?;
        for row in &rows {
            report::ratios(row, &peers).iter().for_each(|line| println!("{line}"));
        }
    }
    record.say();
    Ok(())
}

/// The file of the figures, written anew with every one of them: a call that is cut short leaves what it has.
struct Record {
    path: Option<PathBuf>,
    head: Value,
}

impl Record {
    fn new(args: &Args, card: &Card, layers: usize, accumulation: usize) -> Self {
        let gpu = card.machine["gpu"].as_str().unwrap_or_default();
        let in_folder = |dir: &PathBuf| machine::record_path(dir, gpu, &format!("step-{}", args.setting.shape));
        let mut head = card.machine.clone();
        // The card is described by a process of its own.
        head["command"] = json!(machine::command());
        head["script"] = json!("cargo xtask bench step");
        head["tflop_per_second"] = json!(card.flops.as_ref().map(|(flops, _)| (flops / 1e12).round()));
        head["tflop_per_second_by"] = json!(card.flops.as_ref().map(|(_, by)| by));
        head["model"] = json!({
            "shape": args.setting.shape,
            "layers": layers,
            "words": args.setting.words,
            "rank": args.setting.rank,
            "optimizer": args.setting.optimizer,
            "gradient_accumulation_steps": accumulation,
            "residency": args.setting.residency,
            "device_budget": args.setting.device_budget,
            "set": args.setting.set,
            "warm_up": args.warm_up,
            "steps": args.steps,
        });
        Self { path: args.json.clone().or_else(|| args.record.as_ref().map(in_folder)), head }
    }

    fn save(&self, rows: &[Row], peers: &[Answer]) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let mut record = self.head.clone();
        record["steps"] = rows.iter().map(Row::json).collect();
        if !peers.is_empty() {
            record["peers"] = json!(peers);
        }
        save(path, &record)
    }

    fn say(&self) {
        self.path.iter().for_each(|path| println!("written to {}", path.display()));
    }
}

impl Setting {
    /// The configuration of `qlora train` for a policy.
    fn config(&self, policy: &str) -> Result<TrainConfig> {
        let mut config = TrainConfig::default();
        config.model.path = self.shape.clone();
        config.data.train = "random tokens".into();
        config.set("train.gradient_accumulation_steps", "1")?;
        config.set("train.activation_checkpointing", policy)?;
        config.set("train.optimizer", &self.optimizer)?;
        config.set("lora.rank", &self.rank.to_string())?;
        config.set("model.residency", &self.residency)?;
        config.set("model.device_budget", &self.device_budget)?;
        for assignment in &self.set {
            let (key, value) = assignment.split_once('=').context("--set takes SECTION.KEY=VALUE")?;
            config.set(key.trim(), value.trim())?;
        }
        config.validate()?;
        Ok(config)
    }
}

/// Runs this program once more, for a part of its work.
fn child<T: for<'a> Deserialize<'a>>(part: &str) -> Result<T, String> {
    let run = || -> Result<Value> {
        let output = Command::new(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .args(["--child", part])
            .stderr(Stdio::inherit())
            .output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        match text.lines().rev().find(|line| line.starts_with('{')) {
            Some(line) => Ok(serde_json::from_str(line)?),
            None => bail!("the measured process ended: {}", output.status),
        }
    };
    let mut answer = run().map_err(|error| format!("{error:#}"))?;
    match answer["error"].as_str() {
        Some(error) => Err(error.to_owned()),
        None => serde_json::from_value(answer["ok"].take()).map_err(|error| error.to_string()),
    }
}

/// A device of this name, for Burn, and for CubeCL where it is CubeCL's.
fn open(name: &str) -> Result<(Device, Option<Bench>)> {
    let bench = match name {
        "cpu" => None,
        "auto" => Bench::open("cuda").ok(),
        "vulkan" | "metal" => Some(Bench::open("wgpu")?),
        cuda => Some(Bench::open(cuda)?),
    };
    Ok((bench.as_ref().map_or_else(Device::flex, |bench| bench.device.clone()), bench))
}

/// The number of the CUDA device that a name stands for, should it be one.
fn cuda_index(device: &str) -> Option<usize> {
    match device {
        "auto" | "cuda" => Some(0),
        name => name.strip_prefix("cuda:").and_then(|index| index.parse().ok()),
    }
}

fn ceilings(device: &str) -> Result<Card> {
    let (device, bench) = open(device)?;
    let Some(bench) = bench else {
        let date = chrono::Local::now().format("%Y-%m-%d").to_string();
        return Ok(Card { machine: json!({"date": date, "gpu": device_name(&device)}), flops: None });
    };
    let ceilings = Ceilings::measure(&bench, &Timer::new(&bench.client))?;
    Ok(Card { machine: machine::describe(&bench.client), flops: ceilings.flops })
}

fn measured(args: &Args, policy: &str, case: Case) -> Result<Measured> {
    let shape = shapes::config(&args.setting.shape, args.setting.layers, args.setting.words)?;
    let config = args.setting.config(policy)?;
    let driver = cuda_index(&args.setting.device).and_then(Driver::watch);
    let (device, bench) = open(&args.setting.device)?;
    let client = bench.map(|bench| bench.client);
    let driver = driver.filter(|_| client.is_some());
    let tracing = trace_path(args, policy, case).map(|path| Tracing { path, steps: args.profile_steps as usize });
    let repeats = Repeats { warm_up: args.warm_up as usize, steps: args.steps as usize, tracing };
    measure::run(&shape, &config, case, &repeats, &Place { device, client, driver })
}

/// Where a case's trace goes.
fn trace_path(args: &Args, policy: &str, case: Case) -> Option<PathBuf> {
    let path = args.profile.clone()?;
    if args.cases.len() * args.policies.len() == 1 {
        return Some(path);
    }
    let [stem, extension] = [path.file_stem(), path.extension()].map(|part| part.unwrap_or_default().to_string_lossy());
    Some(path.with_file_name(format!("{stem}-{policy}-{case}.{extension}")))
}

fn run_peers(
    args: &Args,
    python: &str,
    accumulation: usize,
    answered: impl Fn(&[Answer]) -> Result<()>,
) -> Result<Vec<Answer>> {
    let mut settings = vec![
        ("shape", args.setting.shape.clone()),
        ("rank", args.setting.rank.to_string()),
        ("optimizer", args.setting.optimizer.clone()),
        ("accumulation", accumulation.to_string()),
        ("warm-up", args.warm_up.to_string()),
        ("steps", args.steps.to_string()),
    ];
    settings.extend(args.setting.layers.map(|layers| ("layers", layers.to_string())));
    settings.extend(args.setting.words.map(|words| ("words", words.to_string())));
    let mut answers = Vec::new();
    println!("\n{}", Answer::header());
    for case in args.cases.iter().filter(|case| !args.peer_scripts.iter().any(|script| peers::takes(script, **case))) {
        println!("{case}: none of the peers' scripts takes such a case");
    }
    for script in &args.peer_scripts {
        let cases: Vec<Case> = args.cases.iter().copied().filter(|case| peers::takes(script, *case)).collect();
        // Without a case a script would time its own.
        if cases.is_empty() {
            continue;
        }
        let arguments = peers::arguments(&settings, &cases);
        let mut saved = Ok(());
        let ended = peers::run(python, script, &arguments, |answer| {
            println!("{}", answer.line());
            answers.push(answer);
            saved = answered(&answers);
        });
        saved?;
        if let Err(error) = ended {
            println!("no more of this peer: {error:#}");
        }
    }
    Ok(answers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn args(line: &[&str]) -> Args {
        Line::try_parse_from(["step"].iter().chain(line)).unwrap().args
    }

    #[test]
    fn the_configuration_is_that_of_qlora_train() {
        let args = args(&["--rank", "16", "--optimizer", "lion_8bit", "--set", "lora.dropout = 0.1"]);
        let config = args.setting.config("none").unwrap();
        assert_eq!((config.lora.rank, config.lora.dropout, config.lora.alpha), (16, 0.1, 16.0));
        assert_eq!(config.train.optimizer.name(), "lion_8bit");
        assert_eq!(config.train.gradient_accumulation_steps, 1);
        assert_eq!(args.cases, [Case::full(1, 2048), Case::full(4, 2048)]);
    }

    #[test]
    fn each_case_has_a_trace_of_its_own() {
        let path =
            |line: &[&str]| trace_path(&args(&[line, &["--profile", "a/t.json"]].concat()), "full", Case::full(1, 8));
        assert_eq!(path(&["--case", "1x8"]), Some("a/t.json".into()));
        assert_eq!(path(&[]), Some("a/t-full-1x8.json".into()));
        assert_eq!(trace_path(&args(&[]), "full", Case::full(1, 8)), None);
    }

    #[test]
    fn what_does_not_exist_is_refused() {
        let message = |policy: &str, line: &[&str]| args(line).setting.config(policy).unwrap_err().to_string();
        assert!(message("some", &[]).contains("activation_checkpointing"), "{}", message("some", &[]));
        assert!(message("full", &["--set", "lora.rnk=3"]).contains("rnk"));
        assert!(message("full", &["--rank", "0"]).contains("rank"));
        assert!(Line::try_parse_from(["step", "--case", "4"]).is_err());
        assert!(Line::try_parse_from(["step", "--steps", "0"]).is_err());
    }
}
