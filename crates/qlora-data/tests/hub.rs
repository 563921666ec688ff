//! Rows of a data set of the hub, from a hub on this machine.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{config, tokenizer};
use model_hub::Hub;
use qlora_data::{DataConfig, LoadOptions, Source, Sources, load_sources, load_splits_with};
use serde_json::{Value, json};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What a hub of one data set, `org/rows`, knows and was asked.
#[derive(Default)]
struct State {
    files: BTreeMap<&'static str, String>,
    card: Value,
    asked: Vec<String>,
}

/// Starts a hub that knows no checksums of several files at once, as some mirrors.
fn serve(state: &Arc<Mutex<State>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let state = Arc::clone(state);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            answer(stream, &state);
        }
    });
    address
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let (mut line, mut length) = (String::new(), 0);
    reader.read_line(&mut line).ok()?;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header).ok()? <= 2 {
            break;
        }
        if let Some(value) = header.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().ok()?;
        }
    }
    reader.read_exact(&mut vec![0; length]).ok()?;
    let mut state = state.lock().unwrap();
    let mut words = line.split(' ');
    let (method, path) = (words.next()?, words.next()?);
    state.asked.push(format!("{method} {path}"));
    let of_file = path.strip_prefix(&format!("/datasets/org/rows/resolve/{COMMIT}/"));
    let (status, body) = match (path, of_file.and_then(|name| state.files.get(name))) {
        ("/api/datasets/org/rows/revision/main", _) => {
            let siblings: Vec<_> = state.files.keys().map(|name| json!({"rfilename": name})).collect();
            let about = json!({"id": "org/rows", "sha": COMMIT, "siblings": siblings, "cardData": state.card});
            ("200 OK", about.to_string())
        }
        (_, Some(content)) => ("200 OK", content.clone()),
        _ => ("404 Not Found", "{}".to_owned()),
    };
    // An ETag that is no hash: what comes is not checked.
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\nX-Repo-Commit: {COMMIT}\r\nETag: \"e{}\"\r\n\r\n",
        body.len(),
        path.replace('/', "-")
    )
    .ok()?;
    if method != "HEAD" {
        stream.write_all(body.as_bytes()).ok()?;
    }
    Some(())
}

fn hub(cache: &Path, endpoint: String) -> Hub {
    Hub {
        cache_dir: cache.to_owned(),
        endpoint,
        token: None,
        offline: false,
        xet: false,
        retry_delay: Duration::from_millis(1),
        progress: None,
    }
}

fn rows(texts: &[&str]) -> String {
    texts.iter().map(|text| format!("{{\"text\": \"{text}\"}}\n")).collect()
}

#[test]
fn a_data_set_is_trained_by_its_id_subset_and_split() {
    let state = Arc::new(Mutex::new(State::default()));
    {
        let mut state = state.lock().unwrap();
        state.card = json!({"configs": [
            {"config_name": "en", "data_files": [{"split": "train", "path": "en/train-*"}, {"split": "test", "path": "en/t.jsonl"}]},
            {"config_name": "de", "data_files": "de/*"},
        ]});
        for (name, content) in [
            ("en/train-0.jsonl", rows(&["a", "b", "c"])),
            ("en/train-1.jsonl", rows(&["d", "e", "f", "g"])),
            ("en/t.jsonl", rows(&["h"])),
            ("de/0.csv", "text\ni\n".into()),
            ("README.md", "---\n---\n".into()),
        ] {
            state.files.insert(name, content);
        }
    }
    let cache = tempfile::tempdir().unwrap();
    let mut hub = hub(cache.path(), serve(&state));
    let id = || Source::new("org/rows");
    let given = DataConfig {
        train: Sources(vec![id()]),
        subset: Some("en".into()),
        split: Some("train[:50%]".into()),
        eval: Some(Sources(vec![Source { split: Some("test".into()), ..id() }])),
        ..config()
    };
    let load = |hub: &Hub, config: &DataConfig| {
        let options = LoadOptions { hub: Some(hub), ..LoadOptions::default() };
        load_splits_with(config, tokenizer(), 1, &options).map_err(|error| error.to_string())
    };
    let (train, eval) = load(&hub, &given).unwrap();
    // Half of 7 rows, over the end of the first file.
    assert_eq!((train.examples.len(), train.report.files.len(), eval.examples.len()), (4, 2, 1));
    assert_eq!(train.report.sources, "org/rows");
    let downloads = |state: &State| -> Vec<String> {
        state
            .asked
            .iter()
            .filter(|line| line.starts_with("GET /datasets/"))
            .map(|line| line.rsplit('/').next().unwrap().to_owned())
            .collect()
    };
    assert_eq!(
        downloads(&state.lock().unwrap()),
        ["train-0.jsonl", "train-1.jsonl", "t.jsonl"],
        "what is read, and once"
    );

    // Other configurations, and what there is to say where it is not clear.
    let german = DataConfig { subset: Some("de".into()), split: None, eval: None, ..given.clone() };
    assert_eq!(load(&hub, &german).unwrap().0.examples.len(), 1);
    for (config, expected) in [
        (
            DataConfig { subset: None, ..given.clone() },
            "org/rows: has several subsets: en and de; say which with data.subset",
        ),
        (
            DataConfig { split: Some("dev".into()), ..given.clone() },
            "org/rows: has no split \"dev\"; it has test and train",
        ),
        (DataConfig { train: "org/none".into(), ..given.clone() }, "has no such data set"),
    ] {
        let error = load(&hub, &config).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }

    // Offline all of it is there, and as it was.
    hub.offline = true;
    let (again, _) = load(&hub, &given).unwrap();
    assert_eq!(again.fingerprint(), train.fingerprint());
    let options = LoadOptions { hub: Some(&hub), ..LoadOptions::default() };
    let readme = Sources(vec![Source { files: Some("*.md".into()), ..id() }]);
    let error = load_sources(&readme, &config(), tokenizer(), &options).unwrap_err().to_string();
    assert!(error.contains("README.md is neither JSON"), "{error}");
}
