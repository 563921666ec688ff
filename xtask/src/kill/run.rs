//! One configuration in one output folder: started, stopped, and gone on with.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};

use super::check;
use crate::program::{Bounds, End, Ended, Program};

/// How a run is gone on with that has a checkpoint.
const RESUME: &[&str] = &["--resume"];
/// How a run is started again that was stopped before its first checkpoint.
const RESTART: &[&str] = &["--resume", "auto-or-start"];

/// No run takes that long, on whatever machine.
const BOUNDS: Bounds = Bounds { time: Duration::from_secs(600), memory: 8 << 30 };
/// Time between two looks at the output folder.
const TICK: Duration = Duration::from_micros(500);

/// The numbers of the signals that stop a run, the same on every Unix.
pub(crate) const HANGUP: i32 = 1;
pub(crate) const INTERRUPT: i32 = 2;
pub(crate) const KILL: i32 = 9;
pub(crate) const TERMINATE: i32 = 15;

/// When a run is stopped.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Moment {
    /// Not at all.
    Never,
    /// That long after its start.
    After(Duration),
    /// That long after the name number `nth` is new in the output folder: a checkpoint that is begun, one that is put in
    /// its place, whereupon older ones are removed, the adapter, a report.
    Write { nth: usize, delay: Duration },
}

/// A configuration and where it runs.
#[derive(Debug)]
pub(crate) struct Run<'a> {
    pub(crate) program: &'a Program,
    /// The configuration's file.
    pub(crate) config: PathBuf,
    /// The output folder.
    pub(crate) output: PathBuf,
    /// Where it is started, and what it prints goes.
    pub(crate) folder: PathBuf,
}

impl Run<'_> {
    /// Starts or goes on, as the output folder demands, and sends `signal` at that moment. Returns how it ended, and
    /// whether the signal came before.
    pub(crate) fn attempt(&self, moment: Moment, signal: i32) -> Result<(Ended, bool)> {
        self.attempt_under(&[], moment, signal)
    }

    /// [`Self::attempt`] as the argument of another program.
    pub(crate) fn attempt_under(&self, outer: &[String], moment: Moment, signal: i32) -> Result<(Ended, bool)> {
        let seen = names(&self.output);
        let mut running = self.program.start_under(outer, &self.arguments(), &self.folder, &self.folder)?;
        let sent = match moment {
            Moment::Never => false,
            Moment::After(time) => {
                while running.elapsed() < time && !running.has_ended()? {
                    sleep(TICK.min(time.saturating_sub(running.elapsed())));
                }
                !running.has_ended()?
            }
            Moment::Write { nth, delay } => {
                let mut new = BTreeSet::new();
                while new.len() < nth && !running.has_ended()? {
                    new.extend(names(&self.output).into_iter().filter(|name| !seen.contains(name)));
                    sleep(TICK);
                }
                sleep(delay);
                !running.has_ended()?
            }
        };
        if sent {
            running.signal(signal)?;
        }
        let ended = running.wait(BOUNDS)?;
        Ok((ended, sent))
    }

    /// The command line.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let way = match check::newest(&self.output) {
            Some(_) => RESUME,
            None if self.output.exists() => RESTART,
            None => &[],
        };
        let (config, output) = (self.config.display().to_string(), self.output.display().to_string());
        let fixed = ["train", &config, "--output-dir", &output].map(str::to_owned);
        fixed.into_iter().chain(way.iter().map(|&flag| flag.to_owned())).collect()
    }

    /// Goes on to the end, undisturbed.
    pub(crate) fn finish(&self) -> Result<Result<(), String>> {
        let line = self.arguments().join(" ");
        let (ended, _) = self.attempt(Moment::Never, KILL)?;
        Ok(match ended.end {
            End::Exit(0) => Ok(()),
            _ => Err(format!("`qlora {line}`: {}", ended.describe())),
        })
    }
}

/// The folder of one run, which is made.
pub(crate) fn folder(under: &Path, name: &str) -> Result<PathBuf> {
    let folder = under.join(name);
    std::fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    Ok(folder)
}

/// Names in the output folder, those that are being written included.
fn names(output: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(output).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}
