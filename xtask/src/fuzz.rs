//! `cargo xtask fuzz`: broken inputs for every command that reads them.
//!
//! Each mutation changes one file of a small valid input and gives it to one process. A number and a seed give one
//! mutation, whatever was drawn before it: `--only N` repeats it.
//!
//! A process may refuse its input or take it. It may not panic, abort, run for longer than 20 s, have more than 2 GiB
//! resident, fail without a word, or send a file's control characters to the terminal (`verdict`). One step of training
//! may have more memory than that: a configuration can ask for it.
//!
//! What was not done: many mutations in one process would be a hundred times faster, but an abort would end them all, and
//! what counts is the program that people run.

mod bytes;
mod container;
mod json;
mod parts;
mod seeds;
mod targets;
mod text;
mod verdict;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use adapter_io::checksum::{MANIFEST_FILE, Manifest};
use anyhow::{Context, Result, anyhow, bail};

use self::targets::{ALL, Mutation, draw};
use self::verdict::{Fault, judge};
use crate::program::{Bounds, End, Ended, Program};

/// What `cargo xtask fuzz` takes.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// A built `qlora`; left out, cargo builds it
    #[arg(long, value_name = "FILE")]
    qlora: Option<PathBuf>,
    /// How many mutated inputs
    #[arg(long, default_value_t = 20_000)]
    mutations: u64,
    /// Another seed gives other mutations
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Processes at a time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Repeat the mutation of this number and show it
    #[arg(long, value_name = "N")]
    only: Option<u64>,
    /// Where failures are written: the input, the command, what was printed
    #[arg(long, value_name = "DIR", default_value = "runs/fuzz")]
    failures: PathBuf,
}

const BOUNDS: Bounds = Bounds { time: Duration::from_secs(20), memory: 2 << 30 };

/// What came of the mutations of one target.
#[derive(Debug, Default, Clone)]
struct Tally {
    /// By exit code from 0 to 3.
    codes: [u64; 4],
    faults: u64,
    slowest: Duration,
    largest: u64,
}

/// Failures of one kind at one place.
#[derive(Debug)]
struct Finding {
    count: u64,
    /// The lowest number of a mutation, which is written to the folder.
    first: u64,
    line: String,
}

impl Default for Finding {
    fn default() -> Self {
        Self { count: 0, first: u64::MAX, line: String::new() }
    }
}

impl Finding {
    /// Counts a mutation; returns whether it has the lowest number so far.
    fn add(&mut self, number: u64, line: String) -> bool {
        self.count += 1;
        let lowest = number < self.first;
        if lowest {
            (self.first, self.line) = (number, line);
        }
        lowest
    }
}

/// What the workers share.
struct Fuzzer<'a> {
    program: &'a Program,
    options: &'a Options,
    seeds: PathBuf,
    tallies: Mutex<Vec<Tally>>,
    findings: Mutex<BTreeMap<(Fault, String), Finding>>,
    /// Exit code 1 by command and message: for a broken input it should be 2 or 3, but that is no fault.
    failed: Mutex<BTreeMap<String, Finding>>,
}

/// Runs the fuzzer.
pub fn run(options: &Options) -> Result<()> {
    let started = Instant::now();
    let program = Program::new(options.qlora.as_deref())?;
    let failures = std::path::absolute(&options.failures)?;
    if options.only.is_none() && failures.exists() {
        bail!("{} is there from an earlier run: remove it, or name another --failures", failures.display());
    }
    let scratch = tempfile::Builder::new().prefix("fuzz-").tempdir()?;
    let seeds = scratch.path().join("seeds");
    fs::create_dir(&seeds)?;
    seeds::make(&program, &seeds)?;
    let fuzzer = Fuzzer {
        program: &program,
        options,
        seeds,
        tallies: Mutex::new(vec![Tally::default(); ALL.len()]),
        findings: Mutex::default(),
        failed: Mutex::default(),
    };
    fuzzer.check_seeds(&folder(scratch.path(), "valid")?)?;
    println!("{} ({}), seed {}", program.path().display(), program.version()?, options.seed);
    if let Some(number) = options.only {
        return fuzzer.show(number, &folder(scratch.path(), "only")?);
    }
    let next = AtomicU64::new(0);
    let work = |worker: usize| -> Result<()> {
        let place = folder(scratch.path(), &format!("worker-{worker}"))?;
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= options.mutations {
                return Ok(());
            }
            fuzzer.one(number, &place).with_context(|| format!("mutation {number}"))?;
            if (number + 1).is_multiple_of(1000) {
                let rate = (number + 1) as f64 / started.elapsed().as_secs_f64();
                println!("{} mutations, {rate:.0} a second", number + 1);
            }
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..options.jobs.max(1)).map(|worker| scope.spawn(move || work(worker))).collect();
        workers.into_iter().try_for_each(|worker| worker.join().map_err(|_| anyhow!("a worker panicked"))?)
    })?;
    fuzzer.report(started.elapsed())
}

/// A process of one mutation, and the folder it read.
struct Case {
    folder: PathBuf,
    command: String,
    ended: Ended,
}

impl Fuzzer<'_> {
    /// Every command must take what is not mutated: a fuzzer of inputs that are refused at once finds nothing.
    fn check_seeds(&self, place: &Path) -> Result<()> {
        let mut seen = Vec::new();
        for number in 0..2000 {
            let mut mutation = draw(&self.seeds, self.options.seed, number)?;
            let key = (mutation.folder.clone(), mutation.file.clone(), mutation.command);
            if seen.contains(&key) {
                continue;
            }
            mutation.bytes = fs::read(self.seeds.join(&mutation.folder).join(&mutation.file))?;
            let case = self.process(&mutation, place)?;
            if case.ended.end != End::Exit(0) {
                let error = case.ended.errors().lines().next_back().unwrap_or_default().to_owned();
                let (folder, name) = (mutation.folder.display(), &mutation.file);
                println!("note: {folder}/{name} as it is, `{}`: {error}", mutation.command);
            }
            seen.push(key);
        }
        Ok(())
    }

    /// Writes the input of a mutation and runs its command.
    fn process(&self, mutation: &Mutation, place: &Path) -> Result<Case> {
        let case = place.join("case");
        for old in [&case, &place.join("out")] {
            if old.exists() {
                fs::remove_dir_all(old).with_context(|| old.display().to_string())?;
            }
        }
        fs::create_dir_all(place.join("out/run"))?;
        write_case(&self.seeds, mutation, &case)?;
        let line = fill(mutation, &case, &self.seeds, &place.join("out"));
        let args: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let ended = self.program.start(&args, place, place)?.wait(bounds(mutation))?;
        Ok(Case { folder: case, command: line, ended })
    }

    fn one(&self, number: u64, place: &Path) -> Result<()> {
        let mutation = draw(&self.seeds, self.options.seed, number)?;
        let case = self.process(&mutation, place)?;
        let target = &ALL[mutation.target];
        let fault = fault(&case.ended, &mutation);
        {
            let mut tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
            let tally = &mut tallies[mutation.target];
            match (fault.is_some(), case.ended.end) {
                (true, _) => tally.faults += 1,
                (false, End::Exit(code)) => tally.codes[code.clamp(0, 3) as usize] += 1,
                _ => {}
            }
            tally.slowest = tally.slowest.max(case.ended.took);
            tally.largest = tally.largest.max(case.ended.peak);
        }
        let line = format!("{}: {}", target.name, mutation.what.join("; "));
        let line: String = line.escape_debug().to_string().chars().take(200).collect();
        let Some(fault) = fault else {
            if case.ended.end == End::Exit(1) {
                let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
                failed.entry(case.ended.message()).or_default().add(number, line);
            }
            return Ok(());
        };
        let mut findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        let found = findings.entry(fault.clone()).or_insert_with(|| {
            println!("mutation {number}: {} at {}; {line}", fault.0, fault.1);
            Finding::default()
        });
        if found.add(number, line) {
            self.keep(&fault, number, &mutation, &case)?;
        }
        Ok(())
    }

    /// Writes a failure to its folder, with all that its command reads.
    fn keep(&self, fault: &(Fault, String), number: u64, mutation: &Mutation, case: &Case) -> Result<()> {
        let failures = std::path::absolute(&self.options.failures)?;
        if !failures.join("seeds").exists() {
            fs::create_dir_all(&failures)?;
            seeds::copy_tree(&self.seeds, &failures.join("seeds"), false)?;
            seeds::relocate(&failures.join("seeds/qlora.toml"), &self.seeds, &failures.join("seeds"))?;
        }
        let name: String = format!("{}-{}", fault.0, fault.1)
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' })
            .take(100)
            .collect();
        let folder = failures.join(name);
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(folder.join("out"))?;
        seeds::copy_tree(&case.folder, &folder.join("case"), false)?;
        seeds::relocate(&folder.join("case").join(&mutation.file), &self.seeds, &failures.join("seeds"))?;
        let command = fill(mutation, &folder.join("case"), &failures.join("seeds"), &folder.join("out"));
        fs::write(folder.join("command.txt"), format!("HF_HUB_OFFLINE=1 qlora {command}\n"))?;
        let what = mutation.what.iter().map(|what| what.chars().take(300).collect::<String>()).collect::<Vec<_>>();
        let about = format!(
            "mutation {number} of seed {}: cargo xtask fuzz --seed {} --only {number}\n{}/{}\n{}\n{:?} after {:.2} s, {} MiB resident\n",
            self.options.seed,
            self.options.seed,
            mutation.folder.display(),
            mutation.file,
            what.join("\n"),
            case.ended.end,
            case.ended.took.as_secs_f64(),
            case.ended.peak >> 20,
        );
        fs::write(folder.join("README"), about)?;
        fs::write(folder.join("stdout.txt"), &case.ended.stdout)?;
        Ok(fs::write(folder.join("stderr.txt"), &case.ended.stderr)?)
    }

    /// One mutation, shown.
    fn show(&self, number: u64, place: &Path) -> Result<()> {
        let mutation = draw(&self.seeds, self.options.seed, number)?;
        let case = self.process(&mutation, place)?;
        println!("{}/{}", mutation.folder.display(), mutation.file);
        mutation.what.iter().for_each(|what| println!("  {}", what.escape_debug()));
        println!("qlora {}", case.command);
        println!("{:?} after {:.2} s, {} MiB", case.ended.end, case.ended.took.as_secs_f64(), case.ended.peak >> 20);
        println!("{}", case.ended.errors().trim_end().escape_debug().to_string().replace("\\n", "\n"));
        match fault(&case.ended, &mutation) {
            None => Ok(()),
            Some(fault) => {
                self.keep(&fault, number, &mutation, &case)?;
                bail!("{} at {}; kept in {}", fault.0, fault.1, self.options.failures.display())
            }
        }
    }

    fn report(&self, took: Duration) -> Result<()> {
        println!("| input | mutations | taken | exit 1 | exit 2 | exit 3 | failures | slowest, s | largest, MiB |");
        println!("|---|---|---|---|---|---|---|---|---|");
        let tallies = self.tallies.lock().unwrap_or_else(PoisonError::into_inner);
        let line = |name: &str, tally: &Tally| {
            let [done, failed, usage, input] = tally.codes;
            let sum = tally.codes.iter().sum::<u64>() + tally.faults;
            let (seconds, faults, mib) = (tally.slowest.as_secs_f64(), tally.faults, tally.largest >> 20);
            println!("| {name} | {sum} | {done} | {failed} | {usage} | {input} | {faults} | {seconds:.1} | {mib} |");
        };
        let mut sum = Tally::default();
        for (target, tally) in ALL.iter().zip(tallies.iter()) {
            line(target.name, tally);
            sum.codes.iter_mut().zip(tally.codes).for_each(|(sum, count)| *sum += count);
            sum.faults += tally.faults;
            sum.slowest = sum.slowest.max(tally.slowest);
            sum.largest = sum.largest.max(tally.largest);
        }
        line("together", &sum);
        println!("{:.0} s, {:.1} a second", took.as_secs_f64(), self.options.mutations as f64 / took.as_secs_f64());
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        for (message, Finding { count, first, line }) in failed.iter() {
            println!("exit 1: {count} x {message}; first {first}, {line}");
        }
        let findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        if findings.is_empty() {
            return Ok(());
        }
        for ((fault, place), Finding { count, first, line }) in findings.iter() {
            println!("{count} x {fault} at {place}; first {first}, {line}");
        }
        bail!("{} failures at {} places; see {}", sum.faults, findings.len(), self.options.failures.display())
    }
}

/// One step of training may have what a configuration asks for; all else is bounded.
fn bounds(mutation: &Mutation) -> Bounds {
    match mutation.command.contains("--max-steps") {
        true => Bounds { memory: 3 << 30, ..BOUNDS },
        false => BOUNDS,
    }
}

/// The fault of a process, but for what a configuration may ask for.
fn fault(ended: &Ended, mutation: &Mutation) -> Option<(Fault, String)> {
    let subcommand = mutation.command.split(' ').next().unwrap_or_default();
    let asked_for = mutation.command.contains("--max-steps") && matches!(ended.end, End::TooLarge | End::TooSlow);
    judge(ended, subcommand, ALL[mutation.target].name).filter(|_| !asked_for)
}

/// A command with its folders. The paths of this program's making hold no blanks.
fn fill(mutation: &Mutation, case: &Path, seeds: &Path, out: &Path) -> String {
    mutation
        .command
        .replace("{case}", &case.display().to_string())
        .replace("{file}", &case.join(&mutation.file).display().to_string())
        .replace("{seeds}", &seeds.display().to_string())
        .replace("{out}", &out.display().to_string())
}

/// Writes the mutated file, and beside it what its folder holds where the command reads the folder.
fn write_case(seeds: &Path, mutation: &Mutation, case: &Path) -> Result<()> {
    if mutation.command.contains("{case}") {
        seeds::copy_tree(&seeds.join(&mutation.folder), case, true)?;
        // A link's other end is the valid input.
        fs::remove_file(case.join(&mutation.file))?;
    }
    fs::create_dir_all(case)?;
    fs::write(case.join(&mutation.file), &mutation.bytes)?;
    // What is read of a checkpoint, beyond that a checksum is wrong.
    if mutation.file != MANIFEST_FILE && case.join(MANIFEST_FILE).exists() {
        Manifest::of(case)?.save(case)?;
    }
    Ok(())
}

fn folder(under: &Path, name: &str) -> Result<PathBuf> {
    let folder = under.join(name);
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    Ok(folder)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_case_leaves_the_valid_input_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (seeds, case) = (dir.path().join("seeds"), dir.path().join("case"));
        fs::create_dir_all(seeds.join("model")).unwrap();
        fs::write(seeds.join("model/config.json"), "good").unwrap();
        fs::write(seeds.join("model/other"), "other").unwrap();
        let mut mutation = Mutation {
            target: 0,
            folder: "model".into(),
            file: "config.json".into(),
            bytes: b"bad".to_vec(),
            command: "inspect {case}",
            what: Vec::new(),
        };
        write_case(&seeds, &mutation, &case).unwrap();
        assert_eq!(fs::read(case.join("config.json")).unwrap(), b"bad");
        assert_eq!(fs::read(case.join("other")).unwrap(), b"other");
        assert_eq!(fs::read(seeds.join("model/config.json")).unwrap(), b"good");
        fs::remove_dir_all(&case).unwrap();
        mutation.command = "train {file} --data {seeds}/x --out {out}";
        write_case(&seeds, &mutation, &case).unwrap();
        assert!(!case.join("other").exists());
        let line = fill(&mutation, Path::new("/c"), Path::new("/s"), Path::new("/o"));
        assert_eq!(line, "train /c/config.json --data /s/x --out /o");
    }

    #[test]
    fn a_mutated_checkpoint_has_the_checksums_of_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let (seeds, case) = (dir.path().join("seeds"), dir.path().join("case"));
        fs::create_dir_all(seeds.join("checkpoint")).unwrap();
        fs::write(seeds.join("checkpoint/state"), "good").unwrap();
        Manifest::of(&seeds.join("checkpoint")).unwrap().save(&seeds.join("checkpoint")).unwrap();
        let mutation = Mutation {
            target: 0,
            folder: "checkpoint".into(),
            file: "state".into(),
            bytes: b"bad".to_vec(),
            command: "inspect {case}",
            what: Vec::new(),
        };
        write_case(&seeds, &mutation, &case).unwrap();
        for (folder, text) in [(&case, "bad"), (&seeds.join("checkpoint"), "good")] {
            assert_eq!(fs::read_to_string(folder.join("state")).unwrap(), text);
            let manifest = Manifest::load(folder).unwrap().unwrap();
            adapter_io::checksum::verify(folder, &manifest).unwrap();
        }
    }
}
