//! Errors of a device, and how an exhausted memory is told from other failures.
//!
//! CubeCL's own errors say by their variant that memory was short, and so does an error that wraps them: work that did
//! not run reports the failure that kept it from running. Two sources give text only: the CUDA driver, whose refusals
//! CubeCL passes on as a reason in words, and Burn, which turns CubeCL's error into a message. The phrases for those are in
//! [`SHORT`], and nowhere else in this workspace.

use burn::backend::ExecutionError;
use burn::tensor::TensorReadError;
use cubecl::server::{IoError, LaunchError, ServerError};

/// Why work on a device did not give its result.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    /// The device had no memory left for the work. The device itself is usable: once memory is freed, the same work may
    /// succeed.
    #[error("the device is out of memory: {0}")]
    OutOfMemory(String),
    /// The work failed for another reason: a copy, a kernel, the driver or the device itself.
    #[error("the device failed: {0}")]
    Failed(String),
    /// The host has no memory for what is to wait there.
    #[error("the host has no memory: {0}")]
    Host(String),
    /// Another process failed that has a part in the work.
    #[error("{0}")]
    Peer(String),
}

/// What the reports of a short memory say, in lower case: CubeCL's `IoError::OutOfMemory`; the CUDA driver and CubeCL's
/// `LaunchError::OutOfMemory`; CubeCL's `IoError::BufferTooBig` and `IoError::PageSizesExhausted`.
const SHORT: [&str; 4] = ["out of device memory", "out of memory", "out-of-memory", "can't allocate"];

fn says_out_of_memory(report: &str) -> bool {
    let report = report.to_lowercase();
    SHORT.iter().any(|short| report.contains(short))
}

fn is_io_out_of_memory(error: &IoError) -> bool {
    match error {
        IoError::OutOfMemory { .. } | IoError::BufferTooBig { .. } | IoError::PageSizesExhausted { .. } => true,
        IoError::StorageMappingFailed { source, .. } => is_io_out_of_memory(source),
        IoError::Unknown { description, .. } => says_out_of_memory(description),
        _ => false,
    }
}

fn is_out_of_memory(error: &ServerError) -> bool {
    match error {
        ServerError::Io(error) => is_io_out_of_memory(error),
        ServerError::Launch(LaunchError::OutOfMemory { .. }) => true,
        ServerError::Launch(LaunchError::Unknown { reason, .. }) | ServerError::Generic { reason, .. } => {
            says_out_of_memory(reason)
        }
        ServerError::Unwritten { root, .. } => is_out_of_memory(root),
        // One of several is enough: what failed beside it may have failed for it.
        ServerError::Several { errors, .. } => errors.iter().any(is_out_of_memory),
        _ => false,
    }
}

impl DeviceError {
    /// The error that a report in words describes.
    fn from_report(report: String) -> Self {
        if says_out_of_memory(&report) { Self::OutOfMemory(report) } else { Self::Failed(report) }
    }
}

impl From<ServerError> for DeviceError {
    fn from(error: ServerError) -> Self {
        // A poisoned device can't be used again, whatever else was short.
        if is_out_of_memory(&error) && !error.is_device_poisoned() {
            Self::OutOfMemory(error.to_string())
        } else {
            Self::Failed(error.to_string())
        }
    }
}

impl From<ExecutionError> for DeviceError {
    fn from(error: ExecutionError) -> Self {
        match error {
            ExecutionError::DevicePoisoned { .. } => Self::Failed(error.to_string()),
            other => Self::from_report(other.to_string()),
        }
    }
}

impl From<TensorReadError> for DeviceError {
    fn from(error: TensorReadError) -> Self {
        match error {
            TensorReadError::Execution(error) => error.into(),
            other => Self::Failed(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::BackTrace;

    fn out_of_memory() -> ServerError {
        IoError::OutOfMemory { size: 312_475_648, backtrace: BackTrace::capture() }.into()
    }

    fn generic(reason: &str) -> ServerError {
        ServerError::Generic { reason: reason.into(), backtrace: BackTrace::capture() }
    }

    fn unwritten(root: ServerError) -> ServerError {
        let (chain, backtrace) = (vec!["skipped: matmul".into()], BackTrace::capture());
        ServerError::Unwritten { failure: 3, claimed: 2, chain, root: Box::new(root), backtrace }
    }

    fn several(errors: Vec<ServerError>) -> ServerError {
        ServerError::Several { errors, backtrace: BackTrace::capture() }
    }

    fn short(error: impl Into<DeviceError>) -> bool {
        matches!(error.into(), DeviceError::OutOfMemory(_))
    }

    #[test]
    fn typed_errors_are_told_by_their_variant() {
        let backtrace = BackTrace::capture;
        assert!(short(out_of_memory()));
        assert!(short(ServerError::from(IoError::BufferTooBig { size: 9, backtrace: backtrace() })));
        assert!(short(ServerError::from(IoError::PageSizesExhausted { size: 9, backtrace: backtrace() })));
        assert!(short(ServerError::from(LaunchError::OutOfMemory { reason: "x".into(), backtrace: backtrace() })));
        let source = Box::new(IoError::OutOfMemory { size: 9, backtrace: backtrace() });
        assert!(short(ServerError::from(IoError::StorageMappingFailed { size: 9, source, backtrace: backtrace() })));
        // An allocator that may not grow while a graph is recorded is another matter.
        assert!(!short(ServerError::from(IoError::PageUpdateForbidden { size: 9, backtrace: backtrace() })));
        assert!(!short(ServerError::Skipped));
    }

    #[test]
    fn a_failure_within_others_counts() {
        assert!(short(unwritten(out_of_memory())));
        assert!(short(several(vec![ServerError::TornDown, unwritten(out_of_memory())])));
        assert!(!short(several(vec![ServerError::TornDown, unwritten(generic("the device is gone"))])));
    }

    /// The driver's refusals come as words.
    #[test]
    fn reports_in_words_are_told_by_their_phrases() {
        assert!(short(generic("CUDA_ERROR_OUT_OF_MEMORY: \"out of memory\"")));
        assert!(!short(generic("CUDA_ERROR_ILLEGAL_ADDRESS")));
        // Burn passes on what CubeCL printed, backtraces included.
        for error in [out_of_memory(), several(vec![unwritten(out_of_memory())])] {
            assert!(short(ExecutionError::WithContext { reason: error.to_string() }), "{error}");
            let read = TensorReadError::from(ExecutionError::WithContext { reason: error.to_string() });
            assert!(short(read), "{error}");
        }
        for message in [
            "Several failures at once\nCaused by:\n  out of device memory allocating 312475648 bytes\n",
            "An out-of-memory error happened during launch\nCaused by:\n  CUDA_ERROR_OUT_OF_MEMORY",
            "can't allocate buffer of size: 9",
            "Can't allocate 9 bytes: every page size the memory tracks still holds live allocations",
        ] {
            assert!(short(ExecutionError::WithContext { reason: message.into() }), "{message}");
        }
        assert!(!short(ExecutionError::WithContext { reason: "the device is gone".into() }));
        assert!(!short(ExecutionError::DevicePoisoned { reason: "a trap, then out of memory".into() }));
    }

    #[test]
    fn the_report_is_passed_on() {
        let DeviceError::OutOfMemory(report) = out_of_memory().into() else { panic!("memory was short") };
        assert!(report.contains("312475648 bytes"), "{report}");
    }
}
