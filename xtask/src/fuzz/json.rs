//! Mutations of JSON: nodes that are missing, twice there, of another type, huge or deep.
//!
//! The tree keeps leaves and keys as they are written, so that it can hold what is no JSON: a key twice, NaN, half a
//! surrogate pair. A node is found by walking down from the root, one child as likely as the other: a list of 4,000
//! entries is one node among its siblings.

use serde_json::Value;

use crate::random::Dice;

/// JSON, or nearly.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Node {
    /// Written out as it stands.
    Raw(String),
    Array(Vec<Node>),
    /// Keys with their quotes.
    Object(Vec<(String, Node)>),
}

/// Values that programs trip over, as they are written.
const ODD: &[&str] = &[
    "null",
    "true",
    "false",
    "0",
    "-0",
    "1",
    "-1",
    "2",
    "0.5",
    "-0.5",
    "7",
    "1e308",
    "-1e308",
    "1e999",
    "-1e999",
    "1e-400",
    "NaN",
    "Infinity",
    "-Infinity",
    "127",
    "255",
    "256",
    "65536",
    "2147483647",
    "2147483648",
    "-2147483648",
    "4294967295",
    "4294967296",
    "9007199254740993",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "123456789012345678901234567890",
    "\"\"",
    "\" \"",
    "\"0\"",
    "\"a\"",
    "[]",
    "{}",
    "[[]]",
    "[null]",
    "[0]",
    "[-1, 0]",
    "{\"\": null}",
    "\"\\u0000\"",
    "\"\\ud800\"",
    "\"\\u001b[31mred\\u0007\"",
    "\"\\u009b31m\"",
    "\"\\u202e\"",
    "\"\\n\\r\\n\"",
    "\"..\"",
    "\"/\"",
    "\"../x\"",
    "\"\\\\\"",
    "\"(\"",
    "\"(a+)+$\"",
    "\"[\"",
    "\"\\\\p{\"",
    "\"{1000}{1000}\"",
    "\"\u{301}\u{301}\"",
    "\"\u{1f469}\u{200d}\u{1f4bb}\"",
    "\"\u{feff}\"",
    "\"\u{fffd}\"",
];

/// A document longer than this gets no more copies.
const MAX_LENGTH: usize = 1 << 20;

impl Node {
    /// The tree of a document.
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        serde_json::from_slice::<Value>(text).ok().map(|value| Self::from(&value))
    }

    fn write(&self, into: &mut String) {
        let mut separated = |open: char, close: char, items: &mut dyn Iterator<Item = (&str, &Self)>| {
            into.push(open);
            for (number, (key, node)) in items.enumerate() {
                into.push_str(if number > 0 { ", " } else { "" });
                into.push_str(key);
                into.push_str(if key.is_empty() { "" } else { ": " });
                node.write(into);
            }
            into.push(close);
        };
        match self {
            Self::Raw(text) => into.push_str(text),
            Self::Array(items) => separated('[', ']', &mut items.iter().map(|node| ("", node))),
            Self::Object(items) => separated('{', '}', &mut items.iter().map(|(key, node)| (key.as_str(), node))),
        }
    }

    fn children(&self) -> usize {
        match self {
            Self::Raw(_) => 0,
            Self::Array(items) => items.len(),
            Self::Object(items) => items.len(),
        }
    }

    fn child(&mut self, at: usize) -> &mut Self {
        match self {
            Self::Array(items) => &mut items[at],
            Self::Object(items) => &mut items[at].1,
            Self::Raw(_) => self,
        }
    }

    /// A node that is found by walking down.
    fn any(&self, dice: &mut Dice) -> &Self {
        let node = match self {
            Self::Array(items) if !items.is_empty() => dice.pick(items),
            Self::Object(items) if !items.is_empty() => &dice.pick(items).1,
            _ => return self,
        };
        if dice.once_in(3) { node } else { node.any(dice) }
    }
}

impl From<&Value> for Node {
    fn from(value: &Value) -> Self {
        match value {
            Value::Array(items) => Self::Array(items.iter().map(Self::from).collect()),
            Value::Object(items) => Self::Object(
                items.iter().map(|(key, value)| (Value::from(key.as_str()).to_string(), value.into())).collect(),
            ),
            leaf => Self::Raw(leaf.to_string()),
        }
    }
}

impl std::fmt::Display for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut text = String::new();
        self.write(&mut text);
        f.write_str(&text)
    }
}

/// Changes one node. `grafts` are values that mean something in this kind of document. Says what was done.
pub(crate) fn mutate(dice: &mut Dice, root: &mut Node, grafts: &[&str]) -> String {
    let donor = root.clone();
    let mut path = String::new();
    let what = walk(dice, root, &donor, grafts, &mut path);
    format!("{}: {what}", if path.is_empty() { "/" } else { &path })
}

fn walk(dice: &mut Dice, node: &mut Node, donor: &Node, grafts: &[&str], path: &mut String) -> String {
    let children = node.children();
    if children == 0 {
        *node = Node::Raw(odd(dice));
        return "another value".into();
    }
    let at = dice.below(children);
    let name = match node {
        Node::Object(items) => items[at].0.trim_matches('"').to_owned(),
        _ => at.to_string(),
    };
    path.push('/');
    path.push_str(&name);
    if node.child(at).children() > 0 && !dice.once_in(4) {
        return walk(dice, node.child(at), donor, grafts, path);
    }
    change(dice, node, at, donor, grafts).into()
}

/// Changes the child number `at`.
fn change(dice: &mut Dice, parent: &mut Node, at: usize, donor: &Node, grafts: &[&str]) -> &'static str {
    let child = parent.child(at);
    match dice.below(14) {
        0 => {
            match parent {
                Node::Array(items) => drop(items.remove(at)),
                Node::Object(items) => drop(items.remove(at)),
                Node::Raw(_) => {}
            }
            "removed"
        }
        1 => {
            let mut copy = child.clone();
            if dice.once_in(2) {
                copy = Node::Raw(odd(dice));
            }
            match parent {
                Node::Array(items) => items.insert(at, copy),
                Node::Object(items) => items.insert(at, (items[at].0.clone(), copy)),
                Node::Raw(_) => {}
            }
            "twice"
        }
        2..=4 => {
            *child = Node::Raw(odd(dice));
            "another value"
        }
        5 => {
            *child = retyped(dice, child);
            "another type"
        }
        6 => {
            *child = Node::Raw(nudged(dice, &child.to_string()));
            "a near value"
        }
        7 => {
            *child = Node::Raw(long(dice));
            "a long value"
        }
        8 => {
            *child = Node::Raw(deep(dice));
            "a deep value"
        }
        9 => {
            *child = donor.any(dice).clone();
            "a value from elsewhere in the file"
        }
        10 => {
            if let Node::Object(items) = parent {
                items[at].0 = match donor.any(dice) {
                    Node::Object(other) if !other.is_empty() => dice.pick(other).0.clone(),
                    _ => long(dice),
                };
                return "another name";
            }
            *parent.child(at) = Node::Array(Vec::new());
            "an empty list"
        }
        11 => {
            repeat(dice, parent, at);
            "many times"
        }
        _ if grafts.is_empty() => {
            *child = donor.any(dice).clone();
            "a value from elsewhere in the file"
        }
        _ => {
            *child = Node::Raw((*dice.pick(grafts)).to_owned());
            "a value of its kind"
        }
    }
}

fn odd(dice: &mut Dice) -> String {
    (*dice.pick(ODD)).to_owned()
}

fn retyped(dice: &mut Dice, node: &Node) -> Node {
    match (dice.below(3), node) {
        (0, node) => Node::Array(vec![node.clone()]),
        (1, node) => Node::Object(vec![("\"x\"".into(), node.clone())]),
        // A string of what it is, or what a string says.
        (_, Node::Raw(text)) if text.starts_with('"') => Node::Raw(text.trim_matches('"').to_owned()),
        (_, node) => Node::Raw(Value::from(node.to_string()).to_string()),
    }
}

/// A number near the one that is there; a string with one letter more or less.
fn nudged(dice: &mut Dice, text: &str) -> String {
    if let Ok(number) = text.parse::<f64>() {
        let near = [number + 1.0, number - 1.0, -number, number * 2.0, number / 2.0, number * 1024.0, number * 1e6];
        return dice.pick(&near).to_string();
    }
    match text.strip_suffix('"') {
        Some(rest) if dice.once_in(2) && rest.len() > 1 && rest.is_ascii() => format!("{}\"", &rest[..rest.len() - 1]),
        Some(rest) => format!("{rest}{}\"", dice.pick(&["a", " ", "*", "\\u0000", ".", "0", "\\u001b[2J"])),
        None => format!("[{text}, {text}]"),
    }
}

fn long(dice: &mut Dice) -> String {
    let unit = dice.pick(&["a", "<|im_start|>", "a.b.", "\\u0000", "../", "(", "\u{e4}\u{301}", "9"]);
    let count = *dice.pick(&[300, 5_000, 70_000]);
    format!("\"{}\"", unit.repeat(count))
}

fn deep(dice: &mut Dice) -> String {
    let (open, close) = *dice.pick(&[("[", "]"), ("{\"a\": ", "}"), ("[{\"type\": \"Sequence\", \"a\": ", "}]")]);
    let depth = *dice.pick(&[100, 127, 1_000, 100_000]);
    let close = if dice.once_in(4) { String::new() } else { close.repeat(depth) };
    format!("{}0{close}", open.repeat(depth))
}

fn repeat(dice: &mut Dice, parent: &mut Node, at: usize) {
    let key = match parent {
        Node::Object(items) => items[at].0.len(),
        _ => 0,
    };
    let length = key + parent.child(at).to_string().len() + 1;
    let count = (*dice.pick(&[2, 10, 100, 10_000])).min(MAX_LENGTH / length);
    match parent {
        Node::Array(items) => {
            let copies = vec![items[at].clone(); count];
            items.splice(at..at, copies);
        }
        Node::Object(items) => {
            let (key, value) = items[at].clone();
            let key = key.trim_end_matches('"').to_owned();
            items.extend((0..count).map(|number| (format!("{key}{number}\""), value.clone())));
        }
        Node::Raw(_) => {}
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const TEXT: &str = r#"{"a": [1, {"b": "x"}], "c": {"d": null, "e": 2.5}, "f": true}"#;

    #[test]
    fn a_tree_is_written_as_it_was_read() {
        let tree = Node::parse(TEXT.as_bytes()).unwrap();
        assert_eq!(tree.to_string(), TEXT);
        assert_eq!(Node::parse(b"{"), None);
    }

    #[test]
    fn mutations_repeat_and_reach_every_node() {
        let mutate = |stream| {
            let mut tree = Node::parse(TEXT.as_bytes()).unwrap();
            let what = mutate(&mut Dice::new(1, stream), &mut tree, &["\"graft\""]);
            (what, tree.to_string())
        };
        assert_eq!(mutate(3), mutate(3));
        let all: Vec<(String, String)> = (0..3000).map(mutate).collect();
        for path in ["/a: ", "/a/0: ", "/a/1: ", "/a/1/b: ", "/c: ", "/c/d: ", "/c/e: ", "/f: "] {
            assert!(all.iter().any(|(what, _)| what.starts_with(path)), "{path}");
        }
        for what in ["removed", "twice", "another type", "a deep value", "a long value", "another name", "many times"] {
            assert!(all.iter().any(|(done, _)| done.ends_with(what)), "{what}");
        }
        assert!(all.iter().any(|(_, text)| text.contains("graft")));
        // Few change nothing: a value that is drawn where it stands.
        let same = all.iter().filter(|(_, text)| text == TEXT).count();
        assert!(same < all.len() / 20, "{same}");
        assert!(all.iter().all(|(_, text)| text.len() < 4 * MAX_LENGTH));
        // Long names count, too.
        let mut long = Node::Object(vec![(format!("\"{}\"", "k".repeat(300_000)), Node::Raw("1".into()))]);
        repeat(&mut Dice::new(0, 0), &mut long, 0);
        assert!(long.to_string().len() < 3 * MAX_LENGTH);
        // What is no JSON can be written, too.
        assert!(all.iter().any(|(_, text)| serde_json::from_str::<Value>(text).is_err()));
    }
}
