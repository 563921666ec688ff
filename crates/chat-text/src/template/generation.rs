//! The `{% generation %}` .. `{% endgeneration %}` tag of transformers' templates.
//!
//! transformers adds the tag to Jinja as an extension that notes where the output stood when the
//! block began and ended. The engine here has no custom tags, so the tag is rewritten before
//! compiling, into blocks it knows:
//!
//! ```jinja
//! {% if __mark_generation %}START{% endif %}{% with %} .. {% endwith %}{% if __mark_generation %}END{% endif %}
//! ```
//!
//! `with` is there for its scope: as in transformers, a variable set inside is not seen outside.
//! START and END are code points that Unicode reserves for a program's own use and that no text
//! should hold. Rendered without the switch nothing changes; rendered with it the spans can be
//! read off. The caller compares both outputs, so a template that splits, trims or doubles the
//! marked text is noticed.

use std::ops::Range;

/// The variable that turns the marks on.
pub const SWITCH: &str = "__mark_generation";

pub const START: char = '\u{FDD0}';
pub const END: char = '\u{FDD1}';

/// A template with its tags rewritten.
pub struct Rewritten {
    pub source: String,
    pub has_generation_tags: bool,
    /// Bytes of the longest tag of any kind.
    pub longest_tag: usize,
}

/// Rewrites the tags.
pub fn rewrite(source: &str) -> Rewritten {
    let mut out = String::with_capacity(source.len());
    let mut found = false;
    let mut longest_tag = 0;
    let mut rest = source;
    while let Some(open) = next_tag(rest) {
        out.push_str(&rest[..open]);
        rest = &rest[open..];
        let end = tag_end(rest);
        let tag = &rest[..end];
        rest = &rest[end..];
        if !tag.starts_with("{#") {
            longest_tag = longest_tag.max(tag.len());
        }
        match BlockTag::parse(tag) {
            Some(tag) if tag.name == "generation" => {
                found = true;
                let BlockTag { left, right, .. } = tag;
                out.push_str(&format!("{{%{left} if {SWITCH} %}}{START}{{% endif %}}{{% with {right}%}}"));
            }
            Some(tag) if tag.name == "endgeneration" => {
                found = true;
                let BlockTag { left, right, .. } = tag;
                out.push_str(&format!("{{%{left} endwith %}}{{% if {SWITCH} %}}{END}{{% endif {right}%}}"));
            }
            Some(BlockTag { name: "raw", .. }) => {
                out.push_str(tag);
                let end = raw_end(rest);
                out.push_str(&rest[..end]);
                rest = &rest[end..];
            }
            _ => out.push_str(tag),
        }
    }
    out.push_str(rest);
    Rewritten { source: out, has_generation_tags: found, longest_tag }
}

/// Removes the marks from a rendered text and gives the ranges they enclosed.
pub fn take_marks(marked: &str) -> Result<(String, Vec<Range<usize>>), String> {
    let mut text = String::with_capacity(marked.len());
    let mut spans = Vec::new();
    let mut open = None;
    for c in marked.chars() {
        match (c, open) {
            (START, None) => open = Some(text.len()),
            (END, Some(start)) => {
                spans.push(start..text.len());
                open = None;
            }
            (START | END, _) => return Err("its `generation` tags don't alternate".into()),
            _ => text.push(c),
        }
    }
    match open {
        None => Ok((text, spans)),
        Some(_) => Err("a `generation` tag is not closed".into()),
    }
}

/// A `{% name %}` tag with no arguments.
struct BlockTag<'a> {
    /// Whitespace control after `{%`: `-`, `+` or nothing.
    left: &'a str,
    name: &'a str,
    /// Whitespace control before `%}`.
    right: &'a str,
}

impl<'a> BlockTag<'a> {
    fn parse(tag: &'a str) -> Option<Self> {
        let inner = tag.strip_prefix("{%")?.strip_suffix("%}")?;
        let left = inner.len() - inner.trim_start_matches(['-', '+']).len();
        let left = left.min(1);
        let right = (inner.len() > left && inner.ends_with(['-', '+'])) as usize;
        Some(Self {
            left: &inner[..left],
            name: inner[left..inner.len() - right].trim(),
            right: &inner[inner.len() - right..],
        })
    }
}

/// Where the next `{{`, `{%` or `{#` begins.
fn next_tag(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    (0..bytes.len().saturating_sub(1)).find(|&i| bytes[i] == b'{' && matches!(bytes[i + 1], b'{' | b'%' | b'#'))
}

/// Length of the tag that `text` begins with, quoted strings respected; the whole text if it has
/// no end.
fn tag_end(text: &str) -> usize {
    let bytes = text.as_bytes();
    let close: &[u8] = match bytes[1] {
        b'#' => return text.find("#}").map_or(text.len(), |i| i + 2),
        b'%' => b"%}",
        _ => b"}}",
    };
    let mut i = 2;
    // Braces of dict literals: `{{ {"a": {}}} }}`.
    let mut depth = 0usize;
    while i < bytes.len() {
        match bytes[i] {
            quote @ (b'"' | b'\'') => {
                i += 1;
                while i < bytes.len() && bytes[i] != quote {
                    i += 1 + (bytes[i] == b'\\') as usize;
                }
            }
            b'{' => depth += 1,
            b'}' if depth > 0 => depth -= 1,
            _ if bytes[i..].starts_with(close) => return i + 2,
            _ => {}
        }
        i += 1;
    }
    text.len()
}

/// Where the `{% endraw %}` of a raw block begins.
fn raw_end(text: &str) -> usize {
    let mut at = 0;
    while let Some(open) = text[at..].find("{%") {
        let start = at + open;
        let Some(close) = text[start..].find("%}") else {
            break;
        };
        let tag = BlockTag::parse(&text[start..start + close + 2]);
        if tag.is_some_and(|tag| tag.name == "endraw") {
            return start;
        }
        at = start + 2;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_rewritten_with_their_whitespace_control() {
        let out = rewrite("a {%- generation +%} b {% endgeneration -%}\n");
        assert!(out.has_generation_tags);
        assert_eq!(out.longest_tag, "{% endgeneration -%}".len());
        assert_eq!(
            out.source,
            "a {%- if __mark_generation %}\u{FDD0}{% endif %}{% with +%} b \
             {% endwith %}{% if __mark_generation %}\u{FDD1}{% endif -%}\n"
        );
    }

    #[test]
    fn strings_comments_and_raw_blocks_are_left_alone() {
        for source in [
            "{{ '{% generation %}' }}",
            "{# {% generation %} #}",
            "{% raw %}{% generation %}{%- endraw -%}",
            "{% raw %} {{ ' {% raw %} {% endraw %}",
            "{% set generation = 1 %}{{ generation }}",
            "{{ {'a': {'b': '}}'}}}",
            "no tags { % generation % }",
        ] {
            let out = rewrite(source);
            assert_eq!(out.source, source);
            assert!(!out.has_generation_tags);
        }
    }

    #[test]
    fn broken_templates_come_through_unchanged() {
        for source in ["{%", "{%-", "{%-%}", "{%+-%}", "{{ 'a", "{#", "{% raw %}{%", "{", "{{\"\\"] {
            assert_eq!(rewrite(source).source, source);
        }
    }

    #[test]
    fn marks_become_spans() {
        let (text, spans) = take_marks("ab\u{FDD0}cdé\u{FDD1}\u{FDD0}\u{FDD1}f").expect("paired");
        assert_eq!(text, "abcdéf");
        assert_eq!(spans, [2..6, 6..6]);
        assert!(take_marks("\u{FDD0}\u{FDD0}").is_err());
        assert!(take_marks("\u{FDD1}").is_err());
        assert!(take_marks("\u{FDD0}").is_err());
    }
}
