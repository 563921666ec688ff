//! How well a model continues rows: the loss of what it should have learned, and whether what it answers is right.
//!
//! A [`Row`] has the tokens and the labels that training would give it. Its [`TokenScore`] comes from log probabilities
//! of its own tokens, its answer from a continuation of its prompt. An [`Estimate`] is what many rows say together.

mod estimate;
mod pattern;
mod row;
mod score;

pub use estimate::Estimate;
pub use pattern::{Pattern, PatternError};
pub use row::{Question, Row};
pub use score::{TokenScore, request};
