//! Typed access to an object of `config.json`, with errors that name file and key, and a record of the keys
//! that were read: a key that is not read may change the arithmetic.

use super::keys::{DROPOUTS, HARMLESS, may_compute};
use super::options::ConfigOptions;
use crate::ModelError;
use crate::family::{Only, Switch};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::Path;
use std::rc::Rc;

/// Keys that every family knows, with the only value that is covered.
const FIXED: &[(&str, Only)] = &[
    ("add_cross_attention", Only::Flag(false)),
    ("chunk_size_feed_forward", Only::Number(0.0)),
    ("is_encoder_decoder", Only::Flag(false)),
];

/// An object of `config.json`.
pub(super) struct Fields<'a> {
    path: &'a Path,
    map: &'a Map<String, Value>,
    prefix: String,
    options: &'a ConfigOptions,
    read: RefCell<BTreeSet<String>>,
    notes: Rc<RefCell<Vec<String>>>,
}

impl<'a> Fields<'a> {
    /// `prefix` goes before keys in messages.
    pub fn new(path: &'a Path, map: &'a Map<String, Value>, options: &'a ConfigOptions) -> Self {
        Self { path, map, prefix: String::new(), options, read: RefCell::default(), notes: Rc::default() }
    }

    /// What a user should know of keys that were passed over.
    pub fn notes(&self) -> Vec<String> {
        self.notes.borrow().clone()
    }

    /// The object under `key`.
    pub fn object(&self, key: &str) -> Result<Option<Fields<'a>>, ModelError> {
        let open = |value: &'a Value| match value.as_object() {
            Some(map) => Ok(Fields {
                path: self.path,
                map,
                prefix: format!("{}{key}.", self.prefix),
                options: self.options,
                read: RefCell::default(),
                notes: self.notes.clone(),
            }),
            None => Err(self.error(key, "is not a JSON object")),
        };
        self.get(key).map(open).transpose()
    }

    pub fn error(&self, key: &str, problem: impl Into<String>) -> ModelError {
        ModelError::Field { path: self.path.into(), field: format!("{}{key}", self.prefix), problem: problem.into() }
    }

    /// The value of `key`; `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.read.borrow_mut().insert(key.into());
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Takes keys for read that mean nothing beside one that was.
    pub fn take_note_of(&self, keys: &[&str]) {
        self.read.borrow_mut().extend(keys.iter().map(ToString::to_string));
    }

    /// Whether `key` is there with the value `null`, which may mean something else than its absence.
    pub fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// The keys.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.map.keys().map(String::as_str)
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>, ModelError> {
        let read = |value: &Value| match value.as_f64() {
            Some(number) if number.is_finite() && number > 0.0 => Ok(number),
            _ => Err(self.error(key, format!("is {value}; expected a positive number"))),
        };
        self.get(key).map(read).transpose()
    }

    pub fn need(&self, key: &str) -> Result<f64, ModelError> {
        self.number(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    pub fn size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let read = |value: &Value| match value.as_u64() {
            // 2^32 bounds every product of two sizes well within u64.
            Some(number) if (1..=u64::from(u32::MAX)).contains(&number) => Ok(number as usize),
            _ => Err(self.error(key, format!("is {value}; expected a positive integer"))),
        };
        self.get(key).map(read).transpose()
    }

    /// A size that has to be there unless there is a default.
    pub fn required(&self, key: &str, default: Option<usize>) -> Result<usize, ModelError> {
        self.size(key)?.or(default).ok_or_else(|| self.error(key, "is missing"))
    }

    /// A number of modules, which is looked at before anything is allocated for each.
    pub fn bounded(&self, key: &str, number: usize, most: usize) -> Result<usize, ModelError> {
        match number <= most {
            true => Ok(number),
            false => Err(self.error(key, format!("is {number}; at most {most} are supported"))),
        }
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        let read = |value: &Value| {
            value.as_bool().ok_or_else(|| self.error(key, format!("is {value}; expected true or false")))
        };
        self.get(key).map(read).transpose()
    }

    pub fn switch(&self, switch: Switch) -> Result<bool, ModelError> {
        match switch {
            Switch::On => Ok(true),
            Switch::Off => Ok(false),
            Switch::Key(key) => Ok(self.flag(key)?.unwrap_or(false)),
            Switch::Unless(key) => Ok(self.flag(key)?.unwrap_or(true)),
        }
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        let read =
            |value: &'a Value| value.as_str().ok_or_else(|| self.error(key, format!("is {value}; expected text")));
        self.get(key).map(read).transpose()
    }

    /// A list whose entries `read` takes.
    pub fn list<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, ModelError> {
        let wrong = |value: &Value| self.error(key, format!("is {value}; expected a list of {expected}"));
        let entries = |value: &'a Value| {
            let list = value.as_array().ok_or_else(|| wrong(value))?;
            list.iter().map(|entry| read(entry).ok_or_else(|| wrong(entry))).collect()
        };
        self.get(key).map(entries).transpose()
    }

    /// Checks keys of which one value is covered.
    pub fn fixed(&self, keys: &[(&str, Only)]) -> Result<(), ModelError> {
        for (key, only) in FIXED.iter().chain(keys) {
            let Some(value) = self.get(key) else { continue };
            let (fits, expected) = match only {
                Only::Flag(flag) => (value.as_bool() == Some(*flag), flag.to_string()),
                Only::Number(number) => (value.as_f64() == Some(*number), number.to_string()),
                Only::Text(text) => (value.as_str() == Some(*text), format!("\"{text}\"")),
                Only::Null => (false, "null".into()),
            };
            if !fits {
                return Err(self.error(key, format!("is {value}; only {expected} is supported")));
            }
        }
        Ok(())
    }

    /// Looks at the keys that were not read. Those that mean nothing to what is computed pass, with a note where they are in no
    /// list; so do those that were accepted by name. Any other is refused: it may change what the model computes.
    pub fn nothing_left(&self, harmless: &[&str]) -> Result<(), ModelError> {
        let read = self.read.borrow();
        let known = |key: &str| read.contains(key) || HARMLESS.contains(&key) || harmless.contains(&key);
        for (key, value) in self.map.iter().filter(|(key, value)| !value.is_null() && !known(key)) {
            let name = format!("{}{key}", self.prefix);
            let note = match value.as_f64() {
                Some(0.0) if DROPOUTS.contains(&key.as_str()) => continue,
                Some(rate) if DROPOUTS.contains(&key.as_str()) && (0.0..1.0).contains(&rate) => {
                    format!(
                        "is {rate}: the base computes without this dropout here, in training too; lora.dropout is the adapter's"
                    )
                }
                _ if self.options.accept_keys.contains(&name) => {
                    format!("is {value}, which means nothing here: passed over, as was asked for")
                }
                _ if !may_compute(key) => {
                    format!("is {value}, which is not known here and says nothing about what is computed: passed over")
                }
                _ => {
                    return Err(self.error(
                        key,
                        format!(
                            "is {value}; this key is not known for this model type, and it may change what the model computes. \
                             If it does not, accept it: --accept-key {name}, or model.accept_keys"
                        ),
                    ));
                }
            };
            self.notes.borrow_mut().push(format!("{}: `{name}` {note}", self.path.display()));
        }
        Ok(())
    }
}
