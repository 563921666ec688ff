//! What of a JSON schema is compiled: bounded, before anything recursive sees it.
//!
//! `llguidance` compiles a schema by recursion, through what its `$ref`s lead to as well, and writes a definition out
//! wherever it is merged with something beside it. A chain of references would take any stack, and definitions that
//! double each other any memory; neither ends in an error that could be caught. Both are bounded here, and what is
//! within the bounds is compiled on a thread with a stack that they fit into.

use std::collections::HashMap;

use serde_json::{Map, Value as Json};

/// Objects and arrays in each other at most, those that `$ref`s lead to among them. A level takes less than 4 KB of
/// stack.
const MOST_LEVELS: usize = 2048;

/// Bytes of the stack of a thread that compiles: eight times what [`MOST_LEVELS`] take.
const STACK: usize = 64 << 20;

/// Subschemas of a schema at most, counted each time that one is written out.
const MOST_WRITTEN: u64 = 200_000;

/// Keys that say nothing about what is valid: with these alone beside it, a reference is merged with nothing.
const ANNOTATIONS: [&str; 15] = [
    "$anchor",
    "$comment",
    "$defs",
    "$id",
    "$schema",
    "contentEncoding",
    "contentMediaType",
    "default",
    "definitions",
    "description",
    "examples",
    "id",
    "readOnly",
    "title",
    "writeOnly",
];

/// Does what recurses through a schema, on a stack that is large enough.
///
/// # Errors
/// There is no such thread, or the work panics.
pub(super) fn on_large_stack<T: Send>(work: impl FnOnce() -> Result<T, String> + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("schema".into()).stack_size(STACK);
        match thread.spawn_scoped(scope, work) {
            Ok(thread) => thread.join().unwrap_or_else(|_| Err("it made the compiler of schemas fail".into())),
            Err(error) => Err(format!("no thread to compile it with: {error}")),
        }
    })
}

/// Whether a schema is within the bounds.
///
/// # Errors
/// The text says which bound it is beyond.
pub(super) fn check(schema: &Json) -> Result<(), String> {
    let targets = targets(schema);
    let levels: usize = levels(schema) + targets.iter().map(|(_, target)| levels(target)).sum::<usize>();
    if levels > MOST_LEVELS {
        return Err(format!(
            "it may nest {levels} levels deep, counted through its {} references; {MOST_LEVELS} are the most",
            targets.len()
        ));
    }
    let count = on_large_stack(|| {
        let mut written = Written { targets: targets.iter().copied().collect(), known: HashMap::new() };
        let all = std::iter::once(schema).chain(targets.iter().map(|(_, target)| *target));
        Ok(all.fold(0, |sum: u64, part| sum.saturating_add(written.count(part, false).subschemas)))
    })?;
    if count > MOST_WRITTEN {
        return Err(format!(
            "it has more than {MOST_WRITTEN} subschemas, where those that are merged with others are written out"
        ));
    }
    Ok(())
}

/// What the references of a schema lead to. Where subschemas have identifiers of their own, each reference may lead
/// anywhere.
fn targets(schema: &Json) -> Vec<(&str, &Json)> {
    let (mut all, mut has_ids) = (Vec::new(), false);
    let mut open = vec![schema];
    while let Some(node) = open.pop() {
        match node {
            Json::Object(fields) => {
                all.extend(fields.get("$ref").and_then(Json::as_str));
                let names_itself = ["$id", "id"].iter().any(|name| fields.get(*name).is_some_and(Json::is_string));
                has_ids |= names_itself && !std::ptr::eq(node, schema);
                open.extend(fields.values());
            }
            Json::Array(items) => open.extend(items),
            _ => {}
        }
    }
    if !has_ids {
        all.sort_unstable();
        all.dedup();
    }
    let target = |reference: &str| {
        let pointer = reference.strip_prefix('#').filter(|_| !has_ids)?;
        schema.pointer(pointer)
    };
    all.into_iter().map(|reference| (reference, target(reference).unwrap_or(schema))).collect()
}

/// Objects and arrays in each other. JSON that was read is no deeper than 128.
fn levels(node: &Json) -> usize {
    match node {
        Json::Object(fields) => 1 + fields.values().map(levels).max().unwrap_or(0),
        Json::Array(items) => 1 + items.iter().map(levels).max().unwrap_or(0),
        _ => 0,
    }
}

/// How much of a schema there is once it is written out.
#[derive(Clone, Copy, Debug)]
struct Count {
    subschemas: u64,
    /// Ways in which it can be met: what is merged with it is written out for each.
    ways: u64,
}

struct Written<'a> {
    targets: HashMap<&'a str, &'a Json>,
    /// What merged references come to; `None` for those that are being counted.
    known: HashMap<&'a str, Option<Count>>,
}

impl<'a> Written<'a> {
    /// `merged` is whether the node is merged with others, so that what it refers to is written out in its place.
    fn count(&mut self, node: &'a Json, merged: bool) -> Count {
        match node {
            Json::Object(fields) => self.object(fields, merged),
            Json::Array(items) => {
                let items = items.iter().map(|item| self.count(item, false).subschemas);
                Count { subschemas: items.fold(0, u64::saturating_add), ways: 1 }
            }
            _ => Count { subschemas: 1, ways: 1 },
        }
    }

    fn object(&mut self, fields: &'a Map<String, Json>, merged: bool) -> Count {
        let says = |name: &&String| !ANNOTATIONS.contains(&name.as_str());
        let merged = merged || fields.keys().filter(says).count() > 1;
        let (mut subschemas, mut ways) = (1u64, 1u64);
        for (name, value) in fields {
            let part = match (name.as_str(), value) {
                ("$defs" | "definitions" | "const" | "default" | "examples", _) => continue,
                ("$ref", Json::String(reference)) if merged => self.reference(reference),
                ("allOf", Json::Array(items)) => {
                    let merged = merged || items.len() > 1;
                    items.iter().fold(Count { subschemas: 0, ways: 1 }, |sum, item| {
                        let item = self.count(item, merged);
                        Count {
                            subschemas: sum.subschemas.saturating_add(item.subschemas),
                            ways: sum.ways.saturating_mul(item.ways),
                        }
                    })
                }
                ("anyOf" | "oneOf", Json::Array(items)) => {
                    items.iter().fold(Count { subschemas: 0, ways: 0 }, |sum, item| {
                        let item = self.count(item, merged);
                        Count {
                            subschemas: sum.subschemas.saturating_add(item.subschemas),
                            ways: sum.ways.saturating_add(item.ways),
                        }
                    })
                }
                // Values of an enumeration are met by what is of their type alone.
                ("enum", Json::Array(items)) => Count { subschemas: items.len() as u64, ways: 1 },
                (_, value) => Count { ways: 1, ..self.count(value, false) },
            };
            subschemas = subschemas.saturating_add(part.subschemas);
            ways = ways.saturating_mul(part.ways.max(1));
        }
        // Each way of one part is merged with each of the others.
        Count { subschemas: if merged { subschemas.saturating_mul(ways) } else { subschemas }, ways }
    }

    fn reference(&mut self, reference: &'a str) -> Count {
        // What leads back to itself is refused when it is compiled.
        let nothing = Count { subschemas: 1, ways: 1 };
        if let Some(known) = self.known.get(reference) {
            return known.unwrap_or(nothing);
        }
        let Some(target) = self.targets.get(reference).copied() else { return nothing };
        self.known.insert(reference, None);
        let count = self.count(target, true);
        self.known.insert(reference, Some(count));
        count
    }
}
