//! bitsandbytes and cuBLAS on the same shapes, in a Python of the user's.
//!
//! The script gets the cases as a JSON array of operations on standard input, and answers with one line of
//! JSON each: first what it is and its own ceilings, then `{"id", "seconds"}` or `{"id", "error"}`.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::case::Case;

/// What a peer answered.
pub(crate) struct Peer {
    pub about: About,
    /// Seconds by position of the case, or why there are none.
    pub times: BTreeMap<usize, Result<f64, String>>,
}

/// The script's first line.
#[derive(Deserialize)]
pub(crate) struct About {
    /// Names and versions of what was measured.
    pub versions: BTreeMap<String, String>,
    /// Bytes per second of a copy.
    pub bandwidth: f64,
    /// Operations per second of the best dense product.
    pub flops: f64,
}

#[derive(Deserialize)]
struct Answer {
    id: usize,
    seconds: Option<f64>,
    error: Option<String>,
}

impl Peer {
    pub(crate) fn run(python: &str, script: &Path, cases: &[Case]) -> Result<Self> {
        let operations: Vec<Value> = cases
            .iter()
            .enumerate()
            .filter_map(|(id, case)| {
                let mut operation = case.peer.clone()?;
                operation["id"] = json!(id);
                Some(operation)
            })
            .collect();
        let mut child = Command::new(python)
            .arg(script)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("can't start {python}"))?;
        let mut input = child.stdin.take().context("the peer has no standard input")?;
        // The script reads everything before it writes. If it ended early, its exit status says more.
        let _ = input.write_all(Value::Array(operations).to_string().as_bytes());
        drop(input);
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("{python} {} failed: {}; is bitsandbytes on PYTHONPATH?", script.display(), output.status);
        }
        Self::parse(&String::from_utf8_lossy(&output.stdout))
    }

    fn parse(text: &str) -> Result<Self> {
        // Libraries print to standard output as they please.
        let mut lines = text.lines().filter(|line| line.starts_with('{'));
        let about = serde_json::from_str(lines.next().context("the peer said nothing")?)?;
        let mut times = BTreeMap::new();
        for line in lines {
            let Answer { id, seconds, error } = serde_json::from_str(line).with_context(|| line.to_owned())?;
            times.insert(id, seconds.ok_or_else(|| error.unwrap_or_else(|| "no time".into())));
        }
        Ok(Self { about, times })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_between_other_output() {
        let text = "a library's greeting\n\
            {\"versions\": {\"torch\": \"2.11.0\"}, \"bandwidth\": 4.1e12, \"flops\": 7e14}\n\
            {\"id\": 3, \"seconds\": 0.002}\n\nwarning\n{\"id\": 4, \"error\": \"out of memory\"}\n";
        let peer = Peer::parse(text).unwrap();
        assert_eq!(peer.about.versions["torch"], "2.11.0");
        assert_eq!(peer.times, BTreeMap::from([(3, Ok(0.002)), (4, Err("out of memory".to_owned()))]));
        assert!(Peer::parse("nothing").is_err());
    }
}
