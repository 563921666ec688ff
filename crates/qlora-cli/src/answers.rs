//! An engine in this program, and answers as text.

use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Result, anyhow};
use burn_qlora::qlora_serve::text::{Delta, Output, OutputOptions};
use burn_qlora::qlora_serve::{
    Answer, Engine, EngineConfig, Event, FinishReason, Finished, Handle, Request, Sampling, ServeError,
};
use burn_qlora::{Decoder, Tokenizer};

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

    /// Ends it when everything that it took is answered.
    pub fn end(self) -> Result<()> {
        self.handle.close();
        Ok(self.thread.join().map_err(|_| anyhow!("the engine failed"))??)
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
        let request = Request {
            adapter: adapter.map(str::to_string),
            sampling: self.sampling.clone(),
            stop_ids: self.stop_ids.clone(),
            ..Request::new(ids.to_vec(), self.max_tokens)
        };
        let answer = handle.submit(request)?;
        let options = OutputOptions { stops: self.stops.clone(), ..OutputOptions::default() };
        Ok(Answering { answer, output: Output::new(self.tokenizer, ids, &options), stop_ids: self.stop_ids.clone() })
    }
}

/// An answer that is under way.
pub struct Answering {
    answer: Answer,
    output: Output,
    stop_ids: Vec<u32>,
}

impl Answering {
    /// Passes the answer's text on as it comes, to its end.
    pub fn follow(mut self, mut on_text: impl FnMut(&str) -> Result<()>) -> Result<Finished> {
        let mut show = |deltas: Vec<Delta>| {
            deltas.iter().try_for_each(|delta| match delta {
                Delta::Content(text) | Delta::Reasoning(text) => on_text(text),
                Delta::Call(_) => Ok(()),
            })
        };
        let mut tokens = 0;
        while let Some(event) = self.answer.next_blocking() {
            match event {
                Event::Token(token) if self.stop_ids.contains(&token.id) => {}
                Event::Token(token) => {
                    tokens += 1;
                    show(self.output.push(token.id)?)?;
                    if self.output.stopped() {
                        // Dropping the answer ends it in the engine.
                        let usage = burn_qlora::qlora_serve::Usage { completion_tokens: tokens, ..Default::default() };
                        return Ok(Finished { reason: FinishReason::Stop, usage });
                    }
                }
                Event::Finished(finished) => {
                    show(self.output.finish()?)?;
                    return Ok(finished);
                }
                Event::Failed(message) => return Err(anyhow!(message)),
                Event::Prompt(_) => {}
            }
        }
        Err(anyhow!("the engine ended before its answer"))
    }
}
