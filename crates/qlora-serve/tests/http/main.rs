//! The HTTP side before an engine that says what a test wants.

#![allow(clippy::unwrap_used)]

mod adapters;
mod chat;
mod completions;
mod connections;
mod constraints;
mod errors;
mod fuzz;
mod output;
mod page;
mod support;
mod text;
mod tools;
