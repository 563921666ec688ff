//! A request on its way: the engine's answers to it, merged as they come, and read as text.
//!
//! A request with many answers takes its places in the queue as they become free, and leaves some to others. It is
//! refused only if there is none for its first.
//!
//! Nothing runs ahead of the client: the engine's events are read when the connection takes more, and an answer has at
//! most as many as tokens were asked for. Dropping a session cancels what still runs.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::Instant;

use super::HttpState;
use super::error::ApiError;
use super::metrics::RequestTimes;
use crate::error::ServeError;
use crate::handle::{Answer, Handle, Offered};
use crate::request::{Event, FinishReason, Request, TokenLogprobs};
use crate::text::{Delta, Output, OutputOptions};

/// Requests to the engine and how their answers are read.
#[derive(Debug)]
pub(super) struct Job {
    /// One for each choice; choices of the same prompt lie together.
    pub requests: Vec<Request>,
    /// Choices of each prompt.
    pub n: usize,
    /// How answers are read; one for each prompt.
    pub outputs: Vec<OutputOptions>,
    /// Whether the token that ended an answer is among its tokens.
    pub keep_stop_token: bool,
}

/// A token of an answer, with where its text begins.
#[derive(Clone, Debug)]
pub(super) struct TokenAt {
    pub id: u32,
    /// In bytes of the answer's text.
    start: usize,
    /// In characters.
    pub chars: usize,
    pub logprobs: TokenLogprobs,
}

/// What became of a choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Finish {
    Stop,
    Length,
    ToolCalls,
}

impl Finish {
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::ToolCalls => "tool_calls",
        }
    }
}

/// What is new of one choice.
#[derive(Debug, Default)]
pub(super) struct Update {
    pub choice: usize,
    /// Log probabilities of the prompt.
    pub prompt: Option<Vec<Option<TokenLogprobs>>>,
    pub deltas: Vec<Delta>,
    /// The tokens that the text came from, where log probabilities were asked for.
    pub tokens: Vec<TokenAt>,
    pub finish: Option<Finish>,
}

/// How far a choice is.
#[derive(Debug)]
enum Stage {
    /// There was no place in the queue yet.
    Waiting(Box<Request>),
    Running(Answer),
    Over,
}

#[derive(Debug)]
struct Choice {
    stage: Stage,
    output: Output,
    stop_ids: Arc<[u32]>,
    pending: VecDeque<TokenAt>,
    completion_tokens: usize,
    cached_tokens: usize,
    times: RequestTimes,
}

/// How often to look whether the queue has places again.
const RETRY: Duration = Duration::from_millis(10);

/// The places of a queue that a request with many answers leaves to others.
fn left(places: usize) -> usize {
    (places / 4).max(1).min(places)
}

/// The answers to one request.
#[derive(Debug)]
pub(super) struct Session {
    handle: Handle,
    choices: Vec<Choice>,
    /// The first choice that waits for a place; those before it have had theirs.
    waiting: usize,
    n: usize,
    prompt_tokens: usize,
    keep_stop_token: bool,
    /// The choice that is looked at first.
    next: usize,
    deadline: Instant,
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub prompt: usize,
    pub cached: usize,
    pub completion: usize,
}

/// What a session was woken by.
#[derive(Debug)]
enum Polled {
    /// An event of this choice; `None` where it broke off.
    Event(usize, Option<Event>),
    /// The queue may have places.
    Places,
    /// All choices are over.
    Over,
}

impl Session {
    /// Sends the requests to the engine, as far as the queue has places.
    ///
    /// # Errors
    /// One of the requests can't be answered as it is, or the queue has no place at all: then none of them runs.
    pub fn start(state: &HttpState, job: Job) -> Result<Self, ApiError> {
        for request in &job.requests {
            state.handle().check(request)?;
        }
        let prompt_tokens = job.requests.iter().step_by(job.n).map(|request| request.prompt.len()).sum();
        let choices = job.requests.into_iter().enumerate().map(|(index, request)| Choice {
            output: Output::new(state.tokenizer(), &request.prompt, &job.outputs[index / job.n]),
            stop_ids: request.stop_ids.clone(),
            stage: Stage::Waiting(Box::new(request)),
            pending: VecDeque::new(),
            completion_tokens: 0,
            cached_tokens: 0,
            times: RequestTimes::new(Arc::clone(state.metrics())),
        });
        let mut session = Self {
            handle: state.handle().clone(),
            choices: choices.collect(),
            waiting: 0,
            n: job.n,
            prompt_tokens,
            keep_stop_token: job.keep_stop_token,
            next: 0,
            deadline: Instant::now() + state.config().request_timeout,
        };
        session.submit()?;
        match session.waiting {
            0 => Err(ServeError::Busy { waiting: state.handle().limits().max_waiting }.into()),
            _ => Ok(session),
        }
    }

    /// Sends what waits for a place, until there is none. A part of the queue is left to other requests, unless nothing
    /// of this one runs.
    fn submit(&mut self) -> Result<(), ServeError> {
        let all = self.handle.limits().max_waiting;
        let mut runs = self.choices.iter().any(|choice| matches!(choice.stage, Stage::Running(_)));
        while let Some(choice) = self.choices.get_mut(self.waiting) {
            match std::mem::replace(&mut choice.stage, Stage::Over) {
                Stage::Waiting(request) => {
                    match self.handle.offer(*request, if runs { all - left(all) } else { all })? {
                        Offered::Taken(answer) => choice.stage = Stage::Running(answer),
                        Offered::Full(request) => {
                            choice.stage = Stage::Waiting(Box::new(request));
                            return Ok(());
                        }
                    }
                }
                stage => choice.stage = stage,
            }
            self.waiting += 1;
            runs = true;
        }
        Ok(())
    }

    /// What is new; `None` when all is said.
    pub async fn next(&mut self) -> Option<Result<Update, ApiError>> {
        let mut late = pin!(tokio::time::sleep_until(self.deadline));
        loop {
            let mut places = pin!(self.wait_for_places());
            let event = poll_fn(|context| match self.poll(context) {
                Poll::Pending if late.as_mut().poll(context).is_ready() => Poll::Ready(Err(ApiError::timeout())),
                Poll::Pending => places.as_mut().poll(context).map(|()| Ok(Polled::Places)),
                event => event.map(Ok),
            });
            let update = match event.await {
                Err(error) => Err(error),
                Ok(Polled::Over) => return None,
                Ok(Polled::Places) => self.submit().map(|()| None).map_err(ApiError::from),
                Ok(Polled::Event(choice, event)) => self.take(choice, event),
            };
            match update {
                Ok(None) => {}
                Ok(Some(update)) => return Some(Ok(update)),
                Err(error) => {
                    self.choices.clear();
                    return Some(Err(error));
                }
            }
        }
    }

    /// Tokens so far.
    pub fn usage(&self) -> Usage {
        Usage {
            prompt: self.prompt_tokens,
            cached: self.choices.iter().step_by(self.n).map(|choice| choice.cached_tokens).sum(),
            completion: self.choices.iter().map(|choice| choice.completion_tokens).sum(),
        }
    }

    /// Ready when places may have become free; never where none is waited for.
    fn wait_for_places(&self) -> impl Future<Output = ()> + 'static {
        let waits = self.waiting < self.choices.len();
        async move {
            match waits {
                true => tokio::time::sleep(RETRY).await,
                false => std::future::pending().await,
            }
        }
    }

    /// The next event of any choice, in turn.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Polled> {
        let count = self.choices.len();
        let mut over = true;
        for step in 0..count {
            let index = (self.next + step) % count;
            match &mut self.choices[index].stage {
                Stage::Over => {}
                Stage::Waiting(_) => over = false,
                Stage::Running(answer) => {
                    over = false;
                    if let Poll::Ready(event) = answer.poll_next(context) {
                        self.next = (index + 1) % count;
                        return Poll::Ready(Polled::Event(index, event));
                    }
                }
            }
        }
        if over { Poll::Ready(Polled::Over) } else { Poll::Pending }
    }

    /// Reads an event; `None` where nothing comes of it yet.
    fn take(&mut self, index: usize, event: Option<Event>) -> Result<Option<Update>, ApiError> {
        let failed = |error| ApiError::internal(super::error::chain(&error));
        let choice = &mut self.choices[index];
        let mut update = Update { choice: index, ..Update::default() };
        match event {
            None => {
                choice.stage = Stage::Over;
                return Err(self.handle.refusal().into());
            }
            Some(Event::Failed(message)) => {
                choice.stage = Stage::Over;
                return Err(ApiError::internal(message));
            }
            Some(Event::Started { cached_tokens }) => choice.cached_tokens = cached_tokens,
            Some(Event::Prompt(logprobs)) => update.prompt = Some(logprobs),
            Some(Event::Token(token)) => {
                choice.completion_tokens += 1;
                choice.times.token();
                let is_stop = choice.stop_ids.contains(&token.id);
                let (start, chars) = (choice.output.decoded(), choice.output.decoded_chars());
                if !is_stop || self.keep_stop_token {
                    let at = token.logprobs.map(|logprobs| TokenAt { id: token.id, start, chars, logprobs });
                    choice.pending.extend(at);
                }
                if !is_stop {
                    update.deltas = choice.output.push(token.id).map_err(failed)?;
                    if choice.output.stopped() {
                        choice.end(&mut update, None).map_err(failed)?;
                    }
                }
            }
            Some(Event::Finished(finished)) => {
                choice.end(&mut update, Some(finished.reason)).map_err(failed)?;
            }
        }
        if update.finish.is_none() {
            update.tokens = choice.tokens();
        }
        let nothing = update.deltas.is_empty() && update.tokens.is_empty();
        Ok(if nothing && update.prompt.is_none() && update.finish.is_none() { None } else { Some(update) })
    }
}

impl Choice {
    /// Tokens the text of which is out.
    fn tokens(&mut self) -> Vec<TokenAt> {
        let passed = self.output.passed();
        let out = self.pending.iter().take_while(|token| token.start < passed).count();
        self.pending.drain(..out).collect()
    }

    /// Ends the answer: at the engine's end, or at a text that ends it, where the engine is told that it is enough.
    fn end(&mut self, update: &mut Update, reason: Option<FinishReason>) -> Result<(), chat_text::ChatError> {
        if let Stage::Running(mut answer) = std::mem::replace(&mut self.stage, Stage::Over) {
            answer.finish();
        }
        self.times.finish();
        update.deltas.extend(self.output.finish()?);
        let stopped = self.output.stopped();
        update.finish = Some(match reason {
            Some(FinishReason::Length) if !stopped => Finish::Length,
            _ if self.output.calls() > 0 => Finish::ToolCalls,
            _ => Finish::Stop,
        });
        // Tokens of a stop string are no part of the answer.
        update.tokens = if stopped { self.tokens() } else { self.pending.drain(..).collect() };
        self.pending.clear();
        Ok(())
    }
}
