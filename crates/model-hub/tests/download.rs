//! Folders, the cache, and downloads from a hub on this machine.
#![allow(clippy::unwrap_used)]

mod hub_server;

use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hub_server::{Rules, SHA, Server, TOKEN, sha256};
use model_hub::Hub;

const INDEX: &str =
    r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}}"#;

fn hub(cache: &Path, endpoint: &str) -> Hub {
    Hub {
        cache_dir: cache.join("hub"),
        endpoint: endpoint.to_owned(),
        token: None,
        offline: false,
        xet: true,
        progress: None,
        retry_delay: Duration::from_millis(1),
    }
}

/// An address nobody listens at: the port was free a moment ago.
fn unreachable() -> String {
    format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap())
}

fn model_files() -> Vec<(&'static str, &'static [u8])> {
    vec![
        ("README.md", b"# not needed"),
        ("config.json", b"{}"),
        ("tokenizer.json", b"{\"version\": \"1.0\"}"),
        ("model.safetensors.index.json", INDEX.as_bytes()),
        ("model-1.safetensors", b"first shard"),
        ("model-2.safetensors", b"second shard"),
        ("pytorch_model.bin", b"not needed"),
        ("original/consolidated.safetensors", b"not needed"),
    ]
}

/// A model whose weights are 300,000 bytes in LFS.
fn large() -> Vec<u8> {
    (0..300_000u32).map(|i| (i * i % 251) as u8).collect()
}

fn large_model(weights: &[u8], rules: Rules) -> Server {
    Server::start(&[("config.json", b"{}"), ("model.safetensors", weights)], rules)
}

/// Where each download from the storage began.
fn ranges(server: &Server) -> Vec<Option<usize>> {
    let state = server.state();
    let downloads = state.log.iter().filter(|asked| asked.whom == "storage" && asked.line.starts_with("GET "));
    downloads.map(|asked| asked.range).collect()
}

#[test]
fn a_model_is_downloaded_once_and_found_offline() {
    let cache = tempfile::tempdir().unwrap();
    let server = Server::start(&model_files(), Rules::default());
    let mut hub = hub(cache.path(), &server.endpoint);
    hub.token = Some(TOKEN.into());
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
    let asked = server.lines().len();
    assert!(server.state().log.iter().all(|asked| asked.token.as_deref() == Some(TOKEN)), "the token goes along");

    // Again: only the description is asked for.
    assert_eq!(hub.resolve("org/tiny", None).unwrap(), dir);
    assert_eq!(server.lines()[asked..], ["GET /api/models/org/tiny/revision/main"]);
    // By its commit, offline, and with the hub gone: from the cache.
    assert_eq!(hub.resolve("org/tiny", Some(SHA)).unwrap(), dir);
    assert_eq!(server.lines().len(), asked + 1);
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
        vec![("adapter_config.json", &b"{}"[..]), ("adapter_model.safetensors", b"x")],
        vec![("config.json", b"{}"), ("model.safetensors", b"x"), ("model.safetensors.index.json", b"broken")],
    ] {
        let cache = tempfile::tempdir().unwrap();
        let server = Server::start(&files, Rules::default());
        let dir = hub(cache.path(), &server.endpoint).resolve("org/tiny", Some("v1/beta")).unwrap();
        assert!(files[..2].iter().all(|(file, _)| dir.join(file).exists()));
        assert!(!dir.join("model.safetensors.index.json").exists());
        assert_eq!(server.lines()[0], "GET /api/models/org/tiny/revision/v1%2Fbeta");
        let offline = Hub { offline: true, ..hub(cache.path(), &server.endpoint) };
        assert_eq!(offline.resolve("org/tiny", Some("v1/beta")).unwrap(), dir);
        assert!(offline.resolve("org/tiny", None).is_err());
    }
}

#[test]
fn refusals_say_what_to_do() {
    let cache = tempfile::tempdir().unwrap();
    let error = |status, code: &'static str, files: &[(&str, &[u8])]| {
        let refuse = (status != 200).then_some((status, code));
        let server = Server::start(files, Rules { refuse, ..Rules::default() });
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
    let message = error(200, "", &[("config.json", b"{}"), ("pytorch_model.bin", b"x")]);
    assert!(message.contains("pytorch_model.bin") && message.contains("safetensors format"), "{message}");
    let climbing = r#"{"weight_map": {"a": "../../outside.safetensors"}}"#;
    let message = error(200, "", &[("config.json", b"{}"), ("model.safetensors.index.json", climbing.as_bytes())]);
    assert!(message.contains("weight_map") && message.contains("not a file beside it"), "{message}");
    let lost = r#"{"weight_map": {"a": "gone.safetensors"}}"#;
    let other = tempfile::tempdir().unwrap();
    let server =
        Server::start(&[("config.json", b"{}"), ("model.safetensors.index.json", lost.as_bytes())], Rules::default());
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

    // Names from before, and what Python puts in for `~` and variables.
    let old = hub(&[("HF_HOME", &home), ("HUGGINGFACE_HUB_CACHE", "/old"), ("HUGGING_FACE_HUB_TOKEN", "old")]);
    assert_eq!((old.cache_dir.as_path(), old.token.as_deref()), (Path::new("/old"), Some("old")));
    for (written, meant) in [
        ("~/hf", "/me/hf"),
        ("~", "/me"),
        ("~you/hf", "~you/hf"),
        ("/a/~/b", "/a/~/b"),
        ("$DISK/hf", "/big/hf"),
        ("${DISK}x/$DISK.", "/bigx//big."),
        ("$UNSET/${UNSET}/$/${", "$UNSET/${UNSET}/$/${"),
    ] {
        let vars = [("HOME", "/me"), ("DISK", "/big"), ("HF_HOME", written)];
        assert_eq!(hub(&vars).cache_dir, Path::new(meant).join("hub"), "{written}");
        let vars = [("HOME", "/me"), ("DISK", "/big"), ("HF_HUB_CACHE", written)];
        assert_eq!(hub(&vars).cache_dir, Path::new(meant), "{written}");
    }
    let without = hub(&[("HF_HOME", &home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"), ("HF_HUB_DISABLE_XET", "1")]);
    assert_eq!((without.token, without.xet), (None, false));
    assert!(plain.xet);
}

/// Large files come from another host, which must not see the token.
#[test]
fn a_redirect_does_not_carry_the_token_away() {
    let cache = tempfile::tempdir().unwrap();
    let weights = large();
    let server = large_model(&weights, Rules::default());
    let hub = Hub { token: Some(TOKEN.into()), ..hub(cache.path(), &server.endpoint) };
    let dir = hub.resolve("org/tiny", None).unwrap();
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights);
    let state = server.state();
    let tokens = |whom: &str, method: &str| -> Vec<_> {
        let asked = state.log.iter().filter(|asked| asked.whom == whom && asked.line.starts_with(method));
        asked.map(|asked| asked.token.clone()).collect()
    };
    assert_eq!(tokens("storage", "GET"), [None]);
    assert_eq!(tokens("storage", "HEAD"), [None]);
    assert!(tokens("hub", "").iter().all(|token| token.as_deref() == Some(TOKEN)));
    // Stored under its hash, as Python stores it.
    let blob = cache.path().join("hub/models--org--tiny/blobs").join(sha256(&weights));
    assert!(blob.is_file());
    #[cfg(unix)]
    {
        let link = std::fs::read_link(dir.join("model.safetensors")).unwrap();
        assert_eq!(link, Path::new("../../blobs").join(sha256(&weights)));
    }
}

/// A redirect that stays at the hub, as of a renamed repository, is followed with the token.
#[test]
fn a_renamed_repository_is_followed() {
    let cache = tempfile::tempdir().unwrap();
    let server = large_model(b"small", Rules::default());
    let mut hub = Hub { token: Some(TOKEN.into()), ..hub(cache.path(), &server.endpoint) };
    hub.endpoint += "/moved";
    // The hub's answers name the paths below /org, which only the redirect leads to.
    let error = hub.resolve("org/tiny", None).unwrap_err().to_string();
    assert!(error.contains("no such model"), "{error}");
    let lines = server.lines();
    assert_eq!(lines[0], "GET /moved/api/models/org/tiny/revision/main");
    assert_eq!(lines[1], "GET /org/api/models/org/tiny/revision/main");
    assert!(server.state().log.iter().all(|asked| asked.token.as_deref() == Some(TOKEN)));
}

#[test]
fn an_interrupted_download_goes_on_where_it_stopped() {
    let weights = large();
    // Within one run: the connection ends early three times.
    let cache = tempfile::tempdir().unwrap();
    let server = large_model(&weights, Rules { cut: 3, ..Rules::default() });
    let dir = hub(cache.path(), &server.endpoint).resolve("org/tiny", None).unwrap();
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights);
    assert_eq!(ranges(&server)[..2], [None, Some(150_000)], "what came is not asked for again");

    // From run to run, from what Python's library or a killed process left.
    for part in [&weights[..1], &weights[..200_000], &weights[..]] {
        let cache = tempfile::tempdir().unwrap();
        let server = large_model(&weights, Rules::default());
        let blobs = cache.path().join("hub/models--org--tiny/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(sha256(&weights) + ".incomplete"), part).unwrap();
        let dir = hub(cache.path(), &server.endpoint).resolve("org/tiny", None).unwrap();
        assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights);
        let expected: &[_] = if part.len() == weights.len() { &[] } else { &[Some(part.len())] };
        assert_eq!(ranges(&server), expected);
        assert!(!blobs.join(sha256(&weights) + ".incomplete").exists());
    }

    // A server that knows no ranges sends everything again.
    let cache = tempfile::tempdir().unwrap();
    let server = large_model(&weights, Rules { cut: 1, whole_files: true, ..Rules::default() });
    let dir = hub(cache.path(), &server.endpoint).resolve("org/tiny", None).unwrap();
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights);
}

#[test]
fn a_connection_that_never_lasts_is_given_up_and_gone_on_with_later() {
    let weights = large();
    let cache = tempfile::tempdir().unwrap();
    let server = large_model(&weights, Rules { cut: 1000, whole_files: true, ..Rules::default() });
    let hub = hub(cache.path(), &server.endpoint);
    let error = hub.resolve("org/tiny", None).unwrap_err().to_string();
    assert!(error.contains("model.safetensors") && error.contains("run again to continue"), "{error}");
    server.state().rules.cut = 0;
    let dir = hub.resolve("org/tiny", None).unwrap();
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights);
}

#[test]
fn content_with_a_wrong_checksum_is_never_used() {
    let weights = large();
    // In LFS by SHA-256, a small file by Git's SHA-1. An empty file can't be damaged, so the other one is.
    for (files, lfs_from) in [
        ([("config.json", &b""[..]), ("model.safetensors", &weights)], 1000),
        ([("config.json", b"{}"), ("model.safetensors", b"")], 1000),
    ] {
        let cache = tempfile::tempdir().unwrap();
        let server = Server::start(&files, Rules { corrupt: 1, lfs_from, ..Rules::default() });
        let hub = hub(cache.path(), &server.endpoint);
        let error = hub.resolve("org/tiny", None).unwrap_err().to_string();
        let damaged = if files[0].1.is_empty() { "model.safetensors" } else { "config.json" };
        assert!(error.contains(damaged) && error.contains("checksum"), "{error}");
        let blobs = cache.path().join("hub/models--org--tiny/blobs");
        let left = std::fs::read_dir(&blobs).unwrap().flatten().filter(|e| e.metadata().unwrap().len() > 0).count();
        assert_eq!(left, 0, "nothing of it stays");
        hub.resolve("org/tiny", None).unwrap();
    }

    // A part from before that belongs to something else costs a second download, no more.
    let cache = tempfile::tempdir().unwrap();
    let server = large_model(&weights, Rules::default());
    let blobs = cache.path().join("hub/models--org--tiny/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    for part in [vec![7u8; 1000], vec![7; 300_000], vec![7; 400_000]] {
        let incomplete = blobs.join(sha256(&weights) + ".incomplete");
        std::fs::write(&incomplete, part).unwrap();
        drop(std::fs::remove_file(blobs.join(sha256(&weights))));
        let dir = hub(cache.path(), &server.endpoint).resolve("org/tiny", None).unwrap();
        assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights);
        std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    }
}

/// Mirrors send ETags that are no hashes, and no names either.
#[test]
fn etags_that_are_no_hashes_are_names_all_the_same() {
    let weights = large();
    let cache = tempfile::tempdir().unwrap();
    let server = large_model(&weights, Rules { odd_etags: true, cut: 2, ..Rules::default() });
    let dir = hub(cache.path(), &server.endpoint).resolve("org/tiny", None).unwrap();
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights);
    for entry in std::fs::read_dir(cache.path().join("hub/models--org--tiny/blobs")).unwrap() {
        assert_eq!(entry.unwrap().file_name().len(), 64);
    }
}

#[test]
fn a_busy_hub_is_asked_again() {
    let weights = large();
    let cache = tempfile::tempdir().unwrap();
    let server = large_model(&weights, Rules { busy: 4, ..Rules::default() });
    let dir = hub(cache.path(), &server.endpoint).resolve("org/tiny", None).unwrap();
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights);
    assert_eq!(server.state().rules.busy, 0);
}

/// Two processes that want the same model do not write into each other's file.
#[test]
fn two_downloads_at_once_give_one_whole_file() {
    let weights = large();
    let cache = tempfile::tempdir().unwrap();
    let server = large_model(&weights, Rules { cut: 4, ..Rules::default() });
    let hub = hub(cache.path(), &server.endpoint);
    let dirs: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| hub.resolve("org/tiny", None).unwrap())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for dir in dirs {
        assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights);
    }
}

#[test]
fn a_revision_cannot_lead_out_of_the_cache() {
    let cache = tempfile::tempdir().unwrap();
    let server = large_model(b"x", Rules::default());
    for revision in ["../../x", "/etc", "a/../b", "", "a\\b", "a//b"] {
        let error = hub(cache.path(), &server.endpoint).resolve("org/tiny", Some(revision)).unwrap_err().to_string();
        assert!(error.contains("branch or tag"), "{revision}: {error}");
    }
    // Nor can what a damaged cache says the revision is.
    let refs = cache.path().join("hub/models--org--tiny/refs");
    std::fs::create_dir_all(&refs).unwrap();
    std::fs::write(refs.join("main"), "../../../..").unwrap();
    let offline = Hub { offline: true, ..hub(cache.path(), &server.endpoint) };
    assert!(offline.resolve("org/tiny", None).unwrap_err().to_string().contains("not in the cache"));
}

/// Trainers save the base's `config.json` beside an adapter; that makes it no model.
#[test]
fn an_adapter_with_a_configuration_is_complete_offline() {
    let cache = tempfile::tempdir().unwrap();
    let files: [(&str, &[u8]); 3] =
        [("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"x"), ("config.json", b"{}")];
    let server = Server::start(&files, Rules::default());
    let dir = hub(cache.path(), &server.endpoint).resolve("org/tiny", None).unwrap();
    let offline = Hub { offline: true, ..hub(cache.path(), &server.endpoint) };
    assert_eq!(offline.resolve("org/tiny", None).unwrap(), dir);
    let away = hub(cache.path(), &unreachable());
    assert_eq!(away.resolve("org/tiny", None).unwrap(), dir);
    std::fs::remove_file(dir.join("adapter_model.safetensors")).unwrap();
    let error = offline.resolve("org/tiny", None).unwrap_err().to_string();
    assert!(error.contains("lacks its adapter_model.safetensors"), "{error}");
}

/// What a merge copies and what GGUF is written from comes along.
#[test]
fn every_file_of_a_tokenizer_comes_along() {
    let cache = tempfile::tempdir().unwrap();
    let of_tokenizer = ["tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja"];
    let mut files: Vec<(&str, &[u8])> = vec![("config.json", b"{}"), ("model.safetensors", b"x")];
    files.extend(of_tokenizer.map(|file| (file, &b"{}"[..])));
    let server = Server::start(&files, Rules::default());
    let dir = hub(cache.path(), &server.endpoint).resolve("org/tiny", None).unwrap();
    of_tokenizer.iter().for_each(|file| assert!(dir.join(file).is_file(), "{file}"));
}

/// Some mirrors hand files out and know little else.
#[test]
fn a_mirror_that_knows_no_checksums_of_several_files_is_asked_for_each() {
    let weights = large();
    let cache = tempfile::tempdir().unwrap();
    let rules = Rules { no_paths_info: true, lfs_from: usize::MAX, cut: 1, ..Rules::default() };
    let server = large_model(&weights, rules);
    let hub = hub(cache.path(), &server.endpoint);
    let dir = hub.resolve("org/tiny", None).unwrap();
    assert_eq!(std::fs::read(dir.join("model.safetensors")).unwrap(), weights);
    // Checked all the same.
    std::fs::remove_dir_all(&hub.cache_dir).unwrap();
    server.state().rules.corrupt = 1;
    let error = hub.resolve("org/tiny", None).unwrap_err().to_string();
    assert!(error.contains("checksum"), "{error}");
}

#[test]
fn progress_is_told_and_ends_at_the_whole() {
    let weights = large();
    let cache = tempfile::tempdir().unwrap();
    let server = large_model(&weights, Rules { cut: 2, ..Rules::default() });
    let told = Arc::new(Mutex::new(Vec::new()));
    let to = Arc::clone(&told);
    let progress: model_hub::OnProgress = Arc::new(move |progress| {
        assert_eq!(progress.direction, model_hub::Direction::Download);
        to.lock().unwrap().push((progress.file.to_owned(), progress.done_bytes, progress.total_bytes));
    });
    let hub = Hub { progress: Some(progress), ..hub(cache.path(), &server.endpoint) };
    hub.resolve("org/tiny", None).unwrap();
    let told = told.lock().unwrap();
    assert!(told.iter().all(|(_, done, total)| total.is_some_and(|total| *done <= total)));
    let of_weights: Vec<u64> =
        told.iter().filter(|(file, ..)| file == "model.safetensors").map(|told| told.1).collect();
    assert!(of_weights.is_sorted() && of_weights.len() >= 3, "{of_weights:?}");
    assert_eq!(of_weights.last(), Some(&300_000));
}

/// A server that serves models asks from within its runtime, where blocking on another one panics.
#[test]
fn a_model_is_found_from_within_a_runtime() {
    let cache = tempfile::tempdir().unwrap();
    let server = large_model(&large(), Rules::default());
    let hub = hub(cache.path(), &server.endpoint);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let dir = runtime.block_on(async { hub.resolve("org/tiny", None) }).unwrap();
    assert!(dir.join("model.safetensors").is_file());
}

/// A token is a secret: nobody logs it by accident.
#[test]
fn debug_output_leaves_the_token_out() {
    let hub = Hub { token: Some(TOKEN.into()), ..hub(Path::new("cache"), "http://hub") };
    let text = format!("{hub:?}");
    assert!(!text.contains(TOKEN) && text.contains("has_token: true"), "{text}");
}
