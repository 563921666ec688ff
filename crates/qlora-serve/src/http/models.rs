//! The base model and the adapters by their names: `/v1/models`, and which of them a request asks.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use chat_text::{ChatTemplate, PromptLayout, PromptSettings, Prompting};
use serde_json::{Value, json};

use super::HttpState;
use super::error::ApiError;
use crate::served::{AdapterInfo, ServedAdapter};

/// A way of prompting with the server's template, where it has one.
pub(super) fn with_template(prompting: Prompting, template: Option<&ChatTemplate>) -> Prompting {
    match template {
        None => prompting,
        Some(template) => {
            let settings = PromptSettings { layout: PromptLayout::Chat, ..prompting.settings };
            Prompting { template: Some(template.clone()), settings }
        }
    }
}

/// What a request's `model` names.
#[derive(Clone, Debug)]
pub(super) struct Model {
    pub name: String,
    /// `None` is the base model.
    pub adapter: Option<ServedAdapter>,
    pub prompting: Arc<Prompting>,
    /// Ids below this have an embedding.
    pub vocab_size: usize,
}

impl HttpState {
    /// What a request's `model` names; the base model where it names none.
    pub(super) fn model(&self, name: Option<&str>) -> Result<Model, ApiError> {
        let base = &self.config().served_name;
        let Some(name) = name.filter(|name| name != base) else {
            return Ok(Model {
                name: base.clone(),
                adapter: None,
                prompting: self.base_prompting().clone(),
                vocab_size: self.handle().limits().vocab_size,
            });
        };
        let adapter = self.handle().adapter(name)?;
        // What lay beside it when it was loaded, else as the base model; with the server's template, where it has one.
        let read = adapter.info().prompting.as_ref().map(|read| match &self.config().chat_template {
            None => read.clone(),
            template => Arc::new(with_template((**read).clone(), template.as_ref())),
        });
        let prompting = read.unwrap_or_else(|| self.base_prompting().clone());
        Ok(Model { name: name.into(), prompting, vocab_size: adapter.info().vocab_size, adapter: Some(adapter) })
    }

    fn base_json(&self) -> Value {
        let name = &self.config().served_name;
        json!({
            "id": name,
            "object": "model",
            "created": self.started(),
            "owned_by": "burn-qlora",
            "root": name,
            "parent": null,
            "max_model_len": self.handle().limits().max_tokens,
        })
    }

    fn adapter_json(&self, adapter: &AdapterInfo) -> Value {
        json!({
            "id": adapter.name,
            "object": "model",
            "created": adapter.loaded,
            "owned_by": "burn-qlora",
            "root": adapter.dir,
            "parent": self.config().served_name,
            "max_model_len": self.handle().limits().max_tokens,
        })
    }
}

/// `GET /v1/models`.
pub(super) async fn list(State(state): State<HttpState>) -> Json<Value> {
    let adapters = state.handle().adapters();
    let models = std::iter::once(state.base_json()).chain(adapters.iter().map(|adapter| state.adapter_json(adapter)));
    Json(json!({ "object": "list", "data": models.collect::<Vec<_>>() }))
}

/// `GET /v1/models/{id}`. Names may have slashes.
pub(super) async fn get(
    State(state): State<HttpState>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(name) = name.map_err(|error| ApiError::field("model", format!("model: {}", error.body_text())))?;
    if name == state.config().served_name {
        return Ok(Json(state.base_json()));
    }
    let adapters = state.handle().adapters();
    let adapter = adapters.iter().find(|adapter| adapter.name == name);
    adapter.map(|adapter| Json(state.adapter_json(adapter))).ok_or_else(|| ApiError::unknown_model(&name))
}
