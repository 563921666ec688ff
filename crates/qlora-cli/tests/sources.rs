//! Models whose weights lie in other storages than plain floats: every command does with them what it does with their
//! dense decoding.

mod common;

use std::path::Path;

use burn_qlora::Checkpoint;
use burn_qlora::adapter_io::{Dtype, ShardedWriter, TensorSpec};
use common::{Bench, reference};
use serde_json::{Value, json};

/// The sizes that `make_sources.py` records the block of.
const HIDDEN: usize = 64;
const WORDS: usize = 4096;

/// A model with the recorded block of a storage in one file, everything else in another, and the same model as plain
/// floats beside it.
fn models(bench: &Bench, case: &str) -> [String; 2] {
    let recorded = reference(&format!("sources/{case}"));
    let said: Value =
        serde_json::from_slice(&std::fs::read(recorded.join("quantization_config.json")).expect("a file"))
            .expect("JSON");
    let [coded, dense] = ["coded", "dense"].map(|kind| format!("{case}-{kind}"));
    bench.copy("tiny-llama", &coded);
    let mut config: Value = serde_json::from_slice(&bench.read(&format!("{coded}/config.json"))).expect("JSON");
    for (key, value) in [
        ("hidden_size", json!(HIDDEN)),
        ("intermediate_size", json!(32)),
        ("num_attention_heads", json!(1)),
        ("num_key_value_heads", json!(1)),
        ("num_hidden_layers", json!(1)),
    ] {
        config[key] = value;
    }
    config["dtype"] = said["dtype"].clone();
    // The rest: an embedding and norms.
    let rest = [("model.embed_tokens", vec![WORDS, HIDDEN]), ("model.norm", vec![HIDDEN])];
    let norms = ["input_layernorm", "post_attention_layernorm"].map(|n| (format!("model.layers.0.{n}"), vec![HIDDEN]));
    let rest: Vec<_> = rest.into_iter().map(|(name, shape)| (name.to_string(), shape)).chain(norms).collect();
    let spec = |(name, shape): &(String, Vec<usize>)| TensorSpec::new(format!("{name}.weight"), Dtype::F32, shape);
    let folder = bench.path(&coded);
    std::fs::remove_file(folder.join("model.safetensors")).expect("a file");
    let mut writer = ShardedWriter::create(&folder, rest.iter().map(spec).collect(), u64::MAX).expect("a file");
    for (i, tensor) in rest.iter().enumerate() {
        let elements: usize = tensor.1.iter().product();
        let value = |j: usize| if tensor.1.len() == 1 { 1.0 } else { (j * 7919 % 251 + i) as f32 / 5000.0 - 0.025 };
        let bytes: Vec<u8> = (0..elements).flat_map(|j| value(j).to_le_bytes()).collect();
        writer.write(&spec(tensor).name, &bytes).expect("a file");
    }
    writer.finish().expect("a file");
    std::fs::rename(folder.join("model.safetensors"), folder.join("rest.safetensors")).expect("a file");
    std::fs::copy(recorded.join("coded.safetensors"), folder.join("coded.safetensors")).expect("a file");
    let mut map = serde_json::Map::new();
    for file in ["rest.safetensors", "coded.safetensors"] {
        let names = Checkpoint::open_file(&folder.join(file)).expect("a file");
        // The weights of odd sizes belong to no model.
        map.extend(names.names().filter(|name| !name.contains(".odd.")).map(|name| (name.into(), file.into())));
    }
    bench.write(
        &format!("{coded}/model.safetensors.index.json"),
        &json!({"metadata": {}, "weight_map": map}).to_string(),
    );

    bench.copy("tiny-llama", &dense);
    bench.write(&format!("{dense}/config.json"), &config.to_string());
    config["quantization_config"] = said["quantization_config"].clone();
    bench.write(&format!("{coded}/config.json"), &config.to_string());
    let checkpoint = Checkpoint::open(&folder).expect(case);
    let specs = checkpoint.names().map(|name| {
        let tensor = checkpoint.dense(name).expect(name);
        TensorSpec::new(name, tensor.dtype, &tensor.shape)
    });
    let mut writer = ShardedWriter::create(&bench.path(&dense), specs.collect(), u64::MAX).expect("a file");
    checkpoint.names().for_each(|name| writer.write_tensor(name, &checkpoint.dense(name).expect(name)).expect(name));
    writer.finish().expect("a file");
    [coded, dense]
}

fn weights(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("model.safetensors")).expect("one file of weights")
}

#[test]
fn every_command_does_with_them_what_it_does_with_their_decoding() {
    let bench = Bench::new();
    let cases = std::fs::read_dir(reference("sources")).expect("recorded cases").flatten();
    let cases = cases.map(|entry| entry.file_name().to_string_lossy().into_owned());
    // gpt-oss's experts are no llama's.
    for case in cases.filter(|case| case != "mxfp4-gpt-oss") {
        let models = models(&bench, &case);
        let [coded, dense] = models.each_ref().map(|model| {
            let place = |what: &str| format!("{model}-{what}");
            let train = ["train", "qlora.toml", "--model", model, "--output-dir", &place("run")];
            let said = bench.ok(&[&train[..], &["--max-steps", "2", "--set", "quantization.blocksize=32"]].concat());
            let adapter = place("run/adapter");
            let losses = String::from_utf8(bench.read(&place("run/metrics.jsonl"))).expect("text");
            let losses: Vec<Value> = losses.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
            let losses: Vec<Value> = losses.iter().filter_map(|line| line.get("loss").cloned()).collect();
            assert!(!losses.is_empty(), "{}", said.stderr);
            bench.ok(&["quantize", "--model", model, "--format", "bnb-4bit", "--output", &place("nf4")]);
            let merge = ["merge", "--model", model, "--adapter", &adapter, "--output", &place("merged")];
            bench.ok(&merge);
            bench.ok(&["convert", "--model", model, "--name", "one", "--output", &place("model.gguf")]);
            (
                losses,
                bench.read(&format!("{adapter}/adapter_model.safetensors")),
                weights(&bench.path(&place("nf4"))),
                weights(&bench.path(&place("merged"))),
                bench.read(&place("model.gguf")),
            )
        });
        assert_eq!(coded.0, dense.0, "{case}: losses");
        assert!(coded.1 == dense.1, "{case}: adapters");
        assert!(coded.2 == dense.2 && coded.3 == dense.3 && coded.4 == dense.4, "{case}: what was written");
        let shown = bench.ok(&["inspect", &models[0]]).stdout;
        assert!(shown.contains("a model checkpoint, with weights in "), "{shown}");
        assert!(bench.ok(&["inspect", &models[1]]).stdout.contains("a model checkpoint\n"));
    }
}

#[test]
fn what_can_not_be_decoded_is_refused_by_name() {
    let bench = Bench::new();
    let [model, _] = models(&bench, "awq");
    let config = format!("{model}/config.json");
    let mut said: Value = serde_json::from_slice(&bench.read(&config)).expect("JSON");
    said["quantization_config"]["quant_method"] = json!("hqq");
    bench.write(&config, &said.to_string());
    for command in [
        &["train", "qlora.toml", "--model", &model][..],
        &["quantize", "--model", &model, "--format", "bnb-4bit", "--output", "x"],
        &["convert", "--model", &model, "--output", "x.gguf"],
        &["inspect", &model],
    ] {
        let run = bench.run(command);
        assert!(run.code != Some(0) && !bench.path("x").exists(), "{command:?}");
        assert!(
            run.stderr.contains("`hqq` is not decoded") && run.stderr.contains("original checkpoint"),
            "{}",
            run.stderr
        );
    }
}
