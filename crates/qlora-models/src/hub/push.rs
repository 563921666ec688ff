//! Uploading files to a model repository of the hub, in one commit.
//!
//! The protocol is that of Python's `huggingface_hub` 1.x (`_commit_api.py`, `lfs.py`):
//!
//! 1. `POST /api/repos/create`, where an existing repository is fine.
//! 2. `POST /api/models/REPO/preupload/REVISION` with each file's size and first 512 bytes; the hub says which
//!    files go to Git LFS.
//! 3. For those: `POST /REPO.git/info/lfs/objects/batch`, then the content to the addresses that come back
//!    (whole, or in parts), and a word to the hub that it is there. What the hub has already is not sent.
//! 4. `POST /api/models/REPO/commit/REVISION` with lines of JSON: a header, the small files in base64, the large
//!    ones by their SHA-256.
//!
//! Nothing is visible before the commit, so a push that breaks off leaves the repository as it was. The token
//! goes to the hub alone, never to the storage that it names.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use ureq::SendBody;

use super::client::{Ask, Client, Failure, escaped, escaped_path};
use super::download::digest;
use super::{Hub, is_hub_id, is_plain_path};
use crate::error::ModelError;

const LFS: &str = "application/vnd.git-lfs+json";
const JSON: &str = "application/json";
/// The first bytes of a file, by which the hub tells text from binary.
const SAMPLE: usize = 512;
/// Files in one request of step 2 or 3, as `huggingface_hub` does.
const BATCH: usize = 256;
/// The largest file that the hub takes into the commit itself.
const MAX_INLINE: u64 = 100 << 20;

/// One file to upload.
#[derive(Debug, Clone)]
pub struct Upload {
    /// Its path in the repository.
    pub path: String,
    /// Its content.
    pub content: Content,
}

/// Where a file's content is.
#[derive(Debug, Clone)]
pub enum Content {
    /// On the disk.
    File(PathBuf),
    /// Here.
    Bytes(Vec<u8>),
}

/// Where and how to push.
#[derive(Debug, Clone)]
pub struct PushOptions {
    /// The branch; made if it does not exist.
    pub revision: String,
    /// Whether a repository that is made now is private.
    pub private: bool,
    /// The commit's first line.
    pub summary: String,
}

/// What a push did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// `user/name`.
    pub repo: String,
    /// The address of the commit, or of the repository.
    pub url: String,
    /// The commit.
    pub commit: String,
    /// Large files whose content was sent.
    pub sent: usize,
    /// Large files that the hub had.
    pub known: usize,
}

/// How far a push is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PushProgress<'a> {
    /// The file that is sent now.
    pub file: &'a str,
    /// Bytes of large files that are sent.
    pub done_bytes: u64,
    /// Bytes of large files that are to be sent.
    pub total_bytes: u64,
}

impl Hub {
    /// Uploads `files` to the model repository `repo` (`user/name`, or `name` for the token's own user), which is
    /// made if it does not exist.
    ///
    /// # Errors
    /// [`ModelError::Hub`] if there is no token or it may not write there, if the hub refuses or can't be reached;
    /// [`ModelError::Read`] for a file that can't be read.
    pub fn push(
        &self,
        repo: &str,
        files: &[Upload],
        options: &PushOptions,
        progress: &mut dyn FnMut(PushProgress<'_>),
    ) -> Result<Pushed, ModelError> {
        let client = Client::new(self);
        let mut push = Push { hub: self, client: &client, repo: repo.to_owned(), options };
        push.check(files)?;
        push.create()?;
        push.branch()?;
        let mut files: Vec<Prepared<'_>> = files.iter().map(Prepared::new).collect::<Result<_, _>>()?;
        push.preupload(&mut files)?;
        let (sent, known) = push.lfs(&files, progress)?;
        let done = push.commit(&files)?;
        Ok(Pushed { url: done.commit_url, commit: done.commit_oid, repo: push.repo, sent, known })
    }
}

/// A file and what the hub is told of it.
struct Prepared<'a> {
    upload: &'a Upload,
    size: u64,
    sample: Vec<u8>,
    /// The SHA-256, of files that go to LFS.
    oid: Option<String>,
    ignored: bool,
}

impl<'a> Prepared<'a> {
    fn new(upload: &'a Upload) -> Result<Self, ModelError> {
        let mut prepared = Self { upload, size: 0, sample: Vec::new(), oid: None, ignored: false };
        match &upload.content {
            Content::Bytes(bytes) => {
                prepared.size = bytes.len() as u64;
                prepared.sample = bytes[..bytes.len().min(SAMPLE)].to_vec();
            }
            Content::File(path) => {
                let read = |source| ModelError::Read { path: path.clone(), source };
                let file = File::open(path).map_err(read)?;
                prepared.size = file.metadata().map_err(read)?.len();
                file.take(SAMPLE as u64).read_to_end(&mut prepared.sample).map_err(read)?;
            }
        }
        Ok(prepared)
    }

    fn hash(&mut self) -> Result<(), ModelError> {
        self.oid = Some(match &self.upload.content {
            Content::Bytes(bytes) => Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect(),
            Content::File(path) => {
                let read = |source| ModelError::Read { path: path.clone(), source };
                digest(Sha256::new(), &mut File::open(path).map_err(read)?).map_err(read)?
            }
        });
        Ok(())
    }

    fn bytes(&self) -> Result<Vec<u8>, ModelError> {
        match &self.upload.content {
            Content::Bytes(bytes) => Ok(bytes.clone()),
            Content::File(path) => {
                std::fs::read(path).map_err(|source| ModelError::Read { path: path.clone(), source })
            }
        }
    }
}

#[derive(Deserialize)]
struct PreuploadAnswer {
    files: Vec<PreuploadFile>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PreuploadFile {
    path: String,
    upload_mode: String,
    #[serde(default)]
    should_ignore: bool,
}

#[derive(Deserialize)]
struct BatchAnswer {
    #[serde(default)]
    transfer: Option<String>,
    objects: Vec<BatchObject>,
}

#[derive(Deserialize)]
struct BatchObject {
    oid: String,
    #[serde(default)]
    actions: Option<Actions>,
    #[serde(default)]
    error: Option<Value>,
}

#[derive(Deserialize, Clone)]
struct Actions {
    #[serde(default)]
    upload: Option<Action>,
    #[serde(default)]
    verify: Option<Action>,
}

#[derive(Deserialize, Clone)]
struct Action {
    href: String,
    #[serde(default)]
    header: serde_json::Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CommitAnswer {
    #[serde(default)]
    commit_url: String,
    #[serde(default)]
    commit_oid: String,
}

struct Push<'a> {
    hub: &'a Hub,
    client: &'a Client<'a>,
    repo: String,
    options: &'a PushOptions,
}

impl Push<'_> {
    fn error(&self, problem: String) -> ModelError {
        ModelError::Hub { model: self.repo.clone(), revision: self.options.revision.clone(), problem }
    }

    fn check(&self, files: &[Upload]) -> Result<(), ModelError> {
        let endpoint = &self.hub.endpoint;
        if !is_hub_id(&self.repo) {
            return Err(self.error("a repository's name looks like `user/name`".into()));
        }
        if !is_plain_path(&self.options.revision) {
            return Err(self.error("this can't be the name of a branch".into()));
        }
        if let Some(file) = files.iter().find(|file| !is_plain_path(&file.path)) {
            return Err(self.error(format!("{:?} can't be a file's path in a repository", file.path)));
        }
        if self.hub.offline {
            return Err(self.error("offline mode is on; unset HF_HUB_OFFLINE to upload".into()));
        }
        if self.hub.token.is_none() {
            return Err(self.error(format!(
                "uploading needs a token: make one with write access at {endpoint}/settings/tokens and set HF_TOKEN to it, \
                 or log in with `hf auth login`"
            )));
        }
        Ok(())
    }

    /// A failure in words; `what` was being done.
    fn failed(&self, what: &str, failure: Failure) -> ModelError {
        let endpoint = &self.hub.endpoint;
        let problem = match failure {
            Failure::Unreachable(why) => format!(
                "{what}: {endpoint} can't be reached: {why}; the repository is unchanged, run again (what was uploaded is not sent twice)"
            ),
            Failure::Status { status: 401, .. } => format!(
                "{what}: the token is not valid (any more); make one with write access at {endpoint}/settings/tokens"
            ),
            Failure::Status { status: 403, message, .. } => format!(
                "{what}: the token may not write there{}; it needs write access to this repository, see {endpoint}/settings/tokens",
                quoted(&message)
            ),
            Failure::Status { status, message, .. } => {
                format!("{what}: the hub answered with HTTP status {status}{}", quoted(&message))
            }
        };
        self.error(problem)
    }

    fn post<T: serde::de::DeserializeOwned>(&self, what: &str, path: &str, body: &Value) -> Result<T, ModelError> {
        let body = body.to_string();
        let content_type = if path.contains("info/lfs") { LFS } else { JSON };
        let url = self.client.url(path);
        self.client.post(&url, content_type, body.as_bytes()).map_err(|failure| self.failed(what, failure))
    }

    fn create(&mut self) -> Result<(), ModelError> {
        const WHAT: &str = "making the repository";
        if !self.repo.contains('/') {
            let url = self.client.url("/api/whoami-v2");
            let mut answer = self.client.retry(|| self.client.get("GET", &url, &[], false));
            let text = answer.as_mut().map_or(Ok(String::new()), super::client::read_text);
            answer.map_err(|failure| self.failed("asking whose token it is", failure))?;
            let text = text.map_err(|failure| self.failed("asking whose token it is", failure))?;
            let name =
                serde_json::from_str::<Value>(&text).ok().and_then(|v| Some(v.get("name")?.as_str()?.to_owned()));
            let name =
                name.ok_or_else(|| self.error("the hub does not say whose token it is; write user/name".into()))?;
            self.repo = format!("{name}/{}", self.repo);
        }
        let (owner, name) = self.repo.split_once('/').unwrap_or(("", &self.repo));
        let body = json!({"name": name, "organization": owner, "private": self.options.private}).to_string();
        let url = self.client.url("/api/repos/create");
        match self.client.post::<Value>(&url, JSON, body.as_bytes()) {
            // It exists.
            Ok(_) | Err(Failure::Status { status: 409, .. }) => Ok(()),
            // A token for this repository alone may not make any; whether it exists the next step tells.
            Err(Failure::Status { status: 403, .. }) if self.exists() => Ok(()),
            Err(failure) => Err(self.failed(WHAT, failure)),
        }
    }

    fn exists(&self) -> bool {
        let url = self.client.url(&format!("/api/models/{}", self.repo));
        self.client.retry(|| self.client.get("GET", &url, &[], false)).is_ok()
    }

    fn branch(&self) -> Result<(), ModelError> {
        let revision = &self.options.revision;
        if revision == "main" {
            return Ok(());
        }
        let url = self.client.url(&format!("/api/models/{}/branch/{}", self.repo, escaped(revision)));
        match self.client.post::<Value>(&url, JSON, b"{}") {
            Ok(_) | Err(Failure::Status { status: 409, .. }) => Ok(()),
            Err(failure) => Err(self.failed("making the branch", failure)),
        }
    }

    /// Asks which files go to LFS, and hashes those.
    fn preupload(&self, files: &mut [Prepared<'_>]) -> Result<(), ModelError> {
        let path = format!("/api/models/{}/preupload/{}", self.repo, escaped(&self.options.revision));
        for batch in files.chunks_mut(BATCH) {
            let list: Vec<Value> = batch
                .iter()
                .map(|f| json!({"path": f.upload.path, "sample": BASE64.encode(&f.sample), "size": f.size}))
                .collect();
            let answer: PreuploadAnswer = self.post("announcing the files", &path, &json!({"files": list}))?;
            for file in batch {
                let said =
                    answer.files.iter().find(|f| f.path == file.upload.path).ok_or_else(|| {
                        self.error(format!("the hub does not say how to upload {}", file.upload.path))
                    })?;
                file.ignored = said.should_ignore;
                match said.upload_mode.as_str() {
                    // Git LFS refuses empty objects; so does `huggingface_hub`.
                    "lfs" if file.size > 0 => file.hash()?,
                    _ if file.size > MAX_INLINE => file.hash()?,
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// Sends the large files that the hub does not have; how many it got and how many it had.
    fn lfs(
        &self,
        files: &[Prepared<'_>],
        progress: &mut dyn FnMut(PushProgress<'_>),
    ) -> Result<(usize, usize), ModelError> {
        let large: Vec<(&Prepared<'_>, &str)> =
            files.iter().filter(|f| !f.ignored).filter_map(|f| Some((f, f.oid.as_deref()?))).collect();
        let path = format!("/{}.git/info/lfs/objects/batch", self.repo);
        let mut jobs = Vec::new();
        for batch in large.chunks(BATCH) {
            let objects: Vec<Value> = batch.iter().map(|(f, oid)| json!({"oid": oid, "size": f.size})).collect();
            let body = json!({
                "operation": "upload",
                "transfers": ["basic", "multipart"],
                "objects": objects,
                "hash_algo": "sha256",
                "ref": {"name": self.options.revision},
            });
            let answer: BatchAnswer = self.post("asking where large files go", &path, &body)?;
            let transfer = answer.transfer.as_deref().unwrap_or("basic");
            if !["basic", "multipart"].contains(&transfer) {
                return Err(self.error(format!("the hub wants large files by `{transfer}`, which is not known here")));
            }
            for (file, oid) in batch {
                let object = answer.objects.iter().find(|object| object.oid == *oid);
                let object = object
                    .ok_or_else(|| self.error(format!("the hub does not say where {} goes", file.upload.path)))?;
                if let Some(error) = &object.error {
                    let message = error.get("message").and_then(Value::as_str).unwrap_or("no reason given");
                    return Err(self.error(format!("the hub refuses {}: {message}", file.upload.path)));
                }
                jobs.push((*file, *oid, object.actions.clone()));
            }
        }
        let is_new = |actions: &Option<Actions>| actions.as_ref().is_some_and(|a| a.upload.is_some());
        let total_bytes = jobs.iter().filter(|(_, _, actions)| is_new(actions)).map(|(f, _, _)| f.size).sum();
        let (mut sent, mut done_bytes) = (0, 0);
        for (file, oid, actions) in &jobs {
            let Some(Actions { upload: Some(upload), verify }) = actions else { continue };
            progress(PushProgress { file: &file.upload.path, done_bytes, total_bytes });
            let what = format!("uploading {}", file.upload.path);
            self.send(file, oid, upload, &what)?;
            if let Some(verify) = verify {
                let body = json!({"oid": oid, "size": file.size}).to_string();
                let url = self.at_endpoint(&verify.href);
                let checked = self.client.post::<Value>(&url, LFS, body.as_bytes());
                checked.map_err(|failure| self.failed(&what, failure))?;
            }
            done_bytes += file.size;
            sent += 1;
            progress(PushProgress { file: &file.upload.path, done_bytes, total_bytes });
        }
        Ok((sent, jobs.len() - sent))
    }

    /// The hub names itself by its public address; at another endpoint (a mirror) that is meant.
    fn at_endpoint(&self, href: &str) -> String {
        match href.strip_prefix(super::ENDPOINT) {
            Some(rest) if rest.starts_with('/') => self.client.url(rest),
            _ => href.to_owned(),
        }
    }

    fn send(&self, file: &Prepared<'_>, oid: &str, upload: &Action, what: &str) -> Result<(), ModelError> {
        let text = |key: &str| Some(upload.header.get(key)?.as_str()?.to_owned());
        let Some(chunk) = text("chunk_size") else {
            let headers: Vec<(&str, String)> =
                upload.header.iter().filter_map(|(k, v)| Some((k.as_str(), v.as_str()?.to_owned()))).collect();
            self.put(file, 0, file.size, &upload.href, &headers, what)?;
            return Ok(());
        };
        let chunk: u64 = chunk
            .parse()
            .ok()
            .filter(|chunk| *chunk > 0)
            .ok_or_else(|| self.error(format!("{what}: the hub asks for parts of `{chunk}` bytes")))?;
        let mut parts = Vec::new();
        for number in 1..=file.size.div_ceil(chunk) {
            // The keys are numbers, which some servers pad with zeros.
            let key = |k: &&String| k.parse() == Ok(number);
            let href = upload
                .header
                .keys()
                .find(key)
                .and_then(|key| text(key))
                .ok_or_else(|| self.error(format!("{what}: the hub gives no address for part {number}")))?;
            let start = (number - 1) * chunk;
            let etag = self.put(file, start, chunk.min(file.size - start), &href, &[], what)?;
            let etag =
                etag.ok_or_else(|| self.error(format!("{what}: the storage confirmed part {number} without an ETag")))?;
            parts.push(json!({"partNumber": number, "etag": etag}));
        }
        let body = json!({"oid": oid, "parts": parts}).to_string();
        let done = self.client.post::<Value>(&self.at_endpoint(&upload.href), LFS, body.as_bytes());
        done.map(drop).map_err(|failure| self.failed(what, failure))
    }

    /// Sends a part of a file; the ETag that comes back.
    fn put(
        &self,
        file: &Prepared<'_>,
        start: u64,
        len: u64,
        href: &str,
        headers: &[(&str, String)],
        what: &str,
    ) -> Result<Option<String>, ModelError> {
        let mut all = headers.to_vec();
        all.retain(|(name, _)| !name.eq_ignore_ascii_case("content-length"));
        // Storage takes no chunked uploads.
        all.push(("content-length", len.to_string()));
        let ask = Ask { method: "PUT", url: href, headers: &all };
        // A file that can't be read is no reason to try again.
        let mut broken = None;
        let response = self.client.retry(|| match &file.upload.content {
            Content::Bytes(bytes) => {
                let end = (start + len) as usize;
                self.client.ask_once(ask, bytes.get(start as usize..end).unwrap_or_default())
            }
            Content::File(path) => {
                let open = || -> std::io::Result<File> {
                    let mut file = File::open(path)?;
                    file.seek(SeekFrom::Start(start))?;
                    Ok(file)
                };
                match open() {
                    Ok(opened) => self.client.ask_once(ask, SendBody::from_reader(&mut opened.take(len))),
                    Err(source) => {
                        broken = Some(ModelError::Read { path: path.clone(), source });
                        Err(Failure::Status { status: 0, code: String::new(), message: String::new() })
                    }
                }
            }
        });
        match (broken, response) {
            (Some(error), _) => Err(error),
            (None, Err(failure)) => Err(self.failed(what, failure)),
            (None, Ok(response)) => {
                Ok(response.headers().get("etag").and_then(|etag| etag.to_str().ok()).map(str::to_owned))
            }
        }
    }

    fn commit(&self, files: &[Prepared<'_>]) -> Result<CommitAnswer, ModelError> {
        let mut lines = vec![json!({"key": "header", "value": {"summary": self.options.summary, "description": ""}})];
        for file in files.iter().filter(|file| !file.ignored) {
            let path = &file.upload.path;
            lines.push(match &file.oid {
                Some(oid) => {
                    json!({"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": oid, "size": file.size}})
                }
                None => {
                    let content = BASE64.encode(file.bytes()?);
                    json!({"key": "file", "value": {"path": path, "content": content, "encoding": "base64"}})
                }
            });
        }
        let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let path = format!("/api/models/{}/commit/{}", escaped_path(&self.repo), escaped(&self.options.revision));
        let answer = self.client.post(&self.client.url(&path), "application/x-ndjson", body.as_bytes());
        let mut answer: CommitAnswer = answer.map_err(|failure| self.failed("committing", failure))?;
        if answer.commit_url.is_empty() {
            answer.commit_url = self.client.url(&format!("/{}", self.repo));
        }
        Ok(answer)
    }
}

fn quoted(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}
