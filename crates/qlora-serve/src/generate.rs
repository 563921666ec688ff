//! One answer, on the thread that asks.

use qlora_models::Decoder;

use crate::engine::{CacheSize, Engine, EngineConfig};
use crate::error::ServeError;
use crate::request::{Event, Finished, Request};

/// What was generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generation {
    /// The new tokens, a stop id included.
    pub ids: Vec<u32>,
    /// How they ended.
    pub finished: Finished,
}

/// Continues a prompt with the model as it is, its adapter included, on an engine of its own. `on_token` sees each new
/// token as it comes.
///
/// # Errors
/// The request can't be answered, names an adapter, or fails; the device fails.
pub fn generate(model: &Decoder, request: Request, mut on_token: impl FnMut(u32)) -> Result<Generation, ServeError> {
    let cache = CacheSize::Tokens(request.prompt.len() + request.max_tokens);
    let (mut engine, handle) = Engine::new(model.clone(), &EngineConfig { cache, ..EngineConfig::default() })?;
    let mut answer = handle.submit(request)?;
    let mut ids = Vec::new();
    loop {
        engine.step()?;
        while let Some(event) = answer.try_next() {
            match event {
                Event::Started { .. } | Event::Prompt(_) => {}
                Event::Token(token) => {
                    ids.push(token.id);
                    on_token(token.id);
                }
                Event::Finished(finished) => return Ok(Generation { ids, finished }),
                Event::Failed(message) => return Err(ServeError::Failed(message)),
            }
        }
    }
}
