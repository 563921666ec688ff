//! What the tests of data sets share: the reference tokenizer, rows in a file, what of them is learned.
#![allow(dead_code)] // Each test file uses a part.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use chat_text::Tokenizer;
use qlora_data::{DataConfig, Dataset, Example, LoadOptions, MASKED_LABEL, load_rows_with};

pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

pub fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| Tokenizer::from_dir(repository().join("testdata/reference/tiny-llama")).unwrap())
}

/// Reads a text as a file of rows; the error without the folder's name.
pub fn load_text(text: &str, config: &DataConfig) -> Result<Dataset, String> {
    load_text_with(text, config, &LoadOptions::default())
}

pub fn load_text_with(text: &str, config: &DataConfig, options: &LoadOptions<'_>) -> Result<Dataset, String> {
    load_file("rows.jsonl", text.as_bytes(), config, options)
}

/// Reads bytes as a file of this name.
pub fn load_file(name: &str, bytes: &[u8], config: &DataConfig, options: &LoadOptions<'_>) -> Result<Dataset, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    load_rows_with(&path, config, tokenizer(), options).map_err(|e| {
        let message = e.to_string();
        message.replace(&dir.path().display().to_string(), "")
    })
}

/// The warnings of a text's rows, without the file's name.
pub fn warnings(text: &str, config: &DataConfig) -> Vec<String> {
    let dataset = load_text(text, config).unwrap();
    let warnings = dataset.report.warnings().into_iter();
    warnings.map(|warning| warning.split_once("rows.jsonl: ").unwrap().1.to_owned()).collect()
}

/// The text of the tokens that the loss counts, and of all tokens.
pub fn labelled(example: &Example) -> (String, String) {
    assert_eq!(example.input_ids.len(), example.labels.len());
    let counted: Vec<u32> = example
        .labels
        .iter()
        .zip(&example.input_ids)
        .filter(|(label, _)| **label != MASKED_LABEL)
        .map(|(label, id)| {
            assert_eq!(*label, i64::from(*id));
            *id
        })
        .collect();
    let decode = |ids: &[u32]| tokenizer().decode(ids, false).unwrap();
    (decode(&counted), decode(&example.input_ids))
}

pub fn config() -> DataConfig {
    DataConfig::default()
}
