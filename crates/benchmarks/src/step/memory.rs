//! Memory of a device: what its allocator says, and what the driver says.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use burn::tensor::Device;
use burn_qlora::qlora_models::device_memory;

/// Bytes in use and reserved, each the highest seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Peak {
    pub in_use: u64,
    pub reserved: u64,
}

impl Peak {
    /// Takes a reading of the device's allocator (of the process, on the CPU), and returns it.
    pub(crate) fn read(&mut self, device: &Device) -> Self {
        let (in_use, reserved) = device_memory(device).unwrap_or_default();
        *self = Self { in_use: self.in_use.max(in_use), reserved: self.reserved.max(reserved) };
        Self { in_use, reserved }
    }
}

/// Reads the allocator while `work` runs. A reading stands in the queue between launches: it sees what the stream
/// holds there.
pub(crate) fn while_running<T>(device: &Device, peak: &mut Peak, work: impl FnOnce() -> T) -> T {
    const PAUSE: Duration = Duration::from_millis(1);
    let (stop, device) = (Arc::new(AtomicBool::new(false)), device.clone());
    let stopped = stop.clone();
    let sampler = std::thread::spawn(move || {
        let mut peak = Peak::default();
        // Once at least, however short the work is.
        loop {
            peak.read(&device);
            if stopped.load(Ordering::Relaxed) {
                return peak;
            }
            std::thread::sleep(PAUSE);
        }
    });
    let result = work();
    stop.store(true, Ordering::Relaxed);
    if let Ok(seen) = sampler.join() {
        *peak = Peak { in_use: peak.in_use.max(seen.in_use), reserved: peak.reserved.max(seen.reserved) };
    }
    result
}

/// What the driver counts as used on a card, sampled as long as it lives, less what was used before.
pub(crate) struct Driver {
    child: Child,
    thread: Option<JoinHandle<()>>,
    before: u64,
    highest: Arc<AtomicU64>,
}

impl Driver {
    /// To be called before the process touches the card. `None` without nvidia-smi.
    pub(crate) fn watch(index: usize) -> Option<Self> {
        let card = card(index);
        let mut child = Command::new("nvidia-smi")
            .args(["-i", &card, "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "250"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut lines = BufReader::new(child.stdout.take()?).lines().map_while(Result::ok);
        let Some(before) = lines.next().and_then(|line| bytes(&line)) else {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        };
        let highest = Arc::new(AtomicU64::new(before));
        let seen = highest.clone();
        let thread = std::thread::spawn(move || {
            for used in lines.filter_map(|line| bytes(&line)) {
                seen.fetch_max(used, Ordering::Relaxed);
            }
        });
        Some(Self { child, thread: Some(thread), before, highest })
    }

    /// The highest so far.
    pub(crate) fn peak(&self) -> u64 {
        self.highest.load(Ordering::Relaxed) - self.before
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // It ends with its own process; nothing is lost when it has.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What nvidia-smi calls CUDA's device `index`.
fn card(index: usize) -> String {
    let visible = std::env::var("CUDA_VISIBLE_DEVICES").unwrap_or_default();
    match visible.split(',').map(str::trim).nth(index).filter(|name| !name.is_empty()) {
        Some(name) => name.to_owned(),
        None => index.to_string(),
    }
}

/// A line of nvidia-smi, MiB.
fn bytes(line: &str) -> Option<u64> {
    Some(line.trim().parse::<u64>().ok()? << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_mebibytes() {
        assert_eq!(bytes(" 1234\n"), Some(1234 << 20));
        assert_eq!(bytes("[N/A]"), None);
    }

    #[test]
    fn readings_are_taken_while_work_runs() {
        let mut peak = Peak::default();
        let answer = while_running(&Device::flex(), &mut peak, || {
            std::thread::sleep(Duration::from_millis(20));
            7
        });
        assert_eq!(answer, 7);
        assert!(peak.in_use > 0 && peak.reserved >= peak.in_use, "{peak:?}");
    }
}
