//! `qlora-bench serve`: an engine over a model of random weights, with streams and adapters.
//!
//! A stream is a prompt of given length and an answer of given length; all begin at once. Prompts differ from their first
//! token on, so that nothing is shared. The engine is the server's own, without HTTP before it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use burn_qlora::adapter_io::Adapter;
use burn_qlora::qlora_models::{CachedRow, PagedCache, Part, RowLogits, default_compute_dtype};
use burn_qlora::qlora_serve::{CacheSize, Engine, EngineConfig, Event, Handle, Request};
use burn_qlora::qlora_train::Placed;
use burn_qlora::{Decoder, Device, LoadOptions, LoraConfig, QuantConfig, TrainConfig, device_memory, select_device};
use serde_json::{Value, json};

use crate::bench::Bench;
use crate::kernels::write;
use crate::machine;
use crate::step::shapes;

/// Options of `serve`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// cuda, `cuda:<index>`, cpu, vulkan or metal.
    #[arg(long, default_value = "cuda")]
    device: String,
    /// A shape of testdata/llama_shapes.json, moe_shapes.json, linear_shapes.json or latent_shapes.json.
    #[arg(long, default_value = "llama-2-7b")]
    shape: String,
    /// Another number of layers.
    #[arg(long)]
    layers: Option<usize>,
    /// Rank of the adapters.
    #[arg(long, default_value_t = 64)]
    rank: usize,
    /// Cases, as streams x prompt x answer x adapters; adapters 0 is the base.
    #[arg(long, num_args = 1.., default_values = [
        "1x32x256x0", "1x32x256x1", "16x512x256x0", "16x512x256x1", "64x512x128x0", "64x512x128x1", "64x512x128x8",
        "1x512x1x0", "1x4096x1x0",
    ])]
    cases: Vec<String>,
    /// Tokens of a pass at most.
    #[arg(long, default_value_t = 2048)]
    batch_tokens: usize,
    /// model.residency: auto, device or host.
    #[arg(long, default_value = "auto")]
    residency: String,
    /// model.device_budget: what the weights may take of the device, such as 15GiB.
    #[arg(long, default_value = "auto")]
    device_budget: String,
    /// Writes the figures to a file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Streams, tokens of a prompt, tokens of an answer, adapters.
#[derive(Clone, Copy)]
struct Case([usize; 4]);

impl Case {
    fn parse(text: &str) -> Result<Self> {
        let numbers = text.split('x').map(str::parse).collect::<Result<Vec<usize>, _>>().ok();
        let numbers: Option<[usize; 4]> = numbers.and_then(|numbers| numbers.try_into().ok());
        match numbers {
            Some([streams, prompt, answer, adapters]) if streams * prompt * answer > 0 => {
                Ok(Self([streams, prompt, answer, adapters]))
            }
            _ => bail!("{text}: a case is streams x prompt x answer x adapters, such as 16x512x256x0"),
        }
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let cases = args.cases.iter().map(|text| Case::parse(text)).collect::<Result<Vec<_>>>()?;
    let device = select_device(&args.device)?;
    let dtype = default_compute_dtype(&device);
    let config = shapes::config(&args.shape, args.layers, None)?;
    let options = LoadOptions { quantization: Some(QuantConfig::default()), dtype };
    let mut place = TrainConfig::default();
    place.set("model.residency", &args.residency)?;
    place.set("model.device_budget", &args.device_budget)?;
    let (streams, _) = Placed::to_answer(&place.model, &config, &options, &device).streams(&device, None)?;
    let model = Decoder::random_streamed(config, options, streams, 0, &device, &mut |_| {})?;
    let streamed = model.streaming();
    let num_adapters = cases.iter().map(|Case([.., adapters])| *adapters).max().unwrap_or(0);
    let adapters = (0..num_adapters).map(|seed| adapter(&model, args.rank, seed as u64)).collect::<Result<Vec<_>>>()?;
    device.sync()?;
    let weights = in_use(&device);
    let most = |Case([streams, prompt, answer, _]): &Case| streams * (prompt + answer + 16);
    let tokens = cases.iter().map(most).max().unwrap_or(0) + 64;
    println!("{} in {dtype:?}, {} in use, cache of {tokens} tokens", args.shape, mib(weights));
    if streamed.blocks > 0 {
        println!("{} blocks wait in the host's memory, {}", streamed.blocks, mib(streamed.host_bytes));
    }
    println!(
        "{:>16} {:>9} {:>9} {:>9} {:>9} {:>10} {:>9}",
        "case", "tok/s", "first ms", "last ms", "token ms", "memory MiB", "replayed"
    );
    let mut rows = Vec::new();
    for (text, case) in args.cases.iter().zip(&cases) {
        let Case([streams, ..]) = *case;
        let engine_config = EngineConfig {
            cache: CacheSize::Tokens(tokens),
            max_batch: streams,
            max_batch_tokens: args.batch_tokens,
            ..EngineConfig::default()
        };
        let (mut engine, handle) = Engine::new(model.clone(), &engine_config)?;
        for (index, adapter) in adapters.iter().enumerate() {
            engine.add_adapter(&format!("a{index}"), adapter.clone())?;
        }
        device.sync()?;
        // Weights, cache and adapters.
        let held = in_use(&device);
        let thread = engine.spawn()?;
        // Once for kernels to be compiled and measured.
        measure(&handle, *case, 0)?;
        let (before, start) = (model.streaming().bytes_in, Instant::now());
        let measured = median(&handle, *case)?;
        let bus = (model.streaming().bytes_in - before) as f64 / start.elapsed().as_secs_f64();
        let beyond = in_use(&device).saturating_sub(held);
        let passes = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let [steps, replays] = [&handle.counters().steps, &handle.counters().replays].map(passes);
        handle.close();
        thread.join().map_err(|_| anyhow!("the engine failed"))??;
        let Measured { rate, first, last, per_token } = measured;
        let ms = |duration: Duration| 1e3 * duration.as_secs_f64();
        println!(
            "{text:>16} {rate:>9.1} {:>9.2} {:>9.2} {:>9.3} {:>10} {:>6}/{}",
            ms(first),
            ms(last),
            ms(per_token),
            beyond >> 20,
            replays,
            steps
        );
        if streamed.blocks > 0 {
            println!("{:>16} {:>9.1} GB/s over the bus", "", bus / 1e9);
        }
        rows.push(json!({
            "bus_gb_per_second": (bus / 1e8).round() / 10.0,
            "case": text, "tokens_per_second": rate, "first_token_ms": ms(first), "last_first_token_ms": ms(last),
            "token_ms": ms(per_token), "beyond_weights_cache_and_adapters_mib": beyond >> 20, "passes": steps, "replayed": replays,
        }));
    }
    let prefill = prefill(&model, &device)?;
    println!("one pass over 4096 tokens: paged {:.1} ms, training's forward {:.1} ms", prefill[0], prefill[1]);
    let Some(path) = &args.json else { return Ok(()) };
    let mut record =
        machine::describe(&Bench::open(if args.device.starts_with("cuda") { &args.device } else { "wgpu" })?.client);
    record["script"] = json!("qlora-bench serve");
    record["serve"] = json!({
        "shape": args.shape, "layers": args.layers, "rank": args.rank, "batch_tokens": args.batch_tokens,
        "residency": args.residency, "device_budget": args.device_budget, "streamed_blocks": streamed.blocks,
        "streamed_mib": streamed.host_bytes >> 20, "weights_mib": weights >> 20, "cache_tokens": tokens, "rows": Value::Array(rows),
        "prefill_4096_ms": prefill[0], "training_forward_4096_ms": prefill[1],
    });
    write(path, &record)
}

/// A random adapter on every linear layer.
fn adapter(model: &Decoder, rank: usize, seed: u64) -> Result<Adapter> {
    let mut adapted = model.clone();
    adapted.attach_lora(&LoraConfig { rank, alpha: rank as f32, ..LoraConfig::default() }, seed)?;
    Ok(adapted.export_adapter("random", None)?)
}

fn in_use(device: &Device) -> u64 {
    device_memory(device).map_or(0, |(in_use, _)| in_use)
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

struct Measured {
    /// New tokens a second, from the first request to the last token.
    rate: f64,
    /// To the first stream's first token.
    first: Duration,
    /// To the last stream's first token.
    last: Duration,
    /// Between the last stream's first token and the end, a token of each stream.
    per_token: Duration,
}

/// The case's median by rate: five times, or as often as a second allows.
fn median(handle: &Handle, case: Case) -> Result<Measured> {
    let start = Instant::now();
    let mut measured = vec![measure(handle, case, 1)?];
    for round in 2..=5 {
        if start.elapsed() > Duration::from_secs(1) {
            break;
        }
        measured.push(measure(handle, case, round)?);
    }
    measured.sort_by(|a, b| a.rate.total_cmp(&b.rate));
    Ok(measured.swap_remove(measured.len() / 2))
}

/// One time the case; rounds of different numbers have different prompts.
fn measure(handle: &Handle, Case([streams, prompt, answer, adapters]): Case, round: usize) -> Result<Measured> {
    let vocab = handle.limits().vocab_size as u32;
    let start = Instant::now();
    let answers = (0..streams).map(|stream| {
        let id = |i: usize| ((7919 * (stream + 1) + 104_729 * round + 31 * i) as u32) % vocab;
        let adapter = (adapters > 0).then(|| handle.adapter(&format!("a{}", stream % adapters))).transpose()?;
        let request = Request { adapter, ..Request::new((0..prompt).map(id).collect::<Vec<_>>(), answer) };
        Ok(handle.submit(request)?)
    });
    let answers = answers.collect::<Result<Vec<_>>>()?;
    // One thread a stream: the time of each event is taken when it comes.
    let threads = answers.into_iter().map(|mut events| {
        std::thread::spawn(move || {
            let (mut first, mut tokens) = (None, 0);
            loop {
                match events.next_blocking() {
                    Some(Event::Token(_)) => {
                        first.get_or_insert_with(|| start.elapsed());
                        tokens += 1;
                    }
                    Some(Event::Finished(_)) => return Ok((first.unwrap_or_default(), tokens)),
                    Some(Event::Failed(message)) => return Err(anyhow!(message)),
                    Some(Event::Started { .. } | Event::Prompt(_)) => {}
                    None => return Err(anyhow!("the engine is gone")),
                }
            }
        })
    });
    let threads: Vec<_> = threads.collect();
    let ended = threads.into_iter().map(|thread| thread.join().map_err(|_| anyhow!("a reader failed"))?);
    let ended = ended.collect::<Result<Vec<(Duration, usize)>>>()?;
    let total = start.elapsed();
    let tokens: usize = ended.iter().map(|(_, tokens)| tokens).sum();
    let first = ended.iter().map(|(first, _)| *first).min().context("no stream")?;
    let last = ended.iter().map(|(first, _)| *first).max().context("no stream")?;
    let per_token = (total - last) / (answer.max(2) - 1) as u32;
    Ok(Measured { rate: tokens as f64 / total.as_secs_f64(), first, last, per_token })
}

/// Milliseconds of one pass over 4,096 tokens: into a paged cache, and as training runs it.
fn prefill(model: &Decoder, device: &Device) -> Result<[f64; 2]> {
    const TOKENS: usize = 4096;
    let ids: Vec<u32> = (0..TOKENS as u32).map(|i| (31 * i + 7) % model.vocab_size() as u32).collect();
    let blocks: Vec<u32> = (0..TOKENS as u32 / 16).collect();
    let mut cache = PagedCache::new(model, blocks.len(), 16);
    let mut paged = || -> Result<()> {
        let row = CachedRow { ids: &ids, past: 0, rotated_for: TOKENS, blocks: &blocks, logits: RowLogits::None };
        Decoder::forward_paged(&[Part { model, rows: vec![row] }], &mut cache);
        Ok(device.sync()?)
    };
    let sequence = model.sequence(1, TOKENS, 0);
    let training = || -> Result<()> {
        let pass = burn_qlora::Pass::INFERENCE;
        let x =
            model.blocks().iter().fold(model.embed(&ids, pass), |x, block| model.run_block(block, x, &sequence, pass));
        drop(x);
        Ok(device.sync()?)
    };
    Ok([best(&mut paged)?, best(training)?])
}

fn best(mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        let start = Instant::now();
        run()?;
        best = best.min(1e3 * start.elapsed().as_secs_f64());
    }
    Ok(best)
}
