//! What single files must and must not hold: plain scans of lines.
//!
//! A scan knows no syntax. It leaves out lines that are comments and what follows `#[cfg(test)]`, so that a comment may
//! say "no LoRA here" and a test may name a family. What clippy finds is left to clippy (`Cargo.toml`, `clippy.toml`).

/// A file is at most this long; about 400 lines is the aim.
const MAX_LINES: usize = 600;

/// Model families, and the name that one of them has for its experts.
const FAMILIES: &[&str] = &["llama", "mistral", "mixtral", "qwen", "gemma", "phi", "sparse"];

/// What may name families beside `qlora-models`, whose `family.rs` knows how they compute, and the programs that measure
/// and compare: file formats of others have names for them, and other trainers' configurations.
const FAMILY_TABLES: &[&str] = &[
    "crates/adapter-io/src/gguf/architectures.json",
    "crates/adapter-io/src/experts.rs",
    "crates/qlora-cli/src/init/",
    "crates/qlora-serve/src/text/tools/",
    "crates/qlora-serve/src/http/tools.rs",
];

/// Words that a crate's sources must not hold, and why.
fn forbidden(path: &str) -> &'static [(&'static [&'static str], &'static str)] {
    match crate_of(path) {
        Some("qlora-models" | "conformance" | "benchmarks" | "xtask") | None => &[],
        _ if FAMILY_TABLES.iter().any(|table| path.starts_with(table)) => &[],
        Some("paged-optim") => {
            &[(&["lora", "qlora"], "paged-optim optimizes any parameters, not LoRA's"), (FAMILIES, FAMILIES_REASON)]
        }
        Some(_) => &[(FAMILIES, FAMILIES_REASON)],
    }
}

const FAMILIES_REASON: &str = "model families are named in qlora-models, in adapter-io's two tables of names, in qlora-serve's formats of tool \
                               calls and where `qlora init` reads other trainers' names of templates";

/// Checks one file; `path` is relative to the workspace.
pub(super) fn check(path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    if !path.starts_with("testdata/") && path != "Cargo.lock" {
        home_folders(path, text, &mut found);
    }
    if path.ends_with(".rs") {
        rust(path, text, &mut found);
    }
    let source = path.contains("/src/") && !path.ends_with("/tests.rs");
    if source && [".rs", ".json", ".cu", ".toml"].iter().any(|end| path.ends_with(end)) {
        words(path, text, &mut found);
    }
    // A workspace of its own inherits nothing.
    let member = text.contains("[package]") && !text.lines().any(|line| line == "[workspace]");
    if path.ends_with("Cargo.toml") && member && !path.starts_with("third_party/") {
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
    for (number, _) in text.lines().enumerate().filter(|(_, line)| line.trim_start().starts_with("#[ignore")) {
        found.push(format!("{path}:{}: a test that is switched off", number + 1));
    }
}

fn words(path: &str, text: &str, found: &mut Vec<String>) {
    let rules = forbidden(path);
    let code = text.lines().take_while(|line| *line != "#[cfg(test)]").map(|line| match line.trim_start() {
        comment if comment.starts_with("//") => "",
        _ => line.split(" // ").next().unwrap_or_default(),
    });
    for (number, line) in code.enumerate() {
        for word in subwords(line) {
            if let Some((_, reason)) = rules.iter().find(|(words, _)| words.contains(&word.as_str())) {
                found.push(format!("{path}:{}: `{word}`: {reason}", number + 1));
            }
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
    fn a_file_needs_a_header_and_an_end() {
        assert_eq!(one("crates/nf4-quant/src/lib.rs", "fn f() {}\n"), [""; 0]);
        let found = check("crates/nf4-quant/src/lib.rs", "fn f() {}\n");
        assert_eq!(found, ["crates/nf4-quant/src/lib.rs:1: the file must open with //! docs that say what it is for"]);
        let long = format!("{HEADER}{}", "\n".repeat(MAX_LINES));
        assert_eq!(check("xtask/src/x.rs", &long).len(), 1);
        assert_eq!(one("crates/qlora-cli/tests/x.rs", "    #[ignore]\n    fn f() {}\n").len(), 1);
    }

    #[test]
    fn forbidden_names_are_found_in_their_crates_only() {
        for (name, body) in [
            ("paged-optim", "struct LoraState;"),
            ("qlora-train", "match kind { \"llama\" => 1, _ => 2 };"),
            ("qlora-cli", "let x = LlamaConfig::default();"),
            ("qlora-layers", "let family = \"qwen2\"; // the family"),
            ("adapter-io", "let list = \"block_sparse_moe.experts\";"),
        ] {
            let path = format!("crates/{name}/src/x.rs");
            let found = one(&path, body);
            assert!(found.len() == 1 && found[0].starts_with(&format!("{path}:2: `")), "{body}: {found:?}");
            assert_eq!(one("crates/qlora-models/src/x.rs", body), [""; 0]);
            assert_eq!(one(&format!("crates/{name}/tests/x.rs"), body), [""; 0]);
            assert_eq!(one(&path, &format!("// {body}\nfn f() {{}} // {body}\n#[cfg(test)]\n{body}")), [""; 0]);
        }
        assert_eq!(check("crates/qlora-train/src/names.json", "{\"qwen2\": 1}").len(), 1);
        assert_eq!(check(FAMILY_TABLES[0], "{\"qwen2\": 1}"), [""; 0]);
        // Words that only contain a family's name.
        assert_eq!(one("crates/qlora-train/src/x.rs", "fn graphics(morphism: u8) {}"), [""; 0]);
    }

    #[test]
    fn home_folders_and_missing_lints_are_found() {
        let path = concat!("see /ro", "ot/notes");
        assert_eq!(check("README.md", path), ["README.md:1: a path of one machine"]);
        let manifest = "[package]\nname = \"x\"\n";
        assert_eq!(check("crates/x/Cargo.toml", manifest), ["crates/x/Cargo.toml: add [lints] workspace = true"]);
        assert_eq!(check("crates/x/Cargo.toml", &format!("{manifest}\n[lints]\nworkspace = true\n")), [""; 0]);
        assert_eq!(check("benches/x/Cargo.toml", &format!("{manifest}\n[workspace]\n")), [""; 0]);
    }

    #[test]
    fn names_split_into_words() {
        assert_eq!(subwords("Llama3Config::new_phi2(x)"), ["llama", "config", "new", "phi", "x"]);
    }
}
