//! Where compiled kernels are kept from one run to the next.
//!
//! A GPU's kernels are compiled when they are first launched, which takes seconds of a first step on
//! CUDA. CubeCL can keep them, with what it has measured for autotuning, in one database file; it
//! doesn't by default, and would do so below the folder that the program is started in. Here they go to
//! the user's cache directory.
//!
//! CubeCL finds a kernel by its name, its parameters and the program's build id: the program that
//! changes doesn't find what it compiled before it changed. A linker that writes no build id would make
//! stale kernels indistinguishable from fresh ones, so without one nothing is kept.
//!
//! The cache is a convenience: a folder that can't be written, a file that is damaged or locked costs
//! its use and a warning, never the run. A folder that can only be read is not used either: CubeCL
//! moves entries when it reads them under a new build id, and panics when it can't.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Once;

use cubecl::config::cache::CacheConfig;
use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
use cubecl::environment;
use cubecl::records::RecordLevel;
use toml::Table;
use tracing::{debug, warn};

/// A folder to keep kernels in instead of the user's cache directory, or `off`.
const VARIABLE: &str = "BURN_QLORA_KERNEL_CACHE";

/// Turns the cache on as the environment and the user's `cubecl.toml` say. Only the first call, before
/// the first use of a device, has an effect.
pub(crate) fn enable() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let written = match std::env::current_dir() {
            Ok(folder) => user_settings(&folder),
            Err(_) => Table::new(),
        };
        let folder = folder_of_environment();
        let config = |folder: Option<&Path>| {
            // CubeCL's own environment variables come after its files.
            configured(CubeClRuntimeConfig::from_current_dir(), &written, folder).override_from_env()
        };
        let mut chosen = config(folder.as_deref());
        if let Some(folder) = folder
            && !sets(&written, "environment", "path")
            && let Err(error) = check(&folder, &chosen.environment.name)
        {
            warn!("kernels are not kept: {}: {error}; {VARIABLE} names another folder, or `off`", folder.display());
            chosen = config(None);
        }
        let on = chosen.compilation.cache;
        if !CubeClRuntimeConfig::try_set(chosen) {
            debug!("CubeCL was in use before: its kernel cache stays as it was");
        } else if on {
            debug!("compiled kernels are kept in {}", environment::path().display());
        } else {
            debug!("compiled kernels are not kept");
        }
    });
}

/// The folder that compiled kernels are kept in, made if need be: as [`select_device`](crate::select_device) chooses it, but for what
/// the user's `cubecl.toml` says. `None` where none are kept.
///
/// # Errors
/// The folder, which can't be made or written to, and why: kernels are not kept then.
pub fn kernel_cache_folder() -> Result<Option<PathBuf>, (PathBuf, io::Error)> {
    let Some(folder) = folder_of_environment() else { return Ok(None) };
    match check(&folder, &CubeClRuntimeConfig::default().environment.name) {
        Ok(()) => Ok(Some(folder)),
        Err(error) => Err((folder, error)),
    }
}

/// What the environment says, where the program's kernels can be told from those of another build.
fn folder_of_environment() -> Option<PathBuf> {
    let folder = folder(std::env::var_os(VARIABLE), std::env::var_os("XDG_CACHE_HOME"), std::env::home_dir())?;
    if buildid::build_id().is_none() {
        debug!("this program has no build id: kernels are not kept");
        return None;
    }
    Some(folder)
}

/// The folder that is asked for: the variable's, or one in the user's cache directory. `None` for
/// `off`, and when there is no such directory.
fn folder(setting: Option<OsString>, cache_home: Option<OsString>, home: Option<PathBuf>) -> Option<PathBuf> {
    match setting.filter(|setting| !setting.is_empty()) {
        Some(setting) if setting == "off" => None,
        // The program may change its folder later.
        Some(setting) => Some(std::path::absolute(&setting).unwrap_or_else(|_| setting.into())),
        None => {
            // The XDG Base Directory Specification has relative paths ignored.
            let cache_home = cache_home.map(PathBuf::from).filter(|path| path.is_absolute());
            let caches = cache_home.or_else(|| home.map(|home| home.join(".cache")))?;
            Some(caches.join("burn-qlora").join("kernels"))
        }
    }
}

/// What the user's configuration file for CubeCL says, found as CubeCL finds it: in `folder` or the
/// nearest folder above it.
fn user_settings(folder: &Path) -> Table {
    let read = |path: PathBuf| fs::read_to_string(path).ok()?.parse::<Table>().ok();
    for folder in folder.ancestors() {
        for name in CubeClRuntimeConfig::file_names() {
            if let Some(settings) = read(folder.join(name)) {
                return settings;
            }
        }
        for (name, section) in CubeClRuntimeConfig::section_file_names() {
            if let Some(toml::Value::Table(settings)) = read(folder.join(name)).and_then(|mut all| all.remove(*section))
            {
                return settings;
            }
        }
    }
    Table::new()
}

fn sets(written: &Table, section: &str, key: &str) -> bool {
    written.get(section).and_then(|section| section.get(key)).is_some()
}

/// `config` with the cache in `folder`, or with nothing kept. What the user has `written` stays.
fn configured(mut config: CubeClRuntimeConfig, written: &Table, folder: Option<&Path>) -> CubeClRuntimeConfig {
    let open = |section, key| !sets(written, section, key);
    if open("compilation", "cache") {
        config.compilation.cache = folder.is_some();
    }
    if open("autotune", "disable_cache") {
        config.autotune.disable_cache = folder.is_none();
    }
    if open("throughput", "disable_cache") {
        config.throughput.disable_cache = folder.is_none();
    }
    if open("environment", "path")
        && let Some(folder) = folder
    {
        config.environment.path = CacheConfig::Directory(folder.to_path_buf());
    }
    if open("environment", "records") {
        // A diary of every compilation, one more write for each.
        config.environment.records.level = RecordLevel::Off;
    }
    config
}

/// Makes the folder if need be, and sees that it and the cache in it can be written.
fn check(folder: &Path, name: &str) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let probe = folder.join(format!(".probe-{}", std::process::id()));
    fs::write(&probe, [])?;
    fs::remove_file(&probe)?;
    match OpenOptions::new().append(true).open(folder.join(environment::file_name(name))) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(setting: Option<&str>, cache_home: Option<&str>, home: Option<&str>) -> Option<PathBuf> {
        folder(setting.map(Into::into), cache_home.map(Into::into), home.map(Into::into))
    }

    #[cfg(unix)]
    #[test]
    fn the_variable_then_the_cache_directory_then_the_home_directory() {
        let path = |path: &str| Some(PathBuf::from(path));
        assert_eq!(chosen(Some("/a"), Some("/x"), Some("/h")), path("/a"));
        assert_eq!(chosen(None, Some("/x"), Some("/h")), path("/x/burn-qlora/kernels"));
        assert_eq!(chosen(Some(""), None, Some("/h")), path("/h/.cache/burn-qlora/kernels"));
        assert_eq!(chosen(None, Some("relative"), Some("/h")), path("/h/.cache/burn-qlora/kernels"));
        assert_eq!(chosen(None, Some(""), None), None);
        assert_eq!(chosen(Some("off"), Some("/x"), Some("/h")), None);
        let relative = chosen(Some("a/b"), None, None).unwrap();
        assert!(relative.is_absolute() && relative.ends_with("a/b"));
    }

    #[test]
    fn a_folder_turns_the_cache_on_and_none_turns_all_of_it_off() {
        let folder = Path::new("kernels");
        let on = configured(CubeClRuntimeConfig::default(), &Table::new(), Some(folder));
        assert!(on.compilation.cache && !on.autotune.disable_cache && !on.throughput.disable_cache);
        assert_eq!(on.environment.path.root(), folder);
        assert_eq!(on.environment.records.level, RecordLevel::Off);
        let off = configured(CubeClRuntimeConfig::default(), &Table::new(), None);
        assert!(!off.compilation.cache && off.autotune.disable_cache && off.throughput.disable_cache);
    }

    #[test]
    fn what_the_user_wrote_stays() {
        let text = "[compilation]\ncache = false\n[autotune]\ndisable_cache = true\n\
                    [environment]\npath = { directory = \"mine\" }\n[environment.records]\nlevel = \"full\"";
        let config: CubeClRuntimeConfig = toml::from_str(text).unwrap();
        let config = configured(config, &text.parse().unwrap(), Some(Path::new("kernels")));
        assert!(!config.compilation.cache && config.autotune.disable_cache && !config.throughput.disable_cache);
        assert_eq!(config.environment.path.root(), Path::new("mine"));
        assert_eq!(config.environment.records.level, RecordLevel::Full);
    }

    #[test]
    fn the_nearest_file_of_the_user_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        fs::write(dir.path().join("cubecl.toml"), "[compilation]\ncache = true").unwrap();
        assert!(sets(&user_settings(&inner), "compilation", "cache"));
        fs::write(dir.path().join("a/burn.toml"), "[cubecl.environment]\nname = \"n\"").unwrap();
        let nearest = user_settings(&inner);
        assert!(sets(&nearest, "environment", "name") && !sets(&nearest, "compilation", "cache"));
        // A file that is no TOML, or has no such section, is passed over.
        fs::write(inner.join("cubecl.toml"), "[").unwrap();
        fs::write(inner.join("burn.toml"), "[fusion]").unwrap();
        assert_eq!(user_settings(&inner), nearest);
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        check(&dir.path().join("a/b"), "default").unwrap();
        assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 0);
        fs::write(dir.path().join("file"), []).unwrap();
        assert!(check(&dir.path().join("file/a"), "default").is_err());
        fs::create_dir(dir.path().join("a/b/default.db")).unwrap();
        assert!(check(&dir.path().join("a/b"), "default").is_err());
    }
}
