//! Names of devices, and the devices they name.

use std::fmt;
use std::str::FromStr;

use burn::tensor::{Device, DeviceKind, DeviceType};

use crate::error::TrainError;

/// A device as a configuration or a command line names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first CUDA card, or the CPU where there is none.
    #[default]
    Auto,
    /// The CPU, through Burn's Flex backend.
    Cpu,
    /// A CUDA card by its number.
    Cuda(usize),
    /// The best adapter that Vulkan offers, through WGSL.
    Vulkan,
    /// The GPU of a Mac.
    Metal,
}

impl FromStr for DeviceChoice {
    type Err = TrainError;

    fn from_str(name: &str) -> Result<Self, TrainError> {
        let choice = match name.to_ascii_lowercase().as_str() {
            "auto" => Some(Self::Auto),
            "cpu" => Some(Self::Cpu),
            "cuda" => Some(Self::Cuda(0)),
            "vulkan" => Some(Self::Vulkan),
            "metal" => Some(Self::Metal),
            other => other.strip_prefix("cuda:").and_then(|index| index.parse().ok()).map(Self::Cuda),
        };
        choice.ok_or_else(|| TrainError::ConfigRange {
            key: "device".into(),
            value: format!("\"{name}\""),
            allowed: "must be auto, cpu, cuda, cuda:1 (the second card), vulkan or metal".into(),
        })
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
            Self::Vulkan => f.write_str("vulkan"),
            Self::Metal => f.write_str("metal"),
        }
    }
}

impl DeviceChoice {
    /// Finds the device. `Auto` answers with what it chose, never with `Auto`.
    ///
    /// # Errors
    /// The machine has no such device; the message says what it has.
    pub fn open(self) -> Result<(Self, Device), TrainError> {
        let missing = |problem: String| TrainError::Device { device: self.to_string(), problem };
        match self {
            Self::Auto => match Device::enumerate(DeviceType::Cuda).len() {
                0 => Self::Cpu.open(),
                _ => Self::Cuda(0).open(),
            },
            Self::Cpu => Ok((self, Device::flex())),
            Self::Cuda(index) => {
                let cards = Device::enumerate(DeviceType::Cuda).len();
                if index < cards {
                    return Ok((self, Device::cuda(index)));
                }
                Err(missing(match cards {
                    0 => "no CUDA card or no NVIDIA driver was found; `--device cpu` runs everywhere".into(),
                    1 => "there is one CUDA card, cuda:0".into(),
                    _ => format!("there are {cards} CUDA cards, cuda:0 to cuda:{}", cards - 1),
                }))
            }
            Self::Vulkan if cfg!(target_os = "macos") => Err(missing("a Mac's GPU is called metal".into())),
            Self::Metal if !cfg!(target_os = "macos") => {
                Err(missing("only Macs have Metal; `--device vulkan` is the other systems' way".into()))
            }
            Self::Vulkan | Self::Metal => match Device::enumerate(DeviceType::Wgpu).len() {
                0 => Err(missing("no graphics driver was found; `--device cpu` runs everywhere".into())),
                _ => Ok((self, Device::wgpu(DeviceKind::DefaultDevice))),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn names_are_parsed_and_written() {
        for (name, choice) in [
            ("auto", DeviceChoice::Auto),
            ("CPU", DeviceChoice::Cpu),
            ("cuda", DeviceChoice::Cuda(0)),
            ("cuda:1", DeviceChoice::Cuda(1)),
            ("vulkan", DeviceChoice::Vulkan),
            ("metal", DeviceChoice::Metal),
        ] {
            assert_eq!(name.parse::<DeviceChoice>().unwrap(), choice);
            assert_eq!(choice.to_string().parse::<DeviceChoice>().unwrap(), choice);
        }
        for name in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:1"] {
            let message = name.parse::<DeviceChoice>().unwrap_err().to_string();
            assert!(message.starts_with(&format!("device = \"{name}\": must be auto, ")), "{message}");
        }
    }

    #[test]
    fn the_cpu_is_everywhere_and_a_far_card_nowhere() {
        assert_eq!(DeviceChoice::Cpu.open().unwrap().0, DeviceChoice::Cpu);
        assert_ne!(DeviceChoice::Auto.open().unwrap().0, DeviceChoice::Auto);
        let message = DeviceChoice::Cuda(4096).open().unwrap_err().to_string();
        assert!(message.starts_with("device cuda:4096: "), "{message}");
        let foreign = if cfg!(target_os = "macos") { DeviceChoice::Vulkan } else { DeviceChoice::Metal };
        assert!(foreign.open().is_err());
    }
}
