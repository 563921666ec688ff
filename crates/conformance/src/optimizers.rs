//! Section `optimizers`: ten steps of bitsandbytes' optimizers on the same gradients (`bnb/optimizers.*`).
//!
//! Parameters are compared after each step, the state after the last one; 8-bit state as the values that it stands
//! for. The bars are those of bitsandbytes' own tests of its optimizers against PyTorch:
//!
//! - 32-bit: 1e-6 absolute plus 1e-5 relative. Errors count the parameters beyond.
//! - 8-bit: parameters 6e-5 absolute plus 6e-4 relative; errors count those beyond. Of the state at most 20 elements may be
//!   off by more than 3e-3: a moment within rounding of the middle between two entries of the map takes either.
//!
//! The recorded 8-bit maps must be ours bit for bit. The file may hold the first elements only, cut at a multiple of
//! 256: blocks do not know of each other. Paged optimizers of bitsandbytes give what the others do, and are compared with
//! ours under a budget that holds a tenth of the state.

use anyhow::{Context, Result, bail};
use burn::tensor::{DType, Device, Tensor, TensorData};
use burn_qlora::adapter_io::Checkpoint;
use burn_qlora::paged_optim::{
    BLOCKSIZE, Budget, Moment, Optimizer, OptimizerConfig, OptimizerKind, Update, dynamic_map,
};
use serde::Deserialize;

use crate::compare::{count_different_bits, to_vec};
use crate::{Reference, Report};

const TENSORS: &str = "bnb/optimizers.safetensors";
const SETTINGS: &str = "bnb/optimizers.json";

/// How ours stands to what is recorded under a name.
struct Recorded {
    name: &'static str,
    kind: OptimizerKind,
    /// Share of the state that the budget holds.
    budget: Option<u64>,
}

const RECORDED: [Recorded; 6] = [
    Recorded { name: "torch_adamw", kind: OptimizerKind::AdamW32bit, budget: None },
    Recorded { name: "adamw32", kind: OptimizerKind::AdamW32bit, budget: None },
    Recorded { name: "paged_adamw32", kind: OptimizerKind::AdamW32bit, budget: Some(10) },
    Recorded { name: "adamw8", kind: OptimizerKind::AdamW8bit, budget: None },
    Recorded { name: "paged_adamw8", kind: OptimizerKind::AdamW8bit, budget: Some(10) },
    Recorded { name: "lion8", kind: OptimizerKind::Lion8bit, budget: None },
];

#[derive(Deserialize)]
struct Settings {
    lr: f64,
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
    steps: usize,
}

/// Compares every optimizer that is recorded.
///
/// # Errors
/// A file cannot be read, or the device fails.
pub fn cases(reference: &Reference, device: &Device, report: &mut Report) -> Result<()> {
    if reference.find(TENSORS).is_none() || reference.find(SETTINGS).is_none() {
        report.skip("optimizers", format!("no {TENSORS} or no {SETTINGS}"));
        return Ok(());
    }
    let file = reference.tensors(TENSORS)?;
    let settings: Settings = reference.json(SETTINGS)?;
    for recorded in &RECORDED {
        match file.get(&format!("{}.params", recorded.name)) {
            Some(_) => compare(recorded, &settings, &file, device, report)?,
            None => report.skip(format!("optimizers {}", recorded.name), format!("not in {TENSORS}")),
        }
    }
    Ok(())
}

fn compare(
    recorded: &Recorded,
    settings: &Settings,
    file: &Checkpoint,
    device: &Device,
    report: &mut Report,
) -> Result<()> {
    let Recorded { name, kind, budget } = *recorded;
    let floats = |name: &str| -> Result<Vec<f32>> { Ok(file.tensor(name)?.to_f32_vec()?) };
    let (start, grads, params) = (floats("param0")?, floats("grads")?, floats(&format!("{name}.params"))?);
    let len = start.len();
    if grads.len() != settings.steps * len || params.len() != grads.len() {
        bail!("{TENSORS}: {name} has {} parameters, of {} steps of {len}", params.len(), settings.steps);
    }
    let config = OptimizerConfig {
        kind,
        betas: settings.betas,
        eps: settings.eps,
        weight_decay: settings.weight_decay,
        // Recorded of more elements than the file may hold.
        min_8bit_size: 0,
    };
    let budget = budget.map_or(Budget::Unlimited, |share| Budget::Bytes(config.state_bytes(len) / share));
    let mut optimizer = Optimizer::new(config, &[len], device, budget);
    let tensor =
        |values: &[f32]| Tensor::<1>::from_data(TensorData::new(values.to_vec(), [values.len()]), (device, DType::F32));
    let mut param = tensor(&start);
    let (absolute, relative) = if kind == OptimizerKind::AdamW32bit { (1e-6, 1e-5) } else { (6e-5, 6e-4) };
    let mut worst = 0.0_f64;
    let mut beyond = 0;
    for (grad, theirs) in grads.chunks(len).zip(params.chunks(len)) {
        let updates = vec![Update { index: 0, param, grad: tensor(grad) }];
        param = optimizer.step(updates, settings.lr, None)?.pop().context("one parameter in, one out")?;
        for (ours, theirs) in to_vec(param.clone())?.iter().zip(theirs) {
            let off = f64::from((ours - theirs).abs());
            let bar = absolute + relative * f64::from(theirs.abs());
            worst = worst.max(off);
            beyond += usize::from(off > bar || off.is_nan());
        }
    }
    let subject = format!("optimizers {name}");
    report.compare_noted(
        format!("{subject}: parameters beyond {absolute:.0e} + {relative:.0e} relative"),
        beyond as f64,
        0.0,
        format!("{} steps, worst {worst:.1e}, {} bytes paged in", settings.steps, optimizer.paging().bytes_in),
    );
    let state = optimizer.state()?.pop().context("one parameter")?;
    for (i, (part, moment)) in kind.moments().iter().zip(&state).enumerate() {
        // bitsandbytes counts from 1, PyTorch has names.
        let theirs = [format!("{name}.state.state{}", i + 1), format!("{name}.state.exp_avg{}", ["", "_sq"][i])];
        let Some(theirs) = theirs.iter().find(|name| file.get(name).is_some()) else {
            report.skip(format!("{subject}: {part}"), "not recorded");
            continue;
        };
        let theirs = file.tensor(theirs)?;
        let (error, bar, what) = match moment {
            Moment::Full(ours) => {
                let theirs = theirs.to_f32_vec()?;
                // Ten roundings of sums whose terms are at most 4 or so (v's: 16).
                let beyond = ours.iter().zip(&theirs).filter(|(a, b)| (*a - *b).abs() > 1e-6 + 1e-5 * b.abs()).count();
                (beyond, 0.0, "values beyond 1e-6 + 1e-5 relative")
            }
            Moment::Block8 { codes, absmax } => {
                let map = if i == 0 { dynamic_map::signed() } else { dynamic_map::unsigned() };
                let recorded_map = floats(&format!("{name}.state.qmap{}", i + 1))?;
                let differing = count_different_bits(map.values(), &recorded_map);
                report.compare(format!("{subject}: entries of {part}'s map that differ"), differing, 0.0);
                let their_absmax = floats(&format!("{name}.state.absmax{}", i + 1))?;
                let value = |code: u8, absmax: f32| map.values()[usize::from(code)] * absmax;
                let beyond = codes.iter().zip(theirs.data).enumerate().filter(|(i, (ours, theirs))| {
                    let block = i / BLOCKSIZE;
                    let off = value(**ours, absmax[block]) - value(**theirs, their_absmax[block]);
                    off.is_nan() || off.abs() > 3e-3
                });
                (beyond.count() + codes.len().abs_diff(theirs.data.len()), 20.0, "values off by more than 3e-3")
            }
        };
        report.compare(format!("{subject}: {part}, {what}"), error as f64, bar);
    }
    Ok(())
}
