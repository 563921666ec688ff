//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::error::ApiError;
use super::session::{Finish, Job, Session, TokenAt, Update, Usage};
use super::stream::{self, Chunks};
use super::tools::{self, Tools, call_id};
use super::types::{ChatRequest, FormatKind, ResponseFormat};
use super::{HttpState, body, format, logprobs, models, now, sampling, unique, unsupported};
use crate::request::{Constraint, Request as EngineRequest};
use crate::text::{
    AfterReasoning, Call, Conversation, Delta, Grammar, OutputOptions, REASONING_CLOSE, ToolFormat, template, write,
};

/// Answers a conversation.
pub(super) async fn post(State(state): State<HttpState>, request: Request) -> Result<Response, ApiError> {
    let body = body::read(&state, request).await?;
    let (job, head) = state.work(move |state| prepare(state, &body.bytes)).await?;
    let mut session = Session::start(&state, job).map_err(of_messages)?;
    if head.stream {
        return Ok(stream::respond(session, ChatChunks::new(state, head)));
    }
    let mut choices: Vec<Whole> = (0..head.n).map(|_| Whole::default()).collect();
    while let Some(update) = session.next().await {
        let update = update?;
        choices[update.choice].take(update);
    }
    let usage = session.usage();
    let choices: Vec<Value> =
        choices.into_iter().enumerate().map(|(index, choice)| choice.json(index, &state, &head)).collect();
    Ok(Json(json!({
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "choices": choices,
        "usage": stream::usage(usage),
    }))
    .into_response())
}

/// What the answer says about itself.
#[derive(Clone, Debug)]
struct Head {
    id: String,
    created: u64,
    model: String,
    n: usize,
    stream: bool,
    include_usage: bool,
    logprobs: bool,
    tool_format: Option<ToolFormat>,
}

/// The prompt of a chat is its messages.
fn of_messages(error: ApiError) -> ApiError {
    match error.param.as_deref() {
        Some("prompt") => ApiError { param: Some("messages".into()), ..error },
        _ => error,
    }
}

fn prepare(state: &HttpState, bytes: &[u8]) -> Result<(Job, Head), ApiError> {
    let mut request: ChatRequest = body::parse(bytes)?;
    unsupported::refuse(bytes, &unsupported::OF_COMPLETIONS)?;
    let limits = state.handle().limits();
    let model = state.model(request.model.as_deref())?;
    let choice = sampling::read(request.sampling(), state.config(), model.vocab_size)?;
    let (stream, include_usage) = stream::wanted(request.stream, request.stream_options)?;
    let logprobs = logprobs_of(&request, state.config().max_logprobs)?;
    if logprobs.is_some() {
        // Read here, where it holds up nobody else.
        state.vocabulary();
    }
    if request.messages.is_empty() {
        return Err(ApiError::field("messages", "messages: there are none"));
    }

    let prompting = &model.prompting;
    let template = template(prompting, state.tokenizer())?;
    let format = template.and_then(|template| ToolFormat::of_template(template.source()));
    let format = template.and(format.or(state.config().tool_format));
    let (tools, tool_choice) = (request.tools.take(), request.tool_choice.take());
    let tools = tools::read(tools, tool_choice, request.parallel_tool_calls, &model.name, format)?;
    let mut kwargs = request.chat_template_kwargs.take().unwrap_or_default();
    if let Some(effort) = request.reasoning_effort.take() {
        kwargs.insert("reasoning_effort".into(), effort.into());
    }
    let prompt = write(
        prompting,
        state.tokenizer(),
        &Conversation {
            messages: &request.messages,
            tools: tools.as_ref().map(|tools| &tools.json),
            template_kwargs: Some(&kwargs),
            add_generation_prompt: request.add_generation_prompt.unwrap_or(true),
        },
    )
    .map_err(|error| ApiError { param: Some("messages".into()), ..error.into() })?;

    let eos = prompting.stop_ids(state.tokenizer());
    let close = state.tokenizer().token_to_id(REASONING_CLOSE);
    let knows = template.is_some_and(|template| template.source().contains(REASONING_CLOSE));
    let reasoning = (knows || close.is_some()).then_some(prompt.opens_reasoning);
    let grammar = grammar(state, &model, request.response_format.as_ref(), tools.as_ref())?;
    let grammar = grammar.map(|grammar| grammar.ending_with(eos.clone()));
    if grammar.is_some() && prompt.opens_reasoning && close.is_none() {
        let param = if tools.is_some() { "tool_choice" } else { "response_format" };
        let message = format!(
            "{param}: the model reasons first, and {REASONING_CLOSE} is no token of its own behind which an answer could be constrained; turn reasoning off by `chat_template_kwargs`, where the template has a variable for it"
        );
        return Err(ApiError::field(param, message));
    }
    let constraint = |grammar: Grammar| -> Box<dyn Constraint> {
        match close.filter(|_| prompt.opens_reasoning) {
            Some(close) => Box::new(AfterReasoning::new(grammar, close)),
            None => Box::new(grammar),
        }
    };

    let room = sampling::room(&prompt.tokens, limits).map_err(of_messages)?;
    let tokens: Arc<[u32]> = prompt.tokens.into();
    let max_tokens = match request.max_completion_tokens.or(request.max_tokens) {
        Some(0) => return Err(ApiError::field("max_tokens", "max_tokens: an answer has at least one token")),
        Some(most) => most.min(room),
        None => room,
    };
    let stop_ids: Arc<[u32]> = if choice.ignore_eos { choice.stop_ids } else { [eos, choice.stop_ids].concat() }.into();
    let requests = (0..choice.n).map(|index| {
        let mut sampling = choice.sampling.clone();
        sampling.seed = sampling.seed.wrapping_add(index as u64);
        EngineRequest {
            prompt: tokens.clone(),
            adapter: model.adapter.clone(),
            max_tokens,
            sampling,
            stop_ids: stop_ids.clone(),
            logprobs,
            prompt_logprobs: false,
            constraint: grammar.clone().map(constraint),
        }
    });
    let output = OutputOptions {
        stops: choice.stops,
        reasoning,
        one_call: tools.as_ref().is_some_and(|tools| tools.one_call),
        tools: tools.as_ref().map(|tools| (tools.format, tools.names.clone())),
        special_tokens: !request.skip_special_tokens.unwrap_or(true),
    };
    let job = Job { requests: requests.collect(), n: choice.n, outputs: vec![output], keep_stop_token: false };
    let head = Head {
        id: unique("chatcmpl-"),
        created: now(),
        model: model.name,
        n: choice.n,
        stream,
        include_usage,
        logprobs: logprobs.is_some(),
        tool_format: tools.map(|tools| tools.format),
    };
    Ok((job, head))
}

fn logprobs_of(request: &ChatRequest, most: usize) -> Result<Option<usize>, ApiError> {
    match (request.logprobs.unwrap_or(false), request.top_logprobs) {
        (true, top) if top.unwrap_or(0) <= most => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::field("top_logprobs", "top_logprobs: only with `logprobs`")),
        (true, _) => Err(ApiError::field("top_logprobs", format!("top_logprobs: not more than {most}"))),
    }
}

/// What the answer must look like.
fn grammar(
    state: &HttpState,
    model: &models::Model,
    format: Option<&ResponseFormat>,
    tools: Option<&Tools>,
) -> Result<Option<Grammar>, ApiError> {
    let kind = format.map_or(FormatKind::Text, |format| format.kind);
    if let Some(tools) = tools {
        if kind != FormatKind::Text {
            let message = "response_format: JSON and tool calls exclude each other; set `tool_choice` to none";
            return Err(ApiError::field("response_format", message));
        }
        if tools.forced.is_empty() {
            return Ok(None);
        }
        let id = |tag: &str| state.tokenizer().token_to_id(tag);
        let grammar = state.grammars()?.calls(tools.format, state.vocabulary(), id, &tools.forced, !tools.one_call);
        return grammar.map(Some).map_err(|error| {
            ApiError::field("tools", format!("tools: the schema can't be enforced for {}: {error}", model.name))
        });
    }
    format::grammar(state, format)
}

fn call_json(call: Call, format: Option<ToolFormat>) -> Value {
    let Call { name, arguments } = call;
    json!({ "id": call_id(format), "type": "function", "function": { "name": name, "arguments": arguments } })
}

/// A whole answer.
#[derive(Debug, Default)]
struct Whole {
    content: String,
    reasoning: String,
    calls: Vec<Call>,
    tokens: Vec<TokenAt>,
    finish: Option<Finish>,
}

impl Whole {
    fn take(&mut self, update: Update) {
        for delta in update.deltas {
            match delta {
                Delta::Content(text) => self.content += &text,
                Delta::Reasoning(text) => self.reasoning += &text,
                Delta::Call(call) => self.calls.push(call),
            }
        }
        self.tokens.extend(update.tokens);
        self.finish = self.finish.or(update.finish);
    }

    fn json(self, index: usize, state: &HttpState, head: &Head) -> Value {
        let nothing_but_calls = self.content.is_empty() && !self.calls.is_empty();
        let content = if nothing_but_calls { Value::Null } else { self.content.into() };
        let mut message = json!({ "role": "assistant", "content": content, "refusal": null });
        if !self.reasoning.is_empty() {
            message["reasoning_content"] = self.reasoning.into();
        }
        if !self.calls.is_empty() {
            message["tool_calls"] = self.calls.into_iter().map(|call| call_json(call, head.tool_format)).collect();
        }
        json!({
            "index": index,
            "message": message,
            "logprobs": head.logprobs.then(|| logprobs::chat(&self.tokens, state.vocabulary())),
            "finish_reason": self.finish.map(Finish::name),
        })
    }
}

/// An answer in chunks.
struct ChatChunks {
    state: HttpState,
    head: Arc<Head>,
    /// Calls of each choice so far.
    calls: Vec<usize>,
}

impl ChatChunks {
    fn new(state: HttpState, head: Head) -> Self {
        Self { state, calls: vec![0; head.n], head: Arc::new(head) }
    }

    fn chunk(&self, choices: Value) -> Value {
        let mut chunk = json!({
            "id": self.head.id,
            "object": "chat.completion.chunk",
            "created": self.head.created,
            "model": self.head.model,
            "choices": choices,
        });
        if self.head.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }

    fn choice(&self, index: usize, delta: Value, logprobs: Option<Value>, finish: Option<Finish>) -> Value {
        let finish = finish.map(Finish::name);
        self.chunk(json!([{ "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish }]))
    }
}

impl Chunks for ChatChunks {
    fn start(&mut self) -> Vec<Value> {
        let begin = || json!({ "role": "assistant", "content": "" });
        (0..self.head.n).map(|index| self.choice(index, begin(), None, None)).collect()
    }

    fn update(&mut self, update: Update) -> Vec<Value> {
        let index = update.choice;
        let (mut content, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
        for delta in update.deltas {
            match delta {
                Delta::Content(text) => content += &text,
                Delta::Reasoning(text) => reasoning += &text,
                Delta::Call(call) => {
                    let mut call = call_json(call, self.head.tool_format);
                    call["index"] = self.calls[index].into();
                    self.calls[index] += 1;
                    calls.push(call);
                }
            }
        }
        let mut delta = json!({});
        if !reasoning.is_empty() {
            delta["reasoning_content"] = reasoning.into();
        }
        if !content.is_empty() {
            delta["content"] = content.into();
        }
        if !calls.is_empty() {
            delta["tool_calls"] = calls.into();
        }
        let tokens = &update.tokens;
        let logprobs = (!tokens.is_empty()).then(|| logprobs::chat(tokens, self.state.vocabulary()));
        let mut chunks = Vec::new();
        if delta != json!({}) || logprobs.is_some() {
            chunks.push(self.choice(index, delta, logprobs, None));
        }
        if update.finish.is_some() {
            chunks.push(self.choice(index, json!({}), None, update.finish));
        }
        chunks
    }

    fn end(&mut self, usage: Usage) -> Vec<Value> {
        if !self.head.include_usage {
            return Vec::new();
        }
        let mut chunk = self.chunk(json!([]));
        chunk["usage"] = stream::usage(usage);
        vec![chunk]
    }
}
