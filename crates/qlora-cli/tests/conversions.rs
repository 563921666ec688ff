//! Commands that write for other programs: what they write, what they refuse, and what a kill leaves.

mod common;

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use burn_qlora::gguf::GgufFile;
use burn_qlora::{Adapter, Checkpoint, MergeOptions, merge_checkpoint};
use common::{Bench, reference};

fn model() -> String {
    reference("tiny-llama").display().to_string()
}

fn trained() -> String {
    reference("qlora/final_adapter_f32").display().to_string()
}

/// All files below a folder, by their names.
fn contents(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(dir).expect("a folder").flatten();
    let mut files: Vec<_> = entries
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path()).expect("a file")))
        .collect();
    files.sort();
    files
}

/// Names in a bench's folder that begin with a dot.
fn leftovers(bench: &Bench) -> Vec<String> {
    let names = std::fs::read_dir(bench.path(".")).expect("a folder").flatten();
    names.map(|e| e.file_name().to_string_lossy().into_owned()).filter(|name| name.starts_with('.')).collect()
}

#[test]
fn a_merged_model_answers_as_base_and_adapter_do() {
    let bench = Bench::new();
    let (model, adapter) = (model(), trained());
    let merge = ["merge", "--model", &model, "--adapter", &adapter, "--output", "merged"];
    let out = bench.ok(&[&merge[..], &["--max-shard-size", "4MB"]].concat()).stdout;
    for word in ["model.layers.0", "model.layers.5", "relative change", "42 weights changed", "Merged   merged"] {
        assert!(out.contains(word), "{word}: {out}");
    }
    assert!(bench.path("merged/model.safetensors.index.json").is_file());
    // What base and adapter compute was compared before anything was left, unless that is not wanted.
    let stderr = |more: &[&str]| bench.ok(&[&merge[..], &["--max-shard-size", "4MB", "--force"], more].concat()).stderr;
    assert!(stderr(&[]).contains("Checked  logits of base and adapter and of the merged weights are"));
    assert!(!stderr(&["--no-verify"]).contains("Checked"));
    for name in ["tokenizer.json", "chat_template.jinja", "generation_config.json"] {
        assert_eq!(
            bench.read(&format!("merged/{name}")),
            std::fs::read(reference("tiny-llama").join(name)).expect(name)
        );
    }
    let ask = |more: &[&str]| {
        let ask = [
            "generate",
            "--device",
            "cpu",
            "--quant-type",
            "none",
            "--max-new-tokens",
            "12",
            "--prompt",
            "How many coins are 3 * 4 coins?",
        ];
        bench.ok(&[&ask[..], more].concat()).stdout
    };
    let apart = ask(&["--model", &model, "--adapter", &adapter]);
    assert_eq!(ask(&["--model", "merged"]), apart);
    assert_ne!(ask(&["--model", &model]), apart, "the adapter says something else than its base");

    // What stands is replaced only when asked.
    bench.fails(&merge, 2, &["merged exists", "--force"]);
    let sharded = contents(&bench.path("merged"));
    bench.ok(&[&merge[..], &["--force"]].concat());
    assert!(contents(&bench.path("merged")) != sharded && bench.path("merged/model.safetensors").is_file());
    assert!(!bench.path("merged/model.safetensors.index.json").exists(), "nothing of the old one stays");
    assert_eq!(leftovers(&bench), [""; 0]);
}

#[test]
fn a_merge_into_the_rounded_base_says_what_the_rounding_did() {
    let bench = Bench::new();
    let (model, adapter) = (model(), trained());
    let merge = ["merge", "--model", &model, "--adapter", &adapter, "--output"];
    bench.ok(&[&merge[..], &["full"]].concat());
    let out = bench.ok(&[&merge[..], &["rounded", "--base", "dequantized-4bit"]].concat()).stdout;
    assert!(out.contains("4-bit rounding before") && out.contains("rounding included"), "{out}");
    assert!(bench.read("full/model.safetensors") != bench.read("rounded/model.safetensors"));
    // A base that is in 4 bits already has only that way.
    let quantized = reference("tiny-llama-bnb-4bit").display().to_string();
    let merge = ["merge", "--model", &quantized, "--adapter", &adapter, "--output", "bnb"];
    bench.fails(&merge, 3, &["full-precision"]);
    bench.ok(&[&merge[..], &["--base", "dequantized-4bit"]].concat());
    // Its 4-bit weights are those that we round to, but for the last bit of a mean (of the absmax), which moves a
    // weight by one step of bf16 at most, and few of them.
    let [one, other] = ["bnb", "rounded"].map(|name| Checkpoint::open(&bench.path(name)).expect(name));
    for name in one.names() {
        let [one, other] = [&one, &other].map(|c| c.tensor(name).expect(name).to_f32_vec().expect("numbers"));
        let moved = one.iter().zip(&other).filter(|(x, y)| x != y).count();
        let far = one.iter().zip(&other).any(|(x, y)| (x - y).abs() > x.abs() / 128.0);
        assert!(moved * 1000 <= one.len() && !far, "{name}: {moved} of {}", one.len());
    }
    bench.fails(&[&merge[..5], &["--output", "x", "--no-double-quant"]].concat(), 2, &["--base dequantized-4bit"]);
}

#[test]
fn adapters_are_combined_by_weights() {
    let bench = Bench::new();
    let model = model();
    let (plain, rslora) =
        (reference("adapters/plain").display().to_string(), reference("adapters/rslora").display().to_string());
    let [half, minus] = [format!("{plain}:0.5"), format!("{rslora}:-0.25")];
    let two = ["--adapter", &half, "--adapter", &minus];
    let out = bench.ok(&[&["combine", "--output", "both"], &two[..]].concat()).stdout;
    assert!(out.contains("Combined 2 adapters"), "{out}");
    let both = Adapter::load(&bench.path("both")).expect("an adapter");
    let parts = [&plain, &rslora].map(|dir| Adapter::load(dir.as_ref()).expect("an adapter"));
    for module in both.modules() {
        let delta = |adapter: &Adapter| {
            adapter.lora_module(&module).expect("factors").map(|m| m.delta().expect("factors that fit").data)
        };
        let sum = delta(&both).expect("a module");
        let (one, other) = (delta(&parts[0]), delta(&parts[1]));
        for (i, x) in sum.iter().enumerate() {
            let part = |delta: &Option<Vec<f32>>| delta.as_ref().map_or(0.0, |delta| delta[i]);
            // A few roundings of f32 in sums of up to 24 products of about 1e-3.
            assert!((x - (0.5 * part(&one) - 0.25 * part(&other))).abs() < 1e-7, "{module} {i}");
        }
    }
    // Merging the two is merging their combination.
    bench.ok(&[&["merge", "--model", &model, "--output", "at-once"], &two[..]].concat());
    bench.ok(&["merge", "--model", &model, "--output", "by-hand", "--adapter", "both"]);
    assert!(bench.read("at-once/model.safetensors") == bench.read("by-hand/model.safetensors"));

    let nothing = format!("{plain}:nan");
    bench.fails(&["combine", "--output", "x", "--adapter", &nothing], 2, &["DIR:WEIGHT"]);
    bench.fails(&["combine", "--output", "x", "--adapter", &plain, "--svd-rank", "4"], 2, &["--combine svd"]);
    bench.fails(&["combine", "--output", "x"], 2, &["--adapter"]);
}

#[test]
fn an_adapter_that_does_not_fit_is_refused_and_nothing_is_written() {
    let bench = Bench::new();
    let config = r#"{"model_type": "llama", "hidden_size": 64}"#;
    let dir = bench.copy("tiny-llama", "other");
    // A base of the same names and other sizes.
    std::fs::write(dir.join("config.json"), config).expect("written");
    let adapter = trained();
    let smaller = bench.path("smaller");
    bench.copy("qlora/final_adapter_f32", "smaller");
    let mut wrong = Adapter::load(&smaller).expect("an adapter");
    for tensor in wrong.tensors.values_mut().filter(|t| t.shape[1] == 256) {
        tensor.shape[1] = 128;
        tensor.data.truncate(tensor.shape[0] * 128);
    }
    wrong.save(&smaller).expect("saved");
    let model = model();
    bench.fails(&["merge", "--model", &model, "--adapter", "smaller", "--output", "out"], 3, &["another base", "256"]);
    let mut renamed = Adapter::load(adapter.as_ref()).expect("an adapter");
    renamed.tensors = renamed.tensors.into_iter().map(|(k, t)| (k.replace("layers.5", "layers.7"), t)).collect();
    std::fs::create_dir(bench.path("deeper")).expect("a folder");
    renamed.save(&bench.path("deeper")).expect("saved");
    bench.fails(&["merge", "--model", &model, "--adapter", "deeper", "--output", "out"], 3, &["model.layers.7"]);
    assert!(!bench.path("out").exists());
    assert_eq!(leftovers(&bench), [""; 0]);
    // Somebody's folder is not replaced, whatever is asked for.
    std::fs::create_dir(bench.path("photos")).expect("a folder");
    bench.write("photos/one.jpg", "x");
    let merge = ["merge", "--model", &model, "--adapter", &adapter, "--output", "photos", "--force"];
    bench.fails(&merge, 2, &["photos", "not replaced"]);
    bench.fails(
        &["merge", "--model", &model, "--adapter", &adapter, "--output", "rows.jsonl", "--force"],
        2,
        &["rows.jsonl is a file"],
    );
    bench.fails(&["merge", "--adapter", &adapter, "--output", "out", "--max-shard-size", "5 apples"], 2, &["5GB"]);
}

#[test]
fn quantize_writes_what_bitsandbytes_writes() {
    let bench = Bench::new();
    let model = model();
    let quantize = ["quantize", "--model", &model, "--format", "bnb-4bit", "--output", "bnb"];
    let out = bench.ok(&quantize).stdout;
    assert!(out.contains("42 layers in NF4 with double quantization"), "{out}");
    let (ours, theirs) = (
        Checkpoint::open(&bench.path("bnb")).expect("ours"),
        Checkpoint::open(&reference("tiny-llama-bnb-4bit")).expect("theirs"),
    );
    assert!(ours.names().eq(theirs.names()));
    for name in ours.names() {
        let (one, other) = (ours.tensor(name).expect(name), theirs.tensor(name).expect(name));
        // The statistics hang on a mean whose last bit depends on the order of summation; the codes don't.
        let statistics = name.contains("quant_state") || name.contains("absmax");
        assert!(statistics || one.data == other.data, "{name}");
    }
    assert!(bench.ok(&["inspect", "bnb"]).stdout.contains("quantized to 4 bits by bitsandbytes"));
    bench.fails(&quantize, 2, &["bnb exists"]);
    bench.fails(&["quantize", "--model", "bnb", "--format", "bnb-4bit", "--output", "x"], 3, &["quantized already"]);
    bench.fails(
        &["quantize", "--model", &model, "--format", "bnb-8bit", "--output", "x"],
        2,
        &["bnb-8bit", "bnb-4bit"],
    );
    bench.fails(&[&quantize[..5], &["--output", "x", "--quant-type", "nf5"]].concat(), 2, &["nf5", "fp4"]);
}

#[test]
fn convert_writes_models_and_adapters_as_gguf() {
    let bench = Bench::new();
    let (model, adapter) = (model(), trained());
    for (kind, word) in [("q8_0", "q8_0"), ("Q4_0", "q4_0"), ("bf16", "bf16")] {
        let file = format!("{kind}.gguf");
        let out = bench.ok(&["convert", "--model", &model, "--type", kind, "--output", &file]).stdout;
        assert!(out.contains(&file) && out.contains(word), "{out}");
        assert_eq!(GgufFile::open(&bench.path(&file)).expect("GGUF").tensors.len(), 56);
    }
    // On the way, and by hand.
    bench.ok(&["convert", "--model", &model, "--adapter", &adapter, "--output", "merged.gguf"]);
    bench.ok(&["merge", "--model", &model, "--adapter", &adapter, "--output", "tiny-llama"]);
    bench.ok(&["convert", "--model", "tiny-llama", "--output", "by-hand.gguf"]);
    assert!(bench.read("merged.gguf") == bench.read("by-hand.gguf"));
    let out = bench.ok(&[
        "convert",
        "--model",
        &model,
        "--adapter",
        &adapter,
        "--adapter-only",
        "--type",
        "f32",
        "--output",
        "lora.gguf",
    ]);
    assert!(out.stdout.contains("LoRA GGUF") && out.stdout.contains("84 tensors"), "{}", out.stdout);
    assert_eq!(leftovers(&bench), [""; 0]);

    bench.fails(&["convert", "--model", &model, "--output", "lora.gguf"], 2, &["lora.gguf exists", "--force"]);
    bench.ok(&["convert", "--model", &model, "--output", "lora.gguf", "--force"]);
    bench.fails(&["convert", "--model", &model, "--output", "x", "--type", "q3_k"], 2, &["q3_k", "q4_0"]);
    bench.fails(&["convert", "--model", &model, "--output", "x", "--adapter-only"], 2, &["--adapter"]);
    let dora = reference("adapters/dora").display().to_string();
    let lora = ["convert", "--model", &model, "--adapter", &dora, "--adapter-only", "--output", "x"];
    bench.fails(&lora, 3, &["use_dora", "merge the adapter"]);
    assert!(!bench.path("x").exists());
}

/// Random moments, the same in every run.
fn moments() -> impl Iterator<Item = f64> {
    let mut state = 0x9E37_79B9u32;
    std::iter::repeat_with(move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(state >> 8) / f64::from(1u32 << 24)
    })
}

/// How often to kill; `KILLS=200` for more.
fn kills() -> usize {
    std::env::var("KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(12)
}

/// Runs a command and kills it after a part of the time that a whole run takes.
fn kill_at(bench: &Bench, args: &[&str], moment: f64, whole: Duration) {
    let mut child =
        bench.command(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the program starts");
    std::thread::sleep(whole.mul_f64(1.1 * moment));
    // SIGKILL; it may have ended by itself.
    drop(child.kill());
    child.wait().expect("it ends");
}

/// A merge that is killed at any moment leaves the old output or the new one, whole; and what else it left is
/// gone after the next run.
#[test]
fn a_killed_merge_leaves_the_old_output_or_the_new() {
    let bench = Bench::new();
    let model = model();
    let adapters = [trained(), reference("adapters/plain").display().to_string()];
    let wanted = adapters.clone().map(|adapter| {
        let dir = bench.path("wanted");
        let adapter = Adapter::load(adapter.as_ref()).expect("an adapter");
        merge_checkpoint(model.as_ref(), &adapter, &dir, &MergeOptions::default(), &mut |_| {}).expect("merged");
        contents(&dir)
    });
    let merge = |adapter| ["merge", "--model", &model, "--adapter", adapter, "--output", "out", "--force"];
    let start = Instant::now();
    bench.ok(&merge(&adapters[0]));
    let whole = start.elapsed();
    let mut now = 0;
    for (i, moment) in moments().take(kills()).enumerate() {
        let next = (i + 1) % 2;
        kill_at(&bench, &merge(&adapters[next]), moment, whole);
        let found = contents(&bench.path("out"));
        assert!(found == wanted[now] || found == wanted[next], "kill {i}: neither the old output nor the new");
        now = if found == wanted[next] { next } else { now };
    }
    // From nothing: all of it, or none.
    for moment in moments().take(kills() / 2) {
        std::fs::remove_dir_all(bench.path("out")).expect("removed");
        kill_at(&bench, &merge(&adapters[0]), moment, whole);
        assert!(!bench.path("out").exists() || contents(&bench.path("out")) == wanted[0]);
        std::fs::create_dir_all(bench.path("out")).expect("made");
    }
    bench.ok(&merge(&adapters[1]));
    assert!(contents(&bench.path("out")) == wanted[1]);
    assert_eq!(leftovers(&bench), [""; 0]);
}

/// The same for a file, with the merge on the way.
#[test]
fn a_killed_conversion_leaves_the_old_file_or_the_new() {
    let bench = Bench::new();
    let (model, adapter) = (model(), trained());
    let convert = |kind, output| {
        ["convert", "--model", &model, "--adapter", &adapter, "--type", kind, "--output", output, "--force"]
    };
    let start = Instant::now();
    let wanted = ["f16", "q8_0"].map(|kind| {
        bench.ok(&convert(kind, kind));
        bench.read(kind)
    });
    let whole = start.elapsed() / 2;
    // Names that differ would be in the files.
    bench.ok(&convert("f16", "out.gguf"));
    let mut now = 0;
    for (i, moment) in moments().take(kills()).enumerate() {
        let next = (i + 1) % 2;
        kill_at(&bench, &convert(["f16", "q8_0"][next], "out.gguf"), moment, whole);
        let found = bench.read("out.gguf");
        assert!(found == wanted[now] || found == wanted[next], "kill {i}: neither the old file nor the new");
        now = if found == wanted[next] { next } else { now };
    }
    bench.ok(&convert("f16", "out.gguf"));
    assert!(bench.read("out.gguf") == wanted[0]);
    assert_eq!(leftovers(&bench), [""; 0]);
}

/// Ctrl-C cleans up at once.
#[cfg(unix)]
#[test]
fn an_interrupted_merge_leaves_nothing() {
    let bench = Bench::new();
    let (model, adapter) = (model(), trained());
    let merge = |output| ["merge", "--model", &model, "--adapter", &adapter, "--output", output];
    bench.ok(&merge("wanted"));
    let (merge, wanted) = (merge("out"), contents(&bench.path("wanted")));
    let mut interrupted = false;
    // A merge may end before the signal comes, on a machine with much else to do.
    for _ in 0..100 {
        let mut child =
            bench.command(&merge).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the program starts");
        // It is at work when its output stands there under a temporary name.
        while leftovers(&bench).is_empty() && child.try_wait().expect("it runs or has ended").is_none() {
            std::thread::yield_now();
        }
        drop(std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status());
        let code = child.wait().expect("it ends").code();
        assert_eq!(leftovers(&bench), [""; 0]);
        assert!(code == Some(130) || code == Some(0), "{code:?}");
        if code == Some(130) && !bench.path("out").exists() {
            interrupted = true;
            break;
        }
        // Whole, when the signal came.
        assert!(contents(&bench.path("out")) == wanted);
        std::fs::remove_dir_all(bench.path("out")).expect("removed");
    }
    assert!(interrupted, "no signal came while it was at work");
}

/// GPTQ calibrated on rows beats rounding to the nearest, in every kind of layer and in the loss.
#[test]
fn gptq_is_calibrated_on_data() {
    let bench = Bench::new();
    let model = model();
    // English prose, which is what the model has learnt.
    let licence = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../LICENSE-APACHE");
    let licence = std::fs::read_to_string(licence).expect("the licence");
    let words: Vec<&str> = licence.split_whitespace().collect();
    let rows = words.chunks(40).map(|words| format!("{{\"text\": {:?}}}\n", words.join(" ")));
    bench.write("prose.jsonl", &rows.collect::<String>());
    let data = "prose.jsonl";
    let gptq = [
        "quantize",
        "--model",
        &model,
        "--format",
        "gptq",
        "--device",
        "cpu",
        "--group-size",
        "-1",
        "--output",
        "gptq",
    ];
    let rows = ["--data", data, "--calibration-rows", "24", "--eval-rows", "6", "--max-length", "128"];
    let out = bench.ok(&[&gptq[..], &rows, &["--act-order"]].concat()).stdout;
    assert!(out.contains("42 layers, calibrated on 24 rows") && out.contains("measured on 6"), "{out}");
    let number = |line: &str, column: usize| -> f64 {
        let numbers = line.split_whitespace().filter_map(|word| word.parse::<f64>().ok());
        numbers.collect::<Vec<_>>()[column]
    };
    let layers: Vec<&str> = out.lines().filter(|line| line.starts_with("model.layers.*")).collect();
    assert_eq!(layers.len(), 7, "{out}");
    for line in layers {
        // Layers, mean and worst of GPTQ, mean and worst of rounding.
        assert!(number(line, 1) < number(line, 3), "{line}");
    }
    let loss = |name: &str| number(out.lines().find(|line| line.starts_with(name)).expect(name), 0);
    assert!(loss("as it was") < loss("rounded to the nearest"), "{out}");
    assert!(loss("GPTQ") < loss("rounded to the nearest"), "{out}");
    let checkpoint = Checkpoint::open(&bench.path("gptq")).expect("a checkpoint");
    // As it lies in the file, and as the dense model has it.
    assert!(checkpoint.get("model.layers.5.mlp.down_proj.qweight").is_some());
    assert!(checkpoint.contains("model.layers.5.mlp.down_proj.weight"));
    let config = String::from_utf8(bench.read("gptq/config.json")).expect("text");
    assert!(config.contains("\"quant_method\": \"gptq\"") && config.contains("\"desc_act\": true"), "{config}");

    bench.fails(&gptq[..9], 2, &["--output <DIR>"]);
    bench.fails(&[&gptq[..9], &["--output", "x"]].concat(), 2, &["--data"]);
    bench.fails(
        &[&gptq[..9], &["--output", "x", "--quant-type", "fp4"]].concat(),
        2,
        &["--quant-type belongs to --format bnb-4bit"],
    );
    let bnb = ["quantize", "--model", &model, "--format", "bnb-4bit", "--output", "x", "--act-order"];
    bench.fails(&bnb, 2, &["--act-order belongs to --format gptq"]);
    let uneven =
        ["quantize", "--model", &model, "--format", "gptq", "--device", "cpu", "--output", "x", "--data", data];
    bench.fails(&uneven, 3, &["down_proj", "688", "128"]);
    bench.fails(&[&uneven[..], &["--damp-percent", "1.5"]].concat(), 2, &["--damp-percent"]);
    assert!(!bench.path("x").exists());
}
