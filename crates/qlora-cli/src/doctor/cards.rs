//! NVIDIA's cards: what the driver says of each, how they reach each other, and whether a kernel runs.
//!
//! The driver's library, its monitoring library (NVML) and the compiler are loaded at run time; what is not there is said. NVML counts
//! all cards of the host, CUDA those that `CUDA_VISIBLE_DEVICES` shows: they meet by the address on the PCI bus.

use std::ffi::CStr;
use std::sync::Arc;

use burn_qlora::qlora_dist::Place;
use burn_qlora::report::memory;
use burn_qlora::{ModelError, select_device};
use cudarc::driver::sys::{self, CUresult};
use cudarc::driver::{CudaContext, DriverError, result};
use nvml_wrapper::enum_wrappers::device::TopologyLevel;
use nvml_wrapper::struct_wrappers::device::PciInfo;
use nvml_wrapper::{Device, Nvml};

use super::{Report, copies, counted};

/// What CUDA shows a process of the host's cards.
pub const CARDS_VARIABLE: &str = "CUDA_VISIBLE_DEVICES";
/// NVML's links of a card, at most.
const LINKS: u32 = 32;

/// Why there is no card.
#[derive(Debug)]
pub enum Absent {
    /// The driver's library is not there.
    NoDriver,
    /// The driver shows none.
    NoneVisible,
    /// The driver does not start, for this reason.
    Driver(String),
}

/// How many cards the driver shows to this process.
///
/// # Errors
/// There is no driver, it does not start, or it shows none.
pub fn count() -> Result<usize, Absent> {
    // SAFETY: the call only tries to load the library; without this a missing one is a panic below.
    if !unsafe { sys::is_culib_present() } {
        return Err(Absent::NoDriver);
    }
    let none = |error: &DriverError| error.0 == CUresult::CUDA_ERROR_NO_DEVICE;
    match result::init().and_then(|()| result::device::get_count()) {
        Ok(count) => usize::try_from(count).ok().filter(|count| *count > 0).ok_or(Absent::NoneVisible),
        Err(error) if none(&error) => Err(Absent::NoneVisible),
        Err(error) => Err(Absent::Driver(words(&error))),
    }
}

/// What tells a card, or a part of one that is used as a card (MIG), from all others: its UUID as `nvidia-smi -L` lists it, without what it begins
/// with; `None` where the driver does not say.
pub fn uuid(index: usize) -> Option<String> {
    count().ok()?;
    let device = result::device::get(i32::try_from(index).ok()?).ok()?;
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: the call writes sixteen bytes into `uuid`, which outlives it, and the device is one that the driver returned.
    unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, device) }.result().ok()?;
    let bytes = uuid.bytes.map(|byte| byte.to_ne_bytes()[0]);
    let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    let part = |range: std::ops::Range<usize>| hex[range].concat();
    Some([part(0..4), part(4..6), part(6..8), part(8..10), part(10..16)].join("-"))
}

fn bus(device: sys::CUdevice) -> Option<String> {
    let mut text = [0_u8; 32];
    // SAFETY: the buffer has the length that is given, and the device is one that the driver returned.
    unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), 32, device) }.result().ok()?;
    Some(CStr::from_bytes_until_nul(&text).ok()?.to_string_lossy().into_owned())
}

/// A card that answers.
struct Card {
    index: usize,
    context: Arc<CudaContext>,
    /// Its address, as `00000000:19:00.0`.
    bus: Option<String>,
}

/// Looks at the cards. Returns how many there are.
pub fn inspect(report: &mut Report, place: Option<&Place>) -> usize {
    report.section("Cards");
    let visible = std::env::var(CARDS_VARIABLE).ok();
    let count = match count() {
        Ok(count) => count,
        Err(absent) => {
            none(report, &absent, visible.as_deref());
            return 0;
        }
    };
    let nvml = Nvml::init();
    let version = nvml.as_ref().ok().and_then(|nvml| nvml.sys_driver_version().ok());
    let known = version.as_ref().map_or("whose version is unknown".into(), |version| format!("{version},"));
    let cuda = driver_cuda().map_or("an unknown version".into(), |(major, minor)| format!("{major}.{minor}"));
    report.ok(format!("NVIDIA's driver {known} for CUDA {cuda}")).value("driver", version).value("cuda", cuda);
    if let Some(visible) = visible {
        report.note(format!("{CARDS_VARIABLE}={visible} shows {} of this host", counted(count, "card")));
    }
    if let Err(error) = &nvml {
        let text = format!("NVML can't be used ({error}): links and the state of the PCI bus are not known");
        let cure = "it comes with the driver as libnvidia-ml.so.1; a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility";
        report.note(text).cure(cure);
    }
    let cards: Vec<Card> = (0..count).filter_map(|index| open(report, index)).collect();
    let devices: Vec<Option<Device<'_>>> = cards.iter().map(|card| device_of(nvml.as_ref().ok()?, card)).collect();
    for (card, device) in cards.iter().zip(&devices) {
        inspect_card(report, card, device.as_ref());
    }
    pairs(report, &cards, &devices);
    let needed = place.map_or(1, |place| place.local_world_size);
    if needed > count {
        let text = format!("{needed} ranks of a run are on this host, which shows {}", counted(count, "card"));
        let cure = format!("start {count} a host, see what {CARDS_VARIABLE} hides, or train with device = \"cpu\"");
        // One card of its own for each rank, as schedulers show it, is no lack.
        match count {
            1 => report.note(text).cure(format!("fine where {CARDS_VARIABLE} differs from rank to rank; else {cure}")),
            _ => report.problem(text, cure),
        };
    }
    count
}

/// Says why there is no card, and what becomes of a run then.
fn none(report: &mut Report, absent: &Absent, visible: Option<&str>) {
    let on_cpu = "device = \"auto\" trains on the CPU, in f32, on all threads; --dry-run says what fits";
    match absent {
        // A device file without a driver that starts: somebody meant to have a card.
        Absent::NoDriver if std::path::Path::new("/dev/nvidiactl").exists() => {
            let cure = "install the driver's CUDA library (libcuda.so.1); start a container with --gpus all and \
                        NVIDIA_DRIVER_CAPABILITIES=compute,utility";
            report.problem("there is a card, and the driver's CUDA library (libcuda.so.1) is not found", cure);
        }
        Absent::NoDriver => {
            report.note(format!("no NVIDIA driver: {on_cpu}"));
        }
        Absent::NoneVisible => {
            let shown = visible.map_or(String::new(), |visible| format!(" with {CARDS_VARIABLE}=\"{visible}\""));
            let finding = report.note(format!("NVIDIA's driver shows no card{shown}: {on_cpu}"));
            if visible.is_some() {
                finding.cure(format!("unset {CARDS_VARIABLE}, or name cards that nvidia-smi lists"));
            }
        }
        Absent::Driver(error) => {
            let text = format!("NVIDIA's driver does not start: {error}");
            report.problem(text, "run nvidia-smi: after an update of the driver the host has to be started again");
        }
    }
}

/// A driver's error in its own words.
fn words(error: &DriverError) -> String {
    let text = error.error_string().ok().map(|text| text.to_string_lossy().into_owned());
    text.unwrap_or_else(|| format!("{:?}", error.0))
}

/// The newest CUDA that the driver knows.
pub fn driver_cuda() -> Option<(u32, u32)> {
    let mut decimal = 0;
    // SAFETY: the driver's library is there, and the call writes the version into `decimal`, which outlives it.
    unsafe { sys::cuDriverGetVersion(&mut decimal) }.result().ok()?;
    let decimal = u32::try_from(decimal).ok()?;
    Some((decimal / 1000, decimal % 1000 / 10))
}

fn open(report: &mut Report, index: usize) -> Option<Card> {
    let context = match CudaContext::new(index) {
        Ok(context) => context,
        Err(error) => {
            let text = format!("cuda:{index} gives no context: {}", words(&error));
            report.problem(text, "see with nvidia-smi who uses it, and whether it has failed");
            return None;
        }
    };
    let bus = bus(context.cu_device());
    Some(Card { index, context, bus })
}

fn device_of<'a>(nvml: &'a Nvml, card: &Card) -> Option<Device<'a>> {
    nvml.device_by_pci_bus_id(card.bus.as_deref()?).ok()
}

fn inspect_card(report: &mut Report, card: &Card, device: Option<&Device<'_>>) {
    let Card { index, context, bus } = card;
    let name = context.name().unwrap_or_else(|_| "a card without a name".into());
    let (major, minor) = context.compute_capability().unwrap_or_default();
    let (free, total) = context.mem_get_info().unwrap_or_default();
    let memory_words = format!("{} of {} free", memory(free as u64), memory(total as u64));
    let at = bus.as_ref().map_or(String::new(), |bus| format!(", PCI {bus}"));
    let text = format!("cuda:{index}  {name}, compute capability {major}.{minor}, {memory_words}{at}");
    let finding = match (major, minor) {
        (8.., _) => report.ok(text),
        (7, 5) => report.note(text).cure("the hand-written kernels are used in f16 alone, the default there"),
        (7, _) => report.note(text).cure("no hand-written kernel is for it: CubeCL's are used, in f16"),
        _ => report.note(text).cure("no hand-written kernel and no tensor cores: CubeCL's kernels are used, in f32"),
    };
    finding.value("name", name).value("compute_capability", format!("{major}.{minor}"));
    finding.value("free_bytes", free).value("total_bytes", total).value("pci", bus.clone());
    // Of what is taken, some hundreds of MiB are this program's own context.
    let taken = (total - free.min(total)) as u64;
    if taken > 4 << 30 {
        report.note(format!("cuda:{index}  {} are in use by other programs", memory(taken)));
    }
    copies::inspect(report, *index, context, device);
    match select_device(&format!("cuda:{index}")) {
        Ok(_) => report.ok(format!("cuda:{index}  a kernel was compiled, or found compiled, and ran")),
        Err(error @ ModelError::NoDevice { .. }) => {
            let cure =
                "see NVRTC and the headers below; CUDA_PATH names the folder of a CUDA whose version the driver knows";
            report.problem(format!("cuda:{index}  no kernel runs: {error}"), cure)
        }
        Err(error) => report.problem(format!("cuda:{index}  {error}"), "correct the variable, or unset it"),
    };
}

/// What lies between two cards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Between {
    /// Whether one reads the other's memory.
    peer: bool,
    /// NVLinks of the first that lead to the second or to switches, where NVML says.
    links: u32,
    /// How far apart they are on the PCI bus, where NVML says.
    level: Option<&'static str>,
}

impl Between {
    fn words(self) -> String {
        let bus = self.level.map_or(String::new(), |level| format!(", {level}"));
        match (self.peer, self.links) {
            (true, 0) => format!("peer access over PCIe{bus}"),
            (true, links) => format!("peer access over {}", counted(links as usize, "NVLink")),
            (false, _) => format!("no peer access{bus}"),
        }
    }
}

fn pairs(report: &mut Report, cards: &[Card], devices: &[Option<Device<'_>>]) {
    let mut found: Vec<(usize, usize, Between)> = Vec::new();
    for (first, card) in cards.iter().enumerate() {
        for (second, other) in cards.iter().enumerate().skip(first + 1) {
            let mut peer = 0;
            // SAFETY: both devices are the driver's, and the call writes into `peer`, which outlives it.
            let asked =
                unsafe { sys::cuDeviceCanAccessPeer(&mut peer, card.context.cu_device(), other.context.cu_device()) };
            let peer = asked.result().is_ok() && peer != 0;
            let (links, level) = match (&devices[first], &devices[second]) {
                (Some(one), Some(two)) => (links(one, two), level(one, two)),
                _ => (0, None),
            };
            found.push((card.index, other.index, Between { peer, links, level }));
        }
    }
    let Some(&(_, _, one)) = found.first() else { return };
    let cure = "ranks exchange gradients through the host's memory; in a container or a virtual machine see whether ACS or IOMMU \
                keep the cards apart";
    if found.len() > 1 && found.iter().all(|(_, _, between)| *between == one) {
        let text = format!("each pair of the {} cards: {}", cards.len(), one.words());
        let finding = if one.peer { report.ok(text) } else { report.note(text).cure(cure) };
        finding.value("peer", one.peer).value("nvlinks", one.links);
        return;
    }
    for (first, second, between) in found {
        let text = format!("cuda:{first} - cuda:{second}  {}", between.words());
        let finding = if between.peer { report.ok(text) } else { report.note(text).cure(cure) };
        finding.value("peer", between.peer).value("nvlinks", between.links);
    }
}

/// NVLinks of a card that lead to another one, or to a switch, over which all are reached.
fn links(card: &Device<'_>, other: &Device<'_>) -> u32 {
    let address = |info: PciInfo| (info.domain, info.bus, info.device);
    let nvml = card.nvml();
    let all = 0..nvml.device_count().unwrap_or(0);
    let addresses: Vec<_> =
        all.filter_map(|index| nvml.device_by_index(index).ok()?.pci_info().ok()).map(address).collect();
    let other = other.pci_info().ok().map(address);
    let leads_there = |number: &u32| {
        let link = card.link_wrapper_for(*number);
        // What is no card is a switch.
        let there = |remote| Some(remote) == other || !addresses.contains(&remote);
        link.is_active().unwrap_or(false) && link.remote_pci_info().map_or(true, |remote| there(address(remote)))
    };
    (0..LINKS).filter(leads_there).map(|_| 1).sum()
}

#[cfg(target_os = "linux")]
fn level(card: &Device<'_>, other: &Device<'_>) -> Option<&'static str> {
    let other = other.uuid().ok().and_then(|uuid| card.nvml().device_by_uuid(uuid).ok())?;
    Some(match card.topology_common_ancestor(other).ok()? {
        TopologyLevel::Internal => "on one board",
        TopologyLevel::Single => "on one PCIe switch",
        TopologyLevel::Multiple => "behind several PCIe switches",
        TopologyLevel::HostBridge => "on one host bridge",
        TopologyLevel::Node => "on one NUMA node",
        TopologyLevel::System => "on different NUMA nodes",
    })
}

#[cfg(not(target_os = "linux"))]
fn level(_: &Device<'_>, _: &Device<'_>) -> Option<&'static str> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_between_cards_is_said() {
        let between = |peer, links, level| Between { peer, links, level }.words();
        assert_eq!(between(true, 18, Some("on one NUMA node")), "peer access over 18 NVLinks");
        assert_eq!(between(true, 0, Some("on one PCIe switch")), "peer access over PCIe, on one PCIe switch");
        assert_eq!(between(false, 0, None), "no peer access");
    }

    #[test]
    fn a_host_without_cards_trains_on_the_cpu() {
        for (absent, visible, words) in [
            (Absent::NoneVisible, Some("7"), "CUDA_VISIBLE_DEVICES=\"7\": device = \"auto\" trains on the CPU"),
            (Absent::NoneVisible, None, "shows no card: device"),
        ] {
            let mut report = Report::default();
            none(&mut report, &absent, visible);
            assert!(report.problems() == 0 && report.to_string().contains(words), "{report}");
        }
        let mut report = Report::default();
        none(&mut report, &Absent::Driver("unknown error".into()), None);
        assert_eq!(report.problems(), 1);
    }
}
