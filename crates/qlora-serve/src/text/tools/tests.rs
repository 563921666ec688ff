//! What the parsers make of answers, whole and cut anywhere.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::{Call, Piece, ToolFormat, ToolParser, content};

const FORMATS: [ToolFormat; 3] = [ToolFormat::Tagged, ToolFormat::Bare, ToolFormat::Listed];

fn parse(format: ToolFormat, pieces: &[&str]) -> Vec<Piece> {
    let mut parser = ToolParser::new(format, vec!["f".into(), "weather".into()]);
    let mut found: Vec<Piece> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
    found.extend(parser.finish());
    let mut joined = Vec::new();
    for piece in found {
        match piece {
            Piece::Content(text) => content(&mut joined, text),
            call => joined.push(call),
        }
    }
    joined
}

fn text(text: &str) -> Piece {
    Piece::Content(text.into())
}

fn call(name: &str, arguments: &str) -> Piece {
    Piece::Call(Call { name: name.into(), arguments: arguments.into() })
}

#[test]
fn tagged() {
    let cases = [
        ("plain <text>", vec![text("plain <text>")]),
        ("<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": 1}}\n</tool_call>", vec![call("f", "{\"a\":1}")]),
        (
            "Let me see.\n\n<tool_call>{\"name\":\"f\",\"arguments\":{\"a\":\"</tool_call>}\"}}</tool_call>\n\
             <tool_call>{\"name\":\"g\",\"arguments\":{}}</tool_call> done",
            vec![text("Let me see."), call("f", "{\"a\":\"</tool_call>}\"}"), call("g", "{}"), text("done")],
        ),
        // The end came instead of the closing tag.
        ("<tool_call>{\"name\":\"f\",\"arguments\":{}}", vec![call("f", "{}")]),
        ("<tool_call>{\"name\":\"f\",\"argu", vec![text("<tool_call>{\"name\":\"f\",\"argu")]),
        ("<tool_call> nothing</tool_call>", vec![text("<tool_call> nothing</tool_call>")]),
        ("<tool_call>{\"no\": 1}</tool_call>", vec![text("<tool_call>{\"no\": 1}</tool_call>")]),
        ("a <tool_c", vec![text("a <tool_c")]),
    ];
    for (answer, expected) in cases {
        assert_eq!(parse(ToolFormat::Tagged, &[answer]), expected, "{answer:?}");
    }
}

#[test]
fn bare() {
    let cases = [
        ("{\"name\": \"f\", \"parameters\": {\"a\": [1, 2]}}", vec![call("f", "{\"a\":[1,2]}")]),
        (
            "{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"weather\", \"parameters\": {\"c\": \"x\"}}\n",
            vec![call("f", "{}"), call("weather", "{\"c\":\"x\"}")],
        ),
        // No tool of this name: it is JSON that was asked for.
        ("{\"name\": \"Bob\", \"parameters\": {}}", vec![text("{\"name\": \"Bob\", \"parameters\": {}}")]),
        ("<|python_tag|>{\"name\": \"g\", \"parameters\": {}}", vec![call("g", "{}")]),
        ("<|python_tag|>print(1)", vec![text("<|python_tag|>print(1)")]),
        ("Well, {\"name\": \"f\"}", vec![text("Well, {\"name\": \"f\"}")]),
        ("Well, <|python_tag|>{\"name\": \"f\"}", vec![text("Well,"), call("f", "{}")]),
        ("{\"name\": \"f\", \"parameters\": 3}", vec![text("{\"name\": \"f\", \"parameters\": 3}")]),
        ("  {\"a", vec![text("  {\"a")]),
    ];
    for (answer, expected) in cases {
        assert_eq!(parse(ToolFormat::Bare, &[answer]), expected, "{answer:?}");
    }
}

#[test]
fn listed() {
    let cases = [
        (
            "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": 1}}, {\"name\": \"g\", \"arguments\": {}}]",
            vec![call("f", "{\"a\":1}"), call("g", "{}")],
        ),
        ("[TOOL_CALLS]f[ARGS]{\"a\": 1}[TOOL_CALLS]g[ARGS]{}", vec![call("f", "{\"a\":1}"), call("g", "{}")]),
        ("[TOOL_CALLS]f[CALL_ID]abc[ARGS]{}", vec![call("f", "{}")]),
        ("[TOOL_CALLS]f{\"a\": 1}", vec![call("f", "{\"a\":1}")]),
        ("I see [TOOL_CALLS] nothing", vec![text("I see [TOOL_CALLS] nothing")]),
        ("[TOOL_CALLS][1]", vec![text("[TOOL_CALLS][1]")]),
        ("[TOOL_", vec![text("[TOOL_")]),
    ];
    for (answer, expected) in cases {
        assert_eq!(parse(ToolFormat::Listed, &[answer]), expected, "{answer:?}");
    }
}

#[test]
fn a_template_says_which_format_it_wants() {
    assert_eq!(ToolFormat::of_template("{% for m in messages %}{{ m.content }}{% endfor %}"), None);
    assert_eq!(ToolFormat::of_template("{% if tools %}..<tool_call><function=..{% endif %}"), None);
    assert_eq!(ToolFormat::of_template("{% if tools %}..<tool_call>..{% endif %}"), Some(ToolFormat::Tagged));
    assert_eq!(ToolFormat::of_template("{% if tools %}..[TOOL_CALLS]..{% endif %}"), Some(ToolFormat::Listed));
    assert_eq!(ToolFormat::of_template("{% if tools %}{{ '\"parameters\": ' }}{% endif %}"), Some(ToolFormat::Bare));
}

proptest! {
    #[test]
    fn where_the_text_is_cut_makes_no_difference(
        pieces in prop::collection::vec(
            r#"(<tool_call>|</tool_call>|<\|python_tag\|>|\[TOOL_CALLS\]|\[ARGS\]|\[CALL_ID\]|<tool|\[TOOL|\{"name": "f", |"arguments": |"parameters": |\{\}|\{"a": "\}é"\}|\}|\[|\]|;|f|[ab \n"]){0,4}"#,
            0..8,
        ),
    ) {
        let whole = pieces.concat();
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        let characters: Vec<String> = whole.chars().map(String::from).collect();
        let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
        for format in FORMATS {
            prop_assert_eq!(parse(format, &pieces), parse(format, &[&whole]));
            prop_assert_eq!(parse(format, &characters), parse(format, &[&whole]));
        }
    }
}
