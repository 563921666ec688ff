//! The value types of `adapter_config.json`, and how they are read and written.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::pattern::Pattern;

/// Which modules an adapter targets, or excludes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TargetModules {
    /// Names: a module matches when its path equals one or ends with `.` and one.
    List(Vec<String>),
    /// A regular expression that must match the whole path, or `all-linear`.
    Pattern(String),
}

/// How LoRA factors are initialised: PEFT's `true`/`false`, or the name of a method.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum InitLoraWeights {
    /// `true`: `lora_a` kaiming-uniform and `lora_b` zero. `false`: both random.
    Default(bool),
    /// `gaussian`, `pissa`, `olora`, `loftq`, `eva`, ...
    Method(String),
}

/// One value or a list of them: `layers_to_transform` and `layers_pattern` may be either.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// A single value.
    One(T),
    /// A list.
    Many(Vec<T>),
}

impl<T> From<Vec<T>> for OneOrMany<T> {
    fn from(values: Vec<T>) -> Self {
        Self::Many(values)
    }
}

impl<T> OneOrMany<T> {
    /// The values as a slice.
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(value) => std::slice::from_ref(value),
            Self::Many(values) => values,
        }
    }
}

/// Tokens whose rows are trained: `trainable_token_indices`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TokenIndices {
    /// Rows of the input embedding, and of an output head that is the same tensor.
    Embedding(Vec<u32>),
    /// Rows of modules, by the names that their paths end with: `embed_tokens`, `lm_head`.
    ByModule(BTreeMap<String, Vec<u32>>),
}

impl TokenIndices {
    /// Whether no token is named, which is the same as no key at all.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Embedding(tokens) => tokens.is_empty(),
            Self::ByModule(modules) => modules.values().all(Vec::is_empty),
        }
    }
}

/// How a field's value is read from JSON and written as Python would.
pub(crate) trait Field: Sized {
    fn read(value: Value) -> Result<Self, String>;
    fn write(&self) -> Value;
}

fn read<T: DeserializeOwned>(value: Value, expected: &str) -> Result<T, String> {
    let text = value.to_string();
    serde_json::from_value(value).map_err(|_| format!("expected {expected}, found {}", shortened(&text)))
}

fn shortened(text: &str) -> String {
    if text.chars().count() <= 60 { text.to_string() } else { text.chars().take(57).chain("...".chars()).collect() }
}

macro_rules! field {
    ($($type:ty: $expected:literal),* $(,)?) => { $(
        impl Field for $type {
            fn read(value: Value) -> Result<Self, String> {
                read(value, $expected)
            }
            fn write(&self) -> Value {
                // Strings, flags, whole numbers and lists of them: none can fail.
                serde_json::to_value(self).unwrap_or(Value::Null)
            }
        }
    )* };
}

field! {
    String: "a string",
    usize: "a whole number",
    Value: "any value",
    Option<Value>: "any value or null",
    Option<usize>: "a whole number or null",
    Option<String>: "a string or null",
    Option<Vec<String>>: "a list of strings or null",
    Option<TargetModules>: "a list of module names, a regular expression or null",
    Option<OneOrMany<String>>: "a string, a list of strings or null",
    Option<OneOrMany<usize>>: "a layer index, a list of them or null",
    Option<TokenIndices>: "a list of token numbers, an object of such lists by module or null",
}

impl Field for bool {
    fn read(value: Value) -> Result<Self, String> {
        // Python takes null for false.
        if value.is_null() { Ok(false) } else { read(value, "true or false") }
    }
    fn write(&self) -> Value {
        Value::from(*self)
    }
}

impl Field for InitLoraWeights {
    fn read(value: Value) -> Result<Self, String> {
        if value.is_null() { Ok(Self::Default(false)) } else { read(value, "true, false or the name of a method") }
    }
    fn write(&self) -> Value {
        match self {
            Self::Default(whether) => Value::from(*whether),
            Self::Method(name) => Value::from(name.as_str()),
        }
    }
}

impl Field for f64 {
    fn read(value: Value) -> Result<Self, String> {
        let x: f64 = read(value, "a number")?;
        if x.is_finite() { Ok(x) } else { Err(format!("{x} is not a finite number")) }
    }
    fn write(&self) -> Value {
        Value::from(*self)
    }
}

impl Field for Pattern {
    fn read(value: Value) -> Result<Self, String> {
        if value.is_null() {
            return Ok(Self::default());
        }
        let map: Map<String, Value> = read(value, "an object of module patterns")?;
        let entries = map.into_iter().map(|(key, v)| match v.as_f64() {
            Some(x) => Ok((key, x)),
            None => Err(format!("`{key}`: expected a number, found {}", shortened(&v.to_string()))),
        });
        entries.collect::<Result<_, _>>().map(Self)
    }
    fn write(&self) -> Value {
        Value::Object(self.0.iter().map(|(key, x)| (key.clone(), whole(*x))).collect())
    }
}

/// Ranks and alphas are whole numbers in PEFT and are written so.
pub(crate) fn whole(x: f64) -> Value {
    // 2^53: up to there a float holds every whole number.
    if x.fract() == 0.0 && x.abs() <= 9_007_199_254_740_992.0 { Value::from(x as i64) } else { Value::from(x) }
}
