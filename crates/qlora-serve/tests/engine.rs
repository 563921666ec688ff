//! Answers of the engine are those of one sequence alone, whatever shares the batch.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use adapter_io::Adapter;
use burn::tensor::{Device, FloatDType, Tensor};
use nf4_quant::QuantConfig;
use qlora_layers::{LoraConfig, Pass, TargetModules};
use qlora_models::{Decoder, LoadOptions};
use qlora_serve::{
    Answer, CacheSize, Constraint, Engine, EngineConfig, Event, FinishReason, Finished, Handle, Request, Sampling,
    ServeError, TokenLogprobs, Usage,
};

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference").join(name)
}

fn load(name: &str, quantization: Option<QuantConfig>) -> Decoder {
    let options = LoadOptions { quantization, dtype: FloatDType::F32 };
    Decoder::load(&reference(name), options, &Device::flex(), &mut |_| {}).unwrap()
}

fn archs() -> Vec<String> {
    let entries = std::fs::read_dir(reference("archs")).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// An engine that runs.
struct Served {
    handle: Handle,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Served {
    fn new(model: &Decoder, config: EngineConfig) -> Self {
        let (engine, handle) = Engine::new(model.clone(), &config).unwrap();
        Self { handle, thread: Some(engine.spawn().unwrap()) }
    }

    fn load(&self, name: &str, dir: &Path) -> Result<(), ServeError> {
        wait(self.handle.load_adapter(name, dir))
    }

    fn close(mut self) {
        self.handle.close();
        self.thread.take().unwrap().join().unwrap().unwrap();
        assert_eq!(self.handle.counters().waiting.load(Ordering::Relaxed), 0);
    }
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

/// A small configuration in which prompts are cut and sequences give way.
fn crowded() -> EngineConfig {
    EngineConfig {
        cache: CacheSize::Tokens(96),
        block_tokens: 4,
        max_batch: 8,
        max_batch_tokens: 10,
        ..EngineConfig::default()
    }
}

#[derive(Debug, PartialEq)]
struct Whole {
    ids: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
    prompt: Vec<Option<TokenLogprobs>>,
    finished: Finished,
}

fn read(mut answer: Answer) -> Result<Whole, String> {
    let (mut ids, mut logprobs, mut prompt, mut cached) = (Vec::new(), Vec::new(), Vec::new(), None);
    loop {
        match answer.next_blocking().ok_or("the engine is gone")? {
            Event::Started { cached_tokens } => cached = Some(cached_tokens),
            Event::Prompt(found) => prompt = found,
            Event::Token(token) => {
                ids.push(token.id);
                logprobs.extend(token.logprobs);
            }
            Event::Finished(finished) => {
                let told = cached.is_none_or(|cached| cached == finished.usage.cached_tokens);
                assert!(told, "before the answer as behind it");
                return Ok(Whole { ids, logprobs, prompt, finished });
            }
            Event::Failed(message) => return Err(message),
        }
    }
}

/// The greedy continuation, each token from one pass over everything before it, without a cache.
fn alone(model: &Decoder, prompt: &[u32], max_new_tokens: usize) -> Vec<u32> {
    let mut ids = prompt.to_vec();
    for _ in 0..max_new_tokens {
        let logits = model.forward(&ids, 1, Pass::INFERENCE);
        let last = logits.narrow(0, ids.len() - 1, 1).into_data().iter::<f32>().collect::<Vec<_>>();
        ids.push(qlora_serve::sampling::likeliest(&last).unwrap());
    }
    ids.split_off(prompt.len())
}

/// Prompts of many lengths; some share beginnings.
fn prompts(count: usize, vocab: u32, longest: usize) -> Vec<Vec<u32>> {
    let prompt = |i: usize| {
        let len = 1 + (7 * i + i * i) % longest;
        let shared = if i.is_multiple_of(3) { len.min(9) } else { 0 };
        (0..len as u32).map(move |p| if (p as usize) < shared { 5 + p } else { (31 * i as u32 + 17 * p + 3) % vocab })
    };
    (0..count).map(|i| prompt(i).collect()).collect()
}

#[test]
fn every_family_answers_in_a_crowd_as_alone() {
    for name in archs() {
        let model = load(&format!("archs/{name}"), Some(QuantConfig::default()));
        // Longer than every window and every original context, as far as there are positions.
        let longest = (model.config().max_tokens() - 16).min(24);
        let prompts = prompts(12, model.config().vocab_size as u32, longest);
        // Room for two of the longest.
        let cache = CacheSize::Tokens(2 * (longest + 16));
        let served = Served::new(&model, EngineConfig { cache, ..crowded() });
        let answers: Vec<Answer> = prompts
            .iter()
            .enumerate()
            .map(|(i, prompt)| served.handle.submit(Request::new(prompt.clone(), 4 + i)).unwrap())
            .collect();
        for (i, (answer, prompt)) in answers.into_iter().zip(&prompts).enumerate() {
            let whole = read(answer).unwrap();
            assert_eq!(whole.ids, alone(&model, prompt, 4 + i), "{name}, request {i}");
            assert_eq!(whole.finished.reason, FinishReason::Length);
        }
        let counters = served.handle.counters();
        assert!(counters.preemptions.load(Ordering::Relaxed) > 0, "{name}: nobody had to give way");
        assert_eq!(counters.blocks_used.load(Ordering::Relaxed), 0);
        served.close();
    }
}

/// Adapters of every kind on one model, with the model that carries each.
fn adapters(model: &Decoder, folder: &Path) -> Vec<(String, PathBuf, Decoder)> {
    let mut found = Vec::new();
    for kind in ["dora", "layers", "lora_bias", "modules_to_save", "patterns", "plain", "regex", "rslora"] {
        let dir = reference("adapters").join(kind);
        let mut adapted = model.clone();
        adapted.load_adapter(&Adapter::load(&dir).unwrap()).unwrap();
        found.push((kind.to_string(), dir, adapted));
    }
    // Embedding and head.
    let mut both = model.clone();
    let targets = TargetModules::Names(vec!["embed_tokens".into(), "lm_head".into(), "q_proj".into()]);
    let config = LoraConfig { rank: 3, alpha: 24.0, target_modules: targets, ..Default::default() };
    both.attach_lora(&config, 3).unwrap();
    let dir = folder.join("embedding");
    let adapted = saved(model, both, &dir);
    found.push(("embedding".into(), dir, adapted));
    found
}

/// Gives fresh adapters numbers that change something, and saves them: the model with what was saved.
fn saved(model: &Decoder, mut fresh: Decoder, dir: &Path) -> Decoder {
    for (_, adapter) in fresh.adapters_mut() {
        let [out, rank] = adapter.lora_b.dims();
        let values = (0..out * rank).map(|i| ((i * 37 % 101) as f32 - 50.0) / 500.0).collect::<Vec<f32>>();
        let data = burn::tensor::TensorData::new(values, [out, rank]);
        adapter.lora_b = qlora_layers::trainable(Tensor::from_data(data, (&Device::flex(), burn::tensor::DType::F32)));
    }
    fresh.export_adapter("base", None).unwrap().save(dir).unwrap();
    let mut adapted = model.clone();
    adapted.load_adapter(&Adapter::load(dir).unwrap()).unwrap();
    adapted
}

#[test]
fn a_batch_of_many_adapters_gives_the_single_answers() {
    let folder = tempfile::tempdir().unwrap();
    let model = load("tiny-llama", None);
    let adapters = adapters(&model, folder.path());
    // Fewer on the device than a batch uses, and fewer than there are.
    let config = EngineConfig {
        cache: CacheSize::Tokens(4096),
        max_batch_tokens: 64,
        max_adapters_on_device: 3,
        ..EngineConfig::default()
    };
    let served = Served::new(&model, config);
    for (name, dir, _) in &adapters {
        served.load(name, dir).unwrap();
    }
    let kinds = adapters.len() + 1;
    let prompts = prompts(64, 4000, 20);
    let carrier = |i: usize| adapters.get(i % kinds);
    let answers: Vec<Answer> = prompts
        .iter()
        .enumerate()
        .map(|(i, prompt)| {
            let adapter = carrier(i).map(|(name, ..)| served.handle.adapter(name).unwrap());
            served.handle.submit(Request { adapter, ..Request::new(prompt.clone(), 6) }).unwrap()
        })
        .collect();
    let mut differ = 0;
    for (i, (answer, prompt)) in answers.into_iter().zip(&prompts).enumerate() {
        let (name, adapted) = carrier(i).map_or(("base", &model), |(name, _, adapted)| (name, adapted));
        let ids = read(answer).unwrap().ids;
        assert_eq!(ids, alone(adapted, prompt, 6), "request {i}, {name}");
        differ += usize::from(ids != alone(&model, prompt, 6));
    }
    assert!(differ > 20, "adapters that change nothing prove nothing: {differ}");
    served.close();
}

/// Sequences with a state, each of its own adapter; prompts are cut, and sequences give way and start again.
#[test]
fn adapters_of_linear_attention_answer_in_one_batch() {
    for name in ["archs/qwen3_5", "archs/qwen3_next"] {
        let model = load(name, Some(QuantConfig::default()));
        let folder = tempfile::tempdir().unwrap();
        let kinds = [("all", TargetModules::AllLinear), ("some", TargetModules::Names(vec!["out_proj".into()]))];
        let kinds = kinds.map(|(kind, target_modules)| {
            let (mut fresh, dir) = (model.clone(), folder.path().join(kind));
            fresh.attach_lora(&LoraConfig { rank: 2, alpha: 16.0, target_modules, ..Default::default() }, 3).unwrap();
            let adapted = saved(&model, fresh, &dir);
            (kind, dir, adapted)
        });
        let served = Served::new(&model, EngineConfig { cache: CacheSize::Tokens(56), ..crowded() });
        kinds.iter().for_each(|(kind, dir, _)| served.load(kind, dir).unwrap());
        let prompts = prompts(15, model.config().vocab_size as u32, 24);
        let answers = prompts.iter().zip(0..).map(|(prompt, i)| {
            let adapter = kinds.get(i % 3).map(|(kind, ..)| served.handle.adapter(kind).unwrap());
            served.handle.submit(Request { adapter, ..Request::new(prompt.clone(), 12) }).unwrap()
        });
        let (mut differ, answers) = (0, answers.collect::<Vec<Answer>>());
        for (i, (answer, prompt)) in answers.into_iter().zip(&prompts).enumerate() {
            let ids = read(answer).unwrap().ids;
            let adapted = kinds.get(i % 3).map_or(&model, |(.., adapted)| adapted);
            assert_eq!(ids, alone(adapted, prompt, 12), "{name}, request {i}");
            differ += usize::from(ids != alone(&model, prompt, 12));
        }
        assert!(differ > 5, "{name}: adapters that change nothing prove nothing: {differ}");
        assert!(served.handle.counters().preemptions.load(Ordering::Relaxed) > 0, "{name}: nobody had to give way");
        served.close();
    }
}

#[test]
fn adapters_come_and_go_while_answers_run() {
    let model = load("tiny-llama", None);
    let served = Served::new(&model, EngineConfig { max_adapters: 2, ..EngineConfig::default() });
    let dir = reference("adapters/plain");
    served.load("one", &dir).unwrap();
    assert!(matches!(served.load("one", &dir), Err(ServeError::NameTaken { .. })));
    served.load("two", &reference("adapters/rslora")).unwrap();
    assert!(matches!(served.load("three", &dir), Err(ServeError::TooManyAdapters { max_adapters: 2 })));
    let names: Vec<String> = served.handle.adapters().into_iter().map(|adapter| adapter.name).collect();
    assert_eq!(names, ["one", "two"]);
    let ask = || {
        let adapter = Some(served.handle.adapter("one")?);
        served.handle.submit(Request { adapter, ..Request::new(vec![5, 6, 7], 200) })
    };
    let mut running = ask().unwrap();
    assert_eq!(running.next_blocking(), Some(Event::Started { cached_tokens: 0 }));
    assert!(matches!(running.next_blocking(), Some(Event::Token(_))));
    wait(served.handle.unload_adapter("one")).unwrap();
    assert!(matches!(ask(), Err(ServeError::UnknownAdapter { .. })));
    assert!(matches!(wait(served.handle.unload_adapter("one")), Err(ServeError::UnknownAdapter { .. })));
    // Another adapter of the same name, while the first one still answers.
    served.load("one", &reference("adapters/rslora")).unwrap();
    let mut first = model.clone();
    first.load_adapter(&Adapter::load(&dir).unwrap()).unwrap();
    let rest = read(running).unwrap().ids;
    assert_eq!(rest, alone(&first, &[5, 6, 7], 200)[1..]);
    let mut second = model.clone();
    second.load_adapter(&Adapter::load(&reference("adapters/rslora")).unwrap()).unwrap();
    assert_eq!(read(ask().unwrap()).unwrap().ids, alone(&second, &[5, 6, 7], 200));
    let missing = served.load("four", Path::new("/nowhere"));
    assert!(matches!(missing, Err(ServeError::TooManyAdapters { .. } | ServeError::Adapter { .. })));
    served.close();
}

/// A request is answered by the adapter that it was made for, whenever it is sent and whatever its name is by then.
#[test]
fn a_request_keeps_its_adapter() {
    let model = load("tiny-llama", None);
    let served = Served::new(&model, EngineConfig::default());
    // Tokens of its own, which the other adapter has no rows for.
    let own = reference("adapters/tokens");
    served.load("a", &own).unwrap();
    let adapter = Some(served.handle.adapter("a").unwrap());
    let prompt = [4097, 20, 300, 4096];
    let request = || Request { adapter: adapter.clone(), ..Request::new(prompt, 6) };
    wait(served.handle.unload_adapter("a")).unwrap();
    served.load("a", &reference("adapters/plain")).unwrap();
    let answers = [served.handle.submit(request()).unwrap(), served.handle.submit(request()).unwrap()];
    let mut first = model.clone();
    first.load_adapter(&Adapter::load(&own).unwrap()).unwrap();
    let expected = alone(&first, &prompt, 6);
    for answer in answers {
        assert_eq!(read(answer).unwrap().ids, expected);
    }
    let other = Request { adapter: Some(served.handle.adapter("a").unwrap()), ..request() };
    assert!(matches!(served.handle.submit(other), Err(ServeError::BeyondVocabulary { token: 4097, .. })));
    // One that another engine gave is none here.
    let elsewhere = Served::new(&model, EngineConfig::default());
    let failed = read(elsewhere.handle.submit(request()).unwrap()).unwrap_err();
    assert!(failed.contains("no adapter is called \"a\""), "{failed}");
    elsewhere.close();
    served.close();
}

#[test]
fn common_beginnings_are_computed_once_and_change_nothing() {
    let model = load("tiny-llama", Some(QuantConfig::default()));
    let served = Served::new(&model, EngineConfig { max_batch_tokens: 16, ..EngineConfig::default() });
    let system: Vec<u32> = (0..50).map(|i| 7 * i + 11).collect();
    let mut cached = Vec::new();
    for i in 0..3 {
        let prompt = [&system[..], &[100 + i, 200, 300]].concat();
        let whole = read(served.handle.submit(Request::new(prompt.clone(), 8)).unwrap()).unwrap();
        assert_eq!(whole.ids, alone(&model, &prompt, 8));
        cached.push(whole.finished.usage.cached_tokens);
    }
    // Three whole blocks of 16.
    assert_eq!(cached, [0, 48, 48]);
    served.close();
}

#[test]
fn cancelled_neighbours_change_nothing_and_leave_nothing() {
    let model = load("tiny-llama", Some(QuantConfig::default()));
    let served = Served::new(&model, crowded());
    let prompts = prompts(24, 4000, 20);
    let mut kept = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        let mut answer = served.handle.submit(Request::new(prompt.clone(), 12)).unwrap();
        match i % 3 {
            0 => kept.push((prompt, answer)),
            1 => drop(answer),
            _ => {
                answer.next_blocking();
            }
        }
    }
    for (prompt, answer) in kept {
        assert_eq!(read(answer).unwrap().ids, alone(&model, prompt, 12));
    }
    let handle = served.handle.clone();
    served.close();
    let counters = handle.counters();
    assert_eq!(counters.blocks_used.load(Ordering::Relaxed), 0);
    assert_eq!(
        counters.finished.load(Ordering::Relaxed) + counters.cancelled.load(Ordering::Relaxed),
        24,
        "{counters:?}"
    );
    assert_eq!(counters.finished.load(Ordering::Relaxed), 8);
}

#[test]
fn who_has_enough_of_an_answer_has_finished_it() {
    let model = load("tiny-llama", None);
    let served = Served::new(&model, EngineConfig::default());
    let counters = served.handle.counters();
    let prompt: Vec<u32> = (10..64).collect();
    read(served.handle.submit(Request::new(prompt.clone(), 2)).unwrap()).unwrap();
    let mut answer = served.handle.submit(Request::new(prompt, 400)).unwrap();
    // Three blocks of 16 of the prompt's 54 tokens.
    assert_eq!(answer.next_blocking(), Some(Event::Started { cached_tokens: 48 }));
    assert!(matches!(answer.next_blocking(), Some(Event::Token(_))));
    answer.finish();
    let count = || [&counters.finished, &counters.cancelled].map(|counter| counter.load(Ordering::Relaxed));
    while count().iter().sum::<u64>() < 2 {
        std::thread::yield_now();
    }
    assert_eq!(count(), [2, 0]);
    assert!(counters.generated_tokens.load(Ordering::Relaxed) < 400, "the engine went on");
    served.close();
}

#[test]
fn the_same_seed_gives_the_same_answer_in_any_company() {
    let model = load("tiny-llama", Some(QuantConfig::default()));
    let request = |seed| Request {
        sampling: Sampling { temperature: 1.0, top_p: 0.95, seed, ..Sampling::default() },
        ..Request::new(vec![5, 900, 33], 12)
    };
    let served = Served::new(&model, EngineConfig::default());
    let single = read(served.handle.submit(request(7)).unwrap()).unwrap().ids;
    assert_ne!(read(served.handle.submit(request(8)).unwrap()).unwrap().ids, single);
    served.close();
    let served = Served::new(&model, crowded());
    let others: Vec<Answer> =
        prompts(10, 4000, 20).into_iter().map(|p| served.handle.submit(Request::new(p, 16)).unwrap()).collect();
    assert_eq!(read(served.handle.submit(request(7)).unwrap()).unwrap().ids, single);
    others.into_iter().for_each(|answer| drop(read(answer).unwrap()));
    served.close();
}

/// Log probabilities by the definition, from one pass over the whole sequence.
fn by_definition(model: &Decoder, ids: &[u32]) -> Vec<f64> {
    let vocab = model.config().vocab_size;
    let logits: Vec<f32> = model.forward(ids, 1, Pass::INFERENCE).into_data().iter::<f32>().collect();
    let rows = logits.chunks(vocab).zip(&ids[1..]);
    rows.map(|(row, id)| {
        let sum: f64 = row.iter().map(|logit| f64::from(*logit).exp()).sum();
        f64::from(row[*id as usize]) - sum.ln()
    })
    .collect()
}

#[test]
fn log_probabilities_of_prompt_and_answer_are_the_models() {
    let model = load("tiny-llama", Some(QuantConfig::default()));
    let served = Served::new(&model, crowded());
    // Others, so that the prompt is cut into pieces and shares a beginning that it must not take.
    let prompt: Vec<u32> = (0..30).map(|i| 7 * i + 11).collect();
    read(served.handle.submit(Request::new(prompt.clone(), 2)).unwrap()).unwrap();
    let other = served.handle.submit(Request::new(vec![3; 9], 20)).unwrap();
    let request = Request { logprobs: Some(2), prompt_logprobs: true, ..Request::new(prompt.clone(), 3) };
    let whole = read(served.handle.submit(request).unwrap()).unwrap();
    read(other).unwrap();
    let ids = [&prompt[..], &whole.ids].concat();
    let expected = by_definition(&model, &ids);
    assert_eq!((whole.prompt.len(), whole.logprobs.len()), (30, 3));
    assert_eq!(whole.prompt[0], None);
    let found = whole.prompt[1..].iter().flatten().chain(&whole.logprobs);
    for (found, expected) in found.zip(&expected) {
        // Logits of order 10 in f32, summed in another order.
        assert!((f64::from(found.logprob) - expected).abs() < 1e-4, "{found:?} against {expected}");
        assert_eq!(found.top.len(), 2);
    }
    // The answer is greedy: its tokens are the likeliest.
    assert!(whole.logprobs.iter().zip(&whole.ids).all(|(found, id)| found.top[0] == (*id, found.logprob)));
    // Nothing is generated where nothing is asked for.
    let echo = Request { prompt_logprobs: true, ..Request::new(prompt.clone(), 0) };
    let whole = read(served.handle.submit(echo).unwrap()).unwrap();
    assert_eq!((whole.prompt.len(), whole.ids.len(), whole.finished.reason), (30, 0, FinishReason::Length));
    let usage = Usage { prompt_tokens: 30, cached_tokens: 0, completion_tokens: 0 };
    assert_eq!(whole.finished.usage, usage);
    served.close();
}

/// Lets an answer count up.
#[derive(Debug)]
struct CountUp {
    next: u32,
    end: u32,
}

impl Constraint for CountUp {
    fn allowed(&mut self) -> Result<Option<Vec<u32>>, String> {
        let mut bits = vec![0; 128];
        bits[self.next as usize / 32] |= 1 << (self.next % 32);
        Ok(Some(bits))
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        if token != self.next {
            return Err(format!("{token} is not {}", self.next));
        }
        self.next += 1;
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.next == self.end
    }
}

#[test]
fn answers_end_where_they_must() {
    let model = load("tiny-llama", None);
    let served = Served::new(&model, EngineConfig { max_tokens: Some(40), ..EngineConfig::default() });
    let ask = |request| read(served.handle.submit(request).unwrap());
    let free = alone(&model, &[5, 6, 7], 30);
    let first = free.iter().position(|id| *id == free[3]).unwrap();
    let stopped = ask(Request { stop_ids: vec![free[3]].into(), ..Request::new(vec![5, 6, 7], 30) }).unwrap();
    assert_eq!((&stopped.ids[..], stopped.finished.reason), (&free[..=first], FinishReason::Stop));
    let constraint: Box<dyn Constraint> = Box::new(CountUp { next: 20, end: 25 });
    let counted = ask(Request { constraint: Some(constraint), ..Request::new(vec![5], 30) }).unwrap();
    assert_eq!((&counted.ids[..], counted.finished.reason), (&[20, 21, 22, 23, 24][..], FinishReason::Stop));
    let forbidden: Box<dyn Constraint> = Box::new(CountUp { next: 4095, end: 9 });
    let refused = ask(Request {
        constraint: Some(forbidden),
        sampling: Sampling { logit_bias: vec![(4095, f32::NEG_INFINITY)], ..Sampling::default() },
        ..Request::new(vec![5], 30)
    });
    assert!(refused.unwrap_err().contains("forbidden"));
    let long = ask(Request::new(vec![5; 30], 100)).unwrap();
    assert_eq!((long.ids.len(), long.finished.reason), (10, FinishReason::Length));
    served.close();
}

#[test]
fn what_cannot_be_answered_is_refused_at_once() {
    let model = load("tiny-llama", None);
    let config = EngineConfig { max_tokens: Some(40), max_waiting: 2, ..EngineConfig::default() };
    let (engine, handle) = Engine::new(model.clone(), &config).unwrap();
    assert!(matches!(handle.submit(Request::new(vec![], 1)), Err(ServeError::EmptyPrompt)));
    assert!(matches!(handle.submit(Request::new(vec![4096], 1)), Err(ServeError::BeyondVocabulary { .. })));
    let long = handle.submit(Request::new(vec![1; 40], 1));
    assert!(matches!(long, Err(ServeError::TooLong { tokens: 40, max_tokens: 40 })));
    assert!(matches!(handle.adapter("x"), Err(ServeError::UnknownAdapter { .. })));
    // Nothing runs yet: the queue fills.
    let waiting = [1, 2].map(|id| handle.submit(Request::new(vec![id], 1)).unwrap());
    assert!(matches!(handle.submit(Request::new(vec![1], 1)), Err(ServeError::Busy { waiting: 2 })));
    let thread = engine.spawn().unwrap();
    // A closing engine answers what it took.
    handle.close();
    assert!(matches!(handle.submit(Request::new(vec![1], 1)), Err(ServeError::Closed)));
    for answer in waiting {
        assert_eq!(read(answer).unwrap().ids.len(), 1);
    }
    thread.join().unwrap().unwrap();
    let small = EngineConfig { cache: CacheSize::Bytes(100), ..config };
    assert!(matches!(Engine::new(model, &small), Err(ServeError::CacheTooSmall { .. })));
}

/// Folders that would be waited for, and configurations of other weights.
#[test]
fn adapters_that_are_refused() {
    let model = load("tiny-llama", None);
    let served = Served::new(&model, EngineConfig::default());
    let copy = |change: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        for file in ["adapter_config.json", "adapter_model.safetensors"] {
            std::fs::copy(reference("adapters/plain").join(file), dir.path().join(file)).unwrap();
        }
        change(dir.path());
        let result = served.load("a", dir.path());
        if result.is_ok() {
            wait(served.handle.unload_adapter("a")).unwrap();
        }
        result
    };
    let targets = |targets: serde_json::Value| {
        copy(&|dir| {
            let path = dir.join("adapter_config.json");
            let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            config["target_modules"] = targets.clone();
            std::fs::write(&path, config.to_string()).unwrap();
        })
    };
    assert!(copy(&|_| ()).is_ok());
    assert!(matches!(targets(serde_json::json!(["zzz"])), Err(ServeError::NoTargets { .. })));
    assert!(matches!(targets(serde_json::json!("(")), Err(ServeError::Adapter { .. })));
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let result = copy(&|dir| {
            std::fs::remove_file(dir.join(file)).unwrap();
            std::fs::create_dir(dir.join(file)).unwrap();
        });
        assert!(matches!(result, Err(ServeError::NotAFile { .. })), "{file}: {result:?}");
    }
    served.close();
}
