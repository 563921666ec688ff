//! What other trainers say with several keys together: data sets, weights in 4 bits, evaluation.

use burn_qlora::adapter_io::printable::printable;
use burn_qlora::config::known_keys;
use burn_qlora::qlora_data::{Format, Source, Sources};
use serde_json::{Map, Value as Json};

use super::foreign::{Work, says_nothing};
use super::layouts;

/// What stands in place of a path where files are listed.
const LOADERS: [&str; 4] = ["json", "csv", "parquet", "text"];

/// Takes a template out of a table: Jinja, its file, or a name.
fn template_of(table: &mut Map<String, Json>) -> Option<String> {
    let name = layouts::text(table, "chat_template");
    layouts::text(table, "chat_template_jinja").or(name).filter(|said| !said.is_empty())
}

impl Work {
    /// What of Axolotl's configuration no table holds.
    pub(super) fn axolotl(&mut self, given: &mut Map<String, Json>) {
        let in_4_bits = self.take(given, "load_in_4bit").and_then(|value| value.as_bool());
        match self.take(given, "adapter").as_ref().and_then(Json::as_str) {
            Some("lora") if in_4_bits != Some(true) => {
                self.set("adapter", "quantization.quant_type", "\"none\"".into())
            }
            Some("lora" | "qlora") => {}
            Some(other) => {
                self.notes.push(format!("`adapter: {other}` is not known: LoRA over weights in 4 bits is trained"))
            }
            None => self
                .notes
                .push("without `adapter` all weights are trained there; here it is LoRA over weights in 4 bits".into()),
        }
        if self.take(given, "load_in_8bit").is_some_and(|value| value == true) {
            self.notes.push(
                "`load_in_8bit`: weights are kept in 4 bits (quantization.quant_type) or in 16 (\"none\")".into(),
            );
        }
        if let Some(packing) = self.take(given, "sample_packing").filter(|packing| !says_nothing(packing)) {
            match known_keys().iter().any(|key| key == "data.packing") {
                true => self.set("sample_packing", "data.packing", "\"auto\"".into()),
                false => self.notes.push(format!(
                    "`sample_packing: {packing}` has no counterpart here; data.group_by_length pads less"
                )),
            }
        }
        for key in ["pad_to_sequence_len", "eval_sample_packing", "strict"] {
            given.shift_remove(key);
        }
        // What the model derives from is in its config.json.
        given.retain(|key, _| !key.ends_with("_derived_model"));
        self.betas(given);
        if let Some(size) = self.take(given, "val_set_size").and_then(|size| size.as_f64()) {
            match size < 1.0 {
                true => self.set("val_set_size", "data.eval_fraction", format!("{size:?}")),
                false => {
                    self.notes.push(format!("`val_set_size: {size}` counts rows; data.eval_fraction is a part of them"))
                }
            }
        }
        if let Some(peft) = self.take(given, "peft") {
            match peft.get("loftq_config") {
                Some(_) => self.set("peft.loftq_config", "lora.init", "\"loftq\"".into()),
                None => self.notes.push("`peft` has no counterpart here".into()),
            }
        }
        for (key, ours) in [("datasets", "data.train"), ("test_datasets", "data.eval")] {
            let Some(Json::Array(list)) = self.take(given, key) else { continue };
            let sources: Vec<Source> = list.into_iter().flat_map(|entry| self.axolotl_source(key, entry)).collect();
            self.sources(key, ours, sources);
        }
        self.axolotl_template(given);
    }

    /// The template of conversations, which is one here for all data sets. A data set's own goes before the one of all.
    fn axolotl_template(&mut self, given: &mut Map<String, Json>) {
        let of_all = template_of(given);
        self.taken += usize::from(of_all.is_some());
        let own = std::mem::take(&mut self.templates);
        if own.is_empty() {
            if let Some(name) = of_all.filter(|name| name != "tokenizer_default") {
                let name: String = name.chars().take(60).collect();
                self.notes.push(format!(
                    "`chat_template: {}` is for conversations, and no data set is said to hold any; data.chat_template names one",
                    printable(&name)
                ));
            }
            return;
        }
        let mut said: Vec<String> =
            own.into_iter().map(|own| own.or_else(|| of_all.clone()).unwrap_or("tokenizer_default".into())).collect();
        said.dedup();
        self.chat_template(&said[0]);
        if said.len() > 1 {
            self.notes.push(format!(
                "data sets have {} chat templates; here there is one for all of them, the first",
                said.len()
            ));
        }
    }

    fn sources(&mut self, key: &str, ours: &str, sources: Vec<Source>) {
        if sources.is_empty() {
            return;
        }
        match toml::Value::try_from(Sources(sources)) {
            Ok(value) => self.set(key, ours, value.to_string()),
            Err(error) => self.notes.push(format!("`{key}`: {error}")),
        }
    }

    /// An entry of `datasets`.
    fn axolotl_source(&mut self, key: &str, entry: Json) -> Vec<Source> {
        let Json::Object(mut entry) = entry else {
            self.notes.push(format!("`{key}` has an entry that is no table"));
            return Vec::new();
        };
        let mut text = |key: &str| layouts::text(&mut entry, key);
        let Some(path) = text("path") else {
            self.notes.push(format!("`{key}` has an entry without a path"));
            return Vec::new();
        };
        let mut source =
            Source { subset: text("name"), split: text("split"), revision: text("revision"), ..Source::new(&path) };
        self.axolotl_layout(&path, &mut entry, &mut source);
        let own = template_of(&mut entry);
        if source.format == Some(Format::Chat) && key == "datasets" {
            self.templates.push(own);
        }
        let files: Vec<String> = match entry.shift_remove("data_files") {
            Some(Json::String(file)) => vec![file],
            Some(Json::Array(files)) => files.iter().filter_map(|file| file.as_str().map(str::to_owned)).collect(),
            _ => Vec::new(),
        };
        for known in ["ds_type", "trust_remote_code"] {
            entry.shift_remove(known);
        }
        entry.retain(|_, value| !says_nothing(value));
        let rest: Vec<_> = entry.keys().map(|name| format!("`{name}`")).collect();
        if !rest.is_empty() {
            self.notes.push(format!("{path}: {} of its entry in {key} have no counterpart here", rest.join(", ")));
        }
        match files.as_slice() {
            [] => vec![source],
            files if LOADERS.contains(&path.as_str()) => {
                files.iter().map(|file| Source { path: file.into(), split: None, ..source.clone() }).collect()
            }
            files => files.iter().map(|file| Source { files: Some(file.clone()), ..source.clone() }).collect(),
        }
    }

    /// What of LLaMA-Factory's configuration no table holds.
    pub(super) fn factory(&mut self, given: &mut Map<String, Json>) {
        let bits = self.take(given, "quantization_bit").and_then(|bits| bits.as_u64());
        match bits {
            Some(4) => {}
            None => self.set("quantization_bit", "quantization.quant_type", "\"none\"".into()),
            Some(bits) => self.notes.push(format!("`quantization_bit: {bits}`: weights are kept in 4 bits")),
        }
        for (key, usual) in [("finetuning_type", "lora"), ("stage", "sft"), ("quantization_method", "bnb")] {
            if let Some(value) = self.take(given, key).filter(|value| value != usual) {
                self.notes.push(format!(
                    "`{key}: {value}` has no counterpart here: LoRA is trained on rows and their answers"
                ));
            }
        }
        let rank = given.get("lora_rank").and_then(Json::as_f64).unwrap_or(8.0);
        if !given.contains_key("lora_alpha") {
            self.set("lora_alpha", "lora.alpha", format!("{:?}", 2.0 * rank));
        }
        match self.take(given, "lora_target") {
            None => {}
            Some(Json::String(all)) if all == "all" => {}
            Some(Json::String(names)) => {
                let names: Vec<_> = names.split(',').map(|name| format!("{:?}", name.trim())).collect();
                self.set("lora_target", "lora.target_modules", format!("[{}]", names.join(", ")));
            }
            Some(other) => self.notes.push(format!("`lora_target: {other}` is no list of names")),
        }
        if let Some(names) = self.take(given, "additional_target").as_ref().and_then(Json::as_str) {
            let names: Vec<_> = names.split(',').map(|name| format!("{:?}", name.trim())).collect();
            self.set("additional_target", "lora.modules_to_save", format!("[{}]", names.join(", ")));
        }
        if let Some(rows) = self.take(given, "max_samples").and_then(|rows| rows.as_u64()) {
            self.set("max_samples", "data.split", format!("\"[:{rows}]\""));
        }
        self.betas(given);
        for (key, ours) in [("dataset", "data.train"), ("eval_dataset", "data.eval")] {
            if let Some(names) = self.take(given, key) {
                let names = names.as_str().map_or_else(|| names.to_string(), str::to_owned);
                self.notes.push(format!(
                    "`{key}: {names}` names entries of dataset_info.json: put their files or hub ids into {ours}"
                ));
            }
        }
        if let Some(template) = self.take(given, "template").as_ref().and_then(Json::as_str) {
            self.notes.push(format!(
                "`template: {template}` is LLaMA-Factory's own; the tokenizer's template is used, or data.chat_template"
            ));
        }
        if let Some(folder) = self.take(given, "dataset_dir").as_ref().and_then(Json::as_str) {
            self.notes.push(format!("`dataset_dir: {folder}`: data.train has paths of its own"));
        }
    }
}
