//! `data.columns`: what the columns of a file are called that a layout has other names for.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::source::Object;
use crate::visible;

/// The keys that layouts know.
const KEYS: [&str; 15] = [
    "messages",
    "conversations",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "system",
    "history",
    "tools",
    "chat_template_kwargs",
    "text",
    "chosen",
    "rejected",
    "label",
];

/// Keys of messages, under the lists that hold them.
const OF_MESSAGES: [(&str, &str); 2] = [("messages.role", "role"), ("messages.content", "content")];

/// Lists of messages.
const LISTS: [&str; 6] = ["messages", "conversations", "prompt", "completion", "chosen", "rejected"];

/// What columns are called: a key of a layout, and the column that it is read from. `messages.role` and `messages.content` name the keys
/// of messages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Columns(pub BTreeMap<String, String>);

impl Columns {
    /// Whether every key is read from the column of its own name.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The error ends a sentence that begins with the columns.
    pub(crate) fn validate(&self) -> Result<(), String> {
        for (ours, theirs) in &self.0 {
            if !KEYS.contains(&ours.as_str()) && OF_MESSAGES.iter().all(|(key, _)| key != ours) {
                let known = KEYS.iter().chain(OF_MESSAGES.iter().map(|(key, _)| key)).copied();
                return Err(format!(
                    "fill `{ours}`, which no layout has; on the left stands one of {}, and on the right the file's column",
                    known.collect::<Vec<_>>().join(", ")
                ));
            }
            let whole = self.0.iter().filter(|(key, column)| KEYS.contains(&key.as_str()) && *column == theirs);
            if KEYS.contains(&ours.as_str()) && whole.count() > 1 {
                return Err(format!("read `{theirs}` twice; a column can fill one key"));
            }
        }
        Ok(())
    }

    /// What a column of a file is for.
    pub(crate) fn key_of<'a>(&'a self, column: &'a str) -> &'a str {
        self.0.iter().find(|(_, theirs)| *theirs == column).map_or(column, |(ours, _)| ours)
    }
}

/// What came of an object's columns, in words.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Renamed {
    /// Keys that were in the way of others.
    pub unread: Vec<String>,
    /// Columns that it does not have.
    pub missing: Vec<String>,
}

/// Columns on their way into objects, and whether any had them.
pub(crate) struct Renaming<'a> {
    columns: &'a Columns,
    /// Our key, the file's column, whether a row had it.
    whole: Vec<(&'a str, &'a str, AtomicBool)>,
    /// The same of messages.
    of_messages: Vec<(&'a str, &'a str, AtomicBool)>,
}

impl<'a> Renaming<'a> {
    pub fn new(columns: &'a Columns) -> Self {
        let entry = |ours: &'a str, theirs: &'a String| (ours, theirs.as_str(), AtomicBool::new(false));
        let whole = columns.0.iter().filter(|(ours, _)| KEYS.contains(&ours.as_str()));
        let of_messages = OF_MESSAGES.iter().filter_map(|(key, ours)| Some(entry(ours, columns.0.get(*key)?)));
        let (whole, of_messages) = (whole.map(|(ours, theirs)| entry(ours, theirs)).collect(), of_messages.collect());
        Self { columns, whole, of_messages }
    }

    /// What was asked for.
    pub fn columns(&self) -> &'a Columns {
        self.columns
    }

    /// Gives the columns of an object the names that layouts have for them.
    pub fn apply(&self, object: &mut Object) -> Renamed {
        let taken = |(_, theirs, was_seen): &(&str, &str, AtomicBool)| {
            let value = object.shift_remove(*theirs);
            if value.is_some() {
                was_seen.store(true, Ordering::Relaxed);
            }
            value
        };
        // All are taken before any is put back: two columns may change their names.
        let values: Vec<_> = self.whole.iter().map(taken).collect();
        let Renamed { mut unread, mut missing } = Renamed::default();
        for ((ours, theirs, _), value) in self.whole.iter().zip(values) {
            let was_there = object.shift_remove(*ours);
            if was_there.is_some_and(|value| !value.is_null()) {
                unread.push(format!("`{ours}` (data.columns reads it from `{}`)", visible::text(theirs)));
            }
            match value {
                Some(value) => drop(object.insert((*ours).to_owned(), value)),
                None => missing
                    .push(format!("data.columns reads `{ours}` from `{}`, which it lacks", visible::text(theirs))),
            }
        }
        if !self.of_messages.is_empty() {
            for list in LISTS {
                if let Some(Json::Array(messages)) = object.get_mut(list) {
                    messages.iter_mut().for_each(|message| self.rename_in(message, list == "conversations"));
                }
            }
        }
        Renamed { unread, missing }
    }

    /// ShareGPT's conversations have names of their own, and for roles too.
    fn rename_in(&self, message: &mut Json, sharegpt: bool) {
        let Json::Object(message) = message else { return };
        for (ours, theirs, was_seen) in &self.of_messages {
            if let Some(value) = message.shift_remove(*theirs) {
                was_seen.store(true, Ordering::Relaxed);
                let ours = match (*ours, sharegpt) {
                    ("role", true) => "from",
                    ("content", true) => "value",
                    (ours, _) => ours,
                };
                message.insert(ours.to_owned(), value);
            }
        }
    }

    /// The columns that no object had, in words.
    pub fn unseen(&self) -> Vec<String> {
        let of = |entries: &[(&str, &str, AtomicBool)], whose: &str| -> Vec<String> {
            let unseen = entries.iter().filter(|(_, _, was_seen)| !was_seen.load(Ordering::Relaxed));
            unseen.map(|(_, theirs, _)| format!("`{}`{whose}", visible::text(theirs))).collect()
        };
        let mut unseen = of(&self.whole, "");
        unseen.extend(of(&self.of_messages, " of messages"));
        unseen
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn columns(pairs: &[(&str, &str)]) -> Columns {
        Columns(pairs.iter().map(|(ours, theirs)| ((*ours).to_owned(), (*theirs).to_owned())).collect())
    }

    fn renamed(columns: &Columns, object: Json) -> (Json, Vec<String>, Vec<String>) {
        let Json::Object(mut object) = object else { panic!("an object") };
        let renaming = Renaming::new(columns);
        let unread = renaming.apply(&mut object).unread;
        (Json::Object(object), unread, renaming.unseen())
    }

    #[test]
    fn columns_get_the_names_of_keys() {
        let given = columns(&[("prompt", "completion"), ("completion", "prompt")]);
        let swapped = renamed(&given, json!({"prompt": 1, "completion": 2}));
        assert_eq!(swapped, (json!({"completion": 1, "prompt": 2}), vec![], vec![]));

        let given = columns(&[("output", "answer"), ("system", "sytem")]);
        let (object, unread, unseen) = renamed(&given, json!({"instruction": 1, "output": 2, "answer": 3}));
        assert_eq!(object, json!({"instruction": 1, "output": 3}));
        assert_eq!(unread, ["`output` (data.columns reads it from `answer`)"]);
        assert_eq!(unseen, ["`sytem`"]);
    }

    #[test]
    fn messages_have_names_too() {
        let given = columns(&[("messages", "dialog"), ("messages.role", "who"), ("messages.content", "says")]);
        let (object, ..) = renamed(&given, json!({"dialog": [{"who": "user", "says": "a"}]}));
        assert_eq!(object, json!({"messages": [{"role": "user", "content": "a"}]}));
        let given = columns(&[("conversations", "dialog"), ("messages.role", "who"), ("messages.content", "says")]);
        let (object, ..) = renamed(&given, json!({"dialog": [{"who": "gpt", "says": "a"}]}));
        assert_eq!(object, json!({"conversations": [{"from": "gpt", "value": "a"}]}));
    }

    #[test]
    fn a_key_that_no_layout_has_is_refused() {
        let error = columns(&[("question", "prompt")]).validate().unwrap_err();
        assert!(error.contains("`question`") && error.contains("messages.role"), "{error}");
        assert!(columns(&[("prompt", "a"), ("completion", "a")]).validate().unwrap_err().contains("twice"));
        assert!(columns(&[("prompt", "a"), ("messages.role", "from")]).validate().is_ok());
    }
}
