//! `qlora-bench curves`: tokens a second against tokens of a row, rank, number of experts and memory budget.
//!
//! One process measures all of it, each point with a few steps of the engine that `qlora train` runs. Blocks are alike, so a
//! step of a whole model is one of `a` layers and as many times what `b - a` further ones cost as there are layers left: the first
//! three curves are measured with two small numbers of layers, and extrapolated. That leaves out what a whole model's memory
//! would make another choice of. The curve over budgets is measured with all layers, because budgets are about them.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use burn::tensor::Device;
use burn_qlora::qlora_models::{ModelConfig, device_memory};
use burn_qlora::{Decoder, TrainConfig};
use serde::Serialize;
use serde_json::{Value, json};

use super::case::Case;
use super::draw::{Axis, Curve, draw};
use super::measure::{Steps, median, plan, planned_engine, random_model};
use super::memory::{Peak, while_running};
use super::report::gib;
use super::{open, shapes};
use crate::kernels::save;
use crate::machine;

/// Options of `curves`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The shape of all curves but that over experts.
    #[arg(long, default_value = "llama-2-7b")]
    shape: String,
    /// The shape of the curve over experts, whose number is changed.
    #[arg(long, default_value = "qwen3-30b-a3b")]
    experts_shape: String,
    /// Only so many words of the latter's vocabulary.
    #[arg(long, default_value_t = 32_000)]
    experts_words: usize,
    /// Two numbers of layers, from which the others are extrapolated.
    #[arg(long, value_delimiter = ',', default_value = "2,4")]
    layers: Vec<usize>,
    /// Only these curves: tokens, rank, experts, memory.
    #[arg(long, value_delimiter = ',', default_value = "tokens,rank,experts,memory")]
    only: Vec<String>,
    /// Tokens of a row; one row a step.
    #[arg(long, value_delimiter = ',', default_value = "512,1024,2048,4096,8192,16384,32768,65536")]
    tokens: Vec<usize>,
    /// Ranks of the adapters.
    #[arg(long, value_delimiter = ',', default_value = "8,16,32,64,128,256,512")]
    ranks: Vec<usize>,
    /// Numbers of experts.
    #[arg(long, value_delimiter = ',', default_value = "8,16,32,64,128,256")]
    experts: Vec<usize>,
    /// train.memory_budget, GiB, with train.activation_checkpointing = "auto".
    #[arg(long, value_delimiter = ',', default_value = "8,12,16,24,32,40,60,80")]
    budgets: Vec<u64>,
    /// Rows and tokens of a micro-batch of all curves but that over tokens.
    #[arg(long, value_name = "ROWSxTOKENS", default_value = "4x2048")]
    case: Case,
    /// Rank of the adapters of all curves but that over ranks.
    #[arg(long, default_value_t = 64)]
    rank: usize,
    /// Rank of the adapters of experts.
    #[arg(long, default_value_t = 16)]
    experts_rank: usize,
    /// train.activation_checkpointing of all curves but that over budgets.
    #[arg(long, default_value = "full")]
    policy: String,
    /// Steps that are timed.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Steps before them.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    warm_up: u32,
    /// auto, cpu, cuda, `cuda:<index>`, vulkan or metal.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Where curves.json, curves.csv and a drawing of each curve are written.
    #[arg(long, value_name = "DIR", default_value = "curves")]
    out: PathBuf,
}

/// A point of a curve. Figures of a point that could not be measured are absent.
#[derive(Debug, Clone, Serialize)]
struct Point {
    curve: &'static str,
    shape: String,
    /// What the curve is over.
    x: f64,
    case: String,
    /// Layers that were measured, with the seconds of a step and half of the distance between the quartiles as a part of it.
    measured: Vec<Measured>,
    /// Layers of the shape, and what a step of it takes: measured, or extrapolated from fewer layers.
    layers: usize,
    extrapolated: bool,
    step_seconds: Option<f64>,
    tokens_per_second: Option<f64>,
    problem: Option<String>,
}

#[derive(Debug, Clone, Serialize)]
struct Measured {
    layers: usize,
    step_seconds: f64,
    spread: f64,
    /// The allocator's most bytes in use, less those of the frozen weights that were loaded.
    beyond_weights_bytes: u64,
}

impl Point {
    fn csv(&self) -> String {
        let number = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.6}"));
        let last = self.measured.last();
        let bytes = last.map_or(String::new(), |measured| measured.beyond_weights_bytes.to_string());
        let problem = self.problem.as_deref().unwrap_or_default().replace('"', "'");
        format!(
            "{},{},{},{},{},{},{},{},{},{bytes},\"{problem}\"",
            self.curve,
            self.shape,
            self.x,
            self.case,
            self.layers,
            last.map_or(0, |measured| measured.layers),
            self.extrapolated,
            number(self.step_seconds),
            number(self.tokens_per_second),
        )
    }

    fn line(&self) -> String {
        let head = format!("{:>7} {:>8}", self.curve, self.x);
        let (Some(seconds), Some(rate), Some(last)) = (self.step_seconds, self.tokens_per_second, self.measured.last())
        else {
            return format!("{head} {}", self.problem.as_deref().unwrap_or("not measured"));
        };
        let word = if self.extrapolated { "extrapolated" } else { "measured" };
        format!(
            "{head} {:>7} {:>10.1} {rate:>10.0} {:>14}  {word}",
            last.layers,
            1e3 * seconds,
            gib(last.beyond_weights_bytes)
        )
    }
}

const CSV_HEADER: &str = "curve,shape,x,case,layers,layers_measured,extrapolated,step_seconds,tokens_per_second,\
                          beyond_weights_bytes,problem";

pub(crate) fn run(args: &Args) -> Result<()> {
    ensure!(
        matches!(args.layers[..], [few, more] if 0 < few && few < more),
        "--layers takes two numbers, the smaller one first, such as 2,4"
    );
    let known = ["tokens", "rank", "experts", "memory"];
    if let Some(unknown) = args.only.iter().find(|name| !known.contains(&name.as_str())) {
        anyhow::bail!("there is no curve `{unknown}`; there are {}", known.join(", "));
    }
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;
    let (device, bench) = open(&args.device)?;
    let head = bench.as_ref().map_or_else(|| json!({}), |bench| machine::describe(&bench.client));
    println!(
        "{:>7} {:>8} {:>7} {:>10} {:>10} {:>9} {:>9}",
        "curve", "x", "layers", "step ms", "tok/s", "in use", "reserved"
    );
    let start = Instant::now();
    let mut curves = Curves { args, device, head, points: Vec::new() };
    for name in known.into_iter().filter(|known| args.only.iter().any(|name| name == known)) {
        match name {
            "tokens" => curves.over_tokens()?,
            "rank" => curves.over_ranks()?,
            "experts" => curves.over_experts()?,
            _ => curves.over_budgets()?,
        }
    }
    println!("{:.0} s; written to {}", start.elapsed().as_secs_f64(), args.out.display());
    Ok(())
}

/// The curves so far.
struct Curves<'a> {
    args: &'a Args,
    device: Device,
    head: Value,
    points: Vec<Point>,
}

impl Curves<'_> {
    fn over_tokens(&mut self) -> Result<()> {
        let config = self.config(self.args.rank, &self.args.policy)?;
        let models = self.models(|layers| shapes::config(&self.args.shape, Some(layers), None), &config)?;
        for &len in &self.args.tokens {
            self.extrapolate("tokens", &self.args.shape, len as f64, &models, &config, Case::full(1, len))?;
        }
        self.picture("tokens", "tokens of a row, one row a step", &self.args.shape, true)
    }

    fn over_ranks(&mut self) -> Result<()> {
        let config = self.config(self.args.rank, &self.args.policy)?;
        let models = self.models(|layers| shapes::config(&self.args.shape, Some(layers), None), &config)?;
        for &rank in &self.args.ranks {
            let config = self.config(rank, &self.args.policy)?;
            self.extrapolate("rank", &self.args.shape, rank as f64, &models, &config, self.args.case)?;
        }
        self.picture("rank", "rank of the adapters on all linear layers", &self.args.shape, true)
    }

    fn over_experts(&mut self) -> Result<()> {
        let config = self.config(self.args.experts_rank, &self.args.policy)?;
        for &experts in &self.args.experts {
            let shape = |layers| with_experts(&self.args.experts_shape, experts, layers, self.args.experts_words);
            let models = self.models(shape, &config)?;
            let name = &self.args.experts_shape;
            self.extrapolate("experts", name, experts as f64, &models, &config, self.args.case)?;
        }
        self.picture("experts", "experts of a block", &self.args.experts_shape, true)
    }

    fn over_budgets(&mut self) -> Result<()> {
        let shape = shapes::config(&self.args.shape, None, None)?;
        let model = random_model(&shape, &self.config(self.args.rank, "auto")?, None, &self.device)?;
        let layers = shape.num_hidden_layers;
        for &budget in &self.args.budgets {
            let mut config = self.config(self.args.rank, "auto")?;
            config.set("train.memory_budget", &format!("{budget}GiB"))?;
            let measured = self.measure(&model, &config, self.args.case);
            let step_seconds = measured.as_ref().ok().map(|measured| measured.step_seconds);
            let problem = measured.as_ref().err().map(|error| format!("{error:#}"));
            let measured = measured.into_iter().collect();
            self.add(Point {
                curve: "memory",
                shape: self.args.shape.clone(),
                x: budget as f64,
                case: self.args.case.to_string(),
                measured,
                layers,
                extrapolated: false,
                step_seconds,
                tokens_per_second: step_seconds.map(|seconds| tokens(self.args.case) / seconds),
                problem,
            })?;
        }
        self.picture("memory", "train.memory_budget, GiB", &self.args.shape, false)
    }

    /// The configuration of `qlora train`.
    fn config(&self, rank: usize, policy: &str) -> Result<TrainConfig> {
        let mut config = TrainConfig::default();
        config.model.path = self.args.shape.clone();
        config.data.train = "random tokens".into();
        config.set("train.gradient_accumulation_steps", "1")?;
        config.set("train.activation_checkpointing", policy)?;
        config.set("lora.rank", &rank.to_string())?;
        config.validate()?;
        Ok(config)
    }

    /// Models of both numbers of layers.
    fn models(&self, shape: impl Fn(usize) -> Result<ModelConfig>, config: &TrainConfig) -> Result<Vec<Decoder>> {
        self.args.layers.iter().map(|layers| random_model(&shape(*layers)?, config, None, &self.device)).collect()
    }

    /// A point of a whole model, from those of few layers.
    fn extrapolate(
        &mut self,
        curve: &'static str,
        shape: &str,
        x: f64,
        models: &[Decoder],
        config: &TrainConfig,
        case: Case,
    ) -> Result<()> {
        let layers = shapes::config(shape, None, None)?.num_hidden_layers;
        let measured = models.iter().map(|model| self.measure(model, config, case)).collect::<Result<Vec<_>>>();
        let problem = measured.as_ref().err().map(|error| format!("{error:#}"));
        let measured = measured.unwrap_or_default();
        let step_seconds = match &measured[..] {
            [few, more] => Some(whole(layers, [few, more].map(|m| (m.layers, m.step_seconds)))),
            _ => None,
        };
        self.add(Point {
            curve,
            shape: shape.into(),
            x,
            case: case.to_string(),
            measured,
            layers,
            extrapolated: true,
            step_seconds,
            tokens_per_second: step_seconds.map(|seconds| tokens(case) / seconds),
            problem,
        })
    }

    /// Times steps over a clone of a model with fresh adapters.
    fn measure(&self, model: &Decoder, config: &TrainConfig, case: Case) -> Result<Measured> {
        let shape = model.config();
        let (weights, _) = device_memory(&self.device).unwrap_or_default();
        let planned = plan(shape, config, case, &self.device, 1)?;
        let mut steps = Steps::new(planned_engine(model.clone(), config, case, planned)?, config, case);
        let mut peak = Peak::default();
        (0..self.args.warm_up).try_for_each(|_| steps.next().map(drop))?;
        self.device.sync()?;
        let mut seconds = Vec::new();
        for _ in 0..self.args.steps {
            let start = Instant::now();
            steps.next()?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        while_running(&self.device, &mut peak, || steps.next())?;
        drop(steps);
        self.device.sync()?;
        // What this point had goes back, so that the next one's figures are its own.
        self.device.memory_cleanup();
        let (step_seconds, spread) = median(&mut seconds);
        let layers = shape.num_hidden_layers;
        Ok(Measured { layers, step_seconds, spread, beyond_weights_bytes: peak.in_use.saturating_sub(weights) })
    }

    /// One more point, and the files written anew: a call that is cut short leaves what it has.
    fn add(&mut self, point: Point) -> Result<()> {
        println!("{}", point.line());
        self.points.push(point);
        let mut record = self.head.clone();
        record["script"] = json!("cargo xtask bench curves");
        record["policy"] = json!(self.args.policy);
        record["rank"] = json!(self.args.rank);
        record["experts_rank"] = json!(self.args.experts_rank);
        record["points"] = self.points.iter().map(|point| json!(point)).collect();
        save(&self.args.out.join("curves.json"), &record)?;
        let lines = std::iter::once(CSV_HEADER.to_owned()).chain(self.points.iter().map(Point::csv));
        write(&self.args.out.join("curves.csv"), &(lines.collect::<Vec<_>>().join("\n") + "\n"))
    }

    /// Draws a curve.
    fn picture(&self, name: &str, over: &str, shape: &str, doubling: bool) -> Result<()> {
        let of_curve = || self.points.iter().filter(|point| point.curve == name);
        let points = of_curve().filter_map(|point| Some((point.x, point.tokens_per_second?))).collect();
        let Some(last) = of_curve().next_back() else { return Ok(()) };
        let how = match last.extrapolated {
            true => format!(
                "{} and {} layers measured, extrapolated to {}",
                self.args.layers[0], self.args.layers[1], last.layers
            ),
            false => format!("measured with all {} layers", last.layers),
        };
        let gpu = self.head["gpu"].as_str().unwrap_or("CPU");
        let title = format!("{shape}, {gpu}: {how}");
        let curve = Curve { title: &title, over, axis: if doubling { Axis::Doubling } else { Axis::Even }, points };
        write(&self.args.out.join(format!("{name}.svg")), &draw(&curve)?)
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| path.display().to_string())
}

fn tokens(case: Case) -> f64 {
    (case.rows * case.len) as f64
}

/// What a step of `layers` layers takes, given two numbers of layers with what theirs take.
fn whole(layers: usize, [(few, first), (more, second)]: [(usize, f64); 2]) -> f64 {
    let each = (second - first) / (more - few) as f64;
    first + each * (layers as f64 - few as f64)
}

/// A shape with another number of experts.
fn with_experts(name: &str, experts: usize, layers: usize, words: usize) -> Result<ModelConfig> {
    let mut config = shapes::json(name, Some(layers), Some(words))?;
    let key = ["num_experts", "num_local_experts"].into_iter().find(|key| config.get(*key).is_some());
    let key = key.with_context(|| format!("{name} has no experts; choose another --experts-shape"))?;
    config[key] = json!(experts);
    Ok(ModelConfig::from_json(&config, Path::new(name))?)
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

    #[test]
    fn steps_of_few_layers_give_those_of_many() {
        // 5 ms beside the layers, 3 ms each.
        assert!((whole(32, [(2, 0.011), (4, 0.017)]) - 0.101).abs() < 1e-12);
    }

    #[test]
    fn tiny_curves_are_measured_and_drawn() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().to_str().unwrap();
        let line = [
            "curves",
            "--device",
            "cpu",
            "--shape",
            "tiny",
            "--experts-shape",
            "tiny-moe",
            "--layers",
            "1,2",
            "--tokens",
            "16,32",
            "--ranks",
            "4,8",
            "--experts",
            "4,8",
            "--budgets",
            "1,64",
            "--case",
            "2x16",
            "--rank",
            "8",
            "--experts-rank",
            "4",
            "--steps",
            "1",
            "--warm-up",
            "1",
            "--experts-words",
            "300",
            "--out",
            out,
        ];
        run(&Line::try_parse_from(line).unwrap().args).unwrap();
        let record: Value =
            serde_json::from_str(&std::fs::read_to_string(dir.path().join("curves.json")).unwrap()).unwrap();
        let points = record["points"].as_array().unwrap();
        assert_eq!(points.len(), 8);
        assert!(points.iter().all(|point| point["tokens_per_second"].as_f64().is_some_and(|rate| rate.is_finite())));
        let csv = std::fs::read_to_string(dir.path().join("curves.csv")).unwrap();
        assert_eq!(csv.lines().count(), 9);
        let fields = |line: &str| line.split(',').count();
        assert!(csv.lines().all(|line| fields(line) == fields(CSV_HEADER)), "{csv}");
        for name in ["tokens", "rank", "experts", "memory"] {
            let svg = std::fs::read_to_string(dir.path().join(format!("{name}.svg"))).unwrap();
            assert!(svg.contains("<circle") && svg.contains("tokens/s"), "{name}");
        }
        let message = Line::try_parse_from(["curves", "--layers", "4,2", "--out", out]).map(|line| run(&line.args));
        assert!(message.unwrap().unwrap_err().to_string().contains("the smaller one first"));
    }
}
