//! Many answers at once over one 4-bit base: the engine that serves trained adapters.
//!
//! An [`Engine`] has a model without an adapter, any number of adapters by name, and a cache of keys and values in blocks.
//! It runs one forward pass after the other; requests join and leave between passes. What the next pass computes is
//! decided by the [`scheduler`]: one token of every answer that is under way, and as much of waiting prompts as the pass
//! has room for. Rows of different adapters share a pass.
//!
//! Answers do not depend on what else is in the batch: not the tokens, whatever is preempted, cancelled or shared, and not
//! the random numbers.

mod adapters;
mod engine;
mod error;
pub mod eval;
mod generate;
mod handle;
pub mod http;
mod request;
pub mod sampling;
pub mod scheduler;
mod served;
pub mod text;

pub use engine::{CacheSize, Engine, EngineConfig};
pub use error::ServeError;
pub use generate::{Generation, generate};
pub use handle::{Answer, Command, Counters, Handle, Inbox, Limits, ReadAdapter, Reply, line};
pub use request::{Constraint, Event, FinishReason, Finished, Request, Sampling, Token, TokenLogprobs, Usage};
pub use served::{AdapterInfo, ServedAdapter};
