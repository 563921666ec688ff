//! Whole runs on the reference model.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

mod best;
mod common;
mod exact;
mod folder;
mod layouts;
mod loss_scale;
mod packed;
mod ranks;
mod resize;
mod resume;
mod watching;
