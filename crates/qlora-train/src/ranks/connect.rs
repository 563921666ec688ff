//! Which way the gradients take: all ranks take the same one, by what each of them finds on its host.

use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::tensor::Device;
use device_collectives::{CollectiveError, Endpoint, Nccl};
use host_copies::{client_of, is_cuda};
use serde::{Deserialize, Serialize};

use super::devices::{CUBES_BESIDE, Cards};
use super::shards::ShardStore;
use super::{Ranks, SumBuckets, Way};
use crate::config::Transport;
use crate::error::TrainError;

/// How long the cards may take to meet once all ranks want to.
const MEETING: Duration = Duration::from_secs(120);

/// What a rank finds on its host.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Found {
    /// NCCL of a version.
    Nccl(String),
    /// The device is none that NCCL is for.
    NoCard,
    /// Why not.
    Problem(String),
}

/// Why the gradients of some ranks can't go from card to card.
#[derive(Debug, PartialEq, Eq)]
enum Obstacle {
    /// No rank has a CUDA device: there is nothing to tell.
    NoCards,
    /// In words.
    Of(String),
}

impl Ranks {
    /// The ranks with the way that their gradients are to take, and what there is to say of that. `device` is this rank's.
    ///
    /// # Errors
    /// `transport` asks for NCCL and a rank can't; another rank failed.
    pub fn connect(self, device: &Device, transport: Transport) -> Result<(Self, Option<String>), TrainError> {
        if transport == Transport::Tcp {
            return Ok((self, None));
        }
        let on_cuda = client_of(device).is_some_and(|client| is_cuda(&client));
        let open = || Endpoint::new(Nccl::load()?, device);
        let endpoint = if on_cuda { open().map(Some) } else { Ok(None) };
        let found = match &endpoint {
            Ok(Some(endpoint)) => Found::Nccl(endpoint.version()),
            Ok(None) => Found::NoCard,
            Err(error) => Found::Problem(error.to_string()),
        };
        let obstacle = match (self.agreed(&found)?, endpoint) {
            (Ok(()), Ok(Some(endpoint))) => {
                let version = endpoint.version();
                match self.fastest(endpoint, device)? {
                    Ok((cards, rate)) => {
                        let note = format!(
                            "gradients go from card to card, by NCCL {version}, at {:.1} GB/s: {}",
                            rate / 1e9,
                            if cards.beside() { "while the backward pass goes on" } else { "behind the backward pass" }
                        );
                        return Ok((Self { way: Way::Devices(Arc::new(cards)), ..self }, Some(note)));
                    }
                    Err(problem) => Obstacle::Of(problem),
                }
            }
            (Err(obstacle), _) => obstacle,
            // What all agreed on includes this rank.
            (Ok(()), _) => Obstacle::NoCards,
        };
        match (transport, obstacle) {
            (Transport::Nccl, obstacle) => Err(TrainError::Transport {
                problem: match obstacle {
                    Obstacle::NoCards => CollectiveError::NotCuda.to_string(),
                    Obstacle::Of(problem) => problem,
                },
            }),
            (_, Obstacle::NoCards) => Ok((self, None)),
            (_, Obstacle::Of(problem)) => {
                let note =
                    format!("gradients go through the memory of the hosts, which costs some of the speed: {problem}");
                Ok((self, Some(note)))
            }
        }
    }

    /// Where the frozen weights of blocks go that the ranks share.
    ///
    /// # Errors
    /// Gradients go from card to card, and the weights can't; another rank failed.
    pub(crate) fn shard_store(&self, device: &Device) -> Result<ShardStore, TrainError> {
        let on_cuda = client_of(device).is_some_and(|client| is_cuda(&client));
        if self.devices().is_none() || !on_cuda {
            return Ok(ShardStore::new(self.clone(), device, None));
        }
        let endpoint = Endpoint::new(Nccl::load()?, device)?;
        match self.meet(endpoint, device, true)? {
            Ok(cards) => Ok(ShardStore::new(self.clone(), device, Some(cards))),
            Err(problem) => Err(TrainError::Transport { problem }),
        }
    }

    /// Whether all ranks can.
    fn agreed(&self, found: &Found) -> Result<Result<(), Obstacle>, TrainError> {
        let all = self.all_gather(serde_json::to_vec(found).unwrap_or_default())?;
        let all = all.iter().map(|found| {
            serde_json::from_slice(found).unwrap_or_else(|error| Found::Problem(format!("it can't be read: {error}")))
        });
        Ok(judge(&all.collect::<Vec<Found>>(), self.group.hosts()))
    }

    /// Meets the other ranks such that sums cost least, and the bytes that all of them sum per second.
    fn fastest(&self, endpoint: Endpoint, device: &Device) -> Result<Result<(Cards, f64), String>, TrainError> {
        let cards = match self.meet(endpoint, device, false)? {
            Ok(cards) => cards,
            Err(problem) => return Ok(Err(problem)),
        };
        let rate = cards.rate(device).map_err(|problem| TrainError::Transport { problem })?;
        let rates = self.all_gather(rate.to_le_bytes().to_vec())?;
        let rate = |bytes: &Vec<u8>| bytes.as_slice().try_into().map_or(f64::NAN, f64::from_le_bytes);
        let slowest = rates.iter().map(rate).fold(f64::INFINITY, f64::min);
        if !Cards::is_slow(slowest) {
            return Ok(Ok((cards, slowest)));
        }
        drop(cards);
        let endpoint = Endpoint::new(Nccl::load()?, device)?;
        Ok(self.meet(endpoint, device, true)?.map(|cards| (cards, slowest)))
    }

    /// Meets the other ranks by NCCL, for operations beside kernels or between them; in words why that failed, on whichever rank.
    fn meet(&self, endpoint: Endpoint, device: &Device, beside: bool) -> Result<Result<Cards, String>, TrainError> {
        let id = match self.rank() {
            0 => endpoint.unique_id(),
            _ => Ok(Vec::new()),
        };
        let (id, problem) = id.map_or_else(|error| (Vec::new(), error.to_string()), |id| (id, String::new()));
        let id = self.broadcast(id)?;
        if id.is_empty() {
            return Ok(Err(self.first_problem(problem)?.unwrap_or_default()));
        }
        let start = Instant::now();
        let over = || start.elapsed() > MEETING || self.failure().is_some();
        let cubes = beside.then_some(CUBES_BESIDE);
        let joined = endpoint.join(self.rank(), self.count(), &id, cubes, over);
        if let Some(failure) = self.failure() {
            return Err(failure.into());
        }
        let (cards, problem) = match joined {
            Ok(collectives) => (Some(Cards::new(collectives, beside)), String::new()),
            Err(CollectiveError::Aborted) => {
                (None, format!("the cards did not meet within {} s (NCCL_DEBUG=INFO says more)", MEETING.as_secs()))
            }
            Err(error) => (None, error.to_string()),
        };
        match (self.first_problem(problem)?, cards) {
            (None, Some(cards)) => {
                cards.watch(&self.group)?;
                // From here on a rank that fails ends all: the others wait for its sums.
                cards.try_out(device, self.count()).map_err(|problem| TrainError::Transport { problem })?;
                Ok(Ok(cards))
            }
            (problem, _) => Ok(Err(problem.unwrap_or_default())),
        }
    }

    /// The first rank's problem, of those that have one, which is the same on all.
    fn first_problem(&self, mine: String) -> Result<Option<String>, TrainError> {
        let problems = self.all_gather(mine.into_bytes())?;
        let mut all = problems.iter().zip(self.group.hosts()).enumerate();
        let first = all.find(|(_, (problem, _))| !problem.is_empty());
        Ok(first.map(|(rank, (problem, host))| format!("rank {rank} on {host}: {}", String::from_utf8_lossy(problem))))
    }
}

/// Whether all ranks have the same NCCL.
fn judge(all: &[Found], hosts: &[String]) -> Result<(), Obstacle> {
    if all.iter().all(|found| *found == Found::NoCard) {
        return Err(Obstacle::NoCards);
    }
    let of = |rank: usize, words: &str| {
        let host = hosts.get(rank).map_or("?", String::as_str);
        Err(Obstacle::Of(format!("rank {rank} on {host}: {words}")))
    };
    for (rank, found) in all.iter().enumerate() {
        match (found, &all[0]) {
            (Found::Problem(problem), _) => return of(rank, problem),
            (Found::NoCard, _) => return of(rank, "its device is none of CUDA's"),
            (Found::Nccl(version), Found::Nccl(first)) if version != first => {
                return of(rank, &format!("it has NCCL {version}, and rank 0 has {first}: install the same one"));
            }
            (Found::Nccl(_), _) => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ranks_need_the_same_library() {
        let nccl = |version: &str| Found::Nccl(version.into());
        let hosts: Vec<String> = ["a", "b", "c"].map(String::from).to_vec();
        let of = |all: &[Found]| judge(all, &hosts);
        let words = |text: &str| Err(Obstacle::Of(text.into()));
        assert_eq!(of(&[nccl("2.27.3"), nccl("2.27.3")]), Ok(()));
        assert_eq!(of(&[Found::NoCard, Found::NoCard]), Err(Obstacle::NoCards));
        let other = "rank 2 on c: it has NCCL 2.26.2, and rank 0 has 2.27.3: install the same one";
        assert_eq!(of(&[nccl("2.27.3"), nccl("2.27.3"), nccl("2.26.2")]), words(other));
        assert_eq!(of(&[nccl("2.27.3"), Found::Problem("gone".into())]), words("rank 1 on b: gone"));
        assert_eq!(of(&[Found::NoCard, nccl("2.27.3")]), words("rank 0 on a: its device is none of CUDA's"));
    }
}
