//! `qlora init --from`: what other trainers' configurations become.

mod common;

use common::Bench;

/// As Axolotl's examples have it, with a bit of everything.
const AXOLOTL: &str = r#"
base_model: NousResearch/Llama-3.2-1B
model_type: LlamaForCausalLM
load_in_8bit: false
load_in_4bit: true
adapter: qlora
datasets:
  - path: teknium/GPT4-LLM-Cleaned
    type: alpaca
  - path: org/chats
    name: en
    split: train[:5%]
    type: chat_template
    field_messages: dialog
    message_property_mappings:
      role: speaker
      content: text
  - path: json
    data_files: [a.jsonl, b.jsonl]
    type: completion
    field: body
  - path: org/other
    type: input_output
val_set_size: 0.1
output_dir: ./outputs/lora-out
sequence_len: 2048
sample_packing: true
lora_r: 16
lora_alpha: 32
lora_dropout: 0.05
lora_target_modules:
  - gate_proj
  - q_proj
wandb_project:
wandb_entity: me
gradient_accumulation_steps: 2
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
weight_decay: 0.0
adam_beta2: 0.95
special_tokens:
  pad_token: "<|end_of_text|>"
"#;

fn toml(bench: &Bench, name: &str) -> toml::Table {
    String::from_utf8(bench.read(name)).expect("UTF-8").parse().expect("TOML")
}

#[test]
fn axolotls_keys_are_said_here() {
    let bench = Bench::new();
    bench.write("axolotl.yml", AXOLOTL);
    let run = bench.ok(&["init", "--from", "axolotl.yml", "new.toml"]);
    let told = run.stderr;
    for part in [
        "axolotl.yml: Axolotl's configuration",
        "`wandb_entity`: metrics go to metrics.jsonl",
        "`flash_attention` is not needed",
        "`special_tokens`: tokens are added to the tokenizer's files",
        "`evals_per_epoch` has no counterpart here",
        "org/other: `type: input_output` has pieces of text, each learned or not",
        "json: `type: completion`: texts beyond data.max_length are cut here",
    ] {
        assert!(told.contains(part), "{part}: {told}");
    }
    for silent in ["wandb_project", "load_in_8bit", "tf32", "base_model"] {
        assert!(!told.contains(silent), "{silent}: {told}");
    }
    let config = toml(&bench, "new.toml");
    let key = |section: &str, key: &str| config[section][key].to_string();
    for (section, name, value) in [
        ("model", "path", "\"NousResearch/Llama-3.2-1B\""),
        ("quantization", "quant_type", "\"nf4\""),
        ("lora", "rank", "16"),
        ("lora", "alpha", "32.0"),
        ("lora", "target_modules", "[\"gate_proj\", \"q_proj\"]"),
        ("data", "max_length", "2048"),
        ("data", "eval_fraction", "0.1"),
        ("train", "optimizer", "\"adamw_8bit\""),
        ("train", "schedule", "\"cosine\""),
        ("train", "betas", "[0.9, 0.95]"),
        ("train", "epochs", "1.0"),
        ("train", "warmup_steps", "10"),
        // Axolotl's own default, which is another here.
        ("train", "max_grad_norm", "1.0"),
    ] {
        assert_eq!(key(section, name), value, "{section}.{name}");
    }
    let sources = config["data"]["train"].as_array().expect("a list");
    assert_eq!(sources.len(), 5);
    assert_eq!(sources[0]["path"].as_str(), Some("teknium/GPT4-LLM-Cleaned"));
    assert_eq!(sources[0]["format"].as_str(), Some("alpaca"));
    assert_eq!((sources[1]["subset"].as_str(), sources[1]["split"].as_str()), (Some("en"), Some("train[:5%]")));
    assert_eq!(sources[1]["columns"]["messages.role"].as_str(), Some("speaker"));
    assert_eq!((sources[3]["path"].as_str(), sources[3]["columns"]["text"].as_str()), (Some("b.jsonl"), Some("body")));
    assert_eq!(sources[4].as_str(), Some("org/other"));
    // It is a configuration: only the rows' whereabouts are left to be found.
    bench.fails(&["train", "new.toml", "--dry-run", "--model", "nowhere"], 3, &["nowhere"]);
}

/// What Axolotl calls layouts and templates, each with what it becomes or why it does not.
#[test]
fn axolotls_layouts_and_templates_are_said_here() {
    let bench = Bench::new();
    let translated = |template: &str, entries: &str| {
        let text = format!("base_model: org/base\nadapter: lora\nload_in_4bit: true\n{template}\ndatasets:\n{entries}");
        bench.write("axolotl.yml", &text);
        let told = bench.ok(&["init", "--from", "axolotl.yml", "new.toml", "--force"]).stderr;
        (toml(&bench, "new.toml")["data"].as_table().expect("a section").clone(), told)
    };
    let source =
        |data: &toml::Table| data["train"].as_array().map_or_else(|| data["train"].clone(), |list| list[0].clone());
    for (kind, format, columns, note) in [
        ("gpteacher", Some("alpaca"), Some("{ output = \"response\" }"), None),
        (
            "alpaca_chat.load_qa",
            Some("alpaca"),
            Some("{ instruction = \"question\", output = \"answer\" }"),
            Some("with another one there"),
        ),
        ("metharme", Some("prompt_completion"), Some("{ completion = \"generation\" }"), None),
        ("alpaca:phi", Some("alpaca"), None, Some("with another one there")),
        (
            "context_qa.load_v2",
            None,
            None,
            Some("has a prompt of its own there; here rows of `prompt` and `completion`"),
        ),
        ("dpo.chatml", None, None, Some("preferences or rewards there")),
        (
            "nowhere.strategy",
            None,
            None,
            Some("`type: nowhere.strategy` is not known; the layout is found by its rows' keys"),
        ),
    ] {
        let (data, told) = translated("", &format!("  - path: a.jsonl\n    type: {kind}\n"));
        let source = source(&data);
        assert_eq!(source.get("format").and_then(toml::Value::as_str), format, "{kind}: {told}");
        assert_eq!(source.get("columns").map(ToString::to_string).as_deref(), columns, "{kind}: {told}");
        match note {
            Some(note) => assert!(told.contains(note), "{kind}: {told}"),
            None => assert!(!told.contains("a.jsonl"), "{kind}: {told}"),
        }
    }
    let chat = "  - path: a.jsonl\n    type: chat_template\n    field_messages: conversations\n    message_property_mappings: {role: from, content: value}\n    \
                roles_to_train: [assistant]\n    roles: {user: [human], assistant: [gpt]}\n    train_on_eos: turn\n    message_field_training: train\n";
    for (template, begin, note) in [
        ("chat_template: chatml", Some("{% for message in messages %}{{ '<|im_start|>'"), None),
        ("chat_template: llama3", Some("{% for message in messages %}{% if loop.first %}{{ bos_token }}"), None),
        ("chat_template: tokenizer_default", None, None),
        (
            "chat_template: tokenizer_default_fallback_chatml",
            None,
            Some("where it has none, data.chat_template gives one"),
        ),
        ("chat_template: qwen_25", None, Some("is the template of Qwen 2.5's own tokenizers")),
        ("chat_template: metharme", None, Some("`chat_template: metharme` is not known")),
        ("chat_template_jinja: \"{{ messages[0].content }}\"", Some("{{ messages[0].content }}"), None),
        ("chat_template: jinja\nchat_template_jinja: mine.jinja", Some("mine.jinja"), None),
    ] {
        let (data, told) = translated(template, chat);
        let said = data.get("chat_template").and_then(toml::Value::as_str);
        assert_eq!(said.is_some(), begin.is_some(), "{template}: {told}");
        assert!(said.unwrap_or_default().starts_with(begin.unwrap_or_default()), "{template}: {said:?}");
        assert_eq!(told.contains("chat_template"), note.is_some(), "{template}: {told}");
        assert!(told.contains(note.unwrap_or_default()) && !told.contains("a.jsonl"), "{template}: {told}");
        assert_eq!(source(&data).get("columns"), None, "ShareGPT's names are known by themselves");
    }
    // A data set's own template, and one that no conversation is there for.
    let (data, told) = translated("chat_template: chatml", &format!("{chat}    chat_template: gemma\n"));
    assert!(data["chat_template"].as_str().is_some_and(|text| text.contains("<start_of_turn>")), "{told}");
    let (_, told) = translated("chat_template: chatml", &format!("{chat}{chat}    chat_template: gemma\n"));
    assert!(told.contains("data sets have 2 chat templates"), "{told}");
    let (data, told) = translated("chat_template: chatml", "  - path: a.jsonl\n    type: alpaca\n");
    assert!(data.get("chat_template").is_none() && told.contains("no data set is said to hold any"), "{told}");
    let (_, told) =
        translated("rl: dpo\neot_tokens: [\"<|e|>\"]\ncosine_min_lr_ratio: 0.1", "  - path: a.jsonl\n    type:\n");
    for part in ["`rl`: rows are trained on their answers", "`eot_tokens`: what ends a turn", "rows of token ids"] {
        assert!(told.contains(part), "{part}: {told}");
    }
}

#[test]
fn an_adapter_and_llama_factorys_keys_are_said_here() {
    let bench = Bench::new();
    bench.write(
        "adapter_config.json",
        r#"{"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8, "lora_alpha": 16, "lora_dropout": 0.1,
            "target_modules": ["q_proj"], "init_lora_weights": true, "bias": "all", "use_dora": true, "inference_mode": true,
            "rank_pattern": {}, "layers_to_transform": null}"#,
    );
    let run = bench.ok(&["init", "--from", "adapter_config.json", "new.toml"]);
    assert!(run.stderr.contains("`bias: \"all\"` has no counterpart here"), "{}", run.stderr);
    assert!(run.stdout.contains("Fill in data.train") || run.stderr.contains("Fill in data.train"));
    let config = toml(&bench, "new.toml");
    assert_eq!(config["lora"]["rank"].as_integer(), Some(8));
    assert_eq!(config["lora"]["use_dora"].as_bool(), Some(true));
    assert_eq!(config["model"]["path"].as_str(), Some("org/base"));

    bench.write(
        "sft.yaml",
        "model_name_or_path: org/base\nstage: sft\nfinetuning_type: lora\nquantization_bit: 4\nlora_rank: 4\nlora_target: q_proj,v_proj\n\
         dataset: identity,alpaca_en_demo\ntemplate: llama3\ncutoff_len: 1024\nmax_samples: 1000\nlearning_rate: 1.0e-4\n\
         num_train_epochs: 3.0\nlr_scheduler_type: cosine\nbf16: true\n",
    );
    let run = bench.ok(&["init", "--from", "sft.yaml", "sft.toml"]);
    assert!(
        run.stderr.contains("`dataset: identity,alpaca_en_demo` names entries of dataset_info.json"),
        "{}",
        run.stderr
    );
    let config = toml(&bench, "sft.toml");
    assert_eq!(config["lora"]["alpha"].as_float(), Some(8.0));
    assert_eq!(config["lora"]["target_modules"].to_string(), "[\"q_proj\", \"v_proj\"]");
    assert_eq!(
        (config["data"]["split"].as_str(), config["train"]["learning_rate"].as_float()),
        (Some("[:1000]"), Some(1e-4))
    );
    assert_eq!(config["quantization"]["compute_dtype"].as_str(), Some("bf16"));
}

#[test]
fn what_is_no_configuration_is_refused() {
    let bench = Bench::new();
    bench.write("other.yml", "a: 1\n");
    bench.write("broken.yml", "base_model: [\n");
    for (name, expected) in [
        ("other.yml", "is neither Axolotl's (base_model)"),
        ("broken.yml", "not valid YAML"),
        ("no.yml", "No such file"),
    ] {
        bench.fails(&["init", "--from", name, "new.toml"], 3, &[name, expected]);
    }
    // Given where ours is meant, it says how it becomes one.
    bench.write("axolotl.yml", AXOLOTL);
    bench.fails(&["train", "axolotl.yml"], 2, &["this is YAML", "qlora init --from axolotl.yml"]);
    bench.fails(
        &["train", "qlora.toml", "--data", "axolotl.yml"],
        3,
        &["is a configuration in YAML", "qlora init --from axolotl.yml"],
    );
}
