//! Files that are stored in Xet: there and back through a storage on this machine.
#![allow(clippy::unwrap_used)]

mod hub_server;

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hub_server::{Rules, Server, TOKEN, sha256};
use model_hub::{Content, Hub, OnProgress, PushOptions, Upload};

fn hub(cache: &Path, server: &Server) -> Hub {
    Hub {
        cache_dir: cache.join("hub"),
        endpoint: server.endpoint.clone(),
        token: Some(TOKEN.into()),
        offline: false,
        xet: true,
        retry_delay: Duration::from_millis(1),
        progress: None,
    }
}

/// Three million bytes that do not repeat.
fn weights() -> Vec<u8> {
    let mut state = 1u64;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..3_000_000).map(next).collect()
}

/// A hub that holds a model whose weights were uploaded to Xet.
fn server() -> Server {
    let server = Server::start(&[("config.json", b"{}")], Rules::default());
    let files = [Upload { path: "model.safetensors".into(), content: Content::Bytes(weights()) }];
    let options = PushOptions { revision: "main".into(), private: false, summary: "weights".into() };
    hub(Path::new(""), &server).push("org/tiny", &files, &options).unwrap();
    assert_eq!(server.state().xet_names.len(), 1);
    server.state().log.clear();
    server
}

/// Requests to the storage that begin so.
fn count(server: &Server, line: &str) -> usize {
    server.state().log.iter().filter(|asked| asked.whom == "storage" && asked.line.starts_with(line)).count()
}

fn check(cache: &Path, dir: &Path) {
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights());
    let folder = cache.join("hub/models--org--tiny");
    assert!(folder.join("blobs").join(sha256(&weights())).is_file());
    assert!(!folder.join("xet").exists(), "nothing is left of the way");
    let unfinished = |name: &str| name.ends_with(".incomplete");
    let names = std::fs::read_dir(folder.join("blobs")).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(!names.into_iter().any(|name| unfinished(&name.to_string_lossy())));
}

#[test]
fn a_new_file_comes_by_xet() {
    let server = server();
    let cache = tempfile::tempdir().unwrap();
    let told = Arc::new(Mutex::new(Vec::new()));
    let to = Arc::clone(&told);
    let progress: OnProgress =
        Arc::new(move |progress| to.lock().unwrap().push((progress.file.to_owned(), progress.done_bytes)));
    let hub = Hub { progress: Some(progress), ..hub(cache.path(), &server) };
    let dir = hub.resolve("org/tiny", None).unwrap();
    check(cache.path(), &dir);
    assert_eq!(count(&server, "GET /get/"), 0);
    assert!(count(&server, "GET /v") > 0);
    for asked in &server.state().log {
        assert_eq!(asked.token.as_deref() == Some(TOKEN), asked.whom == "hub", "{}", asked.line);
    }
    assert_eq!(told.lock().unwrap().last(), Some(&("model.safetensors".to_owned(), 3_000_000)));
}

#[test]
fn http_takes_over_where_xet_is_off_or_out_of_reach() {
    for off in [true, false] {
        let server = server();
        let cache = tempfile::tempdir().unwrap();
        server.state().rules.broken_xet = usize::MAX;
        let hub = Hub { xet: !off, ..hub(cache.path(), &server) };
        let dir = hub.resolve("org/tiny", None).unwrap();
        check(cache.path(), &dir);
        assert_eq!(count(&server, "GET /get/"), 1);
        assert_eq!(count(&server, "GET /v") == 0, off);
    }
}

/// Xet writes from the front, so what a killed process leaves is a beginning.
#[test]
fn what_xet_left_is_gone_on_with() {
    let weights = weights();
    for (left, gets) in [(1_000_000, 1), (3_000_000, 0)] {
        let server = server();
        let cache = tempfile::tempdir().unwrap();
        let oid = sha256(&weights);
        let blobs = cache.path().join("hub/models--org--tiny/xet").join(&oid).join("models--org--tiny/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(format!("{oid}.incomplete")), &weights[..left]).unwrap();
        let dir = hub(cache.path(), &server).resolve("org/tiny", None).unwrap();
        check(cache.path(), &dir);
        assert_eq!((count(&server, "GET /v"), count(&server, "GET /get/")), (0, gets));
        let state = server.state();
        let range = state.log.iter().find(|asked| asked.line.starts_with("GET /get/")).map(|asked| asked.range);
        assert_eq!(range, (gets > 0).then_some(Some(left)));
    }
}

/// Xet has checksums of its own, but a file is what the hub says it is.
#[test]
fn another_file_by_xet_is_noticed() {
    let server = server();
    let cache = tempfile::tempdir().unwrap();
    {
        let mut state = server.state();
        let name = state.xet_names.values().next().unwrap().clone();
        let other = vec![5; 3_000_000];
        state.xet_names.insert(sha256(&other), name);
        state.files.insert("model.safetensors".into(), other);
    }
    let dir = hub(cache.path(), &server).resolve("org/tiny", None).unwrap();
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), vec![5; 3_000_000]);
    assert_eq!(count(&server, "GET /get/"), 1, "it came over HTTP after all");
}
