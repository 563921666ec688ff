//! Errors of this crate. Each names the repository, file or variable at fault and what to do.

use std::fmt;
use std::path::PathBuf;

/// What a repository holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RepoKind {
    /// A model or an adapter.
    #[default]
    Model,
    /// A data set.
    DataSet,
}

impl RepoKind {
    /// Where pages of such repositories begin, behind the hub's address.
    pub(crate) fn page(self) -> &'static str {
        match self {
            Self::Model => "",
            Self::DataSet => "datasets/",
        }
    }

    /// What folders of the cache begin with.
    pub(crate) fn folder(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::DataSet => "datasets",
        }
    }
}

impl fmt::Display for RepoKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Model => "model",
            Self::DataSet => "data set",
        })
    }
}

/// What of the hub an error is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// What the repository holds.
    pub kind: RepoKind,
    /// The repository's id, such as `org/name`.
    pub repo: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// The file, where one is at fault.
    pub file: Option<String>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (revision {})", self.repo, self.revision)?;
        match &self.file {
            Some(file) => write!(f, ": {file}"),
            None => Ok(()),
        }
    }
}

/// What can go wrong between a model's name and its files, in either direction.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// A model is neither a folder nor a hub id.
    #[error("{model}: {problem}")]
    Path {
        /// The model as given.
        model: String,
        /// What was found and what is expected.
        problem: &'static str,
    },
    /// A repository, a revision or a file in a repository can't be called that.
    #[error("{at}: {problem}")]
    Name {
        /// The names as given.
        at: Box<Place>,
        /// Which name, and how it should look.
        problem: String,
    },
    /// The cache lacks a model or a part of it, and the network may not be used.
    #[error("{at}: {}, and offline mode is on; unset HF_HUB_OFFLINE to download it", absent(cache, missing.as_deref()))]
    Offline {
        /// The model.
        at: Box<Place>,
        /// The cache.
        cache: PathBuf,
        /// The file that a snapshot lacks, where there is one.
        missing: Option<String>,
    },
    /// An upload was asked for, and the network may not be used.
    #[error("{at}: offline mode is on; unset HF_HUB_OFFLINE to upload")]
    OfflineUpload {
        /// The repository.
        at: Box<Place>,
    },
    /// The hub gave no answer, and the cache does not have the model.
    #[error(
        "{at}: there is no folder of that name, it is not complete in the cache {}, and {endpoint} can't be reached: {why}",
        cache.display()
    )]
    Unreachable {
        /// The model.
        at: Box<Place>,
        /// The cache.
        cache: PathBuf,
        /// The hub's address.
        endpoint: String,
        /// What the network said.
        why: String,
    },
    /// A download broke off more often than it is worth trying.
    #[error("{at}: {why}; what was downloaded is kept, run again to continue")]
    Interrupted {
        /// The file.
        at: Box<Place>,
        /// What the network said.
        why: String,
    },
    /// The hub gave no answer to an upload.
    #[error(
        "{at}: {what}: {endpoint} can't be reached: {why}; the repository is unchanged, run again (what was \
         uploaded is not sent twice)"
    )]
    UploadInterrupted {
        /// The repository.
        at: Box<Place>,
        /// What was being done.
        what: &'static str,
        /// The hub's address.
        endpoint: String,
        /// What the network said.
        why: String,
    },
    /// The hub has no such model, or does not say so to this token. It answers the same for private models.
    #[error(
        "{at}: there is no folder of that name, and {endpoint} has no such {}; check the spelling, unless {}", at.kind,
        if *has_token { "the token in use has no access to it" } else { "it is private: then set HF_TOKEN" }
    )]
    NoSuchModel {
        /// The model.
        at: Box<Place>,
        /// The hub's address.
        endpoint: String,
        /// Whether a token was sent.
        has_token: bool,
    },
    /// The model has no such branch, tag or commit.
    #[error("{at}: {endpoint} has the {}, but not this revision", at.kind)]
    NoSuchRevision {
        /// The model.
        at: Box<Place>,
        /// The hub's address.
        endpoint: String,
    },
    /// A model that its owner gives out on request only.
    #[error(
        "{at}: access is restricted: accept the licence at {endpoint}/{}{}, then set HF_TOKEN to a token of that account",
        at.kind.page(), at.repo
    )]
    Restricted {
        /// The model.
        at: Box<Place>,
        /// The hub's address.
        endpoint: String,
    },
    /// Another answer than was asked for.
    #[error("{at}: {endpoint} answered with HTTP status {status}{}", quoted(message))]
    Refused {
        /// The model.
        at: Box<Place>,
        /// The hub's address.
        endpoint: String,
        /// The HTTP status.
        status: u16,
        /// What the hub said, or nothing.
        message: String,
    },
    /// The hub refused a step of an upload.
    #[error("{at}: {what}: the hub answered with HTTP status {status}{}", quoted(message))]
    UploadRefused {
        /// The repository.
        at: Box<Place>,
        /// What was being done.
        what: &'static str,
        /// The HTTP status.
        status: u16,
        /// What the hub said, or nothing.
        message: String,
    },
    /// An answer that can't be used.
    #[error("{at}: {endpoint} {problem}; is it a hub?")]
    Answer {
        /// The model.
        at: Box<Place>,
        /// The hub's address.
        endpoint: String,
        /// What came.
        problem: String,
    },
    /// A repository holds no weights that can be loaded.
    #[error(
        "{at}: the hub has neither config.json with model.safetensors or model.safetensors.index.json, nor \
         adapter_config.json with adapter_model.safetensors, but {others}; choose a model in the safetensors format"
    )]
    NoWeights {
        /// The model.
        at: Box<Place>,
        /// Weights of other kinds that it holds.
        others: String,
    },
    /// An index of weights names a file that the repository lacks.
    #[error("{at}: model.safetensors.index.json names {file}, which the hub does not have")]
    NoShard {
        /// The model.
        at: Box<Place>,
        /// The file.
        file: String,
    },
    /// An index of weights names a path that leads elsewhere.
    #[error("{}: `weight_map` names {file:?}, which is not a file beside it", path.display())]
    Index {
        /// The index.
        path: PathBuf,
        /// What it names.
        file: String,
    },
    /// A file's content is not what the hub announced.
    #[error(
        "{at}: its content has another checksum than the hub announced ({etag}); it was damaged on the way or at a \
         mirror: try again"
    )]
    Damaged {
        /// The file.
        at: Box<Place>,
        /// The checksum that was announced.
        etag: String,
    },
    /// An upload without a token.
    #[error(
        "{at}: uploading needs a token: make one with write access at {endpoint}/settings/tokens and set HF_TOKEN to \
         it, or log in with `hf auth login`"
    )]
    NoToken {
        /// The repository.
        at: Box<Place>,
        /// The hub's address.
        endpoint: String,
    },
    /// The hub does not know the token.
    #[error(
        "{at}: {what}: the token is not valid (any more); make one with write access at {endpoint}/settings/tokens"
    )]
    InvalidToken {
        /// The repository.
        at: Box<Place>,
        /// What was being done.
        what: &'static str,
        /// The hub's address.
        endpoint: String,
    },
    /// The token's account may not write there.
    #[error(
        "{at}: {what}: the token may not write there{}; it needs write access to this repository, see \
         {endpoint}/settings/tokens",
        quoted(message)
    )]
    NoWriteAccess {
        /// The repository.
        at: Box<Place>,
        /// What was being done.
        what: &'static str,
        /// The hub's address.
        endpoint: String,
        /// What the hub said, or nothing.
        message: String,
    },
    /// The hub stores large files in another way than is known here.
    #[error(
        "{at}: {file} is large, and {endpoint} has no Xet storage, the only way large files are uploaded here; upload \
         the folder with `hf upload` or Git LFS"
    )]
    NoXet {
        /// The repository.
        at: Box<Place>,
        /// The largest file.
        file: String,
        /// The hub's address.
        endpoint: String,
    },
    /// The client can't be set up.
    #[error("the hub's client does not start: {why}; check HF_ENDPOINT ({endpoint:?}) and the system's certificates")]
    Client {
        /// The hub's address as given.
        endpoint: String,
        /// Why.
        why: String,
    },
    /// A file of JSON can't be parsed.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A file can't be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file can't be written, or the download that goes into it.
    #[error("can't write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

fn absent(cache: &std::path::Path, missing: Option<&str>) -> String {
    match missing {
        Some(missing) => format!("the cache {} lacks its {missing}", cache.display()),
        None => format!("there is no folder of that name, it is not in the cache {}", cache.display()),
    }
}

fn quoted(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}
