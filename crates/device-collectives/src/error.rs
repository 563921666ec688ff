//! Errors of this crate. Each says what is missing, or what NCCL or the driver answered.

use cuda_source::LaunchError;
use host_copies::DeviceError;

/// Why collective operations can't be had, or failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CollectiveError {
    /// The device is none of CUDA's.
    #[error("NCCL works between CUDA devices, and this is another one")]
    NotCuda,
    /// The library is not there, or lacks something.
    #[error(
        "NCCL can't be loaded ({problem}): install libnccl2, or the Python wheel nvidia-nccl-cu13 (nvidia-nccl-cu12 with a driver for CUDA \
         12), and have LD_LIBRARY_PATH name the folder of its libnccl.so.2"
    )]
    NoLibrary {
        /// What was tried.
        problem: String,
    },
    /// NCCL refuses something.
    #[error("NCCL: {call}: {problem}")]
    Nccl {
        /// Its function.
        call: &'static str,
        /// What it says, with NCCL_DEBUG's hint.
        problem: String,
    },
    /// The driver refuses something.
    #[error("the CUDA driver: {call}: {problem}")]
    Driver {
        /// Its function.
        call: &'static str,
        /// What it says.
        problem: String,
    },
    /// A kernel of this crate was not launched.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A tensor's memory is not usable: what it depends on failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A tensor can't be worked on in place.
    #[error("a tensor of {bytes} bytes lies in the device's memory in another way: {problem}; this is a bug")]
    Layout {
        /// Its size.
        bytes: usize,
        /// In which way.
        problem: &'static str,
    },
    /// The operations were aborted, because another rank is gone.
    #[error("the operations over all ranks were broken off")]
    Aborted,
}
