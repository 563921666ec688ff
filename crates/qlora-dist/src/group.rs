//! Ranks that have met, and what they do together.

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::error::DistError;
use crate::link::Shared;
use crate::place::Place;
use crate::rendezvous::{host_name, meet};
use crate::wire::{Call, Failure, Op};

/// How long ranks wait for each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For all to come to rank 0.
    pub rendezvous: Duration,
    /// For a sign of life of a rank; each gives ten in this time.
    pub silence: Duration,
}

impl Default for Timeouts {
    /// Five minutes to come, as hosts of a cluster start at different times, and 45 seconds of silence.
    fn default() -> Self {
        Self { rendezvous: Duration::from_secs(300), silence: Duration::from_secs(45) }
    }
}

/// The ranks of a run.
///
/// Operations are collective: all ranks call the same ones in the same order. After one has failed all later ones
/// fail, with the same error.
pub struct Group {
    place: Place,
    hosts: Vec<String>,
    shared: Arc<Shared>,
    /// Operations so far. Held during one: they do not mix.
    calls: Mutex<u64>,
    threads: Vec<JoinHandle<()>>,
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group").field("place", &self.place).field("hosts", &self.hosts).finish_non_exhaustive()
    }
}

impl Group {
    /// Meets the other ranks at rank 0's address. A process that is alone meets nobody, at once.
    ///
    /// # Errors
    /// Rank 0 can't listen, is not found or is something else; a rank is missing, is there twice, or belongs to another run; the
    /// system gives no thread.
    pub fn join(place: Place, timeouts: Timeouts) -> Result<Self, DistError> {
        let host = host_name();
        let (peers, hosts) = meet(&place, &host, timeouts.rendezvous)?;
        let system = |source| DistError::System { rank: place.rank, source };
        let shared = Shared::new(place.rank, host, timeouts.silence, peers).map_err(system)?;
        let threads = shared.start().map_err(system)?;
        Ok(Self { place, hosts, shared, calls: Mutex::new(0), threads })
    }

    /// Where this process stands.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// This process's number.
    pub fn rank(&self) -> usize {
        self.place.rank
    }

    /// How many ranks there are.
    pub fn world_size(&self) -> usize {
        self.place.world_size
    }

    /// The host of each rank.
    pub fn hosts(&self) -> &[String] {
        &self.hosts
    }

    /// In words, such as `4 ranks on 2 hosts, by torchrun`.
    pub fn describe(&self) -> String {
        let mut hosts: Vec<&String> = self.hosts.iter().collect();
        hosts.sort();
        hosts.dedup();
        let some = |count: usize, name: &str| format!("{count} {name}{}", if count == 1 { "" } else { "s" });
        format!("{} on {}, by {}", some(self.world_size(), "rank"), some(hosts.len(), "host"), self.place.launcher)
    }

    /// Begins an operation: the guard is held to its end.
    fn begin(&self, op: Op) -> (std::sync::MutexGuard<'_, u64>, Call) {
        let mut calls = self.calls.lock().unwrap_or_else(PoisonError::into_inner);
        *calls += 1;
        let number = *calls;
        (calls, Call { op, number })
    }

    /// Rank 0's bytes, on every rank; what other ranks give is not looked at.
    ///
    /// # Errors
    /// Another rank failed.
    pub fn broadcast(&self, bytes: Vec<u8>) -> Result<Vec<u8>, DistError> {
        let (_guard, call) = self.begin(Op::Broadcast);
        self.spread(call, bytes)
    }

    /// Sends rank 0's bytes to all within an operation.
    pub(crate) fn spread(&self, call: Call, bytes: Vec<u8>) -> Result<Vec<u8>, DistError> {
        if self.rank() > 0 {
            return self.shared.receive(0, call);
        }
        (0..self.shared.links.len()).try_for_each(|index| self.shared.send(index, call, &bytes))?;
        Ok(bytes)
    }

    /// Every rank's bytes at rank 0, in the order of ranks; nothing on other ranks.
    pub(crate) fn collect(&self, call: Call, bytes: Vec<u8>) -> Result<Option<Vec<Vec<u8>>>, DistError> {
        if self.rank() > 0 {
            self.shared.send(0, call, &bytes)?;
            return Ok(None);
        }
        let others = (0..self.shared.links.len()).map(|index| self.shared.receive(index, call));
        std::iter::once(Ok(bytes)).chain(others).collect::<Result<_, _>>().map(Some)
    }

    /// Every rank's bytes, in the order of ranks, at rank 0; `None` on other ranks.
    ///
    /// # Errors
    /// Another rank failed.
    pub fn gather(&self, bytes: Vec<u8>) -> Result<Option<Vec<Vec<u8>>>, DistError> {
        let (_guard, call) = self.begin(Op::Gather);
        self.collect(call, bytes)
    }

    /// Every rank's bytes, in the order of ranks, on every rank.
    ///
    /// # Errors
    /// Another rank failed.
    pub fn all_gather(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>, DistError> {
        let (_guard, call) = self.begin(Op::Gather);
        let joined = self.collect(call, bytes)?.map(|parts| {
            let lens = parts.iter().flat_map(|part| (part.len() as u64).to_le_bytes());
            lens.chain(parts.iter().flatten().copied()).collect()
        });
        let joined = self.spread(call, joined.unwrap_or_default())?;
        split(&joined, self.world_size()).ok_or_else(|| self.unreadable(0, "the parts do not fill what came"))
    }

    /// Whether the flag is raised on any rank.
    ///
    /// # Errors
    /// Another rank failed.
    pub fn agree(&self, flag: bool) -> Result<bool, DistError> {
        let (_guard, call) = self.begin(Op::Agree);
        let any = self.collect(call, vec![u8::from(flag)])?.map(|flags| flags.iter().flatten().any(|flag| *flag != 0));
        let any = self.spread(call, vec![u8::from(any.unwrap_or(false))])?;
        Ok(any.iter().any(|flag| *flag != 0))
    }

    /// Compares what this rank names with what the others do: all must name the same things in the same order, with the same
    /// values.
    ///
    /// # Errors
    /// [`DistError::Differs`], on every rank, says what differs between which ranks; another rank failed.
    pub fn compare(&self, named: &[(String, String)]) -> Result<(), DistError> {
        let (_guard, call) = self.begin(Op::Compare);
        let mine = serde_json::to_vec(named).unwrap_or_default();
        let verdict = match self.collect(call, mine)? {
            Some(all) => crate::compare::verdict(&all, &self.hosts),
            None => String::new(),
        };
        match self.spread(call, verdict.into_bytes())? {
            verdict if verdict.is_empty() => Ok(()),
            verdict => Err(DistError::Differs { what: String::from_utf8_lossy(&verdict).into_owned() }),
        }
    }

    /// Sums vectors over all ranks, in the order of ranks: `((v0 + v1) + v2) + ...`, in f32. Every rank has the same bits.
    ///
    /// # Errors
    /// Ranks have vectors of different lengths; another rank failed.
    pub fn all_reduce(&self, values: &mut [f32]) -> Result<(), DistError> {
        let part = [(self.rank(), &*values)];
        let sum = self.sum_parts(&part, values.len())?;
        values.copy_from_slice(&sum);
        Ok(())
    }

    /// Sums numbered vectors of `len` elements over all ranks, in the order of their numbers, in f32: whichever rank has
    /// a part, the sum has the bits that one process gets which adds them one after the other. Ranks may have any number of parts, or
    /// none; together they have each number from 0 on once.
    ///
    /// Rank 0 holds a piece of every part at a time, not the parts.
    ///
    /// # Errors
    /// Numbers or lengths do not fit each other; another rank failed.
    pub fn sum_parts(&self, parts: &[(usize, &[f32])], len: usize) -> Result<Vec<f32>, DistError> {
        let (_guard, call) = self.begin(Op::Sum);
        crate::sums::sum(self, &self.shared, call, parts, len)
    }

    /// Tells the others that this rank failed, and why: their operations end. Nothing happens if one has failed already.
    pub fn fail(&self, cause: &str) {
        let (rank, host) = (self.rank(), self.shared.host.clone());
        self.shared.record(Failure { rank, host, cause: cause.into() });
    }

    /// The failure that ended the operations, of whichever rank, if there was one.
    pub fn failure(&self) -> Option<DistError> {
        self.shared.failure()
    }

    /// Has `act` called, on a thread of its own, when a rank fails, this one included: what else waits for other ranks can be
    /// ended there. It is not called when the group ends in order, and at once if a rank has failed already.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn on_failure(&self, act: impl FnOnce(DistError) + Send + 'static) -> Result<(), DistError> {
        let shared = Arc::clone(&self.shared);
        let watch = move || {
            if let Some(failure) = shared.next_failure() {
                act(failure);
            }
        };
        let spawned = std::thread::Builder::new().name("dist-watch".into()).spawn(watch);
        spawned.map(drop).map_err(|source| DistError::System { rank: self.place.rank, source })
    }

    /// The error for something of a rank that can't be read.
    pub(crate) fn unreadable(&self, rank: usize, problem: &str) -> DistError {
        let host = self.hosts.get(rank).cloned().unwrap_or_default();
        DistError::Rank { rank, host, cause: format!("what it sent does not fit: {problem}; this is a bug") }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.fail("it panicked, which is a failure of its device or a bug");
        }
        self.shared.leave(std::mem::take(&mut self.threads));
    }
}

/// Parts after their lengths.
fn split(joined: &[u8], count: usize) -> Option<Vec<Vec<u8>>> {
    let (lens, mut rest) = joined.split_at_checked(count.checked_mul(8)?)?;
    let mut parts = Vec::with_capacity(count);
    for len in lens.chunks_exact(8) {
        let len = usize::try_from(u64::from_le_bytes(len.try_into().ok()?)).ok()?;
        let (part, after) = rest.split_at_checked(len)?;
        parts.push(part.to_vec());
        rest = after;
    }
    rest.is_empty().then_some(parts)
}
