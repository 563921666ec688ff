//! Rows of single tokens in adapters: files, merging into tables that may grow, combinations.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use adapter_io::gguf::{GgmlType, export_lora_gguf};
use adapter_io::{
    Adapter, AdapterConfig, Checkpoint, Combination, HostTensor, MergeOptions, MergeReport, TokenIndices, combine,
    merge_checkpoint,
};
use common::{adapter_on, tensor};
use half::bf16;
use serde_json::{Value, json};

const EMBED: &str = "model.embed_tokens";
const ROWS: &str = "model.embed_tokens.token_adapter.trainable_tokens_delta";
const HEAD_ROWS: &str = "lm_head.token_adapter.trainable_tokens_delta";

fn indices(value: Value) -> Option<TokenIndices> {
    serde_json::from_value(value).unwrap()
}

/// An adapter with rows, and a linear layer as every adapter has one.
fn adapter(tokens: Value, entries: &[(&str, HostTensor)]) -> Adapter {
    let q = "model.layers.0.self_attn.q_proj";
    let (a, b) = (format!("{q}.lora_A.weight"), format!("{q}.lora_B.weight"));
    let linear = [(a.as_str(), tensor(&[2, 16], 0.0)), (b.as_str(), tensor(&[16, 2], 0.0))];
    let mut adapter = adapter_on(&[&linear, entries].concat());
    adapter.config.trainable_token_indices = indices(tokens);
    adapter
}

fn merge(base: &Path, adapter: &Adapter, out: &Path) -> Result<MergeReport, String> {
    merge_checkpoint(base, adapter, out, &MergeOptions::default(), &mut |_| {}).map_err(|e| e.to_string())
}

fn rows(dir: &Path, name: &str) -> Option<Vec<Vec<f32>>> {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let values = checkpoint.contains(name).then(|| checkpoint.tensor(name).unwrap().to_f32_vec().unwrap())?;
    Some(values.chunks(16).map(Into::into).collect())
}

fn config_of(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("config.json")).unwrap()).unwrap()
}

/// The model of `common`, its head tied or not, its sizes in a section or not.
fn base(dir: &Path, tied: bool, nested: bool) {
    common::model(dir);
    let mut config = config_of(dir);
    config["tie_word_embeddings"] = json!(tied);
    if nested {
        config["text_config"] = json!({"vocab_size": 32});
        config.as_object_mut().unwrap().remove("vocab_size");
    }
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    if tied {
        common::copy_head(dir);
    }
}

#[test]
fn the_configuration_and_the_tensors_survive_a_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    for (tokens, entries) in [
        (json!([31, 5]), vec![(ROWS, tensor(&[2, 16], 0.5))]),
        (
            json!({"embed_tokens": [1], "lm_head": [2, 0]}),
            vec![(ROWS, tensor(&[1, 16], 1.0)), (HEAD_ROWS, tensor(&[2, 16], 2.0))],
        ),
    ] {
        let adapter = adapter(tokens.clone(), &entries);
        adapter.save(dir.path()).unwrap();
        assert!(Adapter::load(dir.path()).unwrap() == adapter);
        let file: Value = serde_json::from_slice(&fs::read(dir.path().join("adapter_config.json")).unwrap()).unwrap();
        assert_eq!(file["trainable_token_indices"], tokens);
        assert_eq!(adapter.token_rows().unwrap().len(), entries.len());
        assert_eq!(adapter.saved_tensors().count(), 0, "rows are no tensors of the base");
    }
}

#[test]
fn rows_and_configuration_must_fit() {
    for (tokens, entries, says) in [
        (json!([1, 2]), vec![(ROWS, tensor(&[3, 16], 0.0))], "it has 3 rows, and trainable_token_indices names 2"),
        (json!([1, 1]), vec![(ROWS, tensor(&[2, 16], 0.0))], "names token 1 twice"),
        (json!([1]), vec![], "the file has no rows for them"),
        (json!({"lm_head": [1]}), vec![(ROWS, tensor(&[1, 16], 0.0))], "adapter module `lm_head`"),
        (json!(null), vec![(ROWS, tensor(&[1, 16], 0.0))], "names none for it"),
        (json!([1]), vec![(ROWS, tensor(&[1, 16], 0.0)), (HEAD_ROWS, tensor(&[1, 16], 1.0))], "names none for it"),
        (json!([1]), vec![(ROWS, tensor(&[16], 0.0))], "not two dimensions"),
        (
            json!([40]),
            vec![
                (ROWS, tensor(&[1, 16], 0.0)),
                ("model.embed_tokens.token_adapter.base_layer.weight", tensor(&[33, 16], 0.0)),
            ],
            "go up to token 40",
        ),
    ] {
        let adapter = adapter(tokens.clone(), &entries);
        let message = adapter.token_rows().unwrap_err().to_string();
        assert!(message.contains(says), "{tokens}: {message}");
        assert_eq!(adapter.save(tempfile::tempdir().unwrap().path()).unwrap_err().to_string(), message);
    }
    // A tied head's copy, and its name beside the embedding's, are as PEFT has them.
    let copies = [(ROWS, tensor(&[1, 16], 0.5)), (HEAD_ROWS, tensor(&[1, 16], 0.5))];
    assert_eq!(adapter(json!([1]), &copies).token_rows().unwrap()[0].module, EMBED);
    let both = adapter(json!({"embed_tokens": [1], "lm_head": [1]}), &copies[..1]);
    assert_eq!(both.token_rows().unwrap().len(), 1);
    for wrong in [json!("all"), json!([-1]), json!([1.5]), json!({"embed_tokens": 1}), json!([4294967296_u64])] {
        let text = json!({"trainable_token_indices": wrong}).to_string();
        let message = AdapterConfig::from_json(&text, Path::new("adapter_config.json")).unwrap_err().to_string();
        assert!(
            message.contains("trainable_token_indices") && message.contains("a list of token numbers"),
            "{message}"
        );
    }
}

#[test]
fn rows_take_their_places_in_both_tables_of_a_tied_model() {
    let folder = tempfile::tempdir().unwrap();
    let (base_dir, out) = (folder.path().join("base"), folder.path().join("out"));
    base(&base_dir, true, false);
    let old = rows(&base_dir, "model.embed_tokens.weight").unwrap();
    let report = merge(&base_dir, &adapter(json!([31, 5]), &[(ROWS, tensor(&[2, 16], 0.3))]), &out).unwrap();
    let new = rows(&out, "model.embed_tokens.weight").unwrap();
    let rounded = bf16::from_f32(0.3).to_f32();
    for (token, (old, new)) in old.iter().zip(&new).enumerate() {
        let expected = if [5, 31].contains(&token) { &vec![rounded; 16] } else { old };
        assert_eq!(new, expected, "{token}");
    }
    assert_eq!((report.untied, report.vocabulary), (false, None));
    assert_eq!(rows(&out, "lm_head.weight"), None, "an old copy of the tied head goes");
    assert_eq!(config_of(&out), config_of(&base_dir));

    // So do its rows where PEFT wrote them along.
    let copies = [(ROWS, tensor(&[2, 16], 0.3)), (HEAD_ROWS, tensor(&[2, 16], 0.3))];
    for tokens in [json!([31, 5]), json!({"embed_tokens": [31, 5], "lm_head": [31, 5]})] {
        let report = merge(&base_dir, &adapter(tokens, &copies), &out).unwrap();
        assert!(!report.untied && rows(&out, "model.embed_tokens.weight").unwrap() == new);
        assert_eq!(rows(&out, "lm_head.weight"), None);
    }

    // Rows of the head alone make it a table of its own.
    let head = adapter(json!({"lm_head": [3]}), &[(HEAD_ROWS, tensor(&[1, 16], 0.5))]);
    let report = merge(&base_dir, &head, &out).unwrap();
    assert!(report.untied && config_of(&out)["tie_word_embeddings"] == false);
    assert_eq!(rows(&out, "model.embed_tokens.weight").unwrap(), old);
    assert_eq!(rows(&out, "lm_head.weight").unwrap()[3], [0.5; 16]);
}

#[test]
fn tables_grow_with_the_vocabulary() {
    let mean = |table: &[Vec<f32>]| -> Vec<f32> {
        let column = |i| table.iter().map(|row| f64::from(row[i])).sum::<f64>() / table.len() as f64;
        (0..16).map(|i| bf16::from_f32(column(i) as f32).to_f32()).collect()
    };
    for nested in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let (base_dir, out) = (folder.path().join("base"), folder.path().join("out"));
        let size = |dir: &Path| match nested {
            true => config_of(dir)["text_config"]["vocab_size"].clone(),
            false => config_of(dir)["vocab_size"].clone(),
        };
        base(&base_dir, false, nested);
        let [embed, head] = ["model.embed_tokens.weight", "lm_head.weight"].map(|name| rows(&base_dir, name).unwrap());
        let of_both = [(ROWS, tensor(&[2, 16], 0.5)), (HEAD_ROWS, tensor(&[1, 16], 0.25))];
        let adapter = adapter(json!({"embed_tokens": [33, 0], "lm_head": [32]}), &of_both);
        let report = merge(&base_dir, &adapter, &out).unwrap();
        assert_eq!((report.untied, report.vocabulary, size(&out)), (false, Some(34), json!(34)));
        assert_eq!(config_of(&out).get("vocab_size").is_none(), nested);
        let new = rows(&out, "model.embed_tokens.weight").unwrap();
        assert_eq!((&new[1..32], &new[0], &new[33]), (&embed[1..], &vec![0.5; 16], &vec![0.5; 16]));
        assert_eq!(new[32], mean(&embed), "a row that nothing gives");
        let new = rows(&out, "lm_head.weight").unwrap();
        assert_eq!((&new[..32], &new[32], &new[33]), (&head[..], &vec![0.25; 16], &mean(&head)));

        // Whole tables that PEFT wrote along.
        let tables = [
            (ROWS, tensor(&[1, 16], 0.5)),
            ("model.embed_tokens.token_adapter.base_layer.weight", tensor(&[35, 16], 1.5)),
            ("lm_head.weight", tensor(&[35, 16], 2.5)),
        ];
        let report = merge(&base_dir, &self::adapter(json!([34]), &tables), &out).unwrap();
        assert_eq!((report.vocabulary, size(&out)), (Some(35), json!(35)));
        let new = rows(&out, "model.embed_tokens.weight").unwrap();
        assert_eq!((&new[33], &new[34]), (&vec![1.5; 16], &vec![0.5; 16]));
        assert_eq!(rows(&out, "lm_head.weight").unwrap(), vec![vec![2.5; 16]; 35]);
    }
}

#[test]
fn rows_that_have_no_place_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (base_dir, out) = (folder.path().join("base"), folder.path().join("out"));
    base(&base_dir, false, false);
    let far = adapter(json!([4_000_000_000_u32]), &[(ROWS, tensor(&[1, 16], 0.0))]);
    let message = merge(&base_dir, &far, &out).unwrap_err();
    assert!(message.contains("a row for token 4000000000") && message.contains("32 rows"), "{message}");
    let wide = adapter(json!([1]), &[(ROWS, tensor(&[1, 8], 0.0))]);
    let message = merge(&base_dir, &wide, &out).unwrap_err();
    assert!(message.contains("8 wide") && message.contains("[32, 16]"), "{message}");
    let twice =
        adapter(json!([1]), &[(ROWS, tensor(&[1, 16], 0.0)), ("model.embed_tokens.weight", tensor(&[32, 16], 0.0))]);
    let message = merge(&base_dir, &twice, &out).unwrap_err();
    assert!(message.contains("is adapted or replaced besides"), "{message}");
    assert!(!out.exists());

    let plain = adapter(json!([1]), &[(ROWS, tensor(&[1, 16], 0.0))]);
    let message =
        export_lora_gguf(&plain, &base_dir, &folder.path().join("x.gguf"), GgmlType::F16).unwrap_err().to_string();
    assert!(message.contains("trainable_token_indices") && message.contains("merge the adapter"), "{message}");
}

#[test]
fn of_several_adapters_one_may_have_rows() {
    let with = adapter(json!([5]), &[(ROWS, tensor(&[1, 16], 0.5))]);
    let without = adapter(json!(null), &[]);
    for how in [Combination::Cat, Combination::Linear, Combination::Svd { rank: None }] {
        let combined = combine(&[(&without, 0.5), (&with, 2.0)], how).unwrap();
        assert_eq!(combined.config.trainable_token_indices, with.config.trainable_token_indices);
        let rows = combined.token_rows().unwrap();
        assert_eq!(rows[0].rows.data, [0.5; 16], "rows are values and have no weight");
    }
    let message = combine(&[(&with, 1.0), (&with, 1.0)], Combination::Cat).unwrap_err().to_string();
    assert!(message.contains("trainable_token_indices") && message.contains("only one may"), "{message}");
}
