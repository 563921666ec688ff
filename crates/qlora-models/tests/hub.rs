//! Folders, the cache, and a hub on this machine that speaks the few requests a download takes.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use qlora_models::hub::Hub;

const SHA: &str = "0123456789abcdef0123456789abcdef01234567";
const INDEX: &str =
    r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}}"#;

/// A hub with one model, `org/tiny`, and what it was asked for.
struct Server {
    endpoint: String,
    requests: Arc<Mutex<Vec<String>>>,
    authorized: Arc<AtomicUsize>,
}

impl Server {
    fn start(files: &[(&str, &str)], status: u16, code: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let authorized = Arc::new(AtomicUsize::new(0));
        let files: BTreeMap<String, String> = files.iter().map(|(n, c)| ((*n).into(), (*c).into())).collect();
        let (log, count) = (requests.clone(), authorized.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &files, status, code, &log, &count);
            }
        });
        Self { endpoint, requests, authorized }
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

/// Answers one request and closes the connection.
fn answer(
    mut stream: TcpStream,
    files: &BTreeMap<String, String>,
    status: u16,
    code: &str,
    log: &Mutex<Vec<String>>,
    authorized: &AtomicUsize,
) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    let path = line.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut range = None;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header).unwrap() <= 2 {
            break;
        }
        let header = header.trim().to_ascii_lowercase();
        if let Some(bytes) = header.strip_prefix("range: bytes=") {
            let (start, end) = bytes.split_once('-').unwrap();
            range = Some((start.parse::<usize>().unwrap(), end.parse::<usize>().ok()));
        }
        if header == "authorization: bearer secret" {
            authorized.fetch_add(1, Ordering::Relaxed);
        }
    }
    log.lock().unwrap().push(path.clone());
    let mut send = |head: String, body: &[u8]| {
        let length = body.len();
        let head = format!("HTTP/1.1 {head}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(body).unwrap();
    };
    let file = path.strip_prefix(&format!("/org/tiny/resolve/{SHA}/")).and_then(|name| files.get(name));
    if path.starts_with("/api/models/org/tiny/revision/") && status == 200 {
        let siblings: Vec<_> = files.keys().map(|f| serde_json::json!({"rfilename": f})).collect();
        let info = serde_json::json!({"sha": SHA, "siblings": siblings, "private": false});
        send("200 OK\r\nContent-Type: application/json".into(), info.to_string().as_bytes());
    } else if path.starts_with("/api/") {
        send(format!("{status} No\r\nX-Error-Code: {code}"), b"{}");
    } else if let Some(content) = file {
        let (start, end) = range.unwrap();
        let end = end.map_or(content.len(), |end| end + 1).min(content.len());
        let etag: u64 = content.bytes().fold(7, |hash, b| hash * 31 % 1_000_003 + u64::from(b));
        let total = content.len();
        let last = end.saturating_sub(1);
        send(
            format!(
                "206 Partial Content\r\nETag: \"{etag}\"\r\nX-Repo-Commit: {SHA}\r\nContent-Range: bytes {start}-{last}/{total}"
            ),
            &content.as_bytes()[start..end],
        );
    } else {
        send("404 Not Found".into(), b"");
    }
}

fn hub(cache: &Path, endpoint: &str) -> Hub {
    Hub { cache_dir: cache.join("hub"), endpoint: endpoint.to_owned(), token: None, offline: false, progress: false }
}

/// An address nobody listens at: the port was free a moment ago.
fn unreachable() -> String {
    format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap())
}

fn model_files() -> Vec<(&'static str, &'static str)> {
    vec![
        ("README.md", "# not needed"),
        ("config.json", "{}"),
        ("tokenizer.json", "{\"version\": \"1.0\"}"),
        ("model.safetensors.index.json", INDEX),
        ("model-1.safetensors", "first shard"),
        ("model-2.safetensors", "second shard"),
        ("pytorch_model.bin", "not needed"),
        ("original/consolidated.safetensors", "not needed"),
    ]
}

#[test]
fn a_model_is_downloaded_once_and_found_offline() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(&model_files(), 200, "");
    let mut hub = hub(cache.path(), &server.endpoint);
    hub.token = Some("secret".into());
    let dir = hub.resolve("org/tiny", None).unwrap();
    assert_eq!(dir, cache.path().join("hub/models--org--tiny/snapshots").join(SHA));
    let mut names: Vec<_> =
        std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(
        names,
        ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    );
    assert_eq!(std::fs::read_to_string(dir.join("model-2.safetensors")).unwrap(), "second shard");
    let main = cache.path().join("hub/models--org--tiny/refs/main");
    assert_eq!(std::fs::read_to_string(main).unwrap(), SHA);
    let asked = server.requests().len();
    assert_eq!(server.authorized.load(Ordering::Relaxed), asked, "the token goes along");

    // Again: only the description is asked for.
    assert_eq!(hub.resolve("org/tiny", None).unwrap(), dir);
    assert_eq!(server.requests()[asked..], ["/api/models/org/tiny/revision/main"]);
    // By its commit, offline, and with the hub gone: from the cache.
    assert_eq!(hub.resolve("org/tiny", Some(SHA)).unwrap(), dir);
    assert_eq!(server.requests().len(), asked + 1);
    hub.endpoint = unreachable();
    assert_eq!(hub.resolve("org/tiny", None).unwrap(), dir);
    hub.offline = true;
    assert_eq!(hub.resolve("org/tiny", None).unwrap(), dir);

    // A shard that went missing is noticed and fetched again.
    std::fs::remove_file(dir.join("model-2.safetensors")).unwrap();
    let error = hub.resolve("org/tiny", None).unwrap_err().to_string();
    assert!(error.contains("lacks its model-2.safetensors") && error.contains("HF_HUB_OFFLINE"), "{error}");
    hub.offline = false;
    hub.endpoint = server.endpoint.clone();
    hub.resolve("org/tiny", None).unwrap();
    assert_eq!(std::fs::read_to_string(dir.join("model-2.safetensors")).unwrap(), "second shard");
}

#[test]
fn adapters_and_single_files_are_found_too() {
    for files in [
        vec![("adapter_config.json", "{}"), ("adapter_model.safetensors", "x")],
        vec![("config.json", "{}"), ("model.safetensors", "x"), ("model.safetensors.index.json", "broken")],
    ] {
        let cache = tempfile::tempdir().unwrap();
        let server = Server::start(&files, 200, "");
        let dir = hub(cache.path(), &server.endpoint).resolve("org/tiny", Some("v1/beta")).unwrap();
        assert!(files[..2].iter().all(|(file, _)| dir.join(file).exists()));
        assert!(!dir.join("model.safetensors.index.json").exists());
        assert_eq!(server.requests()[0], "/api/models/org/tiny/revision/v1%2Fbeta");
        let offline = Hub { offline: true, ..hub(cache.path(), &server.endpoint) };
        assert_eq!(offline.resolve("org/tiny", Some("v1/beta")).unwrap(), dir);
        assert!(offline.resolve("org/tiny", None).is_err());
    }
}

#[test]
fn refusals_say_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let error = |status, code: &'static str, files: &[(&str, &str)]| {
        let server = Server::start(files, status, code);
        hub(cache.path(), &server.endpoint).resolve("org/tiny", Some("dev")).unwrap_err().to_string()
    };
    for (status, code, expected) in [
        (404, "RepoNotFound", "has no such model"),
        (401, "", "set HF_TOKEN"),
        (404, "RevisionNotFound", "not this revision"),
        (403, "GatedRepo", "accept the licence"),
        (503, "", "can't be reached: it answered with HTTP status 503"),
        (418, "", "HTTP status 418"),
    ] {
        let message = error(status, code, &[]);
        assert!(message.starts_with("org/tiny (revision dev): ") && message.contains(expected), "{message}");
    }
    let message = error(200, "", &[("config.json", "{}"), ("pytorch_model.bin", "x")]);
    assert!(message.contains("pytorch_model.bin") && message.contains("safetensors format"), "{message}");
    let climbing = r#"{"weight_map": {"a": "../../outside.safetensors"}}"#;
    let message = error(200, "", &[("config.json", "{}"), ("model.safetensors.index.json", climbing)]);
    assert!(message.contains("weight_map") && message.contains("not a file beside it"), "{message}");
    let lost = r#"{"weight_map": {"a": "gone.safetensors"}}"#;
    let other = tempfile::tempdir().unwrap();
    let server = Server::start(&[("config.json", "{}"), ("model.safetensors.index.json", lost)], 200, "");
    let message = hub(other.path(), &server.endpoint).resolve("org/tiny", None).unwrap_err().to_string();
    assert!(message.contains("gone.safetensors"), "{message}");
}

#[test]
fn without_network_the_message_names_cache_and_switch() {
    let cache = tempfile::tempdir().unwrap();
    let away = hub(cache.path(), &unreachable());
    let error = away.resolve("org/tiny", None).unwrap_err().to_string();
    assert!(error.contains("can't be reached") && error.contains("not complete in the cache"), "{error}");
    let offline = Hub { offline: true, ..away };
    let error = offline.resolve("org/tiny", None).unwrap_err().to_string();
    assert!(error.contains("not in the cache") && error.contains("unset HF_HUB_OFFLINE"), "{error}");
}

#[test]
fn folders_win_and_paths_are_told_from_ids() {
    let dir = tempfile::tempdir().unwrap();
    let hub = Hub { offline: true, ..hub(dir.path(), &unreachable()) };
    let folder = dir.path().display().to_string();
    assert_eq!(hub.resolve(&folder, None).unwrap(), dir.path());
    let error = hub.resolve(&folder, Some("main")).unwrap_err().to_string();
    assert!(error.contains("no revisions"), "{error}");
    let file = dir.path().join("model.safetensors");
    std::fs::write(&file, "x").unwrap();
    let error = hub.resolve(&file.display().to_string(), None).unwrap_err().to_string();
    assert!(error.contains("this is a file"), "{error}");
    for path in ["./missing", "/missing/model", "~/model", "a/b/c", "models/", "C:\\model", "..x", "a--b/c", "-x"] {
        let error = hub.resolve(path, None).unwrap_err().to_string();
        assert!(error.contains("no such folder") && error.starts_with(path), "{error}");
    }
    for id in ["gpt2", "org/name", "meta-llama/Llama-3.1-8B"] {
        assert!(hub.resolve(id, None).unwrap_err().to_string().contains("not in the cache"), "{id}");
    }
    assert!(hub.resolve("", None).unwrap_err().to_string().contains("no model given"));
}

#[test]
fn the_environment_is_read_as_python_reads_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("token"), "from-file\n").unwrap();
    let home = dir.path().display().to_string();
    let hub = |vars: &[(&str, &str)]| {
        Hub::from_vars(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned()))
    };
    let plain = hub(&[("HF_HOME", &home)]);
    assert_eq!(plain.cache_dir, dir.path().join("hub"));
    assert_eq!(plain.token.as_deref(), Some("from-file"));
    assert_eq!(plain.endpoint, "https://huggingface.co");
    assert!(!plain.offline);
    let set = hub(&[
        ("HF_HOME", &home),
        ("HF_HUB_CACHE", "/cache"),
        ("HF_TOKEN", " given "),
        ("HF_ENDPOINT", "http://mirror/"),
        ("HF_HUB_OFFLINE", "True"),
    ]);
    assert_eq!(set.cache_dir, Path::new("/cache"));
    assert_eq!(set.token.as_deref(), Some("given"));
    assert_eq!(set.endpoint, "http://mirror");
    assert!(set.offline);
    let xdg = hub(&[("XDG_CACHE_HOME", "/xdg"), ("HF_HUB_OFFLINE", "0"), ("HF_TOKEN", "")]);
    assert_eq!(xdg.cache_dir, Path::new("/xdg/huggingface/hub"));
    assert_eq!((xdg.token, xdg.offline), (None, false));
}
