//! `--gpus N`: starts the ranks of a run on this host, and ends with them.
//!
//! Each rank is this program with the same arguments, told its place by torchrun's variables. Rank 0's output is this program's; what
//! the others say, which is errors, gets their number before it. Signals are passed on, so that all stop after the same step. Ranks
//! have process groups of their own: else a Ctrl-C would reach them twice.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::io::{BufRead as _, BufReader, IsTerminal as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use burn_qlora::qlora_dist::Place;

use crate::exit::{Code, InputError};
use crate::output::say;
use crate::signals;

/// How long the others may take to end after one has failed: rank 0 saves what was done.
const GRACE: Duration = Duration::from_secs(30);
/// The same once rank 0 has ended, which alone has something to save.
const SHORT_GRACE: Duration = Duration::from_secs(2);
const THREADS_VARIABLE: &str = "RAYON_NUM_THREADS";

/// Runs `count` ranks to their end.
///
/// # Errors
/// They can't be started.
pub fn run(count: usize) -> Result<Code> {
    let program = std::env::current_exe().context("can't find this program's own file to start ranks with")?;
    let place = Place::first_of(count).context("this host gives no port for the ranks to meet at")?;
    let mut ranks = Ranks { living: Arc::default(), ended: Vec::new(), said: Arc::default() };
    let pids = Arc::clone(&ranks.living);
    signals::on_interrupt(move || interrupt(&pids))?;
    let threads = std::env::var_os(THREADS_VARIABLE).unwrap_or_else(|| share_of_cores(count).to_string().into());
    for rank in 0..count {
        let mut command = Command::new(&program);
        command.args(without_gpus(std::env::args_os().skip(1))).env(THREADS_VARIABLE, &threads);
        command.envs(Place { rank, local_rank: rank, ..place.clone() }.to_env());
        // Held until this process ends, however it does: that is how a rank notices.
        command.stdin(Stdio::piped());
        if rank > 0 {
            command.stdout(Stdio::null()).stderr(Stdio::piped());
        }
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        match command.spawn() {
            Ok(child) => ranks.add(rank, child),
            Err(error) => {
                ranks.kill();
                return Err(InputError(format!("can't start rank {rank} ({}): {error}", program.display())).into());
            }
        }
    }
    Ok(ranks.wait())
}

/// A rank that runs.
struct Rank {
    rank: usize,
    child: Child,
    /// Passes on what it says.
    voice: Option<JoinHandle<()>>,
}

/// A rank that has ended.
#[derive(Clone, Copy, Debug)]
struct Ended {
    rank: usize,
    /// Its exit code, where it was not killed.
    code: Option<i32>,
    /// Whether this process killed it.
    by_us: bool,
    at: Instant,
}

/// The ranks that were started.
struct Ranks {
    living: Arc<Mutex<Vec<Rank>>>,
    /// In the order in which they did.
    ended: Vec<Ended>,
    /// Warnings of ranks but the first.
    said: Arc<Mutex<HashSet<String>>>,
}

impl Ranks {
    fn add(&self, rank: usize, mut child: Child) {
        // Rank 0 draws its bar where these lines go: they take its place, and it is drawn again below them.
        let clear = if std::io::stderr().is_terminal() { "\r\u{1b}[2K" } else { "" };
        let said = Arc::clone(&self.said);
        let say_for = |stderr| {
            let lines = BufReader::new(stderr).lines().map_while(Result::ok);
            // What libraries warn of is the same on each rank.
            let is_new = move |line: &String| {
                !line.starts_with("warning: ")
                    || said.lock().unwrap_or_else(PoisonError::into_inner).insert(line.clone())
            };
            move || lines.filter(is_new).for_each(|line| say!("{clear}rank {rank}: {line}"))
        };
        let voice = child.stderr.take().map(|stderr| std::thread::spawn(say_for(stderr)));
        lock(&self.living).push(Rank { rank, child, voice });
    }

    /// Waits for all, ends those that do not end when one has failed, and returns the code of the run.
    fn wait(mut self) -> Code {
        loop {
            self.collect();
            if lock(&self.living).is_empty() {
                break;
            }
            if self.deadline().is_some_and(|deadline| Instant::now() >= deadline) {
                self.kill();
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        outcome(&self.ended)
    }

    /// When those that still run have to end, once one has failed.
    fn deadline(&self) -> Option<Instant> {
        let failed = self.ended.iter().find(|ended| ended.code != Some(0))?.at;
        Some(match self.ended.iter().find(|ended| ended.rank == 0) {
            Some(first) => failed.max(first.at) + SHORT_GRACE,
            None => failed + GRACE,
        })
    }

    /// Takes note of the ranks that have ended.
    fn collect(&mut self) {
        let mut living = lock(&self.living);
        for index in (0..living.len()).rev() {
            let status = match living[index].child.try_wait() {
                Ok(None) => continue,
                Ok(Some(status)) => Some(status),
                // Of which nothing is known.
                Err(_) => None,
            };
            let rank = living.remove(index);
            if let Some(signal) = status.as_ref().and_then(signal_of) {
                say!("error: rank {} was killed by signal {signal}", rank.rank);
            }
            self.ended.push(rank.into_ended(status, false));
        }
    }

    /// Ends what is left.
    fn kill(&mut self) {
        for mut rank in lock(&self.living).drain(..) {
            say!("rank {} does not end by itself, and is killed", rank.rank);
            // Fails only where it has just ended.
            let _ = rank.child.kill();
            let status = rank.child.wait().ok();
            self.ended.push(rank.into_ended(status, true));
        }
    }
}

impl Rank {
    fn into_ended(self, status: Option<ExitStatus>, by_us: bool) -> Ended {
        // All that it said, before its end is told.
        self.voice.into_iter().for_each(|voice| drop(voice.join()));
        Ended { rank: self.rank, code: status.and_then(|status| status.code()), by_us, at: Instant::now() }
    }
}

fn lock(ranks: &Mutex<Vec<Rank>>) -> std::sync::MutexGuard<'_, Vec<Rank>> {
    ranks.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Passes an interruption on to the ranks that run.
fn interrupt(living: &Mutex<Vec<Rank>>) {
    #[cfg(unix)]
    for Rank { child, .. } in lock(living).iter() {
        use nix::sys::signal::{Signal, kill};
        if let Ok(pid) = i32::try_from(child.id()) {
            // Not waited for yet, so the number is still its own.
            let _ = kill(nix::unistd::Pid::from_raw(pid), Signal::SIGINT);
        }
    }
    // Elsewhere a console tells all of its processes.
    #[cfg(not(unix))]
    let _ = living;
}

/// The code of a run whose ranks ended so: that of the first that failed by itself.
fn outcome(ended: &[Ended]) -> Code {
    let codes = || ended.iter().filter(|ended| !ended.by_us).map(|ended| ended.code);
    let has = |code: Code| codes().any(|other| other == Some(code as i32));
    let known = [Code::Done, Code::Interrupted, Code::OtherRank];
    match codes().find(|code| !known.iter().any(|known| *code == Some(*known as i32))) {
        Some(code) => {
            let told = [Code::Usage, Code::Input].into_iter().find(|told| code == Some(*told as i32));
            told.unwrap_or(Code::Failed)
        }
        None if has(Code::OtherRank) => Code::Failed,
        None if has(Code::Interrupted) => Code::Interrupted,
        None => Code::Done,
    }
}

#[cfg(unix)]
fn signal_of(status: &ExitStatus) -> Option<i32> {
    std::os::unix::process::ExitStatusExt::signal(status)
}

#[cfg(not(unix))]
fn signal_of(_: &ExitStatus) -> Option<i32> {
    None
}

/// Threads for each of `count` ranks.
fn share_of_cores(count: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    (cores / count).max(1)
}

/// The arguments but for `--gpus N`.
fn without_gpus(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut kept = Vec::new();
    let mut args = args.peekable();
    while let Some(arg) = args.next() {
        if arg == OsStr::new("--gpus") {
            args.next();
        } else if !arg.to_string_lossy().starts_with("--gpus=") {
            kept.push(arg);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_started_with_the_same_arguments() {
        let of = |line: &str| {
            let kept = without_gpus(line.split(' ').map(OsString::from));
            kept.iter().map(|arg| arg.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(of("train --gpus 2 x.toml --rank 8"), "train x.toml --rank 8");
        assert_eq!(of("train x.toml --rank 8 --gpus=2"), "train x.toml --rank 8");
        assert_eq!(of("train x.toml"), "train x.toml");
    }

    #[test]
    fn the_code_is_that_of_the_first_that_failed_by_itself() {
        let of = |codes: &[Option<i32>], by_us: usize| {
            let at = Instant::now();
            let ended = |(rank, code): (usize, &Option<i32>)| Ended { rank, code: *code, by_us: rank == by_us, at };
            outcome(&codes.iter().enumerate().map(ended).collect::<Vec<_>>())
        };
        for (codes, code) in [
            (&[Some(0), Some(0)][..], Code::Done),
            (&[Some(4), Some(3), Some(2)], Code::Input),
            (&[Some(4), Some(2)], Code::Usage),
            (&[Some(4), Some(1)], Code::Failed),
            (&[Some(4), Some(101)], Code::Failed),
            (&[Some(4), None], Code::Failed),
            (&[Some(4), Some(4)], Code::Failed),
            (&[Some(130), Some(130)], Code::Interrupted),
            (&[Some(130), Some(4)], Code::Failed),
        ] {
            assert_eq!(of(codes, usize::MAX), code, "{codes:?}");
        }
        // One that this process killed is no cause.
        assert_eq!(of(&[Some(3), None], 1), Code::Input);
    }
}
