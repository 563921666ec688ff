//! Just enough of Rust's lexical structure to tell code from comments, strings and tests.

/// A source file without its comments and test modules, line by line as before.
pub(super) struct Code {
    /// With string literals.
    pub with_strings: String,
    /// With string literals blanked.
    pub without_strings: String,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Code,
    Comment,
    Text,
}

/// Splits a source file.
pub(super) fn code(source: &str) -> Code {
    let chars: Vec<char> = source.chars().collect();
    let mut kinds = kinds(&chars);
    blank_tests(&chars, &mut kinds);
    let render = |keep: &dyn Fn(Kind) -> bool| -> String {
        chars.iter().zip(&kinds).map(|(&c, &kind)| if c == '\n' || keep(kind) { c } else { ' ' }).collect()
    };
    Code { with_strings: render(&|kind| kind != Kind::Comment), without_strings: render(&|kind| kind == Kind::Code) }
}

/// What each character belongs to.
fn kinds(chars: &[char]) -> Vec<Kind> {
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut kinds = Vec::with_capacity(chars.len());
    let mut i = 0;
    while i < chars.len() {
        let before = i.checked_sub(1).map_or(' ', at);
        let (kind, end) = match at(i) {
            '/' if at(i + 1) == '/' => (Kind::Comment, find(chars, i, |j| at(j) == '\n')),
            '/' if at(i + 1) == '*' => (Kind::Comment, end_of_block_comment(chars, i)),
            '"' => (Kind::Text, end_of_string(chars, i + 1)),
            // r"..", r#".."#, br".." but not the raw identifier r#type and not a name that ends in r
            'r' if !is_word(before) || before == 'b' => {
                let hashes = (i + 1..).take_while(|&j| at(j) == '#').count();
                if at(i + 1 + hashes) == '"' {
                    let closes = |j: usize| at(j) == '"' && (1..=hashes).all(|k| at(j + k) == '#');
                    (Kind::Text, find(chars, i + 2 + hashes, closes) + 1 + hashes)
                } else {
                    (Kind::Code, i + 1)
                }
            }
            // 'a' and '\n' but not the lifetime 'a
            '\'' if at(i + 1) == '\\' => (Kind::Text, find(chars, i + 3, |j| at(j) == '\'') + 1),
            '\'' if at(i + 2) == '\'' => (Kind::Text, i + 3),
            _ => (Kind::Code, i + 1),
        };
        let end = end.min(chars.len());
        kinds.resize(end, kind);
        i = end;
    }
    kinds
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn find(chars: &[char], from: usize, is: impl Fn(usize) -> bool) -> usize {
    (from..chars.len()).find(|&j| is(j)).unwrap_or(chars.len())
}

fn end_of_string(chars: &[char], mut i: usize) -> usize {
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

fn end_of_block_comment(chars: &[char], start: usize) -> usize {
    let mut depth = 0;
    let mut i = start;
    while i + 1 < chars.len() {
        match (chars[i], chars[i + 1]) {
            ('/', '*') => depth += 1,
            ('*', '/') => depth -= 1,
            _ => {
                i += 1;
                continue;
            }
        }
        i += 2;
        if depth == 0 {
            return i;
        }
    }
    chars.len()
}

/// Turns every item under `#[cfg(test)]` into a comment.
fn blank_tests(chars: &[char], kinds: &mut [Kind]) {
    let attribute: Vec<char> = "#[cfg(test)]".chars().collect();
    let mut i = 0;
    while i + attribute.len() <= chars.len() {
        if kinds[i] != Kind::Code || chars[i..i + attribute.len()] != attribute {
            i += 1;
            continue;
        }
        // The item ends with its first semicolon or with its outermost closing brace.
        let mut depth = 0;
        let mut end = i + attribute.len();
        while end < chars.len() {
            let c = if kinds[end] == Kind::Code { chars[end] } else { ' ' };
            end += 1;
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ';' if depth == 0 => break,
                _ => continue,
            }
            if c == '}' && depth == 0 {
                break;
            }
        }
        kinds[i..end].fill(Kind::Comment);
        i = end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn squeeze(text: &str) -> String {
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn comments_go_and_strings_stay_or_go() {
        let source = "let a = \"// no comment\"; // burn\n/* burn /* nested */ burn */ let b = 'x';\n";
        let code = code(source);
        assert_eq!(squeeze(&code.with_strings), "let a = \"// no comment\"; let b = 'x';");
        assert_eq!(squeeze(&code.without_strings), "let a = ; let b = ;");
        assert_eq!(code.with_strings.lines().count(), source.lines().count());
    }

    #[test]
    fn quotes_raw_strings_and_lifetimes_do_not_confuse_it() {
        let source = r####"fn f<'a>(x: &'a str) { g('"', '\'', "\"", r#"a " b"#, br"c", for_r, r#type) } // end"####;
        let code = code(source);
        assert_eq!(squeeze(&code.without_strings), "fn f<'a>(x: &'a str) { g( , , , , b , for_r, r#type) }");
    }

    #[test]
    fn test_modules_go_and_the_rest_stays() {
        let source = "use a;\n#[cfg(test)]\nmod tests;\nfn b() { c() }\n#[cfg(test)]\nmod tests {\n fn d() { \"}\" }\n}\nfn e() {}\n";
        assert_eq!(squeeze(&code(source).with_strings), "use a; fn b() { c() } fn e() {}");
    }

    #[test]
    fn an_unfinished_file_ends_without_a_panic() {
        for source in ["\"open", "/* open", "r#\"open", "'\\", "#[cfg(test)] mod x {", "\"\\"] {
            assert_eq!(code(source).with_strings.chars().count(), source.chars().count());
        }
    }
}
