//! Folders that runs write to beside their output: the hub's cache and that of compiled kernels.

use std::path::{Path, PathBuf};

use burn_qlora::Hub;
use burn_qlora::qlora_models::kernel_cache_folder;
use burn_qlora::report::memory;

use super::Report;

/// What a model of 7 billion parameters takes in 16 bits, about.
const A_MODEL: u64 = 15_000_000_000;

/// Looks at the folders.
pub fn inspect(report: &mut Report) {
    report.section("Folders");
    hub(report, &Hub::from_env());
    match kernel_cache_folder() {
        Ok(Some(folder)) => {
            report
                .ok(format!("compiled kernels are kept in {}", folder.display()))
                .value("path", folder.display().to_string());
        }
        Ok(None) => drop(
            report
                .note("compiled kernels are not kept: each run compiles them again")
                .cure("BURN_QLORA_KERNEL_CACHE names a folder for them"),
        ),
        Err((folder, error)) => {
            let text = format!("compiled kernels are not kept: {}: {error}", folder.display());
            report.note(text).cure("BURN_QLORA_KERNEL_CACHE names another folder");
        }
    }
}

fn hub(report: &mut Report, hub: &Hub) {
    let folder = &hub.cache_dir;
    let room = free(folder);
    let mut text = format!("the hub's cache is {}", folder.display());
    if !folder.is_dir() {
        text += ", which the first download makes";
    }
    if let Some(bytes) = room {
        text += &format!("; {} are free there", memory(bytes));
    }
    let finding = match room.is_some_and(|bytes| bytes < A_MODEL) {
        _ if !hub.offline && !is_writable(folder) => {
            report.problem(format!("{text}; it can't be written to"), "HF_HOME or HF_HUB_CACHE names another folder")
        }
        true => report.note(text).cure("a model of 7 billion parameters takes 15 GB: HF_HOME names another folder"),
        false => report.ok(text),
    };
    finding.value("path", folder.display().to_string()).value("free_bytes", room);
    let token =
        if hub.token.is_some() { "with a token" } else { "without a token, which gated models need (HF_TOKEN)" };
    let text = match hub.offline {
        true => "the hub is not asked (HF_HUB_OFFLINE): models come from the cache".into(),
        false => format!("the hub is {}, {token}", hub.endpoint),
    };
    report
        .ok(text)
        .value("endpoint", hub.endpoint.clone())
        .value("offline", hub.offline)
        .value("token", hub.token.is_some());
}

/// The folder, or what is there of the way to it; `None` where that is a file.
fn nearest(folder: &Path) -> Option<PathBuf> {
    let folder = std::path::absolute(folder).ok()?;
    let there = folder.ancestors().find(|folder| folder.symlink_metadata().is_ok())?;
    there.is_dir().then(|| there.to_path_buf())
}

/// Bytes that may still be written below a folder, which need not be there yet; `None` where the system does not say.
pub fn free(folder: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        let found = rustix::fs::statvfs(nearest(folder)?).ok()?;
        Some(found.f_bavail.saturating_mul(found.f_frsize))
    }
    #[cfg(not(unix))]
    {
        let _ = folder;
        None
    }
}

/// Whether something can be written below a folder, as far as the system says without writing.
fn is_writable(folder: &Path) -> bool {
    #[cfg(unix)]
    {
        nearest(folder).is_some_and(|folder| rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).is_ok())
    }
    #[cfg(not(unix))]
    {
        nearest(folder).is_some()
    }
}
