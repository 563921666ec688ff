//! What CUDA's libraries and headers a run loads: NVRTC and the headers compile kernels, NCCL sums gradients.

use std::ffi::c_int;
use std::path::Path;

use cubecl_cuda::install;
use libloading::Library;

use super::{Report, cards};

/// Headers that CubeCL's kernels include.
const HEADERS: [&str; 4] = ["cuda_fp16.h", "cuda_bf16.h", "cooperative_groups.h", "mma.h"];
/// A header of CUDA's C++ library, in the toolkit's folder of headers or in `cccl` there.
const CXX_HEADER: &str = "cuda/barrier";
/// NCCL's library, as systems name it.
const NCCL: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// Looks for libraries and headers. Without a card nothing needs them.
pub fn inspect(report: &mut Report, cards: usize) {
    report.section("CUDA's libraries");
    if cards == 0 {
        report.ok("no card, so none of them is needed");
        return;
    }
    nvrtc(report);
    headers(report);
    nccl(report, cards);
}

fn nvrtc(report: &mut Report) {
    // SAFETY: the call only tries to load the library; without this a missing one is a panic below.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        let cure = "install cuda-nvrtc of a CUDA whose version the driver knows (Debian and Ubuntu: cuda-nvrtc-13-0 from NVIDIA, or the \
                    wheel nvidia-cuda-nvrtc), and put its folder into LD_LIBRARY_PATH";
        report.problem("NVRTC (libnvrtc.so), which compiles kernels, is not found", cure);
        return;
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the call writes the version into both, which outlive it.
    let asked = unsafe { cudarc::nvrtc::sys::nvrtcVersion(&mut major, &mut minor) };
    if asked.result().is_err() {
        report.note("NVRTC does not say its version");
        return;
    }
    let version = (u32::try_from(major).unwrap_or(0), u32::try_from(minor).unwrap_or(0));
    let text = format!("NVRTC {major}.{minor}{}", loaded_from("libnvrtc"));
    let finding = match cards::driver_cuda() {
        Some(driver) if version > driver => {
            let text = format!("{text} is newer than the CUDA {}.{} that the driver knows", driver.0, driver.1);
            report.note(text).cure("where kernels don't run, update the driver or install an older NVRTC")
        }
        _ => report.ok(text),
    };
    finding.value("nvrtc", format!("{major}.{minor}"));
}

fn headers(report: &mut Report) {
    let cure = "install CUDA's headers (Debian and Ubuntu: cuda-cudart-dev and cuda-cccl of NVRTC's version from NVIDIA), and set CUDA_PATH to \
                the folder that has include/";
    let Some(path) = install::cuda_path() else {
        report.problem("CUDA's headers are not found: there is no CUDA_PATH, /usr/local/cuda or /opt/cuda", cure);
        return;
    };
    let missing = missing_headers(&install::include_path(), &install::cccl_include_path());
    match missing.is_empty() {
        true => report.ok(format!("CUDA's headers in {}", path.join("include").display())),
        false => report.problem(format!("{}/include has no {}", path.display(), missing.join(", ")), cure),
    }
    .value("cuda_path", path.display().to_string());
}

fn missing_headers(include: &Path, cccl: &Path) -> Vec<&'static str> {
    let mut missing: Vec<&str> = HEADERS.into_iter().filter(|name| !include.join(name).is_file()).collect();
    if ![include, cccl].iter().any(|folder| folder.join(CXX_HEADER).is_file()) {
        missing.push(CXX_HEADER);
    }
    missing
}

fn nccl(report: &mut Report, cards: usize) {
    let found = NCCL.iter().find_map(|name| {
        // SAFETY: NCCL's library does nothing when it is loaded but set up itself.
        unsafe { Library::new(*name) }.ok()
    });
    let Some(library) = found else {
        let text =
            "NCCL (libnccl.so.2) is not found: ranks on cards exchange gradients through the memory of the hosts";
        let finding = report.note(text);
        if cards > 1 {
            finding.cure(
                "install libnccl2, or the wheel nvidia-nccl-cu13 and its folder into LD_LIBRARY_PATH; a single card needs none",
            );
        }
        return;
    };
    let mut version: c_int = 0;
    type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
    // SAFETY: nccl.h declares `ncclResult_t ncclGetVersion(int *version)`, which writes the version; 0 is success.
    let failed = unsafe { library.get::<GetVersion>(b"ncclGetVersion\0").map(|get| get(&mut version)) };
    match failed {
        Ok(0) => {
            let (major, minor, patch) = nccl_version(version);
            let version = format!("{major}.{minor}.{patch}");
            report.ok(format!("NCCL {version}{}", loaded_from("libnccl"))).value("nccl", version);
        }
        _ => drop(report.note("NCCL does not say its version")),
    }
}

/// NCCL's number in parts: 22902 is 2.29.2, and 2708 before 2.9 is 2.7.8.
fn nccl_version(number: c_int) -> (c_int, c_int, c_int) {
    match number {
        10_000.. => (number / 10_000, number / 100 % 100, number % 100),
        _ => (number / 1000, number / 100 % 10, number % 100),
    }
}

/// Where a library was loaded from, in words that go on a sentence; nothing where the system does not say.
fn loaded_from(name: &str) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let path = maps.lines().filter_map(|line| line.find('/').map(|at| &line[at..]));
    let is_it = |path: &&str| path.rsplit('/').next().is_some_and(|file| file.starts_with(name));
    path.into_iter().find(is_it).map_or(String::new(), |path| format!(", {path}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn headers_may_be_in_two_folders() {
        let dir = tempfile::tempdir().unwrap();
        let (include, cccl) = (dir.path().to_path_buf(), dir.path().join("cccl"));
        assert_eq!(missing_headers(&include, &cccl).len(), HEADERS.len() + 1);
        for name in HEADERS {
            std::fs::write(include.join(name), "").unwrap();
        }
        assert_eq!(missing_headers(&include, &cccl), [CXX_HEADER]);
        std::fs::create_dir_all(cccl.join("cuda")).unwrap();
        std::fs::write(cccl.join(CXX_HEADER), "").unwrap();
        assert_eq!(missing_headers(&include, &cccl), [""; 0]);
    }

    #[test]
    fn nccls_numbers_have_two_forms() {
        assert_eq!(nccl_version(22_902), (2, 29, 2));
        assert_eq!(nccl_version(2708), (2, 7, 8));
    }
}
