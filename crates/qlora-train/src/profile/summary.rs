//! A profile in tables: time by part of the step, and by kernel.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use super::{STEP, Trace};

/// Sums over the profiled steps.
#[derive(Clone, Debug, PartialEq)]
pub struct TraceSummary {
    /// Steps.
    pub steps: usize,
    /// Time of the steps on the host, from each one's beginning to its end.
    pub host: Duration,
    /// Time of all kernels together.
    pub device: Duration,
    /// Whether kernels were timed on the device's own clock.
    pub on_device: bool,
    /// Launches that could not be timed.
    pub unmeasured: usize,
    /// By part of the step, in the order in which they begin.
    pub parts: Vec<PartTime>,
    /// By kernel, the longest first.
    pub kernels: Vec<KernelTime>,
}

/// A part of the step.
#[derive(Clone, Debug, PartialEq)]
pub struct PartTime {
    /// Names of spans, the outer first: `block_backward > block` is the second forward pass of blocks.
    pub part: String,
    /// How often.
    pub count: usize,
    /// On the host.
    pub host: Duration,
    /// Of which in no part within it.
    pub own: Duration,
    /// Of the kernels that were launched in it, and in no part within it.
    pub device: Duration,
    /// Their number.
    pub launches: usize,
}

/// A kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    /// Its name, short.
    pub name: String,
    /// Launches.
    pub count: usize,
    /// All of them together.
    pub total: Duration,
}

pub(super) fn sum_up(trace: &Trace) -> TraceSummary {
    let mut parts: Vec<PartTime> = Vec::new();
    let mut index: HashMap<&str, usize> = HashMap::new();
    let mut spans: Vec<_> = trace.spans.iter().collect();
    spans.sort_by_key(|span| (span.start, std::cmp::Reverse(span.end)));
    let new = |part: &str| PartTime {
        part: part.to_owned(),
        count: 0,
        host: Duration::ZERO,
        own: Duration::ZERO,
        device: Duration::ZERO,
        launches: 0,
    };
    for span in spans {
        let at = *index.entry(&span.place).or_insert_with(|| {
            parts.push(new(&span.place));
            parts.len() - 1
        });
        let host = span.end - span.start;
        parts[at].count += 1;
        parts[at].host += host;
        parts[at].own += host.saturating_sub(span.inside);
    }
    let mut kernels: HashMap<String, KernelTime> = HashMap::new();
    for kernel in &trace.kernels {
        let time = kernel.end.saturating_sub(kernel.start);
        let at = *index.entry(&kernel.place).or_insert_with(|| {
            parts.push(new(&kernel.place));
            parts.len() - 1
        });
        parts[at].device += time;
        parts[at].launches += 1;
        let name = short_name(kernel.name);
        let empty = KernelTime { name: name.clone(), count: 0, total: Duration::ZERO };
        let sum = kernels.entry(name).or_insert(empty);
        sum.count += 1;
        sum.total += time;
    }
    let mut kernels: Vec<KernelTime> = kernels.into_values().collect();
    kernels.sort_by(|a, b| b.total.cmp(&a.total).then_with(|| a.name.cmp(&b.name)));
    let host = parts.iter().filter(|part| part.part == STEP).map(|part| part.host).sum();
    TraceSummary {
        steps: trace.steps,
        host,
        device: kernels.iter().map(|kernel| kernel.total).sum(),
        on_device: trace.kernels.iter().all(|kernel| kernel.on_device),
        unmeasured: trace.unmeasured,
        parts,
        kernels,
    }
}

/// A kernel's name without most of its path and nested parameters. CubeCL names a kernel by a Rust type that stands in a
/// module of the function's name: `a::rms_norm::forward_kernel::ForwardKernel` is `rms_norm::forward_kernel`.
pub fn short_name(name: &str) -> String {
    fn last(path: &str) -> &str {
        path.rsplit("::").next().unwrap_or(path)
    }
    let (head, parameters) = name.split_once('<').unwrap_or((name, ""));
    let path: Vec<&str> = head.split("::").filter(|part| *part != "base").collect();
    let short = match path[..] {
        [.., module, function, _] => format!("{module}::{function}"),
        _ => last(head).to_owned(),
    };
    // One simple parameter says what a generic kernel does.
    match parameters.strip_suffix('>') {
        Some(parameter) if !parameter.contains(['<', ',']) => format!("{short}<{}>", last(parameter)),
        _ => short,
    }
}

impl fmt::Display for TraceSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Duration| 1e3 * time.as_secs_f64();
        let share = |part: Duration, whole: Duration| 100.0 * part.as_secs_f64() / whole.as_secs_f64().max(1e-12);
        let plural = if self.steps == 1 { "" } else { "s" };
        write!(f, "{} step{plural} profiled: {:.1} ms on the host", self.steps, ms(self.host))?;
        if !self.kernels.is_empty() {
            let clock = if self.on_device { "" } else { ", by the host's clock" };
            let launches: usize = self.kernels.iter().map(|kernel| kernel.count).sum();
            write!(f, ", {:.1} ms in {launches} kernels{clock}", ms(self.device))?;
        }
        if self.unmeasured > 0 {
            write!(f, "; {} launches have no time", self.unmeasured)?;
        }
        let width = self.parts.iter().map(|part| part.part.len()).max().unwrap_or_default().max(20);
        write!(
            f,
            "\n\n{:<width$} {:>7} {:>10} {:>10} {:>6}",
            "part of the step", "count", "host ms", "own ms", "share"
        )?;
        if !self.kernels.is_empty() {
            write!(f, " {:>10} {:>6} {:>8}", "device ms", "share", "launches")?;
        }
        writeln!(f)?;
        for part in &self.parts {
            let PartTime { part, count, host, own, device, launches } = part;
            let (of_host, of_device) = (share(*own, self.host), share(*device, self.device));
            write!(f, "{part:<width$} {count:>7} {:>10.2} {:>10.2} {of_host:>4.1} %", ms(*host), ms(*own))?;
            if !self.kernels.is_empty() {
                write!(f, " {:>10.2} {of_device:>4.1} % {launches:>8}", ms(*device))?;
            }
            writeln!(f)?;
        }
        if self.kernels.is_empty() {
            return Ok(());
        }
        let width = self.kernels.iter().map(|kernel| kernel.name.len()).max().unwrap_or_default().max(20);
        writeln!(f, "\n{:<width$} {:>7} {:>10} {:>10} {:>6}", "kernel", "count", "total ms", "each us", "share")?;
        for KernelTime { name, count, total } in &self.kernels {
            let each = 1e3 * ms(*total) / *count as f64;
            let share = share(*total, self.device);
            writeln!(f, "{name:<width$} {count:>7} {:>10.2} {each:>10.1} {share:>4.1} %", ms(*total))?;
        }
        Ok(())
    }
}
