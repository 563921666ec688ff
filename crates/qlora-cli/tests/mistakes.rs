//! The commands on bad input: the exit code says whose mistake it is, and the message what to do.

mod common;

use burn_qlora::Adapter;
use common::{Bench, reference};

fn train<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&["train", "qlora.toml"], more].concat()
}

#[test]
fn the_command_line() {
    let bench = Bench::new();
    bench.fails(&["trian"], 2, &["trian", "train"]);
    bench.fails(&["train"], 2, &["CONFIG"]);
    bench.fails(&train(&["--set", "rank"]), 2, &["SECTION.KEY=VALUE"]);
    bench.fails(&train(&["--set", "lora.rnak=4"]), 2, &["unknown key `lora.rnak`", "did you mean `rank`?"]);
    bench.fails(&train(&["--device", "gpu"]), 2, &["device = gpu", "cuda:1"]);
    bench.fails(&["train", "absent.toml"], 2, &["absent.toml", "qlora init"]);
    bench.fails(&["generate", "--model", "x", "--prompt", "y", "--top-p", "0"], 2, &["--top-p"]);
    let ask = ["generate", "--model", "x", "--prompt", "y"];
    for (flag, words) in [
        ("--temperature", &["--temperature must be from 0 to 2"][..]),
        ("--repetition-penalty", &["--repetition-penalty must be above 0"]),
        ("--seed", &["--seed", "must be a whole number, 0 or more"]),
        ("--top-k", &["--top-k", "must be a whole number, 0 or more"]),
        ("--max-new-tokens", &["--max-new-tokens", "must be a whole number"]),
    ] {
        bench.fails(&[&ask[..], &[flag, "-1"]].concat(), 2, words);
    }
    for (line, words) in [
        (&["serve", "--model", "x", "--port", "-1"][..], &["--port", "-1 is not in"][..]),
        (&["serve", "--model", "x", "--max-waiting", "-1"], &["--max-waiting", "must be a whole number"]),
        (&["serve", "--model", "x", "--cache-gib", "-1"], &["cache_gib = -1", "above 0"]),
        (&["eval", "--data", "rows.jsonl", "--limit", "-1"], &["--limit", "-1 is not in"]),
        (&["preview", "qlora.toml", "--rows", "-1"], &["--rows", "must be a whole number"]),
        (&["train", "qlora.toml", "--rank", "-1"], &["lora.rank"]),
    ] {
        bench.fails(line, 2, words);
    }
    bench.fails(&["generate", "--model", "x"], 2, &["--prompt <PROMPT>|--prompts <FILE>"]);
    bench.fails(&[&ask[..], &["--prompts", "z"]].concat(), 2, &["--prompts", "cannot be used with"]);
    bench.write("bad.jsonl", "{\"prompt\": \"x\"}\n{\"prompt\": \n");
    let model = reference("tiny-llama").display().to_string();
    let bad = bench.fails(
        &["generate", "--device", "cpu", "--model", &model, "--prompts", "bad.jsonl"],
        3,
        &["bad.jsonl, line 2: EOF", "at column 11"],
    );
    assert!(!bad.stderr.contains("line 1"), "{}", bad.stderr);
    bench.fails(&["inspect", "absent"], 2, &["absent: no such file or folder"]);
    bench.fails(&["inspect", "."], 2, &["neither a checkpoint"]);
}

#[test]
fn the_configuration() {
    let bench = Bench::new();
    let config = String::from_utf8(bench.read("qlora.toml")).expect("text");
    bench.write("typo.toml", &config.replace("max_steps", "max_step"));
    bench.fails(
        &["train", "typo.toml"],
        2,
        &["typo.toml:11: unknown key `train.max_step`", "did you mean `max_steps`?"],
    );
    bench.write("type.toml", &config.replace("max_steps = 4", "max_steps = \"four\""));
    bench.fails(&["train", "type.toml"], 2, &["type.toml:11: train.max_steps: invalid type"]);
    bench.fails(&train(&["--rank", "0"]), 2, &["lora.rank = 0: must be from 1 to 65536"]);
    bench.fails(&train(&["--set", "lora.dropout=1.0"]), 2, &["lora.dropout = 1: must be at least 0 and below 1"]);
    bench.fails(
        &train(&["--set", "quantization.blocksize=48"]),
        2,
        &["quantization.blocksize = 48: must be a power of two"],
    );
    let nothing = "lora.target_modules=[\"query\"]";
    bench.fails(&train(&["--set", nothing]), 2, &["lora.target_modules", "q_proj", "down_proj"]);
    bench.fails(&train(&["--set", "lora.target_modules=("]), 2, &["lora.target_modules", "regular expression"]);
    assert!(!bench.path("run").exists(), "nothing is written before the input is known to be good");
}

#[test]
fn a_path_beside_the_configuration() {
    let bench = Bench::new();
    std::fs::create_dir(bench.path("folder")).expect("a folder");
    let config = String::from_utf8(bench.read("qlora.toml")).expect("text");
    bench.write("folder/qlora.toml", &config.replace("rows.jsonl", "other.jsonl"));
    bench.write("folder/other.jsonl", "{\"text\": \"x\"}\n");
    bench.fails(
        &["train", "folder/qlora.toml"],
        2,
        &["data.train = \"other.jsonl\"", "current directory", "folder/other.jsonl"],
    );
}

#[test]
fn the_data() {
    let bench = Bench::new();
    bench.fails(&train(&["--data", "absent.jsonl"]), 3, &["absent.jsonl"]);
    bench.write("empty.jsonl", "");
    bench.fails(&train(&["--data", "empty.jsonl"]), 3, &["empty.jsonl", "no rows"]);
    bench.write("broken.jsonl", "{\"text\": \"a text\"}\n{\"text\": \n");
    bench.fails(&train(&["--data", "broken.jsonl"]), 3, &["broken.jsonl:2"]);
    bench.write("prompts.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"a question\"}]}\n");
    bench.fails(&train(&["--data", "prompts.jsonl"]), 3, &["prompts.jsonl"]);
}

#[test]
fn the_checkpoint() {
    let bench = Bench::new();
    let with_model = |name: &str, code: i32, words: &[&str]| bench.fails(&train(&["--model", name]), code, words);
    with_model("./absent", 3, &["absent"]);

    let dir = bench.copy("tiny-llama", "unknown");
    let config = std::fs::read_to_string(dir.join("config.json")).expect("text");
    bench.write("unknown/config.json", &config.replace("\"model_type\": \"llama\"", "\"model_type\": \"mamba\""));
    with_model("unknown", 3, &["config.json", "mamba", "supported"]);

    bench.copy("tiny-llama", "wide");
    bench.write("wide/config.json", &config.replace("\"intermediate_size\": 688", "\"intermediate_size\": 700"));
    with_model("wide", 3, &["gate_proj", "700", "688"]);

    let dir = bench.copy("tiny-llama", "short");
    let weights = std::fs::read(dir.join("model.safetensors")).expect("weights");
    std::fs::write(dir.join("model.safetensors"), &weights[..weights.len() / 2]).expect("a shorter file");
    with_model("short", 3, &["model.safetensors", "cut short"]);

    let dir = bench.copy("tiny-llama", "sharded");
    std::fs::rename(dir.join("model.safetensors"), dir.join("model-00001-of-00002.safetensors")).expect("renamed");
    let index = "{\"metadata\": {}, \"weight_map\": {\"model.norm.weight\": \"model-00002-of-00002.safetensors\"}}";
    bench.write("sharded/model.safetensors.index.json", index);
    with_model("sharded", 3, &["model-00002-of-00002.safetensors", "missing"]);

    let dir = bench.copy("tiny-llama", "no-template");
    std::fs::remove_file(dir.join("chat_template.jinja")).expect("removed");
    with_model("no-template", 3, &["no chat template", "chat_template"]);
    let ask = ["generate", "--device", "cpu", "--model", "no-template", "--prompt", "Hello"];
    bench.fails(&ask, 3, &["no chat template", "--no-chat-template"]);
    bench.ok(&[&ask[..], &["--no-chat-template", "--max-new-tokens", "2"]].concat());
}

#[test]
fn the_adapter() {
    let bench = Bench::new();
    let model = reference("tiny-llama").display().to_string();
    let ask = |adapter: &str, words: &[&str]| {
        bench.fails(
            &["generate", "--device", "cpu", "--model", &model, "--prompt", "Hello", "--adapter", adapter],
            3,
            words,
        )
    };
    ask("absent", &["absent"]);
    bench.copy("adapters/plain", "runs/one/adapter");
    bench.copy("adapters/plain", "runs/two/adapter");
    ask("runs/thre", &["runs/thre: there is no such folder; runs has one, two"]);
    let inner = std::path::Path::new("runs/one/adapter").display().to_string();
    let other = bench.copy("archs/qwen2", "other").display().to_string();
    std::fs::copy(reference("tiny-llama/tokenizer.json"), bench.path("other/tokenizer.json")).expect("a copy");
    let generate = ["generate", "--device", "cpu", "--prompt", "Hello", "--no-chat-template", "--adapter", &inner];
    bench.fails(&[&generate[..], &["--model", &other]].concat(), 3, &["the adapter in", &inner, "can't be put on"]);
    // The base by a path from where it was trained.
    let config = std::fs::read_to_string(bench.path("runs/one/adapter/adapter_config.json")).expect("text");
    bench.write("runs/one/adapter/adapter_config.json", &config.replace("\"tiny-llama\"", "\"models/tiny/llama\""));
    let named = ["the adapter names models/tiny/llama as its base", "--model says where it is"];
    bench.fails(&generate, 3, &named);
    for command in [&["serve"][..], &["chat"], &["eval", "--data", "rows.jsonl"]] {
        bench.fails(&[command, &["--device", "cpu", "--adapter", &inner]].concat(), 3, &named);
        // A run's folder stands for its adapter.
        let run = [command, &["--device", "cpu", "--adapter", "runs/one"]].concat();
        bench.fails(&run, 3, &named);
    }
    bench.fails(&["merge", "--adapter", "runs/one", "--output", "merged"], 3, &["models/tiny/llama"]);
    let dir = bench.copy("adapters/plain", "dora");
    let config = std::fs::read_to_string(dir.join("adapter_config.json")).expect("text");
    bench.write("dora/adapter_config.json", &config.replace("\"use_dora\": false", "\"use_dora\": true"));
    ask("dora", &["use_dora"]);
}

#[test]
fn an_adapter_that_lost_a_module_says_so() {
    let bench = Bench::new();
    let dir = bench.copy("adapters/plain", "part");
    let mut adapter = Adapter::load(&dir).expect("an adapter");
    let lost = adapter.modules()[0].clone();
    adapter.tensors.retain(|key, _| !key.contains(&lost));
    adapter.save(&dir).expect("saved");
    let model = reference("tiny-llama").display().to_string();
    let generate = ["generate", "--device", "cpu", "--model", &model, "--max-new-tokens", "1", "--prompt", "Hello"];
    let said = |adapter: &str| bench.ok(&[&generate[..], &["--adapter", adapter]].concat()).stderr;
    let warning = said("part");
    assert!(warning.contains("has no weights for modules") && warning.contains(&lost), "{warning}");
    assert!(!said(&reference("adapters/plain").display().to_string()).contains("no weights"));
}

#[test]
fn the_training_checkpoint() {
    let bench = Bench::new();
    bench.fails(&train(&["--resume", "absent"]), 3, &["absent", "training_state.json"]);
    bench.ok(&train(&["--max-steps", "2"]));
    // Other settings would make it another run.
    bench.fails(&train(&["--resume", "--rank", "8"]), 3, &["lora.rank was 4, now is 8"]);
    let state = bench.path("run/checkpoint-000002/training_state.json");
    std::fs::write(&state, "{").expect("broken");
    bench.fails(&train(&["--resume", "run/checkpoint-000002"]), 3, &["training_state.json"]);
}

/// Nobody can make a folder in /proc, whatever the user's rights.
#[cfg(target_os = "linux")]
#[test]
fn an_unwritable_output_folder() {
    Bench::new().fails(&train(&["--output-dir", "/proc/run"]), 1, &["cannot write /proc/run"]);
}

/// A disk that fills up while a checkpoint is saved: the message names the file, and the checkpoint
/// before is still good. The shell's limit on file sizes stands for the disk.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk() {
    let bench = Bench::new();
    bench.ok(&train(&["--max-steps", "2"]));
    // 500 KiB: the adapter (rank 4, 110,976 parameters, 434 KiB) fits, the optimizer's state doesn't.
    let limited =
        format!("trap '' XFSZ; ulimit -f 1000; exec {} train qlora.toml --resume", env!("CARGO_BIN_EXE_qlora"));
    let output = bench.shell(&limited);
    assert_eq!(output.code, Some(1), "{}", output.stderr);
    assert!(output.stderr.contains("checkpoint-000004") && output.stderr.contains("cannot write"), "{}", output.stderr);
    let names: Vec<_> =
        std::fs::read_dir(bench.path("run")).expect("the run").flatten().map(|entry| entry.file_name()).collect();
    assert!(names.iter().all(|name| !name.to_string_lossy().contains("000004")), "{names:?}");
    assert!(bench.ok(&["inspect", "run/checkpoint-000002"]).stdout.contains("steps done"));
    bench.ok(&train(&["--resume"]));
    assert!(bench.path("run/adapter/adapter_model.safetensors").is_file());
}

/// Before any rank is started.
#[test]
fn more_ranks_than_cards() {
    let bench = Bench::new();
    bench.fails(&train(&["--gpus", "0"]), 2, &["'0'", "--gpus <N>", "1..=1024"]);
    bench.fails(
        &train(&["--gpus", "2", "--device", "cuda:1"]),
        2,
        &["one card for 2 ranks of this host", "write \"cuda\""],
    );
    let mut command = bench.command(&train(&["--gpus", "2", "--device", "cuda"]));
    command.env("CUDA_VISIBLE_DEVICES", "");
    let run = common::Run::new(command.output().expect("the program starts"));
    assert_eq!(run.code, Some(2), "{}", run.stderr);
    let told = "--gpus 2: no CUDA card answers (CUDA_VISIBLE_DEVICES=\"\"): `qlora doctor` says why";
    assert!(run.stderr.contains(told) && run.stderr.lines().count() == 1, "{}", run.stderr);
    assert!(!bench.path("run").exists());
}
