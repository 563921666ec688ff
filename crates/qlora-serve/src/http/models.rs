//! The base model and the adapters by their names: `/v1/models`, and which of them a request asks.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use chat_text::{ChatTemplate, PromptLayout, PromptSettings, Prompting};
use serde_json::{Value, json};

use super::HttpState;
use super::error::{ApiError, chain};
use crate::handle::AdapterInfo;

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
    pub adapter: Option<String>,
    /// Ids below this have an embedding.
    pub vocab_size: usize,
    pub prompting: Arc<Prompting>,
}

/// How adapters are prompted, as read from their folders.
#[derive(Debug, Default)]
pub(super) struct Promptings(Mutex<HashMap<String, (AdapterInfo, Arc<Prompting>)>>);

impl Promptings {
    /// How an adapter is prompted: as lies beside it, else as the base model; with the server's template, where it has
    /// one.
    fn of(
        &self,
        adapter: &AdapterInfo,
        base: &Arc<Prompting>,
        template: Option<&ChatTemplate>,
    ) -> Result<Arc<Prompting>, ApiError> {
        let known = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, prompting)) = known().get(&adapter.name).filter(|(info, _)| info == adapter) {
            return Ok(prompting.clone());
        }
        let read = Prompting::of_adapter(&adapter.dir).map_err(|error| {
            let message =
                format!("what the adapter {:?} is prompted with can't be read: {}", adapter.name, chain(&error));
            ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "adapter_prompting", message)
        })?;
        let prompting = read.map_or_else(|| base.clone(), |read| Arc::new(with_template(read, template)));
        known().insert(adapter.name.clone(), (adapter.clone(), prompting.clone()));
        Ok(prompting)
    }

    /// Forgets an adapter.
    pub fn forget(&self, name: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }
}

impl HttpState {
    /// What a request's `model` names; the base model where it names none.
    pub(super) fn model(&self, name: Option<&str>) -> Result<Model, ApiError> {
        let base = &self.config().served_name;
        let Some(name) = name.filter(|name| name != base) else {
            let vocab_size = self.handle().limits().vocab_size;
            let prompting = self.base_prompting().clone();
            return Ok(Model { name: base.clone(), adapter: None, vocab_size, prompting });
        };
        let adapters = self.handle().adapters();
        let adapter = adapters.iter().find(|adapter| adapter.name == name);
        let adapter = adapter.ok_or_else(|| ApiError::unknown_model(name))?;
        let prompting = self.promptings().of(adapter, self.base_prompting(), self.config().chat_template.as_ref())?;
        Ok(Model { name: name.into(), adapter: Some(name.into()), vocab_size: adapter.vocab_size, prompting })
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
pub(super) async fn get(State(state): State<HttpState>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    if name == state.config().served_name {
        return Ok(Json(state.base_json()));
    }
    let adapters = state.handle().adapters();
    let adapter = adapters.iter().find(|adapter| adapter.name == name);
    adapter.map(|adapter| Json(state.adapter_json(adapter))).ok_or_else(|| ApiError::unknown_model(&name))
}
