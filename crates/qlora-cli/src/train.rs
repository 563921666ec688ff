//! `qlora train`: the configuration with its overrides, a dry run, or the run itself.

mod local;
pub mod ranks;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Result;
use burn_qlora::profile::Profile;
use burn_qlora::qlora_data::preview::PreviewChoice;
use burn_qlora::qlora_dist::{Launcher, Place};
use burn_qlora::qlora_train::fits::{self, Change};
use burn_qlora::qlora_train::rates::{self, Seconds};
use burn_qlora::qlora_train::{Resized, Waiting, load_rows, packing_note, resize, run_in, training_order};
use burn_qlora::report::{Outcome, count, device_name, memory};
use burn_qlora::{
    Plan, Resume, Room, RowSizes, Start, Tokenizer, TrainConfig, TrainError, TrainEvents, Trainer, atomic,
    compute_dtype, select_device,
};

use crate::args::{KeyFlags, TrainArgs};
use crate::exit::{Code, UsageError};
use crate::hub;
use crate::inspect::group_name;
use crate::output::{Table, print, say, tell, wrapped_for_stdout};
use crate::preview;
use crate::progress::{JsonLines, Terminal};
use crate::signals;
use crate::warnings;
use ranks::Quiet;

/// Runs the command. `profile` waits for the steps that it is to record.
pub fn run(args: &TrainArgs, profile: Option<Profile>) -> Result<Code> {
    if let Some(folder) = args.profile.as_deref().and_then(Path::parent).filter(|folder| !folder.is_dir()) {
        // Before the run, not after it.
        if !folder.as_os_str().is_empty() {
            return Err(UsageError(format!("--profile: there is no folder {}", folder.display())).into());
        }
    }
    let start = start(args)?;
    let mut config = configuration(&args.config, &args.keys, &args.set)?;
    let place = Place::from_env()?;
    let count = args.gpus.map_or(place.world_size, |count| count as usize);
    if args.gpus.is_some() && !place.is_alone() {
        let Place { rank, world_size, launcher, .. } = place;
        let text = format!(
            "--gpus starts ranks, and this process is rank {rank} of {world_size} already, by {launcher}: leave it out"
        );
        return Err(UsageError(text).into());
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut terminal = Terminal::new(&config.train, args.voice.quiet, stop.clone());
    if args.dry_run {
        if place.is_first() {
            let of_host = if place.is_alone() { count } else { place.local_world_size };
            print(&dry_run(&config, [count, of_host], &mut terminal)?)?;
        }
        return Ok(Code::Done);
    }
    if place.is_alone() && count > 1 {
        ranks::timeouts()?;
        ranks::check_cards(&config.device, count)?;
        return local::run(count);
    }
    let (is_first, launcher) = (place.is_first(), place.launcher);
    ranks::end_with_parent(&place);
    let (raised, quiet) = (stop.clone(), args.voice.quiet || args.voice.json);
    signals::on_interrupt(move || {
        if raised.swap(true, Ordering::Relaxed) {
            atomic::abandon_all();
            std::process::exit(Code::Interrupted as i32);
        }
        if is_first && !quiet {
            say!("\nStopping after this step; once more to stop at once, without saving.");
        }
    })?;
    ranks::choose_device(&mut config, &place)?;
    let (mut silent, mut lines) = (Quiet(stop.clone()), JsonLines::new(stop));
    let events: &mut dyn TrainEvents = match (is_first, args.voice.json) {
        (false, _) => &mut silent,
        (true, true) => {
            warnings::as_json();
            &mut lines
        }
        (true, false) => &mut terminal,
    };
    let group = ranks::meet(place, &config)?;
    let result = Trainer::in_group(config, start, group, events).and_then(Trainer::run);
    if !is_first {
        return match result {
            Ok(summary) if summary.outcome == Outcome::Interrupted => Ok(Code::Interrupted),
            Ok(_) => Ok(Code::Done),
            // Rank 0 of this terminal says it.
            Err(TrainError::Ranks(error)) if error.is_of_another_rank() && launcher == Launcher::Qlora => {
                Ok(Code::OtherRank)
            }
            Err(error) => Err(error.into()),
        };
    }
    // A run that failed leaves what was recorded before.
    let profiled = match (profile, &args.profile) {
        (Some(profile), Some(path)) => write_profile(profile, path),
        _ => Ok(()),
    };
    let summary = result?;
    profiled?;
    let dir = &summary.run.output_dir;
    let mut text = format!("{}\n", wrapped_for_stdout(&summary.sentence()));
    let code = match summary.outcome {
        Outcome::Finished | Outcome::StoppedEarly => {
            writeln!(text, "Adapter  {}", summary.adapter.display())?;
            writeln!(text, "Report   {}, {}", dir.join("summary.md").display(), dir.join("loss.svg").display())?;
            writeln!(text, "Try it   {}", summary.try_it())?;
            Code::Done
        }
        Outcome::Interrupted => {
            writeln!(
                text,
                "Stopped at step {} of {}; the checkpoint is {}",
                summary.steps,
                summary.run.total_steps,
                summary.adapter.display()
            )?;
            let ranks = (launcher == Launcher::Qlora).then_some(count);
            writeln!(text, "Go on    {}", resume_command(std::env::args_os().skip(1), ranks))?;
            if let Ok(here) = std::env::current_dir() {
                writeln!(text, "         in {}", here.display())?;
            }
            Code::Interrupted
        }
    };
    if !args.voice.json {
        tell(&text);
    }
    Ok(code)
}

/// What the flags say of where to start.
fn start(args: &TrainArgs) -> Result<Start, UsageError> {
    let resume = match args.resume.as_deref() {
        None => Resume::No,
        Some("auto") => Resume::Auto,
        Some("auto-or-start") => Resume::AutoOrStart,
        Some(path) => Resume::From(path.into()),
    };
    if args.overwrite && matches!(resume, Resume::Auto | Resume::AutoOrStart) {
        let text = "--overwrite starts over and --resume goes on: give one of them, or --resume PATH of another run";
        return Err(UsageError(text.into()));
    }
    Ok(Start { resume, overwrite: args.overwrite, accept_changes: args.accept_changes })
}

/// The command that goes on with a run that was started with `args`: the same flags, but for those that say where to start. `ranks` is how
/// many ranks `--gpus` asked for, which they are not told by a flag.
fn resume_command(args: impl Iterator<Item = OsString>, ranks: Option<usize>) -> String {
    let args: Vec<String> = args.map(|arg| arg.to_string_lossy().into_owned()).collect();
    let mut kept: Vec<&str> = vec!["qlora"];
    let mut args = args.iter().map(String::as_str).peekable();
    while let Some(arg) = args.next() {
        match arg {
            "--overwrite" | "--accept-changes" => {}
            // Its value, if it has one, is the next argument.
            "--resume" => drop(args.next_if(|value| !value.starts_with('-'))),
            arg if arg.starts_with("--resume=") => {}
            arg => kept.push(arg),
        }
    }
    let ranks = ranks.map(|ranks| ranks.to_string());
    ranks.iter().for_each(|ranks| kept.extend(["--gpus", ranks]));
    kept.push("--resume");
    // A command line holds no NUL, the only thing that can't be quoted.
    shlex::try_join(kept.iter().copied()).unwrap_or_else(|_| kept.join(" "))
}

/// Writes the trace and prints its tables.
fn write_profile(profile: Profile, path: &Path) -> Result<()> {
    let trace = profile.finish();
    if trace.steps() == 0 {
        say!("warning: the run ended before the first step that was to be profiled; {} is not written", path.display());
        return Ok(());
    }
    trace.write(path)?;
    tell(&format!("{}\nTrace    {}, for https://ui.perfetto.dev\n", trace.summary(), path.display()));
    Ok(())
}

/// The file, then the named flags, then `--set` in order.
pub fn configuration(file: &Path, keys: &KeyFlags, set: &[String]) -> Result<TrainConfig> {
    let mut config = TrainConfig::load(file)?;
    for (key, value) in keys.overrides() {
        config.set(key, value)?;
    }
    for assignment in set {
        let (key, value) = assignment.split_once('=').ok_or_else(|| {
            UsageError(format!("--set {assignment}: write SECTION.KEY=VALUE, e.g. train.learning_rate=1e-4"))
        })?;
        config.set(key.trim(), value.trim())?;
    }
    config.model.accept_keys.extend(keys.accept_key.iter().cloned());
    config.validate()?;
    hint_at_paths_beside_the_file(file, &config)?;
    Ok(config)
}

/// A path that starts at the configuration's folder is the likeliest mistake with relative paths.
fn hint_at_paths_beside_the_file(file: &Path, config: &TrainConfig) -> Result<(), UsageError> {
    let folder = file.parent().unwrap_or(Path::new(""));
    let train = config.data.train.paths().map(|path| ("data.train", path));
    let eval = config.data.eval.iter().flat_map(|sources| sources.paths()).map(|path| ("data.eval", path));
    for (key, path) in train.chain(eval).chain([("model.path", Path::new(&config.model.path))]) {
        let beside = folder.join(path);
        if !path.exists() && beside.exists() {
            return Err(UsageError(format!(
                "{key} = \"{}\": no such file; relative paths start at the current directory, where it is {}",
                path.display(),
                beside.display()
            )));
        }
    }
    Ok(())
}

/// What would be trained, how large it is, and what the data is like, by so many ranks, and so many of them on this host.
fn dry_run(config: &TrainConfig, [ranks, of_host]: [usize; 2], events: &mut dyn TrainEvents) -> Result<String> {
    let device = select_device(&config.device)?;
    let dtype = compute_dtype(config.quantization.compute_dtype, &device)?;
    let dir = hub::resolve(&config.model.path, config.model.revision.as_deref())?;
    let tokenizer = Tokenizer::from_dir(&dir)?;
    let base = config.quantization.base_config(&dir, &config.model.config_options())?;
    let Resized { config, model, notice } = resize(config, base, &tokenizer)?;
    let config = &config;
    model.notes.iter().for_each(|note| events.on_notice(note));
    notice.iter().for_each(|notice| events.on_notice(notice));
    let (train, eval) = load_rows(config, &tokenizer, &model, events)?;
    let mut of_all = config.train.clone();
    of_all.gradient_accumulation_steps = of_all.gradient_accumulation_steps.saturating_mul(ranks);
    let order = training_order(config, &train, 0)?;
    let total_steps = of_all.total_steps(order.sequences());
    config.train.warnings(total_steps).iter().for_each(|warning| events.on_warning(warning));
    if let Some(holds) = run_in(&config.train.output_dir)? {
        let path = config.train.output_dir.display();
        events.on_warning(&format!("{path} holds {holds}: a run needs --resume, --overwrite or another folder"));
    }
    let room = Room::of_rank(&device, config.train.memory_budget, ranks, of_host);
    let sizes = RowSizes::new(&order, &train.examples);
    let plan = Plan::new(config, &model, dtype, &room, &sizes)?;

    let mut text = String::new();
    writeln!(text, "Model    {}: {} parameters", config.model.path, count(plan.base_parameters))?;
    writeln!(
        text,
        "Weights  {}; computed in {} on {}",
        config.quantization.describe(),
        format!("{dtype:?}").to_lowercase(),
        device_name(&device)
    )?;
    let percent = 100.0 * plan.trainable_parameters as f64 / plan.base_parameters.max(1) as f64;
    writeln!(
        text,
        "Adapters {} on {} modules ({percent:.2} % of the base)",
        count(plan.trainable_parameters),
        plan.targets.len()
    )?;
    let report = &train.report;
    writeln!(
        text,
        "Data     {}: {} rows ({}), {} tokens, of which {} count for the loss; the longest row has {}",
        report.sources,
        report.rows,
        report.format,
        count(report.tokens),
        count(report.label_tokens),
        report.longest,
    )?;
    if eval.report.rows > 0 {
        writeln!(text, "Eval     {} rows, {} tokens", eval.report.rows, count(eval.report.tokens))?;
    }
    if let Some(note) = packing_note(&config.data, &of_all, &order) {
        writeln!(text, "Packing  {note}")?;
    }
    let options = &config.train;
    writeln!(
        text,
        "Steps    {total_steps}, {} {} each ({} x {}{})",
        options.batch_size.saturating_mul(of_all.gradient_accumulation_steps),
        if order.packed().is_some() { "sequences" } else { "rows" },
        options.batch_size,
        options.gradient_accumulation_steps,
        if ranks > 1 { format!(" x {ranks} ranks") } else { String::new() },
    )?;
    writeln!(text, "Kept     for the backward pass: {}{}", plan.policies, within(&room, &plan))?;
    writeln!(text, "Speed    {}", speed(&device_name(&device), &plan))?;
    text += "\n";
    text += &targets(&plan).to_string();
    text += "\n";
    text += &memory_table(&plan).to_string();
    text += &host_table(&plan);
    text += &would_fit(&fits::nearest(config, &model, dtype, &room, &sizes)?);
    let first = preview::of_rows(config, &tokenizer, &model, &train, 1, PreviewChoice::First)?;
    text += "\nThe first row as it is trained (`qlora preview` shows more):\n";
    for row in &first.rows {
        text += &beginning(&row.to_terminal(preview::color(), false));
    }
    Ok(text)
}

/// Whether the run fits into the memory that there is.
fn within(room: &Room, plan: &Plan) -> String {
    match room.device.filter(|room| *room < u64::MAX) {
        Some(room) if plan.memory.total() > room => {
            let room = memory(room);
            format!("; more than the {room} that there is room for")
        }
        Some(room) => format!("; there is room for {}", memory(room)),
        None => String::new(),
    }
}

/// Tokens per second to expect.
fn speed(device: &str, plan: &Plan) -> String {
    match rates::seconds(device, &plan.work) {
        Some(Seconds { whole, exposed, bus }) => {
            let rate = count((plan.work.tokens as f64 / whole) as u64);
            let hidden = match (bus > 0.0, exposed > 0.0) {
                (false, _) => String::new(),
                (true, false) => {
                    format!("; the bus is busy for {:.0} ms of a micro-batch, behind what is computed", 1e3 * bus)
                }
                (true, true) => format!(
                    "; the bus is busy for {:.0} ms of a micro-batch, of which {:.0} ms are waited for",
                    1e3 * bus,
                    1e3 * exposed
                ),
            };
            format!("some {rate} tokens/s where batches are full, by steps measured on such a card{hidden}")
        }
        None => "unknown: no steps were measured on such a device".into(),
    }
}

/// What would make the run fit.
fn would_fit(changes: &[Change]) -> String {
    let mut text = String::new();
    if !changes.is_empty() {
        text += "\nWith any of these it would fit:\n";
    }
    for Change { settings, bytes, effect } in changes {
        let set: Vec<String> = settings.iter().map(|(key, value)| format!("--set {key}={value}")).collect();
        let effect = if effect.is_empty() { "the same training" } else { effect };
        text += &format!("  {}   {}, {effect}\n", set.join(" "), memory(*bytes));
    }
    text
}

/// The first lines of a text.
fn beginning(text: &str) -> String {
    const LINES: usize = 24;
    let shown: String = text.split_inclusive('\n').take(LINES).collect();
    match text.lines().count().saturating_sub(LINES) {
        0 => shown,
        more => format!("{shown}... {more} more lines\n"),
    }
}

/// The adapters, layers summed up.
fn targets(plan: &Plan) -> Table {
    let mut table = Table::new(["module", "layers", "shape", "rank", "scaling", "parameters"]);
    let mut groups: Vec<(String, [usize; 2], usize, f32, usize)> = Vec::new();
    for (target, shape) in &plan.targets {
        let name = group_name(&target.path);
        match groups
            .iter_mut()
            .find(|group| group.0 == name && group.1 == *shape && group.2 == target.rank && group.3 == target.scaling)
        {
            Some(group) => group.4 += 1,
            None => groups.push((name, *shape, target.rank, target.scaling, 1)),
        }
    }
    for (name, [rows, columns], rank, scaling, layers) in groups {
        let parameters = (layers * rank * (rows + columns)) as u64;
        table.row([
            name,
            layers.to_string(),
            format!("[{rows}, {columns}]"),
            rank.to_string(),
            format!("{scaling}"),
            count(parameters),
        ]);
    }
    table
}

fn memory_table(plan: &Plan) -> Table {
    let parts = &plan.memory;
    let mut table = Table::new(["memory on the device", "estimate"]);
    for (name, bytes) in [
        ("the program and the rows", parts.program),
        ("linear weights", parts.linear_weights),
        ("embeddings, head, norms", parts.other_weights),
        ("adapters", parts.adapters),
        ("optimizer state", parts.optimizer),
        ("gradients and activations", parts.activations),
        ("copies while saving", parts.saving),
        ("at most at a time", parts.total()),
    ] {
        // Only the CPU has all of them.
        if bytes > 0 {
            table.row([name.to_string(), memory(bytes)]);
        }
    }
    table
}

/// What waits in the host's memory; nothing where nothing does.
fn host_table(plan: &Plan) -> String {
    let blocks = plan.weights.placement.streamed();
    let mut table = Table::new(["memory of the host", "estimate", "over the bus in a step"]);
    let names =
        [format!("frozen weights of {blocks} blocks"), "kept for the backward pass".into(), "optimizer state".into()];
    let parts = plan.host.parts();
    for (name, Waiting { bytes, moved }) in names.into_iter().zip(parts).filter(|(_, part)| part.bytes > 0) {
        table.row([name, memory(bytes), memory(moved)]);
    }
    match parts.iter().any(|part| part.bytes > 0) {
        true => format!("\n{table}"),
        false => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_that_goes_on_repeats_the_flags_and_quotes_them() {
        let of = |line: &[&str]| resume_command(line.iter().map(OsString::from), None);
        assert_eq!(
            of(&["train", "a b.toml", "--set", "train.epochs=2", "--overwrite", "--output-dir", "two words"]),
            "qlora train 'a b.toml' --set 'train.epochs=2' --output-dir 'two words' --resume"
        );
        for line in [
            &["train", "x.toml", "--resume", "--rank", "8"][..],
            &["train", "x.toml", "--resume", "auto-or-start", "--rank", "8"],
            &["train", "x.toml", "--resume=run/checkpoint-000004", "--accept-changes", "--rank", "8"],
        ] {
            assert_eq!(of(line), "qlora train x.toml --rank 8 --resume", "{line:?}");
        }
        let ranks = resume_command(["train", "x.toml"].iter().map(OsString::from), Some(2));
        assert_eq!(ranks, "qlora train x.toml --gpus 2 --resume");
    }
}
