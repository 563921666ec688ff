//! The kernel cache from one process to the next: the test runs itself as those processes.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::process::Command;

use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
use cubecl::environment::{CacheOption, Namespace, Store, StoreOptions, store};
use qlora_models::select_device;

const CHILD: &str = "QLORA_TEST_KERNEL_CACHE";

/// What a process does: it opens a device, looks for an entry and stores it, and says what it found.
#[test]
fn child() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    select_device("auto").unwrap();
    let on = CubeClRuntimeConfig::get().compilation.cache;
    // As CubeCL's runtimes open theirs.
    let mut kernels: Store<u64, Vec<u8>> =
        store(StoreOptions::new().storage(Namespace::new("test")).cache(CacheOption::Lazy));
    let found = kernels.remove(&7) == Some(vec![1, 2, 3]);
    let stored = !on || kernels.insert(7, vec![1, 2, 3]).is_ok();
    println!("on={on} found={found} stored={stored};");
}

/// Runs [`child`] in `folder` with the variable set.
fn process(folder: &Path, setting: &Path) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["child", "--exact", "--nocapture"])
        .current_dir(folder)
        .env(CHILD, "1")
        .env("BURN_QLORA_KERNEL_CACHE", setting)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    let start = text.find("on=").unwrap();
    text[start..].split_once(';').unwrap().0.to_owned()
}

#[test]
fn a_second_process_finds_what_the_first_stored() {
    let dir = tempfile::tempdir().unwrap();
    let kernels = dir.path().join("kernels");
    assert_eq!(process(dir.path(), &kernels), "on=true found=false stored=true");
    assert_eq!(process(dir.path(), &kernels), "on=true found=true stored=true");
    let files: Vec<_> = fs::read_dir(&kernels).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files, ["default.db"]);
}

#[test]
fn a_damaged_cache_costs_its_use() {
    let dir = tempfile::tempdir().unwrap();
    let database = dir.path().join("default.db");
    process(dir.path(), dir.path());
    let whole = fs::read(&database).unwrap();
    for bytes in [&[7; 9000], &whole[..whole.len() / 2]] {
        fs::write(&database, bytes).unwrap();
        assert_eq!(process(dir.path(), dir.path()), "on=true found=false stored=true");
        assert_eq!(fs::read(&database).unwrap(), bytes);
    }
}

#[test]
fn off_and_a_folder_that_cannot_be_written_keep_nothing() {
    let dir = tempfile::tempdir().unwrap();
    assert!(process(dir.path(), Path::new("off")).starts_with("on=false"));
    fs::write(dir.path().join("file"), []).unwrap();
    assert!(process(dir.path(), &dir.path().join("file/kernels")).starts_with("on=false"));
}

#[test]
fn the_users_own_configuration_wins() {
    let dir = tempfile::tempdir().unwrap();
    let mine = dir.path().join("mine");
    fs::write(dir.path().join("cubecl.toml"), format!("[environment]\npath = {{ directory = {mine:?} }}")).unwrap();
    let kernels = dir.path().join("kernels");
    assert_eq!(process(dir.path(), &kernels), "on=true found=false stored=true");
    assert!(mine.join("default.db").exists() && !kernels.exists());
    fs::write(dir.path().join("cubecl.toml"), "[compilation]\ncache = false").unwrap();
    assert!(process(dir.path(), &kernels).starts_with("on=false"));
}
