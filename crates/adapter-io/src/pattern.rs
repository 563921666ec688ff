//! `rank_pattern` and `alpha_pattern`: values by regular expressions on module paths.
//!
//! PEFT asks every key about every module, `re.match(rf"(.*\.)?({key})$", path)`, and the first key that matches
//! counts. An adapter of experts may have a key for each of ten thousand modules, and a file of a stranger may have
//! as many expressions as it likes. So modules are asked together:
//!
//! - Keys that are plain text, whose dots stand for any letter or are escaped, are put into a tree by their letters
//!   from the last to the first. A path walks down from its own end and meets the keys that it ends with. Nearly all
//!   keys are of this kind.
//! - Each of the others is compiled once, asked about the modules that no earlier key has matched, and dropped: ten
//!   thousand compiled expressions would hold a gigabyte.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap};

use fancy_regex::Regex;

/// Values by regular expressions on module paths, in file order: `rank_pattern` and `alpha_pattern`.
///
/// A key matches a module path as the regex `(.*\.)?(key)$` from the start of the path; the first key
/// that matches counts.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Pattern(pub Vec<(String, f64)>);

impl FromIterator<(String, f64)> for Pattern {
    fn from_iter<I: IntoIterator<Item = (String, f64)>>(entries: I) -> Self {
        Self(entries.into_iter().collect())
    }
}

impl Pattern {
    /// For each module its value, or `None` where no key matches.
    ///
    /// # Errors
    /// The key that is not a valid regular expression, and why.
    pub fn lookup<S: AsRef<str>>(&self, modules: &[S]) -> Result<Vec<Option<f64>>, String> {
        let mut tree = Tree::default();
        let mut in_tree = vec![true; self.0.len()];
        for (index, (key, _)) in self.0.iter().enumerate() {
            match plain(key) {
                Some(letters) => tree.insert(&letters, index),
                None => in_tree[index] = false,
            }
        }
        // A path of other letters is no way down the tree: every key is an expression to it.
        let is_odd = |path: &S| !path.as_ref().bytes().all(is_letter);
        let odd: Vec<usize> = (0..modules.len()).filter(|&module| is_odd(&modules[module])).collect();
        let mut found: Vec<usize> = modules.iter().map(|path| tree.first(path.as_ref())).collect();
        odd.iter().for_each(|&module| found[module] = NONE);
        let all: Vec<usize> = (0..modules.len()).collect();
        for (index, (key, _)) in self.0.iter().enumerate() {
            let asked = if in_tree[index] { &odd } else { &all };
            let asked: Vec<usize> = asked.iter().copied().filter(|module| index < found[*module]).collect();
            if asked.is_empty() {
                continue;
            }
            let regex = compile(key)?;
            for module in asked {
                let matches = regex.is_match(modules[module].as_ref());
                if matches.map_err(|e| format!("`{key}` cannot be matched: {e}"))? {
                    found[module] = index;
                }
            }
        }
        Ok(found.into_iter().map(|index| self.0.get(index).map(|(_, value)| *value)).collect())
    }

    /// A pattern that says of modules under new names what this one says of them under their old ones: keys for those
    /// of which it says something else, before its own. `default` counts where no key matches.
    ///
    /// # Errors
    /// As [`Self::lookup`].
    pub(crate) fn renamed(&self, old: &[String], new: &[String], default: f64) -> Result<Self, String> {
        let wanted: Vec<f64> = self.lookup(old)?.into_iter().map(|value| value.unwrap_or(default)).collect();
        let mut renamed = self.clone();
        let mut named = BTreeSet::new();
        loop {
            let found = renamed.lookup(new)?;
            let before = named.len();
            named.extend((0..new.len()).filter(|&at| wanted[at] != found[at].unwrap_or(default)));
            if named.len() == before {
                return Ok(renamed);
            }
            // A key matches longer paths that end with it as well: theirs come first.
            let mut keys: Vec<(String, f64)> =
                named.iter().map(|&at| (fancy_regex::escape(&new[at]).into_owned(), wanted[at])).collect();
            keys.sort_by_key(|(key, _)| Reverse(key.len()));
            renamed = Self(keys.into_iter().chain(self.0.iter().cloned()).collect());
        }
    }

    /// Whether every key is a regular expression.
    ///
    /// # Errors
    /// The first key that is none, and why.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.0.iter().filter(|(key, _)| plain(key).is_none()).try_for_each(|(key, _)| compile(key).map(drop))
    }
}

fn compile(key: &str) -> Result<Regex, String> {
    #[cfg(test)]
    tests::COMPILED.with(|count| count.set(count.get() + 1));
    Regex::new(&format!(r"^(?:.*\.)?(?:{key})$")).map_err(|e| format!("`{key}` is not a valid pattern: {e}"))
}

/// What stands in a tree for any letter; paths have none of it.
const ANY: u8 = 0;

fn is_letter(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_-.".contains(&byte)
}

/// The letters of a key that is plain text, [`ANY`] for its dots; `None` for other keys.
fn plain(key: &str) -> Option<Vec<u8>> {
    let mut letters = Vec::with_capacity(key.len());
    let mut bytes = key.bytes();
    while let Some(byte) = bytes.next() {
        letters.push(match byte {
            b'.' => ANY,
            b'\\' => bytes.next().filter(|escaped| b".-".contains(escaped))?,
            _ if is_letter(byte) => byte,
            _ => return None,
        });
    }
    Some(letters)
}

/// The index of no key.
const NONE: usize = usize::MAX;

/// Keys by their letters from the last to the first.
struct Tree {
    /// From a node and a letter to the next node; 0 is the root.
    edges: HashMap<(usize, u8), usize>,
    /// For each node the first key that ends there.
    ends: Vec<usize>,
}

impl Default for Tree {
    fn default() -> Self {
        Self { edges: HashMap::new(), ends: vec![NONE] }
    }
}

impl Tree {
    fn insert(&mut self, letters: &[u8], index: usize) {
        let mut node = 0;
        for letter in letters.iter().rev() {
            node = *self.edges.entry((node, *letter)).or_insert_with(|| {
                self.ends.push(NONE);
                self.ends.len() - 1
            });
        }
        self.ends[node] = index.min(self.ends[node]);
    }

    /// The first of the keys that a path matches.
    fn first(&self, path: &str) -> usize {
        let mut found = NONE;
        let mut nodes = vec![0];
        for letter in path.bytes().rev() {
            // Before a key stands a dot, or nothing.
            if letter == b'.' {
                found = self.first_end(&nodes).min(found);
            }
            let next = |letter| nodes.iter().filter_map(move |node| self.edges.get(&(*node, letter)).copied());
            nodes = next(letter).chain(next(ANY)).collect();
        }
        self.first_end(&nodes).min(found)
    }

    fn first_end(&self, nodes: &[usize]) -> usize {
        nodes.iter().map(|node| self.ends[*node]).min().unwrap_or(NONE)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use proptest::prelude::*;

    use super::*;
    use crate::adapter::{A, Adapter, B, KEY_PREFIX};
    use crate::adapter_config::AdapterConfig;
    use crate::host_tensor::HostTensor;

    thread_local! {
        /// Expressions that this thread compiled.
        pub(super) static COMPILED: Cell<usize> = const { Cell::new(0) };
    }

    fn compiled(work: impl FnOnce()) -> usize {
        let before = COMPILED.get();
        work();
        COMPILED.get() - before
    }

    /// Every key asked about every path, one after the other.
    fn oracle(pattern: &Pattern, path: &str) -> Option<f64> {
        let matches = |key: &str| Regex::new(&format!(r"^(?:.*\.)?(?:{key})$")).unwrap().is_match(path).unwrap();
        pattern.0.iter().find(|(key, _)| matches(key)).map(|(_, value)| *value)
    }

    fn numbered<'k>(keys: impl IntoIterator<Item = &'k str>) -> Pattern {
        keys.into_iter().zip(0..).map(|(key, value)| (key.to_string(), f64::from(value))).collect()
    }

    const PATHS: [&str; 12] = [
        "q_proj",
        "model.layers.0.self_attn.q_proj",
        "a.b",
        "aXb",
        "x.aXb",
        "",
        "x",
        ".",
        "xa.b",
        "q-proj",
        "a\nq",
        "é.q",
    ];

    #[test]
    fn one_key_matches_as_its_regular_expression_does() {
        let keys = [
            "q_proj",
            "proj",
            "self_attn.q_proj",
            r"self_attn\.q_proj",
            "a.b",
            r"a\.b",
            ".",
            r"\.",
            "",
            "x",
            "q-proj",
            r"q\-proj",
            "0.q_proj",
            "....",
            "é.q",
            "q",
            "[qk]_proj",
            r"\w+",
            "(?<!n)q",
            r".*",
        ];
        for key in keys {
            let pattern = numbered([key]);
            let wanted: Vec<_> = PATHS.iter().map(|path| oracle(&pattern, path)).collect();
            assert_eq!(pattern.lookup(&PATHS).unwrap(), wanted, "`{key}`");
        }
    }

    proptest! {
        /// Which of several keys counts does not depend on which of them are plain.
        #[test]
        fn the_first_of_several_keys_counts(
            keys in prop::collection::vec(r"([ab.]|\\\.|\[ab\]|a\*){0,5}", 0..6),
            paths in prop::collection::vec("[ab.é]{0,7}", 0..6),
        ) {
            let pattern = numbered(keys.iter().map(String::as_str));
            let wanted: Vec<_> = paths.iter().map(|path| oracle(&pattern, path)).collect();
            prop_assert_eq!(pattern.lookup(&paths).unwrap(), wanted);
        }
    }

    #[test]
    fn a_module_under_a_new_name_keeps_its_value() {
        let pattern = numbered(["old.q", r".*x\.b", "new.r"]);
        let old = ["old.q", "old.r", "old.a.x.b", "old.c"].map(str::to_string);
        let new = ["new.q", "new.r", "new.a.y.b", "a.new.r"].map(str::to_string);
        let renamed = pattern.renamed(&old, &new, 9.0).unwrap();
        assert_eq!(renamed.lookup(&new).unwrap(), [Some(0.0), Some(9.0), Some(1.0), Some(9.0)]);
        // `a.new.r` would match the key of `new.r`, and is matched by its own.
        assert_eq!(
            renamed.0.iter().map(|(key, _)| key.as_str()).take(2).collect::<Vec<_>>(),
            [r"new\.a\.y\.b", r"a\.new\.r"]
        );
        assert_eq!(pattern.renamed(&old, &old, 9.0).unwrap(), pattern);
    }

    #[test]
    fn no_key_is_compiled_for_each_module() {
        let (keys, layers) = (200, 100);
        let tensor = |shape: [usize; 2]| HostTensor { shape: shape.to_vec(), data: vec![0.5; shape[0] * shape[1]] };
        let mut adapter = Adapter::new(AdapterConfig {
            rank_pattern: (0..keys).map(|key| (format!(r"layers\.{key}\.[a-z]+_proj"), 1.0)).collect(),
            alpha_pattern: (0..keys).map(|key| (format!(r"model\.layers\.{key}\.q_proj"), 2.0)).collect(),
            r: 2,
            ..AdapterConfig::default()
        });
        for layer in 0..layers {
            let path = format!("{KEY_PREFIX}model.layers.{layer}.q_proj");
            adapter.tensors.insert(format!("{path}{A}"), tensor([1, 3]));
            adapter.tensors.insert(format!("{path}{B}"), tensor([3, 1]));
        }
        let dir = tempfile::tempdir().unwrap();
        // To see that they are expressions, and to match them.
        assert!(compiled(|| adapter.save(dir.path()).unwrap()) <= 2 * keys);
        assert!(compiled(|| assert_eq!(Adapter::load(dir.path()).unwrap().tensors, adapter.tensors)) <= 2 * keys);
        assert!(compiled(|| assert!(adapter.lora_modules().unwrap().iter().all(|lora| lora.scaling == 2.0))) <= keys);
    }
}
