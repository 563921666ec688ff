//! Tokenizer and chat templates against transformers' own output, and on hostile input.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use chat_text::{ChatError, ChatInput, ChatTemplate, Message, SpecialTokens, Tokenizer};
use proptest::prelude::*;
use serde_json::{Value as Json, json};

#[path = "../../adapter-io/tests/bounded/mod.rs"]
mod bounded;

use bounded::bounded;

/// What one rendering may hold at once. A template may create 64 bytes for each of its thirty million units of
/// fuel; those here, of a few dozen pieces, come nowhere near.
const BOUND: usize = 64 << 20;

fn reference() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/reference")
}

fn tokenizer() -> Tokenizer {
    Tokenizer::from_dir(reference().join("tiny-llama")).unwrap()
}

fn render(source: &str, messages: Json) -> Result<String, ChatError> {
    let messages: Vec<Message> = serde_json::from_value(messages).unwrap();
    let special: SpecialTokens = [("bos_token", "<s>"), ("eos_token", "</s>")].into_iter().collect();
    ChatTemplate::new(source)?.render(&messages, false, &special)
}

fn eval(expression: &str) -> String {
    render(&format!("{{{{ {expression} }}}}"), json!([])).unwrap_or_else(|e| panic!("{expression}: {e}"))
}

#[test]
fn every_reference_row_is_reproduced() {
    let rows = std::fs::read(reference().join("chat/templates.json")).unwrap();
    let rows: Vec<Json> = serde_json::from_slice(&rows).unwrap();
    let tokenizer = tokenizer();
    assert_eq!(rows.len(), 12);
    for row in rows {
        let template = ChatTemplate::new(row["template"].as_str().unwrap()).unwrap();
        let messages: Vec<Message> = serde_json::from_value(row["messages"].clone()).unwrap();
        let add_generation_prompt = row["add_generation_prompt"].as_bool().unwrap();
        let result = template.render(&messages, add_generation_prompt, tokenizer.special_tokens());
        match row["error"].as_str() {
            Some(expected) => match result {
                Err(ChatError::TemplateRefused { message }) => assert_eq!(message, expected),
                other => panic!("{}: expected a refusal, got {other:?}", row["name"]),
            },
            None => {
                let text = result.unwrap();
                assert_eq!(text, row["text"].as_str().unwrap());
                let ids = tokenizer.encode(&text, false).unwrap().ids;
                let expected: Vec<u32> = serde_json::from_value(row["ids"].clone()).unwrap();
                assert_eq!(ids, expected);
            }
        }
    }
}

#[test]
fn the_reference_tokenizer_is_read_whole() {
    let tokenizer = tokenizer();
    assert_eq!(tokenizer.bos_token_id(), Some(0));
    assert_eq!(tokenizer.eos_token_ids(), [2]);
    assert_eq!(tokenizer.pad_token_id(), Some(3));
    assert_eq!(tokenizer.padding_id(), 3);
    assert_eq!(tokenizer.vocab_size(), 4096);
    assert_eq!(tokenizer.model_max_length(), Some(1024));
    assert_eq!(tokenizer.special_tokens().get("eos_token"), Some("<|im_end|>"));
    let text = tokenizer.render_chat(&[Message::user("Hi")], true).unwrap();
    assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
}

#[test]
fn offsets_are_bytes_and_tile_the_text() {
    let tokenizer = tokenizer();
    let text = "naïve café — 漢字 🙂\n\n  indented<|im_end|> x";
    let encoding = tokenizer.encode(text, false).unwrap();
    let mut at = 0;
    for &(start, end) in &encoding.offsets {
        assert!(start <= end && end <= text.len());
        // Tokens inside one character share its range; otherwise they follow each other.
        assert!(start == at || (start < at && end == at), "{start}..{end} after {at}");
        at = end;
    }
    assert_eq!(at, text.len());
    assert_eq!(tokenizer.decode(&encoding.ids, false).unwrap(), text);
    assert!(!tokenizer.decode(&encoding.ids, true).unwrap().contains("<|im_end|>"));
}

#[test]
fn python_values_print_as_in_python() {
    for (expression, expected) in [
        ("true", "True"),
        ("none", "None"),
        ("1.0", "1.0"),
        ("'a' ~ 1 ~ none", "a1None"),
        ("[1, 'a', none, true]", "[1, 'a', None, True]"),
        ("{'a': 1.5}", "{'a': 1.5}"),
        ("1e-7", "1e-07"),
        ("[1e16, 0.0001, -0.0]", "[1e+16, 0.0001, -0.0]"),
        ("1e-7|string", "1e-07"),
        ("[\"it's\", 'a\"b\\n', 'x\"\\'']", "[\"it's\", 'a\"b\\n', 'x\"\\'']"),
        ("{'a': 1}.items()|list", "[('a', 1)]"),
        ("undefined_name", ""),
        ("none is iterable", "False"),
        ("'a' is iterable and [] is iterable and {} is iterable and undefined_name is iterable", "True"),
        ("'a' is sequence and {} is sequence and [] is sequence", "True"),
        ("3 is sequence or none is sequence", "False"),
        ("'abc'[::-1]", "cba"),
        ("[1, 2, 3][::-1]|tojson", "[3, 2, 1]"),
        ("'a-b-c'.rsplit('-', 1)[0]", "a-b"),
        ("'a b  c '.rsplit(none, 1)|tojson", "[\"a b\", \"c\"]"),
        ("'a b  c '.rsplit()|tojson", "[\"a\", \"b\", \"c\"]"),
        ("'tool_x'.removeprefix('tool_')", "x"),
        ("'x.py'.removesuffix('.py')", "x"),
        ("'k=v=w'.partition('=')[2]", "v=w"),
        ("'k=v=w'.rpartition('=')[0]", "k=v"),
        ("'kv'.partition('=')[0]", "kv"),
        ("'  x\n'.strip()", "x"),
        ("{'b': 1}.items()|list|tojson", "[[\"b\", 1]]"),
    ] {
        assert_eq!(eval(expression), expected, "{expression}");
    }
}

#[test]
fn filters_and_methods_are_those_of_jinja_and_python() {
    // Each right side was printed by Jinja2 3.1.6 in the environment of transformers 5.24.
    for (expression, expected) in [
        ("'a\\n' | indent(2)", "a\n"),
        ("'a\\nb\\n\\nc' | indent(2)", "a\n  b\n\n  c"),
        ("'a\\n\\nb' | indent('> ', first=true, blank=true)", "> a\n> \n> b"),
        ("'a\\nb' | indent(width=1, first=true)", " a\n b"),
        ("'x' | int", "0"),
        ("'12.7' | int", "12"),
        ("' -3 ' | int", "-3"),
        ("'ff' | int(base=16)", "255"),
        ("none | int(default=7)", "7"),
        ("'x' | float", "0.0"),
        ("'a,b,c'.split(sep=',', maxsplit=1) | tojson", "[\"a\", \"b,c\"]"),
        ("'a b  c'.split(maxsplit=1) | tojson", "[\"a\", \"b  c\"]"),
        ("'a-b-c'.rsplit('-', maxsplit=1) | tojson", "[\"a-b\", \"c\"]"),
        ("'one two three four' | truncate(9)", "one..."),
        ("'one two three four' | truncate(9, true, '!', 0)", "one two !"),
        ("'one two three' | truncate(length=9, leeway=0)", "one..."),
        ("'Hi, you two_x!' | wordcount", "3"),
        ("'ab' | center(7)", "   ab  "),
        ("'abc'.center(6, '*')", "*abc**"),
        ("'abc'.center(7, '*') ~ 'ab'.center(5, '*')", "**abc****ab*"),
        ("'<b>x &amp; y</b>  <!-- c --> z' | striptags", "x & y z"),
        ("'a b/ü?' | urlencode", "a%20b/%C3%BC%3F"),
        ("{'a b': 'c&d'} | urlencode", "a+b=c%26d"),
        ("'ab'.ljust(4) ~ '|' ~ 'ab'.rjust(4, '.') ~ '|' ~ '-7'.zfill(4)", "ab  |..ab|-007"),
        ("'abc'.index('c')", "2"),
        ("[1, 2].index(2)", "1"),
        ("{'a': 1}.copy() | tojson", "{\"a\": 1}"),
        ("'k=v'.partition('=')", "('k', '=', 'v')"),
        ("'a\\r\\nb\\nc'.splitlines() | tojson", "[\"a\", \"b\", \"c\"]"),
        ("'%s and %d' | format('x', 3)", "x and 3"),
        ("'{:>4}|{:<3}|{x}'.format('a', 'b', x=1)", "   a|b  |1"),
        ("'aBc'.swapcase()", "AbC"),
        ("'<a href=\"x\">\\'&' | escape", "&lt;a href=&#34;x&#34;&gt;&#39;&amp;"),
        ("{'b': [1, 'x']} | pprint", "{'b': [1, 'x']}"),
        ("'a' | string | upper", "A"),
    ] {
        assert_eq!(eval(expression), expected, "{expression}");
    }
}

#[test]
fn tojson_is_json_dumps() {
    // Each right side was printed by Python's json.dumps with the same arguments.
    for (expression, expected) in [
        ("{'a': [1, 2.0, 'x'], 'b': none}|tojson", r#"{"a": [1, 2.0, "x"], "b": null}"#),
        ("'<é\"\\n\\\\>&'|tojson", r#""<é\"\n\\>&""#),
        ("'é🙂'|tojson(ensure_ascii=true)", r#""\u00e9\ud83d\ude42""#),
        (
            "[1e16, 1e-5, 123456789.125, 1e22, 0.1, 1.5e300]|tojson",
            "[1e+16, 1e-05, 123456789.125, 1e+22, 0.1, 1.5e+300]",
        ),
        ("[]|tojson(indent=2)", "[]"),
        ("{}|tojson(indent=2)", "{}"),
        ("{'a': [1, {}]}|tojson(indent=2)", "{\n  \"a\": [\n    1,\n    {}\n  ]\n}"),
        ("[1, 2]|tojson(separators=(',', ':'))", "[1,2]"),
        ("{'b': 1, 'a': 2}|tojson(sort_keys=true)", r#"{"a": 2, "b": 1}"#),
        ("{'b': 1, 'a': 2}|tojson", r#"{"b": 1, "a": 2}"#),
        ("{1: true, none: false}|tojson", r#"{"1": true, "null": false}"#),
    ] {
        assert_eq!(eval(expression), expected, "{expression}");
    }
}

#[test]
fn blocks_are_trimmed_and_loops_controlled() {
    let source = "{% for m in messages %}\n    {% if loop.index0 == 1 %}\n        {% continue %}\n    {% endif %}\n{{ m.content }}\n{% endfor %}\n";
    let text = render(
        source,
        json!([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "user", "content": "c"}]),
    );
    assert_eq!(text.unwrap(), "a\nc\n");
    assert_eq!(render("a\r\n{{ 'b\r\n' }}c\r\n", json!([])).unwrap(), "a\nb\nc");
    let year = eval("strftime_now('%Y')");
    assert_eq!(year.len(), 4);
    assert!(year.starts_with("20"));
    assert!(render("{{ strftime_now('%Q') }}", json!([])).is_err());
}

#[test]
fn messages_keep_extra_keys_and_join_text_parts() {
    let source = "{% for m in messages %}{{ m.role }}:{{ m.content }}:{{ m.tool_calls|tojson if m.tool_calls else '' }};{% endfor %}";
    let text = render(
        source,
        json!([
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "tool_calls": [{"name": "f"}]},
        ]),
    );
    assert_eq!(text.unwrap(), "user:ab:;assistant::[{\"name\": \"f\"}];");
    for (bad, expected) in [
        (json!({"content": "x"}), "no `role`"),
        (json!({"role": "user"}), "no `content`"),
        (json!({"role": "user", "content": 3}), "must be a string"),
        (json!({"role": "user", "content": [{"type": "image"}]}), "not text"),
        (json!("hello"), "must be an object"),
    ] {
        let error = serde_json::from_value::<Message>(bad).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn generation_tags_give_the_spans_of_the_assistant() {
    let template = ChatTemplate::new(
        "{% for m in messages %}\n<{{ m.role }}>\n{% if m.role == 'assistant' %}\n{% generation %}\n{{ m.content }}<end>\n{% endgeneration %}\n{% else %}\n{{ m.content }}\n{% endif %}\n{% endfor %}",
    )
    .unwrap();
    assert!(template.has_generation_tags());
    let messages = [Message::user("é?"), Message::assistant("yes"), Message::user("so?"), Message::assistant("no")];
    let input = ChatInput {
        messages: &messages,
        tools: None,
        add_generation_prompt: false,
        special_tokens: &SpecialTokens::default(),
        template_kwargs: None,
    };
    let (text, spans) = template.render_marked(&input).unwrap();
    let marked: Vec<&str> = spans.iter().map(|span| &text[span.clone()]).collect();
    assert_eq!(marked, ["yes<end>\n", "no<end>\n"]);
    assert_eq!(text, template.render_input(&input).unwrap());

    let trimming =
        ChatTemplate::new("{% set x %}a{% generation %}bc{% endgeneration %}{% endset %}{{ x[2:] }}").unwrap();
    assert!(trimming.render_marked(&input).is_err());
}

#[test]
fn missing_and_broken_templates_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(reference().join("tiny-llama/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert!(tokenizer.chat_template().is_none());
    let error = tokenizer.render_chat(&[], false).unwrap_err().to_string();
    assert!(error.contains("no chat template") && error.contains("`chat_template`"), "{error}");
    assert!(error.contains("`prompt`"), "{error}");

    let config = dir.path().join("tokenizer_config.json");
    std::fs::write(&config, r#"{"chat_template": "{% for"}"#).unwrap();
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    let error = tokenizer.render_chat(&[], false).unwrap_err().to_string();
    assert!(error.contains("syntax error"), "{error}");

    std::fs::write(&config, r#"{"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}], "bos_token": {"content": "<|endoftext|>", "special": true}, "eos_token": "<|im_end|>"}"#).unwrap();
    std::fs::write(
        dir.path().join("generation_config.json"),
        r#"{"eos_token_id": [1, 2, 999999], "pad_token_id": -1}"#,
    )
    .unwrap();
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    assert_eq!(tokenizer.render_chat(&[], false).unwrap(), "D");
    assert_eq!(tokenizer.bos_token_id(), Some(0));
    assert_eq!(tokenizer.eos_token_ids(), [2, 1]);
    assert_eq!((tokenizer.pad_token_id(), tokenizer.padding_id()), (None, 2));

    std::fs::write(dir.path().join("chat_template.json"), r#"{"chat_template": "J"}"#).unwrap();
    assert_eq!(Tokenizer::from_dir(dir.path()).unwrap().render_chat(&[], false).unwrap(), "J");
    std::fs::write(dir.path().join("chat_template.jinja"), "F").unwrap();
    assert_eq!(Tokenizer::from_dir(dir.path()).unwrap().render_chat(&[], false).unwrap(), "F");

    std::fs::write(&config, r#"{"eos_token": 5}"#).unwrap();
    let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json") && error.contains("`eos_token`"), "{error}");
    std::fs::write(&config, "{").unwrap();
    let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json: not valid JSON"), "{error}");
    let error = Tokenizer::from_dir(dir.path().join("nowhere")).unwrap_err().to_string();
    assert!(error.contains("does not exist"), "{error}");
}

/// Templates that would run for ever, or fill the memory, end in an error soon.
#[test]
fn hostile_templates_end() {
    let many = "{% for a in range(90000) %}{% for b in range(90000) %}x{% endfor %}{% endfor %}";
    let doubling = format!(
        "{{% set n = namespace(v='x') %}}{{% for i in range(64) %}}{{% set n.v = n.v ~ n.v %}}{{% endfor %}}{}",
        "{{ n.v|length }}"
    );
    let nested =
        "{% set n = namespace(v=[]) %}{% for i in range(60) %}{% set n.v = [n.v, n.v] %}{% endfor %}{{ n.v|tojson }}";
    let printed =
        "{% set n = namespace(v=[]) %}{% for i in range(60) %}{% set n.v = [n.v, n.v] %}{% endfor %}{{ n.v }}";
    let stringed = "{% set n = namespace(v=[]) %}{% for i in range(60) %}{% set n.v = [n.v, n.v] %}{% endfor %}{{ n.v | string | length }}";
    let deep_value =
        "{% set n = namespace(v=[]) %}{% for i in range(5000) %}{% set n.v = [n.v] %}{% endfor %}{{ n.v }}";
    let recursive = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
    let include = "{% include 'chat_template' %}";
    // As long as a tag may be, so the parser runs with them.
    let lists = format!("{{{{ {}1{} }}}}", "[".repeat(16_000), "]".repeat(16_000));
    let chain = |before: &str, after: &str| {
        let n = 32_700 / (before.len() + after.len());
        format!("{{{{ undefined.x + {}1{} }}}}", before.repeat(n), after.repeat(n))
    };
    let chains = [
        chain("-", ""),
        chain("not ", ""),
        chain("", "+1"),
        chain("", "**1"),
        chain("", "[1]"),
        chain("", ".a"),
        chain("", "|int"),
        chain("", " is odd"),
        chain("", " if 1 else 1"),
        chain("(", ")"),
        "-".repeat(300_000),
        format!("{{{{ {} }}}}", "-".repeat(40_000)),
        "{% if 1 %}".repeat(25_000),
        format!("{{% if 0 %}}{}{{% endif %}}{{{{ undefined.x.y }}}}", "{% elif 0 %}".repeat(20_000)),
    ];
    let cases = [many, &doubling, nested, printed, stringed, deep_value, recursive, include, &lists];
    for source in cases.into_iter().chain(chains.iter().map(String::as_str)) {
        let start = Instant::now();
        // Rendering happens on rayon's threads, which have 2 MiB of stack.
        let result = std::thread::scope(|scope| {
            let run = || render(source, json!([])).map(|text| text.len());
            std::thread::Builder::new().stack_size(2 << 20).spawn_scoped(scope, run).unwrap().join().unwrap()
        });
        let shown: String = source.chars().take(60).collect();
        assert!(result.is_err(), "{shown}: {result:?}");
        // Far above the second or two it takes, as the test may share its cores.
        assert!(start.elapsed() < Duration::from_secs(60), "{shown}");
    }
}

/// Fragments that the parser and the renderer meet in real templates, in any order.
fn any_json() -> impl Strategy<Value = Json> {
    let text = || prop_oneof!["\\PC{0,12}", "user|assistant|system|tool|<\\|im_end\\|>|\\{\\{ x \\}\\}"];
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        any::<f64>().prop_map(Json::from),
        text().prop_map(Json::from),
    ];
    leaf.prop_recursive(4, 32, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Json::from),
            prop::collection::vec((text(), inner), 0..5)
                .prop_map(|entries| Json::Object(entries.into_iter().collect())),
        ]
    })
}

fn message() -> impl Strategy<Value = Json> {
    let key =
        prop_oneof!["tool_calls|name|tool_call_id|reasoning_content|arguments|function|content|role", "\\PC{0,6}"];
    let extra = prop::collection::vec((key, any_json()), 0..3);
    ("user|assistant|system|tool|\\PC{0,5}", "\\PC{0,20}", extra).prop_map(|(role, content, extra)| {
        let mut message = json!({"role": role, "content": content});
        if let Some(map) = message.as_object_mut() {
            map.extend(extra);
        }
        message
    })
}

fn fragment() -> impl Strategy<Value = String> {
    prop_oneof![
        prop::sample::select(vec![
            "{% generation %}",
            "{%- endgeneration -%}",
            "{% for m in messages %}",
            "{% endfor %}",
            "{% if m.role == 'user' %}",
            "{% else %}",
            "{% endif %}",
            "{{ m.content }}",
            "{{ m['role'] | trim }}",
            "{% set x = messages[1:] %}",
            "{% raw %}",
            "{% endraw %}",
            "{#",
            "#}",
            "{{",
            "}}",
            "{%",
            "%}",
            "{{ messages | tojson(indent=4) }}",
            "{{ raise_exception('no') }}",
            "{% macro f(a) %}",
            "{% endmacro %}",
            "{{ f(f) }}",
            "{% break %}",
            "{{ strftime_now('%') }}",
            "{{ 'a' * 100000 }}",
            "{{ range(10)[::-1] | list }}",
            "{% set ns = namespace(a=messages) %}",
            "{% set ns.a = ns %}",
            "{{ ns }}",
            "{{ ns | tojson }}",
            "{{ x.split('a')[-1].rsplit(None, 3) }}",
            "{{ -9223372036854775808 // -1 }}",
            "{{ 1 / 0 }}",
            "{{ 2 ** 9999 }}",
            "{{ 'é'[0:1] }}",
            "{{ '%s' % 3 }}",
            "{{ '{}'.format(1) }}",
            "'",
            "\"",
            "-",
            "\n",
        ])
        .prop_map(str::to_owned),
        "\\PC{0,6}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn templates_never_panic(parts in prop::collection::vec(fragment(), 0..12), content in "\\PC{0,20}") {
        let source = parts.concat();
        if let Ok(template) = ChatTemplate::new(source) {
            let messages = [Message::user(content.clone()), Message::assistant(content)];
            let input = ChatInput {
                messages: &messages,
                tools: None,
                add_generation_prompt: true,
                special_tokens: &SpecialTokens::default(),
                template_kwargs: None,
            };
            let (plain, marked) = bounded(BOUND, || (template.render_input(&input), template.render_marked(&input)));
            if let (Ok(plain), Ok((text, spans))) = (plain, marked) {
                prop_assert_eq!(&plain, &text);
                for span in spans {
                    prop_assert!(text.get(span).is_some());
                }
            }
        }
    }

    /// Conversations are data from strangers, too: any JSON in the place of messages, tools and further keys.
    #[test]
    fn any_conversation_is_rendered_or_refused(messages in prop::collection::vec(message(), 0..4), tools in prop::option::of(any_json()), prompt in any::<bool>(), at in any::<prop::sample::Index>()) {
        static TEMPLATES: std::sync::LazyLock<Vec<ChatTemplate>> = std::sync::LazyLock::new(|| {
            let path = reference().join("chat/templates.json");
            let cases: Vec<Json> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
            let mut sources: Vec<&str> = cases.iter().filter_map(|case| case["template"].as_str()).collect();
            sources.sort_unstable();
            sources.dedup();
            sources.into_iter().map(|source| ChatTemplate::new(source).unwrap()).collect()
        });
        let Ok(messages) = serde_json::from_value::<Vec<Message>>(Json::Array(messages)) else { return Ok(()) };
        let special: SpecialTokens = [("bos_token", "<s>"), ("eos_token", "</s>")].into_iter().collect();
        let input = ChatInput { messages: &messages, tools: tools.as_ref(), add_generation_prompt: prompt, special_tokens: &special, template_kwargs: None };
        let template = &TEMPLATES[at.index(TEMPLATES.len())];
        let (plain, marked) = bounded(BOUND, || (template.render_input(&input), template.render_marked(&input)));
        if let (Ok(plain), Ok((text, _))) = (plain, marked) {
            prop_assert_eq!(plain, text);
        }
    }

    #[test]
    fn streamed_pieces_are_the_text(text in "[a-zé漢🙂 \\n]{0,30}", extra in prop::collection::vec(0u32..4096, 0..12)) {
        let tokenizer = tokenizer_once();
        let mut ids = tokenizer.encode(&text, false).unwrap().ids;
        let mut stream = tokenizer.stream_decoder(&[], true);
        let mut streamed = String::new();
        for &id in &ids {
            let piece = stream.push(id).unwrap();
            prop_assert!(!piece.contains(char::REPLACEMENT_CHARACTER));
            streamed.push_str(&piece);
        }
        prop_assert_eq!(&streamed, &text);
        // Arbitrary tokens need not be UTF-8: nothing may panic, and what is valid survives.
        for &id in &extra {
            streamed.push_str(&stream.push(id).unwrap());
        }
        streamed.push_str(&stream.finish().unwrap());
        ids.extend(&extra);
        let whole = tokenizer.decode(&ids, true).unwrap();
        let keep = |s: &str| s.chars().filter(|c| *c != char::REPLACEMENT_CHARACTER).collect::<String>();
        prop_assert_eq!(keep(&streamed), keep(&whole));
    }
}

fn tokenizer_once() -> &'static Tokenizer {
    static TOKENIZER: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
    TOKENIZER.get_or_init(tokenizer)
}
