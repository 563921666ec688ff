//! A hub on this machine that speaks the requests of a download and of a push, and the storage beside it, on a port
//! of its own: another origin, as the real one's is another host. It can be told to misbehave.

#![allow(dead_code, clippy::unwrap_used)] // each test program uses a part

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
    /// Files from this size on are in LFS: handed out by a redirect to the storage.
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
    /// Parts of uploads are this long, if not sent whole.
    pub chunk: Option<usize>,
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
            chunk: None,
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
    /// The files of the model `org/tiny`.
    pub files: BTreeMap<String, Vec<u8>>,
    /// Objects in LFS, by their SHA-256.
    pub objects: BTreeMap<String, Vec<u8>>,
    /// Parts of uploads.
    pub parts: BTreeMap<(String, usize), Vec<u8>>,
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
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header).ok()? <= 2 {
            break;
        }
        let (name, value) = header.split_once(':')?;
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "range" => asked.range = value.strip_prefix("bytes=")?.trim_end_matches('-').parse().ok(),
            "authorization" => asked.token = Some(value.strip_prefix("Bearer ")?.to_owned()),
            "content-length" => length = value.parse().ok()?,
            "expect" => (&stream).write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?,
            _ => {}
        }
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
        at_hub(&mut state, &method, &path, &asked, hub, storage)
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
    if let Some((status, code)) = state.rules.refuse.filter(|_| path.starts_with("/api/")) {
        return answer(&format!("{status} No\r\nX-Error-Code: {code}\r\nX-Error-Message: because of {code}"), "{}");
    }
    if method == "GET" && path.starts_with("/api/models/org/tiny/revision/") {
        let siblings: Vec<_> = state.files.keys().map(|name| json!({"rfilename": name})).collect();
        return ok(&json!({"sha": SHA, "siblings": siblings, "private": false}));
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
            return answer(
                &format!(
                    "302 Found\r\nX-Repo-Commit: {SHA}\r\nX-Linked-Etag: {etag}\r\nX-Linked-Size: {size}\r\nETag: \"not this\"\r\nLocation: {storage}/get/{name}?signature=s"
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
    if method == "POST" || path == "/api/whoami-v2" {
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

fn at_storage(state: &mut State, method: &str, path: &str, asked: &Asked) -> Answer {
    let path = path.split('?').next().unwrap_or_default();
    if let Some(name) = path.strip_prefix("/get/") {
        let Some(content) = state.files.get(name).cloned() else { return answer("404 Not Found", "") };
        return content_answer(state, &content, asked.range, method == "GET");
    }
    if let (Some(oid), "PUT") = (path.strip_prefix("/put/"), method) {
        if let Some((oid, part)) = oid.split_once('/') {
            state.parts.insert((oid.to_owned(), part.parse().unwrap()), asked.body.clone());
            return answer(&format!("200 OK\r\nETag: \"part-{part}\""), "");
        }
        if sha256(&asked.body) != oid {
            return answer("400 Bad Request", "another checksum");
        }
        state.objects.insert(oid.to_owned(), asked.body.clone());
        return answer("200 OK", "");
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
    if let Some(oid) = path.strip_prefix("/complete/") {
        let wanted = json();
        let mut whole = Vec::new();
        for part in wanted["parts"].as_array().unwrap() {
            let number = part["partNumber"].as_u64().unwrap() as usize;
            assert_eq!(part["etag"], format!("\"part-{number}\""));
            whole.extend(state.parts.remove(&(oid.to_owned(), number)).unwrap());
        }
        if sha256(&whole) != oid {
            return answer("400 Bad Request", "{}");
        }
        state.objects.insert(oid.to_owned(), whole);
        return ok(&json!({}));
    }
    if path == "/verify" {
        let wanted = json();
        let known = state.objects.get(wanted["oid"].as_str().unwrap());
        let right = known.is_some_and(|object| wanted["size"] == object.len());
        return if right { answer("200 OK", "") } else { answer("404 Not Found", "{}") };
    }
    let Some((repo, rest)) = split_repo(path) else { return answer("404 Not Found", "{}") };
    if !state.repos.contains_key(&repo) {
        return answer("404 Not Found\r\nX-Error-Code: RepoNotFound", r#"{"error": "Repository not found"}"#);
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
        let objects: Vec<Value> = wanted["objects"].as_array().unwrap().iter().map(|object| {
            let oid = object["oid"].as_str().unwrap();
            if state.objects.contains_key(oid) {
                return json!({"oid": oid, "size": object["size"]});
            }
            let upload = match state.rules.chunk {
                None => json!({"href": format!("{storage}/put/{oid}")}),
                Some(chunk) => {
                    let mut header = json!({"chunk_size": chunk.to_string()});
                    for part in 1..=(object["size"].as_u64().unwrap() as usize).div_ceil(chunk) {
                        header[format!("{part:05}")] = format!("{storage}/put/{oid}/{part}").into();
                    }
                    json!({"href": format!("{hub}/complete/{oid}"), "header": header})
                }
            };
            json!({"oid": oid, "size": object["size"], "actions": {"upload": upload, "verify": {"href": format!("{hub}/verify")}}})
        }).collect();
        let transfer = if state.rules.chunk.is_some() { "multipart" } else { "basic" };
        return ok(&json!({"transfer": transfer, "objects": objects}));
    }
    if rest.starts_with("commit/") {
        let lines: Vec<Value> =
            String::from_utf8_lossy(body).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let missing = |line: &&Value| {
            line["key"] == "lfsFile" && !state.objects.contains_key(line["value"]["oid"].as_str().unwrap())
        };
        if lines.iter().any(|line| missing(&line)) {
            return answer("400 Bad Request", r#"{"error": "LFS object is missing"}"#);
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
