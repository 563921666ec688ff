//! What can go wrong.

use burn::tensor::DType;
use host_copies::DeviceError;

use crate::OptimizerKind;

/// Tensors or state that do not fit, a setting that can't be read, or a device that fails. Parameters are named as
/// [`Optimizer::with_names`](crate::Optimizer::with_names) named them, by their path in a module, or by their position.
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
    #[error("optimizer state of parameter {parameter}: expected {expected} values, found {found}")]
    Length {
        /// The parameter.
        parameter: String,
        /// Values that belong there.
        expected: usize,
        /// Values in the state.
        found: usize,
    },
    /// A saved state is another optimizer's.
    #[error(
        "optimizer state of parameter {parameter} is not {kind}'s: it was saved by another optimizer; go on with that one, or start afresh"
    )]
    Kind {
        /// The parameter.
        parameter: String,
        /// The optimizer in use.
        kind: OptimizerKind,
    },
    /// A record is no optimizer's, or is damaged.
    #[error("the optimizer record can't be read: {0}")]
    Record(String),
    /// An update names a parameter that there is none of.
    #[error("an update is for parameter {index}, but the optimizer has {count} parameters, counted from 0")]
    NoSuchParameter {
        /// The position that was given.
        index: usize,
        /// How many parameters there are.
        count: usize,
    },
    /// One step has two updates of one parameter.
    #[error("parameter {parameter} has two updates in one step: add up its gradients before the step")]
    Twice {
        /// The parameter.
        parameter: String,
    },
    /// A tensor has another number of elements than the optimizer was made for.
    #[error("the {tensor} of {parameter} has {found} elements, expected {expected}")]
    Elements {
        /// The parameter.
        parameter: String,
        /// `value` or `gradient`.
        tensor: &'static str,
        /// Elements that the state is for.
        expected: usize,
        /// Elements of the tensor.
        found: usize,
    },
    /// A tensor is not f32.
    #[error(
        "the {tensor} of {parameter} is {found:?}, but the optimizers update f32: cast it, or keep the parameter in f32"
    )]
    Dtype {
        /// The parameter.
        parameter: String,
        /// `value` or `gradient`.
        tensor: &'static str,
        /// Its dtype.
        found: DType,
    },
    /// A tensor is on another device than the state.
    #[error("the {tensor} of {parameter} is on another device than the optimizer: move it to {device} first")]
    OtherDevice {
        /// The parameter.
        parameter: String,
        /// `value`, `gradient` or `norm`.
        tensor: &'static str,
        /// The optimizer's device.
        device: String,
    },
    /// A norm of no gradients.
    #[error("there are no gradients to take a norm of")]
    NoGradients,
    /// No optimizer has this name.
    #[error("optimizer `{0}` is unknown: use adamw_32bit, adamw_8bit or lion_8bit")]
    UnknownKind(String),
    /// A budget that can't be read.
    #[error("memory budget `{0}` can't be read: use auto, unlimited, or a size such as 512MiB or 2GiB")]
    Budget(String),
    /// The device failed while state was moved to host memory.
    #[error("moving optimizer state to host memory: {0}")]
    Device(#[from] DeviceError),
}
