//! Mutations of chat templates and of TOML: pieces that mean something in them, in places where they may stand.

use crate::random::Dice;

/// Pieces of Jinja. Some are refused, some take for ever where nothing bounds them, some write without end.
const PIECES: &[&str] = &[
    "{{ messages }}",
    "{{ messages[0] }}",
    "{{ messages[99999999999] }}",
    "{{ messages[-1].content }}",
    "{{ undefined_name }}",
    "{{ undefined_name.x.y }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception(messages) }}",
    "{{ strftime_now('%Y') }}",
    "{{ strftime_now('%!%') }}",
    "{{ strftime_now('%' * 10) }}",
    "{{ tojson }}",
    "{{ messages | tojson }}",
    "{{ messages | tojson(indent=4) }}",
    "{{ messages | tojson(indent=4294967296) }}",
    "{{ 'x' * 5 }}",
    "{{ 'x' * 1000000000 }}",
    "{{ 'x' * -1 }}",
    "{{ [1] * 1000000000 }}",
    "{{ '{:>1000000000}'.format('x') }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ '%s%s' | format(1) }}",
    "{{ '%' | format(1) }}",
    "{{ 'a' | indent(999999999) }}",
    "{{ 'a' | center(999999999) }}",
    "{{ 'a b' | wordwrap(0) }}",
    "{{ 'ab' | batch(0) | list }}",
    "{{ 'ab' | slice(0) | list }}",
    "{{ 'ab' | slice(4294967296) | list }}",
    "{{ range(99999999) | list }}",
    "{{ range(0, 10, 0) | list }}",
    "{{ range(-9223372036854775807, 9223372036854775807) | length }}",
    "{{ 1 / 0 }}",
    "{{ 1 // 0 }}",
    "{{ 1 % 0 }}",
    "{{ 2 ** 99999 }}",
    "{{ -9223372036854775807 - 2 }}",
    "{{ 9223372036854775807 + 1 }}",
    "{{ 99999999999999999999999 }}",
    "{{ 1e999 }}",
    "{{ 'a'[::0] }}",
    "{{ 'äö'[1:] }}",
    "{{ 'äö'[9223372036854775807:] }}",
    "{{ 'a'.split('') }}",
    "{{ 'aaa'.replace('', 'bb') }}",
    "{{ 'aaa'.replace('a', 'b', -9) }}",
    "{{ 'x'.join(messages) }}",
    "{{ 'x'.zfill(999999999) }}",
    "{{ 'a' | replace('', 'x') }}",
    "{{ 'a' | truncate(-1) }}",
    "{{ 3.5 | round(99999) }}",
    "{{ 3.5 | round(-99999) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{% set ns = namespace(s='x') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
    "{% set x = messages %}",
    "{% set messages = [] %}",
    "{% set ns = namespace() %}{% set ns.ns = ns %}{{ ns }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% generation %}{{ 'x' }}{% endgeneration %}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% import 'x' as x %}",
    "{% block a %}{% endblock %}",
    "{% if %}",
    "{% endif %}",
    "{% endfor %}",
    "{% break %}",
    "{% continue %}",
    "{% raw %}",
    "{% endraw %}",
    "{#",
    "#}",
    "{{",
    "}}",
    "{%",
    "%}",
    "{{-",
    "-}}",
    "{%+ if true %}",
    "{{ bos_token }}",
    "{{ eos_token }}",
    "{{ tools }}",
    "{{ self }}",
    "{{ loop.index }}",
    "{{ loop.previtem.content }}",
    "{{ caller() }}",
    "{{ cycler(1)() }}",
    "{{ joiner()() }}",
    "{{ lipsum(9999999) }}",
    "{{ dict(messages[0]) }}",
    "{{ messages | map(attribute='x') | list }}",
    "{{ messages | groupby('role') }}",
    "{{ messages | sort }}",
    "{{ messages | unique | list }}",
    "{{ 'x' is mapping }}",
    "{{ messages is iterable }}",
    "{{ x is y }}",
    "{{ '\\ud800' }}",
    "{{ '\\x00' }}",
    "\u{1b}[2J",
    "\0",
    "\u{feff}",
    "{{ '",
    "{{ ((((((((((((((((((((((((1)))))))))))))))))))))))) }}",
];

/// Changes a template; says what was done.
pub(crate) fn mutate_template(dice: &mut Dice, bytes: &mut Vec<u8>) -> String {
    if dice.once_in(4) {
        return super::bytes::mutate(dice, bytes);
    }
    let text = String::from_utf8_lossy(bytes).into_owned();
    // Between tags mostly, inside one sometimes.
    let mut places: Vec<usize> = text.match_indices("{{").chain(text.match_indices("{%")).map(|(at, _)| at).collect();
    places.push(text.len());
    let mut at = *dice.pick(&places);
    if dice.once_in(5) {
        at = dice.below(text.len() + 1);
        while !text.is_char_boundary(at) {
            at -= 1;
        }
    }
    let (piece, what) = match dice.below(8) {
        0 => {
            let depth = *dice.pick(&[50, 500, 50_000]);
            let (open, close) = *dice.pick(&[
                ("{% if true %}", "{% endif %}"),
                ("{% for x in messages %}", "{% endfor %}"),
                ("{{ (", "x"),
                ("{% set a %}", "{% endset %}"),
            ]);
            match open {
                "{{ (" => {
                    (format!("{{{{ {}1{} }}}}", "(".repeat(depth), ")".repeat(depth)), format!("{depth} parentheses"))
                }
                _ => (format!("{}{}", open.repeat(depth), close.repeat(depth)), format!("{open} {depth} deep")),
            }
        }
        1 => {
            // The tag that stands there is gone.
            let end = text[at..].find("}}").or_else(|| text[at..].find("%}")).map_or(text.len(), |end| at + end + 2);
            *bytes = format!("{}{}", &text[..at], &text[end..]).into_bytes();
            return format!("the tag at byte {at} removed");
        }
        _ => {
            let piece = (*dice.pick(PIECES)).to_owned();
            let what = piece.escape_debug().to_string();
            (piece, what)
        }
    };
    *bytes = format!("{}{piece}{}", &text[..at], &text[at..]).into_bytes();
    format!("{what} at byte {at}")
}

/// Values as TOML writes them.
const VALUES: &[&str] = &[
    "0",
    "1",
    "-1",
    "2",
    "3",
    "63",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "-9223372036854775808",
    "9223372036854775808",
    "0x7fffffffffffffff",
    "0.0",
    "-0.0",
    "0.5",
    "1.0",
    "1.5",
    "-0.5",
    "1e-320",
    "1e38",
    "1e39",
    "1e308",
    "1e309",
    "nan",
    "-nan",
    "inf",
    "-inf",
    "true",
    "false",
    "\"\"",
    "\" \"",
    "\"none\"",
    "\"auto\"",
    "\"full\"",
    "\"0\"",
    "\"1e999\"",
    "\"999999999999GiB\"",
    "\"-1MiB\"",
    "\"NaNMiB\"",
    "\"pissa_niter_99999999999\"",
    "\"pissa_niter_0\"",
    "\"loftq\"",
    "\"eva\"",
    "\"olora\"",
    "\"cuda:99999999999\"",
    "\"cpu:1\"",
    "\"(\"",
    "\"(a+)+$\"",
    "\"[\"",
    "\".*\"",
    "\"a{1000}{1000}{1000}\"",
    "\"\\u001b[31m\"",
    "\"\\u0000\"",
    "\"/\"",
    "\"..\"",
    "\"/dev/null\"",
    "'''\nx'''",
    "[]",
    "[0]",
    "[-1]",
    "[0.9]",
    "[0.9, nan]",
    "[2.0, 2.0]",
    "[9223372036854775807]",
    "[\"q_proj\"]",
    "[\"\"]",
    "[\"lm_head\", \"embed_tokens\"]",
    "[[]]",
    "[1, \"a\"]",
    "{}",
    "{ q_proj = 0 }",
    "{ q_proj = 9223372036854775807 }",
    "{ \"(\" = 8 }",
    "{ q_proj = nan }",
    "{ a = { b = { c = 1 } } }",
    "1979-05-27T07:32:00Z",
    "07:32:00",
    "\"{{ messages }}\"",
    "\"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}\"",
];

/// Changes a TOML file with `key = value` lines; says what was done.
pub(crate) fn mutate_toml(dice: &mut Dice, bytes: &mut Vec<u8>) -> String {
    if dice.once_in(8) {
        return super::bytes::mutate(dice, bytes);
    }
    let text = String::from_utf8_lossy(bytes).into_owned();
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let keys: Vec<usize> = (0..lines.len()).filter(|&at| lines[at].contains(" = ")).collect();
    let Some(&at) = keys.get(dice.below(keys.len())) else { return super::bytes::mutate(dice, bytes) };
    let (key, value) =
        lines[at].split_once(" = ").map(|(key, value)| (key.to_owned(), value.to_owned())).unwrap_or_default();
    let what = match dice.below(16) {
        0 => {
            lines.remove(at);
            "removed".to_owned()
        }
        1 => {
            lines.insert(at, format!("{key} = {}", dice.pick(VALUES)));
            "twice".to_owned()
        }
        2 => {
            let other = lines[*dice.pick(&keys)].clone();
            let (_, other) = other.split_once(" = ").unwrap_or_default();
            lines[at] = format!("{key} = {other}");
            format!("= {other}")
        }
        3 => {
            let (open, close) = *dice.pick(&[("[", "]"), ("{ a = ", " }")]);
            let depth = *dice.pick(&[50, 200, 50_000]);
            lines[at] = format!("{key} = {}1{}", open.repeat(depth), close.repeat(depth));
            format!("{depth} deep")
        }
        4 => {
            lines[at] = format!(
                "{key} = \"{}\"",
                dice.pick(&["a", "(", "x/", "\\u0000", "ä"]).repeat(*dice.pick(&[300, 5_000, 100_000]))
            );
            "a long value".to_owned()
        }
        5 => {
            let number: Option<f64> = value.parse().ok();
            let factor = *dice.pick(&[-1.0, 0.0, 1e3, 1e6, 1e12, 0.001]);
            lines[at] = match number {
                Some(number) if value.contains('.') => format!("{key} = {:?}", number * factor),
                Some(number) => format!("{key} = {:.0}", number * factor),
                None => format!("{key} = [{value}, {value}]"),
            };
            "a near value".to_owned()
        }
        6 => {
            let name = dice.pick(&["x", "\"\"", "a.b.c", "\"\\u001b[31m\"", "train", "__proto__"]);
            lines[at] = format!("{name} = {value}");
            format!("named {name}")
        }
        7 => {
            let header =
                dice.pick(&["[train]", "[data]", "[x]", "[[lora]]", "[lora.rank]", "[", "[a.b.c.d]", "[\"\"]"]);
            lines.insert(at, (*header).to_owned());
            format!("{header} before it")
        }
        _ => {
            let new = dice.pick(VALUES);
            lines[at] = format!("{key} = {new}");
            format!("= {new}")
        }
    };
    *bytes = (lines.join("\n") + "\n").into_bytes();
    format!("{key} {}", what.escape_debug())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn templates_get_pieces_in_places_where_they_may_stand() {
        let text = "{% for m in messages %}{{ m['content'] }}ä{% endfor %}";
        let mutated = |stream| {
            let mut bytes = text.as_bytes().to_vec();
            let what = mutate_template(&mut Dice::new(3, stream), &mut bytes);
            (what, bytes)
        };
        assert_eq!(mutated(1), mutated(1));
        let all: Vec<_> = (0..2000).map(mutated).collect();
        let holds = |piece: &str| all.iter().any(|(_, bytes)| String::from_utf8_lossy(bytes).contains(piece));
        assert!(PIECES.iter().filter(|piece| holds(piece)).count() > PIECES.len() * 9 / 10);
        assert!(holds("{% if true %}{% if true %}") && !all.iter().all(|(_, bytes)| bytes.len() > text.len()));
    }

    #[test]
    fn toml_gets_odd_values_of_known_keys() {
        let text = "device = \"cpu\"\n[train]\nlearning_rate = 2e-4\nmax_steps = 10\n";
        let all: Vec<(String, String)> = (0..4000)
            .map(|stream| {
                let mut bytes = text.as_bytes().to_vec();
                let what = mutate_toml(&mut Dice::new(4, stream), &mut bytes);
                (what, String::from_utf8_lossy(&bytes).into_owned())
            })
            .collect();
        for expected in
            ["learning_rate = nan", "max_steps = 9223372036854775807", "[[lora]]\n", "device = [", "max_steps = -10"]
        {
            assert!(all.iter().any(|(_, text)| text.contains(expected)), "{expected}");
        }
        let parsed = all.iter().filter(|(_, text)| text.parse::<toml::Table>().is_ok()).count();
        assert!(parsed > all.len() / 2, "most reach the program's own checks: {parsed}");
    }
}
