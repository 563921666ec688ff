//! What the ranks of a run agree on before the first step. A process that is alone agrees with itself.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::start::Resumed;
use crate::checkpoint::{self, Basis};
use crate::checkpointing::Room;
use crate::config::TrainConfig;
use crate::error::TrainError;
use crate::ranks::Ranks;

/// Keys in which ranks may differ: where they are, where their files lie, and what changes no result. What the files hold is compared.
const OWN: &[&str] = &[
    "device",
    "model.path",
    "model.residency",
    "model.device_budget",
    "data.train",
    "data.eval",
    "data.columns",
    "data.subset",
    "data.split",
    "data.cache",
    "train.output_dir",
    "train.optimizer_budget",
    "train.memory_budget",
    "train.activation_checkpointing",
    "train.log_every",
    "train.log_to",
];

/// The configuration of the run that all ranks are together: one whose steps have the micro-batches of all.
///
/// # Errors
/// Ranks differ in a key that must be the same.
pub(super) fn configuration(mut config: TrainConfig, ranks: Option<&Ranks>) -> Result<TrainConfig, TrainError> {
    let Some(ranks) = ranks else { return Ok(config) };
    let keys = checkpoint::settings(&config)?.into_iter().map(|(key, value)| (key, value.to_string()));
    let shared = |(key, _): &(String, String)| !OWN.contains(&checkpoint::key_of(key)) && !key.starts_with("serve.");
    ranks.compare(&keys.filter(shared).collect::<Vec<_>>())?;
    let each = config.train.gradient_accumulation_steps;
    let range = || TrainError::ConfigRange {
        key: "train.gradient_accumulation_steps".into(),
        value: each.to_string(),
        allowed: format!("is too large for {} ranks", ranks.count()),
    };
    config.train.gradient_accumulation_steps = each.checked_mul(ranks.count()).ok_or_else(range)?;
    Ok(config)
}

/// What rank 0 tells of the checkpoint that it found.
#[derive(Serialize, Deserialize)]
struct Found {
    path: PathBuf,
    same_run: bool,
}

/// The checkpoint that rank 0 found, read by each rank.
///
/// # Errors
/// It can't be read here.
pub(super) fn resumed(found: Option<Resumed>, ranks: Option<&Ranks>) -> Result<Option<Resumed>, TrainError> {
    let Some(ranks) = ranks else { return Ok(found) };
    let told = found.as_ref().map(|found| {
        let path = &found.checkpoint.path;
        Found { path: path.canonicalize().unwrap_or_else(|_| path.clone()), same_run: found.same_run }
    });
    let fail = |path: &Path, problem: String| TrainError::Checkpoint { path: path.to_owned(), problem };
    let place = found.as_ref().map_or(Path::new(""), |found| &found.checkpoint.path);
    let told =
        serde_json::to_vec(&told).map_err(|e| fail(place, format!("its path can't be told to other ranks: {e}")))?;
    let told = ranks.broadcast(told)?;
    if ranks.rank() == 0 {
        return Ok(found);
    }
    let told: Option<Found> =
        serde_json::from_slice(&told).map_err(|e| fail(place, format!("rank 0 told rubbish: {e}")))?;
    told.map(read).transpose()
}

/// The checkpoint of which rank 0 told.
fn read(Found { path, same_run }: Found) -> Result<Resumed, TrainError> {
    if !path.is_dir() {
        let problem = "rank 0 found it, and this rank does not: train.output_dir has to be a folder that all hosts see";
        return Err(TrainError::Checkpoint { path, problem: problem.into() });
    }
    Ok(Resumed { checkpoint: checkpoint::load(&path)?, same_run })
}

/// Does what one process of each host has to do for all of them: the others do it after that, when nothing is left but to look.
///
/// # Errors
/// Those of `work`; another rank failed.
pub(super) fn one_of_each_host_first<T>(
    ranks: Option<&Ranks>,
    work: impl Fn() -> Result<T, TrainError>,
) -> Result<T, TrainError> {
    let Some(ranks) = ranks else { return work() };
    if ranks.place().local_rank > 0 {
        ranks.agree(false)?;
        return work();
    }
    let done = work()?;
    ranks.agree(false)?;
    Ok(done)
}

/// Compares what the ranks stand on.
///
/// # Errors
/// Ranks have other rows, another base, template or checkpoint.
pub(super) fn compare_basis(ranks: Option<&Ranks>, basis: &Basis, resumed: Option<&Resumed>) -> Result<(), TrainError> {
    let Some(ranks) = ranks else { return Ok(()) };
    let state = |found: &Resumed| serde_json::to_vec(&found.checkpoint.state).map(Sha256::digest).ok();
    let checkpoint = resumed.and_then(state).map(|hash| hash.iter().map(|byte| format!("{byte:02x}")).collect());
    let named = [
        ("the version of the program", Some(basis.program.clone())),
        ("the base (a hash of model.path's weights)", Some(basis.base.clone())),
        ("the training rows (a hash of data.train's tokens)", Some(basis.train_rows.clone())),
        ("the evaluation rows (a hash of their tokens)", Some(basis.eval_rows.clone())),
        ("the chat template (a hash)", basis.template.clone()),
        ("the adapters that the run begins and compares with (hashes)", basis.adapters.clone()),
        ("the checkpoint's state (a hash)", checkpoint),
    ];
    let named = named.map(|(name, value)| (name.to_string(), value.unwrap_or_else(|| "none".into())));
    Ok(ranks.compare(&named)?)
}

/// The room that each rank of this host has: their cards are never free to the same byte, and ranks that plan alike stream the same
/// blocks, from one copy. They wait for the slowest in every step anyhow.
///
/// # Errors
/// Another rank failed.
pub(super) fn room_of_host(room: Room, ranks: Option<&Ranks>) -> Result<Room, TrainError> {
    let Some(ranks) = ranks else { return Ok(room) };
    let all = ranks.all_gather(serde_json::to_vec(&(room.device, room.host)).unwrap_or_default())?;
    let of = |rank: usize| serde_json::from_slice::<(Option<u64>, u64)>(all.get(rank)?).ok();
    Ok(least(room, ranks.of_host().into_iter().filter_map(of)))
}

/// The least of a room and others, given as what they have on the device, where that is known, and on the host.
fn least(room: Room, others: impl Iterator<Item = (Option<u64>, u64)>) -> Room {
    others.fold(room, |room, (device, host)| Room {
        device: room.device.map(|room| device.map_or(room, |device| device.min(room))),
        host: room.host.min(host),
        ..room
    })
}

/// Whether any rank is to stop after this step, and the seconds that each rank's own part of it took.
///
/// # Errors
/// Another rank failed.
pub(super) fn after_step(ranks: &Ranks, stop: bool, seconds: f64) -> Result<(bool, Vec<f64>), TrainError> {
    let mut mine = seconds.to_le_bytes().to_vec();
    mine.push(u8::from(stop));
    let all = ranks.all_gather(mine)?;
    let seconds = |bytes: &Vec<u8>| bytes.get(..8)?.try_into().ok().map(f64::from_le_bytes);
    Ok((all.iter().any(|bytes| bytes.get(8) == Some(&1)), all.iter().filter_map(seconds).collect()))
}

/// Whether the flag is raised on any rank.
///
/// # Errors
/// Another rank failed.
pub(super) fn any(ranks: Option<&Ranks>, flag: bool) -> Result<bool, TrainError> {
    match ranks {
        Some(ranks) => Ok(ranks.agree(flag)?),
        None => Ok(flag),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_a_host_have_the_least_room_of_any() {
        let room = |device, host| Room { on_cpu: false, device, host, ranks: 4, of_host: 2 };
        let of = |own: Room, others: &[(Option<u64>, u64)]| least(own, others.iter().copied());
        assert_eq!(of(room(Some(9), 8), &[(Some(9), 8), (Some(7), 6)]), room(Some(7), 6));
        assert_eq!(of(room(Some(7), 9), &[(Some(9), 8)]), room(Some(7), 8));
        assert_eq!(of(room(Some(7), 9), &[(None, 9)]), room(Some(7), 9));
        assert_eq!(of(room(None, 9), &[(Some(7), 9)]), room(None, 9));
    }

    #[test]
    fn a_checkpoint_that_only_rank_0_sees_is_told() {
        let Err(error) = read(Found { path: "nowhere/checkpoint-000007".into(), same_run: true }) else {
            panic!("there is none")
        };
        let words = "nowhere/checkpoint-000007: rank 0 found it, and this rank does not";
        assert!(error.to_string().starts_with(words), "{error}");
    }
}
