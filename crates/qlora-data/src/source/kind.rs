//! What a file is that is no JSONL, and what turns it into one.

use std::path::Path;

/// What some editors put before UTF-8.
pub(super) const BYTE_ORDER_MARK: &[u8] = b"\xEF\xBB\xBF";

/// A path as a shell takes it.
fn shell(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "/._-+=@:,".contains(c);
    if text.chars().all(is_plain) { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

/// Where a command would write the rows: beside the file, under another name.
fn rows_path(path: &Path) -> String {
    let has = |path: &Path, extension: &str| path.extension().is_some_and(|found| found == extension);
    let stem = path.with_extension("");
    let target = match path {
        _ if has(&stem, "jsonl") => stem,
        path if has(path, "jsonl") => path.with_extension("rows.jsonl"),
        path => path.with_extension("jsonl"),
    };
    shell(&target)
}

/// Says what a file is by the bytes that such files begin with.
pub(super) fn by_first_bytes(path: &Path, start: &[u8]) -> Option<String> {
    let start = start.strip_prefix(BYTE_ORDER_MARK).unwrap_or(start);
    let (file, rows) = (shell(path), rows_path(path));
    let packed = |kind: &str, command: &str| Some(format!("is {kind}: unpack it first, `{command}`"));
    match start {
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => packed("bzip2", &format!("bunzip2 -c {file} > {rows}")),
        [0xFD, b'7', b'z', b'X', b'Z', 0, ..] => packed("xz", &format!("xz -dc {file} > {rows}")),
        [b'P', b'K', 3, 4, ..] => packed("a zip archive", &format!("unzip -p {file} > {rows}")),
        [b'A', b'R', b'R', b'O', b'W', b'1', ..] => Some(format!(
            "is Arrow: `python3 -c \"import pandas, sys; pandas.read_feather(sys.argv[1]).to_parquet(sys.argv[2])\" {file} \
             {}` writes its rows as Parquet",
            shell(&path.with_extension("parquet"))
        )),
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => {
            Some(format!("is UTF-16: `iconv -f UTF-16 -t UTF-8 {file} > {rows}` writes it as UTF-8"))
        }
        _ => None,
    }
}

/// What separates the cells of a table of text, which a file is by its name.
pub(super) fn separator(path: &Path) -> Option<u8> {
    let packed = ["gz", "zst"].iter().any(|extension| is_named(path, extension));
    let name = if packed { path.with_extension("") } else { path.to_owned() };
    match () {
        () if is_named(&name, "csv") => Some(b','),
        () if is_named(&name, "tsv") => Some(b'\t'),
        () => None,
    }
}

fn is_named(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

/// Says what a file is by its first line, which is no JSON object.
pub(super) fn by_first_line(path: &Path, line: &[u8]) -> Option<String> {
    let is_json = matches!(line.first(), Some(b'{' | b'['));
    let fields = |separator: u8| line.split(|byte| *byte == separator).count();
    let (kind, extension) = match () {
        () if yaml(path, line).is_some() => return yaml(path, line),
        () if is_json || is_named(path, "txt") => return yaml(path, line),
        () if fields(b'\t') > 1 => ("tab-separated values", "tsv"),
        () if fields(b',') > 1 => ("CSV", "csv"),
        () => return yaml(path, line),
    };
    let target = shell(&path.with_extension(extension));
    Some(format!("the file looks like {kind}, which is read where its name says so: `mv {} {target}`", shell(path)))
}

/// Says that a file is a configuration and no data.
fn yaml(path: &Path, line: &[u8]) -> Option<String> {
    let from = format!("`qlora init --from {} qlora.toml` writes what it says as a configuration", shell(path));
    // What other trainers' configurations begin with is a key in letters.
    let begins_as_yaml = || {
        let line = line.split(|byte| *byte == b'\n').next().unwrap_or_default();
        let key = line.split(|byte| *byte == b':').next().unwrap_or_default();
        let is_key =
            !key.is_empty() && key.iter().all(|byte| byte.is_ascii_lowercase() || b"_0123456789".contains(byte));
        line == b"---" || (is_key && (line[key.len()..].starts_with(b": ") || line[key.len()..] == *b":"))
    };
    let is_json = line.starts_with(b"{");
    let is_yaml = is_named(path, "yml") || is_named(path, "yaml") || (!is_named(path, "txt") && begins_as_yaml());
    match () {
        () if path.file_name().is_some_and(|name| name == "adapter_config.json") => {
            Some(format!("is the configuration of a PEFT adapter, and data.train names the rows to learn from; {from}"))
        }
        () if is_yaml && !is_json => {
            Some(format!("is a configuration in YAML, and data.train names the rows to learn from; {from}"))
        }
        () if is_named(path, "toml") && !is_json => {
            Some("is a configuration, and data.train names the rows to learn from".into())
        }
        () => None,
    }
}

/// What puts objects of several lines on one line each.
pub(super) fn one_line_each(path: &Path) -> String {
    format!("`jq -c . {} > {}` puts each on one line", shell(path), rows_path(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_never_write_over_the_file_they_read() {
        for (path, rows) in [
            ("a/data.json", "a/data.jsonl"),
            ("data.jsonl", "data.rows.jsonl"),
            ("data.jsonl.gz", "data.jsonl"),
            ("data", "data.jsonl"),
            ("my data.csv", "'my data.jsonl'"),
        ] {
            assert_eq!(rows_path(Path::new(path)), rows);
        }
        assert_eq!(shell(Path::new("it's")), "'it'\\''s'");
    }
}
