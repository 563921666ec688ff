//! Where a model comes from: a folder, or a model id of the Hugging Face hub; data sets of the hub, [`Hub::data_set`]; and the way back,
//! [`Hub::push`].
//!
//! Downloads go into the cache that the Python libraries share, so a model is fetched once whoever fetched it:
//! `models--ORG--NAME/{refs,blobs,snapshots}` under `HF_HUB_CACHE` or `HF_HOME/hub`. Only what is read is
//! downloaded: configuration, tokenizer, and safetensors weights, all from one commit, the one that the revision
//! pointed to at first. Nothing is printed: [`Hub::progress`] is told how far a transfer is.
//!
//! The hub's protocol is hf-hub's: requests, tokens, redirects, retries, proxies, TLS, Xet, commits. A redirect to
//! another scheme, host or port loses the token there. What this crate adds to hf-hub 1.0:
//!
//! - hf-hub starts a download from zero and takes whatever comes, even the page of an error, for the file. Here it
//!   goes on where it broke off, and nothing gets its name in the cache before its SHA-256 or Git's SHA-1 is right.
//! - hf-hub's commands for many files fetch all that match a pattern, and their lock gives up after ten seconds.
//!   Here one question names the files, and whoever comes second waits.
//! - hf-hub has no offline mode, no timeouts, no `~` in variables, and can't copy where links are not supported.
//! - hf-hub puts a large file into the commit itself where the hub has no Xet; here that is an error before.
//! - Errors say what to do about 401, 403 and 404.
//!
//! Two things are as hf-hub has them: certificates are the system's (`SSL_CERT_FILE` names others), and Xet keeps
//! its own cache in `HF_XET_CACHE` or `HF_HOME/xet`.

mod checkpoint;
mod client;
mod data_set;
mod download;
mod environment;
mod error;
mod part;
mod push;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use checkpoint::{INDEX, missing_file, shards, wanted};
use client::{Client, Failure, Info};
use download::Remote;

pub use data_set::DataSet;
pub use error::{HubError, Place, RepoKind};
pub use push::{Content, PushOptions, Pushed, Upload};

/// Finds the folder of a model or adapter: `model` is a folder, or a hub id, which is downloaded unless the cache
/// has it. See [`Hub::from_env`] for the environment variables. Nothing tells how far it is.
///
/// # Errors
/// As [`Hub::resolve`].
pub fn resolve(model: &str, revision: Option<&str>) -> Result<PathBuf, HubError> {
    Hub::from_env().resolve(model, revision)
}

/// A hub and the local cache of it.
#[derive(Clone)]
pub struct Hub {
    /// Folder that holds `models--ORG--NAME` folders.
    pub cache_dir: PathBuf,
    /// Address of the hub, without a slash at the end.
    pub endpoint: String,
    /// Access token for private and gated models.
    pub token: Option<String>,
    /// Whether only the cache may be used.
    pub offline: bool,
    /// Whether downloads may come by Xet, from another host than the hub.
    pub xet: bool,
    /// The pause before a request is tried again, about; it doubles from try to try.
    pub retry_delay: Duration,
    /// Told how far a transfer is, from any thread.
    pub progress: Option<OnProgress>,
}

impl fmt::Debug for Hub {
    /// Leaves the token out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cache_dir, endpoint, token, offline, xet, retry_delay, progress: _ } = self;
        f.debug_struct("Hub")
            .field("cache_dir", cache_dir)
            .field("endpoint", endpoint)
            .field("has_token", &token.is_some())
            .field("offline", offline)
            .field("xet", xet)
            .field("retry_delay", retry_delay)
            .finish_non_exhaustive()
    }
}

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the hub.
    Download,
    /// To the hub.
    Upload,
}

/// How far a transfer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// Which way it goes.
    pub direction: Direction,
    /// The file that is on its way.
    pub file: &'a str,
    /// Bytes that have arrived: of this file in a download, of all large files in an upload.
    pub done_bytes: u64,
    /// Bytes that will have in the end, where that is known.
    pub total_bytes: Option<u64>,
}

/// A callback for [`Progress`].
pub type OnProgress = Arc<dyn Fn(&Progress<'_>) + Send + Sync>;

impl Hub {
    /// Finds the folder of a model or adapter.
    ///
    /// A folder of that name wins over a hub id. Of a hub id the newest state of the revision
    /// (default `main`) is taken; when the hub can't be reached, the newest state in the cache. A
    /// full commit hash that is in the cache needs no network.
    ///
    /// # Errors
    /// [`HubError::Path`] if `model` can be neither; others if the hub does not have it, does not give it out, or
    /// can't be reached while the cache lacks it, and if the cache can't be written.
    pub fn resolve(&self, model: &str, revision: Option<&str>) -> Result<PathBuf, HubError> {
        let path_error = |problem| Err(HubError::Path { model: model.to_owned(), problem });
        let path = Path::new(model);
        match (path.is_dir(), revision) {
            (true, None) => return Ok(path.to_owned()),
            (true, Some(_)) => {
                return path_error("a local folder has no revisions; leave the revision out");
            }
            _ if path.exists() => {
                return path_error("this is a file; give the folder that holds the checkpoint");
            }
            _ if model.is_empty() => return path_error("no model given: a folder or a hub id"),
            _ if !is_hub_id(model) => {
                return path_error("no such folder (and a hub id looks like `org/name`)");
            }
            _ => {}
        }
        Request::new(self, (RepoKind::Model, model), revision)?.resolve()
    }
}

/// `name` or `org/name`, of letters, digits, `-`, `_` and `.`.
pub fn is_hub_id(model: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && !part.ends_with(['.', '-'])
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    model.len() <= 200
        && model.split('/').count() <= 2
        && model.split('/').all(is_part)
        && !model.contains("--")
        && !model.contains("..")
}

/// A relative path that stays below where it starts.
fn is_plain_path(path: &str) -> bool {
    let is_part = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains(['\\', ':', '\0']);
    path.split('/').all(is_part)
}

/// A full commit hash.
fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

struct Request<'a> {
    hub: &'a Hub,
    repo: (RepoKind, &'a str),
    revision: &'a str,
}

impl<'a> Request<'a> {
    /// # Errors
    /// The revision can't be one.
    fn new(hub: &'a Hub, repo: (RepoKind, &'a str), revision: Option<&'a str>) -> Result<Self, HubError> {
        let request = Self { hub, repo, revision: revision.unwrap_or("main") };
        if !is_plain_path(request.revision) {
            let problem = "this can't be the name of a branch or tag, or a commit".into();
            return Err(HubError::Name { at: request.place(), problem });
        }
        Ok(request)
    }
}

impl Request<'_> {
    fn resolve(&self) -> Result<PathBuf, HubError> {
        let cached = self.cached();
        if self.hub.offline {
            let offline = |missing| HubError::Offline { at: self.place(), cache: self.hub.cache_dir.clone(), missing };
            return match cached {
                Ok(Some(dir)) => Ok(dir),
                Ok(None) => Err(offline(None)),
                Err(missing) => Err(offline(Some(missing))),
            };
        }
        if let (true, Ok(Some(dir))) = (is_commit(self.revision), &cached) {
            return Ok(dir.clone());
        }
        let endpoint = self.hub.endpoint.clone();
        let client = match (Client::new(self.hub), &cached) {
            (Ok(client), _) => client,
            (Err(why), Ok(Some(dir))) => {
                tracing::warn!("the hub's client does not start ({why}): using {}", dir.display());
                return Ok(dir.clone());
            }
            (Err(why), _) => return Err(HubError::Client { endpoint, why }),
        };
        match (client.info(self.repo, self.revision), cached) {
            (Ok(info), _) => self.download(&client, info),
            (Err(Failure::NoAnswer(why)), Ok(Some(dir))) => {
                tracing::warn!("{endpoint} can't be reached ({why}): using {}", dir.display());
                Ok(dir)
            }
            (Err(Failure::NoAnswer(why)), _) => {
                Err(HubError::Unreachable { at: self.place(), cache: self.hub.cache_dir.clone(), endpoint, why })
            }
            (Err(failure), _) => Err(self.refused(self.place(), failure)),
        }
    }

    fn place(&self) -> Box<Place> {
        Box::new(Place {
            kind: self.repo.0,
            repo: self.repo.1.to_owned(),
            revision: self.revision.to_owned(),
            file: None,
        })
    }

    /// An answer that is no. The hub says 401 for private and for missing models alike.
    fn refused(&self, at: Box<Place>, failure: Failure) -> HubError {
        let Hub { endpoint, token, cache_dir, .. } = self.hub;
        let endpoint = endpoint.clone();
        let (status, code, message) = match failure {
            Failure::Status { status, code, message } => (status, code, message),
            Failure::NoAnswer(why) => return HubError::Interrupted { at, why },
            Failure::Nonsense(problem) => return HubError::Answer { at, endpoint, problem },
            Failure::Disk(source) => return HubError::Write { path: cache_dir.clone(), source },
        };
        match (status, code.as_str()) {
            (_, "RevisionNotFound") => HubError::NoSuchRevision { at, endpoint },
            (403, _) | (_, "GatedRepo") => HubError::Restricted { at, endpoint },
            (404, _) if at.file.is_some() => HubError::Refused { at, endpoint, status, message },
            (401 | 404, _) => HubError::NoSuchModel { at, endpoint, has_token: token.is_some() },
            _ => HubError::Refused { at, endpoint, status, message },
        }
    }

    /// The repository's folder in the cache.
    fn folder(&self) -> PathBuf {
        let (kind, repo) = self.repo;
        self.hub.cache_dir.join(format!("{}--{}", kind.folder(), repo.replace('/', "--")))
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder().join("snapshots").join(commit)
    }

    /// The commit that the revision pointed to when it was last downloaded.
    fn cached_commit(&self) -> Option<String> {
        match std::fs::read_to_string(self.folder().join("refs").join(self.revision)) {
            // What stands there becomes a path.
            Ok(commit) if is_commit(commit.trim()) => Some(commit.trim().to_owned()),
            Err(_) if is_commit(self.revision) => Some(self.revision.to_owned()),
            _ => None,
        }
    }

    /// The cached snapshot of the revision; an error names the file that an incomplete one lacks.
    fn cached(&self) -> Result<Option<PathBuf>, String> {
        let Some(commit) = self.cached_commit() else { return Ok(None) };
        let dir = self.snapshot(&commit);
        if !dir.is_dir() {
            return Ok(None);
        }
        missing_file(&dir).map_or(Ok(Some(dir)), Err)
    }

    /// The commit of an answer, which becomes a path.
    fn commit(&self, info: &Info) -> Result<String, HubError> {
        info.commit.clone().filter(|sha| is_commit(sha)).ok_or_else(|| {
            let problem = "names no commit".to_owned();
            HubError::Answer { at: self.place(), endpoint: self.hub.endpoint.clone(), problem }
        })
    }

    fn download(&self, client: &Client<'_>, info: Info) -> Result<PathBuf, HubError> {
        // Names from the network become paths: nothing may climb out of the snapshot.
        let commit = self.commit(&info)?;
        let remote = Remote { request: self, client, commit: &commit };
        let files: BTreeSet<&str> = info.files.iter().map(String::as_str).collect();
        let first = wanted(&files).map_err(|others| HubError::NoWeights { at: self.place(), others })?;
        remote.fetch(&first)?;
        if first.contains(&INDEX) {
            let shards = shards(&self.snapshot(&commit).join(INDEX))?;
            if let Some(file) = shards.iter().find(|shard| !files.contains(shard.as_str())) {
                return Err(HubError::NoShard { at: self.place(), file: file.clone() });
            }
            remote.fetch(&shards.iter().map(String::as_str).collect::<Vec<_>>())?;
        }
        self.write_ref(&commit)?;
        Ok(self.snapshot(&commit))
    }

    /// Notes the commit that the revision points to.
    fn write_ref(&self, commit: &str) -> Result<(), HubError> {
        self.write_beside(&self.folder().join("refs").join(self.revision), commit.as_bytes())
    }

    /// Writes a small file of the repository's folder, as a whole or not at all.
    fn write_beside(&self, path: &Path, content: &[u8]) -> Result<(), HubError> {
        // Nobody else writes to a file of this name.
        static WRITTEN: AtomicU64 = AtomicU64::new(0);
        let count = WRITTEN.fetch_add(1, Ordering::Relaxed);
        let unfinished = self.folder().join(format!("ref-{}-{count}", std::process::id()));
        let write = || {
            std::fs::create_dir_all(path.parent().unwrap_or(path))?;
            std::fs::write(&unfinished, content)?;
            std::fs::rename(&unfinished, path)
        };
        write().map_err(|source| HubError::Write { path: path.to_owned(), source })
    }
}
