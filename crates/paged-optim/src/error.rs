//! What can go wrong.

use crate::OptimizerKind;

/// State that comes from outside and does not fit, a setting that can't be read, or a device that fails.
#[derive(Debug, thiserror::Error)]
pub enum OptimError {
    /// The number of saved states is not the number of parameters.
    #[error("optimizer state holds {found} parameters, the model trains {expected}: it belongs to another run")]
    Count {
        /// Parameters of the model.
        expected: usize,
        /// Parameters in the state.
        found: usize,
    },
    /// A saved moment has another length than its parameter.
    #[error("optimizer state of parameter {index}: expected {expected} values, found {found}")]
    Length {
        /// Position of the parameter.
        index: usize,
        /// Values that belong there.
        expected: usize,
        /// Values in the state.
        found: usize,
    },
    /// A saved state is another optimizer's.
    #[error(
        "optimizer state of parameter {index} is not {kind}'s: it was saved by another optimizer; go on with that one, or start afresh"
    )]
    Kind {
        /// Position of the parameter.
        index: usize,
        /// The optimizer in use.
        kind: OptimizerKind,
    },
    /// No optimizer has this name.
    #[error("optimizer `{0}` is unknown: use adamw_32bit, adamw_8bit or lion_8bit")]
    UnknownKind(String),
    /// A budget that can't be read.
    #[error("memory budget `{0}` can't be read: use auto, unlimited, or a size such as 512MiB or 2GiB")]
    Budget(String),
    /// The device failed while state was moved to host memory.
    #[error("moving optimizer state to host memory failed: {0}")]
    Device(String),
}
