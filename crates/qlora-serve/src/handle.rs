//! The two ends of the line to an engine: [`Handle`] for those who ask, [`Inbox`] for the engine.
//!
//! An engine runs on a thread of its own; any number of handles reach it. What a handle can refuse by itself (a prompt
//! that is too long, a full queue) never reaches the engine.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::task::{Context, Poll};

use adapter_io::Adapter;
use chat_text::Prompting;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{oneshot, watch};

use crate::error::ServeError;
use crate::request::{Event, Request};
use crate::served::{AdapterInfo, ServedAdapter};

/// What an engine can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of prompt and answer at most.
    pub max_tokens: usize,
    /// Ids below this have an embedding.
    pub vocab_size: usize,
    /// Requests that wait at most.
    pub max_waiting: usize,
    /// Adapters at most.
    pub max_adapters: usize,
}

/// What an engine has done and is doing.
#[derive(Debug, Default)]
pub struct Counters {
    /// Requests that wait to be run, the ones on their way to the engine among them.
    pub waiting: AtomicUsize,
    /// Requests in the running batch.
    pub running: AtomicUsize,
    /// Requests that were taken.
    pub requests: AtomicU64,
    /// Requests that ended with an answer, those whose reader had enough of it among them.
    pub finished: AtomicU64,
    /// Requests whose reader went away.
    pub cancelled: AtomicU64,
    /// Requests that failed.
    pub failed: AtomicU64,
    /// Tokens of prompts that were computed.
    pub prompt_tokens: AtomicU64,
    /// Tokens of prompts that were taken from other requests' prefixes.
    pub cached_tokens: AtomicU64,
    /// New tokens.
    pub generated_tokens: AtomicU64,
    /// Times that a request gave its cache back and was computed again.
    pub preemptions: AtomicU64,
    /// Forward passes.
    pub steps: AtomicU64,
    /// Of these, replayed from a recording.
    pub replays: AtomicU64,
    /// Blocks of the cache that requests hold.
    pub blocks_used: AtomicUsize,
    /// Blocks of the cache.
    pub blocks: AtomicUsize,
}

#[derive(Debug)]
struct Shared {
    limits: Limits,
    counters: Counters,
    closed: AtomicBool,
    /// Whether the engine ended without having been asked to close, or by a panic.
    failed: AtomicBool,
    ended: watch::Sender<bool>,
    adapters: Mutex<HashMap<String, ServedAdapter>>,
}

impl Shared {
    fn adapters(&self) -> std::sync::MutexGuard<'_, HashMap<String, ServedAdapter>> {
        self.adapters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why nothing more is taken.
    fn refusal(&self) -> ServeError {
        let was_asked = self.closed.load(Ordering::Acquire) && !self.failed.load(Ordering::Acquire);
        if was_asked { ServeError::Closed } else { ServeError::EngineFailed }
    }
}

/// An adapter as its folder has it.
#[derive(Debug)]
pub struct ReadAdapter {
    /// The name that requests are to use.
    pub name: String,
    /// The folder.
    pub dir: PathBuf,
    /// What lies in it.
    pub adapter: Adapter,
    /// How it is prompted; `None` where nothing lies beside it.
    pub prompting: Option<Prompting>,
}

/// What a handle sends.
#[derive(Debug)]
pub enum Command {
    /// Answer this, to that reader.
    Generate(Request, Reply),
    /// Read an adapter's folder and serve it under a name.
    LoadAdapter(String, PathBuf, oneshot::Sender<Result<(), ServeError>>),
    /// An adapter's folder was read.
    AdapterRead(Box<ReadAdapter>, oneshot::Sender<Result<(), ServeError>>),
    /// Forget an adapter; requests that use it finish.
    UnloadAdapter(String, oneshot::Sender<Result<(), ServeError>>),
    /// The adapter of this number has no name and no user any more.
    DropAdapter(u64),
    /// Look at what else has changed: the engine was asked to close.
    Wake,
}

/// Where a request's events go.
#[derive(Debug)]
pub struct Reply {
    events: UnboundedSender<Event>,
    has_enough: Arc<AtomicBool>,
}

impl Reply {
    /// Sends an event; `false` when the reader went away.
    pub fn send(&self, event: Event) -> bool {
        self.events.send(event).is_ok()
    }

    /// Whether the reader went away: with its answer, or without.
    pub fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Whether the reader went away because it has its answer.
    pub fn is_finished(&self) -> bool {
        self.has_enough.load(Ordering::Acquire)
    }
}

/// The events of one request. Dropping it cancels the request.
#[derive(Debug)]
pub struct Answer {
    events: UnboundedReceiver<Event>,
    has_enough: Arc<AtomicBool>,
}

impl Answer {
    /// The next event; `None` behind the last one.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// [`next`](Self::next) for those who wait for several answers at once.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.events.poll_recv(context)
    }

    /// The next event, if it has come.
    pub fn try_next(&mut self) -> Option<Event> {
        self.events.try_recv().ok()
    }

    /// [`next`](Self::next) for threads outside an asynchronous runtime.
    pub fn next_blocking(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }

    /// Ends the request where the reader finds that its answer is whole, at a text for instance. The engine counts it as
    /// finished, not as cancelled.
    pub fn finish(&mut self) {
        // Before the engine can find the line closed.
        self.has_enough.store(true, Ordering::Release);
        self.events.close();
    }
}

/// What became of a request that was offered.
#[derive(Debug)]
pub(crate) enum Offered {
    Taken(Answer),
    /// As many wait as may.
    Full(Request),
}

/// Asks an engine. Clones reach the same engine; it closes when the last one is gone.
#[derive(Clone, Debug)]
pub struct Handle(Arc<Line>);

#[derive(Debug)]
struct Line {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
}

impl Line {
    fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        // An engine that is gone needs no waking.
        self.commands.send(Command::Wake).ok();
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.close();
    }
}

/// The engine's end of the line.
#[derive(Debug)]
pub struct Inbox {
    commands: mpsc::Receiver<Command>,
    /// For what the engine has done on other threads.
    sender: mpsc::Sender<Command>,
    shared: Arc<Shared>,
}

/// A line to an engine with these limits.
pub fn line(limits: Limits) -> (Handle, Inbox) {
    let (sender, receiver) = mpsc::channel();
    let shared = Arc::new(Shared {
        limits,
        counters: Counters::default(),
        closed: AtomicBool::new(false),
        failed: AtomicBool::new(false),
        ended: watch::Sender::new(false),
        adapters: Mutex::default(),
    });
    let line = Line { commands: sender.clone(), shared: shared.clone() };
    (Handle(Arc::new(line)), Inbox { commands: receiver, sender, shared })
}

impl Handle {
    /// Asks for an answer.
    ///
    /// # Errors
    /// The request can't be answered as it is, the queue is full ([`ServeError::Busy`]), or the engine is closing.
    pub fn submit(&self, request: Request) -> Result<Answer, ServeError> {
        self.check(&request)?;
        match self.offer(request, self.0.shared.limits.max_waiting)? {
            Offered::Taken(answer) => Ok(answer),
            Offered::Full(_) => Err(ServeError::Busy { waiting: self.0.shared.limits.max_waiting }),
        }
    }

    /// Whether a request can be answered as it is.
    ///
    /// # Errors
    /// As [`submit`](Self::submit), a full queue aside.
    pub(crate) fn check(&self, request: &Request) -> Result<(), ServeError> {
        let shared = &*self.0.shared;
        let limits = &shared.limits;
        if self.is_closed() {
            return Err(shared.refusal());
        }
        if request.prompt.is_empty() {
            return Err(ServeError::EmptyPrompt);
        }
        let vocab_size = request.adapter.as_ref().map_or(limits.vocab_size, |adapter| adapter.info().vocab_size);
        if let Some(&token) = request.prompt.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(ServeError::BeyondVocabulary { token, vocab_size });
        }
        let tokens = request.prompt.len();
        if tokens >= limits.max_tokens {
            return Err(ServeError::TooLong { tokens, max_tokens: limits.max_tokens });
        }
        Ok(())
    }

    /// Asks for an answer to a request that was [checked](Self::check), if fewer than `most` wait.
    ///
    /// # Errors
    /// The engine is closing.
    pub(crate) fn offer(&self, request: Request, most: usize) -> Result<Offered, ServeError> {
        let Line { commands, shared } = &*self.0;
        let counters = &shared.counters;
        if self.is_closed() {
            return Err(shared.refusal());
        }
        let waiting = counters
            .waiting
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |waiting| (waiting < most).then_some(waiting + 1));
        if waiting.is_err() {
            return Ok(Offered::Full(request));
        }
        let (sender, events) = unbounded_channel();
        let has_enough = Arc::new(AtomicBool::new(false));
        let reply = Reply { events: sender, has_enough: has_enough.clone() };
        if commands.send(Command::Generate(request, reply)).is_err() {
            counters.waiting.fetch_sub(1, Ordering::AcqRel);
            return Err(shared.refusal());
        }
        counters.requests.fetch_add(1, Ordering::Relaxed);
        Ok(Offered::Taken(Answer { events, has_enough }))
    }

    /// Has the engine read an adapter's folder and serve it as `name`.
    ///
    /// # Errors
    /// The name is taken, there are as many adapters as may be, the folder can't be read or does not fit the model, or
    /// the engine is closing.
    pub async fn load_adapter(&self, name: impl Into<String>, dir: impl Into<PathBuf>) -> Result<(), ServeError> {
        let (sender, receiver) = oneshot::channel();
        self.command(Command::LoadAdapter(name.into(), dir.into(), sender))?;
        receiver.await.unwrap_or(Err(ServeError::Closed))
    }

    /// The adapter that has this name now, to be asked.
    ///
    /// # Errors
    /// [`ServeError::UnknownAdapter`].
    pub fn adapter(&self, name: &str) -> Result<ServedAdapter, ServeError> {
        let adapter = self.0.shared.adapters().get(name).cloned();
        adapter.ok_or_else(|| ServeError::UnknownAdapter { name: name.into() })
    }

    /// Has the engine forget an adapter's name. Requests that use it finish, those that wait among them; new ones are
    /// refused.
    ///
    /// # Errors
    /// There is none of this name, or the engine is closing.
    pub async fn unload_adapter(&self, name: impl Into<String>) -> Result<(), ServeError> {
        let (sender, receiver) = oneshot::channel();
        self.command(Command::UnloadAdapter(name.into(), sender))?;
        receiver.await.unwrap_or(Err(ServeError::Closed))
    }

    fn command(&self, command: Command) -> Result<(), ServeError> {
        match self.is_closed() {
            true => Err(self.refusal()),
            false => self.0.commands.send(command).map_err(|_| self.refusal()),
        }
    }

    /// The adapters that can be asked, by name.
    pub fn adapters(&self) -> Vec<AdapterInfo> {
        let mut adapters: Vec<AdapterInfo> =
            self.0.shared.adapters().values().map(|adapter| adapter.info().clone()).collect();
        adapters.sort_by(|a, b| a.name.cmp(&b.name));
        adapters
    }

    /// What the engine can take.
    pub fn limits(&self) -> Limits {
        self.0.shared.limits
    }

    /// What the engine has done and is doing.
    pub fn counters(&self) -> &Counters {
        &self.0.shared.counters
    }

    /// Has the engine take nothing more and end when everything that it took is answered.
    pub fn close(&self) {
        self.0.close();
    }

    /// Whether the engine was asked to close, or is gone.
    pub fn is_closed(&self) -> bool {
        self.0.shared.closed.load(Ordering::Acquire)
    }

    /// Why a [closed](Self::is_closed) engine takes nothing: [`ServeError::Closed`] or [`ServeError::EngineFailed`].
    pub fn refusal(&self) -> ServeError {
        self.0.shared.refusal()
    }

    /// Waits until the engine is gone; whether it failed.
    pub async fn ended(&self) -> bool {
        // The sender lives as long as this does.
        self.0.shared.ended.subscribe().wait_for(|ended| *ended).await.ok();
        self.0.shared.failed.load(Ordering::Acquire)
    }
}

impl Inbox {
    /// The next command, if there is one.
    pub fn try_next(&self) -> Option<Command> {
        self.commands.try_recv().ok()
    }

    /// Waits for the next command. The last one is [`Command::Wake`], when the engine is to close.
    pub fn next(&self) -> Option<Command> {
        self.commands.recv().ok()
    }

    /// Where another thread of the engine sends its results.
    pub fn sender(&self) -> mpsc::Sender<Command> {
        self.sender.clone()
    }

    /// Whether the engine was asked to close.
    pub fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    /// What the engine can take.
    pub fn limits(&self) -> Limits {
        self.shared.limits
    }

    /// Where the engine counts.
    pub fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Makes an adapter known to handles.
    pub fn announce(&self, adapter: AdapterInfo) {
        let served = ServedAdapter::new(adapter, self.sender());
        self.shared.adapters().insert(served.info().name.clone(), served);
    }

    /// Makes an adapter's name unknown to handles. [`Command::DropAdapter`] follows when its last user has gone.
    pub fn withdraw(&self, name: &str) {
        self.shared.adapters().remove(name);
    }

    /// Notes that nothing more is answered; that the engine failed, if it was not asked to close. Readers of answers
    /// that break off behind this are told so.
    pub(crate) fn note_end(&self) {
        if !self.is_closed() || std::thread::panicking() {
            self.shared.failed.store(true, Ordering::Release);
        }
        self.shared.closed.store(true, Ordering::Release);
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        // An engine has noted it already.
        if !self.is_closed() || std::thread::panicking() {
            self.note_end();
        }
        self.shared.ended.send_replace(true);
    }
}
