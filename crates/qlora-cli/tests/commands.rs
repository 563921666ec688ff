//! The commands on good input: what they print and what they leave.

mod common;

use common::{Bench, reference};

#[test]
fn help_documents_the_exit_codes_and_names_every_command() {
    let help = Bench::new().ok(&["--help"]).stdout;
    for word in ["train", "init", "generate", "chat", "serve", "eval", "inspect", "Exit codes", "130"] {
        assert!(help.contains(word), "{word}: {help}");
    }
}

#[test]
fn init_writes_a_configuration_and_keeps_one_that_exists() {
    let bench = Bench::new();
    bench.ok(&["init", "new.toml"]);
    let template = bench.read("new.toml");
    assert!(String::from_utf8_lossy(&template).contains("gradient_accumulation_steps"));
    bench.fails(&["init", "new.toml"], 2, &["new.toml exists", "--force"]);
    assert_eq!(bench.ok(&["init", "-"]).stdout.as_bytes(), template);
    // The template names what is still to be filled in.
    bench.fails(&["train", "new.toml"], 2, &["model.path is not set"]);
}

#[test]
fn dry_run_says_what_would_be_trained_and_writes_nothing() {
    let bench = Bench::new();
    let out = bench.ok(&["train", "qlora.toml", "--dry-run", "--rank", "8"]).stdout;
    // Seven projections in six layers; (in + out) * rank of each: 6 * 8 * (512 + 384 + 384 + 512 + 3 * 944).
    for word in [
        "5.40 M parameters",
        "NF4, blocksize 64 with double quantization",
        "on 42 modules",
        "model.layers.*.mlp.down_proj",
        "222 k",
        "12 rows",
        "optimizer state",
    ] {
        assert!(out.contains(word), "{word}: {out}");
    }
    assert!(!bench.path("run").exists());
}

#[test]
fn unknown_keys_of_a_model_are_accepted_by_name() {
    let bench = Bench::new();
    bench.copy("tiny-llama", "model");
    let config = String::from_utf8(bench.read("model/config.json")).expect("text");
    let config = config.replacen('{', r#"{"mup_gain": 2.5, "unk_token_id": 0, "attention_dropout": 0.1, "#, 1);
    let config = config.replace(r#""attention_dropout": 0.0,"#, "");
    std::fs::write(bench.path("model/config.json"), config).expect("written");
    let ask = ["generate", "--device", "cpu", "--model", "model", "--max-new-tokens", "1", "--prompt", "a"];
    bench.fails(&ask, 3, &["config.json", "mup_gain", "2.5", "--accept-key mup_gain"]);
    let accepted = bench.ok(&[&ask[..], &["--accept-key", "mup_gain"]].concat()).stderr;
    for word in ["`mup_gain` is 2.5", "`unk_token_id` is 0", "`attention_dropout` is 0.1"] {
        assert!(accepted.contains(word), "{word}: {accepted}");
    }
    let train = ["train", "qlora.toml", "--model", "model", "--dry-run"];
    bench.fails(&train, 3, &["mup_gain", "model.accept_keys"]);
    for by in [&["--accept-key", "mup_gain"], &["--set", "model.accept_keys=[\"mup_gain\"]"]] {
        let preview = &train[..train.len() - 1];
        for asked in [&train[..], &[&["preview"], &preview[1..]].concat()] {
            let told = bench.ok(&[asked, by].concat()).stderr;
            assert!(told.contains("`mup_gain` is 2.5"), "{asked:?}: {told}");
        }
    }
}

#[test]
fn train_leaves_adapter_metrics_and_report_and_generate_uses_them() {
    let bench = Bench::new();
    let run = bench.ok(&["train", "qlora.toml", "--set", "data.eval_fraction=0.2", "--set", "train.eval_every=2"]);
    assert!(run.stdout.contains("Adapter  run/adapter"), "{}", run.stdout);
    assert!(run.stderr.contains("step 4/4  loss ") && run.stderr.contains("evaluation loss"), "{}", run.stderr);
    assert!(run.stderr.contains("Weights  ") && run.stderr.contains(" in 4 bits, "), "{}", run.stderr);
    for name in
        ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "summary.md", "summary.json", "loss.svg"]
    {
        assert!(bench.path("run").join(name).is_file(), "{name}");
    }
    let metrics = String::from_utf8(bench.read("run/metrics.jsonl")).expect("text");
    assert_eq!(metrics.lines().filter(|line| line.contains("\"loss\"")).count(), 4, "{metrics}");
    assert!(metrics.contains("\"eval_loss\""), "{metrics}");

    let model = reference("tiny-llama").display().to_string();
    let ask = [
        "generate",
        "--device",
        "cpu",
        "--model",
        &model,
        "--prompt",
        "How many coins are 3 * 4 coins?",
        "--max-new-tokens",
        "8",
    ];
    let base = bench.ok(&ask).stdout;
    assert_eq!(bench.ok(&ask).stdout, base, "greedy answers repeat");
    let tuned = bench.ok(&[&ask[..], &["--adapter", "run/adapter"]].concat());
    assert!(!tuned.stdout.trim().is_empty());
    // Without --model it is the base that the adapter names.
    let short =
        ["generate", "--device", "cpu", "--adapter", "run/adapter", "--prompt", ask[6], "--max-new-tokens", "8"];
    assert_eq!(bench.ok(&short).stdout, tuned.stdout);
    let sampled = [&ask[..], &["--temperature", "1.5", "--seed", "3"]].concat();
    assert_eq!(bench.ok(&sampled).stdout, bench.ok(&sampled).stdout, "a seed repeats");

    let words = |path: &str, expected: &[&str]| {
        let out = bench.ok(&["inspect", path]).stdout;
        for word in expected {
            assert!(out.contains(word), "{path}: {word}: {out}");
        }
    };
    words("run", &["training run", "run/adapter", "checkpoint"]);
    words("run/adapter", &["PEFT adapter", "rank, alpha, dropout", "model.layers.*.self_attn.q_proj"]);
    words("run/checkpoint-000004", &["training checkpoint", "steps done", "max_steps = 4"]);
}

#[test]
fn a_profile_is_a_trace_of_the_steps_after_the_second() {
    let bench = Bench::new();
    let kept = "train.activation_checkpointing=full";
    let run = bench.ok(&["train", "qlora.toml", "--set", kept, "--profile", "trace.json", "--profile-steps", "5"]);
    for word in ["2 steps profiled", "part of the step", "block_backward > gradient", "trace.json, for https"] {
        assert!(run.stdout.contains(word), "{word}: {}", run.stdout);
    }
    let trace: serde_json::Value = serde_json::from_slice(&bench.read("trace.json")).expect("JSON");
    let events = trace["traceEvents"].as_array().expect("events");
    let named = |name: &str| events.iter().filter(|event| event["name"] == name).count();
    // Of the four steps, the third and the fourth: six blocks run forward, and their two branches once more.
    assert_eq!((named("step"), named("block 5"), named("block_backward 5"), named("optimizer")), (2, 2, 2, 2));
    assert_eq!(named("recompute"), 2 * 6 * 2);
    // What lies between steps is there from the second's end on.
    assert_eq!((named("data"), named("save")), (2, 2));

    let short = bench.ok(&["train", "qlora.toml", "--profile", "no.json", "--max-steps", "2", "--output-dir", "short"]);
    assert!(short.stderr.contains("no.json is not written"), "{}", short.stderr);
    bench.fails(&["train", "qlora.toml", "--profile", "no/such/trace.json"], 2, &["no/such"]);
    bench.fails(&["train", "qlora.toml", "--profile-steps", "2"], 2, &["--profile"]);
}

#[test]
fn inspect_says_what_a_checkpoint_is() {
    let bench = Bench::new();
    let inspect = |path: &str, more: &[&str]| {
        let path = reference(path).display().to_string();
        bench.ok(&[&["inspect", &path], more].concat()).stdout
    };
    let plain = inspect("tiny-llama", &[]);
    for word in [
        "a model checkpoint",
        "5.40 M parameters",
        "BF16",
        "model.layers.*.self_attn.q_proj.weight",
        "with chat template",
    ] {
        assert!(plain.contains(word), "{word}: {plain}");
    }
    // The 4-bit weights count as what they stand for.
    let quantized = inspect("tiny-llama-bnb-4bit", &[]);
    for word in ["quantized to 4 bits by bitsandbytes", "5.40 M parameters", "NF4", "[688, 256]"] {
        assert!(quantized.contains(word), "{word}: {quantized}");
    }
    assert!(inspect("tiny-llama", &["--tensors"]).contains("model.layers.3.mlp.up_proj.weight"));
    let adapter = inspect("adapters/rslora", &[]);
    assert!(adapter.contains("PEFT adapter") && adapter.contains("rsLoRA"), "{adapter}");
    let file = inspect("adapters/plain/adapter_model.safetensors", &[]);
    assert!(file.contains("safetensors") && file.contains("lora_A"), "{file}");
}

/// Ctrl-C saves a checkpoint and exits with 130; the run resumed from it ends with the bytes of one
/// that never stopped.
#[cfg(unix)]
#[test]
fn an_interrupted_run_resumes_to_the_same_adapter() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    let bench = Bench::new();
    let train = |dir: &str| ["train", "qlora.toml", "--max-steps", "12", "--output-dir", dir].map(str::to_owned);
    let args = train("stopped");
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut stopped = false;
    // A run may end before the signal comes, on a machine with much else to do.
    for _ in 0..10 {
        let mut child =
            bench.command(&args).stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("the program starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines().map_while(Result::ok);
        let step = lines.find(|line| line.starts_with("step 2/12"));
        assert!(step.is_some(), "the second step is reported");
        drop(Command::new("kill").args(["-INT", &child.id().to_string()]).status());
        let rest: Vec<String> = lines.collect();
        let code = child.wait().expect("the program ends").code();
        let last = rest.iter().rfind(|line| line.starts_with("saved ")).expect("a checkpoint");
        stopped = code == Some(130) && !last.contains("000012");
        if stopped {
            break;
        }
        assert!(code == Some(0) || code == Some(130), "{code:?}: {rest:?}");
        std::fs::remove_dir_all(bench.path("stopped")).expect("removed");
    }
    assert!(stopped, "no signal came before the end");

    // That of step 2, and one of the step in which the signal came, where that is another.
    bench.fails(&args, 3, &["stopped: holds ", " checkpoint", "--resume", "--overwrite"]);
    bench.ok(&[&args[..], &["--resume"]].concat());
    let whole = train("whole");
    bench.ok(&whole.iter().map(String::as_str).collect::<Vec<_>>());
    let adapter = |dir: &str| bench.read(&format!("{dir}/adapter/adapter_model.safetensors"));
    assert!(adapter("stopped") == adapter("whole"), "the adapters differ");
    let losses = |dir: &str| -> Vec<String> {
        let log = String::from_utf8(bench.read(&format!("{dir}/metrics.jsonl"))).expect("text");
        let loss = |line: &str| Some(line.split_once("\"loss\":")?.1.split(',').next()?.to_owned());
        log.lines().filter_map(loss).collect()
    };
    assert_eq!(losses("stopped"), losses("whole"));
    assert_eq!(losses("whole").len(), 12);
}

#[test]
fn several_adapters_answer_on_one_base() {
    let bench = Bench::new();
    let model = reference("tiny-llama").display().to_string();
    let adapter = |kind: &str| reference(&format!("adapters/{kind}")).display().to_string();
    let ask = |adapters: &[&str], more: &[&str]| {
        let common = ["generate", "--device", "cpu", "--model", &model, "--prompt", "Hello", "--max-new-tokens", "8"];
        let adapters = adapters.iter().flat_map(|adapter| ["--adapter", adapter]).collect::<Vec<_>>();
        bench.ok(&[&common[..], &adapters, more].concat()).stdout
    };
    let (plain, rslora, dora) = (adapter("plain"), adapter("rslora"), adapter("dora"));
    let [one, two] = [&plain, &rslora].map(|adapter| ask(&[adapter], &[]));
    // A weight of 0 leaves the other, whatever way they are combined.
    let nothing = format!("second={rslora}:0");
    for how in ["cat", "svd"] {
        assert_eq!(ask(&[&plain, &nothing], &["--combine", how]), one);
    }
    let each = ask(&[&format!("first={plain}"), &format!("second={rslora}")], &["--each"]);
    assert_eq!(each, format!("[first]\n{one}[second]\n{two}"));
    let both = ["--adapter", &plain, "--adapter", &dora];
    let ask = ["generate", "--device", "cpu", "--model", &model, "--prompt", "Hello"];
    bench.fails(&[&ask[..], &both].concat(), 3, &["DoRA"]);
    bench.fails(&[&ask[..], &["--adapter", &plain, "--combine", "ties"]].concat(), 2, &["cat, svd or linear"]);
}
