//! `cargo xtask kill-test`: training runs are stopped in every way that there is, and must end as if nothing had been.
//!
//! | part | what happens |
//! |---|---|
//! | kills | SIGKILL at moments that are uniform over a run's time, and at the outputs that it writes |
//! | stops | SIGTERM, SIGINT, SIGHUP: the step is finished and saved, nothing is lost |
//! | system calls | one call on the output folder fails, or the process is killed as it enters it (Linux, strace) |
//!
//! A run is gone on with until it ends; then the next one begins, until there were as many stops as asked for. Each run
//! must have the adapter's bytes, the moments and the losses of the unbroken one, every step once, and nothing else in
//! its folder (`check`).

mod check;
mod configs;
mod inject;
mod run;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use self::check::Kept;
use self::configs::{ALL, Config};
use self::run::{HANGUP, INTERRUPT, KILL, Moment, Run, TERMINATE, folder};
use crate::program::{End, Program};
use crate::random::Dice;

/// What `cargo xtask kill-test` takes.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// A built `qlora`; left out, cargo builds it
    #[arg(long, value_name = "FILE")]
    qlora: Option<PathBuf>,
    /// How many times a run is killed
    #[arg(long, default_value_t = 200)]
    kills: usize,
    /// How many times a run is stopped by SIGTERM, SIGINT or SIGHUP
    #[arg(long, default_value_t = 40)]
    stops: usize,
    /// How many system calls fail; needs strace
    #[arg(long, default_value_t = 140)]
    injections: usize,
    /// Another seed gives other moments
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Only configurations whose name holds this
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Keep all folders, not only that of the first difference
    #[arg(long)]
    keep: bool,
    /// Go on after a difference
    #[arg(long)]
    keep_going: bool,
}

/// What was done to one configuration.
#[derive(Debug, Default)]
struct Tally {
    name: &'static str,
    unbroken: Duration,
    runs: usize,
    kills: usize,
    in_writes: usize,
    stops: usize,
    errors: usize,
    injected_kills: usize,
    differences: usize,
}

/// Runs the test.
pub fn run(options: &Options) -> Result<()> {
    let started = Instant::now();
    let program = Program::new(options.qlora.as_deref())?;
    let mut scratch = tempfile::Builder::new().prefix("kill-test-").tempdir()?;
    scratch.disable_cleanup(options.keep);
    let configs: Vec<&Config> =
        ALL.iter().filter(|config| options.only.as_ref().is_none_or(|only| config.name.contains(only))).collect();
    if configs.is_empty() {
        bail!("--only: there are {:?}", ALL.iter().map(|config| config.name).collect::<Vec<_>>());
    }
    let strace = inject::is_there();
    println!(
        "{} ({}), seed {}, in {}",
        program.path().display(),
        program.version()?,
        options.seed,
        scratch.path().display()
    );
    if !strace && options.injections > 0 {
        println!("skipped: failures of system calls: there is no strace, or it can't do this here");
    }
    println!("{}", Tally::HEAD);
    let mut sum = Tally { name: "together", ..Tally::default() };
    let mut first = None;
    for (number, config) in configs.iter().enumerate() {
        let share = |total: usize| total / configs.len() + usize::from(number < total % configs.len());
        let place = folder(scratch.path(), &format!("{number}"))?;
        let mut test = Test::new(&program, config, place, options, number as u64)?;
        let budget = Budget {
            kills: share(options.kills),
            stops: share(options.stops),
            injections: if strace { share(options.injections) } else { 0 },
        };
        let result = test.all(budget)?;
        println!("{}", test.tally.line());
        sum.add(&test.tally);
        if let Err(difference) = result {
            first.get_or_insert(difference);
            if !options.keep_going {
                break;
            }
        }
    }
    println!("{}\n{:.0} s in all", sum.line(), started.elapsed().as_secs_f64());
    match first {
        None => Ok(()),
        Some(difference) => {
            scratch.disable_cleanup(true);
            bail!("{difference}\n  All of it is kept in {}", scratch.path().display())
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Budget {
    kills: usize,
    stops: usize,
    injections: usize,
}

/// One configuration under test.
struct Test<'a> {
    program: &'a Program,
    config: &'a Config,
    options: &'a Options,
    /// Its folder: the configuration, the unbroken run, and a folder for each broken one.
    place: PathBuf,
    dice: Dice,
    tally: Tally,
    /// The first difference.
    first: Result<(), String>,
}

impl<'a> Test<'a> {
    fn new(
        program: &'a Program,
        config: &'a Config,
        place: PathBuf,
        options: &'a Options,
        number: u64,
    ) -> Result<Self> {
        let testdata = crate::root().join("testdata/reference/tiny-llama");
        let words = crate::root().join("examples/quickstart/word_problems.jsonl");
        let text = fs::read_to_string(&words).with_context(|| words.display().to_string())?;
        let rows = place.join("rows.jsonl");
        fs::write(&rows, text.split_inclusive('\n').take(40).collect::<String>())?;
        fs::write(place.join("qlora.toml"), config.toml(&testdata, &rows)?)?;
        let tally = Tally { name: config.name, ..Tally::default() };
        Ok(Self { program, config, options, place, dice: Dice::new(options.seed, number), tally, first: Ok(()) })
    }

    /// A run in a folder of its own.
    fn run(&self, name: &str) -> Result<Run<'a>> {
        let folder = folder(&self.place, name)?;
        let config = self.place.join("qlora.toml");
        Ok(Run { program: self.program, config, output: folder.join("out"), folder })
    }

    /// All parts. The inner result is the first difference.
    fn all(&mut self, budget: Budget) -> Result<Result<(), String>> {
        let started = Instant::now();
        let unbroken = self.run("unbroken")?;
        if let Err(problem) = unbroken.finish()? {
            bail!("{}: the unbroken run failed: {problem}", self.config.name);
        }
        self.tally.unbroken = started.elapsed();
        // The same run once more: without that, nothing below means anything.
        let again = self.run("again")?;
        let difference = again.finish()?.and(check::compare(&unbroken.output, &again.output, self.kept(true))?);
        if !self.record("again", difference)? {
            return Ok(self.first.clone());
        }
        while self.tally.kills < budget.kills {
            let limit = budget.kills - self.tally.kills;
            let name = format!("kills-{}", self.tally.runs);
            let difference = self.killed(&name, limit)?;
            if !self.record(&name, difference)? {
                return Ok(self.first.clone());
            }
        }
        while self.tally.stops < budget.stops {
            let limit = budget.stops - self.tally.stops;
            let name = format!("stops-{}", self.tally.runs);
            let difference = self.stopped(&name, limit)?;
            if !self.record(&name, difference)? {
                return Ok(self.first.clone());
            }
        }
        if budget.injections > 0 {
            self.injected(budget.injections)?;
        }
        Ok(self.first.clone())
    }

    fn kept(&self, same: bool) -> Kept {
        Kept { limit: self.config.save_limit, same }
    }

    fn unbroken(&self) -> PathBuf {
        self.place.join("unbroken/out")
    }

    /// Counts a run that has ended. Returns whether to go on.
    fn record(&mut self, name: &str, difference: Result<(), String>) -> Result<bool> {
        self.tally.runs += 1;
        let folder = self.place.join(name);
        match difference {
            Ok(()) if self.options.keep => {}
            Ok(()) => fs::remove_dir_all(&folder).with_context(|| folder.display().to_string())?,
            Err(problem) => {
                self.tally.differences += 1;
                let problem = format!("{}, {name}: {problem}", self.config.name);
                println!("DIFFERENCE {problem}");
                if self.first.is_ok() {
                    self.first = Err(problem);
                }
            }
        }
        Ok(self.first.is_ok() || self.options.keep_going)
    }

    /// A moment that is uniform over the time of the unbroken run, or during one of its writes.
    fn moment(&mut self) -> Moment {
        if self.dice.once_in(2) {
            let delay = Duration::from_secs_f64(0.02 * self.dice.unit());
            return Moment::Write { nth: 1 + self.dice.below(12), delay };
        }
        Moment::After(self.tally.unbroken.mul_f64(self.dice.unit()))
    }

    /// One run, killed until it ends or `limit` is reached, then let through.
    fn killed(&mut self, name: &str, limit: usize) -> Result<Result<(), String>> {
        let run = self.run(name)?;
        for _ in 0..limit {
            let moment = self.moment();
            let before = check::newest(&run.output);
            let line = run.arguments().join(" ");
            let (ended, _) = run.attempt(moment, KILL)?;
            match ended.end {
                End::Signal(KILL) => {
                    self.tally.kills += 1;
                    self.tally.in_writes += usize::from(matches!(moment, Moment::Write { .. }));
                }
                End::Exit(0) => return check::compare(&self.unbroken(), &run.output, self.kept(true)),
                _ => return Ok(Err(format!("`qlora {line}`: {}", ended.describe()))),
            }
            let after = check::newest(&run.output);
            if after < before {
                return Ok(Err(format!(
                    "the newest checkpoint was that of step {before:?}, and is {after:?} after a kill"
                )));
            }
        }
        let end = run.finish()?;
        Ok(end.and(check::compare(&self.unbroken(), &run.output, self.kept(true))?))
    }

    /// One run, stopped by signals until it ends or `limit` is reached, then let through.
    fn stopped(&mut self, name: &str, limit: usize) -> Result<Result<(), String>> {
        let run = self.run(name)?;
        for _ in 0..limit {
            let signal = *self.dice.pick(&[TERMINATE, INTERRUPT, HANGUP]);
            let moment = self.moment();
            let (ended, sent) = run.attempt(moment, signal)?;
            self.tally.stops += usize::from(sent);
            match ended.end {
                End::Exit(130) => {}
                // It had not begun to listen.
                End::Signal(by) if by == signal => {}
                End::Exit(0) => return check::compare(&self.unbroken(), &run.output, self.kept(false)),
                _ => return Ok(Err(format!("signal {signal}: {}", ended.describe()))),
            }
            let (saved, done) = (check::newest(&run.output).unwrap_or(0), check::last_step(&run.output));
            if saved < done {
                return Ok(Err(format!(
                    "signal {signal}: step {done} is done, the newest checkpoint is of step {saved}"
                )));
            }
        }
        let end = run.finish()?;
        Ok(end.and(check::compare(&self.unbroken(), &run.output, self.kept(false))?))
    }

    /// Runs with one failing call each.
    fn injected(&mut self, count: usize) -> Result<()> {
        let watched = self.run("watched")?;
        let log = watched.folder.join("strace.txt");
        let (ended, _) = watched.attempt_under(&inject::watch(&log), Moment::Never, KILL)?;
        let calls = inject::calls_on(&watched.output, &fs::read_to_string(&log)?);
        let difference = match ended.end {
            End::Exit(0) => check::compare(&self.unbroken(), &watched.output, self.kept(true))?,
            _ => Err(ended.describe()),
        };
        if !self.record("watched", difference)? {
            return Ok(());
        }
        // A call that another thread makes in another run may not come.
        for _ in 0..2 * count {
            if self.tally.errors + self.tally.injected_kills >= count {
                break;
            }
            let name = format!("calls-{}", self.tally.runs);
            let injection = inject::draw(&mut self.dice, &calls)?;
            let difference =
                self.one_injection(&name, &injection)?.map_err(|problem| format!("{injection}: {problem}"));
            if !self.record(&name, difference)? {
                return Ok(());
            }
        }
        Ok(())
    }

    fn one_injection(&mut self, name: &str, injection: &inject::Injection) -> Result<Result<(), String>> {
        let run = self.run(name)?;
        let log = run.folder.join("strace.txt");
        let (ended, _) = run.attempt_under(&inject::inject(injection, &log), Moment::Never, KILL)?;
        keep_log(&run.folder)?;
        // 128 + 9, where strace does not end as the program did.
        let killed = matches!(ended.end, End::Signal(KILL) | End::Exit(137)) && injection.error.is_none();
        self.tally.injected_kills += usize::from(killed);
        self.tally.errors += usize::from(inject::came(&fs::read_to_string(&log)?));
        match ended.end {
            _ if ended.panic().is_some() => return Ok(Err(format!("a panic: {}", ended.describe()))),
            _ if killed => {}
            End::Exit(0) => {
                let difference = check::compare(&self.unbroken(), &run.output, self.kept(true))?;
                if difference.is_ok() {
                    return Ok(difference);
                }
                // Something that could not be removed: the next start takes it away.
            }
            End::Exit(1..=3) => {}
            _ => return Ok(Err(ended.describe())),
        }
        let end = run.finish()?;
        Ok(end.and(check::compare(&self.unbroken(), &run.output, self.kept(true))?))
    }
}

/// What the disturbed process printed, which the next one would write over.
fn keep_log(folder: &Path) -> Result<()> {
    fs::rename(folder.join("stderr.txt"), folder.join("disturbed-stderr.txt"))?;
    Ok(fs::rename(folder.join("stdout.txt"), folder.join("disturbed-stdout.txt"))?)
}

impl Tally {
    const HEAD: &str = "| configuration | unbroken, s | runs | kills | after a new name | stops | failed calls | kills at calls | differences |\n|---|---|---|---|---|---|---|---|---|";

    fn line(&self) -> String {
        format!(
            "| {} | {:.1} | {} | {} | {} | {} | {} | {} | {} |",
            self.name,
            self.unbroken.as_secs_f64(),
            self.runs,
            self.kills,
            self.in_writes,
            self.stops,
            self.errors,
            self.injected_kills,
            self.differences
        )
    }

    fn add(&mut self, other: &Self) {
        self.unbroken += other.unbroken;
        self.runs += other.runs;
        self.kills += other.kills;
        self.in_writes += other.in_writes;
        self.stops += other.stops;
        self.errors += other.errors;
        self.injected_kills += other.injected_kills;
        self.differences += other.differences;
    }
}
