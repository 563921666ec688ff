//! `POST /tokenize` and `POST /detokenize`, as vLLM has them.

use axum::Json;
use axum::extract::{Request, State};
use chat_text::Message;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::{HttpState, body};
use crate::text::{Conversation, write};

/// A text or a conversation.
#[derive(Debug, Deserialize)]
struct TokenizeRequest {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    add_special_tokens: Option<bool>,
    add_generation_prompt: Option<bool>,
    return_token_strs: Option<bool>,
    tools: Option<Value>,
    chat_template_kwargs: Option<Map<String, Value>>,
}

/// Text to tokens.
pub(super) async fn tokenize(State(state): State<HttpState>, request: Request) -> Result<Json<Value>, ApiError> {
    let body = body::read(&state, request).await?;
    let answer = state.work(move |state| {
        let request: TokenizeRequest = body::parse(&body.bytes)?;
        let model = state.model(request.model.as_deref())?;
        let tokens = match (&request.prompt, &request.messages) {
            (Some(text), None) => state.tokenizer().encode(text, request.add_special_tokens.unwrap_or(true))?.ids,
            (None, Some(messages)) => {
                let conversation = Conversation {
                    messages,
                    tools: request.tools.as_ref(),
                    template_kwargs: request.chat_template_kwargs.as_ref(),
                    add_generation_prompt: request.add_generation_prompt.unwrap_or(true),
                };
                write(&model.prompting, state.tokenizer(), &conversation)?.tokens
            }
            _ => return Err(ApiError::field("prompt", "prompt: send either `prompt` or `messages`")),
        };
        let texts = request.return_token_strs.unwrap_or(false).then(|| {
            let text = |&id: &u32| state.vocabulary().text(id, "bytes:");
            tokens.iter().map(text).collect::<Vec<_>>()
        });
        Ok(json!({
            "count": tokens.len(),
            "max_model_len": state.handle().limits().max_tokens,
            "tokens": tokens,
            "token_strs": texts,
        }))
    });
    answer.await.map(Json)
}

/// Tokens.
#[derive(Debug, Deserialize)]
struct DetokenizeRequest {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// Tokens to text, special ones as well.
pub(super) async fn detokenize(State(state): State<HttpState>, request: Request) -> Result<Json<Value>, ApiError> {
    let body = body::read(&state, request).await?;
    let answer = state.work(move |state| {
        let request: DetokenizeRequest = body::parse(&body.bytes)?;
        let vocab_size = state.model(request.model.as_deref())?.vocab_size;
        if let Some(id) = request.tokens.iter().find(|&&id| id as usize >= vocab_size) {
            let message = format!("tokens: {id} is no token: the vocabulary ends at {vocab_size}");
            return Err(ApiError::field("tokens", message).with_code("unknown_token"));
        }
        Ok(json!({ "prompt": state.tokenizer().decode(&request.tokens, false)? }))
    });
    answer.await.map(Json)
}
