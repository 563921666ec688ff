//! `qlora-bench stress`: rows grow until the device is short.
//!
//! One model trains on longer and longer rows, with the optimizer's budget left to itself. What it asks for: that state
//! makes way as activations grow, and that a row which is too long after all fails alone, with the run able to go on.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use burn_qlora::TrainConfig;
use burn_qlora::qlora_models::device_memory;
use burn_qlora::qlora_train::{Engine, TrainError};
use cudarc::driver::{CudaContext, CudaSlice};

use super::case::Case;
use super::measure::random_engine;
use super::report::{gib, mib};
use super::{Setting, cuda_index, open, shapes};

/// Rows grow by this much, up to whole multiples of [`MULTIPLE`] tokens.
const GROWTH: f64 = 1.25;
const MULTIPLE: usize = 64;

/// Options of `stress`.
#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    setting: Setting,
    /// train.activation_checkpointing.
    #[arg(long, default_value = "full")]
    policy: String,
    /// Rows and tokens to begin with.
    #[arg(long, value_name = "ROWSxTOKENS", default_value = "1x1024")]
    case: Case,
    /// The most tokens of a row.
    #[arg(long, default_value_t = 131_072)]
    until: usize,
    /// Takes memory of the device away first, until so many GiB are left (CUDA).
    #[arg(long, value_name = "GiB")]
    leave: Option<f64>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let shape = shapes::config(&args.setting.shape, args.setting.layers, args.setting.words)?;
    let config = args.setting.config(&args.policy)?;
    let (device, _) = open(&args.setting.device)?;
    let leaving = |gib| all_but((gib * f64::from(1 << 30)) as usize, &args.setting.device);
    let _taken = args.leave.map(leaving).transpose()?;
    let mut engine = random_engine(&shape, &config, args.case, &device, None)?;
    println!("optimizer state: {} MiB", mib(engine.optimizer().state_bytes()));
    println!("{:>10} {:>9} {:>8} {:>9} {:>9}  MiB", "case", "step ms", "in use", "resident", "evicted");

    let mut evicted_before_the_end = false;
    let mut failure = None;
    for len in lengths(args.case.len, args.until) {
        let case = Case { len, ..args.case };
        match step(&mut engine, &config, case) {
            Ok(line) => {
                println!("{line}");
                evicted_before_the_end |= engine.optimizer().paging().evicted > 0;
            }
            Err(error) if matches!(error.downcast_ref(), Some(TrainError::OutOfMemory { .. })) => {
                println!("{case:>10} {error:#}");
                failure = Some(case);
                break;
            }
            Err(error) => return Err(error),
        }
    }
    let Some(too_long) = failure else {
        println!("no row was too long; state was{} evicted", if evicted_before_the_end { "" } else { " not" });
        return Ok(());
    };
    // A run whose batch did not fit goes on with the next one.
    println!("{}", step(&mut engine, &config, args.case).with_context(|| format!("after {too_long} had failed"))?);
    ensure!(evicted_before_the_end, "{too_long} failed, and no state had made way before");
    println!("state made way before {too_long} failed, and the run went on");
    Ok(())
}

/// A step, and its line.
fn step(engine: &mut Engine, config: &TrainConfig, case: Case) -> Result<String> {
    let start = Instant::now();
    let batch = case.batch(engine.model().config().vocab_size, case.len as u64);
    engine.step(&[batch], config.train.learning_rate, config.train.seed)?;
    let milliseconds = start.elapsed().as_secs_f64() * 1e3;
    let (in_use, _) = device_memory(engine.model().device()).unwrap_or_default();
    let (state, resident) = (engine.optimizer().state_bytes(), engine.optimizer().paging().resident_bytes);
    let [in_use, resident, away] = [in_use, resident, state - resident].map(mib);
    Ok(format!("{case:>10} {milliseconds:>9.1} {in_use:>8} {resident:>9} {away:>9}"))
}

/// Growing lengths, `last` at most.
fn lengths(first: usize, last: usize) -> impl Iterator<Item = usize> {
    let next = |len: &usize| Some(((*len as f64 * GROWTH) as usize).next_multiple_of(MULTIPLE));
    std::iter::successors(Some(first), next).take_while(move |len| *len <= last)
}

/// Takes all of a card's memory but `leave` bytes, as another program would, until it is dropped.
fn all_but(leave: usize, device: &str) -> Result<Option<CudaSlice<u8>>> {
    // Without a driver, loading it panics.
    let open = |index| std::panic::catch_unwind(|| CudaContext::new(index)).ok().and_then(Result::ok);
    let context = cuda_index(device).and_then(open);
    let context = context.context("--leave needs a CUDA device: no other one tells what is left")?;
    let (free, _) = context.mem_get_info()?;
    let Some(take) = free.checked_sub(leave) else {
        bail!("{} GiB are free, less than --leave asks for", gib(free as u64))
    };
    let stream = context.default_stream();
    let taken = (take > 0).then(|| stream.alloc_zeros::<u8>(take)).transpose()?;
    stream.synchronize()?;
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn stress(line: &str) -> Result<()> {
        run(&Line::try_parse_from(line.split(' ')).unwrap().args)
    }

    #[test]
    fn a_tiny_model_trains_on_growing_rows() {
        stress("stress --shape tiny --rank 2 --device cpu --case 1x8 --until 64").unwrap();
        let message = stress("stress --shape tiny --device cpu --leave 1").unwrap_err().to_string();
        assert!(message.contains("CUDA"), "{message}");
    }

    #[test]
    fn lengths_grow_and_end() {
        let found: Vec<usize> = lengths(1024, 2048).collect();
        assert_eq!(found, [1024, 1280, 1600, 2048]);
        assert_eq!(lengths(2, 100).collect::<Vec<_>>(), [2, 64]);
        assert_eq!(lengths(200, 100).count(), 0);
    }
}
