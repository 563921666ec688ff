//! What a process may not do, whatever it is given.

use std::fmt;

use crate::program::{End, Ended};

/// A kind of failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Fault {
    Panic,
    /// Ended by a signal: memory that could not be had, a stack that was too small.
    Abort,
    /// Longer than the bound.
    Hang,
    /// More resident memory than the bound.
    Memory,
    /// An exit code that `qlora --help` does not document.
    Code,
    /// Failed without a word.
    Silent,
    /// Bytes of a file on the terminal that command it.
    Control,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Panic => "panic",
            Self::Abort => "abort",
            Self::Hang => "hang",
            Self::Memory => "memory",
            Self::Code => "exit-code",
            Self::Silent => "silent",
            Self::Control => "control-characters",
        })
    }
}

/// The fault of a process, and what tells it from others of its kind. `subcommand` is the first word of its command.
pub(crate) fn judge(ended: &Ended, subcommand: &str, target: &str) -> Option<(Fault, String)> {
    let place = || format!("{subcommand}, {target}");
    if let Some(place) = ended.panic() {
        return Some((Fault::Panic, place));
    }
    let code = match ended.end {
        End::Signal(signal) => {
            return Some((Fault::Abort, format!("signal {signal}, {}", last_words(&ended.errors()))));
        }
        End::TooSlow => return Some((Fault::Hang, place())),
        End::TooLarge => return Some((Fault::Memory, place())),
        End::Exit(code) => code,
    };
    if !(0..=3).contains(&code) {
        return Some((Fault::Code, format!("{code}, {}", place())));
    }
    if code != 0 && !ended.errors().contains("error") {
        return Some((Fault::Silent, place()));
    }
    // What a model generates is its own.
    let printed = if subcommand == "generate" { &b""[..] } else { &ended.stdout };
    if commands_the_terminal(printed) || commands_the_terminal(&ended.stderr) {
        return Some((Fault::Control, subcommand.to_owned()));
    }
    None
}

/// Whether bytes hold a control character but line ends and tabs; C1 controls count, which UTF-8 has as two bytes.
fn commands_the_terminal(bytes: &[u8]) -> bool {
    String::from_utf8_lossy(bytes).chars().any(|c| c.is_control() && !matches!(c, '\n' | '\r' | '\t'))
}

/// The last line of a message without its numbers: `memory allocation of N bytes failed`.
fn last_words(errors: &str) -> String {
    let line = errors.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("without a word");
    let mut words = String::new();
    for c in line.chars() {
        match c {
            '0'..='9' if words.ends_with('N') => {}
            '0'..='9' => words.push('N'),
            c => words.push(c),
        }
    }
    words.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn judged(end: End, stdout: &str, stderr: &str) -> Option<(Fault, String)> {
        let (stdout, stderr) = (stdout.as_bytes().to_vec(), stderr.as_bytes().to_vec());
        let ended = Ended { end, stdout, stderr, peak: 0, took: Duration::ZERO };
        judge(&ended, "inspect", "index")
    }

    #[test]
    fn errors_are_no_faults() {
        assert_eq!(judged(End::Exit(0), "Model\ttiny\n", ""), None);
        for code in 1..=3 {
            assert_eq!(judged(End::Exit(code), "", "error: config.json: no `vocab_size`\n"), None);
        }
    }

    #[test]
    fn faults_are_told_apart() {
        let place = "inspect, index".to_owned();
        let panic = "error: boom (mask.rs:7)\n  This is a failure of the device or a bug. RUST_BACKTRACE=1 shows\n";
        let oom = "memory allocation of 8589934592 bytes failed\n";
        for (expected, fault) in [
            ((Fault::Panic, "mask.rs:7".to_owned()), judged(End::Exit(1), "", panic)),
            (
                (Fault::Abort, "signal 6, memory allocation of N bytes failed".to_owned()),
                judged(End::Signal(6), "", oom),
            ),
            ((Fault::Abort, "signal 11, without a word".to_owned()), judged(End::Signal(11), "", "")),
            ((Fault::Hang, place.clone()), judged(End::TooSlow, "", "")),
            ((Fault::Memory, place.clone()), judged(End::TooLarge, "", "")),
            ((Fault::Code, "101, inspect, index".to_owned()), judged(End::Exit(101), "", "error: x")),
            ((Fault::Silent, place), judged(End::Exit(3), "", "")),
            ((Fault::Control, "inspect".to_owned()), judged(End::Exit(0), "name \u{1b}[31m\n", "")),
            ((Fault::Control, "inspect".to_owned()), judged(End::Exit(3), "", "error: `\u{9b}31m`\n")),
        ] {
            assert_eq!(fault, Some(expected));
        }
    }
}
