//! The loop that answers: takes requests, plans a pass, runs it, chooses tokens, sends them.

mod choose;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use adapter_io::{Adapter, TargetModules};
use burn::backend::StreamId;
use chat_text::Prompting;
use host_copies::{DeviceError, client_of};
use qlora_models::{CachedRow, Decoder, ModelError, PagedCache, Part, RowLogits};
use rayon::{ThreadPool, ThreadPoolBuilder};
use tokio::sync::oneshot;

use crate::adapters::{AdapterNumber, Adapters, BASE};
use crate::error::ServeError;
use crate::handle::{Command, Handle, Inbox, Limits, ReadAdapter, Reply, line};
use crate::request::{Constraint, Event, FinishReason, Finished, Request, Token, TokenLogprobs, Usage};
use crate::sampling::{Sampler, logprobs};
use crate::scheduler::{BlockPool, Bounds, Scheduler, SequenceId, Slice};
use crate::served::{AdapterInfo, ServedAdapter};

/// How large the paged cache is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheSize {
    /// Room for this many tokens.
    Tokens(usize),
    /// As many tokens as fit into these bytes.
    Bytes(u64),
}

/// How an engine works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Keys and values of past tokens, on the device.
    pub cache: CacheSize,
    /// Tokens of a block of the cache.
    pub block_tokens: usize,
    /// Requests in a batch at most.
    pub max_batch: usize,
    /// Tokens of a forward pass at most; what is left beside the answers goes to prompts.
    pub max_batch_tokens: usize,
    /// Requests that wait at most.
    pub max_waiting: usize,
    /// Tokens of prompt and answer at most; `None` for what model and cache have room for.
    pub max_tokens: Option<usize>,
    /// Adapters at most.
    pub max_adapters: usize,
    /// Adapters on the device at most; the others wait in the host's memory.
    pub max_adapters_on_device: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            cache: CacheSize::Tokens(8192),
            block_tokens: 16,
            max_batch: 64,
            max_batch_tokens: 2048,
            max_waiting: 1024,
            max_tokens: None,
            max_adapters: 64,
            max_adapters_on_device: 16,
        }
    }
}

/// A request in the engine.
#[derive(Debug)]
struct Answering {
    reply: Reply,
    number: AdapterNumber,
    /// Has the adapter stay.
    _kept: Option<ServedAdapter>,
    prompt_len: usize,
    max_tokens: usize,
    stop_ids: Arc<[u32]>,
    logprobs: Option<usize>,
    /// Log probabilities of the prompt's tokens so far, until they are sent.
    prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    constraint: Option<Box<dyn Constraint>>,
    sampler: Sampler,
    generated: usize,
    has_joined: bool,
}

/// Answers requests over one base model.
#[derive(Debug)]
pub struct Engine {
    adapters: Adapters,
    cache: PagedCache,
    scheduler: Scheduler,
    answering: HashMap<SequenceId, Answering>,
    next_id: SequenceId,
    inbox: Inbox,
}

impl Engine {
    /// An engine over a model without an adapter, and the way to ask it.
    ///
    /// # Errors
    /// [`ServeError::CacheTooSmall`].
    pub fn new(mut model: Decoder, config: &EngineConfig) -> Result<(Self, Handle), ServeError> {
        model.hold_narrow_head();
        let block_tokens = config.block_tokens.max(1);
        let mut sequences = config.max_batch.max(1);
        let blocks = match config.cache {
            CacheSize::Tokens(tokens) => tokens.div_ceil(block_tokens).max(2),
            CacheSize::Bytes(budget) => {
                let state_bytes = PagedCache::sequence_bytes(model.config(), model.dtype()) as u64;
                if let Some(most) = (budget / 2).checked_div(state_bytes) {
                    // Not more than half of it for states of linear attention.
                    sequences = sequences.min(most.max(1) as usize);
                }
                let block_bytes = block_tokens * PagedCache::token_bytes(model.config(), model.dtype());
                let left = budget.saturating_sub(sequences as u64 * state_bytes);
                let blocks = (left / block_bytes.max(1) as u64) as usize;
                if blocks < 2 {
                    return Err(ServeError::CacheTooSmall { budget, blocks, block_tokens });
                }
                blocks
            }
        };
        let most = model.config().max_tokens().min(blocks * block_tokens);
        let limits = Limits {
            max_tokens: config.max_tokens.map_or(most, |tokens| tokens.min(most)),
            vocab_size: model.vocab_size(),
            max_waiting: config.max_waiting,
            max_adapters: config.max_adapters,
        };
        let (handle, inbox) = line(limits);
        inbox.counters().blocks.store(blocks, Ordering::Relaxed);
        let bounds = Bounds { sequences, tokens: config.max_batch_tokens.max(1) };
        let mut cache = PagedCache::new(&model, blocks, block_tokens);
        cache.limit_adapters(config.max_adapters_on_device);
        let engine = Self {
            cache,
            adapters: Adapters::new(model, config.max_adapters_on_device),
            scheduler: Scheduler::new(bounds, BlockPool::new(blocks, block_tokens)),
            answering: HashMap::new(),
            next_id: 0,
            inbox,
        };
        Ok((engine, handle))
    }

    /// Serves an adapter that is in memory already.
    ///
    /// # Errors
    /// The name is taken, there are as many adapters as may be, or the adapter does not fit the model.
    pub fn add_adapter(&mut self, name: &str, adapter: Adapter) -> Result<(), ServeError> {
        self.load_adapter(ReadAdapter { name: name.into(), dir: PathBuf::new(), adapter, prompting: None })
    }

    /// Runs the engine on a thread of its own until it is closed.
    ///
    /// # Errors
    /// As [`run`](Self::run), when the thread is joined; `std::io::Error` when it can't be started.
    pub fn spawn(mut self) -> std::io::Result<JoinHandle<Result<(), ServeError>>> {
        // CubeCL gives every thread a stream of its own. The model's weights and the cache were made on this thread's:
        // work on another stream would wait for this one at every launch.
        let stream = StreamId::current();
        std::thread::Builder::new().name("engine".into()).spawn(move || {
            let _pool = self.own_pool();
            stream.executes(|| self.run())
        })
    }

    /// A pool of threads that the current one belongs to, where the model is on the host: a pass has hundreds of small
    /// products, and handing each to another thread takes as long as many of them. `None` elsewhere, or without threads;
    /// then work goes to the pool of the process.
    fn own_pool(&self) -> Option<ThreadPool> {
        let on_host = client_of(self.adapters.base().device()).is_none();
        let builder = ThreadPoolBuilder::new().use_current_thread().thread_name(|i| format!("engine {i}"));
        on_host.then(|| builder.build().ok()).flatten()
    }

    /// Answers until the engine is closed and everything is answered.
    ///
    /// # Errors
    /// The device fails; every request that runs or waits is told.
    pub fn run(&mut self) -> Result<(), ServeError> {
        loop {
            if self.scheduler.is_idle() {
                if self.take_commands() {
                    continue;
                }
                if self.inbox.is_closed() {
                    return Ok(());
                }
                match self.inbox.next() {
                    Some(command) => self.obey(command),
                    None => return Ok(()),
                }
                continue;
            }
            self.step()?;
        }
    }

    /// One pass, if there is anything to do.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub fn step(&mut self) -> Result<(), ServeError> {
        self.take_commands();
        self.drop_cancelled();
        let base = self.adapters.base();
        let plan = self.scheduler.plan(&|len| base.rotation(len));
        if base.config().has_states() {
            let live: HashSet<u32> = self.scheduler.first_blocks().collect();
            self.cache.keep_sequences(|first| live.contains(&first));
        }
        self.inbox.counters().preemptions.fetch_add(plan.preempted as u64, Ordering::Relaxed);
        if !plan.slices.is_empty() {
            if let Err(e) = self.pass(plan.slices) {
                let message = e.to_string();
                let ids: Vec<SequenceId> = self.answering.keys().copied().collect();
                ids.into_iter().for_each(|id| self.fail(id, message.clone()));
                return Err(e.into());
            }
            let counters = self.inbox.counters();
            counters.steps.fetch_add(1, Ordering::Relaxed);
            counters.replays.store(self.cache.replays(), Ordering::Relaxed);
        }
        let counters = self.inbox.counters();
        counters.running.store(self.scheduler.num_running(), Ordering::Relaxed);
        counters.blocks_used.store(self.scheduler.blocks_used(), Ordering::Relaxed);
        Ok(())
    }

    /// Whether there was any.
    fn take_commands(&mut self) -> bool {
        let mut found = false;
        while let Some(command) = self.inbox.try_next() {
            self.obey(command);
            found = true;
        }
        found
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Generate(request, reply) => self.take(request, reply),
            Command::LoadAdapter(name, dir, reply) => self.read_adapter(name, dir, reply),
            Command::AdapterRead(read, reply) => {
                // Nobody may wait for the answer any more; the adapter is loaded all the same.
                reply.send(self.load_adapter(*read)).ok();
            }
            Command::UnloadAdapter(name, reply) => {
                reply.send(self.unload_adapter(&name)).ok();
            }
            Command::DropAdapter(number) => {
                self.adapters.drop_adapter(number);
                self.forget_adapter(number);
            }
            Command::Wake => {}
        }
    }

    fn take(&mut self, request: Request, reply: Reply) {
        let Request { prompt, adapter, max_tokens, sampling, stop_ids, logprobs, prompt_logprobs, constraint } =
            request;
        let number = adapter.as_ref().map_or(BASE, |adapter| adapter.info().number);
        // It is kept by the request, unless another engine gave it.
        if let Some(adapter) = adapter.as_ref().filter(|_| !self.adapters.has(number)) {
            self.count_waiting(-1);
            self.inbox.counters().failed.fetch_add(1, Ordering::Relaxed);
            let name = adapter.info().name.clone();
            reply.send(Event::Failed(ServeError::UnknownAdapter { name }.to_string()));
            return;
        }
        self.next_id += 1;
        let answering = Answering {
            reply,
            number,
            _kept: adapter,
            prompt_len: prompt.len(),
            max_tokens: max_tokens.min(self.inbox.limits().max_tokens - prompt.len()),
            stop_ids,
            logprobs,
            prompt_logprobs: prompt_logprobs.then(|| vec![None]),
            constraint,
            sampler: Sampler::new(sampling, &prompt),
            generated: 0,
            has_joined: false,
        };
        self.answering.insert(self.next_id, answering);
        // States of linear attention are those behind the last token: a shared beginning has none.
        let shares = !prompt_logprobs && !self.adapters.base().config().has_states();
        self.scheduler.add(self.next_id, prompt.to_vec(), number, shares);
    }

    fn count_waiting(&self, change: isize) {
        self.inbox.counters().waiting.fetch_add(change as usize, Ordering::Relaxed);
    }

    /// Reads a folder on another thread, so that answers go on.
    fn read_adapter(&mut self, name: String, dir: PathBuf, reply: oneshot::Sender<Result<(), ServeError>>) {
        let sender = self.inbox.sender();
        let read = move || match read_folder(name, dir) {
            Ok(read) => {
                sender.send(Command::AdapterRead(Box::new(read), reply)).ok();
            }
            Err(error) => {
                reply.send(Err(error)).ok();
            }
        };
        // Without a thread the reply is dropped, which tells who waits.
        if let Err(e) = std::thread::Builder::new().name("adapter".into()).spawn(read) {
            tracing::warn!("no thread to read an adapter with: {e}");
        }
    }

    fn load_adapter(&mut self, read: ReadAdapter) -> Result<(), ServeError> {
        let ReadAdapter { name, dir, adapter, prompting } = read;
        let Limits { max_adapters, .. } = self.inbox.limits();
        if self.adapters.has_name(&name) {
            return Err(ServeError::NameTaken { name });
        }
        if self.adapters.len() >= max_adapters {
            return Err(ServeError::TooManyAdapters { max_adapters });
        }
        let (number, vocab_size) = match self.adapters.insert(&name, adapter) {
            Ok(inserted) => inserted,
            Err(source) => return Err(ServeError::Adapter { dir, source: Box::new(source) }),
        };
        let loaded = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let prompting = prompting.map(Arc::new);
        self.inbox.announce(AdapterInfo { name, number, dir, loaded, vocab_size, prompting });
        Ok(())
    }

    fn unload_adapter(&mut self, name: &str) -> Result<(), ServeError> {
        let number = self.adapters.remove_name(name);
        let number = number.ok_or_else(|| ServeError::UnknownAdapter { name: name.to_string() })?;
        self.forget_adapter(number);
        self.inbox.withdraw(name);
        Ok(())
    }

    /// Forgets what is known for an adapter's further requests.
    fn forget_adapter(&mut self, number: AdapterNumber) {
        self.scheduler.forget_adapter(number);
        self.cache.forget_adapter(number);
    }

    fn drop_cancelled(&mut self) {
        let gone = self.answering.iter().filter(|(_, answering)| answering.reply.is_cancelled());
        let gone: Vec<SequenceId> = gone.map(|(id, _)| *id).collect();
        gone.into_iter().for_each(|id| self.leave(id));
    }

    /// Takes out a request whose reader went away: it has its answer, or wants none.
    fn leave(&mut self, id: SequenceId) {
        let is_finished = self.answering.get(&id).is_some_and(|answering| answering.reply.is_finished());
        self.remove(id, |counters| if is_finished { &counters.finished } else { &counters.cancelled });
    }

    /// Takes a request out and counts how it ended.
    fn remove(
        &mut self,
        id: SequenceId,
        counter: impl Fn(&crate::handle::Counters) -> &AtomicU64,
    ) -> Option<(Reply, Usage)> {
        let answering = self.answering.remove(&id)?;
        let usage = Usage {
            prompt_tokens: answering.prompt_len,
            cached_tokens: self.scheduler.cached(id),
            completion_tokens: answering.generated,
        };
        self.scheduler.remove(id);
        if !answering.has_joined {
            self.count_waiting(-1);
        }
        counter(self.inbox.counters()).fetch_add(1, Ordering::Relaxed);
        Some((answering.reply, usage))
    }

    fn fail(&mut self, id: SequenceId, message: String) {
        if let Some((reply, _)) = self.remove(id, |counters| &counters.failed) {
            reply.send(Event::Failed(message));
        }
    }

    fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        if let Some((reply, usage)) = self.remove(id, |counters| &counters.finished) {
            reply.send(Event::Finished(Finished { reason, usage }));
        }
    }

    /// Runs the slices of a plan.
    fn pass(&mut self, slices: Vec<Slice>) -> Result<(), DeviceError> {
        let mut by_adapter: BTreeMap<AdapterNumber, Vec<Slice>> = BTreeMap::new();
        for slice in slices {
            if let Some(answering) = self.answering.get_mut(&slice.id) {
                let joined = !std::mem::replace(&mut answering.has_joined, true);
                by_adapter.entry(answering.number).or_default().push(slice.clone());
                if joined {
                    self.joined(&slice);
                }
            }
        }
        let numbers: Vec<AdapterNumber> = by_adapter.keys().copied().collect();
        self.adapters.bring(&numbers).map_err(device_error)?;
        let is_noted =
            |slice: &Slice| self.answering.get(&slice.id).is_some_and(|answering| answering.prompt_logprobs.is_some());
        let parts = by_adapter.iter().map(|(number, slices)| Part {
            model: self.adapters.model(*number),
            rows: slices.iter().map(|slice| row(&self.scheduler, slice, is_noted(slice))).collect(),
        });
        let parts: Vec<Part<'_>> = parts.collect();
        let wanted: Vec<RowLogits> = parts.iter().flat_map(|part| &part.rows).map(|row| row.logits).collect();
        let parts: Vec<(u64, Part<'_>)> = numbers.iter().copied().zip(parts).collect();
        let step = Decoder::decode(&parts, &mut self.cache)?;
        let slices: Vec<Slice> = by_adapter.into_values().flatten().collect();
        for slice in &slices {
            self.scheduler.computed(slice);
        }
        match step {
            Some(step) => self.choose(&slices, &wanted, step),
            None => Ok(()),
        }
    }

    fn joined(&self, slice: &Slice) {
        let counters = self.inbox.counters();
        self.count_waiting(-1);
        let cached = self.scheduler.cached(slice.id);
        let prompt = self.scheduler.tokens(slice.id).len();
        counters.cached_tokens.fetch_add(cached as u64, Ordering::Relaxed);
        counters.prompt_tokens.fetch_add((prompt - cached) as u64, Ordering::Relaxed);
        if let Some(answering) = self.answering.get(&slice.id) {
            answering.reply.send(Event::Started { cached_tokens: cached });
        }
    }

    /// Takes log probabilities of a prompt's tokens from the logits before them; sends them when they are complete.
    fn note_prompt(&mut self, slice: &Slice, rows: &[&mut [f32]]) {
        let tokens = self.scheduler.tokens(slice.id);
        let Some(answering) = self.answering.get_mut(&slice.id) else { return };
        let Some(notes) = &mut answering.prompt_logprobs else { return };
        for (position, row) in (slice.past..).zip(rows) {
            // After a preemption, positions come a second time.
            if position + 1 == notes.len() && position + 1 < answering.prompt_len {
                notes.push(Some(logprobs(row, tokens[position + 1], answering.logprobs.unwrap_or(0))));
            }
        }
        if notes.len() == answering.prompt_len {
            answering.reply.send(Event::Prompt(answering.prompt_logprobs.take().unwrap_or_default()));
        }
    }

    /// Appends a token to an answer, and ends the answer where it ends.
    fn push(&mut self, id: SequenceId, token: u32, logprobs: Option<TokenLogprobs>) {
        let Some(answering) = self.answering.get_mut(&id) else { return };
        if answering.generated == answering.max_tokens {
            return self.finish(id, FinishReason::Length);
        }
        answering.generated += 1;
        self.inbox.counters().generated_tokens.fetch_add(1, Ordering::Relaxed);
        let is_heard = answering.reply.send(Event::Token(Token { id: token, logprobs }));
        let stops = answering.stop_ids.contains(&token);
        let is_complete = match &mut answering.constraint {
            Some(_) if stops => true,
            Some(constraint) => match constraint.accept(token) {
                Ok(()) => constraint.is_complete(),
                Err(message) => return self.fail(id, message),
            },
            None => false,
        };
        let is_long = answering.generated == answering.max_tokens;
        self.scheduler.push(id, token);
        match (is_heard, stops || is_complete, is_long) {
            (false, ..) => self.leave(id),
            (true, true, _) => self.finish(id, FinishReason::Stop),
            (true, false, true) => self.finish(id, FinishReason::Length),
            (true, false, false) => {}
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Before its answers break off.
        self.inbox.note_end();
        let counters = self.inbox.counters();
        for gauge in [&counters.waiting, &counters.running, &counters.blocks_used] {
            AtomicUsize::store(gauge, 0, Ordering::Relaxed);
        }
    }
}

/// Reads an adapter's folder.
fn read_folder(name: String, dir: PathBuf) -> Result<ReadAdapter, ServeError> {
    let prompting = match Prompting::of_adapter(&dir) {
        Ok(prompting) => prompting,
        Err(error) => return Err(ServeError::Prompting { dir, source: Box::new(error) }),
    };
    // A pipe, say, would be waited for without an end.
    for file in ["adapter_config.json", "adapter_model.safetensors"].map(|name| dir.join(name)) {
        if file.metadata().is_ok_and(|meta| !meta.is_file()) {
            return Err(ServeError::NotAFile { file });
        }
    }
    let read = Adapter::load(&dir).and_then(|adapter| {
        // Patterns that are none show; what they match is not looked for.
        adapter.missing_modules(&[]).map(|_| adapter)
    });
    let adapter = match read {
        Ok(adapter) => adapter,
        Err(error) => return Err(ServeError::Adapter { dir, source: Box::new(error.into()) }),
    };
    let missing = adapter.missing_targets();
    if let (TargetModules::List(names), false) =
        (adapter.config.target_modules_or_default(), adapter.modules().is_empty())
        && !names.is_empty()
        && names.iter().all(|name| missing.contains(name))
    {
        return Err(ServeError::NoTargets { dir, names: names.join(", ") });
    }
    if !missing.is_empty() {
        tracing::warn!(
            name,
            missing = missing.join(", "),
            "an adapter has no weights for modules that its configuration names: they stay the base's"
        );
    }
    Ok(ReadAdapter { name, dir, adapter, prompting })
}

/// A slice as the model takes it.
fn row<'a>(scheduler: &'a Scheduler, slice: &Slice, is_noted: bool) -> CachedRow<'a> {
    CachedRow {
        ids: &scheduler.tokens(slice.id)[slice.past..slice.past + slice.new],
        past: slice.past,
        rotated_for: slice.rotated_for,
        blocks: scheduler.blocks(slice.id),
        logits: match (is_noted, slice.is_last) {
            (true, _) => RowLogits::All,
            (false, true) => RowLogits::Last,
            (false, false) => RowLogits::None,
        },
    }
}

/// An adapter that was on the model before fails to come back for want of memory, or because the device is gone.
fn device_error(error: ModelError) -> DeviceError {
    match error {
        ModelError::Device(error) => error,
        other => DeviceError::Failed(other.to_string()),
    }
}
