//! Which devices must be there, and how a test says that it did not run.
//!
//! libtest keeps what a passing test prints with `eprintln!` to itself, so that a suite without its device looks
//! like one that ran. What is skipped is therefore written to the standard error stream itself, which libtest
//! leaves alone.

use std::fmt::Display;
use std::io::Write;

/// Names the GPU devices that the suites run on, separated by commas: `cuda`, `wgpu`. Each of them must be there
/// and have the kernels of its suite; those that are not named are left out. Without the variable the suites run
/// on what answers and say what does not. `cargo xtask test` sets it.
pub const VARIABLE: &str = "QLORA_TEST_DEVICES";

/// The GPU devices that a suite may run on.
pub(crate) const GPUS: [&str; 2] = ["wgpu", "cuda"];

/// The named devices; `None` where the variable is not set.
///
/// # Panics
/// If it names a device that no suite knows.
fn named() -> Option<Vec<String>> {
    parse(&std::env::var(VARIABLE).ok()?)
}

fn parse(list: &str) -> Option<Vec<String>> {
    let names: Vec<String> = list.split(',').map(|name| name.trim().to_owned()).filter(|n| !n.is_empty()).collect();
    if let Some(unknown) = names.iter().find(|name| !GPUS.contains(&name.as_str())) {
        panic!("{VARIABLE}: there is no device `{unknown}`; there are {}", GPUS.join(", "));
    }
    (!names.is_empty()).then_some(names)
}

/// Whether a device must be there, because [`VARIABLE`] names it.
pub fn required(device: &str) -> bool {
    named().is_some_and(|names| names.iter().any(|name| name == device))
}

/// Whether a suite should look for a device: all are looked for unless some are named.
#[cfg(feature = "cubecl")]
pub(crate) fn wanted(device: &str) -> bool {
    named().is_none_or(|names| names.iter().any(|name| name == device))
}

/// Says that this test, or a part of it, does not run, where a person sees it.
pub fn skipped(reason: impl Display) {
    let thread = std::thread::current();
    say(format_args!("skipped: {}: {reason}", thread.name().unwrap_or("a test")));
}

/// Writes a line past libtest.
pub fn say(line: impl Display) {
    // A closed stream is no reason for a test to fail.
    let _ = std::io::stderr().lock().write_all(format!("{line}\n").as_bytes());
}

/// Something that a suite needs of a device is missing: the device, or the kernels that should run on it.
///
/// # Panics
/// If the device is [`required`].
#[track_caller]
pub fn missing(device: &str, reason: impl Display) {
    assert!(!required(device), "{VARIABLE} names {device}: {reason}");
    skipped(format!("{device}: {reason}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read() {
        assert_eq!(parse("cuda, wgpu"), Some(vec!["cuda".to_owned(), "wgpu".to_owned()]));
        assert_eq!(parse(""), None);
    }

    #[test]
    #[should_panic(expected = "no device `rocm`")]
    fn unknown_names_are_refused() {
        parse("cuda,rocm");
    }
}
