//! Failures of single system calls, by `strace`: what a full disk, a broken one or a kill at exactly this point does.
//!
//! A first run is only watched: its log says which thread made which call on the output folder, and the how manieth of
//! its kind that was. Then one of them fails, or the process is killed as it enters the call.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::random::Dice;

/// Calls that change or read files, and the errors that they may give. A question mark: not every machine has the call.
const CALLS: &[(&str, &[&str])] = &[
    ("openat", &["EIO", "EMFILE", "ENOSPC"]),
    ("read", &["EIO"]),
    ("write", &["ENOSPC", "EIO"]),
    ("fsync", &["EIO", "ENOSPC"]),
    ("?rename", &["EIO", "ENOSPC"]),
    ("?renameat", &["EIO", "ENOSPC"]),
    ("renameat2", &["EIO", "ENOSPC"]),
    ("?unlink", &["EIO", "EROFS"]),
    ("unlinkat", &["EIO", "EBUSY"]),
    ("?rmdir", &["EIO", "EBUSY"]),
    ("?mkdir", &["ENOSPC", "EIO"]),
    ("mkdirat", &["ENOSPC", "EIO"]),
    ("flock", &["ENOLCK"]),
    ("ftruncate", &["EIO"]),
    ("getdents64", &["EIO"]),
];

/// A call that a run makes on its output: which, and the how manieth of its thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    name: String,
    nth: usize,
}

/// What happens to a call.
#[derive(Debug, Clone)]
pub(crate) struct Injection {
    call: Call,
    /// An error's name; `None` kills the process.
    pub(crate) error: Option<String>,
}

/// Whether strace is there, and may kill what it traces.
pub(crate) fn is_there() -> bool {
    let kill = Injection { call: Call { name: "write".into(), nth: 1 }, error: None };
    let outer = inject(&kill, Path::new("/dev/null"));
    let mut probe = Command::new(&outer[0]);
    probe.args(&outer[1..]).args(["echo", "x"]);
    let status = probe.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    // strace ends as the program did; a shell would say 128 + 9.
    status.is_ok_and(|status| status.code().is_none_or(|code| code == 137))
}

/// The command before the program that watches it.
pub(crate) fn watch(log: &Path) -> Vec<String> {
    let calls: Vec<&str> = CALLS.iter().map(|(name, _)| *name).collect();
    let mut outer = strace(log);
    outer.extend(["--seccomp-bpf".into(), "-y".into(), "-e".into(), format!("trace={}", calls.join(","))]);
    outer
}

/// The command before the program in which one call fails. The log tells whether it came to that call.
pub(crate) fn inject(injection: &Injection, log: &Path) -> Vec<String> {
    let Injection { call: Call { name, nth }, error } = injection;
    let mut outer = strace(log);
    let what = match error {
        Some(error) => {
            // Only the calls in question stop the process. Signals are not sent then, strace 6.1 says nothing of it.
            outer.push("--seccomp-bpf".into());
            format!("error={error}")
        }
        None => "signal=KILL".to_owned(),
    };
    outer.extend(["-e".into(), format!("trace={name}"), "-e".into(), format!("inject={name}:{what}:when={nth}")]);
    outer
}

/// Whether it came to an error, by the log.
pub(crate) fn came(log: &str) -> bool {
    log.contains("(INJECTED)")
}

fn strace(log: &Path) -> Vec<String> {
    let log = log.display().to_string();
    ["strace", "-f", "-q", "-e", "signal=none", "-s", "0", "-o", &log].map(str::to_owned).to_vec()
}

/// The calls in strace's log that name `output`.
pub(crate) fn calls_on(output: &Path, log: &str) -> Vec<Call> {
    let output = output.display().to_string();
    let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    let mut found = Vec::new();
    for line in log.lines() {
        let Some((thread, rest)) = line.split_once(' ') else { continue };
        // `<... write resumed>` is the second half of a call that was counted.
        let Some((name, arguments)) = rest.trim_start().split_once('(') else { continue };
        if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
            continue;
        }
        let nth = counts.entry((thread, name)).or_default();
        *nth += 1;
        if arguments.contains(&output) {
            found.push(Call { name: name.to_owned(), nth: *nth });
        }
    }
    found
}

/// Draws a failure: kinds of calls alike, however many there are of each.
pub(crate) fn draw(dice: &mut Dice, calls: &[Call]) -> Result<Injection> {
    let mut names: Vec<&str> = calls.iter().map(|call| call.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    let name = *names.get(dice.below(names.len())).context("strace saw no call on the output folder")?;
    let of_kind: Vec<&Call> = calls.iter().filter(|call| call.name == name).collect();
    let call = (*dice.pick(&of_kind)).clone();
    let errors =
        CALLS.iter().find(|(known, _)| known.trim_start_matches('?') == name).map_or(&["EIO"][..], |(_, all)| all);
    let error = if dice.once_in(3) { None } else { Some((*dice.pick(errors)).to_owned()) };
    Ok(Injection { call, error })
}

impl std::fmt::Display for Injection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { call: Call { name, nth }, error } = self;
        write!(f, "{} at {name} number {nth}", error.as_deref().unwrap_or("SIGKILL"))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const LOG: &str = "\
7 openat(AT_FDCWD, \"/lib/libc.so.6\", O_RDONLY|O_CLOEXEC) = 3</lib/libc.so.6>
7 openat(AT_FDCWD, \"/t/out/metrics.jsonl\", O_WRONLY|O_CREAT, 0666) = 4</t/out/metrics.jsonl>
8 write(5<pipe:[1]>, \"\"..., 1 <unfinished ...>
7 write(4</t/out/metrics.jsonl>, \"\"..., 90 <unfinished ...>
8 <... write resumed>) = 1
7 <... write resumed>) = 90
7 write(2</t/err>, \"\"..., 4) = 4
7 write(4</t/out/metrics.jsonl>, \"\"..., 90) = 90
7 +++ exited with 0 +++
";

    #[test]
    fn calls_are_counted_by_thread_and_kind() {
        let call = |name: &str, nth| Call { name: name.to_owned(), nth };
        let found = calls_on(Path::new("/t/out"), LOG);
        assert_eq!(found, [call("openat", 2), call("write", 1), call("write", 3)]);
    }

    #[test]
    fn a_drawn_failure_is_one_that_the_call_can_have() {
        let calls = calls_on(Path::new("/t/out"), LOG);
        let mut dice = Dice::new(0, 0);
        let mut kills = 0;
        for _ in 0..200 {
            let injection = draw(&mut dice, &calls).unwrap();
            assert!(calls.contains(&injection.call));
            match &injection.error {
                None => kills += 1,
                Some(error) if injection.call.name == "write" => assert!(["ENOSPC", "EIO"].contains(&error.as_str())),
                Some(error) => assert!(["EIO", "EMFILE", "ENOSPC"].contains(&error.as_str())),
            }
        }
        assert!((40..100).contains(&kills), "about a third: {kills}");
        assert!(draw(&mut dice, &[]).is_err());
    }

    #[test]
    fn strace_is_told_which_call() {
        let call = Call { name: "fsync".into(), nth: 3 };
        let line = inject(&Injection { call: call.clone(), error: Some("EIO".into()) }, Path::new("l")).join(" ");
        assert!(line.ends_with("-e trace=fsync -e inject=fsync:error=EIO:when=3"), "{line}");
        let kill = Injection { call, error: None };
        let line = inject(&kill, Path::new("l")).join(" ");
        assert!(line.ends_with("inject=fsync:signal=KILL:when=3") && !line.contains("seccomp"), "{line}");
        assert!(came("7 fsync(4) = -1 EIO (Input/output error) (INJECTED)\n") && !came(LOG));
        assert_eq!(kill.to_string(), "SIGKILL at fsync number 3");
    }
}
