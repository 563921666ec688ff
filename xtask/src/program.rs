//! The `qlora` program as a process: where it is, how it is started, and how it ended.
//!
//! Everything that it prints goes to files: a pipe that nobody empties would stop it. It gets no network, and none of
//! the variables that change what a panic prints.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// What the hook in `crates/qlora-cli/src/exit.rs` prints after the message of a panic.
const PANIC: &str = "This is a failure of the device or a bug.";
/// How much of what a process printed is looked at.
const READ: u64 = 1 << 20;
/// Time between two looks at a process.
const TICK: Duration = Duration::from_millis(2);

/// A built `qlora`.
#[derive(Debug, Clone)]
pub(crate) struct Program {
    path: PathBuf,
}

impl Program {
    /// The one that is given, or one that cargo builds now.
    pub(crate) fn new(given: Option<&Path>) -> Result<Self> {
        let path = match given {
            Some(path) => std::path::absolute(path)?,
            None => crate::bench::build("qlora")?,
        };
        if !path.is_file() {
            bail!("there is no program {}; --qlora names one that is built", path.display());
        }
        Ok(Self { path })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The version that it prints.
    pub(crate) fn version(&self) -> Result<String> {
        let output = self.prepare(Command::new(&self.path)).arg("--version").output();
        let output = output.with_context(|| format!("can't start {}", self.path.display()))?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    }

    /// Starts it with what it prints in `stdout.txt` and `stderr.txt` of the folder `logs`.
    pub(crate) fn start(&self, args: &[String], cwd: &Path, logs: &Path) -> Result<Running> {
        self.start_under(&[], args, cwd, logs)
    }

    /// [`Self::start`] as the argument of another program, such as `strace -f`.
    pub(crate) fn start_under(&self, outer: &[String], args: &[String], cwd: &Path, logs: &Path) -> Result<Running> {
        let file = |name| File::create(logs.join(name)).with_context(|| logs.join(name).display().to_string());
        let mut command = match outer {
            [] => Command::new(&self.path),
            [outer, rest @ ..] => {
                let mut command = Command::new(outer);
                command.args(rest).arg(&self.path);
                command
            }
        };
        command.args(args).current_dir(cwd).stdin(Stdio::null());
        command.stdout(file("stdout.txt")?).stderr(file("stderr.txt")?);
        let started = Instant::now();
        let child = self.prepare(command).spawn().with_context(|| format!("can't start {}", self.path.display()))?;
        Ok(Running { child, started, logs: logs.to_owned() })
    }

    fn prepare(&self, mut command: Command) -> Command {
        for name in ["RUST_BACKTRACE", "RUST_LOG", "HF_TOKEN"] {
            command.env_remove(name);
        }
        command.env("HF_HUB_OFFLINE", "1");
        command
    }
}

/// A process that was started.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    started: Instant,
    logs: PathBuf,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// With this exit code.
    Exit(i32),
    /// By this signal.
    Signal(i32),
    /// It was ended because it took too long.
    TooSlow,
    /// It was ended because it had more memory than it may.
    TooLarge,
}

/// What a process may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Of a processor; five times that while it waits for one.
    pub(crate) time: Duration,
    /// Resident bytes; looked at on Linux only.
    pub(crate) memory: u64,
}

/// A process that has ended.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    pub(crate) end: End,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    /// The most resident bytes that were seen; 0 where they can't be.
    pub(crate) peak: u64,
    pub(crate) took: Duration,
}

impl Running {
    /// Since when it runs.
    pub(crate) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Whether it has ended.
    pub(crate) fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Sends a signal by its number; nothing happens when the process has ended.
    pub(crate) fn signal(&mut self, signal: i32) -> Result<()> {
        if self.has_ended()? {
            return Ok(());
        }
        #[cfg(unix)]
        {
            use nix::sys::signal::{Signal, kill};
            use nix::unistd::Pid;
            let signal = Signal::try_from(signal).with_context(|| format!("no signal {signal}"))?;
            // Process ids fit.
            Ok(kill(Pid::from_raw(self.child.id().cast_signed()), signal)?)
        }
        #[cfg(not(unix))]
        bail!("signal {signal}: this system has no signals")
    }

    /// Waits for the end, and brings it about at the bounds.
    pub(crate) fn wait(mut self, bounds: Bounds) -> Result<Ended> {
        let mut peak = 0;
        let mut forced = None;
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if is_itself(self.child.id()) {
                peak = peak.max(resident(self.child.id()));
            }
            if peak > bounds.memory {
                forced = Some(End::TooLarge);
            } else if is_over(self.elapsed(), processor_time(self.child.id()), bounds.time) {
                forced = Some(End::TooSlow);
            }
            if forced.is_some() {
                // It may have ended in between.
                let _ = self.child.kill();
                break self.child.wait()?;
            }
            sleep(TICK);
        };
        let took = self.elapsed();
        let end = forced.unwrap_or_else(|| end_of(status));
        Ok(Ended { end, stdout: read(&self.logs, "stdout.txt")?, stderr: read(&self.logs, "stderr.txt")?, peak, took })
    }
}

impl Drop for Running {
    /// Nothing outlives a test that was left early.
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

impl Ended {
    /// What went to the standard error.
    pub(crate) fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Where it panicked: `file.rs:12`, or the message where the place is not printed.
    pub(crate) fn panic(&self) -> Option<String> {
        panic_place(&self.errors())
    }

    /// The error that it ended with, without paths and numbers.
    pub(crate) fn message(&self) -> String {
        let errors = self.errors();
        let line = errors.lines().find_map(|line| line.strip_prefix("error: ")).unwrap_or_default();
        let words = line.split_whitespace().filter(|word| !word.contains('/'));
        let words = words.map(|word| if word.bytes().any(|byte| byte.is_ascii_digit()) { "N" } else { word });
        words.collect::<Vec<_>>().join(" ").escape_debug().take(120).collect()
    }

    /// Its end and the last lines that it printed, for a message.
    pub(crate) fn describe(&self) -> String {
        let errors = self.errors();
        let lines: Vec<&str> = errors.lines().collect();
        let tail = lines[lines.len().saturating_sub(6)..].join("\n    ");
        format!("{:?} after {:.1} s\n    {tail}", self.end, self.took.as_secs_f64())
    }
}

/// The place in what a panic prints, by the program's own hook or by Rust's.
fn panic_place(errors: &str) -> Option<String> {
    if let Some(at) = errors.find(PANIC) {
        let line = errors[..at].trim_end().lines().next_back().unwrap_or_default();
        let place = line.rsplit_once('(').map_or(line, |(_, place)| place.trim_end_matches(')'));
        return Some(place.to_owned());
    }
    let after = errors.split_once("panicked at ")?.1;
    let place = after.lines().next().unwrap_or_default().trim_end_matches(':');
    // Without the column: a place is a line.
    Some(place.rsplit_once(':').map_or(place, |(line, _)| line).rsplit('/').next().unwrap_or(place).to_owned())
}

fn end_of(status: ExitStatus) -> End {
    #[cfg(unix)]
    if let Some(signal) = std::os::unix::process::ExitStatusExt::signal(&status) {
        return End::Signal(signal);
    }
    End::Exit(status.code().unwrap_or(-1))
}

/// Whether a process that runs for `elapsed` and has had `busy` of a processor, where that is known, took too long. On a
/// machine that is busy with other things it may wait.
fn is_over(elapsed: Duration, busy: Option<Duration>, bound: Duration) -> bool {
    elapsed > bound * 5 || elapsed > bound && busy.is_none_or(|busy| busy > bound)
}

/// What a process has had of processors, all its threads together, as Linux tells it in hundredths of a second.
fn processor_time(pid: u32) -> Option<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold blanks. Time in the program is the field number 14, in the kernel 15.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(Duration::from_millis(10 * (next()? + next()?)))
}

/// Whether a child is the program that it was started as: for a moment it shares its parent's memory.
fn is_itself(pid: u32) -> bool {
    let program = |pid: &str| std::fs::read_link(format!("/proc/{pid}/exe")).ok();
    program(&pid.to_string()) != program("self")
}

/// The most resident bytes that a process has had, as Linux counts them.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

fn read(logs: &Path, name: &str) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(logs.join(name))?.take(READ).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_panic_is_told_from_an_error() {
        let hook =
            "note: x\nerror: index out of (bounds) (decoder.rs:41)\n  This is a failure of the device or a bug. RUST";
        assert_eq!(panic_place(hook).as_deref(), Some("decoder.rs:41"));
        let rust = "\nthread 'main' (12) panicked at crates/chat-text/src/mask.rs:7:13:\nboom\n";
        assert_eq!(panic_place(rust).as_deref(), Some("mask.rs:7"));
        assert_eq!(panic_place("error: m/config.json: `vocab_size` is missing\n"), None);
    }

    #[test]
    fn a_process_that_waits_for_a_processor_is_not_slow() {
        let seconds = Duration::from_secs;
        for (elapsed, busy, over) in
            [(19, Some(19), false), (21, Some(21), true), (60, Some(3), false), (101, Some(3), true), (21, None, true)]
        {
            assert_eq!(is_over(seconds(elapsed), busy.map(seconds), seconds(20)), over, "{elapsed} {busy:?}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn processor_time_is_read() {
        let before = processor_time(std::process::id()).unwrap();
        let started = Instant::now();
        let mut sum = 0_u64;
        while started.elapsed() < Duration::from_millis(300) {
            sum = std::hint::black_box(sum.wrapping_add(1));
        }
        assert!(processor_time(std::process::id()).unwrap() > before);
    }

    #[cfg(unix)]
    #[test]
    fn ends_and_bounds_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let shell = Program { path: "/bin/sh".into() };
        let run = |script: &str, time: u64| {
            let args = ["-c".to_owned(), script.to_owned()];
            let running = shell.start(&args, dir.path(), dir.path()).unwrap();
            running.wait(Bounds { time: Duration::from_millis(time), memory: 1 << 30 }).unwrap()
        };
        let ended = run("echo out; echo err >&2; exit 3", 10_000);
        assert_eq!(
            (ended.end, ended.stdout.as_slice(), ended.errors().as_str()),
            (End::Exit(3), &b"out\n"[..], "err\n")
        );
        assert_eq!(run("kill -9 $$", 10_000).end, End::Signal(9));
        assert_eq!(run("exec sleep 30", 100).end, End::TooSlow);
        let mut running = shell.start(&["-c".into(), "exec sleep 30".into()], dir.path(), dir.path()).unwrap();
        running.signal(15).unwrap();
        let ended = running.wait(Bounds { time: Duration::from_secs(10), memory: 1 << 30 }).unwrap();
        assert_eq!(ended.end, End::Signal(15));
    }
}
