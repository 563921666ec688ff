//! Pushing to a hub on this machine.
#![allow(clippy::unwrap_used)]

mod hub_server;

use std::path::PathBuf;
use std::time::Duration;

use hub_server::{Rules, Server, TOKEN, sha256};
use model_hub::{Content, Hub, PushOptions, Pushed, Upload};
use serde_json::json;

fn hub(server: &Server) -> Hub {
    Hub {
        cache_dir: PathBuf::new(),
        endpoint: server.endpoint.clone(),
        token: Some(TOKEN.into()),
        offline: false,
        xet: true,
        progress: None,
        retry_delay: Duration::from_millis(1),
    }
}

fn options() -> PushOptions {
    PushOptions { revision: "main".into(), private: true, summary: "Upload".into() }
}

fn weights() -> Vec<u8> {
    (0..50_001u32).map(|i| (i * i % 253) as u8).collect()
}

/// An adapter: two small files and a large one, which lies on the disk.
fn files(dir: &tempfile::TempDir) -> Vec<Upload> {
    let path = dir.path().join("adapter_model.safetensors");
    std::fs::write(&path, weights()).unwrap();
    let bytes = |path: &str, text: &str| Upload { path: path.into(), content: Content::Bytes(text.into()) };
    vec![
        bytes("README.md", "# card"),
        bytes("adapter_config.json", "{}"),
        Upload { path: "adapter_model.safetensors".into(), content: Content::File(path) },
    ]
}

fn push(server: &Server, repo: &str, options: &PushOptions) -> Pushed {
    let dir = tempfile::tempdir().unwrap();
    hub(server).push(repo, &files(&dir), options).unwrap()
}

#[test]
fn an_adapter_arrives_in_one_commit() {
    let server = Server::start(&[], Rules::default());
    let pushed = push(&server, "org/new", &options());
    assert_eq!((pushed.repo.as_str(), pushed.large_bytes, pushed.sent_bytes), ("org/new", 50_001, 50_001));
    assert!(pushed.url.ends_with(&format!("/org/new/commit/{}", pushed.commit)), "{}", pushed.url);
    let oid = sha256(&weights());
    {
        let state = server.state();
        assert!(state.repos["org/new"], "it is private");
        assert_eq!(state.objects[&oid], weights());
        let expected = [
            json!({"key": "header", "value": {"summary": "Upload", "description": ""}}),
            json!({"key": "file", "value": {"path": "README.md", "content": "IyBjYXJk", "encoding": "base64"}}),
            json!({"key": "file", "value": {"path": "adapter_config.json", "content": "e30=", "encoding": "base64"}}),
            json!({"key": "lfsFile", "value": {"path": "adapter_model.safetensors", "algo": "sha256", "oid": oid, "size": 50_001}}),
        ];
        assert_eq!(state.commits, [expected]);
        // The storage never sees the token, the hub always.
        for asked in &state.log {
            assert_eq!(asked.token.as_deref() == Some(TOKEN), asked.whom == "hub", "{}", asked.line);
        }
        assert!(state.log.iter().any(|asked| asked.whom == "storage" && asked.line.starts_with("POST ")));
    }
    // Again: the content is known.
    let again = push(&server, "org/new", &options());
    assert_eq!((again.large_bytes, again.sent_bytes), (50_001, 0));
    assert_eq!(server.state().commits.len(), 2);
}

#[test]
fn a_repository_without_an_owner_is_the_tokens_own() {
    let server = Server::start(&[], Rules::default());
    let pushed = push(&server, "new", &PushOptions { private: false, ..options() });
    assert_eq!(pushed.repo, "me/new");
    assert_eq!(server.state().repos.get("me/new"), Some(&false));
}

#[test]
fn a_branch_is_made_once() {
    let server = Server::start(&[], Rules::default());
    let branch = PushOptions { revision: "v2/beta".into(), ..options() };
    push(&server, "org/new", &branch);
    push(&server, "org/new", &branch);
    assert_eq!(server.state().branches, ["v2%2Fbeta"]);
    assert!(server.lines().iter().any(|line| line == "POST /api/models/org/new/commit/v2%2Fbeta"));
}

#[test]
fn content_that_the_hub_has_is_not_sent_again() {
    let server = Server::start(&[], Rules::default());
    push(&server, "org/new", &options());
    // Another file in another repository, of which the first 50,001 bytes are known.
    let dir = tempfile::tempdir().unwrap();
    let mut files = files(&dir);
    let more = [weights(), vec![7; 1_000_000]].concat();
    std::fs::write(dir.path().join("adapter_model.safetensors"), &more).unwrap();
    files.retain(|file| file.path.starts_with("adapter"));
    let pushed = hub(&server).push("org/other", &files, &options()).unwrap();
    assert_eq!(server.state().objects[&sha256(&more)], more);
    assert_eq!(pushed.large_bytes, more.len() as u64);
    // The chunks that repeat are sent once.
    assert!(pushed.sent_bytes < 300_000, "{}", pushed.sent_bytes);
}

/// A hub without Xet gets small files in the commit, and large ones are not put there by surprise.
#[test]
fn a_hub_without_xet_gets_no_large_files() {
    let server = Server::start(&[], Rules { no_xet: true, ..Rules::default() });
    push(&server, "org/new", &options());
    assert!(server.state().commits[0].iter().all(|line| line["key"] != "lfsFile"));
    let large = [Upload { path: "model.safetensors".into(), content: Content::Bytes(vec![0; 11 << 20]) }];
    let error = hub(&server).push("org/new", &large, &options()).unwrap_err().to_string();
    assert!(error.contains("model.safetensors is large") && error.contains("hf upload"), "{error}");
    assert_eq!(server.state().commits.len(), 1);
}

#[test]
fn a_busy_hub_is_tried_again() {
    let server = Server::start(&[], Rules { busy: 3, ..Rules::default() });
    push(&server, "org/new", &options());
    assert_eq!(server.state().commits.len(), 1);
}

#[test]
fn refusals_say_what_to_do_and_commit_nothing() {
    let server = Server::start(&[], Rules::default());
    let dir = tempfile::tempdir().unwrap();
    let files = files(&dir);
    let error = |hub: Hub, repo: &str, files: &[Upload], options: &PushOptions| {
        hub.push(repo, files, options).unwrap_err().to_string()
    };
    let message = error(Hub { token: None, ..hub(&server) }, "org/new", &files, &options());
    assert!(message.contains("HF_TOKEN") && message.contains("hf auth login"), "{message}");
    let message = error(Hub { offline: true, ..hub(&server) }, "org/new", &files, &options());
    assert!(message.contains("HF_HUB_OFFLINE"), "{message}");
    let message = error(hub(&server), "not/a/repo", &files, &options());
    assert!(message.contains("user/name"), "{message}");
    let outside = [Upload { path: "../x".into(), content: Content::Bytes(Vec::new()) }];
    let message = error(hub(&server), "org/new", &outside, &options());
    assert!(message.contains("../x"), "{message}");
    let gone = [Upload { path: "x".into(), content: Content::File(dir.path().join("gone")) }];
    let message = error(hub(&server), "org/new", &gone, &options());
    assert!(message.contains("gone"), "{message}");
    assert!(server.lines().iter().all(|line| line == "POST /api/repos/create"), "nothing else was asked");

    let message = error(Hub { token: Some("old".into()), ..hub(&server) }, "org/new", &files, &options());
    assert!(message.contains("token is not valid"), "{message}");
    server.state().rules.refuse = Some((403, "Forbidden"));
    let message = error(hub(&server), "org/new", &files, &options());
    assert!(message.contains("may not write") && message.contains("because of Forbidden"), "{message}");
    server.state().rules = Rules { busy: 1000, ..Rules::default() };
    let message = error(hub(&server), "org/new", &files, &options());
    assert!(message.contains("503") && message.contains("the repository is unchanged"), "{message}");
    assert!(server.state().commits.is_empty());
}
