//! One copy of the frozen weights that wait in a host's memory, for all ranks of the host.

use std::sync::Arc;

use burn::tensor::Device;
use host_copies::{SharedPages, client_of};
use qlora_layers::streamed::Sharers;
use qlora_models::Placement;
use serde::{Deserialize, Serialize};

use super::Ranks;
use crate::error::TrainError;

/// What a rank tells the others.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Offer {
    /// The blocks that it is to stream.
    blocks: Vec<usize>,
    /// What its device is: some blocks can wait for one kind, and not for another.
    device: String,
    /// Where the copy is, of the first rank of a host.
    address: Vec<u8>,
    /// Why there is none.
    problem: String,
}

impl Ranks {
    /// What this rank needs to share the weights of its streamed blocks with the other ranks of its host; `None` where there are no
    /// others. In words why they don't, where they could save memory. Every rank has to come here, also one that streams nothing.
    ///
    /// # Errors
    /// Another rank failed.
    pub(crate) fn sharers(
        &self,
        placement: &Placement,
        device: &Device,
    ) -> Result<Result<Option<Sharers>, String>, TrainError> {
        let peers = self.of_host();
        let number = peers.iter().position(|rank| *rank == self.rank()).unwrap_or(0);
        let kind = client_of(device).map_or_else(|| "cpu".to_string(), |client| client.name().to_string());
        let mut mine = Offer { blocks: placement.blocks().collect(), device: kind, ..Offer::default() };
        let mut pages = None;
        if number == 0 && peers.len() > 1 && !mine.blocks.is_empty() {
            match SharedPages::new() {
                Ok(fresh) => {
                    mine.address = fresh.address();
                    pages = Some(fresh);
                }
                Err(error) => mine.problem = error.to_string(),
            }
        }
        let offers = self.all_gather(serde_json::to_vec(&mine).unwrap_or_default())?;
        let of = |rank: &usize| offers.get(*rank).and_then(|bytes| serde_json::from_slice::<Offer>(bytes).ok());
        let offers: Vec<Offer> = peers.iter().map(|rank| of(rank).unwrap_or_default()).collect();
        let opened = judge(&offers).and_then(|()| match (pages, offers.first()) {
            (Some(pages), _) => Ok(Some(pages)),
            (None, Some(first)) if peers.len() > 1 && !mine.blocks.is_empty() => {
                let unseen =
                    |error| format!("rank {} does not see the memory of rank {}: {error}", self.rank(), peers[0]);
                SharedPages::open(&first.address).map(Some).map_err(unseen)
            }
            _ => Ok(None),
        });
        // All ranks of a host do or none.
        let problem = opened.as_ref().err().cloned().unwrap_or_default();
        let problems = self.all_gather(problem.into_bytes())?;
        let problem = peers.iter().filter_map(|rank| problems.get(*rank)).find(|problem| !problem.is_empty());
        Ok(match (problem, opened) {
            (Some(problem), _) => Err(String::from_utf8_lossy(problem).into_owned()),
            (None, Ok(Some(pages))) => {
                let group = Arc::clone(&self.group);
                let failure = Box::new(move || group.failure().map(|failure| failure.to_string()));
                Ok(Some(Sharers { pages, number, count: peers.len(), failure }))
            }
            (None, _) => Ok(None),
        })
    }
}

/// Whether ranks of one host stream the same blocks, and the first one has memory for them.
fn judge(offers: &[Offer]) -> Result<(), String> {
    let Some(first) = offers.first() else { return Ok(()) };
    if let Some(other) = offers.iter().find(|offer| offer.blocks != first.blocks) {
        let (few, many) = (first.blocks.len(), other.blocks.len());
        return Err(format!("they have room for different blocks ({few} and {many} wait on the host)"));
    }
    if let Some(other) = offers.iter().find(|offer| offer.device != first.device) {
        return Err(format!("their devices are of different kinds ({} and {})", first.device, other.device));
    }
    if first.problem.is_empty() { Ok(()) } else { Err(first.problem.clone()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_a_host_stream_the_same_blocks_or_share_nothing() {
        let offer = |blocks: &[usize]| Offer { blocks: blocks.to_vec(), ..Offer::default() };
        assert_eq!(judge(&[]), Ok(()));
        assert_eq!(judge(&[offer(&[1, 3]), offer(&[1, 3])]), Ok(()));
        let differ = judge(&[offer(&[1, 3]), offer(&[1])]);
        assert_eq!(differ, Err("they have room for different blocks (2 and 1 wait on the host)".into()));
        let on = |device: &str| Offer { device: device.into(), ..offer(&[1]) };
        assert_eq!(judge(&[on("cuda"), on("cuda")]), Ok(()));
        assert_eq!(judge(&[on("cuda"), on("cpu")]), Err("their devices are of different kinds (cuda and cpu)".into()));
        let failed = Offer { problem: "no memory".into(), ..offer(&[1]) };
        assert_eq!(judge(&[failed, offer(&[1])]), Err("no memory".into()));
    }
}
