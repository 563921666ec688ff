//! Chrome's trace event format, JSON: complete events (`ph` X) in microseconds, the host as one process and the device
//! as another (<https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU>).

use std::io::{self, Write};
use std::time::Duration;

use serde_json::{Value, json};

use super::{Trace, short_name};

const HOST: u64 = 1;
const DEVICE: u64 = 2;

fn event(
    name: &str,
    category: &str,
    process: u64,
    thread: u64,
    [start, end]: [Duration; 2],
    arguments: Value,
) -> Value {
    let micros = |time: Duration| time.as_nanos() as f64 / 1e3;
    json!({
        "name": name,
        "cat": category,
        "ph": "X",
        "ts": micros(start),
        "dur": micros(end.saturating_sub(start)),
        "pid": process,
        "tid": thread,
        "args": arguments,
    })
}

fn named(kind: &str, process: u64, thread: u64, name: &str) -> Value {
    json!({"name": kind, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}})
}

/// One event a line.
pub(super) fn write(trace: &Trace, file: &mut impl Write) -> io::Result<()> {
    let mut lines = vec![named("process_name", HOST, 0, "host")];
    let threads = trace.spans.iter().map(|span| span.thread).max().unwrap_or_default();
    lines.extend((1..=threads).map(|thread| named("thread_name", HOST, thread, &format!("thread {thread}"))));
    for span in &trace.spans {
        let arguments = json!({"part": &*span.place});
        lines.push(event(&span.label, "host", HOST, span.thread, [span.start, span.end], arguments));
    }
    if !trace.kernels.is_empty() {
        lines.push(named("process_name", DEVICE, 0, "device"));
        lines.push(named("thread_name", DEVICE, 1, "kernels"));
    }
    for kernel in &trace.kernels {
        let arguments = json!({"kernel": kernel.name, "part": &*kernel.place});
        let name = short_name(kernel.name);
        lines.push(event(&name, "kernel", DEVICE, 1, [kernel.start, kernel.end], arguments));
    }
    file.write_all(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n")?;
    for (index, line) in lines.iter().enumerate() {
        let comma = if index + 1 < lines.len() { "," } else { "" };
        writeln!(file, "{line}{comma}")?;
    }
    file.write_all(b"]}\n")
}
