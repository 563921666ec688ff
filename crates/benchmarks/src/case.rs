//! One thing to measure.

use anyhow::Result;
use cubecl::server::Handle;
use serde_json::Value;

use crate::bench::Bench;

/// A kernel on one shape. Its buffers are made when its turn comes.
pub(crate) struct Case {
    /// The kernel, as the table names it.
    pub kernel: &'static str,
    /// Sizes and formats.
    pub shape: String,
    /// Where the shape occurs.
    pub model: &'static str,
    /// What it must do at least.
    pub work: Work,
    /// What is asked of it, where something is: see `families::bars`.
    pub bar: Option<&'static str>,
    /// The same for the peer, one of the operations of `benches/peers/bench_kernels_bnb.py`.
    pub peer: Option<Value>,
    pub prepare: Prepare,
}

pub(crate) type Prepare = Box<dyn Fn(&Bench) -> Result<Run>>;

/// Bytes that a kernel must move, each once, and operations that it must do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Work {
    pub bytes: usize,
    pub flops: usize,
}

/// A prepared case.
pub(crate) struct Run {
    /// Launches it on the n-th of its sets of buffers, modulo their number.
    pub call: Box<dyn FnMut(usize) -> Result<()>>,
    /// What it writes: a launch that failed shows here. Empty for calls that report their own failures.
    pub outputs: Vec<Handle>,
}

impl Case {
    /// What `--only` searches.
    pub(crate) fn name(&self) -> String {
        format!("{} {} {}", self.kernel, self.shape, self.model)
    }
}
