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
    let table = |kind: &str, read: &str| {
        Some(format!(
            "is {kind}: `python3 -c \"import pandas, sys; pandas.{read}(sys.argv[1]).to_json(sys.argv[2], orient='records', \
             lines=True, force_ascii=False)\" {file} {rows}` writes its rows as JSON lines"
        ))
    };
    match start {
        [0x1F, 0x8B, ..] => packed("gzip", &format!("gunzip -c {file} > {rows}")),
        [0x28, 0xB5, 0x2F, 0xFD, ..] => packed("Zstandard", &format!("zstd -dc {file} > {rows}")),
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => packed("bzip2", &format!("bunzip2 -c {file} > {rows}")),
        [0xFD, b'7', b'z', b'X', b'Z', 0, ..] => packed("xz", &format!("xz -dc {file} > {rows}")),
        [b'P', b'K', 3, 4, ..] => packed("a zip archive", &format!("unzip -p {file} > {rows}")),
        [b'P', b'A', b'R', b'1', ..] => table("Parquet", "read_parquet"),
        [b'A', b'R', b'R', b'O', b'W', b'1', ..] => table("Arrow", "read_feather"),
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => {
            Some(format!("is UTF-16: `iconv -f UTF-16 -t UTF-8 {file} > {rows}` writes it as UTF-8"))
        }
        _ => match start.trim_ascii_start().first() {
            Some(b'[') => Some(format!(
                "is one JSON array, where each line must be an object: `jq -c '.[]' {file} > {rows}` turns its \
                 elements into lines"
            )),
            _ => None,
        },
    }
}

/// Says what a file is by its first line, which is no JSON object.
pub(super) fn by_first_line(path: &Path, line: &[u8]) -> Option<String> {
    let is_named = |extension: &str| path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension));
    let is_json = matches!(line.first(), Some(b'{' | b'['));
    let fields = |separator: u8| line.split(|byte| *byte == separator).count();
    let separator = match () {
        () if is_json || is_named("txt") => return None,
        () if is_named("tsv") || fields(b'\t') > 1 => '\t',
        () if is_named("csv") || fields(b',') > 1 => ',',
        () => return None,
    };
    let (kind, argument) = if separator == ',' { ("CSV", "") } else { ("tab-separated values", ", delimiter='\\t'") };
    Some(format!(
        "the file looks like {kind}: `python3 -c \"import csv, json, sys; [print(json.dumps(row)) for row in \
         csv.DictReader(sys.stdin{argument})]\" < {} > {}` writes its rows as JSON lines",
        shell(path),
        rows_path(path)
    ))
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
