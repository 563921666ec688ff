//! Tests of the configuration: the template, mistakes and their messages, overrides.

#![allow(clippy::unwrap_used)]

use qlora_layers::{ActivationCheckpointing, Initialization, TargetModules};

use super::*;

fn message(text: &str) -> String {
    TrainConfig::parse(text, "qlora.toml").unwrap_err().to_string()
}

fn range_message(key: &str, value: &str) -> String {
    let mut config = valid();
    config.set(key, value).unwrap();
    config.validate().unwrap_err().to_string()
}

fn valid() -> TrainConfig {
    let mut config = TrainConfig::default();
    config.set("model.path", "model").unwrap();
    config.set("data.train", "train.jsonl").unwrap();
    config.validate().unwrap();
    config
}

#[test]
fn template_parses_to_the_defaults() {
    let template = TrainConfig::parse(TEMPLATE, "template").unwrap();
    let defaults = TrainConfig::default();
    assert_eq!(template.to_toml().unwrap(), defaults.to_toml().unwrap());
}

/// With every commented key switched on, the template sets exactly the keys that exist.
#[test]
fn template_holds_every_key_and_no_other() {
    let all: String = TEMPLATE
        .lines()
        .map(|line| {
            let key = line.strip_prefix("# ").filter(|rest| {
                let word = rest.split(" = ").next().unwrap_or_default();
                rest.contains(" = ") && word.chars().all(|c| c.is_lowercase() || c == '_')
            });
            format!("{}\n", key.unwrap_or(line))
        })
        .collect();
    TrainConfig::parse(&all, "template").unwrap();
    let table: toml::Table = all.parse().unwrap();
    let mut keys: Vec<String> = table
        .iter()
        .flat_map(|(name, value)| match value.as_table() {
            Some(section) => section.keys().map(|key| format!("{name}.{key}")).collect(),
            None => vec![name.clone()],
        })
        .collect();
    let mut known = known_keys();
    keys.sort();
    known.sort();
    assert_eq!(keys, known);
}

#[test]
fn every_key_survives_writing_and_reading() {
    let mut config = valid();
    for (key, value) in [
        ("device", "cuda:1"),
        ("model.revision", "main"),
        ("quantization.quant_type", "none"),
        ("quantization.skip_modules", "[\"down_proj\"]"),
        ("quantization.sensitive", "keep"),
        ("lora.exclude_modules", "[\"down_proj\"]"),
        ("lora.layers_to_transform", "[0, 2]"),
        ("lora.rank_pattern", "{ q_proj = 4, \"layers\\\\.0\\\\..*\" = 2 }"),
        ("lora.alpha_pattern", "{ q_proj = 8 }"),
        ("lora.layers_pattern", "[\"layers\"]"),
        ("lora.use_dora", "true"),
        ("lora.modules_to_save", "[\"norm\"]"),
        ("lora.init", "pissa_niter_16"),
        ("lora.loftq_iterations", "5"),
        ("lora.eva_rho", "1.5"),
        ("data.system_prompt", "Be brief."),
        ("train.max_steps", "7"),
        ("train.warmup_steps", "3"),
        ("train.schedule", "cosine_with_restarts"),
        ("train.min_learning_rate_ratio", "0.1"),
        ("train.cycles", "3"),
        ("train.decay_ratio", "0.25"),
        ("train.decay_shape", "sqrt"),
        ("train.lora_plus_ratio", "16"),
        ("train.embedding_learning_rate", "1e-5"),
        ("train.neftune_alpha", "5"),
        ("train.weight_decay_of", "{ vectors = 0.0, lora_b = 0.1 }"),
        ("train.log_to", "[\"tensorboard\", \"mlflow\", \"trackio\"]"),
        ("eval.prompts", "[\"1 + 1?\"]"),
        ("eval.max_new_tokens", "8"),
        ("train.optimizer", "lion_8bit"),
        ("train.optimizer_budget", "512MiB"),
    ] {
        config.set(key, value).unwrap();
    }
    let text = config.to_toml().unwrap();
    let again = TrainConfig::parse(&text, "again").unwrap();
    assert_eq!(again.to_toml().unwrap(), text);
    let ranks = [("q_proj".to_string(), 4), ("layers\\.0\\..*".to_string(), 2)];
    assert_eq!(again.lora.rank_pattern, ranks);
    assert_eq!(again.lora.init, Initialization::Pissa { iterations: Some(16) });
    assert_eq!(again.train.max_steps, Some(7));
    assert!(again.quantization.quant_config().is_none());
}

#[test]
fn policies_are_read_by_their_names() {
    let mut config = valid();
    for policy in ActivationCheckpointing::ALL {
        config.set("train.activation_checkpointing", policy.name()).unwrap();
        assert_eq!(config.train.activation_checkpointing, policy.into());
    }
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest_name() {
    let cases = [
        (
            "[train]\n\nlearning_rat = 1.0\n",
            "qlora.toml:3: unknown key `train.learning_rat`; did you mean `learning_rate`?",
        ),
        ("[lora]\nrnak = 8\n", "qlora.toml:2: unknown key `lora.rnak`; did you mean `rank`?"),
        ("[lora]\nr = 8\n", "qlora.toml:2: unknown key `lora.r`; did you mean `rank`?"),
        ("[lora]\nlr = 8\n", "qlora.toml:2: unknown key `lora.lr`; did you mean `learning_rate` in [train]?"),
        ("[model]\nrank = 8\n", "qlora.toml:2: unknown key `model.rank`; did you mean `rank` in [lora]?"),
        (
            "learning_rate = 1.0\n",
            "qlora.toml:1: unknown key `learning_rate`; did you mean `learning_rate` in [train]?",
        ),
        ("[trian]\nepochs = 1\n", "qlora.toml:1: unknown key `trian`; did you mean the section [train]?"),
        (
            "[train]\ndevice = \"cpu\"\n",
            "qlora.toml:2: unknown key `train.device`; did you mean `device`, above all sections?",
        ),
        (
            "[model]\ntelescope = 1\n",
            "qlora.toml:2: unknown key `model.telescope`; `qlora init` writes a file with every key",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(message(text), expected);
    }
}

#[test]
fn a_wrong_type_is_named_with_line_and_key() {
    let text = message("[lora]\nalpha = 16\nrank = \"big\"\n");
    assert!(text.starts_with("qlora.toml:3: lora.rank: invalid type"), "{text}");
    let text = message("[quantization]\nquant_type = \"nf5\"\n");
    assert!(text.starts_with("qlora.toml:2: quantization.quant_type: unknown variant `nf5`"), "{text}");
    let text = message("[lora]\ninit = \"svd\"\n");
    assert!(text.starts_with("qlora.toml:2: lora.init: unknown initialisation `svd`, expected default"), "{text}");
    let text = message("[train]\nbetas = [0.9, \"x\"]\n");
    assert!(text.starts_with("qlora.toml:2: train.betas: invalid type"), "{text}");
    let text = message("[train]\noptimizer = \"adam\"\n");
    assert!(text.starts_with("qlora.toml:2: train.optimizer: unknown variant `adam`"), "{text}");
    assert!(text.contains("adamw_8bit"), "{text}");
    let text = message("[train]\noptimizer_budget = \"lots\"\n");
    assert!(text.starts_with("qlora.toml:2: train.optimizer_budget: memory budget `lots` can't be read"), "{text}");
    let text = message("train = 3\n");
    assert!(text.starts_with("qlora.toml:1: `train` is a section"), "{text}");
    let text = message("[train\n");
    assert!(text.starts_with("qlora.toml:1: "), "{text}");
    let text = message("[lora]\ntarget_modules = 3\n");
    assert!(text.starts_with("qlora.toml:2: lora.target_modules: "), "{text}");
}

#[test]
fn a_missing_file_is_named() {
    let error = TrainConfig::load(Path::new("no/such/qlora.toml")).unwrap_err();
    assert!(error.to_string().contains("no/such/qlora.toml"), "{error}");
}

#[test]
fn values_out_of_range_name_the_key_and_what_is_allowed() {
    let cases = [
        ("device", "gpu", "device = gpu: must be auto, cpu, cuda, cuda:1 (the second card), vulkan or metal"),
        ("lora.rank", "0", "lora.rank = 0: must be from 1 to 65536; common ranks are 8 to 128"),
        ("lora.dropout", "1.0", "lora.dropout = 1: must be at least 0 and below 1"),
        ("lora.loftq_iterations", "0", "lora.loftq_iterations = 0: must be at least 1"),
        ("lora.eva_rho", "0.5", "lora.eva_rho = 0.5: must be at least 1"),
        ("lora.layers_pattern", "[\"h\"]", "lora.layers_pattern = [\"h\"]: does nothing without layers_to_transform"),
        ("quantization.blocksize", "48", "quantization.blocksize = 48: must be a power of two from 32 to 4096"),
        ("quantization.blocksize", "16", "quantization.blocksize = 16: must be a power of two from 32 to 4096"),
        ("train.batch_size", "0", "train.batch_size = 0: must be 1 or more"),
        ("train.learning_rate", "nan", "train.learning_rate = NaN: must be above 0 and finite as a 32-bit number"),
        ("train.betas", "[0.9, 1.0]", "train.betas = 1: must be from 0 to below 1, both"),
        ("train.warmup_ratio", "1.5", "train.warmup_ratio = 1.5: must be from 0 to below 1"),
        ("train.max_grad_norm", "-1", "train.max_grad_norm = -1: must be a finite number, 0 or more"),
        ("train.log_every", "0", "train.log_every = 0: must be 1 or more"),
        ("train.decay_ratio", "0", "train.decay_ratio = 0: must be above 0 and at most 1"),
        ("train.cycles", "2", "train.cycles = 2: needs train.schedule = \"cosine_with_restarts\""),
        (
            "train.min_learning_rate_ratio",
            "0.1",
            "train.min_learning_rate_ratio = 0.1: needs a train.schedule that falls to a floor: linear, a cosine or warmup_stable_decay",
        ),
        ("train.min_learning_rate_ratio", "1.5", "train.min_learning_rate_ratio = 1.5: must be from 0 to 1"),
        ("train.weight_decay_of", "{ vectors = -1 }", "train.weight_decay_of = -1: must be a finite number, 0 or more"),
        (
            "eval.prompts",
            "[\"hi\"]",
            "eval.prompts = [1 prompts]: are answered at evaluations: set data.eval or data.eval_fraction",
        ),
        ("eval.max_new_tokens", "0", "eval.max_new_tokens = 0: must be 1 or more"),
    ];
    for (key, value, expected) in cases {
        assert_eq!(range_message(key, value), expected);
    }
    for (key, value) in [
        ("train.gradient_accumulation_steps", "0"),
        ("train.epochs", "0"),
        ("train.max_steps", "0"),
        ("train.weight_decay", "-0.1"),
        ("train.eps", "0"),
        ("train.cycles", "0"),
        ("train.lora_plus_ratio", "0"),
        ("train.embedding_learning_rate", "-1e-5"),
        ("train.neftune_alpha", "-5"),
        ("train.output_dir", ""),
    ] {
        let text = range_message(key, value);
        assert!(text.contains(key) && text.contains(": must be "), "{text}");
    }
}

#[test]
fn settings_that_exclude_each_other_are_refused() {
    for (settings, says) in [
        ([("lora.lora_bias", "true"), ("lora.use_dora", "true")], "lora.lora_bias = true: cannot be combined"),
        ([("lora.lora_bias", "true"), ("lora.init", "pissa")], "lora.lora_bias = true: needs init"),
        (
            [("lora.target_modules", ".*q_proj"), ("lora.layers_to_transform", "[1]")],
            "lora.layers_to_transform = [1]: cannot be used",
        ),
    ] {
        let mut config = valid();
        settings.iter().for_each(|(key, value)| config.set(key, value).unwrap());
        let text = config.validate().unwrap_err().to_string();
        assert!(text.starts_with(says), "{text}");
    }
}

#[test]
fn the_model_is_required() {
    let mut config = valid();
    config.model.path.clear();
    let text = config.validate().unwrap_err().to_string();
    assert!(text.starts_with("model.path is not set"), "{text}");
}

#[test]
fn overrides_take_toml_values_and_bare_words() {
    let mut config = TrainConfig::default();
    config.set("train.learning_rate", "1e-4").unwrap();
    config.set("train.epochs", "3").unwrap();
    config.set("train.output_dir", "7").unwrap();
    config.set("device", "cuda:1").unwrap();
    config.set("data.shuffle", "false").unwrap();
    config.set("lora.target_modules", "[\"q_proj\", \"v_proj\"]").unwrap();
    assert_eq!(config.train.learning_rate, 1e-4);
    assert_eq!(config.train.epochs, 3.0);
    assert_eq!(config.train.output_dir, Path::new("7"));
    assert_eq!(config.device, "cuda:1");
    assert!(!config.data.shuffle);
    match &config.lora.target_modules {
        TargetModules::Names(names) => assert_eq!(names, &["q_proj", "v_proj"]),
        other => panic!("{other}"),
    }
}

#[test]
fn a_wrong_override_says_so_and_changes_nothing() {
    let mut config = TrainConfig::default();
    let before = config.to_toml().unwrap();
    let text = config.set("train.learning_rte", "1").unwrap_err().to_string();
    assert_eq!(text, "override train.learning_rte=1: unknown key `train.learning_rte`; did you mean `learning_rate`?");
    let text = config.set("learning_rate", "1").unwrap_err().to_string();
    assert!(text.ends_with("did you mean `learning_rate` in [train]?"), "{text}");
    let text = config.set("train.batch_size", "many").unwrap_err().to_string();
    assert!(text.starts_with("override train.batch_size=many: invalid type"), "{text}");
    let text = config.set("train.batch_size", "-1").unwrap_err().to_string();
    assert!(text.starts_with("override train.batch_size=-1: invalid value"), "{text}");
    let text = config.set("train", "1").unwrap_err().to_string();
    assert!(text.contains("unknown key `train`"), "{text}");
    assert_eq!(config.to_toml().unwrap(), before);
}

/// Relative paths are kept as they stand, whatever the folder of the file: they start at the
/// current directory, as they do in a flag.
#[test]
fn relative_paths_start_at_the_current_directory() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("qlora.toml");
    std::fs::write(&file, "[model]\npath = \"a/model\"\n[train]\noutput_dir = \"out\"\n").unwrap();
    let config = TrainConfig::load(&file).unwrap();
    assert_eq!(config.model.path, "a/model");
    assert_eq!(config.train.output_dir, Path::new("out"));
}

#[test]
fn steps_come_from_epochs_unless_max_steps_says_otherwise() {
    let mut train = RunConfig { batch_size: 4, gradient_accumulation_steps: 2, epochs: 2.5, ..RunConfig::default() };
    assert_eq!(train.total_steps(33), 13); // 5 steps an epoch, the last of them short; 12.5 rounds up
    assert_eq!(train.total_steps(1), 3);
    train.max_steps = Some(4);
    assert_eq!(train.total_steps(33), 4);
    assert_eq!(train.warmup_steps_of(100), 3);
    assert_eq!(train.warmup_steps_of(10), 1);
    train.warmup_steps = Some(0);
    assert_eq!(train.warmup_steps_of(100), 0);
    assert_eq!(train.learning_rate_at(0, 100), train.learning_rate);
}

/// Of the patterns the first that matches counts, so their order is part of the configuration.
#[test]
fn patterns_keep_the_order_of_the_file() {
    let text = "[lora]\nrank_pattern = { zeta = 1, alpha = 2 }\n[lora.alpha_pattern]\ny = 1.0\nx = 2.0\n";
    let mut config = TrainConfig::parse(text, "qlora.toml").unwrap();
    let names = |config: &TrainConfig| -> Vec<String> {
        let ranks = config.lora.rank_pattern.iter().map(|(name, _)| name.clone());
        ranks.chain(config.lora.alpha_pattern.iter().map(|(name, _)| name.clone())).collect()
    };
    assert_eq!(names(&config), ["zeta", "alpha", "y", "x"]);
    config.set("train.epochs", "2").unwrap();
    assert_eq!(names(&config), ["zeta", "alpha", "y", "x"]);
    config.set("lora.rank_pattern", "{ m = 3, b = 4, n = 5 }").unwrap();
    assert_eq!(names(&config), ["m", "b", "n", "y", "x"]);
    let again = TrainConfig::parse(&config.to_toml().unwrap(), "again").unwrap();
    assert_eq!(names(&again), ["m", "b", "n", "y", "x"]);
}

#[test]
fn configurations_of_other_trainers_are_recognised() {
    let dir = tempfile::tempdir().unwrap();
    for (name, text, expected) in [
        ("axolotl.yml", "base_model: a/b\n", "this is YAML"),
        ("config.toml", "# Mine\n\nbase_model: a/b\nadapter: qlora\n", "this is YAML"),
        ("config", "---\nbase_model: a/b\n", "this is YAML"),
        ("adapter_config.json", "{\n  \"peft_type\": \"LORA\"\n}\n", "a PEFT adapter's configuration"),
    ] {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        let error = TrainConfig::load(&path).unwrap_err().to_string();
        let command = format!("`qlora init --from {} qlora.toml`", path.display());
        assert!(error.contains(expected) && error.contains(&command), "{error}");
    }
    let ours = dir.path().join("ours.toml");
    std::fs::write(&ours, "device = \"cpu\"\n[model]\npath = \"a: b\"\n").unwrap();
    assert_eq!(TrainConfig::load(&ours).unwrap().model.path, "a: b");
}

#[test]
fn sources_come_back_from_a_written_configuration() {
    let mut config = valid();
    config
        .set("data.train", "[\"a.jsonl\", { path = \"org/name\", weight = 0.5, columns = { prompt = \"q\" } }]")
        .unwrap();
    config.set("data.columns", "{ completion = \"answer\" }").unwrap();
    config.set("data.split", "train[:5%]").unwrap();
    config.validate().unwrap();
    let again = TrainConfig::parse(&config.to_toml().unwrap(), "again").unwrap();
    assert_eq!(again.data, config.data);
    assert_eq!(again.data.train.to_string(), "a.jsonl and org/name");
    assert!(
        range_message("data.train", "[{ path = \"a\", weight = -1 }]").contains("data.train gives a the weight -1")
    );
    let error = message("[data]\ntrain = [{ path = \"a\", wieght = 2 }]\n");
    assert!(error.contains("qlora.toml:2: data.train: unknown field `wieght`"), "{error}");
}
