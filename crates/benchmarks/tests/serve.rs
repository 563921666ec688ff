//! `qlora-bench serve` runs wherever the engine does.
#![allow(clippy::unwrap_used, reason = "a failing unwrap is a failing test")]

use std::process::Command;

fn bench(args: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_qlora-bench")).args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

#[test]
fn every_case_is_answered() {
    let common = ["serve", "--device", "cpu", "--shape", "tiny", "--layers", "1", "--rank", "4", "--cases"];
    let (done, text) = bench(&[&common[..], &["1x3x2x0", "3x20x4x2"]].concat());
    assert!(done && text.contains("1x3x2x0") && text.contains("3x20x4x2"), "{text}");
    let (done, text) = bench(&[&common[..], &["3x20"]].concat());
    assert!(!done && text.contains("streams x prompt x answer x adapters"), "{text}");
}
