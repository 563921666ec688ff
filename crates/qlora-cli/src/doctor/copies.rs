//! How fast a card and pinned memory of the host copy to each other, and the PCI bus that does it.
//!
//! Offloaded weights, activations and optimizer state go this way, at the rates that are measured here: copies of 256 MiB, the fastest of
//! four. Beside another program's copies they are slower.

use std::sync::Arc;
use std::time::{Duration, Instant};

use burn_qlora::report::memory;
use cudarc::driver::{CudaContext, DriverError};
use nvml_wrapper::Device;

use super::Report;

/// Bytes of a copy. Its start takes some 10 µs, which is nothing beside milliseconds.
const BYTES: usize = 256 << 20;
/// Copies in each direction; the first also makes the pages known to the card.
const COPIES: usize = 4;
/// The part of what the bus can do that is expected: measured are 87 % on PCIe 5.0 with 16 lanes.
const EXPECTED: f64 = 0.6;

/// Bytes per second.
#[derive(Clone, Copy, Debug)]
struct Rates {
    to_device: f64,
    from_device: f64,
}

/// Measures a card's copies, and compares them with what its bus can do.
pub fn inspect(report: &mut Report, index: usize, context: &Arc<CudaContext>, device: Option<&Device<'_>>) {
    let rates = measure(context);
    // While it copied, the bus was awake; idle cards say a lower generation.
    let link = device.and_then(link);
    match rates {
        Ok(Rates { to_device, from_device }) => {
            let gb = |rate: f64| format!("{:.1} GB/s", rate / 1e9);
            let text =
                format!("cuda:{index}  pinned memory: {} to the card, {} from it", gb(to_device), gb(from_device));
            let slow = link.filter(|link| to_device.min(from_device) < EXPECTED * link.rate());
            let finding = match slow {
                None => report.ok(text),
                Some(link) => {
                    let cure = "another program may copy at the same time, or the processor that runs this is far from the card \
                                (numactl --cpunodebind)";
                    report.note(format!("{text}, of {} that the bus can do", gb(link.rate()))).cure(cure)
                }
            };
            finding.value("to_device_bytes_per_second", to_device).value("from_device_bytes_per_second", from_device);
        }
        Err(error) => {
            let text = format!("cuda:{index}  copies could not be measured with {}: {error}", memory(BYTES as u64));
            report.note(text).cure("free memory of the card and of the host");
        }
    }
    let Some(link) = link else { return };
    let Link { width, most: (most_generation, most_width), .. } = link;
    let text = format!("cuda:{index}  PCIe {most_generation}.0 with {width} of {most_width} lanes");
    let finding = match width < most_width {
        false => report.ok(text),
        true => report.note(text).cure("the card is in a slot of fewer lanes, or sits badly in it"),
    };
    finding.value("pcie_generation", most_generation).value("pcie_lanes", width);
}

/// A card's link to the PCI bus.
#[derive(Clone, Copy, Debug)]
struct Link {
    width: u32,
    /// Generation and lanes that card and slot have.
    most: (u32, u32),
}

impl Link {
    /// Bytes per second in one direction that a link of this generation and width carries, without what packets cost.
    fn rate(self) -> f64 {
        // Gigatransfers per second of a lane, and the part that is data (8b/10b up to generation 2, 128b/130b after).
        let lane = match self.most.0 {
            0 | 1 => 2.5 * 0.8,
            2 => 5.0 * 0.8,
            generation => 8.0 * f64::from(1_u32 << (generation - 3).min(4)) * (128.0 / 130.0),
        };
        lane / 8.0 * f64::from(self.width) * 1e9
    }
}

fn link(device: &Device<'_>) -> Option<Link> {
    let width = device.current_pcie_link_width().ok()?;
    let most = (device.max_pcie_link_gen().ok()?, device.max_pcie_link_width().ok()?);
    Some(Link { width, most })
}

fn measure(context: &Arc<CudaContext>) -> Result<Rates, DriverError> {
    let stream = context.new_stream()?;
    // SAFETY: what the memory holds is written before it is read. Without flags it is cached, as that of runs is.
    let mut host = unsafe { context.alloc_pinned_with_flags::<u8>(BYTES, 0) }?;
    host.as_mut_slice()?.fill(1);
    let mut device = stream.alloc_zeros::<u8>(BYTES)?;
    let mut fastest = [Duration::MAX; 2];
    for _ in 0..COPIES {
        stream.synchronize()?;
        let start = Instant::now();
        stream.memcpy_htod(&host, &mut device)?;
        stream.synchronize()?;
        let between = Instant::now();
        stream.memcpy_dtoh(&device, &mut host)?;
        stream.synchronize()?;
        fastest[0] = fastest[0].min(between - start);
        fastest[1] = fastest[1].min(between.elapsed());
    }
    let rate = |time: Duration| BYTES as f64 / time.as_secs_f64().max(1e-9);
    Ok(Rates { to_device: rate(fastest[0]), from_device: rate(fastest[1]) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bus_has_its_rate() {
        let rate = |generation, width| Link { width, most: (generation, 16) }.rate() / 1e9;
        // The PCI Express base specification's figures for a direction, to two digits.
        for (generation, width, gigabytes) in [(1, 16, 4.0), (2, 16, 8.0), (3, 16, 15.75), (4, 8, 15.75), (5, 16, 63.0)]
        {
            assert!((rate(generation, width) - gigabytes).abs() < 0.01 * gigabytes, "{generation} x{width}");
        }
    }
}
