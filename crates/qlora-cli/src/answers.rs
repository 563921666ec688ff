//! An engine in this program, and answers as text.

use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};
use burn_qlora::qlora_serve::text::{Delta, Output, OutputOptions, Prompt};
use burn_qlora::qlora_serve::{
    Answer, Engine, EngineConfig, Event, FinishReason, Finished, Handle, Request, Sampling, ServeError, Usage,
};
use burn_qlora::{Decoder, Tokenizer};

use crate::adapters::NamedAdapter;

/// An engine on its thread.
pub struct Running {
    /// The line to it.
    pub handle: Handle,
    thread: JoinHandle<Result<(), ServeError>>,
}

impl Running {
    /// Starts an engine over a model.
    pub fn start(model: Decoder, config: &EngineConfig) -> Result<Self> {
        let (engine, handle) = Engine::new(model, config)?;
        Ok(Self { handle, thread: engine.spawn()? })
    }

    /// Loads adapters, from files that were found.
    pub fn load_adapters(&self, adapters: &[NamedAdapter]) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().context("can't wait for the engine")?;
        adapters.iter().try_for_each(|NamedAdapter { name, dir }| {
            runtime.block_on(self.handle.load_adapter(name.as_str(), dir.as_path())).map_err(Into::into)
        })
    }

    /// Ends it when everything that it took is answered.
    pub fn end(self) -> Result<()> {
        self.handle.close();
        let failed = |panic: Box<dyn std::any::Any + Send>| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            anyhow!("the engine failed: {}", text.unwrap_or("its thread says nothing about it"))
        };
        Ok(self.thread.join().map_err(failed)??)
    }
}

/// Asks for answers of one kind.
pub struct Asker<'a> {
    /// What makes text of tokens.
    pub tokenizer: &'a Arc<Tokenizer>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Tokens that end an answer and are not shown.
    pub stop_ids: Vec<u32>,
    /// Texts that end an answer and are not shown.
    pub stops: Vec<String>,
    /// Tokens of an answer at most.
    pub max_tokens: usize,
}

impl Asker<'_> {
    /// Asks an adapter, or the base, to continue `ids`.
    pub fn ask(&self, handle: &Handle, ids: &[u32], adapter: Option<&str>) -> Result<Answering> {
        self.ask_for(handle, ids, adapter, None)
    }

    /// The same where a conversation was written; the answer's reasoning comes apart from it.
    pub fn answer(&self, handle: &Handle, prompt: &Prompt, adapter: Option<&str>) -> Result<Answering> {
        self.ask_for(handle, &prompt.tokens, adapter, Some(prompt.opens_reasoning))
    }

    fn ask_for(
        &self,
        handle: &Handle,
        ids: &[u32],
        adapter: Option<&str>,
        reasoning: Option<bool>,
    ) -> Result<Answering> {
        let request = Request {
            adapter: adapter.map(|name| handle.adapter(name)).transpose()?,
            sampling: self.sampling.clone(),
            stop_ids: self.stop_ids.as_slice().into(),
            ..Request::new(ids.to_vec(), self.max_tokens)
        };
        let answer = handle.submit(request)?;
        let options = OutputOptions { stops: self.stops.clone(), reasoning, ..OutputOptions::default() };
        let output = Output::new(self.tokenizer, ids, &options);
        let (stop_ids, prompt_tokens) = (self.stop_ids.clone(), ids.len());
        Ok(Answering { answer, output, stop_ids, prompt_tokens, cached_tokens: 0, tokens: 0 })
    }
}

/// An answer that is under way. Dropping it cancels it.
pub struct Answering {
    answer: Answer,
    output: Output,
    stop_ids: Vec<u32>,
    prompt_tokens: usize,
    cached_tokens: usize,
    tokens: usize,
}

/// What comes of an answer at a time.
pub struct Step {
    /// Its next pieces.
    pub deltas: Vec<Delta>,
    /// How it ended; nothing comes behind it.
    pub finished: Option<Finished>,
}

impl Answering {
    /// Passes the answer's text on as it comes, to its end.
    pub fn follow(mut self, mut on_text: impl FnMut(&str) -> Result<()>) -> Result<Finished> {
        loop {
            let event = self.answer.next_blocking();
            let Step { deltas, finished } = self.take(event)?;
            for delta in &deltas {
                match delta {
                    Delta::Content(text) | Delta::Reasoning(text) => on_text(text)?,
                    Delta::Call(_) => {}
                }
            }
            if let Some(finished) = finished {
                return Ok(finished);
            }
        }
    }

    /// The next step, when it has come.
    pub fn poll_step(&mut self, context: &mut TaskContext<'_>) -> Poll<Result<Step>> {
        self.answer.poll_next(context).map(|event| self.take(event))
    }

    fn take(&mut self, event: Option<Event>) -> Result<Step> {
        let more = |deltas| Ok(Step { deltas, finished: None });
        match event {
            None => Err(anyhow!("the engine ended before its answer")),
            Some(Event::Failed(message)) => Err(anyhow!(message)),
            Some(Event::Started { cached_tokens }) => {
                self.cached_tokens = cached_tokens;
                more(Vec::new())
            }
            Some(Event::Prompt(_)) => more(Vec::new()),
            Some(Event::Token(token)) if self.stop_ids.contains(&token.id) => more(Vec::new()),
            Some(Event::Token(token)) => {
                self.tokens += 1;
                let deltas = self.output.push(token.id)?;
                if !self.output.stopped() {
                    return more(deltas);
                }
                self.answer.finish();
                let Self { prompt_tokens, cached_tokens, tokens: completion_tokens, .. } = *self;
                let usage = Usage { prompt_tokens, cached_tokens, completion_tokens };
                Ok(Step { deltas, finished: Some(Finished { reason: FinishReason::Stop, usage }) })
            }
            Some(Event::Finished(finished)) => Ok(Step { deltas: self.output.finish()?, finished: Some(finished) }),
        }
    }
}
