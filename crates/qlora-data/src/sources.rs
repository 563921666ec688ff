//! Where rows come from, as a configuration says it.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::value::{MapAccessDeserializer, StrDeserializer};
use serde::de::{Error as _, MapAccess, SeqAccess, Visitor};
use serde::ser::SerializeSeq;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::config::Format;
use crate::error::DataError;
use crate::mapping::Columns;
use crate::split::Split;
use crate::words::list;

/// The sources of a data set: one or several. Written as one is, or as a list.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sources(pub Vec<Source>);

/// Where rows come from: a file, a folder, a glob, or a data set of the hub. Written as its path alone, or as a table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// A file, a folder, a glob such as `rows/*.jsonl`, or a hub id such as `org/name`.
    pub path: PathBuf,
    /// How often an epoch visits each of its rows: 2 is twice, and with 0.25 a fourth of them is drawn, others every epoch.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub weight: f64,
    /// Layout of its rows; overrides that of `[data]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<Format>,
    /// What its columns are called; overrides `data.columns`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Columns>,
    /// The configuration of a data set of several; overrides `data.subset`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subset: Option<String>,
    /// Its split, or a part of one; overrides `data.split`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    /// Which files of a folder or of a data set of the hub are read: a glob, relative to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<String>,
    /// Branch, tag or commit of a data set of the hub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

fn one() -> f64 {
    1.0
}

fn is_one(weight: &f64) -> bool {
    *weight == 1.0
}

impl Source {
    /// All rows of a file, folder, glob or data set, each once an epoch.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            weight: 1.0,
            format: None,
            columns: None,
            subset: None,
            split: None,
            files: None,
            revision: None,
        }
    }

    /// Checks what can be without looking at files; `key` is the one of `[data]` that it stands under.
    pub(crate) fn validate(&self, key: &'static str) -> Result<(), DataError> {
        let path = self.path.display();
        let fail = |problem: String| Err(DataError::Config { key, problem });
        if self.path.as_os_str().is_empty() {
            return fail("has a source without a path; give a file, a folder, a glob or a hub id".into());
        }
        if !(self.weight > 0.0 && self.weight <= 1000.0) {
            return fail(format!(
                "gives {path} the weight {}; give a number above 0 and up to 1000, or leave the source out",
                self.weight
            ));
        }
        if key == "eval" && self.weight != 1.0 {
            return fail(format!("gives {path} a weight; evaluation rows are each read once, leave it out"));
        }
        if let Some(columns) = &self.columns {
            columns.validate().or_else(|problem| fail(format!("has for {path} columns that {problem}")))?;
        }
        if let Some(Err(problem)) = self.split.as_deref().map(str::parse::<Split>) {
            return fail(format!("has for {path} a split that {problem}"));
        }
        Ok(())
    }
}

impl Sources {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|source| source.path.as_os_str().is_empty())
    }

    /// Their paths, as they are given.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().map(|source| source.path.as_path())
    }
}

impl<P: Into<PathBuf>> From<P> for Sources {
    fn from(path: P) -> Self {
        Self(vec![Source::new(path)])
    }
}

/// Their paths, the first of many.
impl fmt::Display for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths: Vec<_> = self.paths().map(|path| path.display().to_string()).collect();
        f.write_str(&list(&paths))
    }
}

impl Serialize for Sources {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        /// A source, short where it can be.
        struct Short<'a>(&'a Source);
        impl Serialize for Short<'_> {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                match *self.0 == Source::new(&self.0.path) {
                    true => self.0.path.serialize(serializer),
                    false => self.0.serialize(serializer),
                }
            }
        }
        match self.0.as_slice() {
            [] => serializer.serialize_str(""),
            [only] if *only == Source::new(&only.path) => Short(only).serialize(serializer),
            // A list of one too: a key of the configuration is no table then.
            several => {
                let mut list = serializer.serialize_seq(Some(several.len()))?;
                several.iter().try_for_each(|source| list.serialize_element(&Short(source)))?;
                list.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for Sources {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Read { nested: false })
    }
}

/// Reads a source, or a list of them.
struct Read {
    nested: bool,
}

/// A source in a list.
struct Element(Source);

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut read = deserializer.deserialize_any(Read { nested: true })?;
        read.0.pop().map(Self).ok_or_else(|| D::Error::custom("a source is empty"))
    }
}

impl<'de> Visitor<'de> for Read {
    type Value = Sources;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.nested {
            true => "a path, or a table such as { path = \"rows.jsonl\", weight = 2.0 }",
            false => {
                "a path, a table such as { path = \"rows.jsonl\", split = \"train\" }, or a list of paths and tables"
            }
        })
    }

    fn visit_str<E: serde::de::Error>(self, path: &str) -> Result<Sources, E> {
        // The default, written out.
        if path.is_empty() && !self.nested {
            return Ok(Sources::default());
        }
        PathBuf::deserialize(StrDeserializer::<E>::new(path)).map(Sources::from)
    }

    fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<Sources, A::Error> {
        Source::deserialize(MapAccessDeserializer::new(table)).map(|source| Sources(vec![source]))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Sources, A::Error> {
        if self.nested {
            return Err(A::Error::invalid_type(serde::de::Unexpected::Seq, &self));
        }
        let mut sources = Vec::new();
        while let Some(Element(source)) = list.next_element()? {
            sources.push(source);
        }
        match sources.is_empty() {
            true => Err(A::Error::invalid_length(0, &self)),
            false => Ok(Sources(sources)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Data {
        train: Sources,
        rest: u8,
    }

    fn read(text: &str) -> Result<Sources, String> {
        let data: Result<Data, _> = toml::from_str(&format!("{text}\nrest = 1"));
        data.map(|data| data.train).map_err(|error| error.message().to_owned())
    }

    #[test]
    fn sources_are_paths_tables_and_lists_and_come_back_as_they_were() {
        let weighted = Source { weight: 2.0, split: Some("train[:5%]".into()), ..Source::new("org/name") };
        let columns = [("prompt", "q")].map(|(ours, theirs)| (ours.to_string(), theirs.to_string()));
        let renamed = Source { columns: Some(Columns(columns.into())), ..Source::new("b.csv") };
        let table = "{ path = \"org/name\", weight = 2, split = \"train[:5%]\" }";
        for (text, sources) in [
            ("train = \"a.jsonl\"".to_owned(), vec![Source::new("a.jsonl")]),
            ("train = [\"a.jsonl\"]".to_owned(), vec![Source::new("a.jsonl")]),
            (format!("train = {table}"), vec![weighted.clone()]),
            (format!("train = [\"a\", {table}]"), vec![Source::new("a"), weighted.clone()]),
            ("train = [{ path = \"b.csv\", columns = { prompt = \"q\" } }]".to_owned(), vec![renamed.clone()]),
        ] {
            let read = read(&text).unwrap();
            assert_eq!(read.0, sources, "{text}");
            let data = Data { train: read, rest: 1 };
            let again = toml::to_string_pretty(&data).unwrap();
            assert_eq!(toml::from_str::<Data>(&again).unwrap(), data, "{again}");
        }
        assert_eq!(
            toml::to_string(&Data { train: "a.jsonl".into(), rest: 1 }).unwrap(),
            "train = \"a.jsonl\"\nrest = 1\n"
        );
    }

    #[test]
    fn what_is_no_source_says_what_one_is() {
        for (text, expected) in [
            ("train = 3", "a path, a table such as"),
            ("train = []", "a list of paths and tables"),
            ("train = [[\"a\"]]", "a path, or a table such as { path"),
            ("train = { path = \"a\", wieght = 2 }", "unknown field `wieght`"),
            ("train = { weight = 2 }", "missing field `path`"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
