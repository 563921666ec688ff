//! Graphics adapters that `device = "vulkan"` or `"metal"` would reach.

use std::panic::catch_unwind;

use wgpu::{Backends, DeviceType, Instance, InstanceDescriptor};

use super::Report;

/// Looks at the adapters. None is a lack only where there is no NVIDIA card either.
pub fn inspect(report: &mut Report, cards: usize) {
    let (section, backends, name) = match cfg!(target_os = "macos") {
        true => ("Metal", Backends::METAL, "metal"),
        false => ("Vulkan", Backends::VULKAN, "vulkan"),
    };
    report.section(section);
    // A driver that is broken may bring down what asks it.
    let found = catch_unwind(|| {
        let mut descriptor = InstanceDescriptor::new_without_display_handle();
        descriptor.backends = backends;
        let adapters = Instance::new(descriptor).enumerate_adapters(backends);
        block_on(adapters).iter().map(|adapter| adapter.get_info()).collect::<Vec<_>>()
    });
    let Ok(found) = found else {
        report.note(format!("{section}'s loader fails: device = \"{name}\" can't be used"));
        return;
    };
    for info in &found {
        let driver = [info.driver.as_str(), info.driver_info.as_str()].join(" ");
        let text = format!("{}, {}", info.name, driver.trim());
        let finding = match info.device_type {
            DeviceType::Cpu => report.note(format!("{text}: computes on the CPU, slower than device = \"cpu\"")),
            _ => report.ok(text),
        };
        finding.value("name", info.name.clone()).value("driver", driver.trim());
    }
    if found.is_empty() {
        let finding = report.note(format!("no adapter: device = \"{name}\" can't be used"));
        if cards == 0 {
            finding.cure("for AMD's and Intel's cards install mesa-vulkan-drivers and libvulkan1");
        }
    }
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
