//! What other trainers say with several keys together: data sets, weights in 4 bits, evaluation.

use burn_qlora::config::known_keys;
use burn_qlora::qlora_data::{Columns, Format, Source, Sources};
use serde_json::{Map, Value as Json};

use super::foreign::{Work, says_nothing};

/// What stands in place of a path where files are listed.
const LOADERS: [&str; 4] = ["json", "csv", "parquet", "text"];

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
        let mut text = |key: &str| entry.shift_remove(key).and_then(|value| value.as_str().map(str::to_owned));
        let Some(path) = text("path") else {
            self.notes.push(format!("`{key}` has an entry without a path"));
            return Vec::new();
        };
        let mut source =
            Source { subset: text("name"), split: text("split"), revision: text("revision"), ..Source::new(&path) };
        let mut columns = Columns::default();
        let mut column = |ours: &str, theirs: Option<String>, usual: &str| {
            if let Some(theirs) = theirs.filter(|theirs| theirs != usual) {
                columns.0.insert(ours.to_owned(), theirs);
            }
        };
        let messages = text("field_messages");
        let (role, content) = (text("message_field_role"), text("message_field_content"));
        let (field, system) = (text("field"), text("field_system"));
        let mapping = entry.shift_remove("message_property_mappings");
        let mapped = |key: &str| mapping.as_ref()?.get(key)?.as_str().map(str::to_owned);
        let (role, content) = (role.or(mapped("role")), content.or(mapped("content")));
        match entry.shift_remove("type") {
            Some(Json::String(kind)) if kind == "chat_template" || kind.starts_with("sharegpt") => {
                source.format = Some(Format::Chat);
                // ShareGPT's names are known by themselves.
                let sharegpt = messages.as_deref() == Some("conversations");
                let (list, role_key, content_key) =
                    if sharegpt { ("conversations", "from", "value") } else { ("messages", "role", "content") };
                column(list, messages, list);
                column("messages.role", role, role_key);
                column("messages.content", content, content_key);
            }
            Some(Json::String(kind)) if kind == "alpaca" => source.format = Some(Format::Alpaca),
            Some(Json::String(kind)) if kind == "completion" => {
                source.format = Some(Format::Text);
                column("text", field, "text");
            }
            Some(Json::Object(mut fields)) => {
                source.format = Some(Format::Alpaca);
                for (theirs, ours) in
                    [("field_instruction", "instruction"), ("field_input", "input"), ("field_output", "output")]
                {
                    column(ours, fields.shift_remove(theirs).and_then(|value| value.as_str().map(str::to_owned)), ours);
                }
                column(
                    "system",
                    fields.shift_remove("field_system").and_then(|value| value.as_str().map(str::to_owned)),
                    "system",
                );
                fields.retain(|_, value| !says_nothing(value));
                if !fields.is_empty() {
                    let names: Vec<_> = fields.keys().map(|name| format!("`{name}`")).collect();
                    self.notes.push(format!(
                        "{path}: {} have no counterpart here: its rows are written with Alpaca's prompt",
                        names.join(", ")
                    ));
                }
            }
            Some(kind) => {
                self.notes.push(format!("{path}: `type: {kind}` is not known; the layout is found by its rows' keys"))
            }
            None => {}
        }
        column("system", system, "system");
        source.columns = Some(columns).filter(|columns| !columns.is_empty());
        let files: Vec<String> = match entry.shift_remove("data_files") {
            Some(Json::String(file)) => vec![file],
            Some(Json::Array(files)) => files.iter().filter_map(|file| file.as_str().map(str::to_owned)).collect(),
            _ => Vec::new(),
        };
        for known in ["ds_type", "trust_remote_code"] {
            entry.shift_remove(known);
        }
        // What is learned there when nothing is said, and here always.
        entry.retain(|key, value| {
            let usual = match key.as_str() {
                "roles_to_train" => *value == serde_json::json!(["assistant"]),
                "train_on_eos" => *value == "turn",
                _ => false,
            };
            !usual && !says_nothing(value)
        });
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
