//! `qlora-bench kernels`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use cubecl::future::block_on;
use serde_json::{Value, json};

use crate::bench::Bench;
use crate::case::Case;
use crate::ceilings::Ceilings;
use crate::peer::Peer;
use crate::report::Row;
use crate::timer::{Timer, Timing};
use crate::{families, machine};

/// Options of `kernels`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// auto, cuda, `cuda:<index>` or wgpu.
    #[arg(long, default_value = "auto")]
    device: String,
    /// The cases of which something is asked, instead of all.
    #[arg(long)]
    bars: bool,
    /// Only cases whose kernel, shape and model contain one of these, separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "TEXT")]
    only: Vec<String>,
    /// The same shapes through bitsandbytes and torch in this Python.
    #[arg(long, value_name = "PYTHON")]
    peer: Option<String>,
    /// What runs in it.
    #[arg(long, value_name = "FILE", default_value = "benches/peers/bench_kernels_bnb.py")]
    peer_script: PathBuf,
    /// Writes the figures to a file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Writes the figures to `DIR/<gpu>/<date>-kernels.json`.
    #[arg(long, value_name = "DIR", conflicts_with = "json")]
    record: Option<PathBuf>,
    /// Names the cases and ends.
    #[arg(long)]
    list: bool,
    /// Runs each case once, without timing it, and ends: later runs find their kernels compiled.
    #[arg(long)]
    compile: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let bench = Bench::open(&args.device)?;
    let mut cases = if args.bars { families::bars(&bench) } else { families::all(&bench) };
    cases.retain(|case| args.only.is_empty() || args.only.iter().any(|text| case.name().contains(text)));
    if cases.is_empty() {
        bail!("no case is called that; --list names them");
    }
    if args.list {
        cases.iter().for_each(|case| println!("{}", case.name()));
        return Ok(());
    }
    if args.compile {
        return compile(&bench, &cases);
    }
    println!("{}, {}", machine::gpu(&bench.client), bench.format);

    // One after the other: the peer's process has ended when ours are measured.
    let peer = args.peer.as_deref().and_then(|python| match Peer::run(python, &args.peer_script, &cases) {
        Ok(peer) => Some(peer),
        Err(error) => {
            eprintln!("no peer: {error:#}");
            None
        }
    });
    let timer = Timer::new(&bench.client);
    let mut ceilings = Ceilings::measure(&bench, &timer)?;
    if let Some(Peer { about, .. }) = &peer {
        let versions: Vec<String> = about.versions.iter().map(|(name, version)| format!("{name} {version}")).collect();
        println!("peer: {}", versions.join(", "));
        ceilings.offer_bandwidth(about.bandwidth, "torch's copy");
        ceilings.offer_flops(about.flops, "torch's matmul");
    }
    println!("ceilings: {:.0} GB/s ({})", ceilings.bandwidth / 1e9, ceilings.bandwidth_by);
    if let Some((flops, by)) = &ceilings.flops {
        println!("          {:.0} TFLOP/s ({by})", flops / 1e12);
    }

    println!("\n{}", Row::header());
    let mut rows = Vec::new();
    for (index, case) in cases.iter().enumerate() {
        let timing = measure(&bench, &timer, case).map_err(|error| format!("{error:#}"));
        let peer = peer.as_ref().and_then(|peer| peer.times.get(&index).cloned());
        let row = Row { case, timing, peer };
        println!("{}", row.line(&ceilings));
        rows.push(row);
    }
    if rows.iter().any(|row| row.timing.as_ref().is_ok_and(|timing| !timing.queued)) {
        println!("* waits for the device itself: the host's part is in the time");
    }

    for row in &rows {
        if let Some(ratio) = over_base(&rows, row) {
            println!("{}: {:+.1} % over the base alone", row.case.name(), 100.0 * (ratio - 1.0));
        }
    }

    let path = match (&args.json, &args.record) {
        (Some(path), _) => path.clone(),
        (None, Some(dir)) => machine::record_path(dir, &machine::gpu(&bench.client), "kernels"),
        (None, None) => return Ok(()),
    };
    write(&path, &record(&bench, &ceilings, peer.as_ref(), &rows))
}

fn compile(bench: &Bench, cases: &[Case]) -> Result<()> {
    for case in cases.iter().chain(&families::peak(bench)) {
        let start = Instant::now();
        let mut run = (case.prepare)(bench)?;
        (run.call)(0)?;
        block_on(bench.client.sync_buffers(&run.outputs)).with_context(|| case.name())?;
        drop(run);
        bench.client.memory_cleanup()?;
        println!("{:.1} s: {}", start.elapsed().as_secs_f64(), case.name());
    }
    Ok(())
}

/// Buffers live as long as their case.
fn measure(bench: &Bench, timer: &Timer, case: &Case) -> Result<Timing> {
    let mut run = (case.prepare)(bench)?;
    let timing = timer.time(&mut run);
    drop(run);
    bench.client.memory_cleanup()?;
    timing
}

/// The time of a product with LoRA's folded in, over that of the same product without.
fn over_base(rows: &[Row<'_>], row: &Row<'_>) -> Option<f64> {
    let (base, _) = row.case.shape.split_once(" rank ")?;
    let base = rows.iter().find(|other| other.case.kernel == row.case.kernel && other.case.shape == base)?;
    Some(row.timing.as_ref().ok()?.seconds / base.timing.as_ref().ok()?.seconds)
}

fn record(bench: &Bench, ceilings: &Ceilings, peer: Option<&Peer>, rows: &[Row<'_>]) -> Value {
    let mut record = machine::describe(&bench.client);
    record["script"] = json!("cargo xtask bench kernels");
    if let Some(Peer { about, .. }) = peer {
        record["peer"] = json!(about.versions);
    }
    let dense = ceilings.flops.as_ref();
    record["ceilings"] = json!({
        "gb_per_second": (ceilings.bandwidth / 1e9).round(),
        "gb_per_second_by": ceilings.bandwidth_by,
        "tflop_per_second": dense.map(|(flops, _)| (flops / 1e12).round()),
        "tflop_per_second_by": dense.map(|(_, by)| by),
    });
    let lines = rows.iter().map(|row| {
        let mut line = row.json(ceilings);
        if let Some(ratio) = over_base(rows, row) {
            line["over_base"] = json!((ratio * 1e3).round() / 1e3);
        }
        line
    });
    record["kernels"] = lines.collect();
    record
}

/// Saves a record and says so.
pub(crate) fn write(path: &Path, record: &Value) -> Result<()> {
    save(path, record)?;
    println!("written to {}", path.display());
    Ok(())
}

/// The record with one line per case: it is read and compared by people.
pub(crate) fn save(path: &Path, record: &Value) -> Result<()> {
    let mut text = String::from("{\n");
    let fields = record.as_object().context("a record is an object")?;
    for (index, (key, value)) in fields.iter().enumerate() {
        let value = match value.as_array() {
            Some(rows) => {
                let rows: Vec<String> = rows.iter().map(|row| format!("    {row}")).collect();
                format!("[\n{}\n  ]", rows.join(",\n"))
            }
            None => value.to_string(),
        };
        let comma = if index + 1 < fields.len() { "," } else { "" };
        text.push_str(&format!("  {}: {value}{comma}\n", json!(key)));
    }
    text.push_str("}\n");
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    // A new file beside it, then the rename: never half a record.
    let temporary = path.with_extension("json.tmp");
    std::fs::write(&temporary, text)
        .and_then(|()| std::fs::rename(&temporary, path))
        .with_context(|| path.display().to_string())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_json_with_a_line_per_case() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b.json");
        let record = json!({"gpu": "x", "kernels": [{"us": 1.5}, {"us": 2}]});
        write(&path, &record).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 7);
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), record);
    }
}
