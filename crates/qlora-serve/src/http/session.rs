//! A request on its way: the engine's answers to it, merged as they come, and read as text.
//!
//! Nothing runs ahead of the client: the engine's events are read when the connection takes more, and an answer has at
//! most as many as tokens were asked for. Dropping a session cancels what still runs.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::time::Instant;

use super::HttpState;
use super::error::ApiError;
use super::metrics::RequestTimes;
use crate::handle::Answer;
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

#[derive(Debug)]
struct Choice {
    /// `None` when it is over.
    answer: Option<Answer>,
    output: Output,
    stop_ids: Vec<u32>,
    pending: VecDeque<TokenAt>,
    completion_tokens: usize,
    cached_tokens: usize,
    times: RequestTimes,
}

/// The answers to one request.
#[derive(Debug)]
pub(super) struct Session {
    choices: Vec<Choice>,
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

impl Session {
    /// Sends the requests to the engine.
    ///
    /// # Errors
    /// The engine takes one of them not: then none of them runs.
    pub fn start(state: &HttpState, job: Job) -> Result<Self, ApiError> {
        let most = state.handle().limits().max_waiting;
        if job.requests.len() > most {
            let param = if job.n > most { "n" } else { "prompt" };
            let message = format!("{param}: {} answers at once; the queue holds {most}", job.requests.len());
            return Err(ApiError::field(param, message));
        }
        let prompt_tokens = job.requests.iter().step_by(job.n).map(|request| request.prompt.len()).sum();
        let mut choices = Vec::with_capacity(job.requests.len());
        for (index, request) in job.requests.into_iter().enumerate() {
            let options = &job.outputs[index / job.n];
            let output = Output::new(state.tokenizer(), &request.prompt, options);
            let stop_ids = request.stop_ids.clone();
            choices.push(Choice {
                answer: Some(state.handle().submit(request)?),
                output,
                stop_ids,
                pending: VecDeque::new(),
                completion_tokens: 0,
                cached_tokens: 0,
                times: RequestTimes::new(Arc::clone(state.metrics())),
            });
        }
        let deadline = Instant::now() + state.config().request_timeout;
        let Job { n, keep_stop_token, .. } = job;
        Ok(Self { choices, n, prompt_tokens, keep_stop_token, next: 0, deadline })
    }

    /// What is new; `None` when all is said.
    pub async fn next(&mut self) -> Option<Result<Update, ApiError>> {
        let mut late = pin!(tokio::time::sleep_until(self.deadline));
        loop {
            let event = poll_fn(|context| match self.poll(context) {
                Poll::Pending if late.as_mut().poll(context).is_ready() => Poll::Ready(Err(ApiError::timeout())),
                event => event.map(Ok),
            });
            let update = match event.await {
                Err(error) => Err(error),
                Ok(None) => return None,
                Ok(Some((choice, event))) => self.take(choice, event),
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

    /// The next event of any choice, in turn. `Ready(None)` when all are over; an event of `None` is an answer that
    /// broke off.
    #[allow(clippy::type_complexity)]
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, Option<Event>)>> {
        let count = self.choices.len();
        let mut over = true;
        for step in 0..count {
            let index = (self.next + step) % count;
            let Some(answer) = &mut self.choices[index].answer else { continue };
            over = false;
            if let Poll::Ready(event) = answer.poll_next(context) {
                self.next = (index + 1) % count;
                return Poll::Ready(Some((index, event)));
            }
        }
        if over { Poll::Ready(None) } else { Poll::Pending }
    }

    /// Reads an event; `None` where nothing comes of it yet.
    fn take(&mut self, index: usize, event: Option<Event>) -> Result<Option<Update>, ApiError> {
        let failed = |error| ApiError::internal(super::error::chain(&error));
        let choice = &mut self.choices[index];
        let mut update = Update { choice: index, ..Update::default() };
        match event {
            None => {
                choice.answer = None;
                return Err(ApiError::closed());
            }
            Some(Event::Failed(message)) => {
                choice.answer = None;
                return Err(ApiError::internal(message));
            }
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
                choice.cached_tokens = finished.usage.cached_tokens;
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

    /// Ends the answer: at the engine's end, or at a text that ends it. The engine's answer is dropped, which cancels
    /// what it has not done.
    fn end(&mut self, update: &mut Update, reason: Option<FinishReason>) -> Result<(), chat_text::ChatError> {
        self.answer = None;
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
