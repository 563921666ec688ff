//! Adapters as those who ask know them: what is known of one, and the use that keeps it loaded.

use std::path::PathBuf;
use std::sync::{Arc, mpsc};

use chat_text::Prompting;

use crate::handle::Command;

/// An adapter that an engine knows.
#[derive(Clone, Debug)]
pub struct AdapterInfo {
    /// The name that requests use.
    pub name: String,
    /// Tells it from others that have or had the same name.
    pub number: u64,
    /// Where it was read from.
    pub dir: PathBuf,
    /// Seconds since the Unix epoch when it was loaded.
    pub loaded: u64,
    /// Ids below this have an embedding: more than the base's where the adapter was trained with tokens of its own.
    pub vocab_size: usize,
    /// How it is prompted, as lay beside it when it was loaded; `None` where nothing did.
    pub prompting: Option<Arc<Prompting>>,
}

/// An adapter to be asked, as [`Handle::adapter`](crate::Handle::adapter) found it under its name. The engine keeps it
/// while this or a clone of it is there, also when its name is another's by then.
#[derive(Clone, Debug)]
pub struct ServedAdapter(Arc<Kept>);

#[derive(Debug)]
struct Kept {
    info: AdapterInfo,
    engine: mpsc::Sender<Command>,
}

impl ServedAdapter {
    /// The first use of an adapter. `engine` is told when the last one is over.
    pub(crate) fn new(info: AdapterInfo, engine: mpsc::Sender<Command>) -> Self {
        Self(Arc::new(Kept { info, engine }))
    }

    /// What is known of it.
    pub fn info(&self) -> &AdapterInfo {
        &self.0.info
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // An engine that is gone keeps nothing.
        self.engine.send(Command::DropAdapter(self.info.number)).ok();
    }
}
