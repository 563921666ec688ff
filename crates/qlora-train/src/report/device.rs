//! A device's name for people.

use burn::tensor::Device;

/// The device as it names itself, `NVIDIA H200`, or the CPU and its threads.
pub fn device_name(device: &Device) -> String {
    match device.identity() {
        Some(identity) => identity.name,
        None => {
            let set = std::env::var("RAYON_NUM_THREADS").ok().and_then(|threads| threads.parse().ok());
            let cores = || std::thread::available_parallelism().map_or(1, usize::from);
            let threads = set.filter(|threads| *threads > 0).unwrap_or_else(cores);
            format!("CPU, {threads} thread{}", if threads == 1 { "" } else { "s" })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_has_a_readable_name() {
        let name = device_name(&Device::flex());
        assert!(name.starts_with("CPU, ") && name.contains("thread"), "{name}");
    }
}
