//! What single files must and must not hold.

use super::lexer::{Code, code};

/// A file is at most this long; about 400 lines is the aim.
const MAX_LINES: usize = 600;

/// Words that a crate's code must not hold: the crates, the words, and why.
const FORBIDDEN: &[(&[&str], &[&str], &str)] = &[
    (&["nf4-quant"], &["burn"], "nf4-quant knows CubeCL, not Burn"),
    (&["adapter-io"], &["burn", "cubecl"], "adapter-io works on host memory: no Burn, no GPU"),
    (
        &["chat-text", "qlora-data"],
        &["burn", "cubecl"],
        "chat-text and qlora-data work on host memory: no Burn, no GPU",
    ),
    (&["paged-optim"], &["lora", "qlora"], "paged-optim optimizes any parameters, not LoRA's"),
    (
        &[
            "nf4-quant",
            "adapter-io",
            "paged-optim",
            "chat-text",
            "qlora-data",
            "qlora-layers",
            "qlora-train",
            "burn-qlora",
            "qlora-cli",
        ],
        &["llama", "mistral", "mixtral", "qwen", "gemma", "phi"],
        "only qlora-models knows model families",
    ),
];

/// Crates that talk to people.
const PROGRAMS: &[&str] = &["qlora-cli", "conformance", "benchmarks", "xtask"];

const OUTPUT: &[&str] = &["print!(", "println!(", "eprint!(", "eprintln!(", "process::exit("];
const UNFINISHED: &[&str] = &["todo!(", "unimplemented!(", "dbg!(", "#[ignore"];

/// Checks one file; `path` is relative to the workspace.
pub(super) fn check(path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    if !path.starts_with("testdata/") && path != "Cargo.lock" {
        home_folders(path, text, &mut found);
    }
    if path.ends_with(".rs") {
        rust(path, text, &mut found);
    }
    if path.ends_with("Cargo.toml") && text.contains("[package]") && !path.starts_with("third_party/") {
        let lints =
            text.split_once("[lints]").is_some_and(|(_, rest)| rest.trim_start().starts_with("workspace = true"));
        if !lints {
            found.push(format!("{path}: add [lints] workspace = true"));
        }
    }
    found
}

fn rust(path: &str, text: &str, found: &mut Vec<String>) {
    if !text.starts_with("//!") {
        found.push(format!("{path}:1: the file must open with //! docs that say what it is for"));
    }
    let lines = text.lines().count();
    if lines > MAX_LINES {
        found.push(format!("{path}: {lines} lines; split it, {MAX_LINES} is the limit"));
    }
    let code = code(text);
    report(path, &code.without_strings, UNFINISHED, "unfinished or switched off", found);
    let Some(name) = crate_of(path) else { return };
    if is_test(path) {
        return;
    }
    if !PROGRAMS.contains(&name) {
        report(path, &code.without_strings, OUTPUT, "only programs print or exit", found);
    }
    forbidden(name, path, &code, found);
}

fn forbidden(name: &str, path: &str, code: &Code, found: &mut Vec<String>) {
    let rules = FORBIDDEN.iter().filter(|(crates, ..)| crates.contains(&name));
    for (_, words, reason) in rules {
        for (number, line) in code.with_strings.lines().enumerate() {
            if let Some(word) = subwords(line).into_iter().find(|word| words.contains(&word.as_str())) {
                found.push(format!("{path}:{}: `{word}`: {reason}", number + 1));
            }
        }
    }
}

fn report(path: &str, code: &str, patterns: &[&str], reason: &str, found: &mut Vec<String>) {
    for (number, line) in code.lines().enumerate() {
        // `eprintln!(` also ends in `println!(`: look at whole words.
        let hit = patterns.iter().find(|pattern| {
            line.match_indices(**pattern).any(|(at, _)| {
                let before = line[..at].chars().next_back().unwrap_or(' ');
                !before.is_alphanumeric() && before != '_'
            })
        });
        if let Some(pattern) = hit {
            found.push(format!("{path}:{}: `{}`: {reason}", number + 1, pattern.trim_end_matches('(')));
        }
    }
}

fn home_folders(path: &str, text: &str, found: &mut Vec<String>) {
    // Written in two parts, so that this file passes.
    let homes = [concat!("/ho", "me/"), concat!("/ro", "ot/"), concat!("/Use", "rs/")];
    for (number, line) in text.lines().enumerate() {
        if homes.iter().any(|home| line.contains(home)) {
            found.push(format!("{path}:{}: a path of one machine", number + 1));
        }
    }
}

/// The crate a source file belongs to.
fn crate_of(path: &str) -> Option<&str> {
    let mut parts = path.split('/');
    match parts.next()? {
        "crates" => parts.next(),
        "xtask" => Some("xtask"),
        _ => None,
    }
}

fn is_test(path: &str) -> bool {
    path.ends_with("/tests.rs") || ["/tests/", "/benches/", "/examples/"].iter().any(|part| path.contains(part))
}

/// The words of a line, with names split as `snake_case` and `CamelCase` split them, in lower case
/// and without trailing digits: `Llama3Config` is `llama` and `config`.
fn subwords(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut previous = ' ';
    for c in line.chars() {
        let boundary = !c.is_alphabetic() || c.is_uppercase() && previous.is_lowercase();
        if boundary {
            words.push(String::new());
        }
        if c.is_alphabetic() {
            words.iter_mut().last().into_iter().for_each(|word| word.extend(c.to_lowercase()));
        }
        previous = c;
    }
    words.retain(|word| !word.is_empty());
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "//! Header.\n";

    fn one(path: &str, body: &str) -> Vec<String> {
        check(path, &format!("{HEADER}{body}"))
    }

    #[test]
    fn a_clean_file_passes() {
        assert_eq!(one("crates/nf4-quant/src/lib.rs", "/// No Burn here.\nfn f() {}\n"), [""; 0]);
    }

    #[test]
    fn a_file_needs_a_header_and_an_end() {
        let found = check("crates/nf4-quant/src/lib.rs", "fn f() {}\n");
        assert_eq!(found, ["crates/nf4-quant/src/lib.rs:1: the file must open with //! docs that say what it is for"]);
        let long = format!("{HEADER}{}", "\n".repeat(MAX_LINES));
        assert_eq!(check("xtask/src/x.rs", &long).len(), 1);
    }

    #[test]
    fn forbidden_names_are_found_in_their_crates_only() {
        let cases = [
            ("nf4-quant", "use burn::tensor::Tensor;"),
            ("nf4-quant", "fn f(x: burn_cubecl::X) {}"),
            ("adapter-io", "use cubecl::prelude::*;"),
            ("paged-optim", "struct LoraState;"),
            ("chat-text", "use burn::tensor::Tensor;"),
            ("qlora-data", "use burn::tensor::Tensor;"),
            ("qlora-train", "match kind { \"llama\" => 1, _ => 2 };"),
            ("qlora-cli", "let x = LlamaConfig::default();"),
            ("qlora-layers", "let family = \"qwen2\";"),
        ];
        for (name, body) in cases {
            let path = format!("crates/{name}/src/x.rs");
            let found = one(&path, body);
            assert!(found.len() == 1 && found[0].starts_with(&format!("{path}:2: `")), "{body}: {found:?}");
            assert_eq!(one("crates/qlora-models/src/x.rs", body), [""; 0]);
            assert_eq!(one(&format!("crates/{name}/tests/x.rs"), body), [""; 0]);
            assert_eq!(one(&path, &format!("// {body}\n")), [""; 0]);
        }
        // Words that only contain a family's name.
        assert_eq!(one("crates/qlora-train/src/x.rs", "fn graphics(morphism: u8) {}"), [""; 0]);
    }

    #[test]
    fn only_programs_print_or_exit() {
        for body in ["fn f() { println!(\"x\") }", "fn f() { eprintln!(\"x\") }", "fn f() { std::process::exit(1) }"] {
            assert_eq!(one("crates/qlora-train/src/x.rs", body).len(), 1, "{body}");
            assert_eq!(one("crates/qlora-cli/src/x.rs", body), [""; 0]);
        }
        assert_eq!(one("crates/qlora-train/src/x.rs", "const X: &str = \"println!(\";"), [""; 0]);
    }

    #[test]
    fn unfinished_code_is_found_everywhere() {
        for body in ["fn f() { todo!() }", "fn f() { dbg!(1); }", "#[ignore]\nfn f() {}"] {
            assert_eq!(one("crates/qlora-cli/src/x.rs", body).len(), 1, "{body}");
        }
    }

    #[test]
    fn home_folders_and_missing_lints_are_found() {
        let path = concat!("see /ro", "ot/notes");
        assert_eq!(check("README.md", path), ["README.md:1: a path of one machine"]);
        let manifest = "[package]\nname = \"x\"\n";
        assert_eq!(check("crates/x/Cargo.toml", manifest), ["crates/x/Cargo.toml: add [lints] workspace = true"]);
        assert_eq!(check("crates/x/Cargo.toml", &format!("{manifest}\n[lints]\nworkspace = true\n")), [""; 0]);
    }

    #[test]
    fn names_split_into_words() {
        assert_eq!(subwords("Llama3Config::new_phi2(x)"), ["llama", "config", "new", "phi", "x"]);
    }
}
