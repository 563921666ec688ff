//! What the workspace's test suites share. A dev-dependency of other crates, and nothing else.
//!
//! - Which devices a suite runs on, and what becomes of one that is missing: [`required`], [`skipped`],
//!   [`missing`]; the devices themselves are in `clients` (feature `cubecl`: no Burn) and `devices` (feature
//!   `burn`).
//! - Values that repeat everywhere: [`noise`], [`Random`].
//! - Comparison by element: [`assert_close`].
//!
//! The generator is written out here, and is no crate's, because the suites of the GPU kernels have bounds that
//! were tried on a card with these very values; a new version of a random number crate must not change them.

mod close;
#[cfg(feature = "cubecl")]
mod devices;
mod named;
mod random;

pub use close::assert_close;
#[cfg(feature = "cubecl")]
pub use devices::{client, clients, cuda};
#[cfg(feature = "burn")]
pub use devices::{devices, dtypes};
pub use named::{VARIABLE, missing, required, say, skipped};
pub use random::{Random, mix, noise};
