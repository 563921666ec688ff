//! `POST /v1/load_lora_adapter` and `POST /v1/unload_lora_adapter`, as vLLM has them.

use std::path::{Path, PathBuf};

use axum::Json;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;
use super::{HttpState, body};
use crate::error::ServeError;

/// Bytes of a name at most.
const LONGEST_NAME: usize = 256;

#[derive(Debug, Deserialize)]
struct LoadRequest {
    lora_name: String,
    lora_path: PathBuf,
}

#[derive(Debug, Deserialize)]
struct UnloadRequest {
    lora_name: String,
}

/// Serves an adapter from a folder of the server.
pub(super) async fn load(State(state): State<HttpState>, request: Request) -> Result<Json<Value>, ApiError> {
    allowed(&state)?;
    let body = body::read(&state, request).await?;
    let work = state.work(move |state| {
        let LoadRequest { lora_name, lora_path } = body::parse(&body.bytes)?;
        let fail = |problem: &str| Err(ApiError::field("lora_name", format!("lora_name: {lora_name:?} {problem}")));
        if lora_name.is_empty() || lora_name.len() > LONGEST_NAME || lora_name.chars().any(char::is_control) {
            return fail("is no name");
        }
        if lora_name == state.config().served_name {
            return fail("is the base model's name");
        }
        let (inner, is_adapter) = (lora_path.join("adapter"), |dir: &Path| dir.join("adapter_config.json").is_file());
        if !is_adapter(&lora_path) && is_adapter(&inner) {
            let (run, inner) = (lora_path.display(), inner.display());
            let message = format!("lora_path: {run} is a run's folder: its adapter is {inner}");
            return Err(ApiError::field("lora_path", message).with_code("adapter_not_served"));
        }
        Ok((lora_name, lora_path))
    });
    let (name, path) = work.await?;
    state.handle().load_adapter(name.clone(), path).await?;
    Ok(Json(json!({ "status": "loaded", "lora_name": name })))
}

/// Forgets an adapter.
pub(super) async fn unload(State(state): State<HttpState>, request: Request) -> Result<Json<Value>, ApiError> {
    allowed(&state)?;
    let body = body::read(&state, request).await?;
    let UnloadRequest { lora_name } = body::parse(&body.bytes)?;
    if lora_name == state.config().served_name {
        let message = format!("lora_name: {lora_name:?} is the base model: only adapters are unloaded");
        return Err(ApiError::field("lora_name", message));
    }
    state.handle().unload_adapter(lora_name.clone()).await.map_err(|error| match error {
        error @ ServeError::UnknownAdapter { .. } => ApiError {
            param: Some("lora_name".into()),
            message: format!("lora_name: {error}: GET /v1/models lists those that are"),
            ..ApiError::unknown_model(&lora_name)
        },
        error => error.into(),
    })?;
    Ok(Json(json!({ "status": "unloaded", "lora_name": lora_name })))
}

fn allowed(state: &HttpState) -> Result<(), ApiError> {
    if state.config().adapter_updates {
        return Ok(());
    }
    let message = "this server's adapters are fixed";
    Err(ApiError::new(StatusCode::FORBIDDEN, "adapters_fixed", message))
}
