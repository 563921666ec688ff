//! A hub on this machine that speaks the requests of a download and of a push, and the storage beside it, on a port
//! of its own: another origin, as the real one's is another host. Large files are in Xet (`cas`), which the storage
//! passes requests on to. It can be told to misbehave.

#![allow(dead_code, clippy::unwrap_used)] // each test program uses a part

mod cas;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use sha1::{Digest, Sha1};
use sha2::Sha256;

/// The one commit of the model there is.
pub const SHA: &str = "0123456789abcdef0123456789abcdef01234567";
/// The token that may do everything.
pub const TOKEN: &str = "secret";

/// How it behaves; numbers count down with every answer that they spoil.
#[derive(Clone, Debug)]
pub struct Rules {
    /// Status of the answer to a question about the model or to a commit, when it is not 200, and its error code.
    pub refuse: Option<(u16, &'static str)>,
    /// Files from this size on are large: handed out by a redirect to the storage, uploaded to Xet.
    pub lfs_from: usize,
    /// Answers that end in the middle, of those longer than 100 bytes.
    pub cut: usize,
    /// Answers with a wrong byte.
    pub corrupt: usize,
    /// Whether ranges are ignored.
    pub whole_files: bool,
    /// ETags that are no hash.
    pub odd_etags: bool,
    /// Requests answered with 503, other than for a model's description.
    pub busy: usize,
    /// Whether nothing is known of Xet.
    pub no_xet: bool,
    /// Requests to Xet that are answered with 404.
    pub broken_xet: usize,
    /// Whether the question for several files' checksums is not known, as at some mirrors.
    pub no_paths_info: bool,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            refuse: None,
            lfs_from: 1000,
            cut: 0,
            corrupt: 0,
            whole_files: false,
            odd_etags: false,
            busy: 0,
            no_xet: false,
            broken_xet: 0,
            no_paths_info: false,
        }
    }
}

/// One request.
#[derive(Clone, Debug)]
pub struct Asked {
    /// `hub` or `storage`.
    pub whom: &'static str,
    /// Method and path.
    pub line: String,
    /// The token that came along.
    pub token: Option<String>,
    /// Where a range began.
    pub range: Option<usize>,
    /// The body.
    pub body: Vec<u8>,
}

/// What the servers know.
#[derive(Debug, Default)]
pub struct State {
    /// The files of the model, or data set, `org/tiny`.
    pub files: BTreeMap<String, Vec<u8>>,
    /// What stands above the data set's README.
    pub card: Value,
    /// Large files that were uploaded, by their SHA-256.
    pub objects: BTreeMap<String, Vec<u8>>,
    /// Their names in Xet.
    pub xet_names: BTreeMap<String, String>,
    /// The storage behind the storage.
    cas: Option<cas::Cas>,
    /// Repositories that were made, and whether they are private.
    pub repos: BTreeMap<String, bool>,
    /// Branches that were made.
    pub branches: Vec<String>,
    /// The lines of each commit.
    pub commits: Vec<Vec<Value>>,
    /// Everything that was asked.
    pub log: Vec<Asked>,
    /// How to behave.
    pub rules: Rules,
}

/// A hub and its storage.
pub struct Server {
    /// The hub's address.
    pub endpoint: String,
    /// The storage's address.
    pub storage: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    /// Starts both.
    pub fn start(files: &[(&str, &[u8])], rules: Rules) -> Self {
        cas::use_a_cache_of_this_process();
        let files = files.iter().map(|(name, content)| ((*name).to_owned(), content.to_vec())).collect();
        let state = Arc::new(Mutex::new(State { files, rules, ..State::default() }));
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (hub, storage) = (listen(), listen());
        let address = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let (endpoint, storage_address) = (address(&hub), address(&storage));
        for (whom, listener) in [("hub", hub), ("storage", storage)] {
            let (state, hub, storage) = (state.clone(), endpoint.clone(), storage_address.clone());
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let (state, hub, storage) = (state.clone(), hub.clone(), storage.clone());
                    // A client that goes away in the middle is no business of the others.
                    std::thread::spawn(move || serve(stream, whom, &state, &hub, &storage));
                }
            });
        }
        Self { endpoint, storage: storage_address, state }
    }

    /// What the servers know, to look at or to change.
    pub fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Method and path of every request so far.
    pub fn lines(&self) -> Vec<String> {
        self.state().log.iter().map(|asked| asked.line.clone()).collect()
    }
}

struct Answer {
    head: String,
    body: Vec<u8>,
    /// The length announced, where it is not the body's.
    length: Option<usize>,
}

fn answer(head: &str, body: impl Into<Vec<u8>>) -> Answer {
    Answer { head: head.to_owned(), body: body.into(), length: None }
}

fn ok(value: &Value) -> Answer {
    answer("200 OK\r\nContent-Type: application/json", value.to_string())
}

fn serve(stream: TcpStream, whom: &'static str, state: &Mutex<State>, hub: &str, storage: &str) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let mut words = line.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut asked = Asked { whom, line: format!("{method} {path}"), token: None, range: None, body: Vec::new() };
    let mut length = 0;
    let mut head = line.clone();
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header).ok()? <= 2 {
            break;
        }
        if !header.to_ascii_lowercase().starts_with("connection:") {
            head += &header;
        }
        let (name, value) = header.split_once(':')?;
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "range" => asked.range = value.strip_prefix("bytes=")?.split('-').next()?.parse().ok(),
            "authorization" => asked.token = Some(value.strip_prefix("Bearer ")?.to_owned()),
            "content-length" => length = value.parse().ok()?,
            "expect" => (&stream).write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?,
            _ => {}
        }
    }
    let is_xet = whom == "storage" && (path.starts_with("/v1/") || path.starts_with("/v2/"));
    if is_xet {
        let mut state = state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.log.push(asked);
        let broken = state.rules.broken_xet > 0;
        state.rules.broken_xet = state.rules.broken_xet.saturating_sub(1);
        let cas = state.cas.as_ref()?.address();
        drop(state);
        if broken {
            (&stream).write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").ok()?;
            return Some(());
        }
        return cas::pass_on(&head, reader, &stream, &cas);
    }
    asked.body.resize(length, 0);
    reader.read_exact(&mut asked.body).ok()?;
    let mut state = state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    state.log.push(asked.clone());
    let about_model = method == "GET" && path.starts_with("/api/models/");
    let reply = if state.rules.busy > 0 && !about_model {
        state.rules.busy -= 1;
        answer("503 Busy", "")
    } else if whom == "hub" {
        // A proxy is asked with the whole address.
        let path = path.strip_prefix("http://hub.invalid").unwrap_or(&path);
        at_hub(&mut state, &method, path, &asked, hub, storage)
    } else {
        at_storage(&mut state, &method, &path, &asked)
    };
    drop(state);
    let announced = reply.length.unwrap_or(reply.body.len());
    let head = format!("HTTP/1.1 {}\r\nContent-Length: {announced}\r\nConnection: close\r\n\r\n", reply.head);
    (&stream).write_all(head.as_bytes()).ok()?;
    if method != "HEAD" {
        (&stream).write_all(&reply.body).ok()?;
    }
    Some(())
}

fn at_hub(state: &mut State, method: &str, path: &str, asked: &Asked, hub: &str, storage: &str) -> Answer {
    // A data set has the files of the model, under addresses of its own.
    let of_model = path.replacen("/api/datasets/", "/api/models/", 1);
    let of_model = of_model.strip_prefix("/datasets").unwrap_or(&of_model);
    let (path, is_data_set) = (of_model, of_model != path);
    if let Some((status, code)) = state.rules.refuse.filter(|_| path.starts_with("/api/")) {
        return answer(&format!("{status} No\r\nX-Error-Code: {code}\r\nX-Error-Message: because of {code}"), "{}");
    }
    if method == "GET" && path.starts_with("/api/models/org/tiny/revision/") {
        let siblings: Vec<_> = state.files.keys().map(|name| json!({"rfilename": name})).collect();
        let mut about = json!({"id": "org/tiny", "sha": SHA, "siblings": siblings, "private": false});
        if is_data_set {
            about["cardData"] = state.card.clone();
        }
        return ok(&about);
    }
    if path == format!("/api/models/org/tiny/paths-info/{SHA}") && !state.rules.no_paths_info {
        let wanted: Value = serde_json::from_slice(&asked.body).unwrap();
        let wanted = wanted["paths"].as_array().unwrap().iter().map(|name| name.as_str().unwrap());
        let entries = wanted.filter_map(|name| Some(about_file(state, name, state.files.get(name)?)));
        return ok(&entries.collect());
    }
    if path == format!("/api/models/org/tiny/xet-read-token/{SHA}") && !state.rules.no_xet {
        return xet_token(state, storage);
    }
    if let Some(name) = path.strip_prefix(&format!("/org/tiny/resolve/{SHA}/")) {
        let Some(content) = state.files.get(name).cloned() else { return answer("404 Not Found", "") };
        let etag = match (state.rules.odd_etags, content.len() >= state.rules.lfs_from) {
            (true, _) => format!("W/\"{}-odd/../etag\"", content.len()),
            (false, true) => format!("\"{}\"", sha256(&content)),
            (false, false) => format!("\"{}\"", blob_sha1(&content)),
        };
        if content.len() >= state.rules.lfs_from {
            let size = content.len();
            let xet = state.xet_names.get(&sha256(&content)).map(|name| format!("X-Xet-Hash: {name}\r\n"));
            return answer(
                &format!(
                    "302 Found\r\nX-Repo-Commit: {SHA}\r\nX-Linked-Etag: {etag}\r\nX-Linked-Size: {size}\r\nETag: \"not this\"\r\n{}Location: {storage}/get/{name}?signature=s",
                    xet.unwrap_or_default()
                ),
                "elsewhere",
            );
        }
        let mut reply = content_answer(state, &content, asked.range, method == "GET");
        reply.head += &format!("\r\nX-Repo-Commit: {SHA}\r\nETag: {etag}");
        return reply;
    }
    if path.starts_with("/moved/") {
        // A repository that was renamed: the redirect stays at the hub.
        return answer(&format!("307 Moved\r\nLocation: {}", path.replacen("/moved/", "/org/", 1)), "");
    }
    if method == "POST" || path == "/api/whoami-v2" || path.contains("/xet-write-token/") {
        if asked.token.as_deref() != Some(TOKEN) {
            return answer("401 Unauthorized", r#"{"error": "Invalid credentials"}"#);
        }
        return pushed(state, path, &asked.body, hub, storage);
    }
    answer("404 Not Found", "")
}

/// Content, or what a range asks of it, as the rules spoil it.
fn content_answer(state: &mut State, content: &[u8], range: Option<usize>, spoil: bool) -> Answer {
    let start = range.filter(|_| !state.rules.whole_files);
    if start.is_some_and(|start| start >= content.len()) {
        return answer("416 Range Not Satisfiable", "");
    }
    let mut body = content[start.unwrap_or(0)..].to_vec();
    let announced = body.len();
    if spoil && state.rules.corrupt > 0 && !body.is_empty() {
        state.rules.corrupt -= 1;
        let last = body.len() - 1;
        body[last] ^= 1;
    }
    if spoil && state.rules.cut > 0 && announced > 100 {
        state.rules.cut -= 1;
        body.truncate(announced / 2);
    }
    let head = match start {
        Some(start) => {
            format!("206 Partial Content\r\nContent-Range: bytes {start}-{}/{}", content.len() - 1, content.len())
        }
        None => "200 OK".into(),
    };
    Answer { head, body, length: Some(announced) }
}

/// An entry of the answer about several files.
fn about_file(state: &State, name: &str, content: &[u8]) -> Value {
    let size = content.len();
    let hash = |hash: String| if state.rules.odd_etags { format!("W/\"{size}-odd/../etag\"") } else { hash };
    let mut entry = json!({"type": "file", "path": name, "size": size, "oid": hash(blob_sha1(content))});
    if size >= state.rules.lfs_from {
        entry["lfs"] = json!({"sha256": hash(sha256(content)), "size": size, "pointerSize": 134});
    }
    if let Some(name) = state.xet_names.get(&sha256(content)) {
        entry["xetHash"] = name.clone().into();
    }
    entry
}

/// Says where Xet is, and gives a token for it that is not the hub's.
fn xet_token(state: &mut State, storage: &str) -> Answer {
    state.cas.get_or_insert_with(cas::Cas::start);
    ok(&json!({"accessToken": "of-the-storage", "exp": 4_000_000_000u64, "casUrl": storage}))
}

fn at_storage(state: &mut State, method: &str, path: &str, asked: &Asked) -> Answer {
    let path = path.split('?').next().unwrap_or_default();
    if let Some(name) = path.strip_prefix("/get/") {
        let Some(content) = state.files.get(name).cloned() else { return answer("404 Not Found", "") };
        return content_answer(state, &content, asked.range, method == "GET");
    }
    answer("404 Not Found", "")
}

fn pushed(state: &mut State, path: &str, body: &[u8], hub: &str, storage: &str) -> Answer {
    let json = || serde_json::from_slice::<Value>(body).unwrap();
    if path == "/api/whoami-v2" {
        return ok(&json!({"name": "me", "type": "user"}));
    }
    if path == "/api/repos/create" {
        let wanted = json();
        let repo = format!("{}/{}", wanted["organization"].as_str().unwrap(), wanted["name"].as_str().unwrap());
        if state.repos.contains_key(&repo) {
            return answer("409 Conflict", r#"{"error": "You already created this model repo"}"#);
        }
        state.repos.insert(repo.clone(), wanted["private"].as_bool().unwrap());
        return ok(&json!({"url": format!("{hub}/{repo}")}));
    }
    let Some((repo, rest)) = split_repo(path) else { return answer("404 Not Found", "{}") };
    if !state.repos.contains_key(&repo) {
        return answer("404 Not Found\r\nX-Error-Code: RepoNotFound", r#"{"error": "Repository not found"}"#);
    }
    if rest.starts_with("xet-write-token/") && !state.rules.no_xet {
        return xet_token(state, storage);
    }
    if let Some(branch) = rest.strip_prefix("branch/") {
        if state.branches.iter().any(|known| known == branch) {
            return answer("409 Conflict", "{}");
        }
        state.branches.push(branch.to_owned());
        return answer("201 Created", "{}");
    }
    if rest.starts_with("preupload/") {
        let wanted = json();
        let files: Vec<Value> = wanted["files"]
            .as_array()
            .unwrap()
            .iter()
            .map(|file| {
                let size = file["size"].as_u64().unwrap() as usize;
                let mode = if size >= state.rules.lfs_from { "lfs" } else { "regular" };
                json!({"path": file["path"], "uploadMode": mode, "shouldIgnore": false})
            })
            .collect();
        return ok(&json!({"files": files}));
    }
    if rest == "info/lfs/objects/batch" {
        let wanted = json();
        assert!(wanted["transfers"].as_array().unwrap().contains(&json!("xet")));
        let transfer = if state.rules.no_xet { "basic" } else { "xet" };
        return ok(&json!({"transfer": transfer, "objects": wanted["objects"]}));
    }
    if rest.starts_with("commit/") {
        let lines: Vec<Value> =
            String::from_utf8_lossy(body).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for (name, content) in state.cas.as_ref().map(cas::Cas::files).unwrap_or_default() {
            state.xet_names.insert(sha256(&content), name);
            state.objects.insert(sha256(&content), content);
        }
        let missing = |line: &&Value| {
            line["key"] == "lfsFile" && !state.objects.contains_key(line["value"]["oid"].as_str().unwrap())
        };
        if lines.iter().any(|line| missing(&line)) {
            return answer("400 Bad Request", r#"{"error": "LFS object is missing"}"#);
        }
        for value in lines.iter().filter(|line| line["key"] == "lfsFile").map(|line| &line["value"]) {
            let content = state.objects[value["oid"].as_str().unwrap()].clone();
            state.files.insert(value["path"].as_str().unwrap().to_owned(), content);
        }
        state.commits.push(lines);
        return ok(&json!({"success": true, "commitOid": SHA, "commitUrl": format!("{hub}/{repo}/commit/{SHA}")}));
    }
    answer("404 Not Found", "{}")
}

/// The repository that a path is about, and the rest of the path.
fn split_repo(path: &str) -> Option<(String, String)> {
    let rest = path.strip_prefix("/api/models/").or(path.strip_prefix('/'))?;
    let mut parts = rest.splitn(3, '/');
    let (owner, name, rest) = (parts.next()?, parts.next()?, parts.next()?);
    Some((format!("{owner}/{}", name.trim_end_matches(".git")), rest.to_owned()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The name of an object in LFS.
pub fn sha256(content: &[u8]) -> String {
    hex(&Sha256::digest(content))
}

/// The name that Git gives a file's content.
pub fn blob_sha1(content: &[u8]) -> String {
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {}\0", content.len()));
    hasher.update(content);
    hex(&hasher.finalize())
}
