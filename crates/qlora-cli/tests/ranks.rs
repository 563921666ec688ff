//! Ranks that are processes: `--gpus`, a launcher's variables, and how a run ends when one of them does.

#![cfg(unix)]

mod common;

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, Command, Output, Stdio};

use common::{Bench, Run};

fn free_port() -> String {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    listener.local_addr().expect("its number").port().to_string()
}

fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    assert!(status.expect("kill starts").success());
}

/// The command of a rank as torchrun starts it.
fn rank(bench: &Bench, place: [&str; 3], more: &[&str]) -> Command {
    let [rank, world_size, port] = place;
    let mut command = bench.command(&[&["train", "qlora.toml"], more].concat());
    command.env("RANK", rank).env("WORLD_SIZE", world_size).env("LOCAL_RANK", rank).env("LOCAL_WORLD_SIZE", world_size);
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null());
    command
}

fn end(child: Child) -> Run {
    Run::new(child.wait_with_output().expect("the program ends"))
}

/// Step, loss and norm of each line of the log, as text.
fn losses(bench: &Bench, dir: &str) -> Vec<String> {
    let log = String::from_utf8(bench.read(&format!("{dir}/metrics.jsonl"))).expect("text");
    let line = |line: &str| {
        let entry: serde_json::Value = serde_json::from_str(line).expect("JSON");
        ["step", "loss", "grad_norm", "tokens", "eval_loss", "eval_accuracy"]
            .map(|key| entry[key].to_string())
            .join(" ")
    };
    log.lines().map(line).collect()
}

#[test]
fn ranks_give_the_bytes_of_one_process() {
    let bench = Bench::new();
    let common = ["train", "qlora.toml", "--set", "lora.dropout=0.1", "--set", "data.eval_fraction=0.2"];
    let train = |dir: &str, accumulation: &str, more: &[&str]| {
        let these = ["--gradient-accumulation-steps", accumulation, "--output-dir", dir];
        bench.ok(&[&common[..], &these, more].concat())
    };
    // Nine rows left to learn from, two a micro-batch: the second step has what the epoch has left.
    let one = train("one", "4", &[]);
    assert!(!one.stderr.contains("ranks"), "{}", one.stderr);
    let two = train("two", "2", &["--gpus", "2"]);
    assert!(
        two.stderr.contains("2 ranks on 1 host, by --gpus") && two.stderr.contains("8 rows each on 2 ranks"),
        "{}",
        two.stderr
    );
    assert_eq!(two.stderr.matches("step 4/4").count(), one.stderr.matches("step 4/4").count(), "one rank talks");
    train("four", "1", &["--gpus=4"]);
    for dir in ["two", "four"] {
        assert_eq!(losses(&bench, "one"), losses(&bench, dir), "{dir}");
        for file in ["adapter/adapter_model.safetensors", "checkpoint-000004/optimizer.safetensors"] {
            assert_eq!(bench.read(&format!("one/{file}")), bench.read(&format!("{dir}/{file}")), "{dir}/{file}");
        }
    }
    // Weights that wait on the host, which four ranks read from one copy.
    let waiting = ["--gpus", "4", "--set", "model.residency=host", "--set", "quantization.quant_type=nf4"];
    let alone = train("alone", "4", &waiting[2..]);
    assert!(alone.stderr.contains("in the host's memory (model.residency)\n"), "{}", alone.stderr);
    let shared = train("shared", "1", &waiting);
    let copies = if cfg!(target_os = "linux") { ", in one copy for 4 ranks" } else { ", in a copy for each rank" };
    assert!(shared.stderr.contains(copies), "{}", shared.stderr);
    let factors = |dir: &str| bench.read(&format!("{dir}/adapter/adapter_model.safetensors"));
    assert_eq!(factors("alone"), factors("shared"));
    let plan = bench.ok(&["train", "qlora.toml", "--gpus", "2", "--dry-run"]).stdout;
    assert!(plan.contains("4 rows each (2 x 1 x 2 ranks)"), "{plan}");
}

#[test]
fn ranks_of_a_launcher_meet() {
    let bench = Bench::new();
    let port = free_port();
    let common = ["--set", "train.max_steps=1"];
    let first = rank(&bench, ["0", "2", &port], &common).spawn().expect("rank 0 starts");
    let second = end(rank(&bench, ["1", "2", &port], &common).spawn().expect("rank 1 starts"));
    let first = end(first);
    assert_eq!((first.code, second.code), (Some(0), Some(0)), "{}\n{}", first.stderr, second.stderr);
    assert!(first.stderr.contains("2 ranks on 1 host, by torchrun"), "{}", first.stderr);
    assert_eq!((second.stdout.as_str(), second.stderr.as_str()), ("", ""));
    // A process that says of itself that it is one of several is not asked to start them.
    let output = rank(&bench, ["1", "2", &port], &["--gpus", "2"]).output();
    let run = Run::new(output.expect("the program starts"));
    assert!(run.code == Some(2) && run.stderr.contains("rank 1 of 2 already, by torchrun"), "{}", run.stderr);
    let output: Output = bench.command(&["train", "qlora.toml"]).env("RANK", "0").output().expect("the program starts");
    let run = Run::new(output);
    assert!(run.code == Some(2) && run.stderr.contains("WORLD_SIZE is not set, and RANK is"), "{}", run.stderr);
}

#[test]
fn ranks_that_do_not_fit_are_told() {
    let bench = Bench::new();
    let port = free_port();
    let seconds = |command: &mut Command, seconds: &str| {
        command.env("QLORA_DIST_TIMEOUT", seconds).spawn().expect("the program starts")
    };
    // Other rows.
    let rows = String::from_utf8(bench.read("rows.jsonl")).expect("text");
    bench.write("other.jsonl", &rows.replacen("1", "7", 3));
    let first = rank(&bench, ["0", "2", &port], &[]).spawn().expect("rank 0 starts");
    let second = rank(&bench, ["1", "2", &port], &["--data", "other.jsonl"]).spawn().expect("rank 1 starts");
    for run in [end(first), end(second)] {
        assert_eq!(run.code, Some(3), "{}", run.stderr);
        assert!(run.stderr.contains("the training rows") && run.stderr.contains("on rank 1 ("), "{}", run.stderr);
    }
    // Another configuration.
    let first = rank(&bench, ["0", "2", &port], &["--rank", "8"]).spawn().expect("rank 0 starts");
    let second = rank(&bench, ["1", "2", &port], &["--learning-rate", "2e-3"]).spawn().expect("rank 1 starts");
    for run in [end(first), end(second)] {
        assert_eq!(run.code, Some(3), "{}", run.stderr);
        for words in ["lora.rank is 8 on rank 0 (", "train.learning_rate", "on rank 1 ("] {
            assert!(run.stderr.contains(words), "{words}: {}", run.stderr);
        }
    }
    assert!(!bench.path("run").exists());
    // Two runs on one port.
    let waiting = seconds(&mut rank(&bench, ["0", "2", &port], &[]), "6");
    let other = end(seconds(rank(&bench, ["1", "2", &port], &[]).env("TORCHELASTIC_RUN_ID", "other"), "6"));
    assert_eq!(other.code, Some(1), "{}", other.stderr);
    assert!(other.stderr.contains("it belongs to run \"other\": two runs share a port"), "{}", other.stderr);
    let taken = end(seconds(&mut rank(&bench, ["0", "2", &port], &[]), "6"));
    assert!(taken.code == Some(1) && taken.stderr.contains("MASTER_PORT to one that is free"), "{}", taken.stderr);
    let absent = end(waiting);
    assert!(absent.code == Some(1) && absent.stderr.contains("rank 1 did not come within 6 s"), "{}", absent.stderr);
    assert!(absent.stderr.contains("rank 1 on ") && absent.stderr.contains("was refused"), "{}", absent.stderr);
    // A wrong port.
    let lost = end(seconds(&mut rank(&bench, ["1", "2", &free_port()], &[]), "1"));
    assert!(lost.code == Some(1) && lost.stderr.contains("rank 1 found nobody at 127.0.0.1:"), "{}", lost.stderr);
    let wrong = end(seconds(&mut rank(&bench, ["1", "2", &port], &[]), "soon"));
    assert!(wrong.code == Some(2) && wrong.stderr.contains("QLORA_DIST_TIMEOUT = \"soon\""), "{}", wrong.stderr);
}

/// What a launcher does that starts all ranks again when one has ended.
#[test]
fn ranks_that_are_started_again_go_on() {
    let bench = Bench::new();
    let start = |number: &str, port: &str, resume: &str| {
        let flags = ["--resume", resume, "--max-steps", "40", "--set", "train.save_every=3"];
        rank(&bench, [number, "2", port], &flags).spawn().expect("a rank starts")
    };
    // There is nothing to go on from: `auto` says so on both, `auto-or-start` begins.
    let port = free_port();
    let second = start("1", &port, "auto");
    for run in [end(start("0", &port, "auto")), end(second)] {
        assert!(run.stderr.contains("auto-or-start"), "{:?} {}", run.code, run.stderr);
    }
    let (mut first, mut second) = (start("0", &port, "auto-or-start"), start("1", &port, "auto-or-start"));
    let mut stderr = BufReader::new(first.stderr.take().expect("piped"));
    let (mut told, mut line) = (String::new(), String::new());
    while !line.starts_with("saved ") {
        line.clear();
        assert!(stderr.read_line(&mut line).expect("text") > 0, "a checkpoint is reported: {told}");
        told += &line;
    }
    second.kill().expect("rank 1 runs");
    stderr.read_to_string(&mut told).expect("text");
    assert_eq!((end(first).code, end(second).code), (Some(4), None), "{told}");
    assert!(told.contains("error: rank 1 on "), "{told}");
    // Under the same port, at once: nothing of the run before holds it.
    let (first, second) = (start("0", &port, "auto"), start("1", &port, "auto"));
    let (first, second) = (end(first), end(second));
    assert_eq!((first.code, second.code), (Some(0), Some(0)), "{}{}", first.stderr, second.stderr);
    assert!(!first.stderr.contains("step 1/40 ") && first.stderr.contains("step 40/40 "), "{}", first.stderr);
    bench.ok(&[
        "train",
        "qlora.toml",
        "--output-dir",
        "one",
        "--gradient-accumulation-steps",
        "2",
        "--max-steps",
        "40",
    ]);
    let adapter = |dir: &str| bench.read(&format!("{dir}/adapter/adapter_model.safetensors"));
    assert_eq!(adapter("one"), adapter("run"));
}

/// Starts a long run of two ranks and has `act` do something to rank 1, or to the program that started both, after the second step.
#[cfg(target_os = "linux")]
fn disturbed(bench: &Bench, dir: &str, timeout: Option<&str>, act: impl Fn(u32, u32)) -> Run {
    let mut command = bench.command(&["train", "qlora.toml", "--gpus", "2", "--max-steps", "400", "--output-dir", dir]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    timeout.map(|seconds| command.env("QLORA_DIST_TIMEOUT", seconds));
    let mut child = command.spawn().expect("the program starts");
    let mut stderr = BufReader::new(child.stderr.take().expect("piped"));
    let (mut told, mut line) = (String::new(), String::new());
    while !line.starts_with("step 2/400") {
        line.clear();
        assert!(stderr.read_line(&mut line).expect("text") > 0, "the second step is reported: {told}");
        told += &line;
    }
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).expect("its children");
    let is_second = |pid: &str| {
        let env = std::fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        env.split(|byte| *byte == 0).any(|pair| pair == b"RANK=1")
    };
    // The threads of a process that start others have lists of their own; the main thread starts ranks.
    let second = children.split_whitespace().find(|pid| is_second(pid)).expect("rank 1").parse().expect("a number");
    act(child.id(), second);
    stderr.read_to_string(&mut told).expect("text");
    let mut run = Run::new(child.wait_with_output().expect("the program ends"));
    run.stderr = told;
    run
}

#[cfg(target_os = "linux")]
#[test]
fn a_rank_that_is_killed_or_stopped_ends_the_run() {
    let bench = Bench::new();
    let killed = disturbed(&bench, "killed", None, |_, second| signal(second, "KILL"));
    assert_eq!(killed.code, Some(1), "{}", killed.stderr);
    for words in ["error: rank 1 was killed by signal 9", "error: rank 1 on ", "its connection"] {
        assert!(killed.stderr.contains(words), "{words}: {}", killed.stderr);
    }
    let stopped = disturbed(&bench, "stopped", Some("4"), |_, second| signal(second, "STOP"));
    assert_eq!(stopped.code, Some(1), "{}", stopped.stderr);
    for words in ["error: rank 1 on ", "nothing came from it for 4 s", "rank 1 does not end by itself, and is killed"] {
        assert!(stopped.stderr.contains(words), "{words}: {}", stopped.stderr);
    }
    // What was done is kept, and the run goes on from there, in one process as in two.
    for dir in ["killed", "stopped"] {
        let log = String::from_utf8(bench.read(&format!("{dir}/metrics.jsonl"))).expect("text");
        let steps = log.lines().count();
        assert!(bench.path(&format!("{dir}/checkpoint-{steps:06}")).is_dir(), "{steps}: {}", killed.stderr);
        let more = ["--max-steps", &(steps + 1).to_string(), "--gradient-accumulation-steps", "2", "--output-dir", dir];
        bench.ok(&[&["train", "qlora.toml", "--resume"], &more[..]].concat());
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_signal_reaches_all_ranks_and_none_outlives_the_program() {
    let bench = Bench::new();
    let stopped = disturbed(&bench, "stopped", None, |program, _| signal(program, "INT"));
    assert_eq!(stopped.code, Some(130), "{}", stopped.stderr);
    assert!(stopped.stdout.contains("--output-dir stopped --gpus 2 --resume"), "{}", stopped.stdout);
    assert_eq!(stopped.stderr.matches("Stopping after this step").count(), 1, "{}", stopped.stderr);
    let rank = std::cell::Cell::new(0);
    let orphaned = disturbed(&bench, "orphaned", None, |program, second| {
        rank.set(second);
        signal(program, "KILL");
    });
    assert_eq!(orphaned.code, None);
    assert!(orphaned.stderr.contains("error: the process that started this rank is gone"), "{}", orphaned.stderr);
    // Reading its output to the end has waited for rank 0; rank 1 ends as it does.
    let is_there = || std::path::Path::new(&format!("/proc/{}/cmdline", rank.get())).exists();
    for _ in 0..100 {
        if !is_there() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    panic!("rank 1 is still there");
}
