//! PEFT, TRL and Unsloth on the same cases, in a Python of the user's.
//!
//! Each script gets shape, rank, optimizer and cases on its command line, and answers with a line of JSON for each
//! case: figures, or why there are none. What is not installed, or does not fit, is a line that says so.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::case::{Case, Fill};

/// What a peer did on a case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// Name and versions.
    pub peer: String,
    /// As we write it.
    pub case: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// The highest of torch's allocator: bytes of tensors, and of its segments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allocated_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reserved_bytes: Option<u64>,
    /// The driver's figure after the last step, less what was used before the process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Answer {
    /// Its line of the table.
    pub(crate) fn line(&self) -> String {
        let start = format!("{:<40} {:>16}", self.peer, self.case);
        let (Some(seconds), Some(rate)) = (self.step_seconds, self.tokens_per_second) else {
            return format!("{start}  {}", self.error.as_deref().unwrap_or("no time"));
        };
        let gib = |bytes: Option<u64>| match bytes {
            Some(bytes) => format!("{:.2}", bytes as f64 / f64::from(1 << 30)),
            None => "-".into(),
        };
        let [allocated, reserved, driver] = [self.allocated_bytes, self.reserved_bytes, self.driver_bytes].map(gib);
        format!("{start}  {:>9.1} {rate:>8.0} {allocated:>10} {reserved:>8} {driver:>7}", seconds * 1e3)
    }

    /// The heads of its columns.
    pub(crate) fn header() -> String {
        let [peer, case, ms, rate] = ["peer", "case", "step ms", "tok/s"];
        let [allocated, reserved, driver] = ["allocated", "reserved", "driver"];
        format!("{peer:<40} {case:>16}  {ms:>9} {rate:>8} {allocated:>10} {reserved:>8} {driver:>7}")
    }
}

/// Runs a script and hands its answers on as they come.
pub(crate) fn run(python: &str, script: &Path, arguments: &[String], mut answered: impl FnMut(Answer)) -> Result<()> {
    if !script.is_file() {
        bail!("{}: no such file; --peer-script names them", script.display());
    }
    let mut child = Command::new(python)
        .arg(script)
        .args(arguments)
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("can't start {python}"))?;
    let output = child.stdout.take().context("the peer has no output")?;
    let mut unreadable = None;
    for line in BufReader::new(output).lines() {
        let line = line?;
        match parse(&line) {
            Some(answer) => answered(answer),
            None if line.starts_with(ANSWER) => unreadable = Some(line),
            // Libraries print to standard output as they please.
            None => {}
        }
    }
    let status = child.wait()?;
    if let Some(line) = unreadable {
        bail!("{python} {} answered what can't be read: {line}", script.display());
    }
    if !status.success() {
        bail!("{python} {} ended: {status}", script.display());
    }
    Ok(())
}

/// How an answer begins.
const ANSWER: &str = "{\"peer\"";

fn parse(line: &str) -> Option<Answer> {
    serde_json::from_str(line).ok()
}

/// Whether a script has steps on such a case: those named `*_trl.py` or `*_dpo.py` compare answers, the others have full rows alone.
pub(crate) fn takes(script: &Path, case: Case) -> bool {
    let name = script.file_name().unwrap_or_default().to_string_lossy();
    let compares = name.ends_with("_trl.py") || name.ends_with("_dpo.py");
    if compares { case.fill.is_pairs() } else { case.fill == Fill::Full }
}

/// The arguments of every script.
pub(crate) fn arguments(settings: &[(&str, String)], cases: &[Case]) -> Vec<String> {
    let settings = settings.iter().flat_map(|(flag, value)| [format!("--{flag}"), value.clone()]);
    settings.chain(cases.iter().map(Case::to_string)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_between_other_output() {
        assert_eq!(parse("Unsloth greets you"), None);
        let line = r#"{"peer": "PEFT", "case": "4x2048", "step_seconds": 1.25, "tokens_per_second": 6553.6}"#;
        let answer = parse(line).unwrap();
        assert_eq!((answer.step_seconds, answer.error.as_deref()), (Some(1.25), None));
        assert!(answer.line().contains("1250.0"), "{}", answer.line());
        // JSON has no such number.
        assert_eq!(parse(r#"{"peer": "PEFT", "case": "4x2048", "loss": NaN}"#), None);
        let failed = parse(r#"{"peer": "PEFT", "case": "4x2048", "error": "out of memory"}"#).unwrap();
        assert!(failed.line().ends_with("out of memory"), "{}", failed.line());
    }

    #[test]
    fn settings_come_before_cases() {
        let cases = [Case::full(4, 512)];
        assert_eq!(arguments(&[("rank", "64".into())], &cases), ["--rank", "64", "4x512"]);
    }

    #[test]
    fn scripts_that_compare_answers_take_pairs_and_others_full_rows() {
        for script in ["bench_step_trl.py", "a/bench_step_unsloth_dpo.py", "bench_step_peft.py", "a_dpo.py/b.py"] {
            let takes = |case: &str| takes(Path::new(script), case.parse().unwrap());
            let compares = script.ends_with("_trl.py") || script.ends_with("_dpo.py");
            for (case, taken) in [("2x8-pairs", compares), ("2x8-pairs-ahead", compares), ("2x8", !compares)] {
                assert_eq!(takes(case), taken, "{script} {case}");
            }
            assert!(!takes("2x8-packed") && !takes("2x8-padded"), "{script}");
        }
    }

    #[test]
    fn an_answer_that_cannot_be_read_is_told() {
        let script = std::env::temp_dir().join(format!("peer-{}.sh", std::process::id()));
        std::fs::write(&script, "echo hello\necho '{\"peer\": \"PEFT\", \"case\": \"1x1\", \"loss\": NaN}'\n").unwrap();
        let error = run("sh", &script, &[], |answer| panic!("{answer:?}")).unwrap_err().to_string();
        std::fs::remove_file(&script).unwrap();
        assert!(error.contains("\"loss\": NaN"), "{error}");
    }

    #[test]
    fn a_peer_that_is_not_there_is_an_error_that_says_so() {
        let error = run("python3", Path::new("no/such.py"), &[], |_| {}).unwrap_err().to_string();
        assert!(error.contains("no/such.py"), "{error}");
    }
}
