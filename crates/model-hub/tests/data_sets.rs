//! Data sets from a hub on this machine.
#![allow(clippy::unwrap_used)]

mod hub_server;

use std::path::Path;
use std::time::Duration;

use hub_server::{Rules, SHA, Server, TOKEN};
use model_hub::Hub;
use serde_json::json;

fn hub(cache: &Path, endpoint: &str) -> Hub {
    Hub {
        cache_dir: cache.join("hub"),
        endpoint: endpoint.to_owned(),
        token: Some(TOKEN.into()),
        offline: false,
        xet: true,
        progress: None,
        retry_delay: Duration::from_millis(1),
    }
}

fn server() -> (Server, Vec<u8>) {
    let large: Vec<u8> = (0..200_000u32).map(|i| (i * i % 251) as u8).collect();
    let files = [
        ("README.md", &b"---\n---\n"[..]),
        ("data/train/0.jsonl", b"train"),
        ("data/test.jsonl", b"test"),
        ("large.parquet", &large),
    ];
    let server = Server::start(&files, Rules::default());
    server.state().card = json!({"configs": [{"config_name": "default"}]});
    (server, large)
}

#[test]
fn what_is_asked_for_is_downloaded_once_and_found_offline() {
    let cache = tempfile::tempdir().unwrap();
    let (server, large) = server();
    let mut hub = hub(cache.path(), &server.endpoint);
    let data_set = hub.data_set("org/tiny", None).unwrap();
    assert_eq!(data_set.files(), ["README.md", "data/test.jsonl", "data/train/0.jsonl", "large.parquet"]);
    assert_eq!((data_set.commit(), &data_set.card()["configs"][0]["config_name"]), (SHA, &json!("default")));
    let folder = data_set.fetch(&["data/train/0.jsonl", "large.parquet"]).unwrap();
    assert_eq!(folder, cache.path().join("hub/datasets--org--tiny/snapshots").join(SHA));
    // Files in folders of their own are links that lead to the blobs, too.
    assert_eq!(std::fs::read_to_string(folder.join("data/train/0.jsonl")).unwrap(), "train");
    assert_eq!(std::fs::read(folder.join("large.parquet")).unwrap(), large);
    assert!(!folder.join("data/test.jsonl").exists());
    let requests = server.lines();
    assert!(requests.iter().all(|line| line.contains("/datasets/") || line.contains(" /get/")), "{requests:?}");

    // Again: only the description is asked for; by the commit, nothing is.
    hub.data_set("org/tiny", None).unwrap().fetch(&["data/train/0.jsonl"]).unwrap();
    assert_eq!(server.lines()[requests.len()..], ["GET /api/datasets/org/tiny/revision/main"]);
    hub.data_set("org/tiny", Some(SHA)).unwrap().fetch(&["large.parquet"]).unwrap();
    assert_eq!(server.lines().len(), requests.len() + 1);

    // Offline the list of files is whole, and what was not downloaded is missing by its name.
    hub.offline = true;
    let data_set = hub.data_set("org/tiny", None).unwrap();
    assert_eq!(data_set.files().len(), 4);
    assert_eq!(data_set.fetch(&["data/train/0.jsonl", "large.parquet"]).unwrap(), folder);
    let error = data_set.fetch(&["data/test.jsonl"]).unwrap_err().to_string();
    assert!(error.contains("lacks its data/test.jsonl") && error.contains("HF_HUB_OFFLINE"), "{error}");
    let error = hub.data_set("org/other", None).unwrap_err().to_string();
    assert!(error.contains("org/other (revision main)") && error.contains("not in the cache"), "{error}");
}

#[test]
fn refusals_speak_of_a_data_set() {
    for (refuse, expected) in [
        ((404, "RepoNotFound"), "has no such data set"),
        ((404, "RevisionNotFound"), "has the data set, but not this revision"),
        ((403, "GatedRepo"), "/datasets/org/tiny, then set HF_TOKEN"),
    ] {
        let cache = tempfile::tempdir().unwrap();
        let (server, _) = server();
        server.state().rules.refuse = Some(refuse);
        let error = hub(cache.path(), &server.endpoint).data_set("org/tiny", None).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let cache = tempfile::tempdir().unwrap();
    let error = hub(cache.path(), "http://127.0.0.1:1").data_set("no id/", None).unwrap_err().to_string();
    assert!(error.contains("a hub id looks like"), "{error}");
}
