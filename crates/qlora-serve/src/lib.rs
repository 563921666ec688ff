//! Many answers at once over one 4-bit base.

mod error;
mod handle;
pub mod http;
mod request;
pub mod text;

pub use error::ServeError;
pub use handle::{AdapterInfo, Answer, Command, Counters, Handle, Inbox, Limits, Reply, line};
pub use request::{Constraint, Event, FinishReason, Finished, Request, Sampling, Token, TokenLogprobs, Usage};
