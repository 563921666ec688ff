//! `qlora doctor`: what it finds on a host, by the variables and folders that a test gives it.

mod common;

use std::net::TcpListener;

use common::{Bench, Run};
use serde_json::Value;

/// What launchers set, which a test may have been started under.
const LAUNCHERS: [&str; 8] = [
    "RANK",
    "WORLD_SIZE",
    "PET_NNODES",
    "OMPI_COMM_WORLD_SIZE",
    "SLURM_STEP_ID",
    "SLURM_JOB_ID",
    "PMI_SIZE",
    "QLORA_DIST_TIMEOUT",
];

fn doctor(bench: &Bench, args: &[&str], variables: &[(&str, &str)]) -> Run {
    let mut command = bench.command(&[&["doctor"], args].concat());
    for name in LAUNCHERS {
        command.env_remove(name);
    }
    // What cards there are is the host's; that none is shown is the same everywhere.
    command.env("CUDA_VISIBLE_DEVICES", "").env("HF_HOME", bench.path("hub"));
    command.env("BURN_QLORA_KERNEL_CACHE", bench.path("kernels")).envs(variables.iter().copied());
    Run::new(command.output().expect("the program starts"))
}

#[test]
fn a_host_without_cards_is_fine() {
    let bench = Bench::new();
    let run = doctor(&bench, &[], &[]);
    assert_eq!(run.code, Some(0), "{}{}", run.stdout, run.stderr);
    let hub = bench.path("hub").join("hub").display().to_string();
    let kernels = bench.path("kernels").display().to_string();
    for words in [
        "trains on the CPU",
        "no card, so none of them is needed",
        "of memory, ",
        &format!("the hub's cache is {hub}, which the first download makes"),
        "the hub is not asked (HF_HUB_OFFLINE)",
        &kernels,
        "none: this process would train alone",
        "Nothing here would stop a run.",
    ] {
        assert!(run.stdout.contains(words), "`{words}` is not in: {}", run.stdout);
    }
    assert!(!bench.path("hub").exists(), "looking makes no folder");
    assert_eq!(run.stderr, "", "drivers that are asked talk to nobody");
    assert!(!run.stdout.contains("drivers fail"), "{}", run.stdout);
}

#[test]
fn programs_read_the_same() {
    let bench = Bench::new();
    let run = doctor(&bench, &["--json"], &[("HF_TOKEN", "hf_secret"), ("HF_HUB_OFFLINE", "0")]);
    let json: Value = serde_json::from_str(&run.stdout).expect("JSON");
    assert_eq!((json["problems"].as_u64(), json["place"]["world_size"].as_u64()), (Some(0), Some(1)));
    let findings = json["findings"].as_array().expect("a list");
    assert!(findings.iter().all(|finding| ["ok", "note"].contains(&finding["state"].as_str().unwrap_or_default())));
    let values: Vec<&Value> = findings.iter().map(|finding| &finding["values"]).collect();
    assert!(values.iter().any(|values| values["total_bytes"].as_u64().is_some_and(|bytes| bytes > 1 << 28)));
    assert!(values.iter().any(|values| values["token"] == true), "{findings:?}");
    assert!(!run.stdout.contains("hf_secret"), "a token is nobody's business");
}

#[test]
fn what_would_stop_a_run_is_a_problem() {
    let bench = Bench::new();
    let fails = |variables: &[(&str, &str)], words: &[&str]| {
        let run = doctor(&bench, &[], variables);
        assert_eq!(run.code, Some(1), "{variables:?}: {}", run.stdout);
        for word in words {
            assert!(run.stdout.contains(word), "{variables:?}: `{word}` is not in: {}", run.stdout);
        }
    };
    fails(
        &[("RANK", "1")],
        &["problem  WORLD_SIZE is not set, and RANK is", "variables that count: ", "RANK=1", "1 problem would"],
    );
    fails(&[("QLORA_DIST_TIMEOUT", "soon")], &["problem  QLORA_DIST_TIMEOUT = \"soon\""]);
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = listener.local_addr().expect("its number").port().to_string();
    let rank = |rank, address| {
        let place = [("RANK", rank), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")];
        [&place[..], &[("MASTER_ADDR", address), ("MASTER_PORT", &port)]].concat()
    };
    fails(
        &rank("0", "127.0.0.1"),
        &[
            "rank 0 of 2, 0 of 1 on this host, by torchrun",
            &format!("port {port}, where rank 0 would listen, is in use"),
        ],
    );
    fails(&rank("1", "nobody.invalid"), &["nobody.invalid, rank 0's host, can't be resolved"]);
    drop(listener);
    let run = doctor(&bench, &[], &rank("1", "127.0.0.1"));
    assert_eq!(run.code, Some(0), "{}", run.stdout);
    assert!(run.stdout.contains(&format!("127.0.0.1:{port} answers, and the port is free")), "{}", run.stdout);
}

#[cfg(unix)]
#[test]
fn a_cache_that_can_not_be_written_is_a_problem() {
    let bench = Bench::new();
    // A file in the way keeps root out, too.
    let file = bench.path("rows.jsonl").display().to_string();
    let variables = [("HF_HOME", file.as_str()), ("HF_HUB_OFFLINE", "0"), ("BURN_QLORA_KERNEL_CACHE", &file)];
    let run = doctor(&bench, &[], &variables);
    let text = &run.stdout;
    assert!(text.contains(&format!("compiled kernels are not kept: {file}: ")), "{text}");
    assert!(run.code == Some(1) && text.contains(&format!("problem  the hub's cache is {file}/hub")), "{text}");
}

#[test]
fn one_process_of_a_host_looks_at_it() {
    let bench = Bench::new();
    let place = [("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")];
    let run = doctor(&bench, &[], &[&place[..], &[("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")]].concat());
    assert_eq!(run.code, Some(0), "{}", run.stdout);
    assert!(run.stdout.starts_with("Launcher\n  ok       rank 3 of 4, 1 of 2 on this host"), "{}", run.stdout);
}
