//! The conversation: what was said, who answers, and how.

use std::future::{Future as _, poll_fn};
use std::io::IsTerminal;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;

use anyhow::{Context, Result};
use burn_qlora::chat_text::PromptLayout;
use burn_qlora::qlora_serve::text::{Conversation, Delta, write};
use burn_qlora::qlora_serve::{FinishReason, Finished, Handle, ServeError};
use burn_qlora::{Message, Tokenizer};
use tokio::runtime::Runtime;
use tokio::sync::futures::Notified;

use super::interrupts::Interrupts;
use crate::answers::{Answering, Asker, Step};
use crate::args::{ChatArgs, SamplingArgs};
use crate::exit::UsageError;
use crate::output::{print, say, show};
use crate::prompts::Voice;

const ASSISTANT: &str = "assistant";

/// A conversation with one voice, or with two at once.
pub struct Session {
    voices: Vec<Voice>,
    threads: Vec<Thread>,
    /// How tokens are chosen.
    pub choice: SamplingArgs,
    system: Option<String>,
    /// How often the last prompt was answered again.
    attempt: u64,
    tokenizer: Arc<Tokenizer>,
    handle: Handle,
    interrupts: Arc<Interrupts>,
    runtime: Runtime,
}

/// What was said with one voice.
#[derive(Clone)]
struct Thread {
    /// Its index.
    voice: usize,
    messages: Vec<Message>,
}

impl Session {
    /// A conversation with the voice of an index.
    pub fn new(
        args: &ChatArgs,
        voices: Vec<Voice>,
        first: usize,
        tokenizer: Arc<Tokenizer>,
        handle: Handle,
        interrupts: Arc<Interrupts>,
    ) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().context("can't wait for answers")?;
        let threads = vec![Thread { voice: first, messages: Vec::new() }];
        let (choice, system) = (args.choice.clone(), args.writing.system.clone());
        Ok(Self { voices, threads, choice, system, attempt: 0, tokenizer, handle, interrupts, runtime })
    }

    /// Those who answer.
    pub fn names(&self) -> String {
        let names = self.threads.iter().map(|thread| self.voices[thread.voice].name.as_str());
        names.collect::<Vec<_>>().join(" and ")
    }

    /// Has these voices answer. Each goes on with what was said with it, or else with the first that answered before.
    pub fn speak_with(&mut self, names: &[&str]) -> Result<(), UsageError> {
        let threads = names.iter().map(|name| {
            let voice = self.voices.iter().position(|voice| voice.name == *name).ok_or_else(|| {
                let known: Vec<&str> = self.voices.iter().map(|voice| voice.name.as_str()).collect();
                UsageError(format!("no adapter is called {name:?}: there are {}", known.join(", ")))
            })?;
            let own = self.threads.iter().find(|thread| thread.voice == voice).or(self.threads.first());
            Ok(Thread { voice, messages: own.map_or_else(Vec::new, |thread| thread.messages.clone()) })
        });
        self.threads = threads.collect::<Result<_, _>>()?;
        Ok(())
    }

    /// Puts a system message before the conversation, or the voices' own.
    pub fn set_system(&mut self, text: Option<String>) -> Result<(), UsageError> {
        let has_place = |thread: &Thread| self.voices[thread.voice].prompting.settings.layout != PromptLayout::Plain;
        if text.is_some() && !self.threads.iter().any(has_place) {
            let names = self.names();
            return Err(UsageError(format!(
                "/system has no place where the prompt is no conversation, as with {names}"
            )));
        }
        self.system = text;
        Ok(())
    }

    /// Forgets what was said.
    pub fn reset(&mut self) {
        self.threads.iter_mut().for_each(|thread| thread.messages.clear());
    }

    /// Answers a prompt. Where that fails, the conversation is what it was.
    pub fn prompt(&mut self, text: String) -> Result<()> {
        let before = self.threads.clone();
        self.attempt = 0;
        for thread in &mut self.threads {
            thread.messages.push(Message::user(text.as_str()));
        }
        self.answer().inspect_err(|_| self.threads = before)
    }

    /// Answers the last prompt once more.
    pub fn regenerate(&mut self) -> Result<()> {
        let before = self.threads.clone();
        for thread in &mut self.threads {
            match thread.messages.last() {
                Some(message) if message.role == ASSISTANT => drop(thread.messages.pop()),
                _ => {
                    self.threads = before;
                    return Err(UsageError("/regenerate: there is no answer yet".into()).into());
                }
            }
        }
        if self.choice.temperature == 0.0 || self.choice.top_k == 1 {
            say!("note: the likeliest tokens are the same again; /set temperature 0.7 gives another answer");
        }
        self.attempt += 1;
        self.answer().inspect_err(|_| self.threads = before)
    }

    /// Has every voice answer at once, and shows one answer after the other.
    fn answer(&mut self) -> Result<()> {
        let answers = self.threads.iter().map(|thread| self.ask(thread)).collect::<Result<Vec<_>>>()?;
        let interrupts = self.interrupts.clone();
        let mut stop = pin!(interrupts.begin());
        let shown = self.show(answers, stop.as_mut());
        interrupts.end();
        for (thread, (text, has_ended)) in self.threads.iter_mut().zip(shown?) {
            match has_ended || !text.is_empty() {
                true => thread.messages.push(Message::assistant(text)),
                // A signal came before anything else: the prompt counts as never written.
                false => drop(thread.messages.pop()),
            }
        }
        Ok(())
    }

    fn ask(&self, thread: &Thread) -> Result<Answering> {
        let Voice { adapter, prompting, .. } = &self.voices[thread.voice];
        let system = self.system.as_deref().filter(|_| prompting.settings.layout != PromptLayout::Plain);
        let messages: Vec<Message> =
            system.into_iter().map(Message::system).chain(thread.messages.iter().cloned()).collect();
        let conversation =
            Conversation { messages: &messages, tools: None, template_kwargs: None, add_generation_prompt: true };
        let mut sampling = self.choice.sampling()?;
        sampling.seed = sampling.seed.wrapping_add(self.attempt);
        let asker = Asker {
            tokenizer: &self.tokenizer,
            sampling,
            stop_ids: prompting.stop_ids(&self.tokenizer),
            stops: self.choice.stop.clone(),
            max_tokens: self.choice.max_new_tokens,
        };
        let prompt = write(prompting, &self.tokenizer, &conversation)?;
        asker.answer(&self.handle, &prompt, adapter.as_deref()).map_err(|error| {
            match error.downcast_ref::<ServeError>() {
                Some(ServeError::TooLong { .. }) => error.context("the conversation is too long: /reset begins anew"),
                _ => error,
            }
        })
    }

    /// Shows answers as they come. Returns their contents, and whether they came to an end or a signal before it.
    fn show(&self, answers: Vec<Answering>, mut stop: Pin<&mut Notified<'_>>) -> Result<Vec<(String, bool)>> {
        let mut contents = vec![(String::new(), false); answers.len()];
        for ((answering, thread), (content, has_ended)) in answers.into_iter().zip(&self.threads).zip(&mut contents) {
            if self.threads.len() > 1 {
                show(&format!("[{}]\n", self.voices[thread.voice].name))?;
            }
            let ended = self.runtime.block_on(follow(answering, content, stop.as_mut()))?;
            print("\n")?;
            let Some(finished) = ended else { break };
            *has_ended = true;
            if finished.reason == FinishReason::Length && std::io::stderr().is_terminal() {
                match finished.usage.completion_tokens == self.choice.max_new_tokens {
                    true => say!("stopped at max_new_tokens; /set max_new_tokens N allows more"),
                    false => say!("the conversation is as long as it may be: /reset begins anew"),
                }
            }
        }
        Ok(contents)
    }
}

/// Shows an answer to its end, or until the signal comes: then `None` is returned.
async fn follow(
    mut answering: Answering,
    content: &mut String,
    mut stop: Pin<&mut Notified<'_>>,
) -> Result<Option<Finished>> {
    let mut in_reasoning = false;
    loop {
        let step = poll_fn(|context| match stop.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(None),
            Poll::Pending => answering.poll_step(context).map(Some),
        });
        let Some(step) = step.await else { return Ok(None) };
        let Step { deltas, finished } = step?;
        for delta in &deltas {
            match delta {
                Delta::Reasoning(text) => {
                    if !std::mem::replace(&mut in_reasoning, true) {
                        print("[reasoning]\n")?;
                    }
                    show(text)?;
                }
                Delta::Content(text) => {
                    if std::mem::replace(&mut in_reasoning, false) {
                        print("\n[answer]\n")?;
                    }
                    content.push_str(text);
                    show(text)?;
                }
                Delta::Call(_) => {}
            }
        }
        if finished.is_some() {
            return Ok(finished);
        }
    }
}
