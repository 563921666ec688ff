//! `POST /v1/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::error::ApiError;
use super::logprobs::CompletionLogprobs;
use super::session::{Finish, Job, Session, Update, Usage};
use super::stream::{self, Chunks};
use super::types::{CompletionRequest, PromptField};
use super::{HttpState, body, format, now, sampling, unique, unsupported};
use crate::error;
use crate::request::{Constraint, Request as EngineRequest, TokenLogprobs};
use crate::text::{Delta, OutputOptions};

/// New tokens where a request does not say; OpenAI's value.
const DEFAULT_MAX_TOKENS: usize = 16;

/// Continues texts or tokens.
pub(super) async fn post(State(state): State<HttpState>, request: Request) -> Result<Response, ApiError> {
    let body = body::read(&state, request).await?;
    let (job, head) = state.work(move |state| prepare(state, &body.bytes)).await?;
    let mut session = Session::start(&state, job)?;
    let stream = head.stream;
    let mut writer = Writer::new(state, head);
    if stream {
        return Ok(stream::respond(session, writer));
    }
    let count = writer.choices.len();
    let mut texts = vec![String::new(); count];
    let mut finishes = vec![None; count];
    while let Some(update) = session.next().await {
        let update = update?;
        let (choice, finish) = (update.choice, update.finish);
        texts[choice] += &writer.text(update);
        finishes[choice] = finishes[choice].or(finish);
    }
    let choices = texts.into_iter().zip(finishes).enumerate();
    let choices: Vec<Value> = choices.map(|(index, (text, finish))| writer.choice(index, text, finish)).collect();
    let mut answer = writer.answer(choices);
    answer["usage"] = stream::usage(session.usage());
    Ok(Json(answer).into_response())
}

/// A prompt, and its text where the answer begins with it.
#[derive(Debug)]
struct Echoed {
    tokens: Vec<u32>,
    text: String,
    /// Where each token's text begins, in characters.
    offsets: Vec<usize>,
}

/// What the answer says about itself.
#[derive(Debug)]
struct Head {
    id: String,
    created: u64,
    model: String,
    n: usize,
    prompts: usize,
    /// One for each prompt, or none.
    echoed: Vec<Echoed>,
    stream: bool,
    include_usage: bool,
    logprobs: bool,
}

fn prepare(state: &HttpState, bytes: &[u8]) -> Result<(Job, Head), ApiError> {
    let mut request: CompletionRequest = body::parse(bytes)?;
    unsupported::refuse(bytes, &unsupported::OF_CHATS)?;
    let limits = state.handle().limits();
    let model = state.model(request.model.as_deref())?;
    let choice = sampling::read(request.sampling(), state.config(), model.vocab_size)?;
    let (stream, include_usage) = stream::wanted(request.stream, request.stream_options)?;
    if request.best_of.is_some_and(|best_of| best_of != choice.n) {
        return Err(ApiError::field("best_of", "best_of: answers are not ranked; leave it out, and use `n`"));
    }
    let most = state.config().max_logprobs;
    if request.logprobs.is_some_and(|top| top > most) {
        return Err(ApiError::field("logprobs", format!("logprobs: not more than {most}")));
    }
    if request.logprobs.is_some() {
        // Read here, where it holds up nobody else.
        state.vocabulary();
    }
    let count = match &request.prompt {
        PromptField::Texts(texts) => texts.len(),
        PromptField::Tokens(lists) => lists.len(),
    };
    let most = state.config().max_choices;
    if count * choice.n > most {
        let each = error::count(choice.n, "answer", "answers");
        let message = format!("prompt: {count} prompts with {each} each are more than {most} answers");
        return Err(ApiError::field("prompt", message));
    }

    let (echo, special) = (request.echo.unwrap_or(false), !request.skip_special_tokens.unwrap_or(true));
    let add_special = request.add_special_tokens.unwrap_or(true);
    let prompts: Vec<(Vec<u32>, Option<String>)> = match request.prompt {
        PromptField::Tokens(lists) => {
            let vocab_size = model.vocab_size;
            if let Some(id) = lists.iter().flatten().find(|&&id| id as usize >= vocab_size) {
                let message = format!("prompt: {id} is no token: the vocabulary ends at {vocab_size}");
                return Err(ApiError::field("prompt", message).with_code("unknown_token"));
            }
            lists.into_iter().map(|tokens| (tokens, None)).collect()
        }
        PromptField::Texts(texts) => {
            let encode = |text: String| Ok((state.tokenizer().encode(&text, add_special)?.ids, Some(text)));
            texts.into_iter().map(encode).collect::<Result<_, ApiError>>()?
        }
    };
    let eos = model.prompting.stop_ids(state.tokenizer());
    let grammar = format::grammar(state, request.response_format.as_ref())?;
    let grammar = grammar.map(|grammar| grammar.ending_with(eos.clone()));
    let mut stop_ids = choice.stop_ids;
    if !choice.ignore_eos {
        stop_ids.extend(eos);
    }
    let stop_ids: Arc<[u32]> = stop_ids.into();
    let mut requests = Vec::with_capacity(count * choice.n);
    let mut echoed = Vec::new();
    for (tokens, text) in prompts {
        if tokens.is_empty() {
            return Err(ApiError::field("prompt", "prompt: a prompt has no tokens").with_code("empty_prompt"));
        }
        let room = sampling::room(&tokens, limits)?;
        let shared: Arc<[u32]> = tokens.as_slice().into();
        for index in 0..choice.n {
            let mut sampling = choice.sampling.clone();
            sampling.seed = sampling.seed.wrapping_add(index as u64);
            requests.push(EngineRequest {
                prompt: shared.clone(),
                adapter: model.adapter.clone(),
                max_tokens: request.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS).min(room),
                sampling,
                stop_ids: stop_ids.clone(),
                logprobs: request.logprobs,
                prompt_logprobs: echo && request.logprobs.is_some(),
                constraint: grammar.clone().map(|grammar| Box::new(grammar) as Box<dyn Constraint>),
            });
        }
        if echo {
            echoed.push(self::echo(state, tokens, text, special)?);
        }
    }
    let output = OutputOptions { stops: choice.stops, special_tokens: special, ..OutputOptions::default() };
    let job = Job { requests, n: choice.n, outputs: vec![output; count], keep_stop_token: true };
    let head = Head {
        id: unique("cmpl-"),
        created: now(),
        model: model.name,
        n: choice.n,
        prompts: count,
        echoed,
        stream,
        include_usage,
        logprobs: request.logprobs.is_some(),
    };
    Ok((job, head))
}

fn echo(state: &HttpState, tokens: Vec<u32>, text: Option<String>, special: bool) -> Result<Echoed, ApiError> {
    let mut decoder = state.tokenizer().stream_decoder(&[], !special);
    let mut decoded = String::new();
    let (mut offsets, mut chars) = (Vec::with_capacity(tokens.len()), 0);
    for &id in &tokens {
        offsets.push(chars);
        if (id as usize) < state.handle().limits().vocab_size {
            let piece = decoder.push(id)?;
            chars += piece.chars().count();
            decoded += &piece;
        }
    }
    decoded += &decoder.finish()?;
    Ok(Echoed { tokens, text: text.unwrap_or(decoded), offsets })
}

/// Writes choices, whole or in chunks.
struct Writer {
    state: HttpState,
    head: Head,
    choices: Vec<Written>,
}

/// What a choice's text and log probabilities have so far.
#[derive(Debug, Default)]
struct Written {
    echoed: bool,
    logprobs: CompletionLogprobs,
}

impl Writer {
    fn new(state: HttpState, head: Head) -> Self {
        let choices = (0..head.prompts * head.n).map(|_| Written::default()).collect();
        Self { state, head, choices }
    }

    /// The text of an update; its log probabilities are kept.
    fn text(&mut self, update: Update) -> String {
        let vocabulary = self.state.vocabulary();
        let echoed = self.head.echoed.get(update.choice / self.head.n);
        let written = &mut self.choices[update.choice];
        let mut text = String::new();
        if let Some(echoed) = echoed {
            if let Some(logprobs) = &update.prompt {
                let none = std::iter::repeat(&None);
                let tokens = echoed.tokens.iter().zip(&echoed.offsets).zip(logprobs.iter().chain(none));
                for ((&id, &offset), logprobs) in tokens {
                    written.logprobs.push(id, offset, logprobs.as_ref(), vocabulary);
                }
            }
            if !std::mem::replace(&mut written.echoed, true) {
                text += &echoed.text;
            }
        }
        let begin = echoed.map_or(0, |echoed| echoed.text.chars().count());
        for token in &update.tokens {
            let logprobs: &TokenLogprobs = &token.logprobs;
            written.logprobs.push(token.id, begin + token.chars, Some(logprobs), vocabulary);
        }
        for delta in update.deltas {
            // There is nothing else where nothing else is looked for.
            if let Delta::Content(content) = delta {
                text += &content;
            }
        }
        text
    }

    fn choice(&mut self, index: usize, text: String, finish: Option<Finish>) -> Value {
        let logprobs = if self.head.logprobs { self.choices[index].logprobs.take() } else { Value::Null };
        json!({ "index": index, "text": text, "logprobs": logprobs, "finish_reason": finish.map(Finish::name) })
    }

    fn answer(&self, choices: Vec<Value>) -> Value {
        let Head { id, created, model, .. } = &self.head;
        json!({ "id": id, "object": "text_completion", "created": created, "model": model, "choices": choices })
    }

    fn chunk(&self, choices: Vec<Value>) -> Value {
        let mut chunk = self.answer(choices);
        if self.head.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

impl Chunks for Writer {
    fn start(&mut self) -> Vec<Value> {
        Vec::new()
    }

    fn update(&mut self, update: Update) -> Vec<Value> {
        let (index, finish) = (update.choice, update.finish);
        let text = self.text(update);
        let choice = self.choice(index, text, finish);
        vec![self.chunk(vec![choice])]
    }

    fn end(&mut self, usage: Usage) -> Vec<Value> {
        if !self.head.include_usage {
            return Vec::new();
        }
        let mut chunk = self.answer(Vec::new());
        chunk["usage"] = stream::usage(usage);
        vec![chunk]
    }
}
