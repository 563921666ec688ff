//! Collective operations of NCCL over the CUDA devices of several processes, on memory that CubeCL manages.
//!
//! - [`Nccl`]: the library, looked for when it is asked for. A machine without it has no use for this crate, and is told what to
//!   install.
//! - [`Endpoint`]: a device that is ready to join others.
//! - [`Collectives`]: the ranks that have met. Operations are queued on a stream of their own, beside CubeCL's kernels: each begins
//!   when what was queued on CubeCL's stream before it is done, and CubeCL's stream waits for all of them where it is asked to.
//!
//! Who the ranks are, and how NCCL's id comes to them, is the caller's to say.
//!
//! # Two streams
//!
//! CubeCL does not expose its stream, so no event can be recorded on it. It runs hand-written kernels, though ([`cuda_source`]): one
//! writes a number where the other stream waits for it (`cuStreamWaitValue32`), and one waits for a number that the other stream
//! writes. CUDA knows nothing of this order, so it might put both streams into one queue of the hardware; that would be slow, but it
//! can't block them, because whatever is waited for has been queued before whoever waits.
//!
//! # Ranks that are gone
//!
//! An operation in which a rank is missing never ends by itself, and CubeCL's stream, and whoever reads from it, wait for it.
//! [`Collectives::abort`], from any thread, ends all of them. What they leave in their tensors is worth nothing then, and
//! [`Collectives::wait`] says so on the device: the number that it gives becomes NaN, so that work that follows can do nothing.
//!
//! # What was not done
//!
//! - cudarc's binding of NCCL: it looks for `libnccl.so`, which only NVIDIA's packages for developers have, panics where it finds none, and
//!   takes codes that it doesn't know for enums.
//! - A communicator that does not block the host ([`Endpoint::join`] does, until all ranks are there): every call would have to
//!   be polled.

mod collectives;
mod error;
mod memory;
mod nccl;
mod side_stream;
mod worker;

pub use collectives::{Collectives, Endpoint, Fixed, Mark, Waited};
pub use error::CollectiveError;
pub use nccl::{ID_BYTES, Nccl};
