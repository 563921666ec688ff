//! What [`crate::launch()`] refuses.

/// Why a kernel was not launched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LaunchError {
    /// The client's device can't run CUDA C++: ask [`crate::device()`] first.
    #[error("{kernel}: the {runtime} runtime does not run CUDA C++ kernels (compute capability 7.0 or later)")]
    NotCuda {
        /// Entry point.
        kernel: &'static str,
        /// The client's runtime.
        runtime: &'static str,
    },
    /// The text declares another number of parameters than the launch passes.
    #[error("{kernel} has {expected} parameters, the launch passes {given} (buffers, tensor maps, parameter struct)")]
    Parameters {
        /// Entry point.
        kernel: &'static str,
        /// Parameters in the text.
        expected: usize,
        /// Arguments of the launch.
        given: usize,
    },
    /// A tensor map breaks one of TMA's rules.
    #[error("{kernel}: argument {index} can't be a tensor map: {reason}")]
    TensorMap {
        /// Entry point.
        kernel: &'static str,
        /// Position among the arguments.
        index: usize,
        /// The broken rule.
        reason: String,
    },
    /// The text is none for a compute capability.
    #[error("{kernel} does not compile for compute capability {}.{}:\n{log}", compute_capability.0, compute_capability.1)]
    Text {
        /// Entry point.
        kernel: &'static str,
        /// Major and minor.
        compute_capability: (u32, u32),
        /// What the compiler and the assembler say.
        log: String,
    },
}
