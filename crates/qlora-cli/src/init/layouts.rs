//! Axolotl's layouts of rows (`datasets[].type`; docs.axolotl.ai/docs/dataset-formats).

use burn_qlora::qlora_data::{Columns, Format, Source};
use serde_json::{Map, Value as Json};

use super::foreign::{Work, says_nothing};

/// A name, our layout, our keys with the file's columns, and what is to be known.
type Layout = (&'static str, Format, &'static [(&'static str, &'static str)], &'static str);

const OTHER_WORDS: &str = "its rows are written with Alpaca's prompt here, and with another one there";
const CUT: &str = "texts beyond data.max_length are cut here, and go on in another row there";

/// What is one of ours.
const LAYOUTS: [Layout; 14] = [
    ("alpaca", Format::Alpaca, &[], ""),
    ("alpaca_instruct", Format::Alpaca, &[], ""),
    ("gpteacher", Format::Alpaca, &[("output", "response")], ""),
    ("oasst", Format::Alpaca, &[("instruction", "INSTRUCTION"), ("output", "RESPONSE")], ""),
    ("alpaca_chat", Format::Alpaca, &[], OTHER_WORDS),
    ("alpaca_chat.load_qa", Format::Alpaca, &[("instruction", "question"), ("output", "answer")], OTHER_WORDS),
    ("alpaca_chat.load_concise", Format::Alpaca, &[], OTHER_WORDS),
    (
        "alpaca_chat.load_camel_ai",
        Format::Alpaca,
        &[("instruction", "message_1"), ("output", "message_2")],
        OTHER_WORDS,
    ),
    ("alpaca_w_system", Format::Alpaca, &[], OTHER_WORDS),
    (
        "alpaca_w_system.load_open_orca",
        Format::Alpaca,
        &[("system", "system_prompt"), ("instruction", "question"), ("output", "response")],
        OTHER_WORDS,
    ),
    ("metharme", Format::PromptCompletion, &[("completion", "generation")], ""),
    ("completion", Format::Text, &[], CUT),
    ("pretrain", Format::Text, &[], CUT),
    ("user_defined", Format::Alpaca, &[], OTHER_WORDS),
];

/// What has a prompt of its own there, by what names begin with.
const OWN_PROMPTS: [&str; 11] = [
    "jeopardy",
    "reflection",
    "explainchoice",
    "concisechoice",
    "summarizetldr",
    "context_qa",
    "creative_acr",
    "orcamini",
    "pygmalion",
    "llama2_chat",
    "alpaca",
];

/// What trains on something else than answers, by what names begin with.
const OTHER_TRAINING: [&str; 6] = ["dpo", "kto", "orpo", "bradley_terry", "stepwise_supervised", "ebft"];

/// Names of roles that rows of ShareGPT's layout may have.
const ROLES: [(&str, &[&str]); 4] = [
    ("user", &["human", "user"]),
    ("assistant", &["gpt", "chatgpt", "bot", "model", "assistant"]),
    ("system", &["system"]),
    ("tool", &["tool", "observation", "function_response", "tool_response"]),
];

/// Columns of an entry that are not called as usual.
#[derive(Default)]
struct Renamed(Columns);

impl Renamed {
    fn add(&mut self, ours: &str, theirs: Option<String>, usual: &str) {
        if let Some(theirs) = theirs.filter(|theirs| theirs != usual) {
            self.0.0.insert(ours.to_owned(), theirs);
        }
    }
}

impl Work {
    /// How an entry's rows are read: its keys that say so are taken.
    pub(super) fn axolotl_layout(&mut self, path: &str, entry: &mut Map<String, Json>, source: &mut Source) {
        let mut columns = Renamed::default();
        let kind = entry.shift_remove("type");
        columns.add("system", text(entry, "field_system"), "system");
        columns.add("tools", text(entry, "field_tools"), "tools");
        match kind {
            None => {}
            Some(Json::Null) => self.notes.push(format!(
                "{path}: an empty `type` are rows of token ids, which are not read here: give their texts"
            )),
            Some(Json::Object(fields)) => {
                source.format = Some(Format::Alpaca);
                self.prompt_of_fields(path, fields, &mut columns);
            }
            Some(Json::String(kind)) => source.format = self.named_layout(path, &kind, entry, &mut columns),
            Some(kind) => self.unknown_layout(path, &kind.to_string(), "is not known"),
        }
        source.columns = Some(columns.0).filter(|columns| !columns.is_empty());
    }

    fn named_layout(
        &mut self,
        path: &str,
        kind: &str,
        entry: &mut Map<String, Json>,
        columns: &mut Renamed,
    ) -> Option<Format> {
        if kind == "chat_template" || kind.starts_with("sharegpt") {
            messages(kind, entry, columns);
            return Some(Format::Chat);
        }
        if let Some((_, format, renamed, note)) = LAYOUTS.iter().find(|(name, ..)| *name == kind) {
            renamed.iter().for_each(|(ours, theirs)| columns.add(ours, Some((*theirs).to_owned()), ours));
            if *format == Format::Text {
                columns.add("text", text(entry, "field").or(text(entry, "text_column")), "text");
            }
            if !note.is_empty() {
                self.notes.push(format!("{path}: `type: {kind}`: {note}"));
            }
            return Some(*format);
        }
        let begins = |names: &[&str]| names.iter().any(|name| kind.starts_with(name));
        let why = match kind {
            "input_output" => {
                "has pieces of text, each learned or not; here rows of `prompt` and `completion`, or of `messages`, say what is learned"
            }
            kind if kind.starts_with("alpaca:") => {
                self.notes.push(format!("{path}: `type: {kind}`: {OTHER_WORDS}"));
                return Some(Format::Alpaca);
            }
            _ if begins(&OWN_PROMPTS) => {
                "has a prompt of its own there; here rows of `prompt` and `completion` hold it as it is to be written"
            }
            _ if begins(&OTHER_TRAINING) => {
                "is trained on preferences or rewards there; here rows are trained on their answers"
            }
            _ => "is not known",
        };
        self.unknown_layout(path, kind, why);
        None
    }

    fn unknown_layout(&mut self, path: &str, kind: &str, why: &str) {
        self.notes.push(format!("{path}: `type: {kind}` {why}; the layout is found by its rows' keys"));
    }

    /// A prompt that the configuration describes.
    fn prompt_of_fields(&mut self, path: &str, mut fields: Map<String, Json>, columns: &mut Renamed) {
        for (theirs, ours) in [
            ("field_instruction", "instruction"),
            ("field_input", "input"),
            ("field_output", "output"),
            ("field_system", "system"),
        ] {
            columns.add(ours, text(&mut fields, theirs), ours);
        }
        fields.retain(|_, value| !says_nothing(value));
        if !fields.is_empty() {
            let names: Vec<_> = fields.keys().map(|name| format!("`{name}`")).collect();
            self.notes.push(format!(
                "{path}: {} have no counterpart here: its rows are written with Alpaca's prompt; rows of `prompt` and `completion` are written as \
                 they are",
                names.join(", ")
            ));
        }
    }
}

/// Takes a text out of a table.
pub(super) fn text(entry: &mut Map<String, Json>, key: &str) -> Option<String> {
    match entry.shift_remove(key) {
        Some(Json::String(text)) => Some(text),
        _ => None,
    }
}

/// Columns of conversations.
fn messages(kind: &str, entry: &mut Map<String, Json>, columns: &mut Renamed) {
    let list = text(entry, "field_messages");
    let (role, content) = (text(entry, "message_field_role"), text(entry, "message_field_content"));
    let mapping = entry.shift_remove("message_property_mappings");
    let mapped = |key: &str| mapping.as_ref()?.get(key)?.as_str().map(str::to_owned);
    let (role, content) = (role.or(mapped("role")), content.or(mapped("content")));
    // ShareGPT's names are known by themselves.
    let sharegpt = list.as_deref() == Some("conversations") || (list.is_none() && kind.starts_with("sharegpt"));
    let [list_key, role_key, content_key] =
        if sharegpt { ["conversations", "from", "value"] } else { ["messages", "role", "content"] };
    columns.add(list_key, list, list_key);
    columns.add("messages.role", role, role_key);
    columns.add("messages.content", content, content_key);
    // What is learned there when nothing is said, and here always; and what messages are known to say by themselves.
    entry.retain(|key, value| {
        let usual = match key.as_str() {
            "roles_to_train" => *value == serde_json::json!(["assistant"]) || *value == serde_json::json!(["gpt"]),
            "train_on_eos" | "train_on_eot" => *value == "turn",
            "message_field_training" => *value == "train" || *value == "weight",
            "roles" => value.as_object().is_some_and(|roles| roles.iter().all(|role| is_usual(role, sharegpt))),
            "conversation" => true,
            _ => false,
        };
        !usual
    });
}

/// Whether a role has the names by which it is known here.
fn is_usual((role, names): (&String, &Json), sharegpt: bool) -> bool {
    let known = ROLES.iter().find(|(known, _)| known == role).map(|(_, names)| *names);
    let mut names = names.as_array().into_iter().flatten().filter_map(Json::as_str);
    names.all(|name| name == role || (sharegpt && known.is_some_and(|known| known.contains(&name))))
}
