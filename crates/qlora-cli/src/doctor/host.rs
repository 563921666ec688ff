//! The processor, memory and limits of the host.

use burn_qlora::qlora_models::host_memory;
use burn_qlora::report::memory;
use sysinfo::{CpuRefreshKind, MemoryRefreshKind, RefreshKind, System};

use super::{Report, counted, folders};

const THREADS_VARIABLE: &str = "RAYON_NUM_THREADS";
/// Below this a checkpoint of a small model and the program are all there is room for.
const LITTLE_MEMORY: u64 = 8 << 30;
/// What NCCL wants of the system's shared memory for a few ranks; containers start with 64 MiB.
const SHARED_MEMORY: u64 = 1 << 30;

/// Looks at the host.
pub fn inspect(report: &mut Report, cards: usize) {
    report.section("Host");
    let kinds = RefreshKind::nothing().with_memory(MemoryRefreshKind::everything()).with_cpu(CpuRefreshKind::nothing());
    let system = System::new_with_specifics(kinds);
    processor(report, &system);
    let total = system.total_memory();
    let free = host_memory().unwrap_or_else(|| system.available_memory());
    let text = format!("{} of memory, {} free", memory(total), memory(free));
    let finding = match free < LITTLE_MEMORY {
        false => report.ok(text),
        true => report.note(text).cure("`qlora train CONFIG --dry-run` says what a run needs"),
    };
    finding.value("total_bytes", total).value("free_bytes", free);
    locked(report);
    if cards > 1 {
        shared(report);
    }
}

fn processor(report: &mut Report, system: &System) {
    let brand = system.cpus().first().map(|cpu| cpu.brand().trim().to_owned()).filter(|brand| !brand.is_empty());
    let brand = brand.unwrap_or_else(|| "a processor without a name".into());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut text = format!("{brand}, {}", counted(threads, "thread"));
    if let Some(cores) = System::physical_core_count() {
        text += &format!(" on {}", counted(cores, "core"));
    }
    let simd = simd();
    text += &format!(", {}", simd.unwrap_or("no AVX2"));
    let finding = match simd {
        Some(_) => report.ok(text),
        None => report.note(text).cure("computing on this CPU is several times slower than on one with AVX2"),
    };
    finding.value("threads", threads).value("simd", simd);
    if let Ok(count) = std::env::var(THREADS_VARIABLE) {
        let is_number = count.trim().parse::<usize>().is_ok_and(|count| count > 0);
        match is_number {
            true => report.ok(format!("{THREADS_VARIABLE}={count}: so many threads compute")),
            false => report.note(format!("{THREADS_VARIABLE}=\"{count}\" is no number of threads, and does not count")),
        };
    }
}

/// The widest instructions that the CPU's products use.
fn simd() -> Option<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            return Some("AVX-512");
        }
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some("AVX2")
    }
    #[cfg(target_arch = "aarch64")]
    {
        Some("NEON")
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        None
    }
}

/// `ulimit -l`.
fn locked(report: &mut Report) {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let Some(limit) = locked_limit(&limits) else { return };
    match limit {
        None => drop(report.ok("memory may be locked without a limit (ulimit -l)")),
        Some(bytes) => {
            let text = format!("{} of memory may be locked (ulimit -l)", memory(bytes));
            let cure = "CUDA's pinned memory is not bound by it, InfiniBand is: there, ulimit -l unlimited";
            report.note(text).cure(cure).value("limit_bytes", bytes);
        }
    }
}

/// The soft limit of locked memory in Linux's table: `None` where it isn't in it, `Some(None)` where there is no limit.
fn locked_limit(limits: &str) -> Option<Option<u64>> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(None),
        bytes => bytes.parse().ok().map(Some),
    }
}

/// The memory through which NCCL's ranks of a host exchange what cards can't.
fn shared(report: &mut Report) {
    let folder = std::path::Path::new("/dev/shm");
    let Some(bytes) = folders::free(folder) else { return };
    let text = format!("{} of shared memory are free in {}", memory(bytes), folder.display());
    match bytes < SHARED_MEMORY {
        false => report.ok(text),
        true => report.note(text).cure("NCCL may want more: start a container with --shm-size=8g or --ipc=host"),
    }
    .value("free_bytes", bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_locked_memory_is_read() {
        let table = |limit: &str| {
            format!("Limit  Soft Limit  Hard Limit  Units\nMax locked memory         {limit}  x  bytes\n")
        };
        assert_eq!(locked_limit(&table("unlimited")), Some(None));
        assert_eq!(locked_limit(&table("8388608")), Some(Some(8 << 20)));
        assert_eq!(locked_limit("Max open files 1024 1024 files\n"), None);
    }
}
