//! How much of the state may stay on the device.

use std::fmt;
use std::str::FromStr;

use burn::tensor::Device;
use host_copies::{DeviceMemory, UNITS, parse_size};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::OptimError;

/// How much of the state may stay on the device. The rest stays in host memory and is brought to the device for its
/// update.
///
/// An update needs two pages on the device (one in use, one on its way), so a smaller budget counts as one page, of
/// at most 16 MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Budget {
    /// What the driver has left at every step, less a reserve; everything on devices whose driver doesn't say.
    #[default]
    Auto,
    /// Everything, always.
    Unlimited,
    /// At most this many bytes.
    Bytes(u64),
}

impl Budget {
    /// Bytes of a page of `state` bytes of state. A figure is cut into eight pages or more, so that there is something
    /// to choose, but none is smaller than a 64th of the state: a page costs a launch and two copies, and a budget of
    /// nothing would make one of every block.
    pub(crate) fn page_bytes(self, state: u64) -> u64 {
        /// Long enough that the bus is busy for longer than a copy takes to start, short beside any device.
        const PAGE: u64 = 16 << 20;
        match self {
            Self::Auto | Self::Unlimited => PAGE,
            Self::Bytes(bytes) => (bytes / 8).max(state / 64).min(PAGE),
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Auto => f.pad("auto"),
            Self::Unlimited => f.pad("unlimited"),
            Self::Bytes(bytes) => {
                let exact = UNITS.iter().find(|(_, unit)| bytes.is_multiple_of(*unit) && bytes >= *unit);
                let (name, unit) = exact.unwrap_or(&("B", 1));
                write!(f, "{}{name}", bytes / unit)
            }
        }
    }
}

impl FromStr for Budget {
    type Err = OptimError;

    fn from_str(s: &str) -> Result<Self, OptimError> {
        match s {
            "auto" => return Ok(Self::Auto),
            "unlimited" => return Ok(Self::Unlimited),
            _ => {}
        }
        parse_size(s).map(Self::Bytes).ok_or_else(|| OptimError::Budget(s.to_owned()))
    }
}

impl Serialize for Budget {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Budget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What a device has left.
pub trait MemorySource: Send {
    /// Bytes that could still be allocated, and bytes in all; `None` where that is unknown. `resident` is how much state
    /// lies on the device now, which a driver's figure doesn't count as free.
    fn free(&mut self, resident: u64) -> Option<(u64, u64)>;
}

/// A device whose driver doesn't say, or host memory.
pub(crate) struct Unknown;

impl MemorySource for Unknown {
    fn free(&mut self, _: u64) -> Option<(u64, u64)> {
        None
    }
}

impl MemorySource for DeviceMemory {
    fn free(&mut self, _: u64) -> Option<(u64, u64)> {
        // Counts what other processes took.
        DeviceMemory::free(self)
    }
}

/// The source for a device.
pub(crate) fn source_of(device: &Device) -> Box<dyn MemorySource> {
    match DeviceMemory::of(device) {
        Some(memory) => Box::new(memory),
        None => Box::new(Unknown),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn budgets_parse_back_and_others_are_refused() {
        for (text, budget) in [
            ("auto", Budget::Auto),
            ("unlimited", Budget::Unlimited),
            ("512MiB", Budget::Bytes(512 << 20)),
            ("2GiB", Budget::Bytes(2 << 30)),
            ("100B", Budget::Bytes(100)),
            ("0B", Budget::Bytes(0)),
        ] {
            assert_eq!(text.parse::<Budget>().unwrap(), budget);
            assert_eq!(budget.to_string(), text);
        }
        assert_eq!("1.5 GiB".parse::<Budget>().unwrap(), Budget::Bytes(3 << 29));
        for text in ["", "512", "-1MiB", "lots", "512MB", "NaNMiB", "1e30GiB"] {
            let message = text.parse::<Budget>().unwrap_err().to_string();
            assert!(message.contains("512MiB"), "{message}");
        }
    }
}
