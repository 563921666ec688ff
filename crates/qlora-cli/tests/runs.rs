//! What surrounds a run: its output, signals, the folder, a look at the rows before and at the run meanwhile.

mod common;

use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Bench, reference};
use serde_json::{Value, json};

/// Runs of the program that somebody stops listening to, on systems where that can be shown.
#[cfg(unix)]
mod unix {
    use super::common::Bench;
    use std::io::{BufRead, BufReader};
    use std::process::{Child, Command, Stdio};

    #[test]
    fn output_that_goes_nowhere_ends_no_run() {
        let bench = Bench::new();
        // A reader that has seen enough of either, and a full disk under both.
        for (name, redirect) in [("a", "2>&1 | head -n 1"), ("b", ">/dev/full 2>/dev/full"), ("c", ">&- 2>&-")] {
            let program = env!("CARGO_BIN_EXE_qlora");
            let run = bench.shell(&format!("{program} train qlora.toml --output-dir {name} {redirect}"));
            assert!(bench.path(name).join("adapter/adapter_model.safetensors").is_file(), "{name}: {}", run.stderr);
        }
        let program = env!("CARGO_BIN_EXE_qlora");
        let run = bench.shell(&format!("{program} init - >/dev/full"));
        assert_eq!(run.code, Some(1), "a result that is lost is an error: {}", run.stderr);
    }

    fn signal(child: &Child, name: &str) {
        drop(Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status());
    }

    #[test]
    fn a_closed_terminal_stops_a_run_and_not_one_under_nohup() {
        let bench = Bench::new();
        for (name, ignored, code) in [("stopped", "", 130), ("went-on", "trap '' HUP; ", 0)] {
            let program = env!("CARGO_BIN_EXE_qlora");
            let script = format!("{ignored}exec {program} train qlora.toml --max-steps 40 --output-dir {name}");
            let mut shell = Command::new("sh");
            shell.current_dir(bench.path("")).args(["-c", &script]).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = shell.spawn().expect("the shell starts");
            let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines().map_while(Result::ok);
            assert!(lines.any(|line| line.starts_with("step 2/40")), "{name}: the second step is reported");
            signal(&child, "HUP");
            lines.for_each(drop);
            let output = child.wait_with_output().expect("the program ends");
            assert_eq!(output.status.code(), Some(code), "{name}");
            let told = String::from_utf8_lossy(&output.stdout).into_owned();
            let again = format!("Go on    qlora train qlora.toml --max-steps 40 --output-dir {name} --resume");
            assert_eq!(told.contains(&again), code == 130, "{told}");
        }
    }

    #[test]
    fn a_stop_while_rows_are_read_leaves_nothing() {
        let bench = Bench::new();
        let rows = String::from_utf8(bench.read("rows.jsonl")).expect("text").repeat(20_000);
        bench.write("rows.jsonl", &rows);
        let mut command = bench.command(&["train", "qlora.toml"]);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the program starts");
        std::thread::sleep(std::time::Duration::from_millis(700));
        assert!(bench.path("run/run.lock").is_file(), "the folder is taken before rows are read");
        let meanwhile = bench.ok(&["inspect", "run"]).stdout;
        assert!(meanwhile.contains("under way: process "), "{meanwhile}");
        signal(&child, "TERM");
        let output = child.wait_with_output().expect("the program ends");
        assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(!bench.path("run").exists());
    }
}

#[test]
fn preview_shows_what_is_learned() {
    let bench = Bench::new();
    let out = bench.ok(&["preview", "qlora.toml", "--rows", "2", "--html", "rows.html"]).stdout;
    for word in ["12 rows", "line 1: ", "line 2: ", "<|im_start|>assistant", "^^^^"] {
        assert!(out.contains(word), "{word}: {out}");
    }
    assert!(!out.contains("line 3: ") && !out.contains('\u{1b}'), "{out}");
    assert!(String::from_utf8(bench.read("rows.html")).expect("text").starts_with("<!DOCTYPE html>"));
    bench.fails(&["preview", "qlora.toml", "--html", "rows.html"], 2, &["rows.html exists"]);
    let ids = bench.ok(&["preview", "qlora.toml", "--rows", "1", "--ids"]).stdout;
    assert!(ids.lines().count() > 40, "a line for each token: {ids}");
    bench.fails(&["preview", "qlora.toml", "--eval-rows"], 2, &["data.eval"]);
    assert!(!bench.path("run").exists());
}

#[test]
fn an_adapter_is_prompted_as_its_rows_were_written() {
    let bench = Bench::new();
    bench.write("plain.jsonl", "{\"prompt\": \"Color of sky?\", \"completion\": \" blue\"}\n");
    let short = ["--max-steps", "1", "--set", "train.batch_size=1"];
    let train = |more: &[&str]| bench.ok(&[&["train", "qlora.toml"], &short[..], more].concat());
    train(&["--data", "plain.jsonl", "--output-dir", "plain"]);
    let template = "{% for m in messages %}[{{ m.role }}:{{ mood }}] {{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}[assistant:{{ mood }}] {% endif %}";
    bench.write("own.jinja", template);
    let own = ["--set", "data.chat_template=own.jinja", "--set", "data.template_kwargs={mood = \"calm\"}"];
    train(&[&own[..], &["--output-dir", "chat"]].concat());
    let settings = String::from_utf8(bench.read("chat/adapter/prompt_settings.json")).expect("text");
    for part in ["\"mood\": \"calm\"", "\"layout\": \"chat\"", "\"cut_at_answers\": true"] {
        assert!(settings.contains(part), "{part} in {settings}");
    }
    assert_eq!(bench.read("chat/adapter/chat_template.jinja"), template.as_bytes());

    let model = reference("tiny-llama").display().to_string();
    let ask = |more: &[&str]| {
        let common = ["generate", "--device", "cpu", "--model", &model, "--max-new-tokens", "6"];
        bench.ok(&[&common[..], more].concat()).stdout
    };
    let plain = ["--adapter", "plain/adapter"];
    let as_it_is = ask(&[&plain[..], &["--prompt", "Color of sky?", "--no-chat-template"]].concat());
    assert_eq!(ask(&[&plain[..], &["--prompt", "Color of sky?"]].concat()), as_it_is);
    // The same text, written by hand.
    let chat = ["--adapter", "chat/adapter"];
    let by_hand = "[user:calm] Hi<|im_end|>\n[assistant:calm] ";
    let expected = ask(&[&chat[..], &["--prompt", by_hand, "--no-chat-template"]].concat());
    assert_eq!(ask(&[&chat[..], &["--prompt", "Hi"]].concat()), expected);
    // A merged model is prompted in the same way.
    bench.ok(&["merge", "--model", &model, "--adapter", "chat/adapter", "--output", "merged"]);
    assert_eq!(bench.read("merged/chat_template.jinja"), template.as_bytes());
    let merged = |more: &[&str]| {
        let common = ["generate", "--device", "cpu", "--model", "merged", "--max-new-tokens", "6"];
        bench.ok(&[&common[..], more].concat()).stdout
    };
    assert_eq!(merged(&["--prompt", "Hi"]), merged(&["--prompt", by_hand, "--no-chat-template"]));
    let wrong =
        ["generate", "--model", &model, "--adapter", "plain/adapter", "--prompt", "x", "--template-kwarg", "a=1"];
    bench.fails(&wrong, 2, &["--template-kwarg has no place"]);
}

#[test]
fn flags_that_contradict_each_other_are_refused() {
    let bench = Bench::new();
    bench.fails(&["train", "qlora.toml", "--resume", "--overwrite"], 2, &["--overwrite starts over"]);
    bench.fails(&["train", "qlora.toml", "--resume"], 3, &["no checkpoint to resume", "auto-or-start"]);
    assert!(!bench.path("run").exists());
}

#[test]
fn warnings_of_libraries_are_told_once() {
    let bench = Bench::new();
    bench.copy("tiny-llama", "model");
    // The library tokenizers warns of a token that its vocabulary has by another number, by way of the crate `log`.
    let text = String::from_utf8(bench.read("model/tokenizer.json")).expect("text");
    let mut json: Value = serde_json::from_str(&text).expect("JSON");
    json["added_tokens"][3]["id"] = 5.into();
    bench.write("model/tokenizer.json", &json.to_string());
    let warning = "Token '<|pad|>' was expected to have ID '5' but was given ID '3' [tokenizers]";
    let train = ["train", "qlora.toml", "--model", "model", "--max-steps", "1", "--overwrite"];
    let told = bench.ok(&train).stderr;
    assert_eq!(told.matches(warning).count(), 1, "{told}");
    // What is looked for and is not there, such as a card, is no fault.
    let said = |text: &str| text.lines().filter(|line| line.contains('[')).count();
    assert!(told.contains("warning: Token") && said(&told) == 1, "{told}");
    let quiet = bench.ok(&[&train[..], &["--quiet", "--device", "auto"]].concat()).stderr;
    assert!(quiet.lines().all(|line| line.starts_with("warning: ")) && said(&quiet) == 1, "{quiet}");
    let run = bench.ok(&[&train[..], &["--json"]].concat());
    assert_eq!(run.stderr, "");
    let told =
        run.stdout.lines().filter(|line| line.starts_with("{\"event\":\"warning\"") && line.contains("[tokenizers]"));
    assert_eq!(told.count(), 1, "{}", run.stdout);
    // A log instead, for who asks for one.
    let log = bench.command(&["preview", "qlora.toml", "--model", "model"]).env("RUST_LOG", "warn").output();
    let log = String::from_utf8(log.expect("the program starts").stderr).expect("text");
    assert!(log.contains(" WARN tokenizers::") && !log.contains("[tokenizers]"), "{log}");
    let broken = bench.command(&["init", "-"]).env("RUST_LOG", "qlora=loud").output().expect("the program starts");
    let told = String::from_utf8(broken.stderr).expect("text");
    assert!(told.starts_with("warning: RUST_LOG = \"qlora=loud\": "), "{told}");
}

/// What `qlora convert` refuses of the recorded models, with a word of the reason: types that it does not write, and of others what llama.cpp
/// would compute differently.
const NOT_WRITTEN: &[(&str, &[&str])] = &[
    (
        "kv_b_proj",
        &[
            "deepseek_v2",
            "deepseek_v2_ranks",
            "deepseek_v3",
            "deepseek_v3_whole",
            "glm4_moe_lite",
            "glm4_moe_lite_layers",
        ],
    ),
    ("heads of different widths", &["gemma4", "gemma4_moe", "gemma4_small"]),
    ("stacked with inputs first", &["gpt_oss", "gpt_oss_tied"]),
    ("linear attention", &["qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen3_next_stacked"]),
    ("short convolutions", &["lfm2", "lfm2_wide"]),
    ("growth of its queries", &["ministral3"]),
    // Language models of models that read images.
    ("`gemma3` cannot be written", &["gemma3_images"]),
    ("`gemma4` cannot be written", &["gemma4_images", "gemma4_moe_images"]),
    ("`gemma4_unified` cannot be written", &["gemma4_unified"]),
    ("`mistral3` cannot be written", &["mistral3_images"]),
    ("`qwen2_5_vl` cannot be written", &["qwen2_5_vl"]),
    ("`qwen3_5` cannot be written", &["qwen3_5_images"]),
    ("`qwen3_5_moe` cannot be written", &["qwen3_5_moe_images"]),
    ("`qwen3_vl` cannot be written", &["qwen3_vl"]),
    ("`qwen3_vl_moe` cannot be written", &["qwen3_vl_moe", "qwen3_vl_moe_inputs"]),
    ("`dynamic` cannot be written", &["llama_dynamic"]),
    ("n_group", &["glm4_moe_groups"]),
    ("use_bias", &["ernie_biases"]),
    ("attention_bias", &["hunyuan_biases", "olmo2_biases", "olmo3_yarn", "qwen3", "smollm3_windows"]),
    ("attention_out_bias", &["seed_oss_biases"]),
    ("hidden_act", &["llama_linear"]),
    ("query_pre_attn_scalar", &["gemma2", "gemma3"]),
    ("use_sliding_window", &["qwen2"]),
    ("head_dim", &["olmo3"]),
    ("mlp_only_layers", &["qwen3_moe"]),
    ("decoder_sparse_step", &["qwen3_moe_stacked"]),
    ("no_rope_layers", &["smollm3"]),
];

/// Models whose files hold experts stacked: `qlora merge` does not merge what an adapter has for experts.
const STACKED: [&str; 10] = [
    "deepseek_v3",
    "gemma4_moe",
    "gemma4_moe_images",
    "gpt_oss",
    "gpt_oss_tied",
    "qwen3_5_moe_images",
    "qwen3_moe_stacked",
    "qwen3_next_stacked",
    "qwen3_vl_moe",
    "qwen3_vl_moe_inputs",
];

/// A recorded model with a tokenizer of as many words as it has, rows of them, and a configuration for a few steps.
fn walkable(bench: &Bench, name: &str) {
    let dir = bench.copy(&format!("archs/{name}"), name);
    let config = std::fs::read(dir.join("config.json")).expect("a configuration");
    let config: Value = serde_json::from_slice(&config).expect("JSON");
    let words = config["text_config"]["vocab_size"].as_u64().or(config["vocab_size"].as_u64()).expect("a vocabulary");
    let word = |id: u64| match id {
        0 => "<pad>".into(),
        1 => "<s>".into(),
        2 => "</s>".into(),
        _ => format!("w{id}"),
    };
    let special = |id: u64| json!({ "id": id, "content": word(id), "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false });
    let vocabulary: serde_json::Map<_, _> = (0..words).map(|id| (word(id), id.into())).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null, "decoder": null,
        "added_tokens": [special(0), special(1), special(2)], "pre_tokenizer": { "type": "WhitespaceSplit" },
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "<pad>" },
    });
    bench.write(&format!("{name}/tokenizer.json"), &tokenizer.to_string());
    let special = json!({ "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>" });
    bench.write(&format!("{name}/tokenizer_config.json"), &special.to_string());
    let row = |row: u64| (0..11).map(|i| word(3 + (row * 5 + i * 7) % (words - 3))).collect::<Vec<_>>().join(" ");
    let rows = (0..8).map(|i| json!({ "text": row(i) }).to_string() + "\n");
    bench.write(&format!("{name}.jsonl"), &rows.collect::<String>());
    let config = format!(
        "device = \"cpu\"\n[model]\npath = {name:?}\n[lora]\nrank = 2\n[data]\ntrain = \"{name}.jsonl\"\nformat = \"text\"\n[train]\n\
         max_steps = 3\nbatch_size = 2\ngradient_accumulation_steps = 1\nlearning_rate = 1e-2\nsave_every = 2\n"
    );
    bench.write(&format!("{name}.toml"), &config);
}

/// One model from training to the files of other programs.
fn walk(bench: &Bench, name: &str) {
    walkable(bench, name);
    let [toml, run, again, merged, gguf, lora, bnb] =
        [".toml", "-run", "-again", "-merged", ".gguf", ".lora.gguf", "-bnb"].map(|end| format!("{name}{end}"));
    bench.ok(&["train", &toml, "--output-dir", &run]);
    // From the second step on again, to the same bits.
    bench.ok(&["train", &toml, "--resume", &format!("{run}/checkpoint-000002"), "--output-dir", &again]);
    let weights = |run: &str| bench.read(&format!("{run}/adapter/adapter_model.safetensors"));
    assert!(weights(&run) == weights(&again), "{name}: what was resumed is another adapter");

    let ask = |model: &str, more: &[&str]| {
        let ask =
            ["generate", "--device", "cpu", "--no-chat-template", "--max-new-tokens", "6", "--prompt", "w5 w12 w19"];
        bench.ok(&[&ask[..], &["--model", model], more].concat()).stdout
    };
    let adapter = format!("{run}/adapter");
    ask(name, &["--adapter", &adapter]);
    let merge = ["merge", "--model", name, "--adapter", &adapter, "--output", &merged];
    let base = if STACKED.contains(&name) {
        bench.fails(&merge, 3, &["experts"]);
        name
    } else {
        let out = bench.ok(&merge);
        assert!(
            out.stderr.contains("Checked  logits of base and adapter and of the merged weights are"),
            "{name}: {}",
            out.stderr
        );
        ask(&merged, &[]);
        &merged
    };
    bench.ok(&["quantize", "--model", base, "--format", "bnb-4bit", "--output", &bnb]);
    ask(&bnb, &[]);

    let convert = ["convert", "--model", base, "--without-tokenizer", "--output", &gguf];
    let convert_lora = ["convert", "--model", name, "--adapter", &adapter, "--adapter-only", "--output", &lora];
    match NOT_WRITTEN.iter().find(|(_, names)| names.contains(&name)) {
        Some((reason, _)) => {
            bench.fails(&convert, 3, &[reason]);
            // Some of them concern the base alone.
            let lora = bench.run(&convert_lora);
            assert!(
                lora.code == Some(0) || lora.code == Some(3) && lora.stderr.contains(reason),
                "{name}: {}",
                lora.stderr
            );
        }
        None => {
            bench.ok(&convert);
            bench.ok(&convert_lora);
            bench.ok(&["inspect", &gguf]);
            bench.ok(&["inspect", &lora]);
        }
    }
}

/// Two at a time: what takes long is the start of a program.
#[test]
fn every_family_goes_through_everything() {
    let bench = Bench::new();
    let folders = std::fs::read_dir(reference("archs")).expect("recorded models").flatten();
    let mut names: Vec<String> = folders.map(|folder| folder.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
            walk(&bench, name);
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(work);
        work();
    });
}
