//! Graphics adapters that `device = "vulkan"` or `"metal"` would reach.
//!
//! Drivers of all vendors are loaded to ask them, and one that is broken may end the process, or write to its standard error. So a process of
//! its own asks: this program, with a flag that its help does not show.

use std::process::{Command, Stdio};

use anyhow::Result;
use serde::{Deserialize, Serialize};
use wgpu::{Backends, DeviceType, Instance, InstanceDescriptor};

use super::Report;
use crate::output::print;

/// An adapter, as the process that asks says it.
#[derive(Debug, Serialize, Deserialize)]
struct Found {
    name: String,
    driver: String,
    on_cpu: bool,
}

/// What such adapters are called here: the part's title, and the configuration's `device`.
const fn names() -> (&'static str, &'static str) {
    match cfg!(target_os = "macos") {
        true => ("Metal", "metal"),
        false => ("Vulkan", "vulkan"),
    }
}

/// Looks at the adapters. None is a lack only where there is no NVIDIA card either.
pub fn inspect(report: &mut Report, cards: usize) {
    let (section, device) = names();
    report.section(section);
    let Some(found) = ask() else {
        report.note(format!("{section}'s drivers fail when they are asked: device = \"{device}\" can't be used"));
        return;
    };
    for Found { name, driver, on_cpu } in &found {
        let text = format!("{name}, {driver}");
        let finding = match on_cpu {
            true => report.note(format!("{text}: computes on the CPU, slower than device = \"cpu\"")),
            false => report.ok(text),
        };
        finding.value("name", name.as_str()).value("driver", driver.as_str());
    }
    if found.is_empty() {
        let finding = report.note(format!("no adapter: device = \"{device}\" can't be used"));
        if cards == 0 {
            finding.cure("for AMD's and Intel's cards install mesa-vulkan-drivers and libvulkan1");
        }
    }
}

/// What a process that asks says; `None` where it fails.
fn ask() -> Option<Vec<Found>> {
    let program = std::env::current_exe().ok()?;
    let asking =
        Command::new(program).args(["doctor", "--adapters"]).stdin(Stdio::null()).stderr(Stdio::null()).output();
    let output = asking.ok().filter(|output| output.status.success())?;
    serde_json::from_slice(&output.stdout).ok()
}

/// Asks, and writes the answer to the standard output: `doctor --adapters`.
pub fn answer() -> Result<()> {
    let backends = if cfg!(target_os = "macos") { Backends::METAL } else { Backends::VULKAN };
    let mut descriptor = InstanceDescriptor::new_without_display_handle();
    descriptor.backends = backends;
    let adapters = block_on(Instance::new(descriptor).enumerate_adapters(backends));
    let found = adapters.iter().map(|adapter| {
        let info = adapter.get_info();
        let driver = [info.driver, info.driver_info].join(" ").trim().to_owned();
        Found { name: info.name, driver, on_cpu: info.device_type == DeviceType::Cpu }
    });
    print(&serde_json::to_string(&found.collect::<Vec<_>>())?)
}

/// Waits for an answer, which the system's loader gives at once.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        match future.as_mut().poll(&mut context) {
            std::task::Poll::Ready(value) => return value,
            std::task::Poll::Pending => std::thread::yield_now(),
        }
    }
}
