//! Errors of this crate. Each names the variable, address or rank at fault and what to do.

/// What can go wrong between a launcher's variables and the end of a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DistError {
    /// A variable of a launcher holds something that can't be.
    #[error("{name} = \"{value}\" in the environment: {problem}")]
    Variable {
        /// The variable.
        name: String,
        /// Its value.
        value: String,
        /// What it must be.
        problem: String,
    },
    /// A variable of a launcher is missing beside others that are set.
    #[error("{name} is not set, and {because}: {cure}")]
    Missing {
        /// The variable.
        name: String,
        /// Why it is needed.
        because: String,
        /// What to do.
        cure: String,
    },
    /// Rank 0 can't listen where the others will look for it.
    #[error(
        "rank 0 can't listen on port {port}: {source}; another program, or another run, has the port: set MASTER_PORT to one that is free"
    )]
    Listen {
        /// The port.
        port: u16,
        /// Why.
        source: std::io::Error,
    },
    /// Nobody answers at rank 0's address.
    #[error(
        "rank {rank} found nobody at {address} within {seconds} s ({last}): rank 0 was not started or has ended, or MASTER_ADDR or \
         MASTER_PORT is another one there"
    )]
    Unreachable {
        /// This process.
        rank: usize,
        /// Where rank 0 should be.
        address: String,
        /// How long it was tried.
        seconds: u64,
        /// What the last try gave.
        last: String,
    },
    /// What answers at rank 0's address is something else.
    #[error("what answers at {address} is not rank 0 of a run ({problem}): check MASTER_ADDR and MASTER_PORT")]
    Stranger {
        /// Where rank 0 should be.
        address: String,
        /// How that was noticed.
        problem: String,
    },
    /// Rank 0 does not take this process into its run.
    #[error("rank 0 at {address} refuses rank {rank}: {reason}")]
    Refused {
        /// Where rank 0 is.
        address: String,
        /// This process.
        rank: usize,
        /// Why.
        reason: String,
    },
    /// Not all ranks came.
    #[error(
        "{who} did not come within {seconds} s to rank 0, port {port}{refused}: see what became of them, and what their MASTER_ADDR is"
    )]
    Absent {
        /// The ranks, in words.
        who: String,
        /// How long rank 0 waited.
        seconds: u64,
        /// Where it listened.
        port: u16,
        /// Who else came and was not taken; empty, or words that begin with a semicolon.
        refused: String,
    },
    /// Another rank failed, died or went silent.
    #[error("rank {rank} on {host}: {cause}")]
    Rank {
        /// The rank.
        rank: usize,
        /// Its host.
        host: String,
        /// What became of it.
        cause: String,
    },
    /// Ranks do not do the same.
    #[error(
        "rank {rank} on {host} is at operation {found} where this rank is at {expected}: the ranks run different programs, or this is a bug"
    )]
    OutOfStep {
        /// The other rank.
        rank: usize,
        /// Its host.
        host: String,
        /// What this rank does.
        expected: String,
        /// What the other one does.
        found: String,
    },
    /// Ranks were not started alike.
    #[error("the ranks differ: {what}; start all of them with the same program, configuration, rows and base")]
    Differs {
        /// What differs between which ranks.
        what: String,
    },
    /// The system gives no socket or no thread.
    #[error("rank {rank} can't talk to the others: {source}")]
    System {
        /// This process.
        rank: usize,
        /// Why.
        source: std::io::Error,
    },
}

impl DistError {
    /// Whether another rank is the cause, which says so itself where it can.
    pub fn is_of_another_rank(&self) -> bool {
        matches!(self, Self::Rank { .. })
    }
}
