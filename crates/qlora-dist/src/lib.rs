//! Processes that train together: who each of them is, how they meet, and what they tell each other.
//!
//! - [`Place`]: rank, number of ranks and the address of rank 0, from the variables that launchers set.
//! - [`Group`]: the ranks after they have met. Its operations are collective: every rank calls the same ones in the same
//!   order. Sums are made in an order that does not depend on who comes first, so that they are the same bits every time.
//!
//! All traffic is TCP between rank 0 and each other rank. That is enough for what must be exact, for what is small, and for
//! machines without a faster way; it is no ring, and rank 0's link carries everything.
//!
//! A rank that fails says why before it leaves; one that is killed is missed when its connection ends; one that is stopped,
//! or whose host is gone, when nothing came from it for [`Timeouts::silence`]. Either way every operation on every
//! rank ends with [`DistError::Rank`], which names rank, host and cause. What no one sees is a rank whose process lives and
//! makes no progress: its signs of life come from a thread of their own.
//!
//! No Burn, no GPU. Nothing here prints.

mod compare;
mod error;
mod group;
mod link;
mod place;
mod rendezvous;
mod sums;
mod wire;

pub use error::DistError;
pub use group::{Group, Timeouts};
pub use place::{Launcher, Place};
