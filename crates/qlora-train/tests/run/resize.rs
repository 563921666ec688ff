//! `model.resize_embeddings`: tokens that were added to a tokenizer get rows, which are trained and saved.

use crate::common::{Notices, StopAfter, adapter, config, losses, refused, root, run, tensors};
use adapter_io::{MergeOptions, TokenIndices, merge_checkpoint};
use burn::tensor::{Device, FloatDType};
use qlora_layers::Pass;
use qlora_models::{Decoder, LoadOptions, ModelConfig};
use qlora_train::{Plan, Resume, Room, RowSizes, TrainConfig, resize};
use std::path::Path;

const ROWS: &str = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta";
const HEAD_ROWS: &str = "base_model.model.lm_head.token_adapter.trainable_tokens_delta";

/// The reference model in a folder of its own, whose tokenizer has more tokens; its head may be a table of its own.
fn extended(dir: &Path, added: &[&str], tied: bool) {
    let reference = root().join("testdata/reference/tiny-llama");
    std::fs::create_dir_all(dir).unwrap();
    for entry in reference.read_dir().unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
    }
    let edit = |name: &str, change: &dyn Fn(&mut serde_json::Value)| {
        let path = dir.join(name);
        let mut value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut value);
        std::fs::write(path, value.to_string()).unwrap();
    };
    edit("tokenizer.json", &|tokenizer| {
        let tokens = tokenizer["added_tokens"].as_array_mut().unwrap();
        for (id, content) in (4096..).zip(added) {
            tokens.push(serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}));
        }
    });
    if !tied {
        // Merging an adapter of the head alone gives it a table.
        let head = adapter_io::HostTensor::new(&[1, 256], vec![0.0; 256]).unwrap();
        let mut rows = tensors(&root().join("testdata/reference/adapters/plain"));
        rows.config.trainable_token_indices = Some(TokenIndices::ByModule([("lm_head".into(), vec![3])].into()));
        rows.tensors.insert(HEAD_ROWS.into(), head);
        let merged = dir.with_extension("untied");
        merge_checkpoint(dir, &rows, &merged, &MergeOptions::default(), &mut |_| {}).unwrap();
        std::fs::remove_dir_all(dir).unwrap();
        std::fs::rename(merged, dir).unwrap();
    }
}

/// A run over rows that hold the added tokens.
fn of(dir: &Path, tied: bool, added: &[&str]) -> TrainConfig {
    let model = dir.join("model");
    extended(&model, added, tied);
    let mut config = config(&dir.join("run"));
    let rows = std::fs::read_to_string(&config.data.train.0[0].path).unwrap();
    let rows: Vec<String> = rows
        .lines()
        .take(12)
        .map(|row| row.replace("Answer:", "<|answer|>").replacen("How", "<|ask|> How", 1))
        .collect();
    std::fs::write(dir.join("rows.jsonl"), rows.join("\n")).unwrap();
    config.data.train = dir.join("rows.jsonl").into();
    config.data.eval_fraction = 0.0;
    config.model.path = model.display().to_string();
    config.model.resize_embeddings = true;
    config.train.max_steps = Some(3);
    config
}

const ADDED: [&str; 2] = ["<|ask|>", "<|answer|>"];

#[test]
fn new_tokens_are_trained_saved_resumed_and_merged() {
    for tied in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let config = of(dir.path(), tied, &ADDED);
        let mut told = Notices::default();
        run(config.clone(), Resume::No, &mut told).unwrap();
        let tables = if tied { "the embedding" } else { "embedding and output head" };
        assert!(
            told.0.iter().any(|notice| notice.contains("added 2 rows")
                && notice.contains(tables)
                && notice.contains("4098 instead of 4096")
                && notice.contains("\"<|ask|>\" (4096), \"<|answer|>\" (4097)")),
            "{:?}",
            told.0
        );

        let out = &config.train.output_dir;
        let trained = tensors(&out.join("adapter"));
        let expected = match tied {
            true => TokenIndices::Embedding(vec![4096, 4097]),
            false => TokenIndices::ByModule(
                ["embed_tokens", "lm_head"].map(|name| (name.to_string(), vec![4096, 4097])).into(),
            ),
        };
        assert_eq!(trained.config.trainable_token_indices.as_ref(), Some(&expected));
        for key in [ROWS, HEAD_ROWS].into_iter().take(if tied { 1 } else { 2 }) {
            let rows = &trained.tensors[key];
            assert_eq!(rows.shape, [2, 256]);
            assert_ne!(rows.data[..256], rows.data[256..], "both began at the mean and went their ways: {key}");
        }
        assert_eq!(trained.tensors.contains_key(HEAD_ROWS), !tied);
        assert_eq!(trained.saved_tensors().count(), 0, "nothing else of the tables is saved");

        // Stopped and resumed, and with all activations kept: the same bits.
        let mut broken = config.clone();
        broken.train.output_dir = dir.path().join("broken");
        run(broken.clone(), Resume::No, &mut StopAfter(2)).unwrap();
        run(broken.clone(), Resume::Auto, &mut ()).unwrap();
        assert_eq!(losses(out), losses(&broken.train.output_dir));
        assert!(adapter(out) == adapter(&broken.train.output_dir), "tied: {tied}");
        let mut plain = config.clone();
        plain.train.output_dir = dir.path().join("plain");
        plain.train.activation_checkpointing = qlora_layers::ActivationCheckpointing::None.into();
        run(plain.clone(), Resume::No, &mut ()).unwrap();
        assert!(adapter(out) == adapter(&plain.train.output_dir), "tied: {tied}");

        // The adapter on the base, and merged into it, compute the same.
        let base = Path::new(&config.model.path);
        let merged = dir.path().join("merged");
        merge_checkpoint(base, &trained, &merged, &MergeOptions::default(), &mut |_| {}).unwrap();
        let shape = ModelConfig::from_dir(&merged).unwrap();
        assert_eq!((shape.vocab_size, shape.tie_word_embeddings), (4098, tied));
        let load = |dir: &Path| {
            let options = LoadOptions { quantization: None, dtype: FloatDType::F32 };
            Decoder::load(dir, options, &Device::flex(), &mut |_| {}).unwrap()
        };
        let mut model = load(base);
        model.load_adapter(&trained).unwrap();
        let ids = [1, 4096, 300, 4097];
        let logits =
            |model: &Decoder| -> Vec<f32> { model.forward(&ids, 1, Pass::INFERENCE).try_into_vec_as::<f32>().unwrap() };
        // The merged weights are bf16: half an ulp, 0.2 %, of each weight, of which logits of order 10 are made.
        let (found, expected) = (logits(&load(&merged)), logits(&model));
        let difference = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(found.len() == expected.len() && difference < 0.15, "tied: {tied}: {difference}");
    }
}

#[test]
fn only_the_configuration_adds_rows() {
    let dir = tempfile::tempdir().unwrap();
    let config = of(dir.path(), true, &ADDED);
    let mut without = config.clone();
    without.model.resize_embeddings = false;
    let message = refused(without.clone(), Resume::No);
    assert!(
        message.contains("\"<|ask|>\" has the id 4096") && message.contains("model.resize_embeddings = true"),
        "{message}"
    );

    run(config.clone(), Resume::No, &mut StopAfter(2)).unwrap();
    let message = refused(without, Resume::Auto);
    assert!(message.contains("model.resize_embeddings was true, now is absent"), "{message}");
    // Another tokenizer would give the moments to rows of other tokens.
    extended(&dir.path().join("model"), &["<|ask|>", "<|answer|>", "<|more|>"], true);
    let message = refused(config, Resume::Auto);
    assert!(message.contains("rows for other tokens"), "{message}");
}

#[test]
fn a_tokenizer_that_fits_adds_none_and_one_of_another_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = of(dir.path(), true, &[]);
    let tokenizer = chat_text::Tokenizer::from_dir(dir.path().join("model")).unwrap();
    let model = ModelConfig::from_dir(&dir.path().join("model")).unwrap();
    let resized = resize(&config, model.clone(), &tokenizer).unwrap();
    assert!(resized.notice.unwrap().contains("none were added"));
    assert_eq!((resized.model.vocab_size, resized.config.lora.trainable_token_indices), (4096, None));

    let mut small = model;
    small.vocab_size = 2000;
    let message = resize(&config, small, &tokenizer).unwrap_err().to_string();
    assert!(message.contains("another model's"), "{message}");
}

#[test]
fn the_plan_counts_what_is_trained() {
    for tied in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let config = of(dir.path(), tied, &ADDED);
        let model = ModelConfig::from_dir(&dir.path().join("model")).unwrap();
        let tokenizer = chat_text::Tokenizer::from_dir(dir.path().join("model")).unwrap();
        let on_cpu = Room { on_cpu: true, ..Room::default() };
        let plain = Plan::new(&config, &model, FloatDType::F32, &on_cpu, &RowSizes::default()).unwrap();
        let resized = resize(&config, model, &tokenizer).unwrap();
        let plan = Plan::new(&resized.config, &resized.model, FloatDType::F32, &on_cpu, &RowSizes::default()).unwrap();
        let tables = if tied { 1 } else { 2 };
        assert_eq!(plan.trainable_parameters - plain.trainable_parameters, tables * 2 * 256);
        assert_eq!(plan.base_parameters - plain.base_parameters, tables * 2 * 256);
    }
}
